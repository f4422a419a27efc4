"""A sparse autoencoder of every site as a folder: settings, checkpoints, losses, weights, metrics and a page. The same
command goes on where it stopped, to the same bytes."""
import json
from html import escape
from pathlib import Path

import torch

from subspace_circuits.activations import ActivationStore, check_model
from subspace_circuits.decompositions.temporal_evaluation import evaluate_sae, loss_recovered
from subspace_circuits.decompositions.temporal_files import save_sae
from subspace_circuits.decompositions.temporal_losses import TokenSequences, token_sequences, stored_rows
from subspace_circuits.decompositions.saes import SAE, planted_sequences, start_sae, with_threshold
from subspace_circuits.decompositions.temporal_training import (
    OPTIONS, SAETrainer, check_options, finish_sae, preset_settings)
from subspace_circuits.files import (
    claim_folder, mark, read_json, read_tensors, replacing, write_json, write_tensors, write_text)
from subspace_circuits.models import open_model

__all__ = ["TEMPORAL_LAYOUT", "decompose_temporal", "read_temporal", "temporal_lines"]

SITE = {"checkpoint.safetensors": "sae checkpoint", "metrics.jsonl": "losses", "sae.json": "sparse autoencoder",
        "sae.safetensors": "sparse autoencoder"}
TEMPORAL_LAYOUT = {"config.json": "sparse autoencoders", "metrics.json": "sparse autoencoder metrics",
                   "report.html": "sparse autoencoder report", "writer.pid": "lock", "site-*": SITE}
SAVES = 10 # Checkpoints of a run
HELD_OUT = .1 # Share of a store's documents, the last ones, that are kept for measuring
DATA = dict(store=None, planted=None, sites=None, model=None, open={}, skip=0)


def read_temporal(config: str | Path, seed: int | None = None) -> dict:
    "Settings from a preset or a file, complete and checked."
    given = preset_settings(config)
    known = [*DATA, *OPTIONS]
    if unknown := sorted(map(str, given.keys() - set(known))):
        raise ValueError(f"{config} has {unknown[0]!r}, which temporal-sae does not take: use {', '.join(known)}")
    data = DATA | {k: given[k] for k in DATA if k in given}
    if (data["store"] is None) == (data["planted"] is None):
        raise ValueError(f"{config} needs store, a folder of capture, or planted, settings of planted sequences, and "
                         f"not both")
    if data["store"] and (not isinstance(data["sites"], list) or not data["sites"]):
        raise ValueError(f"{config} names no sites: give a list of hook names that the store holds")
    if data["sites"] and len(set(data["sites"])) < len(data["sites"]):
        raise ValueError(f"{config} names a site twice: give each once")
    if isinstance(data["skip"], bool) or not isinstance(data["skip"], int) or data["skip"] < 0:
        raise ValueError(f"{config} has skip {data['skip']!r}: use a whole number from 0")
    if data["planted"] is not None and not isinstance(data["planted"], dict):
        raise ValueError(f"{config} has planted {data['planted']!r}: use settings of planted_sequences, or {{}}")
    own = {k: given[k] for k in OPTIONS if k in given} | ({} if seed is None else dict(seed=seed))
    return data | check_options(own)


def _planted(settings, seed):
    "Planted documents of a seed; the directions are always those of the settings."
    given = settings["planted"]
    try: found = planted_sequences(**(dict(directions=settings["seed"]) | given | dict(seed=seed)))
    except TypeError as e:
        raise ValueError(f"planted settings do not fit ({e}): use those of planted_sequences") from None
    return found, token_sequences(found.h, found.document, "planted")


def _split(sequences: TokenSequences) -> tuple[TokenSequences, TokenSequences]:
    "TokenSequences to train on, and the last documents to measure on."
    starts = sequences.first.unique()
    at = int(starts[min(len(starts) - 1, round(len(starts)*(1 - HELD_OUT)))]) if len(starts) > 1 else 0
    if not at: raise ValueError(f"{sequences.site} has one document: two are needed, one to measure on; capture more")
    def part(a, b):
        return sequences._replace(document=sequences.document[a:b], first=sequences.first[a:b] - a,
                                  rows=lambda i: sequences.rows(i + a))
    return part(0, at), part(at, len(sequences.document))


def _data(settings):
    "Of every site: what to train on, what to measure on, and the key if there is one."
    if settings["planted"] is not None:
        found, train = _planted(settings, settings["seed"])
        return {"planted": (train, _planted(settings, settings["seed"] + 100_000)[1], found)}
    store = ActivationStore(settings["store"])
    return {s: (*_split(stored_rows(store, s, settings["skip"])), None) for s in settings["sites"]}


def decompose_temporal(config: str | Path, out: Path, seed: int | None = None, overwrite: bool = False,
                       resume: bool = False, until: int | None = None) -> dict:
    "Train an autoencoder of every site into a folder, or finish those that are there; their metrics."
    out, settings = Path(out), read_temporal(config, seed)
    with claim_folder(out, TEMPORAL_LAYOUT, settings, "job", overwrite, resume) as held:
        if held and (out/"metrics.json").exists(): return read_json(out/"metrics.json", TEMPORAL_LAYOUT["metrics.json"])
        return _decompose(out, settings, until)


def _decompose(out: Path, settings: dict, until: int | None) -> dict:
    "Train in a claimed folder, to the end or until a checkpoint."
    data = _data(settings)
    trainers = {s: SAETrainer({k: settings[k] for k in OPTIONS}, train) for s, (train, *_) in data.items()}
    model, *text = _model(settings)
    if not (out/"config.json").exists(): write_json(out/"config.json", settings, TEMPORAL_LAYOUT["config.json"])
    metrics, curves = {}, {}
    for i, (site, (_, test, key)) in enumerate(data.items()):
        trainer, folder = trainers.pop(site), out/f"site-{i}"
        curves[site] = _train(trainer, folder, until)
        if trainer.step < settings["steps"]: return dict(step=trainer.step)
        sae = finish_sae(trainer)
        if not (folder/"sae.json").exists(): save_sae(sae, folder)
        metrics[site] = _measure(sae, test, key, settings) | (
            dict(loss=loss_recovered(model, sae, text[0], settings["skip"], text[1])) if model is not None else {})
    metrics = _rounded(dict(sites=metrics))
    write_text(out/"report.html", _page(settings, metrics, curves), TEMPORAL_LAYOUT["report.html"])
    write_json(out/"metrics.json", metrics, TEMPORAL_LAYOUT["metrics.json"])
    return metrics


def _model(settings):
    "The model and the last of the store's own sequences, which are held out, if the loss is asked for."
    if not settings["model"]: return None, None, None
    if not settings["store"]: raise ValueError("planted sequences have no model: leave model out")
    model, _ = open_model(settings["model"], **settings["open"])
    store = ActivationStore(settings["store"])
    check_model(store, model)
    last = store.info["shards"][-1]
    if not store.has("sequence tokens"): raise ValueError(f"{store.folder} keeps no sequences: capture again")
    n = len(store.of_shard(last, "sequence tokens"))*len(store.info["shards"])
    some = min(16, max(1, int(HELD_OUT*n)))
    tokens, real = (store.of_shard(last, f"sequence {k}")[-some:] for k in ("tokens", "real"))
    return model, tokens.long(), real.bool()


def _train(trainer: SAETrainer, folder: Path, until: int | None) -> list[dict]:
    "Train, with checkpoints along the way; the lines of losses follow the checkpoint."
    o, lines, file = trainer.o, [], folder/"checkpoint.safetensors"
    if file.exists():
        tensors, about = read_tensors(file, SITE["checkpoint.safetensors"])
        trainer.restore(tensors, about["step"])
        lines = about["losses"]
    every, saves = max(1, o["steps"]//200), max(1, o["steps"]//SAVES)
    def log(step, losses): lines.append(dict(step=step) | {k: float(f"{v:.6g}") for k, v in losses.items()})
    for step in trainer.run(until, log, every):
        if step % saves and step < min(o["steps"], until or o["steps"]): continue
        write_tensors(file, trainer.tensors(), SITE["checkpoint.safetensors"], dict(step=step, losses=lines))
        with replacing(folder/"metrics.jsonl", SITE["metrics.jsonl"]) as part:
            head = json.dumps(dict(written=mark(SITE["metrics.jsonl"])))
            part.write_text("\n".join([head, *map(json.dumps, lines)]) + "\n", encoding="utf-8")
    return lines


# ## What is said of a trained one

def _measure(sae: SAE, test: TokenSequences, key, settings) -> dict:
    "Measures of the autoencoder, and what an untrained one of the same shape scores."
    g = torch.Generator().manual_seed(settings["seed"])
    nothing = start_sae(sae.site, test.width, len(sae.b_enc), g, sae.k, sae.groups, block=sae.block, model=sae.model)
    some = test.rows(torch.arange(min(4000, len(test.document))))
    nothing = with_threshold(nothing._replace(b_dec=some.mean(0)), some)
    out = evaluate_sae(sae, test) | dict(untrained=evaluate_sae(nothing, test))
    if key is not None: out["planted"] = planted_scores(sae, key) | dict(untrained=planted_scores(nothing, key))
    return out


def planted_scores(sae: SAE, key) -> dict[str, float]:
    "The share of planted slow and fast latents that a decoder row of each group matches with a cosine of .95."
    out, at, W = {}, sae.starts, torch.nn.functional.normalize(sae.W_dec, dim=1)
    for name in ("slow", "fast"):
        for i in range(len(sae.groups)):
            near = (getattr(key, name)@W[at[i]:at[i + 1]].T).amax(1)
            out[f"{name} in group {i}"] = (near >= .95).float().mean().item()
    return out


def _rounded(o):
    if isinstance(o, dict): return {str(k): _rounded(v) for k, v in o.items()}
    return round(o, 5) if isinstance(o, float) else o


def temporal_lines(metrics: dict) -> list[str]:
    "What was found, in lines."
    if "step" in metrics: return [f"stopped at step {metrics['step']}: the same command goes on"]
    lines = []
    for site, o in metrics["sites"].items():
        rough = ", ".join(f"{k} {v['tv_share']:.3f} (shuffled {o['shuffled'][k]['tv_share']:.3f})"
                          for k, v in o["smoothness"].items() if "tv_share" in v)
        lines.append(f"{site}: explains {o['fve']:.3f} (untrained {o['untrained']['fve']:.3f}), {o['l0']:.1f} active, "
                     f"alive {o['alive']:.2f}")
        lines.append(f"{site}: variation from token to token, in shares of activity: {rough}")
        if "planted" in o:
            lines.append(f"{site}: " + ", ".join(f"{k} {v:.2f}" for k, v in o["planted"].items() if k != "untrained"))
        if "loss" in o: lines.append(f"{site}: loss recovered {o['loss']['recovered']:.3f}")
    return lines


# ## The page

def _table(o, name=""):
    "A value as table rows: its path and what it is."
    if isinstance(o, dict):
        for k, v in o.items(): yield from _table(v, f"{name}, {k}" if name else str(k))
    else: yield name, json.dumps(o)


STYLE = """body{font:15px sans-serif;max-width:960px;margin:2em auto;padding:0 1em}table{border-collapse:collapse}
td{border-bottom:1px solid #ddd;padding:.2em 1em .2em 0;vertical-align:top;word-break:break-word}"""


def _figures(metrics, curves):
    "Losses of every site, and how rough codes are beside the same codes in random order."
    import plotly.graph_objects as go
    small = dict(template="plotly_white", width=860, height=330, margin=dict(l=60, r=10, t=40, b=50))
    for site, lines in curves.items():
        names = [k for k in lines[-1] if k not in ("step", "missing")] if lines else []
        fig = go.Figure([go.Scatter(name=k, x=[o["step"] for o in lines], y=[o[k] for o in lines]) for k in names])
        yield fig.update_layout(title=f"{site}: losses", yaxis_type="log", xaxis_title="step", **small)
        o = metrics["sites"][site]
        parts = [k for k, v in o["smoothness"].items() if "tv_share" in v]
        fig = go.Figure([go.Bar(name=name, x=parts, y=[o[key][k]["tv_share"] for k in parts])
                         for name, key in (("as they stand", "smoothness"), ("tokens shuffled", "shuffled"))])
        yield fig.update_layout(title=f"{site}: variation from token to token, in shares of activity", **small)


def _page(settings, metrics, curves):
    "One page that needs no network."
    from plotly.offline import get_plotlyjs
    drawn = "".join(o.to_html(full_html=False, include_plotlyjs=False, div_id=f"figure{i}")
                    for i, o in enumerate(_figures(metrics, curves)))
    said = "".join(f"<p>{escape(o)}</p>" for o in temporal_lines(metrics))
    rows = ["".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in _table(o))
            for o in (metrics["sites"], settings)]
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Sparse autoencoders</title>'
            f"<style>{STYLE}</style><script>{get_plotlyjs()}</script><h1>Sparse autoencoders</h1>{said}{drawn}"
            f"<h2>Measures</h2><table>{rows[0]}</table><h2>Settings</h2><table>{rows[1]}</table></html>")
