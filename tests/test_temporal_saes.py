"Sparse autoencoders from settings, to the same bytes; inputs that are refused in one line; other programs' files."
import importlib.util, json, logging, sys, types

import numpy as np
import pytest
import torch
from commands import refused
from scipy import sparse

from subspace_circuits.activations import capture
from subspace_circuits.bench.temporal import planted_codes, smoothness_loop
from subspace_circuits.decompositions.saes import planted_sequences, start_sae, with_threshold
from subspace_circuits.decompositions.temporal_evaluation import contexts_of, smoothness
from subspace_circuits.decompositions.temporal_files import export_saelens, load_sae
from subspace_circuits.decompositions.temporal_losses import TokenPairs, token_sequences, stored_rows
from subspace_circuits.decompositions.temporal_runs import TEMPORAL_LAYOUT, decompose_temporal, read_temporal
from subspace_circuits.decompositions.temporal_training import (
    OPTIONS, SAETrainer, check_options, temporal_presets, train_sae)
from subspace_circuits.files import owned
from subspace_circuits.toy_models import load_model

PLANTED = dict(planted=dict(documents=30, length=20), latents=60, groups=[.2, .8], k=5, batch=64, steps=30, lr=.003)
sites = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]


def settings(folder, **o):
    file = folder/"settings.yaml"
    file.write_text(json.dumps(o))
    return file


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    model, task, _ = load_model("induction")
    return capture(model, task, sites, tmp_path_factory.mktemp("store")/"store", shards=2, sequences=30)


def bytes_of(folder): return {o.relative_to(folder): o.read_bytes() for o in folder.rglob("*") if o.is_file()}


# ## Runs

def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path):
    file = settings(tmp_path, **PLANTED)
    whole, parts = tmp_path/"whole", tmp_path/"parts"
    metrics = decompose_temporal(file, whole)
    assert decompose_temporal(file, parts, until=13) == dict(step=13)
    assert decompose_temporal(file, parts, resume=True) == metrics
    assert bytes_of(whole) == bytes_of(parts)
    owned(whole, TEMPORAL_LAYOUT)
    assert 0 < metrics["sites"]["planted"]["untrained"]["fve"] < metrics["sites"]["planted"]["fve"]
    assert load_sae(whole/"site-0").groups == (12, 48)
    assert (decompose_temporal(file, tmp_path/"other", seed=1)["sites"]["planted"]["fve"]
            != metrics["sites"]["planted"]["fve"])


def test_sites_of_a_store_are_trained_in_one_run(tmp_path, store):
    file = settings(tmp_path, store=str(store.folder), sites=sites, skip=1, model="induction", latents=96,
                    groups=[.25, .75], k=8, batch=64, steps=40, lr=.003, pairs="window", window=4)
    metrics = decompose_temporal(file, tmp_path/"run")
    assert list(metrics["sites"]) == sites
    for i, site in enumerate(sites):
        sae, o = load_sae(tmp_path/"run"/f"site-{i}"), metrics["sites"][site]
        assert sae.site == site and sae.model == store.info["capture"]["weights"]
        assert o["loss"].keys() == {"original", "reconstructed", "zero", "mean", "recovered"} and o["fve"] > .3
    page = (tmp_path/"run/report.html").read_text()
    assert "<h1>Sparse autoencoders</h1>" in page and "src=\"http" not in page
    assert all(f"<h2>{o}</h2>" in page for o in (*sites, "What the measures are", "Settings"))
    with pytest.raises(ValueError, match="do not belong to blocks.0.hook_resid_post"):
        load_sae(tmp_path/"run/site-0").encode(store[sites[1]])


@pytest.mark.parametrize("preset", temporal_presets())
def test_presets_are_complete(preset): assert read_temporal(preset).keys() >= OPTIONS.keys()


@pytest.mark.parametrize("more", [dict(rule="topk", groups=[1.], temporal="none"), dict(block=2, k=6, temporal="none"),
                                  dict(temporal="similarity", alpha=.5),
                                  dict(similarity="dot", temperature=1., alpha=.1),
                                  dict(earlier="own", pairs="any", mask_documents=False), dict(groups=[10, 20, 30])])
def test_every_kind_trains_and_explains_more_than_it_did(more):
    planted = planted_sequences(documents=40, length=20)
    rows = token_sequences(planted.h, planted.document, "planted")
    o = {k: v for k, v in PLANTED.items() if k != "planted"} | dict(steps=120, lr=.006) | more
    sae = train_sae(rows, **o)
    nothing = with_threshold(start_sae("planted", 64, 60, torch.Generator().manual_seed(0), sae.k, sae.groups,
                                       block=sae.block)._replace(b_dec=planted.h.mean(0)), planted.h)
    left = [(planted.h - o.decode(o.encode(planted.h))).square().sum().item() for o in (sae, nothing)]
    assert left[0] < .7*left[1]


# ## Inputs that are refused

@pytest.mark.parametrize("change, said", [
    (dict(k=100), "k is 100, the dictionary has 60 latents: use 1 to 60"),
    (dict(groups=[.5, .6]), r"groups \[0.5, 0.6\] sum to 1.1"),
    (dict(groups=[10, 20]), r"groups of 10 \+ 20 latents and a dictionary of 60"),
    (dict(batch=10_000), "batches of 10000 pairs from"),
    (dict(planted=dict(documents=20, length=1)), "every document of planted has one token"),
    (dict(planted=dict(documents=20, topics=3)), "planted settings do not fit"),
    (dict(steps="many"), "temporal-sae steps is 'many': use a whole number from 1"),
    (dict(widht=3), "has 'widht', which temporal-sae does not take"),
    (dict(store="somewhere"), "needs store, a folder of capture, or planted"),
    (dict(groups=[1.]), "a temporal loss needs a high and a low split")])
def test_bad_settings_are_refused(tmp_path, change, said):
    file = settings(tmp_path, **PLANTED | change)
    with pytest.raises(ValueError, match=said): decompose_temporal(file, tmp_path/"run")
    assert not (tmp_path/"run").exists()


def test_bad_input_is_refused_by_the_command(tmp_path, store):
    o = dict(store=str(store.folder), latents=96, k=8, batch=64, steps=5)
    run = ["decompose", "temporal-sae", settings(tmp_path, **o, sites=["blocks.7.hook_resid_post"]), "--out",
           tmp_path/"run"]
    assert "the store holds no blocks.7.hook_resid_post" in refused(*run)
    assert "names no sites" in refused("decompose", "temporal-sae", settings(tmp_path, **o), "--out", tmp_path/"run")
    assert "no settings 'nowhere'" in refused("decompose", "temporal-sae", "nowhere", "--out", tmp_path/"run")
    assert not (tmp_path/"run").exists()


def test_a_store_without_documents_is_refused(store, monkeypatch):
    monkeypatch.setattr(type(store), "has", lambda self, name: name != "document")
    with pytest.raises(ValueError, match="does not say which document a row is of"): stored_rows(store, sites[0])


def test_a_dead_dictionary_is_refused():
    planted = planted_sequences(documents=20)
    with pytest.raises(ValueError, match="of 4096 latents died: use fewer latents, a larger k"):
        train_sae(token_sequences(planted.h, planted.document, "x"), latents=4096, k=1, batch=64, steps=30)


# ## TokenPairs and smoothness

@pytest.mark.parametrize("mode", ["previous", "any", "window"])
def test_pairs_never_cross_a_document(store, mode):
    rows = stored_rows(store, sites[0], skip=2)
    pairs = TokenPairs(rows, 50, mode, 3)
    for step in (0, 1, 7, pairs.per_epoch):
        now, earlier = pairs.indices(step)
        assert (rows.document[now] == rows.document[earlier]).all() and (earlier < now).all()
        assert (earlier >= rows.first[now]).all()


LENGTHS = {"short": [7]*3, "long": [50]*3, "as a context": [128, 128], "uneven": [1, 2, 3, 9, 50, 1, 130, 17]}


@pytest.mark.filterwarnings("ignore:var")
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("kind", ["sparse", "signed", "steady", "dense"])
def test_smoothness_is_that_of_the_loops(kind, lengths):
    f, x, _ = planted_codes(1, sum(lengths), 300)
    z, g = f.toarray(), np.random.default_rng(1)
    if kind == "signed": z *= g.normal(size=z.shape) # the loops leave out what sums to zero
    if kind == "steady": z[:, :20] = 1 + .01*g.random((len(z), 20)) # on at every token
    if kind == "dense": z = g.random(z.shape)
    z, document = z.astype(np.float32), torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    found, dense = smoothness(sparse.csr_matrix(z), x, document, (60, 240)), torch.from_numpy(z)
    each = [smoothness_loop(dense[a:b], x[a:b], (60, 240)) for a, b in contexts_of(document)]
    for k, o in found.items():
        for m in each[0][k]:
            theirs = np.array([e[k][m] for e in each])
            theirs = theirs[np.isfinite(theirs)] # no latent is active, or one step only: no variance
            assert o["contexts"] == len(each) and abs(o[m]/theirs.mean() - 1) < 1e-5, (k, m)


# ## Files of other programs

@pytest.fixture
def saelens(monkeypatch):
    "SAELens' own classes, with stand-ins for the names that it asks of TransformerLens and version 4 has elsewhere."
    found = importlib.util.find_spec("sae_lens")
    if found is None: pytest.skip("SAELens is not installed")
    import transformer_lens
    old = types.ModuleType("transformer_lens.HookedTransformer")
    old.HookedRootModule, old.HookedTransformer = transformer_lens.HookedRootModule, type("HookedTransformer", (), {})
    monkeypatch.setitem(sys.modules, old.__name__, old)
    package = types.ModuleType("sae_lens")
    package.__path__, package.__version__ = list(found.submodule_search_locations), ""
    package.logger = logging.getLogger("sae_lens")
    monkeypatch.setitem(sys.modules, "sae_lens", package)
    from sae_lens.registry import SAE_CLASS_REGISTRY
    from sae_lens.saes import jumprelu_sae, topk_sae
    SAE_CLASS_REGISTRY |= dict(jumprelu=(jumprelu_sae.JumpReLUSAE, jumprelu_sae.JumpReLUSAEConfig),
                               topk=(topk_sae.TopKSAE, topk_sae.TopKSAEConfig))
    return dict(batchtopk=jumprelu_sae.JumpReLUSAE, topk=topk_sae.TopKSAE)


@pytest.mark.parametrize("rule", ["batchtopk", "topk"])
def test_saelens_reads_our_export(saelens, rule, tmp_path):
    planted = planted_sequences(documents=10)
    sae = start_sae(sites[0], 64, 80, torch.Generator().manual_seed(0), 5, (16, 64), rule)
    sae = with_threshold(sae, planted.h) if rule == "batchtopk" else sae
    export_saelens(sae, tmp_path/"out")
    theirs = saelens[rule].load_from_disk(tmp_path/"out")
    with torch.no_grad(): codes = theirs.encode(planted.h)
    assert torch.allclose(torch.from_numpy(sae.encode(planted.h).toarray()), codes.to_dense(), atol=1e-5)
    with torch.no_grad(): assert torch.allclose(theirs.decode(codes), sae.decode(sae.encode(planted.h)), atol=1e-4)


def test_what_a_step_sees_does_not_depend_on_when_it_is_taken():
    planted = planted_sequences(documents=20)
    rows = token_sequences(planted.h, planted.document, "x")
    o = check_options(dict(latents=60, k=5, batch=64, steps=20, lr=.003))
    a, b = SAETrainer(o, rows), SAETrainer(o, rows)
    for _ in a.run(): pass
    for _ in b.run(until=9): pass
    c = SAETrainer(o, rows)
    c.restore(b.tensors(), b.step)
    for _ in c.run(): pass
    assert all(torch.equal(v, c.tensors()[k]) for k, v in a.tensors().items())
