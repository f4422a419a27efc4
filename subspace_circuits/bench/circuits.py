"Every method on every planted circuit, and what scoring costs."
import sys, time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from subspace_circuits.toy_models import UniqueCopy, n_threads, new_model
from subspace_circuits.forward import circuit_sites
from subspace_circuits.circuit_families import FAMILIES
from subspace_circuits.partition import Partition
from subspace_circuits.edges import Moments, PartitionedModel, score_edges
from subspace_circuits.circuit_benchmark import (
    COLUMNS, LEARNERS, METHODS, OTHER_LIMITS, circuit, compare_methods, compare_random,
    summary_of_learners, summary_of_methods)
from subspace_circuits.bench import figure
from subspace_circuits.workers import in_workers


def scoring_cost(
    d_model:int=768, n_layers:int=12, n_heads:int=12, vocabulary:int=50_000, # Of the model
    subspaces:int=12, threads:int=2, # Of each site; of torch
)->tuple[float, float]: # Seconds of `score_edges` once there are moments; GB the process has held, model included
    "Score a random model, GPT-2-small-shaped unless asked otherwise, between random subspaces."
    import resource
    with n_threads(threads):
        model = new_model(vocabulary + 4, n_layers=n_layers, n_heads=n_heads, d_model=d_model)
        moments = Moments(model, UniqueCopy(vocabulary), n=50, lengths=(20, 30))
        turn = torch.linalg.qr(torch.randn(d_model, d_model, generator=torch.Generator().manual_seed(0)))[0]
        bases = {f"s{i}": b for i, b in enumerate(turn.tensor_split(subspaces, 1))}
        split = PartitionedModel(moments, {s: Partition(bases, s) for s in circuit_sites(model)})
        start = time.perf_counter()
        score_edges(split)
        seconds = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024 # Bytes of `ru_maxrss`
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*unit/1e9

TOY = dict(d_model=64, n_layers=2, n_heads=1, vocabulary=40, subspaces=4, threads=1)

def _cost_figures():
    "What scores cost on a toy and at the size of GPT-2 small, each in a process of its own."
    for what, sizes, bar in (("toy", TOY, 1), ("GPT-2-small shape", {}, 60)):
        (seconds, held), = in_workers([(partial(scoring_cost, **sizes), ())], 1)
        yield figure(f"{what}, scores of all edges", seconds, "s", f"below {bar}", seconds < bar)
        yield figure(f"{what}, memory of the process", held, "GB", "below 4", held < 4)


# What our circuit must reach at least, by learner ("": the true subspaces): the bars of the project, met or not
BARS = {"": dict(isolated=1, AP=.99, exact=.95), "ours": dict(isolated=.9, AP=.9, exact=.7)}
BARE = BARS | {"ours": dict(isolated=.97, AP=.97, exact=.9)} # Without decoys
NOTHING = .05 # What a site in one block may reach at most: nothing was learned

def grade_figures(
    rows:list[dict], learner:str="", # From `compare_methods`
)->Iterator[dict]: # What was measured, with its bar
    "List the grades in one kind of subspaces: of our circuit, under other limits, and of every method."
    kind, table = f"{learner or 'true'} subspaces", summary_of_learners(rows)[learner]
    mine = [o for o in rows if o["method"] == "circuit"]
    bars = (BARE if mine[0]["bare"] else BARS).get(learner, {})
    for k in ("isolated", "AP", "exact"):
        least = bars.get(k)
        bar = f"at least {least}" if least else f"at most {NOTHING}" if learner == "one block" else ""
        held = table[k] >= least if least else table[k] <= NOTHING if bar else None
        yield figure(f"{kind}, circuit: {k}", table[k], f"of {table['models']} models", bar, held)
        yield figure(f"{kind}, circuit: {k}, no excuse", table[k + ", no excuse"], f"of {table['models']} models")
    variables = sum(o["variables"] for o in mine)
    for k in OTHER_LIMITS:
        yield figure(f"{kind}: isolated, {k}", sum(o["alone"][k] for o in mine)/variables, f"of {variables} variables")
    for name, o in summary_of_methods(rows).items():
        for k in ("QK", "OV", "MLP", "exact", "right"):
            if o[k] is not None: yield figure(f"{kind}, {name}: {COLUMNS[k]}", o[k], f"of {table['models']} models")

def _seconds_figures(rows, learner=""):
    "What learning and every method cost."
    kind, learning = f"{learner or 'true'} subspaces", summary_of_learners(rows)[learner]["seconds"]
    if learning is not None: yield figure(f"{kind}: learning", learning, "s a model")
    for name, o in summary_of_methods(rows).items():
        if o["seconds"] is not None: yield figure(f"{kind}, {name}", o["seconds"], "s a model")

def _random_figures(random):
    "How often each method reports nothing on a random model, and how many edges it does report."
    for name in dict.fromkeys(o["method"] for o in random):
        false = [o["false"] for o in random if o["method"] == name]
        silent, ours = sum(not o for o in false)/len(false), name == "circuit"
        yield figure(f"random models, {name}: without an edge", silent, f"(mean of {len(false)})",
                     ".99" if ours else "", silent >= .99 if ours else None) | dict(each=false)
        yield figure(f"random models, {name}: false edges", sum(false)/len(false), "per model")

def benchmark_circuits(
    families:tuple[str, ...]=tuple(FAMILIES), seeds:int=3, # Seeds of each family; as many random models of each kind
    learned:bool=True, # Learn subspaces too: minutes for each model
    kept:Path|None=None, # A file of JSON lines for every grade as it comes: an interrupted benchmark goes on from there
    first:int=0, bare:bool=False, # First seed; planted without decoys
)->Iterator[dict]: # What was measured, with its bar
    """Measure every method on planted families, from true subspaces and every learner's, on random models, and what it
    costs."""
    for learner in ("", *LEARNERS) if learned else ("",):
        rows = compare_methods(families, range(first, first + seeds), learner,
                               METHODS if learner in ("", "ours") else dict(circuit=circuit), kept, bare)
        yield from grade_figures(rows, learner)
        yield from _seconds_figures(rows, learner)
    yield from _random_figures(compare_random(families, seeds))
    yield from _cost_figures()
