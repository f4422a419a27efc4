"""A sparse autoencoder of every site as a folder: settings, checkpoints, losses, weights, metrics and a page. The same
command goes on where it stopped, to the same bytes."""
import json
from html import escape
from pathlib import Path

import torch

from subspace_circuits.activations import ActivationStore, check_model
from subspace_circuits.decompositions.run_page import figure_part, run_page, table_part, value_rows
from subspace_circuits.decompositions.temporal_evaluation import evaluate_sae, loss_recovered
from subspace_circuits.decompositions.temporal_files import save_sae
from subspace_circuits.decompositions.temporal_losses import TokenSequences, token_sequences, stored_rows
from subspace_circuits.decompositions.saes import SAE, planted_sequences, start_sae, with_threshold
from subspace_circuits.decompositions.temporal_training import (
    OPTIONS, SAETrainer, check_options, finish_sae, preset_settings)
from subspace_circuits.files import (
    claim_folder, mark, read_json, read_tensors, replacing, rounded, write_json, write_tensors, write_text)
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
            dict(loss=loss_recovered(model, sae, text[0], settings["skip"], *text[1:])) if model is not None else {})
    metrics = rounded(dict(sites=metrics), 5)
    write_text(out/"report.html", _page(settings, metrics, curves), TEMPORAL_LAYOUT["report.html"])
    write_json(out/"metrics.json", metrics, TEMPORAL_LAYOUT["metrics.json"])
    return metrics


def _model(settings):
    "The model and the last of the store's own sequences, which are held out, if the loss is asked for."
    if not settings["model"]: return [None]
    if not settings["store"]: raise ValueError("planted sequences have no model: leave model out")
    model, _ = open_model(settings["model"], **settings["open"])
    store = ActivationStore(settings["store"])
    check_model(store, model)
    last = store.info["shards"][-1]
    if not store.has("sequence tokens"): raise ValueError(f"{store.folder} keeps no sequences: capture again")
    n = len(store.of_shard(last, "sequence tokens"))*len(store.info["shards"])
    some = min(16, max(1, int(HELD_OUT*n)))
    tokens, real = (store.of_shard(last, f"sequence {k}") for k in ("tokens", "real"))
    real, scored = real.bool(), None
    if store.has("scored") and (asked := store.of_shard(last, "scored").bool()).any():
        scored = torch.zeros_like(real).masked_scatter(real, asked)[-some:]
    return model, tokens[-some:].long(), real[-some:], scored


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
        if "loss" in o: lines.append(f"{site}: {_recovered(o['loss'])}")
    return lines


def _recovered(loss):
    if loss["recovered"] is not None: return f"loss recovered {loss['recovered']:.3f}"
    return f"no loss to recover: {loss['original']:.2f} nats a token as it is, {loss['zero']:.2f} with a zero there"


# ## The page

MEANING = dict(
    fve="share of the variance of activations that is rebuilt", cosine="of an activation and what is rebuilt",
    l2_ratio="length of what is rebuilt, of the activation's", l0="latents active at a token, mean",
    alive="share of latents that are ever active",
    tv_share="changes from token to token over activity: 0 if codes stay, 2 if none lasts for two tokens",
    lipschitz_free="largest change, in means of the latent, over the step of the activation, in mean steps",
    spectral="power in the upper half of the frequencies over that in the lower half",
    haar="energy of the details of three Haar levels over what is left",
    multiscale="variance of steps of one token over that of steps of eight",
    recovered="1 if the model loses nothing by it, 0 if as much as by a zero at the site")
SMOOTH = "tv_share", "lipschitz_free", "spectral", "haar", "multiscale"
INTRO = """An autoencoder of each site, measured on documents that it was not trained on, beside an untrained one of the
same shape. Group 0 is the high split, which a temporal loss makes alike for two tokens of a document. Smoothness is
told twice: of codes as they stand, and of the same codes with the tokens of each document in random order, which is
what they are if time says nothing. metrics.json has all measures, among them those that cannot be compared between
dictionaries."""


def _told(x): return "-" if x is None else f"{x:.4g}"


def _tables(o):
    "Tables of a site: reconstruction, smoothness by group, the planted latents and a model's loss if there are any."
    own = o["untrained"]
    parts = [(k, o[k], own[k]) for k in ("fve", "cosine", "l2_ratio", "l0", "alive")]
    parts += [(f"fve, {k} alone", v, own["fve_alone"][k]) for k, v in o["fve_alone"].items()]
    yield table_part([(k, _told(x), _told(y)) for k, x, y in parts], ("", "trained", "untrained"))
    three = o["smoothness"], o["shuffled"], own["smoothness"]
    rows = [(f"{m}, {g}", *(_told(part[g].get(m)) for part in three)) for m in SMOOTH for g in o["smoothness"]]
    yield table_part(rows, ("less is smoother", "as they stand", "shuffled", "untrained"))
    if "planted" in o:
        rows = [(k, _told(v), _told(o["planted"]["untrained"][k])) for k, v in o["planted"].items() if k != "untrained"]
        yield table_part(rows, ("planted latents matched, cosine .95", "trained", "untrained"))
    if "loss" in o:
        yield table_part([(k, _told(v)) for k, v in o["loss"].items()], ("the model's loss, nats a token", ""))


def _figures(o, lines):
    "Losses of a site, and how rough codes are beside the same codes in random order."
    import plotly.graph_objects as go
    small = dict(template="plotly_white", height=340, margin=dict(l=50, r=10, t=20, b=90),
                 legend=dict(orientation="h", y=-.25, yanchor="top"))
    names = [k for k in lines[-1] if k not in ("step", "missing")] if lines else []
    fig = go.Figure([go.Scatter(name=k, x=[o["step"] for o in lines], y=[o[k] for o in lines]) for k in names])
    yield fig.update_layout(xaxis_title="step", yaxis_title="loss", **small).update_yaxes(type="log", dtick=1)
    parts = [k for k, v in o["smoothness"].items() if "tv_share" in v]
    fig = go.Figure([go.Bar(name=name, x=parts, y=[o[key][k]["tv_share"] for k in parts])
                     for name, key in (("as they stand", "smoothness"), ("tokens shuffled", "shuffled"))])
    yield fig.update_layout(yaxis_title="changes over activity", **small)


def _page(settings, metrics, curves):
    "What was found, site by site, and the settings."
    body = f"<p>{INTRO}</p>" + "".join(f"<p>{escape(o)}</p>" for o in temporal_lines(metrics))
    for i, (site, lines) in enumerate(curves.items()):
        o = metrics["sites"][site]
        drawn = [figure_part(fig, f"figure{i}-{j}") for j, fig in enumerate(_figures(o, lines))]
        body += f"<h2>{escape(site)}</h2>{''.join([*drawn, *_tables(o)])}"
    return run_page("Sparse autoencoders", f"{body}<h2>What the measures are</h2>{table_part(MEANING.items())}"
                    f"<h2>Settings</h2>{table_part(value_rows(settings))}")
