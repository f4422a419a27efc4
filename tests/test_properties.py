"""What holds for every partition, circuit and file, whatever their numbers: examples are drawn by hypothesis, the same
ones each time."""
import json
from functools import cache

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from subspace_circuits.circuit_families import plant
from subspace_circuits.edges import Moments, PartitionedModel, score_edges
from subspace_circuits.evaluation import Pairs, Patch, interchange
from subspace_circuits.exchange import best_shares
from subspace_circuits.files import read_json, write_json
from subspace_circuits.partition import Partition, compare
from subspace_circuits.suites import known_tests
from subspace_circuits.toy_models import UniqueCopy, new_model, parameters

torch.set_num_threads(1)
SITE = "blocks.0.hook_resid_pre"
# Those that run a model are not made smaller where one fails: that would run it for minutes.
few = settings(max_examples=3, derandomize=True, deadline=None, database=None, phases=[Phase.generate])
many = settings(max_examples=40, derandomize=True, deadline=None, database=None,
                suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 2**31 - 1)
sizes = st.lists(st.integers(1, 7), min_size=1, max_size=6)


def rotation(d, seed):
    return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))[0]


def cut(sizes, seed, site=SITE):
    "A partition of any sizes, in any basis."
    parts = rotation(sum(sizes), seed).float().split(sizes, 1)
    return Partition({f"s{i}": o.contiguous() for i, o in enumerate(parts)}, site)


def rows(n, d, seed): return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@many
@given(sizes, seeds)
def test_projections_sum_to_the_whole(sizes, seed):
    "Each is its own square, any two are orthogonal, and what they keep of a row adds up, in length too."
    p, h = cut(sizes, seed), rows(5, sum(sizes), seed)
    P = torch.stack([o@o.T for o in p.bases.values()])
    assert torch.allclose(P.sum(0), torch.eye(len(p.basis)), atol=1e-5)
    products = torch.einsum("aij,bjk->abik", P, P)
    assert torch.allclose(products, torch.eye(len(P))[..., None, None]*P[:, None], atol=1e-5)
    z = p.split(h)
    assert torch.allclose(sum(z[k]@p.bases[k].T for k in p.names), h, atol=1e-4)
    assert torch.allclose(sum(o.square().sum(1) for o in z.values()), h.square().sum(1), rtol=1e-4)


@many
@given(sizes, seeds, seeds)
def test_a_basis_within_a_subspace_is_no_matter(sizes, seed, turn):
    "Comparison and shares see subspaces alone; turning all of both together changes nothing either."
    p = cut(sizes, seed)
    inside = Partition({k: o@rotation(o.shape[1], turn).float() for k, o in p.bases.items()}, SITE)
    found = compare(p, inside)
    assert abs(found.mean - 1) < 1e-4 and max(o["angle"] for o in found.pairs) < .1
    other, Q = cut(sizes[::-1], turn), rotation(sum(sizes), seed + 1).float()
    one = best_shares(p.bases, other.bases)
    two = best_shares({k: Q@o for k, o in inside.bases.items()}, {k: Q@o for k, o in other.bases.items()})
    assert all(abs(one[k][1] - two[k][1]) < 1e-4 for k in one)


@many
@given(st.integers(2, 20), seeds, st.floats(1e-3, 1))
def test_what_is_not_orthonormal_is_refused(d, seed, by):
    B = rotation(d, seed).float()
    B[:, 0] *= 1 + by
    try: Partition({"a": B[:, :1], "b": B[:, 1:]}, SITE)
    except ValueError as e: assert "orthonormal only to" in str(e)
    else: raise AssertionError("let pass")


@cache
def planted(): return plant("induction")


@few
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5), seed=seeds)
def test_patching_with_itself_is_the_identity(sizes, seed):
    "Whatever the subspace: the source is the prompt itself, and no logit moves."
    known, d = planted(), planted().model.cfg.d_model
    pairs = next(iter(known_tests("planted-induction", known.task, 12, torch.Generator().manual_seed(seed)).values()))
    itself = Pairs(**dict(zip(Pairs._fields, pairs)) | dict(source=pairs.base, source_at=pairs.at))
    basis = rotation(d, seed).float()[:, :min(sum(sizes), d)]
    patch = Patch("blocks.0.hook_resid_post", basis)
    none, same = interchange(known.model, itself, {"some": patch}, 24).logits
    other = interchange(known.model, pairs, {"some": patch}, 24).logits[1]
    assert torch.allclose(same, none, atol=1e-4)
    if len(basis.T) == d: assert not torch.allclose(other, none, atol=1e-1) # a patch does something


def tiny(seed, gauge=None):
    "A model of one layer with random weights; with a gauge, its heads' inner coordinates are others."
    model = new_model(12, n_layers=1, n_heads=2, d_model=8, n_ctx=16, seed=seed, attn_only=True, initializer_range=.4)
    if gauge is None: return model
    w = parameters(model)
    for h in range(2):
        at, g = slice(4*h, 4*h + 4), torch.Generator().manual_seed(gauge + h)
        M = rotation(4, gauge + h)@(torch.eye(4, dtype=torch.float64) + .3*torch.randn(4, 4, dtype=torch.float64,
                                                                                       generator=g).triu(1))
        for o, by in dict(q=M, v=M, k=torch.linalg.inv(M).T).items():
            for part in ("weight", "bias"):
                x = w[f"layers.0.attn.{o}.{part}"].data
                x[at] = (by@x[at].double()).float()
        O = w["layers.0.attn.o.weight"].data
        O[:, at] = (O[:, at].double()@torch.linalg.inv(M)).float()
    return model


@few
@given(st.integers(0, 99), st.integers(0, 10**6))
def test_scores_do_not_know_a_head_from_within(seed, gauge):
    "Queries and keys, values and outputs may be turned against one another: logits and scores of edges are the same."
    models, task = [tiny(seed), tiny(seed, gauge)], UniqueCopy(8)
    task.lengths = (2, 5)
    batch = task.sample(4, (2, 5), torch.Generator().manual_seed(seed), 16)
    a, b = (o(batch.tokens, position_ids=batch.positions) for o in models)
    assert torch.allclose(a, b, atol=1e-3)
    cuts = {SITE: cut([3, 5], seed), "blocks.0.hook_resid_post": cut([2, 6], seed + 1, "blocks.0.hook_resid_post")}
    one, two = (score_edges(PartitionedModel(Moments(o, task, n=20, seed=0), cuts), draws=4) for o in models)
    assert [(o["component"], o["type"], o["a"], o["b"]) for o in one] == [(o["component"], o["type"], o["a"], o["b"])
                                                                          for o in two]
    for x, y in zip(one, two): assert abs(x["score"] - y["score"]) <= 1e-3*max(1e-3, abs(x["score"])), (x, y)


values = st.recursive(st.none() | st.booleans() | st.integers(-2**53, 2**53) | st.floats(allow_nan=False) | st.text(),
                      lambda o: st.lists(o, max_size=4) | st.dictionaries(st.text(), o, max_size=4), max_leaves=12)


@many
@given(st.dictionaries(st.text().filter(lambda o: o != "written"), values, max_size=5))
def test_json_comes_back_as_it_was(tmp_path, value):
    write_json(tmp_path/"o.json", value, "metrics")
    assert read_json(tmp_path/"o.json", "metrics") == value
    assert json.loads((tmp_path/"o.json").read_text()).items() >= value.items()
