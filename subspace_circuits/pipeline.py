"The main job: a bundled model from activations to subspaces to a circuit to a report, in a folder that can be resumed."
import json, resource, shutil, sys, time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm.auto import tqdm

from subspace_circuits import __version__
from subspace_circuits.activations import ActivationStore, _write_json, capture, fingerprint, live
from subspace_circuits.circuit_graph import add_examples, save_circuit
from subspace_circuits.circuits import KeepOnly, Moments, circuit_sites, divergence, find_circuit, to_graph
from subspace_circuits.partition import Partition, between_class, determination, grow_partition, learn_partition, mutual_information_matrix, name_subspaces, stored_sequences, variable_shares, written
from subspace_circuits.report import write_report
from subspace_circuits.toy_models import accuracy, attention, head_scores, load_model, model_configs

__all__ = ["run"]

labels = ("token", "previous token", "position", "output")


def run(name: str, out: Path, seed: int = 0, overwrite: bool = False, resume: bool = False) -> dict:
    "Run the main job on a bundled model into a folder, or continue it; returns the metrics."
    torch.set_num_threads(1)
    model, task, config = load_model(name)
    lengths, sites = list_lengths(name, config), run_sites(model)
    job = dict(model=name, seed=seed, version=__version__, model_sha256=fingerprint(model), task=task.name, n_layers=model.cfg.n_layers,
               n_heads=model.cfg.n_heads, d_model=model.cfg.d_model, sites=sites)
    if claim(Path(out), job, overwrite, resume): return json.loads((Path(out)/"metrics.json").read_text())
    out, clock = Path(out), Clock(Path(out)/"seconds.json")
    with clock("capture"): store = capture(model, task, sites, out/"store", seed=seed)
    with clock("partition"): partition_sites(name, out, sites, seed, lengths)
    partitions = {o: Partition.from_pretrained(folder_of(out, o)) for o in sites}
    with clock("evidence"): evidence = {o: site_evidence(store, partitions[o], model.cfg.n_layers, seed) for o in sites}
    with clock("circuit"):
        moments = Moments(model, task, seed=seed)
        edges, found = find_circuit(model, task, moments, partitions, seed=seed)
        graph = add_examples(to_graph(model, moments, partitions, edges, found), model, task, partitions, seed=seed)
    with clock("keep-only"): scores = faithfulness(model, task, moments, partitions, edges, lengths)
    control = json.loads((out/"control.json").read_text())
    _write_json(out/"partitions.json", {k: v["matrices"] for k, v in evidence.items()})
    save_circuit(graph, out/"circuit.json")
    _write_json(out/"attention.json", example(model, task, seed))
    batch = task.sample(200, generator=torch.Generator().manual_seed(seed))
    metrics = dict(**scores, head_scores=head_scores(model, batch), sites={k: v["summary"] for k, v in evidence.items()},
                   circuit=summary(edges, found) | dict(kl_keep_only=scores["kl"]["keep_only"], control=control),
                   seconds=clock.seconds, peak_rss_mb=peak_rss_mb())
    _write_json(out/"config.json", job | dict(rows=len(store), settings=dict(price=found["price"])))
    _write_json(out/"metrics.json", rounded(metrics))
    write_report(out)
    return json.loads((out/"metrics.json").read_text())


def list_lengths(name: str, config: dict) -> dict[str, tuple[int, int]]:
    "Trained and longer lengths of the lists a model was scored on."
    fits = {k: v for k, v in model_configs().items() if scored_on(v)}
    if not scored_on(config): raise ValueError(f"the main job asks for longer lists than were trained on and reads through layer norm, which {name} does not have: use one of {', '.join(fits)}")
    return scored_on(config)


def scored_on(config: dict) -> dict[str, tuple[int, int]]:
    "Name to shortest and longest list, nothing for other tasks or for models without layer norm or MLPs."
    plain = config["model"].get("attn_only") or config["model"].get("normalization_type", "LN") != "LN"
    names = [o.split("-") for o in config["accuracy"]]
    return {} if plain or not all(len(o) == 2 and all(map(str.isdigit, o)) for o in names) else {"-".join(o): tuple(map(int, o)) for o in names}


def run_sites(model) -> list[str]:
    "The sites between components, in order; what the last MLP writes only the logits read, and nothing has to be learned there."
    return circuit_sites(model)[:-1]


def claim(out: Path, job: dict, overwrite: bool, resume: bool) -> bool:
    "Make or check the run folder; True if it already holds this run, finished."
    file = out/"config.json"
    if overwrite and file.exists(): shutil.rmtree(out)
    if resume and not file.exists(): raise ValueError(f"nothing to resume in {out}: it holds no run; leave out --resume to start one")
    if not file.exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())): raise ValueError(f"{out} holds something else: name an empty or a new folder")
        out.mkdir(parents=True, exist_ok=True)
        _write_json(file, job)
        return False
    theirs = json.loads(file.read_text())
    for k, v in job.items():
        if theirs.get(k) != v: raise ValueError(f"{out} holds a run with {k} {theirs.get(k)!r}, not {v!r}: name another folder, or pass --overwrite")
    return (out/"report.html").exists() and (out/"metrics.json").exists()


class Clock:
    "Seconds per stage, kept on disk so that a resumed run still knows what the first part took."
    def __init__(self, file: Path):
        self.file, self.seconds = file, json.loads(file.read_text()) if file.exists() else {}

    def __call__(self, stage: str):
        self.stage, self.start = stage, time.perf_counter()
        return self

    def __enter__(self): return self

    def __exit__(self, *error):
        self.seconds[self.stage] = round(self.seconds.get(self.stage, 0) + time.perf_counter() - self.start, 1)
        _write_json(self.file, self.seconds)


def folder_of(out: Path, site: str) -> Path:
    "Where the partition of a site is kept: `x0.mid` for `blocks.0.hook_resid_mid`."
    _, layer, hook = site.split(".")
    return out/"partitions"/f"x{layer}.{hook.rsplit('_', 1)[1]}"


def partition_sites(name: str, out: Path, sites: list[str], seed: int, lengths: dict):
    "Find the partitions that are not there yet, and the control's, two processes at a time."
    jobs = [(partition_site, (name, str(out), o, seed)) for o in sites if not (folder_of(out, o)/"partition.json").exists()]
    if not (out/"control.json").exists(): jobs.append((control_job, (name, str(out), seed, lengths)))
    if not jobs: return
    pool = ProcessPoolExecutor(2, mp_context=get_context("spawn"))
    try:
        for o in tqdm(as_completed([pool.submit(f, *args) for f, args in jobs]), total=len(jobs), desc="partition, and control"): o.result()
    finally: pool.shutdown(cancel_futures=True)


def partition_site(name: str, out: str, site: str, seed: int):
    "Find, name and store the partition of one site."
    torch.set_num_threads(1)
    store = ActivationStore(Path(out)/"store")
    rows = live(store, site, last_layer(store))
    h, known = store[site][rows], {k: store.column(k)[rows] for k in labels}
    wrote = written(load_model(name)[0], stored_sequences(store, rows), [site])[site]
    p = learn_partition(h, site, seed, weights=store.info["capture"]["weights"], written=wrote)
    name_subspaces(p, h, known).save_pretrained(folder_of(Path(out), site))


def last_layer(store: ActivationStore) -> int:
    "Number of layers, from the sites of a run's store."
    return 1 + max(int(o.split(".")[1]) for o in store.sites)


def control_job(name: str, out: str, seed: int, lengths: dict):
    "The same procedure on the model before training: what is kept, and how it answers."
    torch.set_num_threads(1)
    model, task, _ = load_model(name, trained=False)
    folder, sites = Path(out)/"control", run_sites(model)
    store = capture(model, task, sites, folder, shards=3, seed=seed)
    partitions = {o: grow_partition(store[o][live(store, o, model.cfg.n_layers)], o, seed, pools=(256, 1024)) for o in sites}
    moments = Moments(model, task, seed=seed)
    edges, _ = find_circuit(model, task, moments, partitions, seed=seed)
    result = dict(n_edges=len(edges), n_significant=significant(edges),
                  accuracy={k: accuracy(KeepOnly(model, moments, partitions, edges), task, v, n=100) for k, v in lengths.items()})
    _write_json(Path(out)/"control.json", result)
    shutil.rmtree(folder)


def significant(edges: list) -> int:
    "Number of edges that random components would hardly have."
    return sum(o["p"] is not None and o["p"] <= .05 for o in edges)


def site_evidence(store: ActivationStore, p, n_layers: int, seed: int) -> dict:
    "What a report says of one partition: sizes, what is encoded, and how the subspaces depend on one another."
    rows = live(store, p.site, n_layers)
    h, known, g = store[p.site][rows], {k: store.column(k)[rows] for k in labels}, torch.Generator().manual_seed(seed)
    share, null = determination(p, h, g), determination(p, h, g, shuffle=True).abs().max().item()
    mi, mi_null = mutual_information_matrix(p, h, g)
    total = h.var(0).sum()
    presence = {k: (between_class(h, v).trace()/total).item() for k, v in known.items()}
    present = {k: v for k, v in known.items() if presence[k] >= .05}
    return dict(
        summary=dict(n_subspaces=len(p.names) - ("rest" in p.names), objective=p.info["objective"], sizes=p.sizes, presence=presence,
                     variables=variable_shares(p, h, present), variance={k: (v.var(0).sum()/total).item() for k, v in p.split(h).items()}, verdict=p.info["verdict"], cuts=p.info["cuts"], null=null),
        matrices=rounded(dict(names=p.names, determination=share.tolist(), mutual_information=mi.tolist(), mutual_information_null=mi_null)))


def faithfulness(model, task, moments, partitions: dict, edges: list, lengths: dict) -> dict:
    "Accuracy of the model, of the keep-only model and of none, at trained and at longer lengths; KL of the keep-only model."
    models = dict(full=model, keep_only=KeepOnly(model, moments, partitions, edges), null=KeepOnly(model, moments, partitions, []))
    scores = {k: {name: accuracy(o, task, v, n=300, seed=5) for name, v in lengths.items()} for k, o in models.items()}
    return dict(accuracy=scores, kl={k: divergence(model, models[k], task, seed=5) for k in ("keep_only", "null")})


def summary(edges: list, found: dict) -> dict:
    "Counts, curve and choice of a circuit."
    curve = [o for o in found["curve"] if o["stage"] != "budget" or o["epsilon"] in (0, found["epsilon"])]
    return dict(n_edges=len(edges), n_candidates=len(found["candidates"]), n_significant=significant(found["candidates"]), curve=curve,
                chosen=[o["stage"] for o in curve].index("circuit"), budget={k: found[k] for k in ("epsilon", "price", "significant", "asked", "able", "wrong")})


def example(model, task, seed: int) -> dict:
    "Attention patterns on one short sequence."
    batch = task.sample(1, (8, 8), torch.Generator().manual_seed(seed))
    patterns = attention(model, batch)[:, :, 0]
    return dict(tokens=[task.tokenizer.vocab[o] for o in batch.tokens[0]],
                patterns=[dict(component=f"L{i}H{j}", pattern=rounded(patterns[i, j].tolist())) for i in range(len(patterns)) for j in range(len(patterns[i]))])


def rounded(o, digits: int = 6):
    "The same JSON value with rounded numbers."
    if isinstance(o, dict): return {k: rounded(v, digits) for k, v in o.items()}
    if isinstance(o, list | tuple): return [rounded(v, digits) for v in o]
    return round(o, digits) if isinstance(o, float) else o


def peak_rss_mb() -> int:
    "Peak memory of this process and of two workers together, in MB."
    unit = 2**20 if sys.platform == "darwin" else 2**10
    own, child = (resource.getrusage(o).ru_maxrss for o in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return round((own + 2*child)/unit)
