"""The main job: a model with a task, from activations to subspaces to a circuit to a report, in a folder that can be
resumed. `run` is the whole of it; what it calls stands below it, in the order in which it is called."""
import math, resource, sys, time
from pathlib import Path

import torch
from tqdm.auto import tqdm

from subspace_circuits import __version__
from subspace_circuits.activations import STORE, ActivationStore, capture, fingerprint, live, read_by
from subspace_circuits.adversary import STEPS, attack_curves
from subspace_circuits.circuit_benchmark import key_grades, ranked, reported
from subspace_circuits.circuit_graph import add_examples, save_circuit, to_graph
from subspace_circuits.circuits import find_circuit
from subspace_circuits.dependence import determination, subspace_information
from subspace_circuits.edges import Moments, PartitionedModel
from subspace_circuits.explorer import readable
from subspace_circuits.files import (
    check, kind_of, left_over, one_writer, read_json, remove, rounded, sha256, walk,
    write_json)
from subspace_circuits.forward import Weights, circuit_sites, parallel
from subspace_circuits.growth import grow_partition, learn_partition
from subspace_circuits.keep_only import KeepOnly, divergence
from subspace_circuits.known_circuits import KnownCircuit, decode, null_model
from subspace_circuits.models import folder_config, model_path
from subspace_circuits.own_tasks import Asked, open_job
from subspace_circuits.partition import (
    PARTITION, Partition, between_class, judge_shares, key_shares, massive_rows, name_subspaces, variable_shares)
from subspace_circuits.preimages import INDEX
from subspace_circuits.report import write_report
from subspace_circuits.search import stored_sequences, written
from subspace_circuits.stream_variables import variables_or_none
from subspace_circuits.tasks import PairTask
from subspace_circuits.text import open_planted
from subspace_circuits.toy_models import Task, accuracy, attention, head_scores, load_model
from subspace_circuits.workers import in_workers

__all__ = ["run", "attack_run"]

# What a run's folder holds, for `owned`: of each file what it is, of each folder what that holds.
# Once a run is finished, files.json lists all of it by hash but the index, which explore makes.
JSONS = dict(config="run", metrics="metrics", partitions="evidence", circuit="circuit", attention="attention",
             control="control", attack="attack", seconds="seconds", files="files")
RUN = {f"{k}.json": v for k, v in JSONS.items()} | {
    "report.html": "report", "writer.pid": "lock", "store": STORE, "control": STORE, "partitions": {"*": PARTITION},
    "index": {"*": INDEX}}


def run(name: str, out: Path, seed: int = 0, overwrite: bool = False, resume: bool = False,
        asked: str | None = None) -> dict:
    "Run the main job on a model and a task (its own if none is asked for) into a folder, or continue it; the metrics."
    torch.set_num_threads(1)
    model, task, known, answered = opened(name, asked)
    Weights(model) # what cannot be read is refused before anything is captured
    out, sites = Path(out), run_sites(model, known)
    job = dict(model=name, seed=seed, asked=asked, version=__version__, model_sha256=fingerprint(model), task=task.name,
               n_layers=model.cfg.n_layers, n_heads=model.cfg.n_heads, d_model=model.cfg.d_model, sites=sites)
    if not overwrite and (out/"files.json").exists() and claim(out, job, overwrite, resume):
        return read_json(out/"metrics.json", "metrics") # nothing is written: the folder may be one that cannot be
    if resume: check_resumable(out)
    with one_writer(out):
        if claim(out, job, overwrite, resume): return read_json(out/"metrics.json", "metrics")
        return carry_out(out, job, model, task, known, answered)


def carry_out(out: Path, job: dict, model, task: Task, known: KnownCircuit | None, answered: Asked | None) -> dict:
    "Every stage that a claimed folder lacks; the metrics."
    name, seed, sites = job["model"], job["seed"], job["sites"]
    clock = Clock(out/"seconds.json")
    with clock("capture"):
        store = capture(model, read_by(model, task), sites, out/"store", sequences=sequences_of(task), seed=seed)
    with clock("partition"): partitions = partition_sites(name, out, job)
    with clock("evidence"): evidence = write_evidence(out, store, partitions, task, known, seed)
    with clock("circuit"): split, edges, found = wire(out, model, task, partitions, seed)
    with clock("keep-only"): scores = keep_only_scores(split, task, edges)
    key = against_key(known, partitions, edges, found) if known else {}
    said = dict(asked=dict(task=task.name, said=str(answered), **answered._asdict())) if answered else {}
    write_metrics(out, model, task, evidence, said | scores, circuit_counts(edges, found), key, clock.seconds, seed)
    write_json(out/"config.json", job | dict(rows=len(store), settings=dict(price=found["price"])), "run")
    write_report(out)
    list_files(out)
    return read_json(out/"metrics.json", "metrics")


def attack_run(out: Path, most: int = STEPS[-1]) -> dict[str, list]:
    """Attack the circuit of a finished run with up to so many steps, keep each result as it comes, and draw all into
    its report; nats by what was attacked and steps."""
    torch.set_num_threads(1)
    out, steps = Path(out), tuple(o for o in STEPS if o <= most)
    if not steps: raise ValueError(f"{most} steps are too few: the shortest attack has {STEPS[0]}")
    if not (out/"config.json").exists() or not finished(out):
        raise ValueError(f"{out} holds no finished run: name a folder that run has finished")
    job = read_json(out/"config.json", "run")
    model, task, *_ = opened(job["model"], job["asked"])
    if fingerprint(model) != job["model_sha256"]:
        raise ValueError(f"{job['model']} is another model than {out} was made of: run it again")
    partitions = {o: own_partition(out, o, job["seed"], job["model_sha256"]) for o in job["sites"]}
    split = PartitionedModel(Moments(model, task, seed=job["seed"]), partitions)
    kept, found = find_circuit(split, task, seed=job["seed"])
    if not kept: raise ValueError(f"the circuit of {out} has no edge: there is nothing to pin")
    curves = read_json(out/"attack.json", "attack") if (out/"attack.json").exists() else {}
    for curves in attack_curves(split, task, kept, found["candidates"], steps, job["seed"], curves):
        write_json(out/"attack.json", rounded(curves), "attack")
    write_report(out)
    list_files(out)
    return curves


def opened(name: str, asked: str | None = None) -> tuple[torch.nn.Module, Task, KnownCircuit | None, Asked | None]:
    "A model, its task, its answer key if it was planted, and how it answered if it was asked."
    known = open_planted(name)
    model, task, answered = open_job(name, task=asked)
    if known: model, task = known.model, known.task
    return model, task, known, answered


def trials(task: Task, n_ctx: int) -> dict[str, tuple[Task, tuple[int, int]]]:
    """What circuits are tried on: held-out pairs, or lists up to twice as long as any of the task's, where there are
    such."""
    lo, hi = task.lengths
    if not getattr(task, "sized", True): return {"prompts": (task, (lo, hi))}
    if isinstance(task, PairTask):
        more = {"held-out pairs": (task.held_out(), (lo, hi))} if task.args["held_out"] else {}
        return {"trained pairs": (task, (lo, hi))} | more
    longest = next(o for o in range(2*hi, hi - 1, -1) if fits(task, o, n_ctx))
    return {f"{a}-{b}": (task, (a, b)) for a, b in ((lo, hi), (hi + 1, longest)) if a <= b}


def fits(task: Task, length: int, n_ctx: int) -> bool:
    "Whether a task has lists of some length that a model can read."
    try: task.sample(1, (length, length), torch.Generator().manual_seed(0), n_ctx)
    except ValueError: return False
    return True


def run_sites(model, known: KnownCircuit | None) -> list[str]:
    """The sites between components, in order; what the last layer writes only the logits read: learned where a key
    says what it is, or nothing else stands behind the heads."""
    sites = circuit_sites(model)
    return sites if known or model.cfg.attn_only or parallel(model) else sites[:-1]


def sequences_of(task: Task, shards: int = 6, rows: int = 30_000) -> int:
    "How many sequences a shard takes: 128, or more if they are short."
    real = task.sample(200, generator=torch.Generator().manual_seed(0)).real.sum().item()/200
    return max(128, math.ceil(rows/shards/real))


def check_resumable(out: Path):
    "Refuse to continue what was not begun."
    if not (out/"config.json").exists():
        raise ValueError(f"nothing to resume in {out}: it holds no run; leave out --resume to start one")


def claim(out: Path, job: dict, overwrite: bool, resume: bool, layout: dict = RUN) -> bool:
    "Make or check the run folder, which this process has locked; True if it already holds this run, finished."
    file = out/"config.json"
    if overwrite: remove(out, layout)
    if resume: check_resumable(out)
    if not file.exists():
        held = [o for o in out.iterdir() if o.name != "writer.pid" and not left_over(o)] if out.is_dir() else [out]
        if out.exists() and held:
            raise ValueError(f"{out} holds something else: name an empty or a new folder")
        out.mkdir(parents=True, exist_ok=True)
        write_json(file, job, "run")
        return False
    if kind_of(file) != "run":
        raise ValueError(f"{out} holds something else, its config.json is not of a run as this version writes it: "
                         "name an empty or a new folder")
    theirs = read_json(file, "run")
    for k, v in job.items():
        if theirs.get(k) != v:
            raise ValueError(f"{out} holds a run with {k} {theirs.get(k)!r}, not {v!r}: name another folder, or pass "
                             f"--overwrite")
    whole = finished(out)
    for o in [] if whole else [o for o, _ in walk(out, layout) if left_over(o)]: o.unlink()
    return whole


def finished(out: Path) -> bool:
    "Whether a run has written its last file and still has all; then each must be as it was written."
    file = out/"files.json"
    listed = read_json(file, "files") if file.exists() else {}
    if whole := bool(listed) and all((out/o).exists() for o in listed):
        for k, v in listed.items(): check(out/k, v, again=True)
    else: file.unlink(missing_ok=True)
    return whole


class Clock:
    "Seconds per stage, kept on disk so that a resumed run still knows what the first part took."
    def __init__(self, file: Path):
        self.file, self.seconds = file, read_json(file, "seconds") if file.exists() else {}

    def __call__(self, stage: str):
        self.stage, self.start = stage, time.perf_counter()
        return self

    def __enter__(self): return self

    def __exit__(self, *error):
        self.seconds[self.stage] = round(self.seconds.get(self.stage, 0) + time.perf_counter() - self.start, 1)
        write_json(self.file, self.seconds, "seconds")


def folder_of(out: Path, site: str) -> Path:
    "Where the partition of a site is kept: `x0.mid` for `blocks.0.hook_resid_mid`."
    _, layer, hook = site.split(".")
    return out/"partitions"/f"x{layer}.{hook.rsplit('_', 1)[1]}"


def own_partition(out: Path, site: str, seed: int, weights: str) -> Partition:
    "The partition of a site, which must be this run's."
    p = Partition.from_pretrained(folder_of(out, site))
    found, asked = (p.site, p.info.get("seed"), p.info.get("weights")), (site, seed, weights)
    if found != asked:
        raise ValueError(f"{folder_of(out, site)} holds the partition of {found}, not of {asked}: "
                         "remove it, and it is made again")
    return p


def partition_sites(name: str, out: Path, job: dict) -> dict[str, Partition]:
    """Find the partitions that are not there yet, and the control's: what weights do not divide, and the control, two
    processes at a time; all of them, by site."""
    sites, seed, asked = job["sites"], job["seed"], job["asked"]
    left = [o for o in sites if not (folder_of(out, o)/"partition.json").exists()]
    model, task, known, _ = opened(name, asked)
    if left and (found := variables_or_none(model, task, seed)):
        for o in left: keep_partition(found[o], ActivationStore(out/"store"), out, task, known)
        left = []
    jobs = [(partition_site, (name, str(out), o, seed, asked)) for o in left]
    if not (out/"control.json").exists(): jobs.append((control_job, (name, str(out), seed, asked)))
    if jobs: list(tqdm(in_workers(jobs), total=len(jobs), desc="partition, and control"))
    return {o: own_partition(out, o, seed, job["model_sha256"]) for o in sites}


def partition_site(name: str, out: str, site: str, seed: int, asked: str | None = None):
    "Search the partition of one site, name and store it."
    torch.set_num_threads(1)
    store, (model, task, known, _) = ActivationStore(Path(out)/"store"), opened(name, asked)
    rows = site_rows(store, site, known)
    h, quiet = store[site][rows], rows.clone()
    quiet[rows.nonzero()[:, 0][massive_rows(h)[0]]] = False # as `learn_partition` sets them aside
    wrote = written(model, stored_sequences(store, quiet), [site])[site]
    p = learn_partition(h, site, seed, weights=store.info["capture"]["weights"], written=wrote)
    keep_partition(p, store, Path(out), task, known)


def keep_partition(p: Partition, store: ActivationStore, out: Path, task: Task, known: KnownCircuit | None):
    "Name a partition's subspaces after what they hold of the known variables, and store it."
    rows = site_rows(store, p.site, known)
    h = store[p.site][rows]
    name_subspaces(p, h, labels(store, rows, h, p.site, task, known)).save_pretrained(folder_of(out, p.site))


def site_rows(store: ActivationStore, site: str, known: KnownCircuit | None) -> torch.Tensor:
    "Which rows of a site count: those that can reach an answer, or all where a key speaks of all."
    rows = live(store, site, 1 + max(int(o.split(".")[1]) for o in store.sites))
    return torch.ones_like(rows) if known else rows


def labels(store: ActivationStore, rows: torch.Tensor, h: torch.Tensor, site: str, task: Task,
           known: KnownCircuit | None) -> dict[str, torch.Tensor]:
    "The values of every known variable at some rows of a site: the key's, or the task's."
    return decode(known, h, site) if known else {k: store.column(k)[rows] for k in task.variables(task.sample(1))}


def untrained(name: str, model, known: KnownCircuit | None, seed: int):
    """The model before training, or a planted one with random weights of the same size; none of a model that came from
    elsewhere."""
    if known: return null_model(model, "untrained", seed)
    path = model_path(name)
    return load_model(str(path), trained=False)[0] if "task" in folder_config(path) else None


def control_job(name: str, out: str, seed: int, asked: str | None = None):
    "The same procedure on the model before training: what is kept, and how it answers."
    torch.set_num_threads(1)
    full, task, known, _ = opened(name, asked)
    if (model := untrained(name, full, known, seed)) is None: return write_json(Path(out)/"control.json", {}, "control")
    folder, sites = Path(out)/"control", run_sites(model, known)
    store = capture(model, read_by(model, task), sites, folder, shards=3, sequences=sequences_of(task), seed=seed)
    partitions = {o: grow_partition(store[o][site_rows(store, o, known)], o, seed, pools=(256, 1024)) for o in sites}
    split = PartitionedModel(Moments(model, task, seed=seed), partitions)
    edges, _ = find_circuit(split, task, seed=seed)
    keep = KeepOnly(split, edges)
    result = dict(n_edges=len(edges), n_significant=significant(edges),
                  accuracy={k: accuracy(keep, *test, n=100) for k, test in trials(task, model.cfg.n_ctx).items()})
    remove(folder, STORE)
    write_json(Path(out)/"control.json", result, "control")


def significant(edges: list) -> int:
    "Number of edges that random components would hardly have."
    return sum(o["p"] is not None and o["p"] <= .05 for o in edges)


def write_evidence(out: Path, store: ActivationStore, partitions: dict, task: Task, key: KnownCircuit | None,
                   seed: int) -> dict:
    "Measure every partition and write the matrices beside it; what is said of each, by site."
    evidence = {o: site_evidence(store, p, task, key, seed) for o, p in partitions.items()}
    write_json(out/"partitions.json", {k: v["matrices"] for k, v in evidence.items()}, "evidence")
    return {k: v["summary"] for k, v in evidence.items()}


def site_evidence(store: ActivationStore, p: Partition, task: Task, key: KnownCircuit | None, seed: int) -> dict:
    "What a report says of one partition: sizes, what is encoded, and how the subspaces depend on one another."
    rows, g = site_rows(store, p.site, key), torch.Generator().manual_seed(seed)
    h = store[p.site][rows]
    known = labels(store, rows, h, p.site, task, key)
    share, null = determination(p, h, g), determination(p, h, g, shuffle=True).abs().max().item()
    mi, mi_null = subspace_information(p, h, g) if len(p.names) > 1 else (torch.zeros(1, 1), None)
    total = h.var(0).sum()
    presence = {k: (between_class(h, v).trace()/total).item() for k, v in known.items()}
    # a planted variable may be quiet beside its decoys
    present = {k: v for k, v in known.items() if presence[k] >= (.001 if key else .05)}
    return dict(
        summary=dict(n_subspaces=len(p.names) - ("rest" in p.names), objective=p.info.get("objective"), sizes=p.sizes,
                     presence=presence,
                     variables=variable_shares(p, h, present),
                     variance={k: (v.var(0).sum()/total).item() for k, v in p.split(h).items()},
                     verdict=p.info["verdict"], cuts=p.info.get("cuts", []), null=null),
        matrices=rounded(dict(names=p.names, determination=share.tolist(), mutual_information=mi.tolist(),
                              mutual_information_null=mi_null)))


def wire(out: Path, model, task, partitions: dict, seed: int) -> tuple[PartitionedModel, list, dict]:
    "Find the circuit between partitions and write its graph; the model with both, the edges, and how they were chosen."
    split = PartitionedModel(Moments(model, task, seed=seed), partitions)
    edges, found = find_circuit(split, task, seed=seed)
    save_circuit(add_examples(to_graph(split, edges, found), split, task, seed=seed), out/"circuit.json")
    return split, edges, found


def keep_only_scores(split: PartitionedModel, task, edges: list) -> dict:
    """Accuracy of the model, of the keep-only model and of none, on what was trained and on what was not; KL of the
    keep-only model."""
    model, tests = split.model, trials(task, split.model.cfg.n_ctx)
    models = dict(full=model, keep_only=KeepOnly(split, edges), null=KeepOnly(split, []))
    scores = {k: {name: accuracy(o, *test, n=300, seed=5) for name, test in tests.items()} for k, o in models.items()}
    return dict(accuracy=scores, kl={k: divergence(model, models[k], task, seed=5) for k in ("keep_only", "null")})


def circuit_counts(edges: list, found: dict) -> dict:
    "Counts, curve and choice of a circuit."
    curve = [o for o in found["curve"] if o["stage"] != "budget" or o["epsilon"] in (0, found["epsilon"])]
    return dict(n_edges=len(edges), n_candidates=len(found["candidates"]),
                n_significant=significant(found["candidates"]), curve=curve,
                chosen=[o["stage"] for o in curve].index("circuit"),
                budget={k: found[k] for k in ("epsilon", "price", "significant", "asked", "able", "wrong")})


def against_key(known: KnownCircuit, partitions: dict, edges: list, found: dict) -> dict:
    """What an answer key says of subspaces and circuit, strictly and without excuse; average precision over types of
    edges."""
    measured, scores, circuit = key_shares(known, partitions), ranked(edges, found["candidates"]), {}
    homes = judge_shares(known, measured)
    for name, graded in key_grades(known, partitions, homes, scores, reported(scores)).items():
        precision = list(graded["precision"].values())
        circuit |= {f"{name}_average_precision": sum(precision)/len(precision), f"{name}_exact": graded["exact"]}
    one_block = {site: ({k: {"all": 1.} for k in shares}, values) for site, (shares, values) in measured.items()}
    return dict(circuit=circuit, partition=dict(
        variables=len(homes), isolated=sum(o.isolated for o in homes.values()),
        isolated_no_excuse=sum(o.no_excuse for o in homes.values()),
        isolated_one_block=sum(o.isolated for o in judge_shares(known, one_block).values()),
        homes=[dict(site=site, variable=k) | o._asdict() for (site, k), o in homes.items()]))


def write_metrics(out: Path, model, task, evidence: dict, scores: dict, counts: dict, key: dict, seconds: dict,
                  seed: int):
    "Write what the run measured, and the attention patterns of one sequence."
    write_json(out/"attention.json", shown_attention(model, task, seed), "attention")
    batch = task.sample(200, generator=torch.Generator().manual_seed(seed))
    control = read_json(out/"control.json", "control")
    circuit = counts | key.get("circuit", {}) | dict(kl_keep_only=scores["kl"]["keep_only"], control=control)
    metrics = dict(**scores, head_scores=head_scores(model, batch, task.jobs(batch)), sites=evidence, circuit=circuit,
                   partition=key.get("partition", {}), seconds=seconds, peak_rss_mb=peak_rss_mb())
    write_json(out/"metrics.json", rounded(metrics), "metrics")


def list_files(out: Path, layout: dict = RUN):
    "List every file of a finished run by its hash."
    listed = [o for o, ours in walk(out, layout)
              if ours and out/"index" not in o.parents and o != out/"files.json" and kind_of(o) != "lock"]
    write_json(out/"files.json", {o.relative_to(out).as_posix(): sha256(o) for o in listed}, "files")


def shown_attention(model, task, seed: int) -> dict:
    "Attention patterns on one short sequence."
    lo, hi = task.lengths
    batch = task.sample(1, (max(lo, min(8, hi)),)*2, torch.Generator().manual_seed(seed))
    patterns = attention(model, batch)[:, :, 0]
    return dict(tokens=[readable(getattr(task, "tokenizer", None), o) for o in batch.tokens[0].tolist()],
                patterns=[dict(component=f"L{i}H{j}", pattern=rounded(patterns[i, j].tolist()))
                          for i in range(len(patterns)) for j in range(len(patterns[i]))])


def peak_rss_mb() -> int:
    "Peak memory of this process and of two workers together, in MB."
    unit = 2**20 if sys.platform == "darwin" else 2**10
    own, child = (resource.getrusage(o).ru_maxrss for o in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return round((own + 2*child)/unit)
