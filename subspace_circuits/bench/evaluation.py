"Patching timed beside a loop and at the size of GPT-2 small; planted carriers, and learned ones beside a bound."
import time
from tempfile import TemporaryDirectory

import torch

from subspace_circuits.activations import batch_rows, read_sites
from subspace_circuits.bench import figure, side_by_side
from subspace_circuits.circuit_families import plant
from subspace_circuits.evaluation import Patch, carries, copy_tests, interchange, patches_of, prompt_by_prompt
from subspace_circuits.models import open_model
from subspace_circuits.partition import Partition, name_subspaces
from subspace_circuits.search import find_partition
from subspace_circuits.suites import ioi_pairs, known_tests, save_small_gpt2
from subspace_circuits.toy_models import load_model, n_threads


def benchmark_gpt2(
    prompts:int=16, # Measured; the bar is for 1000
)->list[dict]: # What was measured, with its bar
    "Time 12 subspaces of GPT-2-small-shaped random weights at the lowest layer of the suite, and prompt by prompt."
    with TemporaryDirectory() as folder:
        model, tokenizer = _gpt2_shaped(folder)
        pairs = ioi_pairs(tokenizer, "test1", prompts, torch.Generator().manual_seed(0))
        basis = torch.linalg.qr(torch.randn(768, 768, generator=torch.Generator().manual_seed(0)))[0]
        patches = {f"s{i}": Patch("blocks.4.hook_resid_post", o) for i, o in enumerate(basis.split(64, 1))}
        interchange(model, pairs.take(slice(0, 2)), patches)
        start = time.perf_counter()
        fast = interchange(model, pairs, patches)
        spent, few = time.perf_counter() - start, pairs.take(slice(0, 3))
        start = time.perf_counter()
        slow = prompt_by_prompt(model, few, patches).gather(2, fast.answers[:3].expand(12, -1, -1))
        loop, minutes = (time.perf_counter() - start)/3, spent/prompts*1000/60
        gap = ((slow - fast.logits[1:, :3]).abs().max()/slow.abs().max()).item()
    return [figure("threads of torch", torch.get_num_threads(), ""),
            figure(f"GPT-2-small shape, 1000 prompts x 12 subspaces, from {prompts}", minutes, "minutes", "below 15",
                   minutes < 15),
            figure("GPT-2-small shape, batched over prompt by prompt", loop*prompts/spent, "x"),
            figure("GPT-2-small shape, largest difference", gap, "of the largest logit", "below 1e-5", gap < 1e-5)]


def _gpt2_shaped(folder):
    "Random weights in the shape of GPT-2 small, and a tokenizer that can write the suites' prompts."
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    raw = GPT2LMHeadModel(GPT2Config(attn_implementation="eager")).eval().requires_grad_(False)
    model = build_bridge_from_module(raw, "GPT2LMHeadModel", hf_config=raw.config, tokenizer=None)
    return model, open_model(save_small_gpt2(folder, n_layers=1))[1]


def benchmark_trained(
    seeds:int=3, # Of planted circuits
)->list[dict]: # What was measured, with its bar
    """Time patching beside a loop, test planted carriers, and set learned partitions of the bundled models beside the
    supervised bound; one thread, with which small models are fastest."""
    with n_threads(1):
        return (_loop_figures() + [o for seed in range(seeds) for o in _planted_figures(seed)]
                + [o for name, rows in (("induction", _induction_rows), ("ioi", _ioi_rows))
                   for o in _trained_figures(name, *rows())])


def _loop_figures():
    "Every subspace of a planted circuit and the whole of its site, on 150 prompts at once and prompt by prompt."
    known, site, g = plant("induction", certified=False), "blocks.0.hook_resid_post", torch.Generator().manual_seed(0)
    pairs = copy_tests(known.task.sample(400, generator=g), g)["token"].take(slice(0, 150))
    patches = patches_of(Partition(known.bases[site], site))
    runs = {f: lambda f=f: f(known.model, pairs, patches) for f in (prompt_by_prompt, interchange)}
    spent = side_by_side(runs, 1)
    ratio = spent[prompt_by_prompt]/spent[interchange]
    return [figure("planted circuit, batched over prompt by prompt", ratio, "x", "at least 10", ratio >= 10)]


def _planted_figures(seed):
    "Both variables of one planted circuit, decoys on."
    figures, known, site = [], plant("induction", seed=seed, certified=False), "blocks.0.hook_resid_post"
    tests = copy_tests(known.task.sample(400, generator=torch.Generator().manual_seed(seed)),
                       torch.Generator().manual_seed(seed))
    for v in tests:
        f = carries(known.model, Partition(known.bases[site], site), v, tests, v, seed=seed).figures
        figures += [figure(f"planted {seed}, {v}, {k}", f[k], "", "at least .99", f[k] >= .99)
                    for k in ("cause", "isolate")]
        figures += [figure(f"planted {seed}, {v}, random, same {k}", f["random"][k], "", "at most .1",
                           f["random"][k] <= .1) for k in ("dimension", "variance")]
    return figures


def _trained_figures(name, task, h, site, labels, variables):
    "A learned partition of a bundled model beside the supervised bound, on held-out combinations."
    figures, model = [], load_model(name)[0]
    partition = name_subspaces(find_partition(h, site, 0), h, labels) if labels else find_partition(h, site, 0)
    task.lengths = (6, 14)
    tests = known_tests(name, task, 400, torch.Generator().manual_seed(1))
    for s, v in variables.items():
        if s not in partition.names:
            figures.append(figure(f"{name}, no subspace found for {v}", 0, "", "found", False))
            continue
        r = carries(model, partition, s, tests, v, supervised=True)
        cause, bound = r.figures["cause, held out"], r.figures["supervised"]
        beside = f"(supervised {bound:.3f}, whole {r.figures['whole']:.3f})"
        figures.append(figure(f"{name}, {s} ({partition.sizes[s]} dimensions) for {v}: {r.verdict}; cause", cause,
                              beside, "supervised - .05", cause >= bound - .05))
    return figures


def _induction_rows():
    "Task, activations, site, labels to name subspaces by, and which test each of them is for."
    (model, task, _), site = load_model("induction"), "blocks.0.hook_resid_mid"
    batch = task.sample(700, generator=torch.Generator().manual_seed(0), n_ctx=model.cfg.n_ctx)
    rows = batch_rows(model, batch, [site])
    labels = {k: rows[k] for k in ("token", "previous token", "position")}
    return task, rows[site], site, labels, {"token": "token", "previous token": "previous"}


def _ioi_rows():
    "The same at the word that says who acts; its one subspace keeps its number."
    (model, task, _), site = load_model("ioi"), "blocks.0.hook_resid_post"
    batch = task.sample(3000, generator=torch.Generator().manual_seed(1))
    return task, read_sites(model, batch, [site])[site][:, 8], site, {}, {"s0": "subject"}
