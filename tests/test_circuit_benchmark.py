"Every method speaks the same language, and grades say what they should."
import math, re
from functools import partial
from pathlib import Path

import pytest
import torch

from subspace_circuits import circuit_benchmark
from subspace_circuits.circuits import find_circuit
from subspace_circuits.edges import planted_partitions
from subspace_circuits.circuit_benchmark import (
    DECIDING, LEARNERS, METHODS, as_table, attribution, circuit, co_moments, compare_methods,
    compare_random, composition, forms, found_key, grade, key_grade, read_grades, reported, trace_run,
    in_random_order, summary_of_learners, summary_of_methods)
from subspace_circuits.forward import Weights, read_site, write_site
from subspace_circuits.edges import Moments, PartitionedModel, identity, score_edges
from subspace_circuits.known_circuits import DECOYS, key_values
from subspace_circuits.circuit_families import FAMILIES, plant
from subspace_circuits.keep_only import Judge
from subspace_circuits.partition import Partition, Strict, isolation, same_by_value
from subspace_circuits.toy_models import new_model


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    "One thread, and circuits chosen on few answers."
    torch.set_num_threads(1)
    monkeypatch.setattr(circuit_benchmark, "find_circuit", partial(find_circuit, answers=100))
    monkeypatch.setattr(circuit_benchmark, "Judge", partial(Judge, answers=100))


@pytest.fixture(scope="module")
def fixture():
    known = plant("two_circuits", seed=3, certified=False)
    return known, PartitionedModel(Moments(known.model, known.task, n=60), planted_partitions(known))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_scores_the_same_edges(fixture, name):
    known, split = fixture
    scores = METHODS[name](split, known.task, 0)
    want = {identity(o) for o in score_edges(split, 8) if o["type"] in ("QK", "OV", "MLP")}
    assert {k for k in scores if k[1] in ("QK", "OV", "MLP")} == want
    assert all(math.isfinite(o) for o in scores.values()) and len(set(scores.values())) > 10
    if name != "single ablation": assert scores == METHODS[name](split, known.task, 0)


def test_raw_weights_are_those_of_the_engine(fixture):
    known, split = fixture
    scores = METHODS["virtual weights"](split, known.task, 0)
    for o in score_edges(split, 8):
        if o["type"] in ("QK", "OV", "MLP"):
            assert scores[identity(o)] == pytest.approx(o["data_free"], rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("norm", [None, "LN", "RMS"])
def test_runs_are_the_model(norm):
    net = new_model(20, 2, 4, 32, 16, normalization_type=norm).requires_grad_(False)
    w, tokens = Weights(net), torch.arange(12)[None]
    at = torch.arange(12)[None]
    found = trace_run(w, w.embed(tokens, at))
    assert torch.allclose(w.logits(found.stream[w.sites[-1]]), w.logits(w.trace(tokens, at)[0][w.sites[-1]]), atol=1e-4)
    for a, b in zip(found.scores, w.trace(tokens, at)[1]): assert torch.allclose(w.softmax(a), b, atol=1e-5)


def test_composition_ignores_sizes_of_maps(fixture):
    known, split = fixture
    before = composition(split, known.task, 0)
    kept = [dict(o) for o in split.weights.heads]
    split.weights.heads[0]["Q"], split.weights.heads[0]["O"] = 5*kept[0]["Q"], 3*kept[0]["O"]
    after = composition(split, known.task, 0)
    split.weights.heads[0].update(kept[0])
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
    assert torch.allclose(one[last], five[last], rtol=1e-3, atol=1e-5)
    assert not torch.allclose(one["OV", 0], five["OV", 0], rtol=1e-3, atol=1e-5)


def test_rotary_models_are_refused():
    w = Weights(new_model(20, 1, 2, 32, 16, positional_embedding_type="rotary", rotary_dim=8))
    for f in (lambda: next(forms(w, {})), lambda: attribution(w, {}, None), lambda: co_moments(w, {}, None)):
        with pytest.raises(ValueError, match="rotary positions"): f()


def test_ties_are_broken_at_random():
    scores = {("L0H0", "QK", "a", str(i)): 0. for i in range(50)}
    true = {("L0H0", "QK", "a", "0")}
    hits = sum(reported(in_random_order(scores, s), dict(QK=1)) == true for s in range(200))
    assert 0 < hits < 20
    assert in_random_order(scores, 1) == scores and reported(scores) == set()


def whole(known):
    "Nothing learned: every site one block."
    return {s: Partition({"all": torch.eye(known.model.cfg.d_model)}, s) for s in planted_partitions(known)}


@pytest.mark.parametrize("family", FAMILIES)
def test_one_block_earns_nothing(family):
    "The grade that merging cannot improve: at most a twentieth of everything, while the true subspaces earn all of it."
    known = plant(family, seed=11, certified=False)
    homes = isolation(known, whole(known))
    key = found_key(known, check := whole(known), homes)
    assert sum(o.isolated for o in homes.values()) <= .05*len(homes) and set(check) == set(planted_partitions(known))
    assert key.recoverable.total() <= .05*key.count.total()
    true = planted_partitions(known)
    assert all(o.no_excuse for o in isolation(known, true).values())
    key = found_key(known, true, isolation(known, true), excuse=False)
    assert key.edges == {identity(o) for o in known.edges} and key.recoverable == key.count


def test_grade_does_not_depend_on_names_or_on_turns_inside():
    known, g = plant("histogram", seed=1, certified=False), torch.Generator().manual_seed(0)
    def turned(b): return b@torch.linalg.qr(torch.randn(b.shape[1], b.shape[1], generator=g))[0]
    true = planted_partitions(known)
    renamed = {s: Partition({f"s{i}": turned(b) for i, b in enumerate(reversed(p.bases.values()))}, s)
               for s, p in true.items()}
    homes = isolation(known, renamed)
    assert all(o.no_excuse and o.held > .999 for o in homes.values())
    key = found_key(known, renamed, homes)
    assert len(key.edges) == len(known.edges) and not key.edges & {identity(o) for o in known.edges if o["a"] != "bias"}


def test_what_is_joined_or_torn_is_lost():
    "Each fault costs the variables it touches and the edges that end there, and a false edge costs exactness."
    known = plant("induction", seed=2, certified=False)
    true, scores = planted_partitions(known), {identity(o): 1. for o in known.edges}
    def of(change):
        cut = {s: Partition(change(dict(p.bases)), s) for s, p in true.items()}
        homes = isolation(known, cut)
        key = found_key(known, cut, homes)
        return {k for k, o in homes.items() if not o.isolated}, key.recoverable.total(), key_grade(scores, set(scores),
                                                                                                   key)
    lost, edges, graded = of(lambda b: b)
    assert (lost, edges, graded) == (set(), 4, dict(precision=dict(QK=1., OV=1.), exact=True))
    assert not key_grade(scores, {*scores, ("L1H0", "QK", "hand", "hand")},
                         found_key(known, true, isolation(known, true)))["exact"]
    joined = of(lambda b: {"both": torch.cat([b.pop("token"), b.pop("position")], 1)} | b)
    assert {k for _, k in joined[0]} == {"token", "position"} and joined[1] == 0 and not joined[2]["exact"]
    torn = of(lambda b: dict(zip("xy", b.pop("token").split(6, 1))) | b)
    assert {k for _, k in torn[0]} == {"token"} and torn[1] == 1 and max(torn[2]["precision"].values()) == .5
    excused = of(lambda b: {"both": torch.cat([b.pop("token"), b.pop("class")], 1)} | b)
    assert excused[0] == set() and excused[1] == 4 # the class is a function of the token


def test_values_excuse():
    a, b = (torch.randint(6, (5000,), generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    rare = torch.where(torch.arange(5000) < 45, a, -1)
    for one, two, same in ((a, b, False), (a, a//2, True), (a, (a + b) % 6, False), (a, rare, True),
                           (a, torch.where(rare < 0, -1, b), True)):
        assert same_by_value(one, two) == same_by_value(two, one) == same
    nearly = torch.where(torch.arange(5000) % 10 == 0, b, a) # one value in ten is another's
    assert not same_by_value(a, nearly) and same_by_value(a, nearly, Strict(determined=.5))


def test_grade_refuses_by_name():
    known = plant("induction", seed=1, certified=False)
    true = planted_partitions(known)
    with pytest.raises(ValueError, match="no partition of blocks.0.hook_resid_pre"):
        found_key(known, {k: true[k] for k in list(true)[1:]}, {})
    with pytest.raises(ValueError, match="x is no site of induction: use some of blocks.0"):
        isolation(known, {"x": true[read_site(0)]})
    known.edges = [*known.edges, known.edges[0] | dict(b="rest")]
    with pytest.raises(ValueError, match="'rest' of induction, which a true edge names, has no values"):
        isolation(known, true)
    known.edges, sample = [known.edges[0] | dict(a="position", b="position")], known.task.sample
    def fifth(*args, **more):
        batch = sample(*args, **more)
        return batch._replace(real=batch.real & (batch.positions == 5))
    known.task.sample = fifth
    with pytest.raises(ValueError,
                       match="'position' of induction is constant at blocks.0.hook_resid_pre on 1000 lists"):
        isolation(known, true)


def test_comparison_is_kept(tmp_path, monkeypatch):
    "What a file holds is not measured again; what earns nothing is asked nothing."
    monkeypatch.setitem(LEARNERS, "ours", LEARNERS["one block"])
    some, kept = dict(circuit=circuit), tmp_path/"grades.jsonl"
    rows = compare_methods(("skip_trigram",), learner="ours", methods=some, kept=kept)
    assert rows[0]["n"] is None and rows[0]["strict"] == dict(precision=dict(QK=0., OV=0.), exact=False)
    monkeypatch.delitem(LEARNERS, "ours")
    assert compare_methods(("skip_trigram",), learner="ours", methods=some, kept=kept) == rows
    for content in ("a thesis", '{"family": "sort"}', "[1]"):
        (tmp_path/"other").write_text(content)
        with pytest.raises(ValueError, match="other.*: name another file"):
            compare_methods(("skip_trigram",), methods=some, kept=tmp_path/"other")
        assert (tmp_path/"other").read_text() == content
    table = summary_of_learners(rows)
    assert table["ours"] | dict(seconds=None) == dict.fromkeys(("isolated", "AP", "exact", "isolated, no excuse",
                                                                "AP, no excuse", "exact, no excuse"),
                                                                0.) | dict(models=1, seconds=None)
    assert as_table(table,
                    "subspaces").splitlines()[0] == (
        "| subspaces | isolated | AP | exact | isolated, no excuse | AP, no excuse | exact, no excuse | models |")


def test_table_of_a_family():
    methods = {k: METHODS[k] for k in ("circuit", "random")}
    rows, noise = compare_methods(("histogram",), 1, methods=methods), compare_random(("histogram",), 1, methods)
    table = summary_of_methods(rows, noise)
    assert table["circuit"]["exact"] == 1 and table["circuit"]["silent"] == 1 and table["random"]["exact"] == 0
    assert as_table(table).splitlines()[0].startswith("| method | AP QK | AP OV | AP MLP | exact")
    assert set(DECIDING) <= set(METHODS) and {o["method"] for o in rows} == set(methods)
    with pytest.raises(ValueError, match="unknown family 'nothing'"): compare_methods(("nothing",))


def test_front_page_says_what_the_grades_say():
    "The rows of the README are those of the kept grades: ours, nothing learned, and the best rival."
    root = Path(__file__).resolve().parent.parent
    table = summary_of_learners([o for o in read_grades(root/"benchmarks"/"circuits.jsonl")
                                 if o["method"] == "circuit"])
    said = (root/"README.md").read_text(encoding="utf-8")
    def row(name): return [f"{table[name][k]:.2f}" for k in ("isolated", "AP", "exact", "isolated, no excuse")]
    number = re.compile(r"\| (.+?) \|" + r" ([\d.]+) \|"*4)
    lines = {o[1]: [f"{float(x):.2f}" for x in o.groups()[1:]] for o in map(number.fullmatch, said.splitlines()) if o}
    rivals = {k: o for k, o in table.items() if k not in ("", "ours", "one block")}
    best = {k: max(rivals, key=lambda o: rivals[o][k]) for k in ("isolated", "AP")}
    assert lines["**ours, learned**"] == row("ours")
    assert lines["every site one block: nothing learned"] == row("one block") == ["0.00"]*4
    for k, name in best.items(): assert any(name in o and v == row(name) for o, v in lines.items()), (k, name)
