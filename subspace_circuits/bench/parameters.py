"APD, SPD and VPD on the published toys beside published figures, and the steps of APD beside the public code's."
import json, logging, sys, time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path
from types import ModuleType

import torch

from subspace_circuits.activations import batch_rows
from subspace_circuits.bench import figure, side_by_side
from subspace_circuits.decompositions.parameter_metrics import (
    LADDER, PUBLISHED, alive, baseline_components, component_contributions, feature_scores, fresh_adversary, kinds_of,
    one_hot, per_feature, use_of)
from subspace_circuits.decompositions.parameter_training import Trainer, make_target, read_settings
from subspace_circuits.decompositions.parameters import masked, reconstruction
from subspace_circuits.files import read_json_lines
from subspace_circuits.forward import Weights, read_site
from subspace_circuits.growth import learn_partition
from subspace_circuits.partition import Partition, name_subspaces
from subspace_circuits.search import written
from subspace_circuits.text import open_task
from subspace_circuits.workers import in_workers

SEEDS = 5
# What is run: a shipped preset, and what had to be smaller for two cores; then the least MMCS and ML2R of every seed
CASES = {
    "APD 5-2": ("apd-tms-5-2", {}, dict(mmcs=.998, ml2r=.89)),
    "VPD 5-2, best of 3 starts": ("vpd-current-tms-5-2", dict(batch=256, steps=6000, starts=3),
                                  dict(mmcs=.999, off=.02)),
    "VPD 5-2": ("vpd-current-tms-5-2", dict(batch=256, steps=4000), dict(mmcs=.999, off=.02)),
    "SPD 5-2": ("spd-paper-tms-5-2", dict(batch=64, steps=16_000), dict(mmcs=.999, off=.02)),
    "APD 40-10": ("apd-tms-40-10-paper", dict(batch=256, steps=7000, lr=3e-3), dict(mmcs=.996, ml2r=.93)),
    "SPD residual MLP": ("spd-resid-1l-small", dict(batch=64, steps=3000), {}),
    "VPD residual MLP": ("vpd-resid-1l-small", dict(batch=64, steps=3000), {}),
    "APD residual MLP": ("apd-resid-1l-small", dict(batch=64, steps=2000), {}),
    "VPD 40-10": ("vpd-current-tms-40-10", dict(batch=128, steps=5000), dict(mmcs=.992, off=.03)),
    "APD 5-2, falling rate": ("apd-tms-5-2-cosine", {}, dict(mmcs=.998, ml2r=.89)),
    "SPD 40-10": ("spd-paper-tms-40-10", dict(batch=64, steps=10_000), dict(mmcs=.992, off=.03)),
}
QUICK = dict(steps=100, batch=64, target=dict(steps=50))


def _passes(bars, mmcs, ml2r, distinct, features):
    "Seeds that hold a case's bars; the whole matrix as one component would, if it need not be a component a feature."
    return sum(m >= bars["mmcs"] and r >= bars.get("ml2r", 0) and abs(r - 1) <= bars.get("off", 9) and n == features
               for m, r, n in zip(mmcs, ml2r, distinct))


def run_case(name: str, quick: bool = False) -> dict:
    "Decompose `SEEDS` targets by one of `CASES`; all that is said of it."
    preset, changes, bars = CASES[name]
    o = read_settings(preset, seeds=SEEDS, **(QUICK if quick else changes))
    target, data = make_target(o)
    trainer, row = Trainer(o, target, data), dict(case=name, preset=preset, changes=changes, seeds=SEEDS)
    start, wall, reached = time.process_time(), time.perf_counter(), None
    def look(step, losses):
        nonlocal reached
        if reached is None and bars:
            scores = feature_scores(trainer.components.matrices("W").detach(), trainer.target.matrices["W"])
            if o["starts"] == 1 and _passes(
                    bars, scores.mmcs.tolist(), scores.ml2r.tolist(), scores.distinct, data.n_features) == SEEDS:
                reached = dict(step=step, cpu=time.process_time() - start)
    for _ in trainer.run(log=look, every=200): pass
    trainer.settle()
    row |= dict(steps=trainer.step, batch=o["batch"], cpu=time.process_time() - start, wall=time.perf_counter() - wall,
                reached=reached)
    own = _tms_figures if "W" in target.matrices else _residual_figures
    return row | own(trainer) | _all_figures(trainer, (20, 320) if quick else LADDER)


def _scored(P, W, least=None):
    s = feature_scores(P.detach(), W, **({} if least is None else dict(least=least)))
    return dict(mmcs=s.mmcs.tolist(), ml2r=s.ml2r.tolist(), distinct=s.distinct)


def _tms_figures(trainer):
    "The published measures of `W`, also with components that are next to nothing, and those of who does nothing."
    W, n = trainer.target.matrices["W"], trainer.o["components"]
    nothing = baseline_components(trainer.target, n, trainer.o.get("rank", 1))
    return _scored(trainer.components.matrices("W"), W) | dict(
        all=_scored(trainer.components.matrices("W"), W, 0.),
        baselines={k: _scored(c.matrices("W"), W) for k, c in nothing.items()})


def _represented(trainer):
    "Features for which some component of the input matrix has a neuron."
    best = component_contributions(trainer, trainer.target.W_E).max(-1).values # seed component feature
    return (best.max(1).values > .04).sum(1).tolist()


def _residual_figures(trainer):
    "What components of the input matrix serve which features, and how many the output matrix is in."
    used = use_of(trainer, one_hot(SEEDS, trainer.data.n_features))
    untrained = Trainer(trainer.o, trainer.base, trainer.data)
    return dict(represented=_represented(trainer), untrained=_represented(untrained), in_kinds=kinds_of(used["in0"]),
                out_components=[int(o.sum()) for o in (used["out0"] > .1).any(1)])


def _all_figures(trainer, ladder):
    "Use, and a fresh adversary."
    x = trainer.data.sample(512, torch.Generator().manual_seed(1)).expand(SEEDS, -1, -1)
    used = use_of(trainer, one_hot(SEEDS, trainer.data.n_features))
    out = dict(per_feature={k: per_feature(v).tolist() for k, v in used.items()},
               needed={k: v.sum(1).tolist() for k, v in alive(trainer, x).items()})
    if trainer.importances:
        free = fresh_adversary(trainer, x, ladder)
        out["adversary"] = {str(k): v.tolist() for k, v in free.items()}
    out["output"] = trainer.target(x).square().mean((1, 2)).tolist()
    return out


def read_cases(file: Path) -> dict[str, dict]:
    "The rows of a file of JSON lines, by case."
    if not file or not Path(file).exists(): return {}
    return {o["case"]: o for o in read_json_lines(file, dict(case=str), "name another file for --log")}


# ## The induction transformer

def reads_of(trainer: Trainer, partition: Partition, h: torch.Tensor, scale: torch.Tensor, seed: int = 0) -> dict:
    """Of what reads the stream in layer 1: for each component, the share of its variance from each subspace of a
    partition; the same for the matrix as a whole, and for random combinations of its columns."""
    x = h.float()/scale - (h.float()/scale).mean(0)
    bases, g = partition.bases, torch.Generator().manual_seed(seed)
    def shares(read): # Directions as columns
        parts = torch.stack([(x@B@(B.T@read)).square().mean(0) for B in bases.values()])
        return (parts/parts.sum(0)).T
    out = {}
    for k in ("Q1", "K1", "V1"):
        W = trainer.target.matrices[k][0]
        named = lambda rows: [dict(zip(bases, (round(v, 3) for v in r))) for r in rows.tolist()]
        random = shares(W@torch.randn(W.shape[1], 200, generator=g)).max(1).values
        V = trainer.components.V[k].detach()[0, :, :, 0].T
        whole = torch.stack([(x@B@(B.T@W)).square().sum() for B in bases.values()])
        out[k] = dict(components=named(shares(V)), whole=named((whole/whole.sum())[None])[0],
                      random=round(random.mean().item(), 3))
    return out


def compare_induction(file: Path, preset: str = "vpd-induction-1", **changes) -> dict:
    "Decompose a layer of the bundled transformer, and ask which subspaces its components read; into a JSON file."
    torch.set_num_threads(1)
    o = read_settings(preset, **changes)
    target, data = make_target(o)
    trainer, (model, task) = Trainer(o, target, data), open_task("induction")
    for _ in trainer.run(): pass
    batch, site = task.sample(400, (12, 12), torch.Generator().manual_seed(1)), read_site(1)
    rows = batch_rows(model, batch, [site])
    labels = {k: rows[k] for k in ("token", "previous token", "position")}
    partition = name_subspaces(learn_partition(rows[site], site, written=written(model, batch, [site])[site]),
                               rows[site], labels)
    w = Weights(model)
    x = batch.tokens[:64][None]
    used = use_of(trainer, x)
    with torch.no_grad():
        wanted = target(x)
        loss = lambda masks, delta=0.: reconstruction(target.run(x, masked(target, trainer.components, masks, {
            k: torch.full(v.shape[:-1], delta) for k, v in used.items()})), wanted, None, "kl").item()
        needed = {k: (v.flatten(0, -2) > .1).float().mean(0) for k, v in used.items()}
        order = {k: [i for i in v.argsort(descending=True).tolist() if v[i] > .01] for k, v in needed.items()}
        every = {k: torch.ones_like(v) for k, v in used.items()}
        def without(site, c):
            mask = every[site].clone()
            mask[..., c] = 0
            return loss(every | {site: mask}, 1.)
        out = dict(preset=preset, changes=changes, steps=trainer.step, site=site, subspaces=partition.sizes,
                   components=o["components"], needed={k: len(v) for k, v in order.items()},
                   use={k: [round(needed[k][i].item(), 3) for i in v] for k, v in order.items()},
                   kl=dict(all=loss(every, 1.), needed=loss(used), none=loss({k: 0*v for k, v in used.items()})),
                   without={k: [without(k, c) for c in order[k][:8]] for k in ("Q1", "K1", "V1", "O1")})
        reads = reads_of(trainer, partition, rows[site], w.scale(rows[site].float()))
    for k, v in reads.items(): v["components"] = [v["components"][i] for i in order[k]]
    out["reads"] = reads
    ladder = (20, 80, 320)
    out["adversary"] = {str(k): v.item() for k, v in fresh_adversary(trainer, x[:, :16], ladder).items()}
    Path(file).write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")
    return out


# ## The public code

STANDS_IN = ("wandb", "wandb.apis", "wandb.apis.public", "matplotlib", "matplotlib.pyplot", "matplotlib.ticker",
             "matplotlib.colors", "mpl_toolkits", "mpl_toolkits.axes_grid1", "fire", "dotenv", "spd.log")


class _Named(type):
    def __getattr__(cls, name): return cls


class _Anything(metaclass=_Named): "What an absent library has under any name."


class _Absent(ModuleType):
    "A library that the public code names, but does not need to train."
    __path__ = []
    def __getattr__(self, name): return logging.getLogger("public APD") if name == "logger" else _Anything


def public_apd(reference: Path) -> dict:
    "Import the public APD code, without writing to its folder."
    file = Path(reference)/"spd/run_spd.py"
    if not file.is_file(): raise ValueError(f"{file} is not there: pass a checkout of the public APD repository")
    before, quiet = {k: sys.modules.get(k) for k in STANDS_IN}, sys.dont_write_bytecode
    sys.modules.update({k: _Absent(k) for k in STANDS_IN})
    sys.path.insert(0, str(reference))
    sys.dont_write_bytecode = True
    try:
        run, models, tools = (import_module(f"spd.{o}") for o in ("run_spd", "experiments.tms.models", "utils"))
        return dict(run=run, models=models, tools=tools)
    finally:
        sys.dont_write_bytecode = quiet
        sys.path.remove(str(reference))
        for k in STANDS_IN: del sys.modules[k]
        sys.modules.update({k: v for k, v in before.items() if v})


def public_steps(public: dict, o: dict, target) -> Callable[[int], None]:
    "What takes some steps of the public code from our settings, on our target."
    W, b = target.matrices["W"], target.bias
    shape = dict(n_instances=len(W), n_features=W.shape[1], n_hidden=W.shape[2], n_hidden_layers=0, device="cpu")
    models, run, tools = (public[k] for k in ("models", "run", "tools"))
    model = models.TMSModel(models.TMSModelConfig(**shape))
    with torch.no_grad():
        model.linear1.weight.copy_(W)
        model.b_final.copy_(b)
    falls = {"constant": "constant", "quarter cosine": "cosine"}[o["schedule"]]
    settings = dict(C=o["components"], m=o["rank"], topk=o["topk"], batch_size=o["batch"], lr=o["lr"],
                    lr_schedule=falls,
                    lr_warmup_pct=o["warmup"], param_match_coeff=o["faithfulness"], schatten_pnorm=o["power"],
                    topk_recon_coeff=o["topk_reconstruction"], schatten_coeff=o["schatten"], print_freq=10**6,
                    task_config=dict(task_name="tms", feature_probability=o["target"]["p"], train_bias=False,
                                     bias_val=0., data_generation_type="at_least_zero_active",
                                     pretrained_model_path="none"))
    data = tools.SparseFeatureDataset(n_instances=len(W), n_features=W.shape[1], feature_probability=o["target"]["p"],
                                      device="cpu", data_generation_type="at_least_zero_active")
    def steps(n):
        parts = models.TMSSPDModel(models.TMSSPDModelConfig(**shape, C=o["components"], m=o["rank"], bias_val=0.))
        parts.b_final.data.copy_(model.b_final.data)
        parts.b_final.requires_grad = False
        loader = tools.DatasetGeneratedDataLoader(data, batch_size=o["batch"])
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()): # it reports its first and last steps
            run.optimize(model=parts, config=run.Config(steps=n, **settings), device="cpu", dataloader=loader,
                         target_model=model, param_names=["linear1", "linear2"], out_dir=None)
    return steps


def _memory(preset: str, seeds: int, reference: Path | None, n: int) -> float:
    "MB that the memory of this process grew by at most, in some steps of ours or of the public code."
    import resource
    torch.set_num_threads(1)
    o = read_settings(preset, seeds=seeds, target=dict(steps=10))
    target, data = make_target(o)
    steps = public_steps(public_apd(reference), o, target) if reference else _our_steps(o, target, data)
    used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/(1024**2 if sys.platform == "darwin" else 1024)
    before = used()
    steps(n)
    return used() - before


def _our_steps(o, target, data):
    def steps(n):
        trainer = Trainer(o | dict(steps=n), target, data)
        for _ in trainer.run(bar=False): pass
    return steps


def public_figures(reference: Path, quick: bool = False) -> Iterator[dict]:
    "Time and memory of a step, ours beside the public code's: same settings, same process, one thread, in turns."
    public, threads = public_apd(reference), torch.get_num_threads()
    torch.set_num_threads(1)
    for name, preset, n, bar, each in (("5-2", "apd-tms-5-2", 300, 3, (1, 5)),
                                       ("40-10", "apd-tms-40-10-paper", 12, 10, (1,))):
        for seeds in each:
            o = read_settings(preset, seeds=seeds, target=dict(steps=200))
            target, data = make_target(o)
            runs = dict(public=public_steps(public, o, target), ours=_our_steps(o, target, data))
            few, many = (2, 4) if quick else (2, 2 + n//seeds)
            spent = side_by_side({(k, m): lambda f=f, m=m: f(m) for k, f in runs.items() for m in (few, many)}, 3)
            step = {k: (spent[k, many] - spent[k, few])/(many - few) for k in runs}
            if min(step.values()) <= 0:
                raise RuntimeError(f"{many - few} steps are lost in this machine's noise: run it again")
            for k in runs: yield figure(f"APD {name}, {seeds} at once, a step of {k}", 1000*step[k], "ms")
            ratio = step["public"]/step["ours"]
            yield figure(f"APD {name}, {seeds} at once, public code's step in ours", ratio, "x", f"at least {bar}",
                         None if quick else ratio >= bar)
    for name, preset in (("5-2", "apd-tms-5-2"), ("40-10", "apd-tms-40-10-paper")):
        mb = []
        for where in (reference, None):
            mb += in_workers([(_memory, (preset, 1, where, 3))], 1)
        yield figure(f"APD {name}, memory of ours in the public code's", mb[1]/max(mb[0], 1e-9), "", "at most .5",
                     mb[1] <= .5*mb[0]) | dict(mb=mb)
    torch.set_num_threads(threads)


# ## All of it

def case_figures(row: dict) -> Iterator[dict]:
    "What a case says, each figure beside its bar and beside what was published."
    name, bars = row["case"], CASES[row["case"]][2]
    features = read_settings(row["preset"])["target"]["n_features"]
    if "mmcs" in row:
        mean = lambda v: sum(v)/len(v)
        good = _passes(bars, row["mmcs"], row["ml2r"], row["distinct"], features)
        asked = f"MMCS from {bars['mmcs']}, " + (f"ML2R from {bars['ml2r']}" if "ml2r" in bars else
                                                 f"ML2R within {bars['off']} of 1")
        held = figure(f"{name}, seeds that hold", good, f"of {row['seeds']}", asked, good == row["seeds"])
        yield held | dict(row=row)
        said = PUBLISHED.get(name, {})
        for k in ("mmcs", "ml2r"):
            yield figure(f"{name}, {k.upper()}", mean(row[k]), f"(published {said.get(k, 'nowhere')})")
            for b, o in row["baselines"].items(): yield figure(f"{name}, {k.upper()}, {b}", mean(o[k]), "")
        if row["reached"]:
            least = 60 if "5-2" in name else 600
            cpu = row["reached"]["cpu"]
            yield figure(f"{name}, all seeds there after", cpu, "s of one thread", f"below {least}", cpu < least)
    else:
        n = min(row["represented"])
        yield figure(f"{name}, features found", n, f"of {features}, worst seed", "all", n == features) | dict(row=row)
        yield figure(f"{name}, features found by untrained components", max(row["untrained"]),
                     f"of {features}, best seed")
        one = sum(o == 1 for o in row["out_components"])
        yield figure(f"{name}, W_out as one component", one, f"of {row['seeds']} seeds")
    if "adversary" in row:
        a = row["adversary"]
        ratio = max(y/max(x, 1e-9) for x, y in zip(a["20"], a["320"]))
        yield figure(f"{name}, adversary after 320 steps in that after 20", ratio, "x", "at most 3", ratio <= 3)
    yield figure(f"{name}, all seeds", row["cpu"], "s of one thread")


def benchmark_parameters(
    reference: Path | None = None, # A checkout of the public APD repository, imported read-only
    log: Path | None = None, # A file of JSON lines for every case as it comes: the same command goes on from there
    quick: bool = False, # A few steps of each case, held to no bar
) -> Iterator[dict]: # What was measured, with its bar
    "Decompose the published toys by every method, and time a step of APD beside the public code."
    if reference: public_apd(reference)
    torch.set_num_threads(1)
    done = read_cases(log)
    for name in CASES:
        if name not in done:
            done[name] = run_case(name, quick)
            if log:
                with Path(log).open("a", encoding="utf-8") as f: f.write(json.dumps(done[name]) + "\n")
        for o in case_figures(done[name]): yield o | (dict(held=None, bar="") if quick else {})
    if reference: yield from public_figures(reference, quick)
