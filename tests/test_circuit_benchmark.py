"Every method speaks the same language, and grades say what they should."
import math

import pytest
import torch

from subspace_circuits.circuit_benchmark import (
    DECIDING, METHODS, as_table, attribution, best_overlaps, co_moments, compare, compare_random, composition, forms, found_key, planted_partitions,
    reported, run, shuffled, summary)
from subspace_circuits.circuits import Moments, Weights, identity, read_site, score_edges, write_site
from subspace_circuits.known_circuits import plant
from subspace_circuits.partition import Partition
from subspace_circuits.toy_models import new_model


@pytest.fixture(autouse=True)
def one_thread(): torch.set_num_threads(1)


@pytest.fixture(scope="module")
def fixture():
    known = plant("two_circuits", seed=3, certified=False)
    return known, Moments(known.model, known.task, n=60), planted_partitions(known)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_scores_the_same_edges(fixture, name):
    known, moments, partitions = fixture
    scores = METHODS[name](known.model, known.task, moments, partitions, 0)
    want = {identity(o) for o in score_edges(known.model, moments, partitions, 8) if o["type"] in ("QK", "OV", "MLP")}
    assert {k for k in scores if k[1] in ("QK", "OV", "MLP")} == want
    assert all(math.isfinite(o) for o in scores.values()) and len(set(scores.values())) > 10
    if name != "single ablation": assert scores == METHODS[name](known.model, known.task, moments, partitions, 0)


def test_raw_weights_are_those_of_the_engine(fixture):
    known, moments, partitions = fixture
    scores = METHODS["virtual weights"](known.model, known.task, moments, partitions, 0)
    for o in score_edges(known.model, moments, partitions, 8):
        if o["type"] in ("QK", "OV", "MLP"): assert scores[identity(o)] == pytest.approx(o["data_free"], rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("norm", [None, "LN", "RMS"])
def test_runs_are_the_model(norm):
    net = new_model(20, 2, 4, 32, 16, normalization_type=norm).requires_grad_(False)
    w, tokens = Weights(net), torch.arange(12)[None]
    at = torch.arange(12)[None]
    found = run(w, w.embed(tokens, at))
    assert torch.allclose(w.logits(found.stream[w.sites[-1]]), w.logits(w.trace(tokens, at)[0][w.sites[-1]]), atol=1e-4)
    for a, b in zip(found.scores, w.trace(tokens, at)[1]): assert torch.allclose(w.softmax(a), b, atol=1e-5)


def test_composition_ignores_sizes_of_maps(fixture):
    known, moments, partitions = fixture
    before = composition(known.model, known.task, moments, partitions, 0)
    kept = [dict(o) for o in moments.weights.heads]
    moments.weights.heads[0]["Q"], moments.weights.heads[0]["O"] = 5*kept[0]["Q"], 3*kept[0]["O"]
    after = composition(known.model, known.task, moments, partitions, 0)
    moments.weights.heads[0].update(kept[0])
    for k, v in before.items():
        if k[2] != "bias": assert after[k] == pytest.approx(v, rel=1e-3, abs=1e-7)
    assert max(before.values()) <= 1 + 1e-6


def test_gradients_on_the_way_differ_only_where_something_is_not_linear():
    "Behind the last head without an MLP nothing is, before it attention is."
    known = plant("bigram_copy", seed=2, certified=False)
    moments, partitions = Moments(known.model, known.task, n=60), planted_partitions(known)
    w, batch = moments.weights, known.task.sample(20, generator=torch.Generator().manual_seed(0))
    one, five = (attribution(w, partitions, batch, n) for n in (1, 5))
    last = ("OV", w.cfg.n_layers - 1)
    assert torch.allclose(one[last], five[last], rtol=1e-3, atol=1e-5) and not torch.allclose(one["OV", 0], five["OV", 0], rtol=1e-3, atol=1e-5)


def test_rotary_models_are_refused():
    w = Weights(new_model(20, 1, 2, 32, 16, positional_embedding_type="rotary", rotary_dim=8))
    for f in (lambda: next(forms(w, {})), lambda: attribution(w, {}, None), lambda: co_moments(w, {}, None)):
        with pytest.raises(ValueError, match="rotary positions"): f()


def test_ties_are_broken_at_random():
    scores = {("L0H0", "QK", "a", str(i)): 0. for i in range(50)}
    true = {("L0H0", "QK", "a", "0")}
    hits = sum(reported(shuffled(scores, s), true) == true for s in range(200))
    assert 0 < hits < 20
    assert shuffled(scores, 1) == scores and reported(scores, true, decides=True) == set()


def test_best_overlaps_and_translated_key():
    known = plant("histogram", seed=1, certified=False)
    partitions = planted_partitions(known)
    assert found_key(known, partitions) == {identity(o) for o in known.edges}
    renamed = {s: Partition({f"s{i}": b for i, b in enumerate(p.bases.values())}, s) for s, p in partitions.items()}
    assert len(found_key(known, renamed)) == len(known.edges)
    site = read_site(0)
    held = best_overlaps(known.bases[site], Partition({"all": torch.eye(known.model.cfg.d_model)}, site))
    assert all(name == "all" and share == pytest.approx(1, abs=1e-4) for name, share in held.values())
    with pytest.raises(ValueError, match="no partition of"): found_key(known, {write_site(0): partitions[write_site(0)]})


def test_table_of_a_family():
    methods = {k: METHODS[k] for k in ("circuit", "random")}
    rows, noise = compare(("histogram",), 1, methods=methods), compare_random(("histogram",), 1, methods)
    table = summary(rows, noise)
    assert table["circuit"]["exact"] == 1 and table["circuit"]["silent"] == 1 and table["random"]["exact"] == 0
    assert as_table(table).splitlines()[0].startswith("| method | AP QK | AP OV | AP MLP | exact")
    assert set(DECIDING) <= set(METHODS) and {o["method"] for o in rows} == set(methods)
    with pytest.raises(ValueError, match="unknown family 'nothing'"): compare(("nothing",))
