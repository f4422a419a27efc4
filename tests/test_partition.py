"""What a user passes by mistake to a partition's saving, reading, comparing, baselines and stability is refused in one
line; what is unusual and right is not."""
import json, math, os, pickle
from contextlib import contextmanager

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import save_file

from subspace_circuits import partition
from subspace_circuits.activations import batch_rows, capture, fingerprint
from subspace_circuits.circuit_families import plant
from subspace_circuits.closed_form import closed_form
from subspace_circuits.dependence import block_entropy, determination, subspace_information
from subspace_circuits.edges import planted_partitions
from subspace_circuits.evaluation import carries, copy_tests
from subspace_circuits.files import of_others
from subspace_circuits.forward import circuit_sites
from subspace_circuits.growth import grow_partition, learn_partition
from subspace_circuits.partition import (
    Partition, check_activations, compare, distinct_rows, isolation, name_subspaces, read_published, variable_shares)
from subspace_circuits.published_ndm import split_ndm
from subspace_circuits.search import find_partition
from subspace_circuits.stability import baseline_partition, group_components, stability
from subspace_circuits.suites import knowledge_conflict, partition_information, suite

published = of_others("published/ndm_gpt2")
key = "R.parametrizations.weight.0.base"
kinds = ["identity", "random", "pca", "pca ascending", "ica"]


@pytest.fixture(autouse=True)
def one_thread(): torch.set_num_threads(1)


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def rotation(d, seed=0): return torch.linalg.qr(torch.randn(d, d, generator=seeded(seed)))[0]


def cut(basis, sizes, site="site"): return Partition({f"s{i}": o for i, o in enumerate(basis.split(sizes, 1))}, site)


@contextmanager
def refused(*parts):
    "A ValueError of one line that says all of this."
    with pytest.raises(ValueError) as e: yield
    assert "\n" not in str(e.value) and all(o in str(e.value) for o in parts), str(e.value)


# saving

def test_one_dimensional_subspaces_share_storage_and_are_saved(tmp_path):
    p = cut(rotation(6).T, [1, 1, 1, 3])
    p.save_pretrained(tmp_path/"p")
    assert Partition.from_pretrained(tmp_path/"p").basis.equal(p.basis)


def test_same_partition_same_bytes(tmp_path):
    for o in "ab": Partition({"x y/ü": rotation(4)}, "site", info=dict(n=1)).save_pretrained(tmp_path/o)
    for o in (tmp_path/"a").iterdir(): assert o.read_bytes() == (tmp_path/"b"/o.name).read_bytes()
    assert Partition.from_pretrained(tmp_path/"a").names == ["x y/ü"]


def test_folders_of_the_first_version_are_read(tmp_path):
    R = rotation(5)
    save_file({"mean": torch.ones(5), "basis.a": R[:, :2].contiguous(), "basis.rest": R[:, 2:].contiguous()},
              tmp_path/"partition.safetensors")
    (tmp_path/"partition.json").write_text(json.dumps(dict(site="site", names=["a", "rest"], info=dict(seed=3))))
    p = Partition.from_pretrained(tmp_path)
    assert (p.sizes, p.info, p.mean.sum()) == ({"a": 2, "rest": 3}, {"seed": 3}, 5) and p.basis.equal(R)


def test_an_interrupted_save_leaves_nothing_that_opens(tmp_path, monkeypatch):
    cut(rotation(4), [4]).save_pretrained(tmp_path)
    def stop(*_): raise KeyboardInterrupt
    monkeypatch.setattr(partition, "_card", stop)
    with pytest.raises(KeyboardInterrupt): cut(rotation(4, 1), [2, 2]).save_pretrained(tmp_path)
    with refused("holds no partition.json but"): Partition.from_pretrained(tmp_path)


@pytest.mark.parametrize("file, content, said", [
    ("partition.json", "{", "is no JSON"), ("partition.json", "[]", "partition.json is [], an object is needed"),
    ("partition.json", '{"site": "x"}', "partition.json has no names"),
    ("partition.json", '{"format": 9, "site": "site", "names": []}', "has format 9, this version reads format 1"),
    ("partition.json", '{"site": "site", "names": ["s0", "other"]}', "lacks basis.other"),
    ("partition.safetensors", "half", "is no whole safetensors file")])
def test_broken_folders(tmp_path, file, content, said):
    cut(rotation(4), [2, 2]).save_pretrained(tmp_path)
    (tmp_path/file).write_text(content)
    with refused(said): Partition.from_pretrained(tmp_path)


def test_a_pickle_in_place_of_the_tensors_does_not_run(tmp_path):
    cut(rotation(4), [4]).save_pretrained(tmp_path)
    (tmp_path/"partition.safetensors").write_bytes(pickle.dumps(Runs(tmp_path/"it ran")))
    with refused("is no whole safetensors file"): Partition.from_pretrained(tmp_path)
    assert not (tmp_path/"it ran").exists()


def test_places_that_are_no_folder(tmp_path):
    (tmp_path/"file").write_text("")
    with refused("is a file: name a folder"): cut(rotation(4), [4]).save_pretrained(tmp_path/"file")
    with refused("holds no partition.json but a file"): Partition.from_pretrained(tmp_path/"file")
    (tmp_path/"empty").mkdir()
    with refused("holds no partition.json but nothing"): Partition.from_pretrained(tmp_path/"empty")


def test_the_hub_without_a_network(monkeypatch):
    def offline(*_, **__): raise FileNotFoundError("cannot locate\nthe files on the hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with refused("no partition 'owner/name'", "a hub id, which needs a network", "cannot locate"):
        Partition.from_pretrained("owner/name")
    for error in HfHubHTTPError.__bases__:
        def fails(*_, **__): raise error("no route\nto host")
        monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fails)
        with refused("site was not pushed to 'owner/name'", "no route"): cut(rotation(4), [4]).push_to_hub("owner/name")


# published matrices

class Runs:
    "Makes a file when it is unpickled."
    def __init__(self, file): self.file = file
    def __reduce__(self): return (os.mkdir, (str(self.file),))


def write(folder, state, sizes=(2, 3), name="R-toy-x0.mid.pt", **kwargs):
    torch.save(state, folder/name, **kwargs)
    if sizes is not None:
        (folder/name.replace("R-", "R_config-").replace(".pt",
                                                        ".json")).write_text(json.dumps({"partition": list(sizes)}))
    return folder/name


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_published_file_does_not_run(tmp_path, zipped):
    file = write(tmp_path, {key: Runs(tmp_path/"it ran")}, _use_new_zipfile_serialization=zipped)
    with refused("must hold tensors and nothing else"): read_published(file)
    assert not (tmp_path/"it ran").exists()


@pytest.mark.parametrize("state, said", [
    (torch.eye(5), "holds Tensor"), ([torch.eye(5)], "holds list"), ({}, "alone"),
    ({key: torch.eye(5), "R.parametrizations.weight.original": torch.zeros(5, 5)}, "original, a published file holds"),
    ({"weight": torch.eye(5)}, "holds weight, a published file holds"),
    ({key: torch.eye(5)[:4]}, "shape (4, 5), a square matrix"), ({key: torch.eye(5).long()}, "torch.int64"),
    ({key: [1.]}, "holds list"), ({key: torch.full((5, 5), torch.nan)},
                                  "25 entries of R-toy-x0.mid.pt are not finite"),
                                  ({key: torch.ones(5, 5)}, "orthogonal only to 5.0e+00"),
    ({key: torch.randn(5, 5, generator=seeded())}, "it is no rotation")])
def test_files_of_another_content(tmp_path, state, said):
    with refused(said): read_published(write(tmp_path, state))


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", None])
def test_files_that_are_not_whole(tmp_path, content):
    file = write(tmp_path, {key: rotation(5)})
    file.write_bytes(file.read_bytes()[:700] if content is None else content)
    with refused("was not opened"): read_published(file)


@pytest.mark.parametrize("sizes, said", [((2, 2), "add up to 4, R-toy-x0.mid.pt is 5 wide"),
                                         ((6, -1), "positive integers"),
                                         ((2.5, 2.5), "is 2.5, a whole number is needed"),
                                         (("2", "3"), 'is "2", a whole number is needed')])
def test_sizes_that_do_not_fit(tmp_path, sizes, said):
    with refused(said): read_published(write(tmp_path, {key: rotation(5)}, sizes))


@pytest.mark.parametrize("config", ["{", "[5]", '{"sizes": [5]}'])
def test_configs_of_another_content(tmp_path, config):
    (tmp_path/"c.json").write_text(config)
    with refused('fetch it again, {"partition": [sizes]}'):
        read_published(write(tmp_path, {key: rotation(5)}), tmp_path/"c.json")


def test_folders_and_names(tmp_path):
    with refused("holds no R-*.pt"): read_published(tmp_path)
    with refused("holds no R-*.pt"): read_published(tmp_path/"nowhere")
    file = write(tmp_path, {key: rotation(5)}, name="R-gpt2-small-m11.pt")
    p = read_published(tmp_path)
    assert (p.site, p.info["model"], p.sizes) == ("blocks.11.hook_mlp_out", "gpt2-small", {"s0": 2, "s1": 3})
    assert read_published(write(tmp_path, {key: rotation(5).double()},
                                name="R-x-a4.1.pt")).site == "blocks.4.attn.hook_result.1"
    with refused("holds 2 matrices (R-gpt2-small-m11.pt, R-x-a4.1.pt)"): read_published(tmp_path)
    with refused("names no site"): read_published(write(tmp_path, {key: rotation(5)}, name="R-x4.pt"))
    (tmp_path/"R_config-gpt2-small-m11.json").unlink()
    with refused("no sizes for R-gpt2-small-m11.pt", "pass config="): read_published(file)


def test_half_precision_is_mended_and_said(tmp_path):
    p = read_published(write(tmp_path, {key: rotation(64).half()}, (32, 32)))
    assert 1e-5 < p.info["deviation"] < 1e-2 and (p.basis.T@p.basis - torch.eye(64)).abs().max() < 1e-5
    assert compare(p, cut(rotation(64), [32, 32], p.site)).mean > .9999


@pytest.mark.skipif(not published.exists(), reason=f"published matrices are not here: no {published}")
@pytest.mark.parametrize("site", ["x4", "x6", "x8", "x9"])
def test_matrices_of_gpt2(site):
    p = read_published(published/f"R-gpt2-{site}.post.pt")
    assert p.site == f"blocks.{site[1:]}.hook_resid_post" and .8e-4 < p.info["deviation"] < 1.6e-4
    assert (p.basis.T@p.basis - torch.eye(768)).abs().max() < 1e-5


# comparing

@pytest.mark.parametrize("seed", range(5))
def test_comparison_knows_no_order_and_no_axes(seed):
    R, sizes = rotation(20, seed), [7, 6, 4, 3]
    blocks = [o@rotation(o.shape[1], seed) for o in R.split(sizes, 1)]
    order = torch.randperm(4, generator=seeded(seed)).tolist()
    a, b = cut(R, sizes), Partition({f"t{i}": blocks[i] for i in order}, "site")
    c = compare(a, b)
    assert all(o["b"] == "t" + o["a"][1:] and o["overlap"] > 1 - 1e-5 and o["angle"] < .05 for o in c.pairs)
    assert abs(c.mean - 1) < 1e-5


@pytest.mark.parametrize("degrees", [.5, 5, 45, 80])
def test_angles_are_those_of_the_rotation(degrees):
    t = math.radians(degrees)
    B = torch.eye(8)
    B[0, 0], B[0, 4], B[4, 0], B[4, 4] = math.cos(t), -math.sin(t), math.sin(t), math.cos(t)
    c = compare(cut(torch.eye(8), [4, 4]), cut(B, [4, 4]))
    assert all(abs(o["angle"] - degrees) < 1e-2 and abs(o["overlap"] - (3 + math.cos(t)**2)/4) < 1e-5 for o in c.pairs)


def test_comparison_is_symmetric_and_counts_the_unmatched():
    a, b = cut(rotation(12), [6, 6]), cut(rotation(12, 1), [4, 4, 2, 2])
    c, back = compare(a, b), compare(b, a)
    assert torch.allclose(c.overlap, back.overlap.T) and abs(c.mean - back.mean) < 1e-6 and c.mean <= .5
    assert c.unmatched["a"] == [] and len(c.unmatched["b"]) == 2 and back.unmatched["a"] == c.unmatched["b"]


def test_partitions_of_other_places_are_not_compared():
    with refused("of here, 4 wide", "of there, 4 wide"):
        compare(cut(rotation(4), [4], "here"), cut(rotation(4), [4], "there"))
    with refused("4 wide", "5 wide"): compare(cut(rotation(4), [4]), cut(rotation(5), [5]))


# baselines and checks

@pytest.mark.parametrize("kind", kinds)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_baselines_are_orthogonal_and_repeat(kind, dtype):
    h = torch.randn(200, 8, generator=seeded()).pow(3)
    h[:, 7] = 1 # a direction in which nothing varies
    p, q = (baseline_partition(h.to(dtype), "site", [3, 3, 2], kind, seed=2) for _ in range(2))
    assert (p.basis.T@p.basis - torch.eye(8)).abs().max() < 1e-5 and p.basis.equal(q.basis)
    assert list(p.sizes.values()) == [3, 3, 2]


def test_principal_components_come_in_order():
    h = torch.randn(4000, 6, generator=seeded())*torch.arange(1., 7.)
    down, up = (baseline_partition(h, "site", [1]*6, o) for o in ("pca", "pca ascending"))
    assert [o[0].abs().argmax(0).item() for o in ([v] for v in down.bases.values())] == [5, 4, 3, 2, 1, 0]
    assert [v.abs().argmax().item() for v in up.bases.values()] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("sizes, said", [([3, 3], "add up to 6, site has 8 dimensions"), ([9, -1], "positive sizes"),
                                         ([8, 0], "positive sizes")])
def test_baseline_sizes(sizes, said):
    with refused(said): baseline_partition(torch.randn(50, 8, generator=seeded()), "site", sizes, "identity")


def test_independent_components_find_independent_subspaces():
    "Two independent variables, each a scaled Gaussian in three dimensions: squares depend inside, not between."
    g = seeded()
    z = torch.cat([torch.randn(30_000, 3, generator=g)*torch.randn(30_000, 1, generator=g).exp() for _ in range(2)], 1)
    z /= z.std(0)
    R = rotation(6, 3)
    assert compare(cut(R, [3, 3]), baseline_partition(z@R.T, "site", [3, 3], "ica")).mean > .95


@pytest.mark.parametrize("seed", range(10))
def test_groups_of_components(seed):
    sizes = [5, 2, 7, 1, 5]
    S = torch.block_diag(*[torch.full((k, k), .5) for k in sizes]) + .1*torch.rand(20, 20, generator=seeded(seed))
    order = torch.randperm(20, generator=seeded(seed))
    S = ((S + S.T)/2)[order][:, order]
    found = {tuple(sorted(order[g].tolist())) for g in group_components(S, sizes, seeded(seed))}
    assert found == {tuple(o.tolist()) for o in torch.arange(20).split(sizes)}


@pytest.mark.parametrize("change, said", [
    (lambda h: h.numpy(), "pass a float tensor"), (lambda h: h.int(), "torch.int32: pass a float tensor"),
    (lambda h: h.to(torch.complex64), "pass a float tensor"), (lambda h: h.flatten(), "have shape (800,)"),
    (lambda h: h[:7], "7 activations of site are fewer than its 8 dimensions"), (lambda h: h[:0], "0 activations"),
    (lambda h: h*0 + 3, "all 100 activations of site are equal"),
    (lambda h: (h*1e6).half(), "are not finite"),
    (lambda h: h.where(torch.arange(100)[:, None] != 41, -torch.inf),
     "1 of 100 activations of site are not finite, the first is row 41")])
@pytest.mark.parametrize("use", [check_activations, lambda h, site: baseline_partition(h, site, [4, 4], "random"),
                                 lambda h, site: stability(h, site, None)])
def test_activations_that_are_refused(change, said, use):
    with refused(said): use(change(torch.randn(100, 8, generator=seeded())), "site")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_distinct_rows_are_counted(dtype):
    h = torch.randint(0, 3, (40_000, 5), generator=seeded()).to(dtype)
    assert distinct_rows(h) == len(h.float().unique(dim=0))
    assert check_activations(h, "site") == dict(rows=40_000, distinct=243)


# stability

def test_entropy_of_gaussian_rows_is_known():
    scale = torch.linspace(.2, 2, 10)
    h, R = torch.randn(1500, 10, generator=seeded())*scale, rotation(10)
    noise = (.05**2*(scale**2).mean())
    known = ((scale**2 + noise).log().sum() + 10*math.log(2*math.pi*math.e)).item()/2
    for sizes in ([10], [5, 5], [1]*10, [9, 1]):
        assert abs(block_entropy(cut(torch.eye(10), sizes), h) - known) < .5, sizes
    assert block_entropy(cut(R, [5, 5]), h) > known + .5 # axes of a correlated pair of blocks
    repeated = h[:30].repeat(50, 1)
    assert math.isfinite(block_entropy(cut(R, [5, 5]), repeated))
    assert math.isfinite(block_entropy(cut(R, [5, 5]), h.half()))


def test_two_numbers_of_subspaces_for_rows_without_structure():
    def either(h, site, seed): return cut(torch.eye(12), [6, 4, 2] if seed % 2 else [10, 2], site)
    s = stability(torch.randn(8000, 12, generator=seeded()), "site", either)
    assert s.verdict.startswith("not identified: 2 different answers") and {o["subspaces"] for o in s.refits} == {2, 3}


def test_more_subspaces_than_before_are_named_by_number():
    def more(h, site, seed): return cut(torch.eye(40), [20, 19, 1] if seed % 2 else [20, 20], site)
    s = stability(torch.randn(800, 40, generator=seeded()), "site", more, score=lambda p, h: float(len(p.names)))
    assert s.verdict == "not stable: with 2, 3 subspaces"


def test_another_score_decides():
    def fit(h, site, seed): return cut(rotation(8, seed), [4, 4], site)
    h = torch.randn(2000, 8, generator=seeded())
    assert stability(h, "site", fit, score=lambda p, rows: 0.).verdict.startswith("not identified: 3 different answers")
    prefers = lambda p, rows: -compare(p, cut(rotation(8, 1), [4, 4])).mean
    said = stability(h, "site", fit, score=prefers).verdict
    assert said == "not stable: they differ in s0, s1; a refit explains held-out rows better"
    dislikes = lambda p, rows: -compare(p, cut(rotation(8), [4, 4])).mean
    assert stability(h, "site", fit, score=dislikes).verdict == "not stable: they differ in s0, s1"


def test_refits_see_what_they_should():
    seen = []
    def fit(h, site, seed):
        seen.append((h, seed))
        return cut(torch.eye(4), [2, 2], site)
    h = torch.arange(4000.).view(-1, 4)
    s = stability(h, "site", fit, n=4, seed=7)
    assert [len(o) for o, _ in seen] == [800, 400, 400, 800, 800] and [o for _, o in seen] == [7, 7, 7, 8, 9]
    whole, a, b = (set(o[:, 0].tolist()) for o, _ in seen[:3])
    assert a | b == whole and not a & b and s.verdict == "stable"
    assert len(stability(h, "site", fit, n=1).refits) == 1


def test_stability_of_too_little():
    fit = lambda h, site, seed: cut(torch.eye(4), [4], site)
    with refused("0 refits"): stability(torch.randn(500, 4, generator=seeded()), "site", fit, n=0)
    with refused("399 activations"): stability(torch.randn(399, 4, generator=seeded()), "site", fit)
    with refused("of other, 4 wide"):
        stability(torch.randn(500, 4, generator=seeded()), "site", lambda h, site,
                  seed: cut(torch.eye(4), [4], "other" if seed else site))


@pytest.mark.parametrize("rank", [1, 2, 12, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_commutant_of_any_rank(rank, dtype):
    "Matrices of low rank leave the equations without full rank; what is found commutes all the same."
    from subspace_circuits.closed_form import commuting
    g = torch.Generator().manual_seed(rank)
    frame = torch.linalg.qr(torch.randn(24, 24, generator=g, dtype=dtype))[0][:, :rank]
    inner = torch.randn(20, rank, rank, generator=g, dtype=dtype)
    C = frame@(inner + inner.mT)@frame.T
    e, X = commuting(C, 3, g)
    assert X.dtype == dtype and torch.isfinite(X).all()
    assert torch.allclose(X.flatten(1).norm(dim=1), torch.ones(3, dtype=dtype), atol=1e-4)
    # what the cumulants leave empty commutes with all
    if rank <= 12: assert (C[:, None]@X - X@C[:, None]).abs().max() < 1e-3*C.abs().max()


def test_ica_of_a_coin_ends():
    "The square of a component that is a coin is constant and has no correlation; grouping refuses what is no number."
    g = torch.Generator().manual_seed(0)
    coins = torch.randint(2, (2000, 6), generator=g)*2. - 1
    p = baseline_partition(coins@torch.linalg.qr(torch.randn(6, 6, generator=g))[0], "x", [3, 3], "ica")
    assert p.sizes == {"s0": 3, "s1": 3}
    with pytest.raises(ValueError, match="the dependence of 4 components is not finite everywhere"):
        group_components(torch.full((4, 4), math.nan), [2, 2], g)


# whose activations, whose model

@pytest.fixture(scope="module")
def planted(): return plant("induction", certified=False)


def test_activations_of_another_site_are_refused_by_name(planted, tmp_path):
    "Of equal width, from a store or from `batch_rows`, by whatever takes rows with a partition or a site."
    here, there = circuit_sites(planted.model)[:2]
    p = planted_partitions(planted)[here]
    store = capture(planted.model, planted.task, [here, there], tmp_path/"store", shards=2)
    rows = batch_rows(planted.model, planted.task.sample(200, generator=seeded()), [here, there])
    labels = {"token": rows["token"].long()}
    takes = [p.split, p.check, p["token"].coordinates, p["token"].project, lambda h: p["token"].patch(h, h + 0),
             lambda h: p["token"].patch(h + 0, h), lambda h: variable_shares(p, h, labels),
             lambda h: name_subspaces(p, h, labels), lambda h: determination(p, h, seeded()),
             lambda h: subspace_information(p, h, seeded()), lambda h: block_entropy(p, h),
             lambda h: partition_information(p, h), lambda h: check_activations(h, here),
             lambda h: find_partition(h, here), lambda h: learn_partition(h, here), lambda h: grow_partition(h, here),
             lambda h: closed_form(h, here), lambda h: baseline_partition(h, here, [34, 34], "pca"),
             lambda h: stability(h, here, find_partition), lambda h: split_ndm(h, here, pool=64)]
    said = f"activations of {there} do not belong to {here}, although both are 68 wide: read them at {here}"
    for h in (store[there], store.rows(there, range(2000)), rows[there], rows[there][5:].double()):
        for take in takes:
            with pytest.raises(ValueError) as e: take(h)
            assert str(e.value) == said
    assert p.split(store[here][:5]).keys() == p.split(rows[here][:5]).keys() == p.bases.keys()


def test_partitions_of_another_model_are_refused_by_name(planted, tmp_path):
    "By whatever takes a model with partitions; rows of a store say which model a partition is of."
    other, site = plant("induction", seed=1, certified=False), circuit_sites(planted.model)[1]
    p, tests = planted_partitions(planted)[site], copy_tests(other.task.sample(50, generator=seeded()), seeded())
    ours, theirs = fingerprint(other.model), fingerprint(planted.model)
    last = Partition(p.bases, "blocks.1.hook_resid_post", info=p.info)
    takes = [lambda: carries(other.model, p, "token", tests, "token"), lambda: isolation(other, {site: p}),
             lambda: knowledge_conflict(other.model, None, None, p),
             lambda: suite(other.model, None, "greater-than", {last.site: last}, layers={"test4": 1})]
    for take in takes:
        with refused("the partition of blocks.", f"was learned on a model of weights {theirs[:12]}, "
                                                 f"not of {ours[:12]}: learn one on this model"): take()
    store = capture(other.model, other.task, [site], tmp_path/"store", shards=2)
    with refused(f"activations of a model with weights {ours[:8]}… do not belong to one with weights {theirs[:8]}…: "
                 f"read them from that model"): p.split(store[site][:5])
    assert baseline_partition(store[site], site, [34, 34], "random").weights == ""
    assert closed_form(store[site], site).weights == ours


def test_a_saved_partition_says_of_which_model_it_is(planted, tmp_path):
    site = circuit_sites(planted.model)[0]
    planted_partitions(planted)[site].save_pretrained(tmp_path/"p")
    meta = json.loads((tmp_path/"p/partition.json").read_text())
    assert meta["model"] == fingerprint(planted.model)
    assert Partition.from_pretrained(tmp_path/"p").weights == fingerprint(planted.model)
