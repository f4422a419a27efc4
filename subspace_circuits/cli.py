"The command line: one verb a stage; each only calls the modules."
import inspect, json, math, os, re, signal, sys, threading, traceback
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Optional, get_args, get_type_hints

import typer
import typer.core


class Checked(typer.core.TyperCommand):
    "A command that takes no empty value, and no number but in plain digits that a machine holds."
    def parse_args(self, ctx, args):
        given, *_ = self.make_parser(ctx).parse_args(args=list(args))
        types = get_type_hints(inspect.unwrap(self.callback)) # as written: typer's own name for them changes
        for o in self.params:
            values, named = given.get(o.name), o.opts[0] if o.opts[0].startswith("-") else o.name
            for v in values if isinstance(values, list | tuple) else [values]:
                if isinstance(v, str):
                    bounds = [getattr(o, k, getattr(getattr(o, "type", None), k, None)) for k in ("min", "max")]
                    check_value(named, types.get(o.name, str), v, *bounds)
        return super().parse_args(ctx, args)


MOST = 2**31 - 1 # Of every whole number: no count of sequences, rows or steps that a machine could go through is larger


def check_value(name: str, of, value: str, least: float | None = None, most: float | None = None):
    "Refuse a value before it is taken for what it is not."
    kinds = (of, *get_args(of))
    if not value.strip(): raise ValueError(f"{name} is empty: give it a value, or leave it out")
    if int in kinds and not (re.fullmatch("[+-]?[0-9]{1,10}", value) and abs(int(value)) <= MOST):
        raise ValueError(f"{name} {value[:40]!r} is no whole number up to {MOST}: write it in digits 0 to 9")
    if float in kinds and not re.fullmatch(r"[+-]?[0-9]*\.?[0-9]+(e[+-]?[0-9]{1,2})?", value):
        raise ValueError(f"{name} {value[:40]!r} is no number: write it as 0.05")
    if {int, float} & set(kinds):
        low, high = -math.inf if least is None else least, math.inf if most is None else most
        if not low <= float(value) <= high:
            said = f"at least {least}" if most is None else f"at most {most}" if least is None else f"{least} to {most}"
            raise ValueError(f"{name} {value}: use a number of {said}")


app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
                  help="Which subspaces of a transformer carry which variable, and how the weights move them.")
benchmark = typer.Typer(no_args_is_help=True, help="Measure what the project promises.")
app.add_typer(benchmark, name="benchmark")
Out = Annotated[Path,
                typer.Option(help="Folder to write; resumed if it holds the same job, refused if it holds "
                                  "anything else.")]
Seed = Annotated[int, typer.Option(help="Seed of every random draw.")]
Overwrite = Annotated[bool, typer.Option("--overwrite",
                                         help="Replace what this program wrote there; refused if anything else is.")]
Resume = Annotated[bool, typer.Option("--resume", help="Refuse to start anew: there must be something to continue.")]


AsTask = Annotated[Optional[str],
                   typer.Option(help="What the model does, which it is asked first: a task of the package as "
                                     "NAME[:k=v,...], a .jsonl file of prompts with answers, or "
                                     "package.module:object.")]


def figures_file(file: Optional[Path]) -> Optional[Path]:
    "Refuse, before anything is measured, a file that no benchmark wrote."
    from subspace_circuits.files import check_output
    if file: check_output(file, "figures", ".json")
    return file


AsJson = Annotated[Optional[Path], typer.Option("--json", callback=figures_file,
                                                help="File to write the figures to; figures already there are "
                                                     "replaced.")]


@app.command(cls=Checked)
def models(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False):
    "List every model whose answer is known: trained and bundled, planted on demand, and toys trained on demand."
    listed = json.loads((Path(__file__).parent/"models"/"listing.json").read_text(encoding="utf-8"))
    if as_json: return print(json.dumps(listed, indent=1))
    for k, v in listed.items():
        score = ", ".join(f"{a:.3f} on {n}" for n, a in v.get("accuracy", {}).items())
        print(f"{k}: {v['kind']}; {v['task']}; {', '.join(f'{a} {b}' for a, b in v['shape'].items() if a != 'seed')}"
              + (f"; variables {', '.join(v['variables'])}" if v["variables"] else "")
              + (f"; {v['edges']} edges, {v['decoys']} decoys" if v["edges"] else "")
              + (f"; accuracy {score}" if score else ""))


@app.command(cls=Checked)
def run(model: Annotated[str,
                         typer.Argument(help="A bundled model, planted- and a family, or a folder, file or hub id; one "
                                             "over symbols is asked what it does if --task does not "
                                             "say.")] = "induction", *,
        out: Out, task: AsTask = None, data: Annotated[Optional[str], typer.Option(
            help="Of a language model: a .txt, .jsonl or .json file, packed as .gz or not, or hf:owner/name; the novel "
                 "that comes with the package if not given.")] = None,
        layers: Annotated[Optional[str], typer.Option(
            help="Of a language model: the window of layers that is looked at, as 10-12; the middle three if only "
                 "--data is given. With --task ioi, greater-than or a file of prompts: for that alone.")] = None,
        method: Annotated[str, typer.Option(
            help="Of a language model: how its sites are cut; ndm: by distances to nearest neighbours, some minutes "
                 "a site; readers: by what moves and is read, seconds.")] = "ndm",
        seed: Seed = 0, resume: Resume = False, overwrite: Overwrite = False):
    "The main job: capture, partition, circuit, report."
    from subspace_circuits.language_run import is_language_model, run_language
    from subspace_circuits.pipeline import run
    if data or layers:
        print(window_lines(run_language(model, out, data, layers, seed, method, overwrite, resume, task)))
        return print(f"report: {out/'report.html'}")
    if not task and is_language_model(model):
        raise ValueError(f"{model} is a language model, which has no task of its own: say which layers to look at, as "
                         "--layers 10-12, and on what text with --data; or its task with --task")
    metrics = run(model, out, seed, overwrite, resume, task)
    if asked := metrics.get("asked"): print(f"the task is {asked['task']}: {asked['said']}")
    full, kept = (metrics["accuracy"][o] for o in ("full", "keep_only"))
    print(f"{metrics['circuit']['n_edges']} of {metrics['circuit']['n_candidates']} edges kept; accuracy "
          + ", ".join(f"{kept[k]:.3f} (full {full[k]:.3f}) {'at length' if k[0].isdigit() else 'on'} {k}"
                      for k in full) + f"; {sum(metrics['seconds'].values()):.0f} s")
    if metrics["partition"]: print(key_line(metrics["circuit"], metrics["partition"]))
    print(f"report: {out/'report.html'}")


def window_lines(metrics: dict) -> str:
    "What a run on a window found, in a few lines."
    circuit, graded = metrics["circuit"], metrics["grade"]["graded"]
    lines = behaviour_lines(circuit["behaviour"]) if "behaviour" in circuit else []
    lines += [f"{k}: {o['n']} of {circuit['candidates'][k]} edges bring back {o['recovered']:.1%} of the window"
             for k, o in circuit["needed"].items()]
    lines += [f"{k}: objective {o['objective']:.3f}, a block determines {o['determined']:.1%} of another"
              for k, o in graded.items()]
    named = sum(a for a, _ in metrics["named"].values()), sum(b for _, b in metrics["named"].values())
    return "\n".join([*lines, f"{named[0]} of {named[1]} subspaces have a name; "
                              f"{sum(metrics['seconds'].values()):.0f} s, {metrics['peak_rss_mb']} MB"])


def behaviour_lines(found: dict) -> list[str]:
    "What is left of a behaviour, in a line for the model and one for each thing that stands in place of edges."
    def said(o): return f"{o['right']:.1%} right, margin {o['margin']:.2f}"
    return [f"whole model: {said(found['whole'])}"] + [
        f"{mode} elsewhere: " + "; ".join(f"{k} {said(o)}" for k, o in some.items())
        for mode, some in found.items() if mode != "whole"]


def key_line(circuit: dict, partition: dict) -> str:
    "What the answer key of a planted model says of a run, strictly."
    exact = "exact" if circuit["strict_exact"] else "not exact"
    return (f"the answer key: {partition['isolated']} of {partition['variables']} variables isolated "
            f"({partition['isolated_no_excuse']} without excuse); "
            f"circuit {exact}, strict average precision {circuit['strict_average_precision']:.2f}")


@app.command(cls=Checked)
def capture(model: Annotated[str,
                             typer.Argument(help="A bundled model, planted- and a family, a folder, a weight file, or "
                                                 "a hub id.")], *, out: Out, seed: Seed = 0,
            data: Annotated[Optional[str],
                            typer.Option(help="task, unique_copy, samples (the model's own text), a .txt, .jsonl or "
                                              ".json file, packed as .gz or not, or hf:owner/name:config:split:field. "
                                              "Not given: the model's own task, if it has one.")] = None,
            task: AsTask = None,
            field: Annotated[str, typer.Option(help="Entry of a JSON text that is its text.")] = "text",
            sites: Annotated[Optional[str],
                             typer.Option(help="Hook names or patterns such as blocks.*.hook_resid_mid, separated by "
                                               "commas; every residual site if not given.")] = None,
            shards: Annotated[int, typer.Option(min=1, help="Number of shards, fewer if a text ends before.")] = 6,
            sequences: Annotated[int, typer.Option(min=1, help="Sequences per shard.")] = 128,
            lengths: Annotated[Optional[str],
                               typer.Option(help="Shortest and longest list, as 0-50; the task's own if not given. Of "
                                                 "a text, the second is the window: the context, or as much of it as "
                                                 "fits 4 GB, if not given.")] = None,
            packed: Annotated[bool, typer.Option("--packed",
                                                 help="Fill windows with several documents of a text.")] = False,
            no_bos: Annotated[bool, typer.Option("--no-bos",
                                                 help="Start windows of a text without the tokenizer's bos.")] = False,
            dtype: Annotated[str,
                             typer.Option(help="What rows are stored in: float32, bfloat16 or float16.")] = "float32",
            resume: Resume = False, overwrite: Overwrite = False):
    """Capture activations of a model over a task, a text, or its own samples, into a store; torchrun shares the work
    among processes."""
    from subspace_circuits.activations import capture, ranks, stream_sites
    from subspace_circuits.own_tasks import open_job
    if lengths and not re.fullmatch("[0-9]{1,9}-[0-9]{1,9}", lengths):
        raise ValueError(f"lengths {lengths!r}: write the shortest and the longest, as 0-50")
    bounds = tuple(map(int, lengths.split("-"))) if lengths else None
    if resume and not (out/"store.json").exists():
        raise ValueError(f"nothing to resume in {out}: it holds no store; leave out --resume to start one")
    net, what, asked = open_job(model, data, task, packed=packed, bos=not no_bos, field=field)
    if asked and ranks()[0] == 0: print(f"the task is {what.name}: {asked}")
    store = capture(net, what, sites.split(",") if sites else stream_sites(net), out, shards, sequences, bounds, seed,
                    overwrite, dtype)
    if ranks()[0] != 0: return
    windows = f", windows of {store.info['capture']['lengths'][1]} tokens" if hasattr(what, "windows") else ""
    print(f"{len(store)} rows of {len(store.sites)} sites in {out}{windows}")


@benchmark.command("models", cls=Checked)
def benchmark_models(*, quick: Annotated[bool,
                                         typer.Option("--quick", help="One family: a check that it runs.")] = False,
                     as_json: AsJson = None):
    """Toy models beside what one would write, the import of the package, planting with its certificate; each figure
    beside its bar."""
    from subspace_circuits.bench.models import benchmark_models
    _print_figures(benchmark_models(*((("induction",),) if quick else ())), as_json)


@benchmark.command("neighbors", cls=Checked)
def benchmark_neighbors(threads: Annotated[int, typer.Option(min=1, help="Of torch and of faiss.")] = 1, *,
                        quick: Annotated[bool, typer.Option("--quick", help="Few rows: a check that it runs.")] = False,
                        as_json: AsJson = None):
    """Search inside subspaces, and mutual information of all pairs, beside what one would write; each figure beside
    its bar."""
    from subspace_circuits.bench.neighbors import benchmark_neighbors
    _print_figures(benchmark_neighbors(threads, **(dict(blocks=3, keys=640, rows=200, rounds=1) if quick else {})),
                   as_json)


@benchmark.command("store", cls=Checked)
def benchmark_store(model: Annotated[Optional[str],
                                     typer.Option(help="A small model for the first bar, e.g. a folder of "
                                                       "stories260K; one of its shape with random weights if not "
                                                       "given.")] = None,
                    rows: Annotated[int,
                                    typer.Option(min=1000,
                                                 help="Rows of the largest capture whose memory is "
                                                      "measured.")] = 1_000_000,
                    quick: Annotated[bool,
                                     typer.Option("--quick",
                                                  help="Fewer rounds and smaller stores: a check that it "
                                                       "runs.")] = False,
                    as_json: AsJson = None):
    "Capture against the bare forward pass, memory, opening, random batches; each figure beside its bar."
    from subspace_circuits.bench.capture import benchmark_store
    _print_figures(benchmark_store(model, rows, quick), as_json)


def _print_figures(figures, as_json: Optional[Path]):
    "A line for each figure as it comes, with its bar; all of them as JSON if asked."
    done = []
    for o in figures:
        done.append(o)
        print(f"{o['what']}: {o['figure']:.4g} {o['unit']}"
              + (f" (bar: {o['bar']}, {'held' if o['held'] else 'MISSED'})" if o["bar"] else ""), flush=True)
    _write_figures(as_json, done)


def _write_figures(file: Optional[Path], figures: list | dict):
    from subspace_circuits.files import write_json
    if file: write_json(file, dict(figures=figures), "figures")


@benchmark.command("partition", cls=Checked)
def benchmark_partition(*, quick: Annotated[bool,
                                            typer.Option("--quick",
                                                         help="Few toys and circuits, no wide mixture: a check that "
                                                              "it runs.")] = False,
                        seeds: Annotated[int,
                                         typer.Option(help="Of each planted family: about half an hour each.")] = 1,
                        as_json: AsJson = None):
    "The closed form and the whole method wherever the answer is known; each figure beside its bar."
    from subspace_circuits.bench.partition import benchmark_partition
    _print_figures(benchmark_partition(quick, seeds), as_json)


@benchmark.command("circuits", cls=Checked)
def benchmark_circuits(*, seeds: Annotated[int,
                                           typer.Option(min=1,
                                                        help="Of each planted family, and random models of each "
                                                             "kind.")] = 3,
                       learned: Annotated[bool,
                                          typer.Option(help="Learn subspaces too: minutes for each model.")] = True,
                       first_seed: Annotated[int, typer.Option(min=0, help="The first of these seeds.")] = 0,
                       bare: Annotated[bool, typer.Option("--bare", help="Plant without decoys.")] = False,
                       grades: Annotated[Optional[Path],
                                         typer.Option(help="File of JSON lines to keep every grade in as it comes; "
                                                           "the same command goes on from there. After a change of a "
                                                           "method start a new one.")] = None,
                       quick: Annotated[bool,
                                        typer.Option("--quick",
                                                     help="One seed of two families, true subspaces: a check that it "
                                                          "runs.")] = False,
                       as_json: AsJson = None):
    """Every method on every planted circuit by the strict grade, from true subspaces and from those of every learner,
    and on random models; each figure beside its bar."""
    from subspace_circuits.bench.circuits import benchmark_circuits
    _print_figures(benchmark_circuits(*((("induction", "histogram"), 1, False) if quick else ()), kept=grades,
                                      **({} if quick else dict(seeds=seeds, learned=learned, first=first_seed,
                                                               bare=bare))), as_json)


@benchmark.command("evaluation", cls=Checked)
def benchmark_evaluation(*, quick: Annotated[bool, typer.Option(
        "--quick", help="One planted circuit and few prompts: a check that it runs.")] = False, as_json: AsJson = None):
    """Time patching on GPT-2 small's shape; test planted carriers, and learned subspaces against the supervised bound;
    each figure beside its bar."""
    from subspace_circuits.bench.evaluation import benchmark_gpt2, benchmark_trained
    _print_figures(benchmark_gpt2(2 if quick else 16) + benchmark_trained(1 if quick else 3), as_json)


@benchmark.command("preimages", cls=Checked)
def benchmark_preimages(model: Annotated[Optional[str],
                                         typer.Option(help="A model that speaks for itself, e.g. a folder of "
                                                           "stories260K; one of its shape with random weights if not "
                                                           "given.")] = None,
                        rows: Annotated[int, typer.Option(min=2000, help="Rows of the store.")] = 1_000_000,
                        store: Annotated[Optional[Path],
                                         typer.Option(help="A store of the model, instead of capturing one.")] = None,
                        quick: Annotated[bool, typer.Option("--quick", help="Few rows: a check that it runs.")] = False,
                        as_json: AsJson = None):
    "Index, search and explorer over the model's own tokens; each figure beside its bar."
    from subspace_circuits.bench.preimages import benchmark_preimages
    _print_figures(benchmark_preimages(model, rows, quick, store), as_json)


@benchmark.command("speed", cls=Checked)
def benchmark_speed(reference: Annotated[Path,
                                         typer.Option(help="A checkout of the public SubspacePartition repository; "
                                                           "imported, never written to.")], *,
                    model: Annotated[str,
                                     typer.Option(help="A model with a residual stream; read after its first "
                                                       "attention.")] = "induction",
                    quick: Annotated[bool,
                                     typer.Option("--quick",
                                                  help="Seconds instead of minutes, far fewer keys, no bars: a check "
                                                       "that it runs.")] = False,
                    as_json: AsJson = None):
    """Our search against the public code: time to its held-out objective on the same data, in one process, with the
    same threads."""
    from subspace_circuits.bench.speed import benchmark_speed
    figures = benchmark_speed(reference, model, quick)
    print(f"{'width':>5} {'the public code with':<20} {'lr':>6} {'keys':>7} {'threads':>7} {'objective':>17} "
          f"{'seconds':>8} {'steps':>5} {'ours':>8} {'steps':>5} {'ratio':>7}")
    for d, runs in figures.items():
        for name, o in runs.items():
            ratio = f"{o['ratio']:.0f}x" if o["ratio"] else "not reached"
            print(f"{d:>5} {name:<20} {o['lr']:>6} {o['keys']:>7} {o['threads']:>7} {o['start']:>7.4f} -> "
                  f"{o['reached']:>6.4f} {o['seconds']:>8.1f} {o['steps']:>5} {o['ours_seconds']:>8.2f} "
                  f"{o['ours_steps']:>5} {ratio:>7}"
                  + (f" (bar: {o['bar']}x, {'held' if o['held'] else 'MISSED'})" if o["bar"] else ""))
    _write_figures(as_json, figures)


@benchmark.command("language-model", cls=Checked)
def benchmark_language_model(*, model: Annotated[str, typer.Option(
                                 help="A folder, a GGUF file or a hub id, as make lm fetches one.")],
                             text: Annotated[Optional[str], typer.Option(
                                 help="As --data of run; the novel that comes with the package if not given.")] = None,
                             layers: Annotated[Optional[str], typer.Option(
                                 help="The window; the middle three layers if not given.")] = None,
                             out: Annotated[Path, typer.Option(
                                 help="Folder of the run, resumed if it is there.")] = Path("runs/language-model"),
                             as_json: AsJson = None):
    "The main job on a language model, capture beside the bare forward pass; each figure beside its bar."
    from subspace_circuits.bench.language_model import benchmark_language_model
    _print_figures(benchmark_language_model(model, text, layers, out), as_json)


@benchmark.command("parameters", cls=Checked)
def benchmark_parameters(*, reference: Annotated[Optional[Path],
                                                 typer.Option(help="A checkout of the public APD repository, to time "
                                                                   "its steps beside ours; imported, never written "
                                                                   "to.")] = None,
                         log: Annotated[Optional[Path],
                                        typer.Option(help="File of JSON lines to keep every decomposition's figures in "
                                                          "as they come; the same command goes on from there.")] = None,
                         quick: Annotated[bool, typer.Option("--quick", help="A few steps of each: a check that it "
                                                                             "runs, held to no bar.")] = False,
                         as_json: AsJson = None):
    "APD, SPD and VPD on the published toys, seeds 0 to 4, beside published figures; each figure beside its bar."
    from subspace_circuits.bench.parameters import benchmark_parameters
    _print_figures(benchmark_parameters(reference, log, quick), as_json)


@benchmark.command("temporal-saes", cls=Checked)
def benchmark_temporal_saes(*, reference: Annotated[Optional[Path],
                                                    typer.Option(help="A checkout of the public repository "
                                                                      "temporal-saes, whose trainer and loops are "
                                                                      "timed beside ours; imported, never written "
                                                                      "to.")] = None,
                            log: Annotated[Optional[Path],
                                           typer.Option(help="Kept comparisons on language models, as "
                                                             "benchmarks/log/temporal-saes.json.")] = None,
                            quick: Annotated[bool,
                                             typer.Option("--quick", help="One seed, few steps, small batches: a check "
                                                                          "that it runs, held to no bar.")] = False,
                            as_json: AsJson = None):
    "Planted slow latents, speed and memory of training, smoothness; each figure beside its bar."
    from subspace_circuits.bench.temporal import benchmark_temporal
    _print_figures(benchmark_temporal(reference, log, quick), as_json)


@benchmark.command("multidimensional", cls=Checked)
def benchmark_multidimensional(*, reference: Annotated[Optional[Path],
                                                       typer.Option(help="A checkout of the public repository "
                                                                         "MultiDimensionalFeatures, to time its "
                                                                         "indices on three planes; read, never "
                                                                         "written to.")] = None,
                               model: Annotated[Optional[str],
                                                typer.Option(help="A TransformerLens state dict that adds modulo its "
                                                                  "number of answers, besides the bundled "
                                                                  "one.")] = None,
                               quick: Annotated[bool,
                                                typer.Option("--quick", help="Few planes and models: a check that "
                                                                             "it runs.")] = False,
                               as_json: AsJson = None):
    "Reducible and irreducible planes, planted circles, circles in use, key frequencies; each figure beside its bar."
    from subspace_circuits.bench.multidimensional import benchmark_multidimensional
    _print_figures(benchmark_multidimensional(reference, model, quick), as_json)


@app.command(cls=Checked)
def partition(store: Annotated[Path, typer.Argument(help="A folder written by capture.")], *,
              site: Annotated[str, typer.Option(help="Hook names or patterns, separated by commas.")],
              out: Annotated[Path, typer.Option(metavar="DIR",
                                                help="Folder to write, with a folder for each site if there are "
                                                     "several; what holds the same job is kept, anything else "
                                                     "refused.")],
              method: Annotated[str,
                                typer.Option(help="ndm: cuts, and where none holds what components wrote (--model) or "
                                                  "growth; closed-form: independent subspaces only; growth.")] = "ndm",
              model: Annotated[Optional[str],
                               typer.Option(help="The model that the store is of, as for capture: ndm then starts "
                                                 "from what each component wrote.")] = None,
              skip_first: Annotated[int,
                                    typer.Option(min=0, help="Leave out the first N positions of every sequence.")] = 0,
              keep_massive: Annotated[bool,
                                      typer.Option("--keep-massive",
                                                   help="Keep rows of another order of magnitude, as position 0 of "
                                                        "language models is; they are set aside if not.")] = False,
              seed: Seed = 0, overwrite: Overwrite = False):
    "Find the subspaces of sites of a store, and how many there are."
    from subspace_circuits.activations import ActivationStore, check_model, from_position
    from subspace_circuits.models import open_model
    from subspace_circuits.text import open_planted
    from subspace_circuits.files import owned
    from subspace_circuits.partition import PARTITION, massive_rows
    from subspace_circuits.closed_form import closed_form
    from subspace_circuits.growth import grow_partition, learn_partition
    from subspace_circuits.search import stored_sequences, written
    methods = {"ndm": learn_partition, "closed-form": closed_form, "growth": grow_partition}
    if method not in methods: raise ValueError(f"unknown method {method!r}: use one of {', '.join(methods)}")
    acts = ActivationStore(store)
    fits = {o: [x for x in acts.sites if fnmatchcase(x, o)] for o in site.split(",")}
    if lost := [o for o, v in fits.items() if not v]:
        raise ValueError(f"no site {lost[0]!r} in {store}: use one of {', '.join(acts.sites)}")
    sites = dict.fromkeys(x for v in fits.values() for x in v)
    if model and method != "ndm":
        raise ValueError(f"--model is for method ndm, {method} asks for rows alone: leave it out")
    asked = (f"{method}, writers" if model else method) + f", without the first {skip_first}"*(skip_first > 0)
    asked += ", massive rows kept"*keep_massive
    if model:
        net = known.model if (known := open_planted(model)) else open_model(model)[0]
        check_model(acts, net)
    folders = {o: out/o if len(sites) > 1 else out for o in sites}
    if overwrite and out.exists(): owned(out, {"*": PARTITION} if len(sites) > 1 else PARTITION)
    kept = {o: _kept_partition(folder, o, asked, seed, acts.info["capture"]["weights"])
            for o, folder in folders.items() if not overwrite}
    todo = [o for o in folders if kept.get(o) is None]
    rows = from_position(acts, skip_first) if todo else None
    if rows is not None and not rows.any():
        raise ValueError(f"--skip-first {skip_first} leaves none of {len(acts)} rows: leave out fewer positions")
    quiet = rows.clone() if model and todo else None # what components wrote is asked of rows that are not set aside
    for o in todo if quiet is not None and not keep_massive else ():
        quiet[rows.nonzero()[:, 0][massive_rows(acts[o][rows])[0]]] = False
    wrote = written(net, stored_sequences(acts, quiet), todo) if model and todo else {}
    for o, folder in folders.items():
        if (found := kept.get(o)) is None:
            more = dict(written=wrote[o]) if model else {}
            found = methods[method](acts[o][rows], o, seed, weights=acts.info["capture"]["weights"],
                                    keep_massive=keep_massive, **more)
            found.info["asked"] = asked
            found.save_pretrained(folder)
        print(found)


def _kept_partition(folder: Path, site: str, method: str, seed: int, weights: str):
    "The partition that a folder holds, if it is that of this job; nothing if there is none."
    from subspace_circuits.files import owned
    from subspace_circuits.partition import PARTITION, Partition
    if not folder.exists(): return None
    if not (folder/"partition.json").exists():
        owned(folder, PARTITION) # a killed process may have left parts of one
        return None
    old = Partition.from_pretrained(folder)
    made = old.site, *(old.info.get(o) for o in ("asked", "seed", "weights"))
    if made == (site, method, seed, weights): return old
    raise ValueError(f"{folder} holds the partition of {old.site} by {old.info.get('asked')} with seed "
                     f"{old.info.get('seed')}: name another folder, or pass --overwrite")


@app.command(cls=Checked)
def circuit(model: Annotated[str,
                             typer.Argument(help="A bundled model, planted- and a family, a folder, a weight file, or "
                                                 "a hub id.")], *,
            partitions: Annotated[Path, typer.Option(help="A folder with one partition for each site, as run writes.")],
            out: Annotated[Path, typer.Option(metavar="FILE.json",
                                              help="Node-link JSON to write, with .graphml and .html beside it; drawn "
                                                   "again if it holds the same job.")],
            data: Annotated[Optional[str],
                            typer.Option(help="As for capture; the model's own task if not given.")] = None,
            task: AsTask = None,
            answers: Annotated[int, typer.Option(min=10,
                                                 help="Right answers to choose edges on at first; forty times as many "
                                                      "are asked for counterexamples.")] = 1000,
            explorer: Annotated[Optional[str],
                                typer.Option(help="The address that explore prints: subspaces in the figure lead "
                                                  "there.")] = None,
            static: Annotated[bool, typer.Option("--static", help="Draw for print, black on white.")] = False,
            seed: Seed = 0, overwrite: Overwrite = False):
    "Find the edges between given subspaces that a model's answers need, and draw them."
    from subspace_circuits.circuit_graph import edge_rows, score_words, write_circuit
    G = write_circuit(model, partitions, out, data, answers, explorer, static, seed, overwrite, task)
    rows, choice = [o for o in edge_rows(G) if o["type"] != "skip"], G.graph["choice"]
    for o in rows:
        print(f"{o['component'] or '-':<10} {o['type']:<8} {o['label']:<32} {score_words(o)}"
              + (f", necessity {o['necessity']:.3g} nats" if o.get("necessity") is not None else ""))
    print(f"{choice['able']} of {choice['asked']} sequences could be asked, {choice['wrong']} of all go wrong"
          + ("" if choice["significant"]
             else "; significant components alone do not do the task: every edge was a candidate" if choice["alive"]
             else "; no component is significant"))
    print(f"{len(rows)} edges: {out}, {out.with_suffix('.graphml').name}, {out.with_suffix('.html').name}")


@app.command(cls=Checked)
def attack(run: Annotated[Path, typer.Argument(help="A folder that run has finished.")], *,
           steps: Annotated[int, typer.Option(min=20, help="Most steps of an adversary: 20, 40, 80 … up to this, each "
                                                           "time afresh.")] = 1280):
    """Let an adversary set every edge outside a run's circuit so that answers change most, beside random edges and a
    missing true one; into the report."""
    from subspace_circuits.pipeline import attack_run
    for name, curve in attack_run(run, steps).items():
        print(f"{name}: " + ", ".join(f"{nats:.3g} nats at {n}" for n, nats in curve))
    print(f"report: {run/'report.html'}")


@app.command(cls=Checked)
def compare(first: Annotated[Path, typer.Argument(help="A circuit or subspaces: ours, of EAP and MIB, circuit-tracer, "
                                                       "SAELens, published NDM, or parameter components.")],
            second: Annotated[Path, typer.Argument(help="Another, of the same or of another format.")], *,
            out: Annotated[Optional[Path], typer.Option(metavar="FILE.html",
                                                        help="Two circuits of ours as one figure, coloured by what "
                                                             "changed.")] = None,
            least: Annotated[float, typer.Option(min=0, help="Smallest relative change of a score that counts.")] = .05,
            seed: Seed = 0, overwrite: Overwrite = False):
    "What two circuits, or two sets of subspaces, have in common, beside what chance would give."
    from subspace_circuits.circuit_graph import diff_circuits, diff_figure, read_circuit, three_digits, write_figure
    from subspace_circuits.exchange import compare_held
    from subspace_circuits.files import check_output
    if out: check_output(out, "comparison", ".html", overwrite)
    kinds, said = compare_held(first, second, seed)
    print(f"{kinds}: {said}")
    if kinds != "circuit and circuit":
        if out: raise ValueError(f"--out draws two circuits of ours, these are {kinds}: leave it out")
        return
    one, two = read_circuit(first), read_circuit(second)
    rows = diff_circuits(one, two, least)
    for o in rows:
        if o["change"] != "same":
            print(f"{o['change']:<18} {o['component'] or '-':<10} {o['type']:<8} {o['label']:<32} "
                  f"{three_digits(o['first'])} -> {three_digits(o['second'])} {o['unit']}")
    print(f"{sum(o['change'] == 'same' for o in rows)} of {len(rows)} edges between subspaces are the same"
          + ("" if one.graph.get("model") == two.graph.get("model") else "; the models differ"))
    if out: write_figure(diff_figure(one, two, least), out, f"{first} and {second}", "comparison")


@app.command(cls=Checked)
def locate(model: Annotated[str, typer.Argument(help="A bundled model, a folder, a weight file, or a hub id.")], *,
           task: Annotated[str, typer.Option(help="ioi, greater-than, or a .jsonl file of prompts with wrong answers "
                                                  "and counterfactuals.")],
           prompts: Annotated[int, typer.Option(min=8, help="Prompts of a test.")] = 64,
           seed: Seed = 0,
           as_json: Annotated[Optional[Path], typer.Option("--json", help="File to write all figures to.")] = None,
           overwrite: Overwrite = False):
    "Which layers and positions carry a behaviour, once the model is known to have it."
    from subspace_circuits.files import check_output, write_json
    from subspace_circuits.locate import locate_behaviour
    from subspace_circuits.models import open_model
    if as_json: check_output(as_json, "located", ".json", overwrite)
    found = locate_behaviour(*open_model(model), model, task, prompts, seed)
    for k, o in found.items():
        able, best, one = o["ability"], o["best"], o["direction"]
        print(f"{k}: {able['right']:.1%} ± {able['error']:.1%} right (chance {able['chance']:.0%}); the most behind "
              f"layer {best['layer']}, place {best['place']}: {best['drop']:.3g} ± {best['error']:.2g}"
              + ("" if o["clear"] else ", which is not clear of nothing")
              + f"; one direction {one['drop']:.3g} ± {one['error']:.2g} on held-out prompts")
    if as_json: write_json(as_json, dict(model=model, task=task, prompts=prompts, seed=seed, tests=found), "located")


@app.command(cls=Checked)
def evaluate(suite: Annotated[str,
                              typer.Argument(help="ioi, greater-than, knowledge-conflict, carriers or "
                                                  "mutual-information.")],
             model: Annotated[str,
                              typer.Argument(help="A bundled model, planted- and a family, a folder, or a hub id.")], *,
             partitions: Annotated[Path,
                                   typer.Option(help="A partition, or a folder of partitions, each of its own site.")],
             out: Annotated[Path,
                            typer.Option(help="JSON file to write, with its figure beside it as .html; resumed, or "
                                              "refused if it holds another job.")],
             facts: Annotated[Optional[Path],
                              typer.Option(help="For knowledge-conflict: a JSON file of question, context, and "
                                                "facts.")] = None,
             prompts: Annotated[int, typer.Option(min=2, help="Prompts of a test, sequences, or rows.")] = 1000,
             layers: Annotated[Optional[str],
                               typer.Option(help="Layers to patch instead of the published ones, as "
                                                 "test1=0,test2=0.")] = None,
             task: AsTask = None,
             supervised: Annotated[bool,
                                   typer.Option("--supervised",
                                                help="For carriers: learn the best subspace of the same size, as a "
                                                     "bound.")] = False,
             seed: Seed = 0, overwrite: Overwrite = False):
    "Test causally which subspace carries a variable."
    from subspace_circuits.suites import evaluate, summary_lines
    if layers and not re.fullmatch(r"[\w-]+=[0-9]{1,6}(,[\w-]+=[0-9]{1,6})*", layers):
        raise ValueError(f"layers {layers!r}: write a test and a layer, as test1=0,test2=0")
    depth = {k: int(v) for k, v in (o.split("=") for o in layers.split(","))} if layers else None
    for line in summary_lines(evaluate(suite, model, partitions, out, facts, prompts, depth, supervised, seed,
                                       overwrite, task)):
        print(line)
    print(f"figure: {out.with_suffix('.html')}")


@app.command(cls=Checked)
def decompose(method: Annotated[str, typer.Argument(help="apd, spd or vpd: a network's weights as a sum of components; "
                                                         "temporal-sae: sparse autoencoders of a store's sites; "
                                                         "multidim: circles in a model, irreducible clusters of a "
                                                         "dictionary, or irreducible subspaces.")],
              config: Annotated[str, typer.Argument(help="A YAML file of settings, or a name of shipped settings, as "
                                                         "apd-tms-5-2 or temporal-sae-planted.")], *,
              out: Out, seed: Annotated[Optional[int], typer.Option(help="Instead of the settings' own.")] = None,
              wandb: Annotated[Optional[str], typer.Option(metavar="PROJECT",
                                                           help="Send losses to Weights & Biases too.")] = None,
              resume: Resume = False, overwrite: Overwrite = False):
    "Decompose a network's weights, or what a model holds, as settings say."
    from subspace_circuits.decompositions.parameter_training import METHODS
    if method not in (known := [*METHODS, "temporal-sae", "multidim"]):
        raise ValueError(f"unknown method {method!r}: use one of {', '.join(known)}")
    if method == "temporal-sae":
        if wandb: raise ValueError("temporal-sae writes losses to metrics.jsonl only: leave --wandb out")
        from subspace_circuits.decompositions.temporal_runs import decompose_temporal, temporal_lines
        for line in temporal_lines(decompose_temporal(config, out, seed, overwrite, resume)): print(line)
    elif method == "multidim":
        if wandb: raise ValueError("multidim trains nothing that --wandb could follow: leave it out")
        from subspace_circuits.decompositions.multidim_runs import decompose_multidim, multidim_lines
        for line in multidim_lines(decompose_multidim(config, out, seed, overwrite, resume)): print(line)
    else:
        from subspace_circuits.decompositions.runs import decompose_parameters
        metrics = decompose_parameters(method, config, out, seed, overwrite, resume, wandb)
        for k in ("mmcs", "ml2r", "distinct"):
            if k in metrics: print(f"{k}: {', '.join(f'{o:.3f}' if k != 'distinct' else str(o) for o in metrics[k])}")
        for k, v in metrics["needed"].items(): print(f"components needed at {k}: {', '.join(map(str, v))}")
    print(f"report: {out/'report.html'}")


@app.command(cls=Checked)
def explore(run: Annotated[Path, typer.Argument(help="A folder written by run, or one with a store and partitions.")],
            *,
            port: Annotated[int, typer.Option(min=0, max=65535,
                                              help="Port on 127.0.0.1; 0 takes any that is free.")] = 0,
            static: Annotated[Optional[Path],
                              typer.Option(metavar="FILE.html",
                                           help="Write one offline page with chosen queries instead.")] = None,
            queries: Annotated[int, typer.Option(min=1, max=1000, help="Rows in the offline page.")] = 6,
            text: Annotated[Optional[list[str]],
                            typer.Option(help="A text in the offline page; may be repeated.")] = None,
            shading: Annotated[str,
                               typer.Option(help="What the offline page can shade: frozen, free, both separated by a "
                                                 "comma, or none. Minutes, for long texts.")] = "frozen",
            model: Annotated[Optional[str], typer.Option(help="The model, if the run does not name it.")] = None,
            seed: Seed = 0, overwrite: Overwrite = False):
    "See what each subspace of a run sees, on a page of this machine or in a file."
    from subspace_circuits.files import check_output, write_text
    from subspace_circuits.explorer import chosen_rows, open_run, start_server, static_page
    if static: check_output(static, "explorer", ".html", overwrite)
    elif unused := [k for k, v in dict(text=text, queries=queries != 6, shading=shading != "frozen").items() if v]:
        raise ValueError(f"--{unused[0]} is for the offline page: pass --static FILE.html, or leave it out")
    shadings = tuple(o for o in shading.split(",") if o != "none")
    if bad := set(shadings) - {"frozen", "free"}:
        raise ValueError(f"unknown shading {min(bad)!r}: use frozen, free, both separated by a comma, or none")
    explorer = open_run(run, model, overwrite)
    if static:
        asked = [*(text or []), *chosen_rows(explorer, queries, seed)]
        write_text(static, static_page(explorer, asked, shadings=shadings), "explorer")
        return print(f"{static}: {static.stat().st_size/1e6:.1f} MB")
    server = start_server(explorer, port)
    print(f"http://127.0.0.1:{server.server_port}  (Ctrl-C ends it)", flush=True)
    try: server.wait()
    except KeyboardInterrupt: server.stop()


# What memory and the system refuse is no bug of ours: how their errors begin, and what to do about it.
LESS = "memory does not suffice: shorter sequences (--lengths) or fewer at once (--sequences) take less"
REFUSED = ("not enough memory", "can't allocate memory", "out of memory", "invalid buffer size",
           "storage size calculation overflowed", "array is too big", "unable to allocate")


@contextmanager
def ended_by_signals():
    "Let the system's wish that this process ends do what Ctrl-C does: leave what can be continued."
    def end(number, frame): raise KeyboardInterrupt(number)
    numbers = [signal.SIGTERM, signal.SIGHUP] if hasattr(signal, "SIGHUP") else [signal.SIGTERM]
    if threading.current_thread() is not threading.main_thread(): numbers = []
    before = {o: signal.signal(o, end) for o in numbers if signal.getsignal(o) == signal.SIG_DFL}
    try: yield
    finally:
        for k, v in before.items(): signal.signal(k, v)


def main():
    """Exit 2 with one line for what the user, memory or disk refuses, 130 where it was interrupted; a bug of ours shows
    its traceback, says where to report it, and exits 1."""
    for o in (sys.stdout, sys.stderr): # a terminal that cannot show a sign shows its code
        if hasattr(o, "reconfigure"): o.reconfigure(errors="backslashreplace")
    interrupted = "interrupted: the same command continues where it stopped"
    try:
        with ended_by_signals():
            if app(standalone_mode=False) == 130: sys.exit(fail(interrupted, 130)) # as typer hands on Ctrl-C
    except KeyboardInterrupt: sys.exit(fail(interrupted, 130))
    except Exception as e:
        if hasattr(e, "format_message"): sys.exit(misused(e))
        from subspace_circuits.files import raised_here, reason
        if raised_here(e): sys.exit(fail(e))
        if isinstance(e, BrokenPipeError): # who reads has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        if isinstance(e, OSError): sys.exit(fail(f"{reason(e)}: make room, or name a place that can be written"))
        if isinstance(e, MemoryError) or any(o in str(e).lower() for o in REFUSED): sys.exit(fail(LESS))
        traceback.print_exc()
        sys.exit(fail("this is a bug of ours: please report the lines above at "
                      "https://github.com/subspace-circuits/subspace_circuits/issues", 1))


def misused(e) -> int:
    "What a command line cannot mean, in one line; the help where nothing was asked."
    if not (said := " ".join(e.format_message().split())) or "Usage:" in said: return e.show() or e.exit_code
    return fail(said[0].lower() + said[1:], e.exit_code)


def fail(message, code: int = 2) -> int:
    "Print one line and give the exit code."
    print(f"subspace-circuits: {message}", file=sys.stderr)
    return code


if __name__ == "__main__": main()
