"Search and mutual information at full size, beside the plain programs that do the same."
import time
from collections.abc import Iterator

import torch

from subspace_circuits.toy_models import n_threads
from subspace_circuits.neighbors import (
    check_blocks, information_by_tables, nearest, nearest_neighbors, pairwise_information)
from subspace_circuits.bench import figure, side_by_side


def benchmark_neighbors(
    threads:int=1, # Of torch and of faiss
    blocks:int=24, width:int=32, # Subspaces and their dimension
    queries:int=128, keys:int=16_384,
    rows:int=4_000, # For mutual information
    rounds:int=5, # Of the search; mutual information of all pairs runs once, of one pair three times
)->Iterator[dict]: # What was measured, with its bar
    """Time a search beside the bare product and what one would write, and mutual information of all pairs beside pair
    by pair, on noise."""
    sizes, g, pairs = [width]*blocks, torch.Generator().manual_seed(0), blocks*(blocks - 1)//2
    x, y = (torch.randn(n, blocks*width, generator=g) for n in (queries, keys))
    a, b = (o.view(-1, blocks, width).transpose(0, 1) for o in (x, y))
    out = torch.empty(blocks, queries, keys)
    searches = {"bare product": lambda: torch.bmm(a, b.mT, out=out), "tiles": lambda: nearest_neighbors(x, y, sizes),
                "faiss": lambda: nearest_neighbors(x, y, sizes, backend="faiss"),
                "one line": lambda: nearest(x, y, sizes),
                "cdist and a minimum": lambda: torch.cdist(a, b).min(2)}
    parts = list(torch.randn(rows, blocks*width, generator=g).split(sizes, 1))
    with n_threads(threads):
        spent = side_by_side(searches, rounds)
        start = time.perf_counter()
        pairwise_information(check_blocks(parts, 1), 1)
        together = time.perf_counter() - start
        apart = pairs*side_by_side({"pair": lambda: information_by_tables(*parts[:2])}, 3)["pair"]
    yield figure("threads of torch", threads, "")
    for k, v in spent.items():
        yield figure(f"{blocks} subspaces x {width}, {queries} queries, {keys} keys: {k}", 1000*v, "ms")
    over, under = spent["tiles"]/spent["bare product"], spent["cdist and a minimum"]/spent["tiles"]
    yield figure("tiles over the bare product", over, "x", "at most 3", over <= 3)
    yield figure("cdist and a minimum over tiles", under, "x", "at least 1.5", under >= 1.5)
    yield figure(f"mutual information, {pairs} pairs, {rows} rows", together, "s", "below 20", together < 20)
    yield figure("pair by pair (one measured) over all pairs together", apart/together, "x", "at least 2",
                 apart >= 2*together)
