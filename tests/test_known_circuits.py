"Every planted family keeps its answer key under other seeds, layer norm and other widths."
import pytest
import torch

from subspace_circuits.circuit_families import FAMILIES, plant
from subspace_circuits.partition import Partition
from subspace_circuits.toy_models import accuracy


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("family", FAMILIES)
def test_key_of_a_fresh_seed(family):
    known = plant(family, seed=100)
    assert accuracy(known.model, known.task, n=200) >= .99 and all(o["true"] == (o["kl"] > .05) for o in known.blocks)
    for site, bases in known.bases.items(): assert Partition(bases, site).names == list(bases)


@pytest.mark.parametrize("family", FAMILIES)
def test_wide_stream_under_layer_norm(family):
    known = plant(family, seed=101, noise=0, norm=200., d_model=160)
    assert known.model.cfg.d_model == 160 and accuracy(known.model, known.task, n=100) >= .99


@pytest.mark.parametrize("family", FAMILIES)
def test_same_seed_same_bytes(family):
    one, two = (plant(family, seed=3, certified=False).model.state_dict() for _ in range(2))
    assert all(torch.equal(v, two[k]) for k, v in one.items())
