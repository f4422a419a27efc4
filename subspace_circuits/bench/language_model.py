"The main job on a language model, held to its bars."
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from subspace_circuits.activations import read_sites
from subspace_circuits.bench import figure, side_by_side
from subspace_circuits.language_run import LENGTH, run_language, shipped_text, window_layers, window_sites
from subspace_circuits.models import open_model
from subspace_circuits.text import TextTask
from subspace_circuits.window_circuits import NextTokens


def capture_share(model, tokenizer, text: str, layers: str | None, rounds: int = 3) -> float:
    "Tokens a second of reading the sites of a window over those of the bare blocks up to its end, side by side."
    task = NextTokens(TextTask(text, tokenizer, model.cfg.n_ctx), min(LENGTH, model.cfg.n_ctx))
    some = window_layers(model, layers)
    sites, batch = window_sites(model, some), task.sample(8, generator=torch.Generator().manual_seed(0))
    took = side_by_side({k: partial(read_sites, model, batch, v) for k, v in (("bare", sites[-1:]), ("all", sites))},
                        rounds)
    return took["bare"]/took["all"]


def benchmark_language_model(model: str, text: str | None, layers: str | None, out: Path) -> Iterator[dict]:
    "Capture, minutes, memory, edges beside other bases, grades beside other cuts; one figure at a time."
    source = text or str(shipped_text())
    net, tokenizer = open_model(model)
    share = capture_share(net, tokenizer, source, layers)
    yield figure("capture of the window over the bare pass to its end", share, "", ">= .85", share >= .85)
    done = run_language(model, out, text, layers)
    circuit, graded = done["circuit"], done["grade"]["graded"]
    minutes = sum(v for v in done["seconds"].values() if not isinstance(v, str))/60
    yield figure("run on the window", minutes, "minutes", "< 45", minutes < 45)
    yield figure("memory", done["peak_rss_mb"]/1000, "GB", "< 8", done["peak_rss_mb"] < 8000)
    for k, o in circuit["needed"].items():
        yield figure(f"share of edges that brings back {circuit['goal']:.0%}, {k}", o["share"], "")
    n = {k: o["n"] if o["recovered"] >= circuit["goal"] else float("inf") for k, o in circuit["needed"].items()}
    ratio = n["found"]/min(n["pca"], n["random"])
    yield figure("edges of the found blocks over the best other basis", ratio, "", "<= .5", ratio <= .5)
    for what in ("objective", "dependence", "information", "determined"):
        for k, o in graded.items(): yield figure(f"{what} at {done['grade']['site']}, {k}", o[what], "")
    for k, v in done["grade"]["stability"].items(): yield figure(f"overlap of two halves, {k}", v, "")
