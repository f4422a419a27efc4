"""A decomposition as a folder: settings, targets, a checkpoint with all that the next step depends on, losses as JSON
lines, and at the end metrics and a page. The same command goes on where it stopped, to the same bytes."""
import json
from pathlib import Path

import torch

from subspace_circuits.decompositions.parameter_metrics import (
    alive, feature_scores, fresh_adversary, kinds_of, network_figure, one_hot, per_feature, use_of)
from subspace_circuits.decompositions.parameter_training import Trainer, make_target, read_settings
from subspace_circuits.decompositions.run_page import figure_part, run_page, table_part
from subspace_circuits.files import (
    claim_folder, mark, read_json, read_tensors, replacing, write_json, write_tensors, write_text)

__all__ = ["LAYOUT", "decompose_parameters", "open_trainer"]

LAYOUT = {"config.json": "decomposition", "target.safetensors": "target", "checkpoint.safetensors": "checkpoint",
          "metrics.jsonl": "losses", "metrics.json": "decomposition metrics", "report.html": "decomposition report",
          "writer.pid": "lock"}
EVERY, SAVE = 100, 1000 # Steps between two lines of losses, and between two checkpoints


def decompose_parameters(method: str, config: str | Path, out: Path, seed: int | None = None, overwrite: bool = False,
                         resume: bool = False, wandb: str | None = None, until: int | None = None) -> dict:
    """Train a decomposition into a folder, or finish the one that is there; its metrics. `until` stops early, at a
    checkpoint; `wandb` names a project of Weights & Biases to send losses to."""
    out = Path(out)
    settings = read_settings(config, method, **({} if seed is None else dict(seed=seed)))
    with claim_folder(out, LAYOUT, settings, "decomposition", overwrite, resume) as held:
        if held and (out/"metrics.json").exists(): return read_json(out/"metrics.json", LAYOUT["metrics.json"])
        return _decompose(out, settings, until, wandb)


def _decompose(out: Path, settings: dict, until: int | None, wandb: str | None) -> dict:
    "Train in a claimed folder, to the end or until a checkpoint."
    if not (out/"config.json").exists(): write_json(out/"config.json", settings, LAYOUT["config.json"])
    send = None if wandb is None else _wandb(wandb, settings)
    trainer, lines = open_trainer(out, settings)
    _train(trainer, lines, out, until, send)
    if trainer.step < settings["steps"]: return dict(step=trainer.step)
    metrics = _metrics(trainer.settle())
    write_text(out/"report.html", _page(trainer, metrics, lines), LAYOUT["report.html"])
    write_json(out/"metrics.json", metrics, LAYOUT["metrics.json"])
    return metrics


def _wandb(project: str, settings: dict):
    "What sends losses to Weights & Biases, if that is installed."
    try: import wandb
    except ImportError:
        raise ValueError("Weights & Biases is not installed: pip install wandb, or leave out --wandb") from None
    run = wandb.init(project=project, config=settings)
    return lambda step, o: run.log({f"{k}/{i}": x for k, v in o.items() for i, x in enumerate(v)}, step=step)


def open_trainer(folder: Path, settings: dict | None = None) -> tuple[Trainer, list[dict]]:
    "The decomposition of a folder as far as it has come, and its losses."
    folder = Path(folder)
    settings = settings or read_json(folder/"config.json", LAYOUT["config.json"])
    target, data = make_target(settings, folder/"target.safetensors")
    trainer, lines = Trainer(settings, target, data), []
    if (folder/"checkpoint.safetensors").exists():
        tensors, about = read_tensors(folder/"checkpoint.safetensors", LAYOUT["checkpoint.safetensors"])
        trainer.restore(tensors, about["step"])
        lines = about["losses"]
    return trainer, lines


def _train(trainer: Trainer, lines: list, out: Path, until: int | None, send):
    "Train, with a checkpoint every `SAVE` steps; the lines of losses follow the checkpoint."
    def log(step, losses):
        lines.append(dict(step=step) | {k: [float(f"{x:.6g}") for x in v.tolist()] for k, v in losses.items()})
        if send: send(step, losses)
    saved = trainer.step
    for step in trainer.run(until=until, log=log, every=EVERY):
        if step - saved < SAVE and step < min(trainer.o["steps"], until or trainer.o["steps"]): continue
        write_tensors(out/"checkpoint.safetensors", trainer.tensors(), LAYOUT["checkpoint.safetensors"],
                      dict(step=step, losses=lines))
        with replacing(out/"metrics.jsonl", LAYOUT["metrics.jsonl"]) as part:
            head = json.dumps(dict(written=mark(LAYOUT["metrics.jsonl"])))
            part.write_text("\n".join([head, *map(json.dumps, lines)]) + "\n", encoding="utf-8")
        saved = step


# ## What is said of a finished decomposition

def _metrics(trainer: Trainer) -> dict:
    "Published measures of every seed, where the kind of target has them."
    o, target, seeds = trainer.o, trainer.target, trainer.o["seeds"]
    out = dict(method=o["method"], seeds=[o["seed"] + i for i in range(seeds)], steps=o["steps"])
    if "W" in target.matrices:
        for name, least in (("", None), (", all components", 0.)):
            scores = feature_scores(trainer.components.matrices("W").detach(), target.matrices["W"],
                                    **({} if least is None else dict(least=least)))
            out |= {"mmcs" + name: scores.mmcs.tolist(), "ml2r" + name: scores.ml2r.tolist(),
                    "distinct" + name: scores.distinct}
    x = trainer.batches.draw(trainer.draws.generators)[0]
    if trainer.batches.sparse:
        used = {k: v.detach() for k, v in use_of(trainer, one_hot(seeds, trainer.data.n_features)).items()}
        out["components per feature"] = {k: per_feature(v).tolist() for k, v in used.items()}
        out["kinds"] = {k: kinds_of(v) for k, v in used.items()}
    out["needed"] = {k: v.sum(1).tolist() for k, v in alive(trainer, x).items()}
    if o["method"] != "apd":
        out["adversary"] = {str(k): v.tolist() for k, v in fresh_adversary(trainer, x[:, :512]).items()}
    return out


def _page(trainer: Trainer, metrics: dict, lines: list) -> str:
    "A self-contained page: losses, measures and, of autoencoders, the components that matter most, as networks."
    import plotly.graph_objects as go
    names = [k for k in lines[-1] if k != "step"] if lines else []
    curves = go.Figure([go.Scatter(name=k, x=[o["step"] for o in lines], y=[sum(o[k])/len(o[k]) for o in lines])
                        for k in names]).update_layout(template="plotly_white", yaxis_type="log", xaxis_title="step",
                                                       yaxis_title="loss, mean over seeds", height=360)
    figures = [("losses", curves)]
    if "W" in trainer.target.matrices:
        P, W = trainer.components.matrices("W").detach()[0], trainer.target.matrices["W"][0]
        most = P.flatten(1).norm(dim=1).argsort(descending=True)[:6].tolist()
        panels = {"target": W, "sum": P.sum(0)} | {f"component {i}": P[i] for i in most}
        figures.append(("components", network_figure(panels)))
    if "adversary" in metrics:
        worst = {k: sum(v)/len(v) for k, v in metrics["adversary"].items()}
        figures.append(("adversary", go.Figure(go.Scatter(x=[int(k) for k in worst], y=list(worst.values())))
                        .update_layout(template="plotly_white", xaxis_title="steps of a fresh adversary",
                                       xaxis_type="log", yaxis_title="worst loss", height=300)))
    html = "".join(figure_part(o, f"figure-{k}") for k, o in figures)
    rows = [(k, json.dumps(v)) for k, v in [*metrics.items(), *trainer.o.items()]]
    return run_page(f"{trainer.o['method'].upper()}: parameters in components", html + table_part(rows))
