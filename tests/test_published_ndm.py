"""The published algorithm takes the same steps whether one process searches the keys or two search a part each; a race
against a public checkout leaves no trace and is not won by standing still."""
import os, subprocess, sys
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from subspace_circuits.closed_form import planted_mixture
from subspace_circuits.published_ndm import ndm_loss, train_ndm
from subspace_circuits.bench.speed import public_trainer, race

brief = dict(unit=2, pool=301, steps=60, lr=1e-2, merge_start=30, merge_interval=10, merge_threshold=.04, mi_keys=200,
             mi_batches=2, remix_interval=10, batch=32)
program = """
import sys, torch
from safetensors.torch import load_file, save_file
from subspace_circuits.published_ndm import ndm_loss, train_ndm
torch.set_num_threads(1)
h, out = load_file(sys.argv[1])["h"], {}
for metric in ("euclidean", "cosine"):
    brief = %r | dict(metric=metric) | (dict(remix_interval=0) if metric == "cosine" else {})
    found = train_ndm(h, "mix", **brief, folder=f"{sys.argv[2]}/{metric}")
    out[metric], out[metric + ".sizes"] = found.basis, torch.tensor(list(found.sizes.values()))
rank = torch.distributed.get_rank()
basis = torch.eye(6).requires_grad_()
ndm_loss(h[:32], [h[32:39], h[39:400]][rank], basis, [2, 4]).sum().backward()
save_file(out | {"gradient": basis.grad}, f"{sys.argv[2]}/{rank}.safetensors")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
""" % brief


def rows():
    "Two independent variables of three dimensions, mixed, with ties."
    g = torch.Generator().manual_seed(0)
    def variable():
        codes, which = torch.randn(9, 3, generator=g), torch.randint(9, (2000,), generator=g)
        return codes[which]*torch.rand(2000, 1, generator=g).round(decimals=1)
    h = torch.cat([variable() for _ in range(2)], 1)
    return h@torch.linalg.qr(torch.randn(6, 6, generator=g))[0]


def test_two_processes_with_half_of_the_keys_each_end_where_one_ends(tmp_path):
    torch.set_num_threads(1)
    h = rows()
    save_file({"h": h}, tmp_path/"rows.safetensors")
    (tmp_path/"train.py").write_text(program)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           tmp_path/"train.py", tmp_path/"rows.safetensors", tmp_path],
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    ranks = [load_file(tmp_path/f"{i}.safetensors") for i in range(2)]
    basis = torch.eye(6).requires_grad_()
    ndm_loss(h[:32], h[32:400], basis, [2, 4]).sum().backward()
    for o in ranks: assert torch.equal(o["gradient"], basis.grad)
    for metric in ("euclidean", "cosine"):
        job = brief | dict(metric=metric) | (dict(remix_interval=0) if metric == "cosine" else {})
        one = train_ndm(h, "mix", **job)
        assert one.info["taken"] > job["merge_start"] or metric == "cosine"
        for o in ranks:
            assert torch.equal(o[metric], one.basis) and o[metric + ".sizes"].tolist() == list(one.sizes.values())
        read = train_ndm(h, "mix", **job, folder=tmp_path/metric) # written by the first process alone
        assert torch.equal(read.basis, one.basis)


stand_in = """
from subspace_partition.training.data import *
import torch
from torch import nn

class NewUnevenRTrainer(nn.Module):
    def __init__(self, h_dim, partition, cfg, buffer, previous_R=None):
        super().__init__()
        self.R = nn.utils.parametrizations.orthogonal(nn.Linear(h_dim, h_dim, bias=False))
        self.R.weight = torch.eye(h_dim)
        self.partition, self.cfg, self.buffer = partition, cfg, buffer

    def step(self):
        x = self.buffer.pop_one(self.cfg.batch_size)
        y = torch.cat([next(self.buffer) for _ in range(self.cfg.search_steps)])
        assert x.dtype == y.dtype == self.buffer.buffer_dtype
        z, k = x.float()@self.R.weight, y.float()@self.R.weight
        blocks = zip(z.split(self.partition, 1), k.split(self.partition, 1))
        return sum(torch.cdist(a, b).min(1).values.mean() for a, b in blocks)/len(self.partition)
"""


@pytest.fixture
def checkout(tmp_path):
    "A folder of the public layout with a trainer of its own, which names what no library has."
    folder = tmp_path/"public/subspace_partition/training"
    folder.mkdir(parents=True)
    (folder.parent/"__init__.py").touch()
    (folder/"data.py").write_text("from transformer_lens import NameOfLongAgo\nfrom datasets import load_dataset\n")
    (folder/"model.py").write_text(stand_in)
    return tmp_path/"public"


def test_a_checkout_is_imported_without_a_trace(checkout):
    import transformer_lens
    before, path, files = set(sys.modules), list(sys.path), sorted(checkout.rglob("*"))
    assert public_trainer(checkout).__name__ == "NewUnevenRTrainer"
    assert sys.modules["transformer_lens"] is transformer_lens
    assert not {o for o in set(sys.modules) - before if "subspace_partition" in o or o == "datasets"}
    assert sys.path == path and sorted(checkout.rglob("*")) == files


def test_what_is_no_checkout_is_refused_in_one_line(tmp_path):
    for folder in (tmp_path, tmp_path/"absent"):
        with pytest.raises(ValueError, match="pass a checkout of the public SubspacePartition repository") as error:
            public_trainer(folder)
        assert "\n" not in str(error.value) and str(folder) in str(error.value)


@pytest.fixture
def ticks(monkeypatch):
    "A counter in place of the clock: a step of either side takes one, whatever the machine does."
    monkeypatch.setattr("subspace_circuits.bench.speed.time", SimpleNamespace(perf_counter=count().__next__))


def test_a_race_is_won_by_searching_and_not_by_standing_still(checkout, ticks):
    torch.set_num_threads(1)
    h = planted_mixture(2, 4, 2*512 + 300 + 9216, torch.Generator().manual_seed(0), off=.3, features=9)[0].half()
    run = lambda **k: race(public_trainer(checkout), h, [4, 4], {1e-5: 15, 3e-5: 15}, 2, 512, **k)
    figures = run()
    for o in figures.values():
        assert o["ours_reached"] < o["reached"] <= o["start"] and o["ratio"] == o["steps"]/(len(o["ours"]) - 1)
        assert o["public"][0][2] == o["ours"][0][2] == o["start"] and o["budget"] == 15
    assert figures["tuned learning rate"]["reached"] <= figures["its own settings"]["reached"]
    still = run(search=lambda h, sizes, pool, generator, steps, basis: basis)["tuned learning rate"]
    assert still["ratio"] is None and still["ours_reached"] == still["start"] and len(still["ours"]) == 1 + 15
