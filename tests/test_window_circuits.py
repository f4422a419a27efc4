"""A window of layers inside a whole model, on tiny random families: all edges kept are the model, and the first-order
effect of every edge is the derivative of what keep-only models answer."""
import pytest
import torch
from test_families import READ, Words, random_partitions, saved

from subspace_circuits.edges import Moments, PartitionedModel
from subspace_circuits.keep_only import KeepOnly, empty_masks, masks_of
from subspace_circuits.models import open_model
from subspace_circuits.sinks import Sink, find_sink, looked_at, swap
from subspace_circuits.window_circuits import (
    Window, edge_tables, judge_window, kept_window, listed_edges, window_effects)

FAMILIES = ("gpt2", "opt", "pythia", "llama", "qwen2", "qwen3", "gemma2", "olmo2", "cohere", "phi")


def opened(folder, name, layers):
    "A tiny model of four layers' shape, its window, and answers to compare."
    saved(folder, *READ[name])
    model, task = open_model(folder)[0], Words()
    moments = Moments(model, task, n=10, layers=layers)
    split = PartitionedModel(moments, random_partitions(model), layers)
    batch = task.sample(3, generator=torch.Generator().manual_seed(1))
    batch = batch._replace(answers=batch.tokens.roll(-1, 1))
    return model, split, Window(split.weights, layers, batch, rows=2)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("layers", [range(1, 2), range(0, 1)], ids=["last", "first"])
def test_all_edges_of_a_window_are_the_model(tmp_path, name, layers):
    model, split, window = opened(tmp_path, name, layers)
    want = model(window.batch.tokens, position_ids=window.batch.positions).log_softmax(-1)
    got = torch.cat([o[-1] for o in window.parts])
    assert (got - want.flatten(0, 1)).abs().max() < 1e-4
    full = {k: torch.ones_like(v) for k, v in empty_masks(split.weights, split.partitions).items()}
    whole = judge_window(window, kept_window(window, KeepOnly(split, full, "mean")))
    none = judge_window(window, kept_window(window, KeepOnly(split, [], "mean")))
    assert whole.mean() < 1e-6 < .01 < none.mean()
    components = {k for k, _ in full if k[0] in "LM"}
    edges = window_effects({"found": split}, window, torch.Generator().manual_seed(0), components)["found"]
    every = judge_window(window, kept_window(window, KeepOnly(split, edges, "mean")))
    assert every.mean() < 1e-6 # no edge is left out of the list


@pytest.mark.parametrize("name", FAMILIES)
def test_exchanges_run_the_model(tmp_path, name):
    "Nothing exchanged is the model, whichever half is asked; all exchanged, an MLP writes what it writes elsewhere."
    model, split, window = opened(tmp_path, name, range(0, 1))
    w, d, rows = split.weights, model.cfg.d_model, torch.zeros(window.batch.tokens.shape, dtype=torch.bool)
    rows[:, 1] = True
    assert find_sink(window) is None # random weights make none
    for half in range(2 - (w.parallel or not w.mlps)):
        sink = Sink(half, w.site(half), rows, 1., 1., 1., 1.)
        nothing, everything = (swap(window, sink, U, torch.Generator()) for U in (torch.zeros(d, 1), torch.eye(d)))
        assert nothing.cost.mean() < 1e-6 < everything.cost.mean()
        if half: assert abs(everything.without - nothing.alone) < 1e-4*nothing.alone
        share = looked_at(window, sink, torch.Generator())
        assert len(share) == model.cfg.n_layers - 1 and 0 < share.min() and share.max() < 1


@pytest.mark.parametrize("name", FAMILIES)
def test_effects_are_derivatives(tmp_path, name):
    "Of the log-probability of given answers, by the mask of each edge; to 2% where the effect is not tiny."
    layers = range(0, 1)
    model, split, window = opened(tmp_path, name, layers)
    w, (x, positions, scored, targets, _) = split.weights, window.parts[0]
    full = {k: torch.ones_like(v) for k, v in empty_masks(w, split.partitions).items()}
    alive = {k for k, _ in full if k[0] in "LM"}
    given = lambda logp: logp.gather(1, targets[scored][:, None]).sum()
    tables = edge_tables({"found": split}, window, window.parts[0], [given], alive)[0]["found"]
    edges = listed_edges(split, {k: v.sum(0) for k, v in tables.items()})
    largest = max(abs(o["effect"]) for o in edges)
    def logp(masks):
        end = kept_window(window, KeepOnly(split, masks, "mean"))(x, positions)
        return window.answer(end, positions, scored, window.stop).gather(1, targets[scored][:, None]).double().sum()
    before, step = logp(full), .02
    for o in edges[::max(1, len(edges)//12)]:
        if o["type"] == "MLP": continue # neurons are not linear in a mask: the next test
        less = {k: v - step*masks_of(w, split.partitions, [o])[k] for k, v in full.items()}
        assert abs((logp(less) - before).item()/step - o["effect"]) < .03*largest + .02*abs(o["effect"]), o
