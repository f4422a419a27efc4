"Circles from settings, and inputs that are refused in one line."
import json

import pytest
import torch
from commands import refused

from subspace_circuits.activations import capture
from subspace_circuits.decompositions.circle_circuits import grid_of, key_frequencies, turn_shares
from subspace_circuits.decompositions.feature_clusters import (
    Dictionary, cluster_rows, planted_activations, planted_circles, save_dictionary)
from subspace_circuits.decompositions.multidim_runs import decompose_multidim, read_multidim
from subspace_circuits.decompositions.multidimensional import (
    answer_with, fit_circle, intervene, refuse_seen, sum_prompts, sweep_circle, word_prompts)
from subspace_circuits.decompositions.reducibility import (
    PLANES, known_planes, mixture, mixture_sweep, pca_planes, separability, subspace_reducibility)
from subspace_circuits.partition import Partition
from subspace_circuits.toy_models import load_model, new_model, new_task, train

site = "blocks.0.hook_resid_pre"


@pytest.fixture(scope="module")
def week():
    model, task, _ = load_model("weekdays")
    return model, sum_prompts(task)


def settings(folder, **o):
    file = folder/"settings.yaml"
    file.write_text(json.dumps(o))
    return file


def command(*args):
    run = subprocess.run([sys.executable, "-m", "subspace_circuits.cli", "decompose", *map(str, args)],
                         capture_output=True, text=True)
    return run.returncode, run.stdout, [o for o in run.stderr.splitlines() if o.startswith("subspace-circuits:")]


# ## Planes

def test_indices_do_not_depend_on_scale_rotation_or_place():
    f = known_planes(2000)["circle"]
    turned = 1e3*f@torch.tensor([[.6, .8], [-.8, .6]]) + 500
    limits = PLANES._replace(bins=12)
    S, M = (separability(torch.stack([f, turned]), limits=limits).bits, mixture(torch.stack([f, turned])[:, :2000],
                                                                                limits=limits).share)
    assert (S[0] - S[1]).abs() < .1 and (M[0] - M[1]).abs() < .01


def test_sweep_is_the_maximum_over_all_centres():
    g = torch.Generator().manual_seed(0)
    for kind in (torch.randn(60, generator=g), torch.randint(4, (60,), generator=g) + .01*torch.randn(60, generator=g)):
        z = kind.double()
        e = .01
        root = (e*(z - z.mean()).square() + e*(1 - e)*z.var(correction=0)).sqrt()
        ends = torch.cat([(z - z.mean() - root)/(1 - e), (z - z.mean() + root)/(1 - e)]) + z.mean()
        centres = torch.cat([ends + d for d in (-1e-9, 0, 1e-9)])
        apart = (z[:, None] - centres).abs()
        best = (apart <= .1*(z[:, None] - centres).square().mean(0).sqrt() + 1e-12).double().mean(0).max()
        assert abs(mixture_sweep(z[None].numpy())[0][0] - best) < 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_chance_is_within_its_null_and_a_circle_is_not(seed):
    sets = known_planes(1500, seed)
    S = separability(torch.stack([sets["gaussian"], sets["circle"]]), 19, seed)
    assert S.p[0] > .051 and S.p[1] < .051 and S.bits[1] > 1.2


@pytest.mark.parametrize("f, said", [
    (torch.randn(1, 300, 2), "300 points are too few for 16 x 16 bins: pass at least 1024, or use bins=8"),
    (torch.ones(1, 2000, 2), "dimension 0 of plane 0 is constant"),
    (torch.stack([torch.randn(2000), torch.ones(2000)], 1)[None], "dimension 1 of plane 0 is constant"),
    (torch.full((1, 2000, 2), torch.nan), "2000 points are not finite"),
    (torch.randn(2000, 2), "pass plane, row and two coordinates")])
def test_bad_planes_are_refused(f, said):
    for index in (separability, mixture):
        with pytest.raises(ValueError, match=said): index(f)


def test_subspaces_without_a_plane_say_why():
    g = torch.Generator().manual_seed(0)
    h = torch.cat([torch.randn(3000, 3, generator=g), torch.zeros(3000, 2)], 1)
    parts = {"one": torch.eye(5)[:, :1], "two": torch.eye(5)[:, 1:3], "still": torch.eye(5)[:, 3:]}
    found, without = subspace_reducibility(Partition(parts, site), h)
    assert list(found) == ["two"] and without == {"one": "one dimension", "still": "nothing varies"}
    with pytest.raises(ValueError, match="nothing varies in 3000 rows"): pca_planes(0*h)


# ## Circles in use

def test_a_circle_refuses_any_prompt_it_has_seen(week):
    model, prompts = week
    fit, test = prompts.split()
    circle = fit_circle(model, fit, site)
    mixed = prompts.take(torch.arange(len(prompts)))
    for run in (lambda: intervene(model, circle, mixed), lambda: refuse_seen(circle, fit.take([0])),
                lambda: sweep_circle(model, circle, fit.take([0]))):
        with pytest.raises(ValueError, match="were used to fit this circle"): run()
    refuse_seen(circle, test)


def test_replacing_an_activation_by_itself_changes_nothing(week):
    model, prompts = week
    some = prompts.take(torch.arange(0, 392, 13))
    with torch.no_grad():
        logits = model(some.batch.tokens, position_ids=some.batch.positions)
        h = {o: model.run_with_cache(some.batch.tokens, position_ids=some.batch.positions)[1][o]
             for o in (site, "blocks.0.hook_resid_post")}
    for name, place in ((site, 0), ("blocks.0.hook_resid_post", 2)):
        kept = answer_with(model, some, name, "a" if place == 0 else "c", h[name][:, place])
        assert torch.allclose(kept, logits[:, 2, :7], atol=1e-5)


def test_months_are_complete():
    task = new_task("months", n_numbers=48)
    model = new_model(len(task.tokenizer), n_layers=1, n_heads=2, d_model=16, d_mlp=32, n_ctx=3, act_fn="relu",
                      tied=False, seed=0)
    train(model, task, steps=60, lr=3e-3, batch=128, seed=0)
    model.requires_grad_(False)
    prompts = sum_prompts(task)
    assert len(prompts) == 12*48 and prompts.names == task.names
    found = key_frequencies(model, prompts, draws=5)
    assert [o.frequency for o in found] == [1, 2, 3, 4, 5, 6] and abs(sum(o.power for o in found) - 1) < 1e-6


def test_shares_of_turns_are_a_partition_of_what_turns_so():
    g = torch.Generator().manual_seed(0)
    for p in (6, 7):
        x = torch.randn(p, p, 3, generator=g, dtype=torch.float64)
        assert (turn_shares(x).sum((1, 2)) <= 1 + 1e-9).all()
        i = torch.arange(p)
        for k in range(1, p//2 + 1):
            wave = torch.cos(2*torch.pi*k*(i[:, None] - i)/p).double()[..., None]
            assert abs(turn_shares(wave)[0, k - 1, 3].item() + (turn_shares(wave)[0, k - 1, 2].item()
                                                                if 2*k == p else 0) - 1) < 1e-6 or 2*k == p


def test_a_grid_needs_every_pair(week):
    with pytest.raises(ValueError, match="pairs of residues have no prompt"):
        grid_of(torch.ones(5, 2), week[1].take(torch.arange(5)))


def test_words_that_split_are_refused_by_name():
    class Letters:
        bos_token_id = None
        def encode(self, text, add_special_tokens=False): return [ord(o) for o in text]
    with pytest.raises(ValueError, match="'January' is 8 tokens of this tokenizer, as are 12 of 12 words"):
        word_prompts(Letters(), "months")
    prompts, words = word_prompts(Letters(), "months", pieces=True)
    text = "".join(map(chr, prompts.batch.tokens[14].tolist()))[:int(prompts.read[14]) + 1]
    assert text == "Let's do some calendar math. Three months from February is"
    assert text[:int(prompts.at[14]) + 1].endswith("February") and int(prompts.c[14]) == 4 and len(words) == 12


# ## Clusters

def test_reconstructions_belong_to_their_own_tokens():
    planted = planted_circles(200, 32, 4)
    acts, ring, _ = planted_activations(planted, 500)
    members = (planted.ring == 2).nonzero()[:, 0].tolist()
    rows, tokens = cluster_rows(acts, planted.decoder, members)
    assert (ring[tokens] == 2).all() and len(tokens) == (ring == 2).sum()
    whole = torch.from_numpy(acts[:, members].toarray())@planted.decoder[members].double()
    assert torch.allclose(rows, whole[tokens]) and (whole[ring != 2] == 0).all()


# ## From settings

def test_a_circle_from_settings(tmp_path):
    config, out = settings(tmp_path, job="circle", model="weekdays"), tmp_path/"out"
    metrics = decompose_multidim(config, out)
    assert sorted(o.name for o in out.iterdir()) == ["config.json", "metrics.json", "report.html"]
    assert metrics["circles"]["plane"]["conditions"]["circle"]["moved"] >= .9
    before = {o.name: o.read_bytes() for o in out.iterdir()}
    assert decompose_multidim(config, out) == metrics # what is there is read
    decompose_multidim(config, out, overwrite=True)
    assert before == {o.name: o.read_bytes() for o in out.iterdir()} # the same seed, the same bytes
    with pytest.raises(ValueError, match="holds a job with seed 0, not 1"): decompose_multidim(config, out, seed=1)
    assert "src=\"http" not in (out/"report.html").read_text()
    (out/"notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else"): decompose_multidim(config, out, overwrite=True)
    assert (out/"metrics.json").exists()


def test_clusters_and_subspaces_from_settings(tmp_path):
    model, task, _ = load_model("weekdays")
    store = capture(model, task, [site], tmp_path/"store", 2, 400, (1, 1))
    g = torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(24, 8, generator=g), dim=1)
    save_dictionary(Dictionary(site, "topk", W.T.contiguous(), torch.zeros(24), W, torch.zeros(8), 3), tmp_path/"dict")
    common = dict(store=str(tmp_path/"store"), bins=8)
    metrics = decompose_multidim(settings(tmp_path, job="clusters", dictionary=str(tmp_path/"dict"), panes=1, least=.7,
                                          model="weekdays", **common), tmp_path/"clusters")
    assert metrics["clusters"] <= 24 and metrics["measured"] == len(metrics["ranked"]) > 0
    assert metrics["not_measured"]["one feature"] == metrics["clusters"] - metrics["larger_than_one"]
    assert "\\u003cb\\u003e" in (tmp_path/"clusters"/"report.html").read_text() # contexts of the points
    h = store[site]
    basis = torch.linalg.eigh(torch.cov(h.T))[1]
    Partition({"small": basis[:, :4], "large": basis[:, 4:]}, site).save_pretrained(tmp_path/"partition")
    found = decompose_multidim(settings(tmp_path, job="subspaces", partitions=str(tmp_path/"partition"), draws=3,
                                        **common), tmp_path/"subspaces")
    assert {o["subspace"] for o in found["sites"][site]["ranked"]} <= {"small", "large"}


@pytest.mark.parametrize("config, said", [
    (dict(job="rings"), "has job 'rings': use one of circle, clusters, subspaces"),
    (dict(job="circle", model="weekdays", sight=3), "has 'sight', which circle does not take"),
    (dict(job="circle"), "names no model: circle needs model"),
    (dict(job="clusters", dictionary="x"), "names no store: clusters needs dictionary and store"),
    (dict(job="clusters", dictionary="x", store="y", k="two"), "has k = 'two': a number is needed")])
def test_bad_settings_are_refused(tmp_path, config, said):
    with pytest.raises(ValueError, match=said): read_multidim(settings(tmp_path, **config))


def test_the_command_line_says_what_is_wrong_in_one_line(tmp_path):
    config, out = settings(tmp_path, job="circle", model="induction"), tmp_path/"out"
    assert "induction is no model of a sum modulo a number" in refused("decompose", "multidim", config, "--out", out)
    assert not out.exists()
    assert "unknown method 'rings'" in refused("decompose", "rings", config, "--out", out)
    assert "none.yaml cannot be read" in refused("decompose", "multidim", tmp_path/"none.yaml", "--out", out)
