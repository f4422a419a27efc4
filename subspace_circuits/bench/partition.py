"""The closed form on toys and mixtures, and learned partitions of planted circuits and of the bundled model, by the
strict grade."""
import math
from collections.abc import Callable, Iterator

import torch
from tqdm.auto import tqdm

from subspace_circuits.superposition import TOYS, group_bases, train_autoencoders
from subspace_circuits.known_circuits import DECOYS
from subspace_circuits.circuit_families import FAMILIES, plant
from subspace_circuits.activations import batch_rows
from subspace_circuits.text import open_task
from subspace_circuits.partition import isolation, match_overlap, name_subspaces, variable_shares
from subspace_circuits.closed_form import closed_form, planted_mixture
from subspace_circuits.search import find_partition, written
from subspace_circuits.bench import figure


def _toy_results(name, toys, rows, seed):
    """Whether each toy is solved (or, if its groups overlap, refused), and its seconds; toys are trained until enough
    separate."""
    data, done = TOYS[name]["data"], 0
    while done < toys:
        for w in train_autoencoders(instances=20, seed=seed, **TOYS[name]).W:
            seed += 1
            try: groups = [b for k, b in group_bases(w, data.sizes).items() if k != "rest"]
            except ValueError: groups = None
            if (groups is None) != ("overfull" in name) or done == toys: continue
            done += 1
            found = closed_form(data.sample(rows, torch.Generator().manual_seed(seed))@w, name, seed)
            bases = [b for k, b in found.bases.items() if k != "rest"]
            solved = (found.info["outcome"] == "not separated" if groups is None else len(bases) == len(groups)
                      and min(match_overlap(groups, bases)) > .99)
            yield solved, found.info["seconds"]


def _mixture_results(blocks, size, rows, seed):
    "Whether the closed form finds the subspaces of a planted mixture, their number included."
    h, truth = planted_mixture(blocks, size, rows, torch.Generator().manual_seed(seed))
    found = closed_form(h, "mixture", seed)
    bases, what = [b for k, b in found.bases.items() if k != "rest"], f"{blocks} subspaces x {size}, "
    overlap, exact = match_overlap(truth, bases), all(b.shape[1] == size for b in bases)
    return [figure(what + "found", len(bases), "subspaces", f"{blocks}, all of {size} dimensions",
                   len(bases) == blocks and exact),
            figure(what + "mean overlap", sum(overlap)/len(overlap), ""),
            figure(what + "time", found.info["seconds"], "s", "below 600", found.info["seconds"] < 600)]


def benchmark_closed_form(
    toys:int=20, # Toys of each shape whose groups separate; a fifth as many of the overfull shapes
    rows:int=100_000,
    mixture:tuple=(24, 32, 400_000), # Blocks, their size and rows of the planted mixture; empty: leave it out
    seed:int=0,
)->list[dict]: # What was measured, with its bar
    "Measure the closed form on trained toys and on a planted mixture of subspaces."
    figures = []
    for name in ("groups 20 20", "groups 5 15 5 15", "groups 80 80", "groups 80 80 overfull",
                 "groups 40 80 120 160 overfull"):
        overfull = "overfull" in name
        good, seconds = zip(*_toy_results(name, math.ceil(toys/5) if overfull else toys, rows, seed))
        figures += [figure(f"{name}, {'reported as not separated' if overfull else 'exact'}", sum(good),
                           f"of {len(good)}", "all", all(good)),
                    figure(f"{name}, slowest", max(seconds), "s", "" if overfull else "below 2", max(seconds) < 2)]
    return figures + (_mixture_results(*mixture, seed) if mixture else [])


def score_circuit(
    family:str, seed:int=0, decoys:tuple=(), # As in `plant`
    sites:Callable=lambda o: True, lists:int=4000, # Which sites; number of lists to run
    writers:bool=True, # Whether what components wrote may be used, or rows alone
)->list[dict]: # For each site: sizes found, what is isolated of each variable, with and without excuses, seconds
    "Find the partition of every site of a planted circuit from rows after the first position, and grade it by its key."
    known, generator = plant(family, seed=seed, decoys=decoys, certified=False), torch.Generator().manual_seed(seed)
    once = [o for o in known.bases if o.startswith("blocks.0.") or not o.endswith("pre")] # the others come twice
    names = [o for o in once if sites(o)]
    batch = known.task.sample(lists, generator=generator)
    batch = batch._replace(real=batch.real & (batch.positions > 0))
    rows, wrote = batch_rows(known.model, batch, names), written(known.model, batch, names) if writers else {}
    found = {o: find_partition(rows[o], o, seed, written=wrote.get(o)) for o in tqdm(names, desc=f"{family} {seed}")}
    graded = isolation(known, found)
    of = lambda site, what: {k: getattr(o, what) for (s, k), o in graded.items() if s == site}
    return [dict(family=family, seed=seed, site=o, decoys=bool(decoys), sizes=p.sizes, seconds=p.info["seconds"],
                 isolated=of(o, "isolated"), no_excuse=of(o, "no_excuse")) for o, p in found.items()]


def benchmark_partition(
    quick:bool=False, # One seed of three families, no wide mixture: a check that it runs
    seeds:int=1, # Of each family, and ten times as many of the bundled trained model
)->Iterator[dict]: # What was measured, with its bar
    """Measure the closed form on toys and a wide mixture, and the whole method on planted circuits and the bundled
    trained model."""
    yield from benchmark_closed_form(*((3, 20_000, ()) if quick else ()))
    families, some = (("induction", "bigram_copy", "two_circuits"), 1) if quick else (tuple(FAMILIES), seeds)
    for name, decoys, writers in (("bare", (), True), ("with decoys", DECOYS, True), ("bare, rows alone", (), False)):
        scores = [o for f in families for s in range(some) for o in score_circuit(f, s, decoys, writers=writers)]
        for what, least in (("isolated", (.9 if decoys else .97) if writers else None), ("no_excuse", None)):
            good = [v for o in scores for v in o[what].values()]
            share = sum(good)/len(good)
            held = share >= least if least else None
            name_of = f"planted circuits {name}, variables isolated" + ", no excuse"*(what == "no_excuse")
            yield figure(name_of, share, f"of {len(good)}", f"at least {least}" if least else "", held) | dict(
                sites=scores)
        yield figure(f"planted circuits {name}, slowest site", max(o["seconds"] for o in scores), "s", "below 30",
                     max(o["seconds"] for o in scores) < 30)
    yield _trained_results(1 if quick else 10*seeds)

def _trained_results(seeds):
    "How often token, previous token and position are found in the bundled model."
    model, task = open_task("induction")
    batch = task.sample(1500, (0, 50), torch.Generator().manual_seed(0), n_ctx=model.cfg.n_ctx)
    rows, good = batch_rows(model, batch, ["blocks.0.hook_resid_mid"]), 0
    h, labels = rows["blocks.0.hook_resid_mid"], {k: rows[k] for k in ("token", "previous token", "position")}
    for seed in range(seeds):
        p = name_subspaces(find_partition(h, "blocks.0.hook_resid_mid", seed), h, labels)
        shares = variable_shares(p, h, labels)
        good += set(p.names) - {"rest"} == set(labels) and all(shares[k][k] > .65 for k in labels)
    return figure("trained copy model, the three variables found", good, f"of {seeds} seeds", "90%", good >= .9*seeds)
