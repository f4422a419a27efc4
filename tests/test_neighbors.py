"""Searches equal the plainest program bit for bit, whatever the shapes, the data and the processes; mutual information
does not see what it must not."""
import os, subprocess, sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from subspace_circuits.neighbors import (
    distance_correlation, mutual_information, mutual_information_matrix, nearest, nearest_neighbors)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def seeded(seed): return torch.Generator().manual_seed(seed)


def table(q, k, sizes, n, bad=None):
    "The `n` nearest from tables of differences and a stable sort."
    found = []
    for a, b in zip(q.float().split(sizes, 1), k.float().split(sizes, 1)):
        d = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
        found.append([o[:, :n] for o in (d if bad is None else d.masked_fill(bad, torch.inf)).sort(dim=1, stable=True)])
    return [torch.stack(o) for o in zip(*found)]


def rows(kind, n, d, seed):
    "Rows of which a rounded product is easily wrong."
    g = seeded(seed)
    x, symbol = torch.randn(n, d, generator=g), torch.randint(7, (n,), generator=g)
    codes = torch.randn(7, d, generator=g)[symbol]
    return {"noise": x, "integers": x.mul(2).round(), "symbols": codes, "near symbols": codes + 1e-5*x,
            "far away": codes + 1e-3*x + 5000,
            "one outlier": torch.cat([x[:-1]*.001, 1e5*x[-1:]]), "half": x.half()}[kind]


@pytest.mark.parametrize("kind", ["noise", "integers", "symbols", "near symbols", "far away", "one outlier", "half"])
@pytest.mark.parametrize("seed", range(6))
def test_search_is_the_table_to_the_last_bit(kind, seed):
    pick = np.random.default_rng(seed)
    sizes = pick.integers(1, 40, pick.integers(1, 5)).tolist()
    batch, pool = int(pick.integers(1, 300)), int(pick.integers(1, 1500))
    n, tile = int(min(pool, pick.integers(1, 70))), int(32*pick.integers(1, 40))
    q, k = rows(kind, batch + pool, sum(sizes), seed).split([batch, pool])
    found = nearest_neighbors(q, k, sizes, n, tile=tile)
    for got, true in zip(found, table(q, k, sizes, n)): assert torch.equal(got, true)


@pytest.mark.parametrize("seed", range(4))
def test_nothing_excluded_is_found_and_nothing_allowed_is_missed(seed):
    x, document, position = rows("integers", 700, 9, seed), torch.arange(700)//70, torch.arange(700) % 70
    q, k, sizes = x[:150], x[150:], [4, 5]
    groups = dict(query_group=document[:150], key_group=document[150:])
    places = dict(query_position=position[:150], key_position=position[150:])
    own, near = document[:150, None] == document[150:], (position[:150, None] - position[150:]).abs() <= 5
    for ask, bad in ((groups, own), (places | {"window": 5}, near), (groups | places | {"window": 5}, own & near)):
        found = nearest_neighbors(q, k, sizes, 6, tile=96, **ask)
        for got, true in zip(found, table(q, k, sizes, 6, bad)): assert torch.equal(got, true)


def test_cosine_is_euclid_on_the_sphere_and_ignores_length():
    q, k = rows("noise", 500, 12, 0).split([100, 400])
    found = nearest_neighbors(q, k, [5, 7], 4, "cosine")
    scaled = nearest_neighbors(3*q, .01*k, [5, 7], 4, "cosine")
    torch.testing.assert_close(found.distance, scaled.distance, atol=1e-5, rtol=0)
    cosine = 1 - torch.nn.functional.cosine_similarity(q[:, None, :5], k[found.index[0]][..., :5], dim=2)
    torch.testing.assert_close(found.distance[0], cosine, atol=1e-5, rtol=0)


def test_inner_loop_agrees_where_nothing_ties():
    q, k = rows("noise", 900, 12, 1).split([100, 800])
    assert torch.equal(nearest(q, k, [5, 7]), nearest_neighbors(q, k, [5, 7]).index[..., 0])


@pytest.mark.parametrize("kind", ["noise", "far away"])
def test_faiss_finds_the_same_distances(kind):
    q, k = rows(kind, 1200, 12, 2).split([100, 1100])
    exact, other = nearest_neighbors(q, k, [5, 7], 5), nearest_neighbors(q, k, [5, 7], 5, backend="faiss")
    torch.testing.assert_close(exact.distance, other.distance, atol=5e-3, rtol=0)
    every_cell = nearest_neighbors(q, k, [5, 7], 5, backend="approximate", cells=8, probes=8)
    torch.testing.assert_close(exact.distance, every_cell.distance, atol=5e-3, rtol=0)


program = """
import sys, torch, torch.distributed as dist
from safetensors.torch import load_file, save_file
from subspace_circuits.neighbors import nearest_neighbors
torch.set_num_threads(1)
dist.init_process_group("gloo")
o, rank, out = load_file(sys.argv[1]), dist.get_rank(), {}
mine = [slice(0, 37), slice(37, 37), slice(37, None)][rank]
q, k = o["x"][:120], o["x"][120:][mine]
def refusal(queries, keys, n=1):
    try: nearest_neighbors(queries, keys, [4, 5], n, process_group=dist.group.WORLD)
    except ValueError as error: return str(error)
own = dict(query_group=o["group"][:120], key_group=o["group"][120:][mine])
place = dict(query_position=o["place"][:120], key_position=o["place"][120:][mine], window=3)
asks = dict(plain={}, many=dict(k=60), own=own | dict(k=4), window=own | place | dict(k=4),
            cosine=dict(metric="cosine", k=3), faiss=dict(backend="faiss", k=50))
for name, ask in asks.items():
    found = nearest_neighbors(q, k, [4, 5], process_group=dist.group.WORLD, **ask)
    out |= {name + ".distance": found.distance, name + ".index": found.index}
save_file(out, f"{sys.argv[2]}/{rank}.safetensors")
holed = torch.cat([k, torch.full((1, 9), torch.nan)]) if rank == 2 else k
lines = refusal(q, holed), refusal(q + 1 if rank == 1 else q, k), refusal(q, k, 5000)
open(f"{sys.argv[2]}/{rank}.txt", "w").write("\\n".join(lines))
dist.barrier()
dist.destroy_process_group()
"""


def test_three_processes_one_of_them_empty_give_the_answer_of_one(tmp_path):
    x, group, place = rows("integers", 720, 9, 3) + .5, torch.arange(720)//60, torch.arange(720) % 60
    save_file({"x": x, "group": group, "place": place}, tmp_path/"rows.safetensors")
    (tmp_path/"search.py").write_text(program)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3",
                           tmp_path/"search.py", tmp_path/"rows.safetensors", tmp_path],
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    q, k = x.split([120, 600])
    own, near = group[:120, None] == group[120:], (place[:120, None] - place[120:]).abs() <= 3
    true = {"plain": table(q, k, [4, 5], 1), "many": table(q, k, [4, 5], 60), "own": table(q, k, [4, 5], 4, own),
            "window": table(q, k, [4, 5], 4, own & near),
            "cosine": nearest_neighbors(q, k, [4, 5], 3, "cosine")[:2]}
    for rank in range(3):
        found = load_file(tmp_path/f"{rank}.safetensors")
        for name, (distance, index) in true.items():
            assert torch.equal(found[name + ".distance"], distance) and torch.equal(found[name + ".index"],
                                                                                    index), (rank, name)
        torch.testing.assert_close(found["faiss.distance"], table(q, k, [4, 5], 50)[0], atol=2e-3, rtol=0)
        nan, other, many = (tmp_path/f"{rank}.txt").read_text().split("\n")
        assert nan == ("1 of 564 keys are not finite: remove them first" if rank == 2
                       else "process 2 refused its part: see its own message")
        assert other == "process 1 has other queries than process 0: pass the same to every process"
        assert many == "5000 neighbours among 600 keys: use 1 to 600"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [1, 4])
def test_information_is_symmetric_and_blind_to_rotation_scale_and_shift(seed, k):
    g = seeded(seed)
    x = torch.randn(500, 4, generator=g)
    y = torch.cat([x[:, :2] + .2*torch.randn(500, 2, generator=g), torch.randn(500, 1, generator=g)], 1)
    z = torch.randint(5, (500, 1), generator=g).float()
    turned = [5*x@torch.linalg.qr(torch.randn(4, 4, generator=g))[0] + 2,
              .1*y@torch.linalg.qr(torch.randn(3, 3, generator=g))[0], 7*z - 3]
    nats = mutual_information_matrix([x, y, z], seeded(0), k=k).nats
    assert torch.equal(nats, nats.T) and nats.diagonal().abs().max() == 0 and nats[0, 1] > 1
    torch.testing.assert_close(nats, mutual_information_matrix(turned, seeded(0), k=k).nats, atol=.005, rtol=0)
    torch.testing.assert_close(nats[0, 1].item(), mutual_information(y, x, k), atol=1e-6, rtol=0)
    order = torch.randperm(500, generator=g)
    torch.testing.assert_close(nats[0, 2].item(), mutual_information(x[order], z[order], k), atol=1e-5, rtol=0)


def test_p_values_are_small_for_dependence_only():
    g = seeded(5)
    x, y = torch.randn(2, 300, 2, generator=g)
    mi = mutual_information_matrix([x, x + .5*y, torch.randn(300, 2, generator=g)], g, draws=19, k=3)
    assert mi.p()[0, 1] == .05 and mi.p(family=False)[0, 1] == .05 and mi.p()[1, 2] > .05
    assert (mi.p() >= mi.p(family=False)).all()
    assert distance_correlation(x, x + .5*y, g, 99)[1] == .01


def test_same_generator_same_null():
    x = torch.randn(200, 6, generator=seeded(1)).split(2, 1)
    one, two = (mutual_information_matrix(list(x), seeded(3), draws=2) for _ in range(2))
    assert torch.equal(one.null, two.null)
