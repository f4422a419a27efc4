"""The main job on a language model: from a text to the blocks of a window of layers, to the circuit between them, to a
report, in a folder that can be resumed. `run_language` is the whole of it."""
import math, time
from pathlib import Path

import torch
from tqdm.auto import tqdm

from subspace_circuits import __version__
from subspace_circuits.activations import STORE, capture, fingerprint
from subspace_circuits.cards import make_cards
from subspace_circuits.edges import Moments, PartitionedModel
from subspace_circuits.files import one_writer, read_json, rounded, write_json
from subspace_circuits.forward import circuit_sites, parallel, read_site, write_site
from subspace_circuits.keep_only import MODES, KeepOnly
from subspace_circuits.language_report import write_language_report
from subspace_circuits.language_sites import WIDE, grade_site, halves, learn_site
from subspace_circuits.locate import behaviour_pairs, check_behaviour
from subspace_circuits.models import folder_config, model_path, open_model
from subspace_circuits.partition import PARTITION, Partition, massive_rows
from subspace_circuits.pipeline import (
    Clock, check_resumable, claim, folder_of, list_files, own_partition, peak_rss_mb)
from subspace_circuits.search import units
from subspace_circuits.sinks import find_sink, sink_table
from subspace_circuits.stability import baseline_partition
from subspace_circuits.text import TextTask
from subspace_circuits.window_circuits import (
    NextTokens, Window, asked_once, edge_curve, edge_point, edges_needed, judge_behaviour, judge_window, kept_window,
    lone_ablations, read_gradients, reader_partition, survivors, whole_sites, whole_window, window_effects)

__all__ = ["shipped_text", "run_language"]

KINDS = dict(config="run", metrics="metrics", cards="cards", circuit="window circuit", grade="grade", sink="sink",
             progress="progress", seconds="seconds", files="files")
RUN = {f"{k}.json": v for k, v in KINDS.items()} | {
    "report.html": "report", "writer.pid": "lock", "store": STORE, "partitions": {"*": PARTITION}}
LENGTH, SHARDS, SEQUENCES = 128, 6, 32 # Tokens of a window; shards of a capture, and windows in each
LEARN, JUDGE, MOMENTS = 8, 8, 24       # Windows that edges are ranked on, that circuits are judged on, of moments
PROMPTS = 48                           # Prompts of a behaviour: half rank edges, the others judge
WORDS = 1000                           # Tokens from which a vocabulary is one of words
KEPT = .9                              # Share of what a window does that its circuit must bring back
RANKED_AT = (.35, .75)                 # Shares of what the window does at which slopes of edges are taken
METHODS = ("ndm", "readers")           # By distances to nearest neighbours; by what moves and is read
BASES = ("pca", "random")              # What the found blocks are compared with


def shipped_text() -> Path:
    "The text that comes with the package: Northanger Abbey by Jane Austen (1818), in the public domain."
    return Path(__file__).parent/"texts"/"northanger_abbey.txt.gz"


def is_language_model(source: str) -> bool:
    "Whether a folder or a file is of a language model, as far as its configuration says without opening it."
    if str(source).startswith("planted-"): return False
    path = model_path(source)
    if Path(path).suffix.lower() == ".gguf" or (Path(path).is_dir() and any(Path(path).glob("*.gguf"))): return True
    about = folder_config(path)
    return "task" not in about and "model_type" in about and about.get("vocab_size", 0) >= WORDS


def run_language(name: str, out: Path, data: str | None = None, layers: str | None = None, seed: int = 0,
                 method: str = METHODS[0], overwrite: bool = False, resume: bool = False,
                 task: str | None = None) -> dict:
    """Run the main job on a window of layers of a language model, or continue it; the metrics. With a task, the edges
    are those of a behaviour."""
    if method not in METHODS: raise ValueError(f"unknown method {method!r}: use one of {', '.join(METHODS)}")
    if task and layers is None:
        raise ValueError(f"--task {task} needs the layers to look at, as --layers 16-18: `subspace-circuits locate "
                         f"MODEL --task {task}` finds where its answer is carried")
    out, (model, tokenizer) = Path(out), open_model(name)
    some = window_layers(model, layers)
    source = data or str(shipped_text())
    text = TextTask(source, tokenizer, model.cfg.n_ctx)
    length = min(LENGTH, model.cfg.n_ctx)
    read, held = NextTokens(text, length, seed=seed), NextTokens(text, length, held=True, seed=seed)
    sites = window_sites(model, some)
    check_rows(read, len(sites), model)
    asked = behaviour(model, tokenizer, name, task, seed) if task else {}
    job = dict(model=name, seed=seed, data=Path(source).name, version=__version__, model_sha256=fingerprint(model),
               task=read.name, n_layers=model.cfg.n_layers, n_heads=model.cfg.n_heads, d_model=model.cfg.d_model,
               layers=[some[0], some[-1]], sites=sites, method=method, language=True)
    if task: job["behaviour"] = asked["said"]
    if resume: check_resumable(out)
    with one_writer(out):
        if claim(out, job, overwrite, resume, RUN): return read_json(out/"metrics.json", "metrics")
        print(estimate(model, some, sites), flush=True)
        return look_at_window(out, job, model, tokenizer, read, held, asked)


def behaviour(model, tokenizer, name: str, task: str, seed: int) -> dict:
    "Prompts to rank edges on and to judge them on, and what is said of them; refused if the model does not do it."
    test, pairs = next(iter(behaviour_pairs(tokenizer, task, 2*PROMPTS, seed).items()))
    found, n = check_behaviour(model, pairs, name, test), len(pairs)//2
    if n < 8: raise ValueError(f"{task} has {len(pairs)} prompts, 16 are needed: half rank edges, half judge them")
    return dict(rank=pairs.take(slice(0, n)), judge=pairs.take(slice(n, len(pairs))),
                said=dict(task=Path(task).name, test=test, prompts=len(pairs), **found._asdict()))


def look_at_window(out: Path, job: dict, model, tokenizer, task: NextTokens, held: NextTokens, asked: dict) -> dict:
    "Every stage that a claimed folder lacks; the metrics."
    seed, sites, method = job["seed"], job["sites"], job["method"]
    some, length = range(job["layers"][0], job["layers"][1] + 1), task.lengths[1]
    clock = Clock(out/"seconds.json")
    with clock("capture"):
        store = capture(model, task, sites, out/"store", shards=SHARDS, sequences=SEQUENCES, lengths=(length, length),
                        seed=seed)
    with clock("moments"): moments = Moments(model, AskedRows(task), MOMENTS, seed + 1, layers=some)
    with clock("windows"):
        g = torch.Generator().manual_seed(seed)
        learn, judge = (Window(moments.weights, some, o.sample(n, None, g)) for o, n in ((task, LEARN), (held, JUDGE)))
    with clock("partition"): found = partition_window(out, store, sites, seed, job["model_sha256"], method, learn)
    splits = {"found": PartitionedModel(moments, found, some)}
    for k in BASES: splits[k] = PartitionedModel(moments, of_same_sizes(store, found, k, seed), some)
    splits["whole sites"] = whole_sites(splits["found"])
    with clock("circuit"): circuit = window_circuit(splits, learn, judge, out/"circuit.json", seed, asked)
    with clock("sink"): sink = write_sink(out, judge, splits, seed)
    with clock("cards"): cards = write_cards(out, store, tokenizer, splits["found"], sites, learn, seed)
    middle = sites[len(sites)//2]
    with clock("grade"): grade = write_grade(out, store, found, middle, seed, fit_again(found[middle], learn, seed))
    metrics = dict(circuit={k: v for k, v in circuit.items() if k != "edges"}, grade=grade, named=named(cards),
                   sink={k: sink[k] for k in ("maker", "needed", "enough") if k in sink},
                   sites={s: site_facts(p) for s, p in found.items()}, seconds=clock.seconds,
                   peak_rss_mb=peak_rss_mb())
    write_json(out/"metrics.json", rounded(metrics), "metrics")
    write_json(out/"config.json", job | dict(rows=len(store)), "run")
    write_language_report(out)
    list_files(out, RUN)
    return read_json(out/"metrics.json", "metrics")


class AskedRows:
    """A task whose rows are those that are asked, for moments: a sink at the first position is hundreds of times as
    long as others, and a mean with it is the sink's."""
    def __init__(self, task: NextTokens): self.task, self.name, self.lengths = task, task.name, task.lengths

    def sample(self, *args, **more):
        "Draw windows of which only the asked positions count."
        batch = self.task.sample(*args, **more)
        return batch._replace(real=batch.scored)


def window_layers(model, layers: str | None) -> range:
    "The layers of a window: as they are asked for, as 10-12, or the middle three."
    n = model.cfg.n_layers
    if layers is None:
        first = max(0, (n - 3)//2)
        return range(first, min(n, first + 3))
    parts = layers.split("-")
    if not 1 <= len(parts) <= 2 or not all(o.isdigit() for o in parts):
        raise ValueError(f"layers {layers!r}: write the first and the last, as 10-12")
    first, last = int(parts[0]), int(parts[-1])
    if not first <= last < n:
        raise ValueError(f"layers {layers}: this model has layers 0 to {n - 1}, write two of them, the first one first")
    return range(first, last + 1)


def window_sites(model, layers: range) -> list[str]:
    "The sites that a window reads and writes, in order."
    whole = model.cfg.attn_only or parallel(model)
    touched = {s for i in layers for s in (read_site(i), write_site(i, whole), read_site(i + 1))}
    return [o for o in circuit_sites(model) if o in touched]


def check_rows(task: NextTokens, n_sites: int, model):
    "Refuse a text that gives fewer rows than a site needs, and a window whose rows memory cannot hold."
    rows, d = min(len(task.found), SHARDS*SEQUENCES)*task.lengths[1], model.cfg.d_model
    if rows < 16*d:
        raise ValueError(f"{task.text.source} gives {rows} rows, {16*d} are needed for {d} dimensions: pass a text of "
                         f"at least {math.ceil(16*d/(1 - .2))} tokens")
    need, free = needed_gb(model, n_sites), free_gb()
    if free is not None and need > free:
        raise ValueError(f"this window needs about {need:.1f} GB, {free:.1f} GB are free: ask for fewer layers")


def needed_gb(model, n_sites: int) -> float:
    "What a run holds at most: twice the weights, rows of a site, logits of two batches of windows, moments of heads."
    c = model.cfg
    weights = 8*sum(o.numel() for o in model.parameters())
    logits = 4*c.d_vocab*LENGTH*(LEARN + JUDGE + 16)
    moments = 4*c.d_model**2*(n_sites//2 + 1)*(c.n_heads + 8)
    return (weights + logits + moments + 20*SHARDS*SEQUENCES*LENGTH*c.d_model)/2**30 + .5


def free_gb() -> float | None:
    "Memory that is available, where the system says so."
    file = Path("/proc/meminfo")
    if not file.exists(): return None
    found = [o for o in file.read_text().splitlines() if o.startswith("MemAvailable")]
    return int(found[0].split()[1])/2**20 if found else None


def estimate(model, layers: range, sites: list) -> str:
    "What a run will take, from a product of two matrices that is timed first."
    c, side = model.cfg, 1024
    x = torch.randn(side, side)
    x@x
    start = time.perf_counter()
    for _ in range(4): x@x
    speed = 8*side**3/(time.perf_counter() - start)
    n = sum(o.numel() for o in model.parameters())
    blocks, d, tokens = c.d_model//WIDE.unit, c.d_model, LENGTH*SHARDS*SEQUENCES
    steps = WIDE.steps*(WIDE.keys*d*(WIDE.queries*2 + d/2) + 8*WIDE.queries*d*d + 7*d**3)*(len(sites) + 2)
    kept = 2*LENGTH*JUDGE*12*len(BASES)*(n + len(layers)*blocks*3*d*(c.d_mlp or 4*d))
    work = 2*n*tokens*layers[-1]/c.n_layers + steps + kept + 2*n*LENGTH*(LEARN*80 + JUDGE*12)
    return (f"layers {layers[0]}-{layers[-1]}, {len(sites)} sites: about {needed_gb(model, len(sites)):.0f} GB and "
            f"{max(1, work/speed/.4/60):.0f} minutes at {speed/1e9:.0f} GFLOP/s")


def partition_window(out: Path, store, sites: list, seed: int, weights: str, method: str,
                     learn: Window) -> dict[str, Partition]:
    "Find the partitions that are not there yet; all of them, by site."
    todo = [o for o in sites if not (folder_of(out, o)/"partition.json").exists()]
    slopes = read_gradients(learn, torch.Generator().manual_seed(seed)) if todo and method == "readers" else {}
    for site in tqdm(todo, desc="partition"):
        if method == "readers":
            h = plain_rows(store, site)
            p = reader_partition(h, slopes[site], site, units(h.shape[1], min(WIDE.unit, h.shape[1]//2)), weights, seed)
            p.info["massive"] = dict(rows=len(store) - len(h), times=round(massive_rows(store[site])[1], 1), kept=False)
        else: p = learn_site(store[site], site, seed, weights)
        p.save_pretrained(folder_of(out, site))
    return {o: own_partition(out, o, seed, weights) for o in sites}


def plain_rows(store, site: str) -> torch.Tensor:
    "Rows of a site without those of another order."
    h = store[site]
    return h[~massive_rows(h)[0]]


def of_same_sizes(store, found: dict, kind: str, seed: int) -> dict[str, Partition]:
    "A baseline at every site, cut into the sizes that were found; fitted on the text."
    return {s: baseline_partition(plain_rows(store, s), s, list(p.sizes.values()), kind, seed)
            for s, p in found.items()}


def window_circuit(splits: dict, learn: Window, judge: Window, file: Path, seed: int, asked: dict) -> dict:
    """Screen components, rank edges, and measure what the first of them bring back, for every way to cut; on the text,
    or on the prompts of a behaviour."""
    if file.exists(): return read_json(file, "window circuit")
    if asked: learn, judge = (Window(learn.w, learn.layers, asked_once(asked[k]), rows=16) for k in ("rank", "judge"))
    done = Progress(file.with_name("progress.json"))
    alone = done("components", lambda: {k: dict(kl=v.mean(), error=v.error())
                                        for k, v in lone_ablations(splits["found"], learn).items()})
    alive = survivors({k: v["kl"] for k, v in alone.items()})
    none = done("none", lambda: edge_point_of_none(splits["whole sites"], judge))
    loss = done("loss", lambda: whole_loss(judge))
    edges = window_effects(splits, learn, torch.Generator().manual_seed(seed), set(alive), RANKED_AT, 1)
    curves, needed = {}, {}
    for k, split in splits.items():
        curves[k] = done(f"curve of {k}", lambda: edge_curve(split, judge, edges[k], none["kl"]))
        needed[k] = done(f"needed of {k}", lambda: edges_needed(split, judge, edges[k], none["kl"], curves[k], KEPT))
    found = dict(components=alone, alive=alive, none=none, goal=KEPT, candidates={k: len(v) for k, v in edges.items()},
                 curves=curves, needed=needed, loss=loss, edges=edges["found"][:needed["found"]["n"]][:2000],
                 tokens=dict(ranked=int(learn.batch.scored.sum()), judged=int(judge.batch.scored.sum())))
    if asked: found["behaviour"] = behaviours(splits, judge, asked["judge"], edges, needed)
    write_json(file, rounded(found, 8), "window circuit")
    done.file.unlink()
    return read_json(file, "window circuit")


def behaviours(splits: dict, judge: Window, pairs, edges: dict, needed: dict) -> dict:
    "What is left of a behaviour with the whole window, with none of it and with each circuit, for each mode."
    def kept(split, ranked, mode):
        return judge_behaviour(judge, kept_window(judge, KeepOnly(split, ranked, mode)), pairs)
    modes = {o: {"none": kept(splits["whole sites"], [], o)} for o in MODES}
    for o, found in modes.items():
        for k, split in splits.items(): found[k] = kept(split, edges[k][:needed[k]["n"]], o)
    return dict(whole=judge_behaviour(judge, whole_window(judge), pairs), **modes)


class Progress:
    "Steps of a stage, kept on disk so that an interrupted run goes on behind the last."
    def __init__(self, file: Path):
        self.file, self.held = file, read_json(file, "progress") if file.exists() else {}

    def __call__(self, name: str, make):
        "What a step gave, made now if it has not been made."
        if name not in self.held:
            self.held[name] = make()
            write_json(self.file, self.held, "progress")
        return self.held[name]


def edge_point_of_none(split, judge: Window) -> dict:
    "What a window costs without any edge."
    found = edge_point(split, judge, [], 0, 1.)
    return {k: found[k] for k in ("kl", "error", "loss", "right")}


def whole_loss(judge: Window) -> dict:
    "Loss and share of right tokens of the whole model."
    found = judge_window(judge, whole_window(judge))
    return dict(loss=found.mean("loss"), right=found.mean("right"))


def write_sink(out: Path, judge: Window, splits: dict, seed: int) -> dict:
    "Which component of the window makes rows of another order, and of which subspace it does; empty if none."
    file = out/"sink.json"
    if file.exists(): return read_json(file, "sink")
    found = find_sink(judge)
    ours, pca = (splits[k].partitions for k in ("found", "pca"))
    made = sink_table(judge, found, ours[found.read], seed, rivals={"PCA": pca[found.read]}) if found else {}
    write_json(file, rounded(made), "sink")
    return read_json(file, "sink")


def write_cards(out: Path, store, tokenizer, split, sites: list, window: Window, seed: int) -> dict:
    "Cards of every site; at the middle site with what is lost when a subspace is another row's."
    file = out/"cards.json"
    if file.exists(): return read_json(file, "cards")
    cards = {}
    for i, s in enumerate(sites):
        plain = ~massive_rows(store[s])[0]
        some = make_cards(store, tokenizer, split, s, plain, window if i == len(sites)//2 else None, seed=seed)
        cards[s] = [vars(o) for o in some]
    write_json(file, rounded(cards, 5), "cards")
    return read_json(file, "cards")


def write_grade(out: Path, store, found: dict, site: str, seed: int, fit) -> dict:
    "The graded verdict on the middle site: found blocks beside PCA, ICA and random ones, on rows that none has seen."
    file = out/"grade.json"
    if file.exists(): return read_json(file, "grade")
    h = plain_rows(store, site)
    cut, p = round(.8*len(h)), found[site]
    sizes, g = list(p.sizes.values()), torch.Generator().manual_seed(seed)
    ndm = learn_site(h[:cut], site, seed) if p.info["method"] == "readers" else p
    few = {"ica": 8000} # it takes minutes on more
    cuts = {"found": p, "ndm": ndm} | {k: baseline_partition(h[:cut][:few.get(k)], site, sizes, k, seed)
                                       for k in (*BASES, "ica")}
    graded = grade_site(h[cut:], cuts, g)
    def pca(o, s): return baseline_partition(o, s, sizes, "pca", seed)
    seeds = iter((seed, seed + 1))
    def chance(o, s): return baseline_partition(o, s, sizes, "random", next(seeds))
    overlap = dict(found=halves(h, site, fit), pca=halves(h, site, pca), random=halves(h, site, chance))
    done = dict(site=site, rows=len(h) - cut, graded=graded, halves=overlap["found"],
                stability={k: sum(v.values())/len(v) for k, v in overlap.items()})
    write_json(file, rounded(done), "grade")
    return read_json(file, "grade")


def fit_again(p: Partition, learn: Window, seed: int):
    "Fit the site of a partition again by the same method, on other rows; each time with other drawn answers."
    if p.info["method"] != "readers": return lambda h, site: learn_site(h, site, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    def fit(h, site):
        return reader_partition(h, read_gradients(learn, generator, 1)[site], site, list(p.sizes.values()))
    return fit


def site_facts(p: Partition) -> dict:
    "What a report says of a partition."
    return {k: p.info.get(k) for k in ("rows", "massive", "verdict", "start", "starts", "looks", "objective")} | dict(
        sizes=p.sizes)


def named(cards: dict) -> dict:
    "How many subspaces of each site have a name."
    return {s: [sum(bool(o["suggested"]) for o in some), len(some)] for s, some in cards.items()}
