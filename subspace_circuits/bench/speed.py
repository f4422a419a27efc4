"Our search against the public code of NDM, on the same rows, to the same held-out objective."
import sys, time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from subspace_circuits.activations import batch_rows
from subspace_circuits.closed_form import planted_mixture
from subspace_circuits.search import block_distances, ndm
from subspace_circuits.text import open_task


def held_out(
    h:Float[Tensor, "row d"], # Rows that no search has seen
    sizes:list[int], # Block sizes
    queries:int=1024, # The first rows; all others are keys
)->Callable[[Tensor], float]: # Basis to objective
    """Make the judge of a comparison: mean over blocks of the distance to the nearest neighbour, always of the same
    queries in the same pool."""
    q, k = h.float().split([queries, len(h) - queries])
    return lambda basis: block_distances(q@basis, k@basis, sizes).mean().item()


def public_trainer(
    reference:Path, # A checkout of the public SubspacePartition repository
)->type[nn.Module]:
    """Import the public code's trainer, without writing to its folder; two libraries that it names, but does not need
    to train, are stood in for."""
    file, absent = Path(reference)/"subspace_partition/training/model.py", ("transformer_lens", "datasets")
    if not file.is_file():
        raise ValueError(f"{file} is not there: pass a checkout of the public SubspacePartition repository")
    before, quiet = {k: sys.modules.get(k) for k in absent}, sys.dont_write_bytecode
    for k in absent:
        sys.modules[k] = ModuleType(k)
        sys.modules[k].__getattr__ = lambda name: object
    sys.path.insert(0, str(reference))
    sys.dont_write_bytecode = True
    try: return import_module("subspace_partition.training.model").NewUnevenRTrainer
    finally:
        sys.dont_write_bytecode = quiet
        sys.path.remove(str(reference))
        for k in [k for k in sys.modules if k in absent or k.split(".")[0] == "subspace_partition"]: del sys.modules[k]
        sys.modules.update({k: v for k, v in before.items() if v})

class _Buffer:
    "Rows as the public trainer asks for them: blocks of keys in turn, and queries that are not among them."
    buffer_dtype = torch.float16

    def __init__(self, h, blocks, block): # Rows in half precision, number and length of the blocks of keys
        self.keys, self.queries, self.cursor, self.at = h[:blocks*block].split(block), h[blocks*block:], 0, 0

    def pop_one(self, n):
        self.cursor, self.at = 0, self.at + n
        return self.queries[torch.arange(self.at - n, self.at) % len(self.queries)]

    def __next__(self):
        self.cursor += 1
        return self.keys[(self.cursor - 1) % len(self.keys)]


def run_public(
    trainer:type[nn.Module], # The public code's
    h:Float[Tensor, "row d"], # Rows in half precision
    sizes:list[int], lr:float, seconds:float, # Block sizes, its learning rate, when to stop
    judge:Callable[[Tensor], float], # Made by `held_out`
    blocks:int=25, block:int=16_384, # Its keys
)->list[tuple]: # Seconds, steps, held-out objective, some twenty times
    "Train as the public code does, before any merging: Adam, 128 queries a step, the gradient no longer than 100."
    net = trainer(h.shape[1], sizes, SimpleNamespace(batch_size=128, metric="euclidean", search_steps=blocks),
                  _Buffer(h, blocks, block))
    optimizer, curve = torch.optim.Adam(net.parameters(), lr), [(0., 0, judge(torch.eye(h.shape[1])))]
    spent, due, steps = 0., 0., 0
    with tqdm(total=round(seconds), desc=f"public code, lr {lr}", unit="s") as bar:
        while spent < seconds:
            start = time.perf_counter()
            net.step().backward()
            nn.utils.clip_grad_norm_(net.parameters(), 100.)
            optimizer.step()
            optimizer.zero_grad()
            spent, steps = spent + time.perf_counter() - start, steps + 1
            bar.update(min(round(spent), bar.total) - bar.n)
            if spent > due or spent >= seconds:
                curve.append((spent, steps, judge(net.R.weight.detach())))
                due = spent + seconds/20
    return curve


def fast_search(h, sizes, pool, generator, steps, basis):
    """`ndm` with more queries a step, and with a rate that makes up for its warm-up of 50 steps where a slice is
    shorter."""
    return ndm(h, sizes, pool, generator, steps, batch=512, lr=max(.05, min(1, 2/steps)), basis=basis)

def run_ours(
    h:Float[Tensor, "row d"], # Rows
    sizes:list[int], target:float, seconds:float, # Block sizes, objective to pass, when to give up
    judge:Callable[[Tensor], float], # Made by `held_out`
    search:Callable=fast_search, # Rows, sizes, pool, generator, steps and basis to basis
    pool:int=4096, seed:int=0,
)->list[tuple]: # Seconds, steps, held-out objective after each slice
    "Search in slices, each half as long as all before it together, until the held-out objective passes a target."
    generator, basis, spent, steps = torch.Generator().manual_seed(seed), torch.eye(h.shape[1]), 0., 0
    curve = [(0., 0, judge(basis))]
    while curve[-1][2] >= target and spent < seconds:
        slice, start = max(1, steps//2), time.perf_counter()
        basis = search(h, sizes, pool, generator, slice, basis)
        spent, steps = spent + time.perf_counter() - start, steps + slice
        curve.append((spent, steps, judge(basis)))
    return curve


def race(
    trainer:type[nn.Module], # The public code's
    h:Float[Tensor, "row d"], # Rows in half precision; the last 9216 are held out
    sizes:list[int], # Block sizes
    seconds:dict[float, float], # Learning rates of the public code, its own first, and how long each runs
    blocks:int=25, block:int=16_384, # Its keys
    search:Callable=fast_search, # What is timed against it
)->dict: # Of its own rate, and of the best of all: seconds and steps of both, objectives, ratio
    "Time a search to the best held-out objective that the public code reaches."
    seen, judge = h[:-9216], held_out(h[-9216:], sizes)
    public = {lr: run_public(trainer, seen, sizes, lr, s, judge, blocks, block) for lr, s in seconds.items()}
    own, tuned = next(iter(seconds)), min(public, key=lambda o: min(v for *_, v in public[o]))
    wide, out = seen.float(), {}
    for name, lr in {"its own settings": own, "tuned learning rate": tuned}.items():
        best = min(public[lr], key=lambda o: o[2])
        curve = run_ours(wide, sizes, best[2], max(seconds.values()), judge, search)
        passed = curve[-1][2] < best[2]
        out[name] = dict(lr=lr, start=curve[0][2], reached=best[2], seconds=best[0], steps=best[1],
                         budget=public[lr][-1][0], ours_seconds=curve[-1][0], ours_steps=curve[-1][1],
                         ours_reached=curve[-1][2], ratio=best[0]/curve[-1][0] if passed and curve[-1][0] else None,
                         public=public[lr], ours=curve)
    return out


def _site_rows(model, n, generator):
    "Rows of a model after its first attention, shuffled, in half precision."
    net, task = open_task(model)
    site, rows = "blocks.0.hook_resid_mid", []
    while sum(len(o) for o in rows) < n:
        rows.append(batch_rows(net, task.sample(512, None, generator, net.cfg.n_ctx), [site], dtype="float16")[site])
    rows = torch.cat(rows)
    return rows[torch.randperm(len(rows), generator=generator)[:n]]

def benchmark_speed(
    reference:Path, # A checkout of the public SubspacePartition repository, imported read-only
    model:str="induction", # What `open_task` takes, read at blocks.0.hook_resid_mid
    quick:bool=False, # A few seconds and far fewer keys: a check that it runs, held to no bar
    search:Callable=fast_search, # What is timed against it
    seconds:tuple=(45, 80), # Of the public code with each learning rate: for the trained model, for the mixture
)->dict: # Width to setting to figures, each with its bar
    """Time to the public code's held-out objective: a trained model in units of 8, and a planted mixture of 768
    dimensions in units of 32."""
    trainer, generator = public_trainer(reference), torch.Generator().manual_seed(0)
    block, spare, rates, out = 16_384, 2**13 + 9216, (3e-4, 3e-3, 1e-2), {}
    def mixture(n): return planted_mixture(24, 32, n, generator, off=.9, noise=.02, features=64)[0].half()
    data = (lambda n: _site_rows(model, n, generator)), mixture
    for rows, unit, keys, limit in zip(data, (8, 32), (2, 1) if quick else (6, 25), (4, 6) if quick else seconds):
        h = rows(keys*block + spare)
        figures = race(trainer, h, [unit]*(h.shape[1]//unit), dict.fromkeys(rates, limit), keys, block, search)
        for o, bar in zip(figures.values(), (100, 20)):
            o.update(bar=None if quick else bar, held=None if quick else (o["ratio"] or 0) >= bar, keys=keys*block,
                     threads=torch.get_num_threads())
        out[h.shape[1]] = figures
    return out
