"""Circles as a folder: settings, metrics, and a page with the figures; the same seed gives the same bytes."""
from pathlib import Path

import torch

from subspace_circuits.activations import ActivationStore, check_model
from subspace_circuits.decompositions.circle_circuits import (
    enough_circles, key_frequencies, neuron_circles, without_circles)
from subspace_circuits.decompositions.feature_clusters import (
    cluster_pane, cluster_rows, clusters_reducibility, graph_clusters, read_dictionary, row_contexts,
    spectral_clusters)
from subspace_circuits.decompositions.multidimensional import (
    KINDS, draw_sweep, fit_circle, intervene, patch_components, read_circle, sum_prompts,
    sweep_circle, word_accuracy, word_prompts)
from subspace_circuits.decompositions.reducibility import PLANES, rank_clouds, subspace_reducibility
from subspace_circuits.decompositions.run_page import figure_part, run_page, table_part, value_rows
from subspace_circuits.files import claim_folder, read_json, read_yaml, rounded, write_json, write_text
from subspace_circuits.models import open_model
from subspace_circuits.partition import Partition
from subspace_circuits.tasks import Sum
from subspace_circuits.toy_models import load_model, model_configs, new_task

__all__ = ["MULTIDIM_LAYOUT", "decompose_multidim", "multidim_lines", "read_multidim"]

MULTIDIM_LAYOUT = {"config.json": "circles", "metrics.json": "circle metrics", "report.html": "circle report",
                   "writer.pid": "lock"}
# What each job may be given, and what it has to be given
JOBS = dict(
    circle=dict(model=None, task=None, open={}, words=None, site="blocks.0.hook_resid_pre", variable="a", terms=None),
    clusters=dict(dictionary=None, store=None, model=None, method="graph", n=None, k=2, least=.5, rows=20_000, bins=16,
                  panes=4),
    subspaces=dict(store=None, partitions=None, rows=20_000, bins=16, draws=9))
REQUIRED = dict(circle=["model"], clusters=["dictionary", "store"], subspaces=["store", "partitions"])
SHIFTS, TESTED = 6, 1500 # Most distances that a variable is moved, and most prompts, where there are more
DIGITS = 4 # Of the numbers in metrics


def read_multidim(config: str | Path, seed: int | None = None) -> dict:
    "Settings from a YAML or JSON file, every key of the job filled in."
    given = read_yaml(config, "name a YAML or JSON file of settings")
    if not isinstance(found := given.get("job"), str) or found not in JOBS:
        raise ValueError(f"{config} has job {found!r}: use one of {', '.join(JOBS)}")
    job = given["job"]
    settings = dict(job=job, seed=0) | JOBS[job]
    if unknown := sorted(map(str, given.keys() - settings.keys())):
        raise ValueError(f"{config} has {unknown[0]!r}, which {job} does not take: use {', '.join(settings)}")
    settings |= given | ({} if seed is None else dict(seed=seed))
    if lost := [k for k in REQUIRED[job] if settings[k] is None]:
        raise ValueError(f"{config} names no {lost[0]}: {job} needs {' and '.join(REQUIRED[job])}")
    for k, default in JOBS[job].items():
        if isinstance(default, int | float) and (isinstance(settings[k], bool) or not isinstance(settings[k], int
                                                                                                 | float)):
            raise ValueError(f"{config} has {k} = {settings[k]!r}: a number is needed")
    return settings


def decompose_multidim(config: str | Path, out: Path, seed: int | None = None, overwrite: bool = False,
                       resume: bool = False) -> dict:
    "Run a job into a folder, or read the one that is there; its metrics."
    out, settings = Path(out), read_multidim(config, seed)
    with claim_folder(out, MULTIDIM_LAYOUT, settings, "job", overwrite, resume) as held:
        if held and (out/"metrics.json").exists(): return read_json(out/"metrics.json", MULTIDIM_LAYOUT["metrics.json"])
        return _job(out, settings)


def _job(out: Path, settings: dict) -> dict:
    "Run a job in a claimed folder."
    metrics, figures = dict(circle=_circle, clusters=_clusters, subspaces=_subspaces)[settings["job"]](settings)
    write_json(out/"config.json", settings, MULTIDIM_LAYOUT["config.json"])
    write_text(out/"report.html", _page(settings, metrics, figures), MULTIDIM_LAYOUT["report.html"])
    write_json(out/"metrics.json", metrics, MULTIDIM_LAYOUT["metrics.json"])
    return metrics


def multidim_lines(metrics: dict) -> list[str]:
    "What a job found, in lines."
    lines = [", ".join(f"{k} {v:.3f}" for k, v in metrics["accuracy"].items())] if "accuracy" in metrics else []
    if "note" in metrics: lines.append(metrics["note"])
    for k, o in metrics.get("circles", {}).items():
        moved = ", ".join(f"{c} {o['conditions'][c]['moved']:.2f}" for c in ("circle", "random plane", "layer"))
        lines.append(f"{k}: turns {o['frequency']} times, read {o['read']:.2f}, answers moved by {moved}")
    if "key_frequencies" in metrics:
        lines.append(f"key frequencies: {', '.join(map(str, metrics['key_frequencies'])) or 'none'}")
    lines += [f"cluster {o['cluster']}: {o['score']:.2f} bits" for o in metrics.get("ranked", [])[:10]]
    for site, found in metrics.get("sites", {}).items():
        lines += [f"{site} {o['subspace']}: {o['score']:.2f} bits" for o in found["ranked"][:5]]
    return lines


# ## A circle

def _modular(settings):
    "A model and its modular task."
    name = str(settings["model"])
    if name in model_configs() or settings["task"] is None:
        model, task, _ = load_model(name)
    else: model, task = open_model(name, **settings["open"])[0], new_task(**settings["task"])
    if not isinstance(task, Sum):
        raise ValueError(f"{name} is no model of a sum modulo a number but of {task.name}: use modular_addition or "
                         "weekdays, or words: days for a language model")
    return model, sum_prompts(task, settings["terms"])


def _circle(settings):
    "Fit circles on some prompts, test them on others; of a modular model also which frequencies it needs."
    if settings["words"]:
        model, tokenizer = open_model(settings["model"], **settings["open"])
        if tokenizer is None: raise ValueError(f"{settings['model']} has no tokenizer: words need one")
        prompts, words = word_prompts(tokenizer, settings["words"], pieces=True)
        metrics = dict(accuracy=word_accuracy(model, prompts, words))
        if any(len(o) > 1 for o in words):
            return rounded(metrics | dict(note="words are split by this tokenizer: no circle is fitted"), DIGITS), []
    else:
        model, prompts = _modular(settings)
        _, right = without_circles(model, prompts, [])
        metrics = dict(accuracy=dict(right=right, one_answer=1/len(prompts.answers)))
    fit, test = prompts.split(seed=settings["seed"])
    p, g = len(prompts.answers), torch.Generator().manual_seed(settings["seed"])
    if len(test) > TESTED:
        terms = test.b.unique()
        some = terms[torch.randperm(len(terms), generator=g)[:max(1, TESTED//p)]]
        test = test.take(torch.isin(test.b, some))
    shifts = sorted({1 + i*(p - 2)//(SHIFTS - 1) for i in range(SHIFTS)}) if p - 1 > SHIFTS else None
    metrics["circles"], figures = {}, []
    for kind in KINDS:
        circle = fit_circle(model, fit, settings["site"], settings["variable"], kind)
        metrics["circles"][kind] = dict(
            frequency=circle.frequency, power=circle.power, share=circle.share, read=read_circle(model, circle, test),
            conditions=intervene(model, circle, test, seed=settings["seed"], shifts=shifts))
        if kind == "plane":
            figures += [_ring(circle, prompts.names),
                        draw_sweep(sweep_circle(model, circle, test.take([0])), prompts.names)]
    metrics["components"] = patch_components(model, test)
    if not settings["words"]: metrics |= _frequencies(model, prompts)
    return rounded(metrics, DIGITS), figures


def _frequencies(model, prompts):
    "Which frequencies are seen and which are needed; how many neurons turn with each."
    found = key_frequencies(model, prompts, 49)
    keys = [o.frequency for o in found if o.key]
    out = dict(key_frequencies=keys, visible_frequencies=[o.frequency for o in found if o.visible],
               enough=(enough := enough_circles(model, prompts, found)),
               right_with_enough=without_circles(model, prompts, enough, keep=True)[1],
               frequencies=[dict(frequency=o.frequency, power=o.power, right_without=o.right) for o in found])
    if model.cfg.attn_only: return out
    neurons = neuron_circles(model, prompts)
    of = neurons.frequency[neurons.alive.bool()]
    return out | dict(neurons={k: int((of == k).sum()) for k in of.unique().tolist()})


def _ring(circle, names):
    "The places of a circle, in the order of their values."
    import plotly.graph_objects as go
    x, y = torch.cat([circle.places, circle.places[:1]]).T.tolist()
    fig = go.Figure(go.Scatter(x=x, y=y, mode="lines+markers+text", text=[*names[:len(circle.places)], ""],
                               textposition="top center", line_color="#c6dbef", marker_color="#08519c"))
    return fig.update_layout(title=f"{circle.variable} at {circle.site}: the plane of most variance", width=460,
                             height=420, template="plotly_white").update_yaxes(scaleanchor="x")


# ## Clusters and subspaces

def _rows(store, site, n):
    "Rows of a site, spread over the store."
    if site not in store.sites: raise ValueError(f"the store holds no {site}: it has {', '.join(store.sites)}")
    at = torch.arange(0, len(store), max(1, len(store)//n))[:n]
    return store.rows(site, at).float(), at


def _clusters(settings):
    "Cluster a dictionary's rows, rebuild activations from each cluster, rank them, draw the best."
    dictionary, store = read_dictionary(settings["dictionary"]), ActivationStore(settings["store"])
    if settings["method"] not in ("graph", "spectral"):
        raise ValueError(f"unknown method {settings['method']!r} of clustering: use graph or spectral")
    if settings["method"] == "spectral" and not settings["n"]:
        raise ValueError("spectral clusters need their number: add n to the settings")
    h, at = _rows(store, dictionary.site, settings["rows"])
    W, k, least = dictionary.W_dec, settings["k"], settings["least"]
    clusters = (graph_clusters(W, k, least) if settings["method"] == "graph"
                else spectral_clusters(W, settings["n"], k, least, settings["seed"]))
    acts = dictionary.encode(h)
    found, without = clusters_reducibility(acts, W, clusters, seed=settings["seed"],
                                           limits=PLANES._replace(bins=settings["bins"]))
    ranked, figures = rank_clouds(found), []
    for i, score in ranked[:settings["panes"]]:
        rows, tokens = cluster_rows(acts, W, clusters[i])
        hover = _hover(settings, store, at[tokens]) if settings["model"] else None
        figures.append(cluster_pane(rows, W, clusters[i], hover, title=f"cluster {i}: (1 - M) S = {score:.2f} bits"))
    reasons = {o: list(without.values()).count(o) for o in dict.fromkeys(without.values())
               if not o.startswith("active")}
    metrics = dict(clusters=len(clusters), larger_than_one=sum(len(o) > 1 for o in clusters), measured=len(found),
                   active_at_too_few_tokens=sum(o.startswith("active") for o in without.values()), not_measured=reasons,
                   ranked=[dict(cluster=i, score=s, S=found[i].S, M=found[i].M, rows=found[i].rows,
                                features=clusters[i][:50]) for i, s in ranked],
                   published_order=[i for i, _ in rank_clouds(found, planes_plus=1)])
    return rounded(metrics, DIGITS), figures


def _hover(settings, store, rows):
    "Contexts of rows of a store, as a model's tokenizer writes them."
    model, tokenizer = open_model(settings["model"])
    check_model(store, model)
    if tokenizer is None:
        raise ValueError(f"{settings['model']} has no tokenizer: leave model out, points then have no context")
    ids, document = store.column("token"), store.column("document").numpy()
    return row_contexts([tokenizer.decode([int(o)]) for o in ids], rows.numpy(), document)


def _subspaces(settings):
    "Measure every subspace of every partition in a folder."
    store, folder = ActivationStore(settings["store"]), Path(settings["partitions"])
    folders = [folder] if (folder/"partition.json").exists() else sorted(o.parent
                                                                         for o in folder.glob("*/partition.json"))
    if not folders: raise ValueError(f"{folder} holds no partition: pass a folder of save_pretrained, or of several")
    metrics = {}
    for o in folders:
        partition = Partition.from_pretrained(o)
        h, _ = _rows(store, partition.site, settings["rows"])
        found, without = subspace_reducibility(partition, h, draws=settings["draws"], seed=settings["seed"],
                                               limits=PLANES._replace(bins=settings["bins"]))
        metrics[partition.site] = dict(ranked=[dict(subspace=k, score=s, S=found[k].S, M=found[k].M, p=found[k].p)
                                               for k, s in rank_clouds(found)], not_measured=without)
    return rounded(dict(sites=metrics), DIGITS), []


# ## The page

def _page(settings, metrics, figures):
    "Figures, results and settings."
    drawn = "".join(figure_part(o, f"figure{i}") for i, o in enumerate(figures))
    return run_page(f"Circles: {settings['job']}", f"{drawn}<h2>Results</h2>{table_part(value_rows(metrics))}"
                    f"<h2>Settings</h2>{table_part(value_rows(settings))}")
