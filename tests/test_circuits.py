"What circuits must not depend on, on random models of every supported shape, and what they refuse."
import copy, json, math, os, subprocess, sys

import networkx as nx
import pytest
import torch

from subspace_circuits.activations import fingerprint, given
from subspace_circuits.edges import planted_partitions
from subspace_circuits.circuit_graph import (
    add_examples, circuit_figure, diff_circuits, diff_figure, edge_rows, layout, read_circuit,
    save_circuit, to_graphml, write_circuit, write_figure)
from subspace_circuits.forward import Weights, circuit_sites, read_site, write_site
from subspace_circuits.circuits import compositions, find_circuit, jaccard, keep_edges, links, paths, trim
from subspace_circuits.edges import (
    Moments, PartitionedModel, check_partitions, haar_mean, identity, living, ov_energy, qk_energy, score_edges)
from subspace_circuits.keep_only import Judge, KeepOnly, MODES
from subspace_circuits.circuit_graph import to_graph
from subspace_circuits.known_circuits import null_model
from subspace_circuits.circuit_families import plant
from subspace_circuits.partition import Partition
from subspace_circuits.toy_models import Task, accuracy, new_model

SHAPES = {"attention only": dict(attn_only=True, normalization_type=None), "layer norm": dict(),
          "norm without weights": dict(normalization_type="LNPre"),
          "RMS norm, rotary, gated, shared keys": dict(normalization_type="RMS", n_key_value_heads=2,
                                                       positional_embedding_type="rotary", rotary_dim=8,
                                                       gated_mlp=True, act_fn="silu")}


class Noise(Task):
    "Random tokens, every one of which is asked for."
    name, lengths = "noise", (12, 12)
    def __init__(self): pass
    def sample(self, n, lengths=None, generator=None, n_ctx=None):
        batch = given(torch.randint(0, 20, (n, 12), generator=generator))
        return batch._replace(scored=batch.real & (batch.positions < 11))


@pytest.fixture(autouse=True)
def one_thread(): torch.set_num_threads(1)


def model_of(shape):
    net = new_model(20, 2, 4, 32, 16, **SHAPES[shape]).requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    for v in net.parameters(): v.data += .1*torch.randn(v.shape, generator=g)
    return net


def cut(net, seed=0):
    "Random partitions into four parts."
    g = torch.Generator().manual_seed(seed)
    def four(): return torch.linalg.qr(torch.randn(32, 32, generator=g))[0].split([4, 12, 8, 8], 1)
    return {s: Partition({f"s{i}": o for i, o in enumerate(four())}, s) for s in circuit_sites(net)}


@pytest.mark.parametrize("shape", SHAPES)
def test_everything_kept_is_the_model(shape):
    net = model_of(shape)
    split = PartitionedModel(Moments(net, Noise(), n=20), cut(net))
    edges, batch = score_edges(split, draws=16), Noise().sample(4, generator=torch.Generator().manual_seed(1))
    want = net(batch.tokens, position_ids=batch.positions)
    for mode in MODES:
        assert (KeepOnly(split, edges, mode)(batch.tokens, batch.positions) - want).abs().max() < 1e-3
    assert all(math.isfinite(o[k]) for o in edges for k in ("score", "data_free", "enrichment", "p")
               if o.get(k) is not None)
    part, less = KeepOnly(split, edges[2::4]), KeepOnly(split, edges[::2]).without(edges[::4])
    assert torch.allclose(part(batch.tokens, batch.positions), less(batch.tokens, batch.positions), atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_head_gauge_and_softmax_shift(shape):
    """A change of basis inside heads (rotary positions allow only what commutes with them), values against outputs,
    and a key bias change no score."""
    net, g = model_of(shape), torch.Generator().manual_seed(2)
    moments, p = Moments(net, Noise(), n=20), cut(net)
    site, out = p[read_site(1)], p[write_site(1, net.cfg.attn_only)]
    before = qk_energy(moments, 1, site), ov_energy(moments, 1, site, out)
    L, d = moments.weights.heads[1], net.cfg.d_head
    G, V = (torch.randn(4, d, d, generator=g) + 4*torch.eye(d) for _ in range(2))
    if moments.weights.rotary is not None: G = 2*torch.eye(d).expand(4, d, d)
    L |= dict(Q=L["Q"]@G, bQ=(L["bQ"][:, None]@G)[:, 0], K=L["K"]@torch.linalg.inv(G).mT,
              bK=(L["bK"][:, None]@torch.linalg.inv(G).mT)[:, 0], V=5*L["V"]@V, O=torch.linalg.inv(V)@L["O"]/5)
    # adds the same to all keys of a query
    if moments.weights.rotary is None: L["bK"] = L["bK"] + torch.randn(4, d, generator=g)
    for a, b in zip(before, (qk_energy(moments, 1, site), ov_energy(moments, 1, site, out))):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("norm", [None, "RMSPre"])
def test_joint_rotation_of_stream_and_subspaces(norm):
    net = new_model(20, 2, 4, 32, 16, attn_only=True, normalization_type=norm).requires_grad_(False)
    R, twin = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(3)))[0], copy.deepcopy(net)
    for k, v in twin.original_model.named_parameters():
        if k.endswith("weight") and v.dim() == 2: v.data = R.T@v.data if ".o." in k else v.data@R
        elif ".o." in k: v.data = v.data@R
    p = cut(net)
    turned = {s: Partition({k: R.T@u for k, u in o.bases.items()}, s) for s, o in p.items()}
    one, two = (score_edges(PartitionedModel(Moments(n, Noise(), n=20), q), draws=16)
                for n, q in ((net, p), (twin, turned)))
    for a, b in zip(one, two):
        assert identity(a) == identity(b) and abs(a["score"] - b["score"]) <= 1e-3*abs(a["score"]) + 1e-6


def test_exact_mean_over_rotations():
    g = torch.Generator().manual_seed(0)
    M, parts = torch.randn(6, 6, generator=g, dtype=torch.double), torch.eye(6, dtype=torch.double).split([1, 2, 3], 1)
    size, square, trace = M.square().sum(), (M@M).trace(), M.trace().square()
    draws = torch.linalg.qr(torch.randn(20_000, 6, 6, generator=g, dtype=torch.double))[0]
    turned = draws@M@draws.mT
    mean = torch.stack([torch.stack([(a.T@turned@b).square().sum((1, 2)).mean() for b in parts]) for a in parts])
    assert torch.allclose(mean, haar_mean(parts, parts, size, square, trace), rtol=.05)


@pytest.mark.parametrize("family", ["histogram", "modular_addition"])
def test_planted_circuit_is_found(family):
    known = plant(family, seed=4, certified=False)
    split = PartitionedModel(Moments(known.model, known.task, n=100), planted_partitions(known))
    kept, info = find_circuit(split, known.task, answers=100)
    inner = {identity(o) for o in kept if o["type"] in ("QK", "OV", "MLP")}
    assert inner == {identity(o) for o in known.edges} and min(o["necessity"] for o in kept) >= info["price"]
    assert accuracy(KeepOnly(split, kept), known.task, n=100) >= .99
    assert paths(compositions(kept, links(split)))
    assert "logits" in to_graph(split, kept)
    other = PartitionedModel(Moments(known.model, known.task, n=100, seed=9), split.partitions)
    again = find_circuit(other, known.task, answers=100, seed=9)[0]
    assert jaccard(kept, again) == 1


def test_rotary_circuit_is_found():
    known = plant("induction", rotary=True, certified=False)
    split = PartitionedModel(Moments(known.model, known.task, n=100), planted_partitions(known))
    kept, _ = find_circuit(split, known.task, answers=100)
    assert {identity(o) for o in kept if o["type"] in ("QK", "OV")} == {identity(o) for o in known.edges}


@pytest.mark.parametrize("kind", ["rotated", "untrained"])
def test_random_models_are_silent(kind):
    known = plant("modular_addition", certified=False)
    for seed in range(3):
        net = null_model(known.model, kind, seed)
        split = PartitionedModel(Moments(net, known.task, n=60), planted_partitions(known, net))
        assert living(score_edges(split, seed=seed + 50)) == set()
    assert find_circuit(split, known.task, answers=100)[0] == []


def test_trim_and_budget():
    at = dict(layer=0, head=0, component="L0H0", site_a="s", p=None)
    edges = [at | dict(type="QK", a="x", b="x", score=9., site_b="s"),
             at | dict(type="QK", a="x", b="y", score=1., site_b="s"),
             at | dict(type="OV", a="x", b="y", score=.6, site_b="t"),
             at | dict(type="OV", a="y", b="y", score=.01, site_b="t"),
             dict(component="unembed", layer=None, head=None, type="unembed", a="y", b="logits", score=1., site_a="t",
                  site_b="logits")]
    assert [(o["type"], o["a"]) for o in keep_edges(edges, 1)] == [("QK", "x"), ("OV", "x"), ("unembed", "y")]
    assert keep_edges(edges[:2], 1) == [] and trim(edges, {"s": {"x": {"x"}, "y": {"y"}}}) == edges
    assert trim([o for o in edges if o["type"] != "OV"], {"s": {"x": {"x"}, "y": {"y"}}}) == edges[-1:]


def test_refusals():
    net = model_of("layer norm")
    p = cut(net)
    for o in circuit_sites(net)[:-1]:
        with pytest.raises(ValueError, match=f"no partition of {o}"):
            check_partitions(net, {k: v for k, v in p.items() if k != o})
    with pytest.raises(ValueError, match="learned on a model of weights aaaaaaaa"):
        check_partitions(net, p | {read_site(0): Partition(p[read_site(0)].bases, read_site(0),
                                                           info=dict(weights="a"*64))})
    with pytest.raises(ValueError, match="at least 64 are needed"): Moments(net, Noise(), n=5)
    known, other = (plant("induction", seed=o, certified=False) for o in (0, 1))
    with pytest.raises(ValueError, match=f"learned on a model of weights {fingerprint(known.model)[:12]}, not of "
                                         f"{fingerprint(other.model)[:12]}: learn one on this model"):
        PartitionedModel(Moments(other.model, other.task, n=60), planted_partitions(known))
    capped = copy.deepcopy(net)
    capped.original_model.output_logits_soft_cap = 1.
    with pytest.raises(ValueError, match="does not answer as its weights say"): Weights(capped)


def test_judge_counts_only_what_right_answers_lose():
    known = plant("histogram", certified=False)
    judge = Judge(known.model, known.task)
    assert judge(known.model) < 1e-5 and abs(judge.mean(known.model)) < 1e-6
    split = PartitionedModel(Moments(known.model, known.task, n=60), planted_partitions(known))
    assert judge(KeepOnly(split, [])) > 1


@pytest.fixture(scope="module", params=["layer norm", "attention only"])
def drawn(request):
    """64 edges of a random model between random subspaces, one of them with a name that is markup, every second of
    negative sign."""
    net = model_of(request.param)
    p, site = cut(net), read_site(0)
    p[site] = Partition({"<b>&s0" if k == "s0" else k: v for k, v in p[site].bases.items()}, site)
    split = PartitionedModel(Moments(net, Noise(), n=20), p)
    edges = score_edges(split, draws=16)
    edges = [o | dict(sign=-1 if i % 2 else 1, necessity=.1*i) for i, o in enumerate(edges[::len(edges)//64][:64])]
    return add_examples(to_graph(split, edges), split, Noise(), n=5), edges


def test_exchange(drawn, tmp_path):
    G, edges = drawn
    assert sum(o["type"] != "skip" for o in edge_rows(G)) == len(edges) == 64
    save_circuit(G, tmp_path/"c.json")
    assert nx.utils.graphs_equal(read_circuit(tmp_path/"c.json"), G)
    to_graphml(G, tmp_path/"c.graphml")
    again = nx.read_graphml(tmp_path/"c.graphml", force_multigraph=True)
    assert set(again) == set(G)
    assert sorted(o["type"] for *_, o in again.edges(data=True)) == sorted(o["type"] for *_, o in G.edges(data=True))
    held = json.loads((tmp_path/"c.json").read_text())
    for wrong, said in ((held | dict(version=0), "version 0, this reads version 1"),
                        ({k: v for k, v in held.items() if k != "version"}, "version None"),
                        ({}, "no nodes and edges")):
        with pytest.raises(ValueError, match=said): read_circuit(wrong)
    (tmp_path/"list.json").write_text("[1]")
    for o in ("list.json", "c.graphml", "none.json"):
        with pytest.raises(ValueError, match="is no circuit"): read_circuit(tmp_path/o)


def test_places(drawn):
    G, _ = drawn
    for how in ((), (.63, 5.5)):
        o = layout(G, *how)
        assert {e["edge"] for e in o["lines"]} == set(range(G.number_of_edges()))
        assert all(e["x1"] < e["x2"] for e in o["lines"])
        boxes = sorted(o["boxes"], key=lambda b: (b["x"], b["y"]))
        assert all(a["x"] + a["w"] <= b["x"] or a["y"] + a["h"] <= b["y"] for a, b in zip(boxes, boxes[1:]))


def test_figure(drawn, tmp_path):
    G, _ = drawn
    fig = circuit_figure(G, "http://127.0.0.1:1")
    words = " ".join(o.text for o in fig.layout.annotations) + " ".join(o.text or "" for o in fig.data)
    assert "<b>&s0" not in words and "&lt;b&gt;&amp;s0" in words and "sign −" in words and "nearest to" in words
    assert sum(bool(o.meta) for o in fig.data) == sum(o["kind"] == "subspace" and o["name"] not in ("bias", "stream")
                                                      for _, o in G.nodes(data=True))
    write_figure(circuit_figure(G, static=True), tmp_path/"print.html", "a <b> & c")
    assert "<title>a &lt;b&gt; &amp; c</title>" in (tmp_path/"print.html").read_text()
    with pytest.raises(ValueError, match="pass the address"): circuit_figure(G, "file:///x")


def test_diff_is_symmetric(drawn):
    G, _ = drawn
    less = G.copy()
    gone = next((s, t, k) for s, t, k, e in G.edges(keys=True, data=True) if e["type"] == "OV")
    less.remove_edge(*gone)
    turned = next(e for *_, e in less.edges(data=True) if e["type"] == "OV")
    turned["sign"] = -turned["sign"]
    there, back = ({o["change"]: o for o in diff_circuits(*pair) if o["change"] != "same"}
                   for pair in ((G, less), (less, G)))
    assert set(there) == {"only in the first", "score changed"} and set(back) == {"only in the second", "score changed"}
    assert there["only in the first"]["label"] == back["only in the second"]["label"]
    assert {o["change"] for o in diff_circuits(G, G)} == {"same"}
    names = {o.name for o in diff_figure(G, less).data if o.mode == "lines"}
    assert names >= {"only in the first", "score changed", "same"} and "only in the second" not in names


def test_written_once(tmp_path):
    "A written circuit is drawn again, not found again; what cannot be found leaves nothing."
    known, cut, out = plant("histogram"), tmp_path/"partitions", tmp_path/"circuit.json"
    for i, p in enumerate(planted_partitions(known).values()): p.save_pretrained(cut/str(i))
    job = ("planted-histogram", cut, out)
    G = write_circuit(*job, answers=50)
    assert {(o["component"], o["type"]) for o in edge_rows(G)} >= {(o["component"], o["type"]) for o in known.edges}
    before, page = out.read_bytes(), out.with_suffix(".html").read_text()
    write_circuit(*job, answers=50, static=True)
    assert out.read_bytes() == before and out.with_suffix(".html").read_text() != page
    with pytest.raises(ValueError, match="holds a circuit with seed 0, not 1"): write_circuit(*job, answers=50, seed=1)
    with pytest.raises(ValueError, match="name one that ends in .json"): write_circuit(*job[:2], tmp_path/"other.txt")
    with pytest.raises(ValueError, match="pass the address"):
        write_circuit(*job[:2], tmp_path/"other.json", explorer="here")
    p = Partition.from_pretrained(cut/"0")
    Partition(p.bases, p.site, info=dict(weights="a"*64)).save_pretrained(cut/"0")
    with pytest.raises(ValueError, match="learned on a model of weights aaaaaaaa"):
        write_circuit(*job[:2], tmp_path/"other.json")
    assert not list(tmp_path.glob("other*"))


def test_same_circuit_in_every_process():
    "Sums run in a fixed order: another order of sets, as another hash seed makes, changes no bit."
    script = ("import torch; torch.set_num_threads(1)\n"
              "from subspace_circuits.edges import Moments, PartitionedModel, planted_partitions, score_edges\n"
              "from subspace_circuits.keep_only import KeepOnly\n"
              "from subspace_circuits.circuit_families import plant\n"
              "known = plant('induction', certified=False)\n"
              "split = PartitionedModel(Moments(known.model, known.task, n=30), planted_partitions(known))\n"
              "keep = KeepOnly(split, score_edges(split, draws=16))\n"
              "batch = known.task.sample(5, generator=torch.Generator().manual_seed(0))\n"
              "said = keep(batch.tokens, position_ids=batch.positions).double().sum().item().hex(), hash('induction')")
    here = {}
    exec(script, here)
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    other = subprocess.run([sys.executable, "-c", script + "\nprint(*said)"], check=True, text=True,
                           capture_output=True, env=os.environ | dict(PYTHONHASHSEED=seed))
    number, seeded = other.stdout.split()
    assert number == here["said"][0] and int(seeded) != here["said"][1]
