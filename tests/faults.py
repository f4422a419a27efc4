"""What becomes of work when processes are killed and files are damaged: `make faults`, or
`python tests/faults.py --kills N --mutations N --seed N`.

Kills: every kind of job is ended by SIGKILL at random instants and started again until it is done; its bytes must be
those of a job that ran through, and no process that it started may be left. Mutations: of every format a file is cut
short, flipped, zeroed, swapped, nested and replaced in random places; what reads it must refuse it in one line that
names it, or say what it said before. Formats of others carry no hash: a changed number there may be another number."""
import argparse, gzip, json, os, pickle, random, shutil, signal, struct, sys, tempfile, time, traceback, warnings
from collections import Counter
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file
from test_files import NAME, finished_run, plain, read_all

from subspace_circuits import cli, files, pipeline
from subspace_circuits.activations import ActivationStore, capture, fingerprint
from subspace_circuits.circuit_benchmark import read_grades
from subspace_circuits.circuit_families import plant
from subspace_circuits.circuit_graph import read_circuit
from subspace_circuits.decompositions.feature_clusters import Dictionary, read_dictionary, save_dictionary
from subspace_circuits.decompositions.multidim_runs import read_multidim
from subspace_circuits.decompositions.parameter_training import read_settings
from subspace_circuits.decompositions.runs import LAYOUT, decompose_parameters, open_trainer
from subspace_circuits.edges import planted_partitions
from subspace_circuits.evaluation import Patch, interchange
from subspace_circuits.files import read_json
from subspace_circuits.models import open_model
from subspace_circuits.own_tasks import PromptTask
from subspace_circuits.partition import Partition, read_published
from subspace_circuits.preimages import Index, build_indexes
from subspace_circuits.suites import evaluate, known_tests, read_facts, read_partitions
from subspace_circuits.text import read_documents
from subspace_circuits.toy_models import UniqueCopy, load_model, new_model, save_model, train

SETTINGS = dict(method="apd", target=dict(kind="tms", n_features=3, d_model=2, p=.05, steps=50, batch=64, lr=.005,
                                          lr_end=0.), seeds=1, start="xavier", rank=2, components=3, topk=.2,
                faithfulness=1., topk_reconstruction=1., schatten=.7, power=1., batch=64, steps=3000, lr=.01,
                schedule="constant", warmup=.05)


# ## Kills

@contextmanager
def quiet():
    "Nothing to read from what runs."
    with open(os.devnull, "w") as null:
        kept = os.dup(1), os.dup(2)
        os.dup2(null.fileno(), 1), os.dup2(null.fileno(), 2)
        try: yield
        finally:
            for i, o in enumerate(kept, 1): os.dup2(o, i), os.close(o)


def command(*args):
    "A command as a terminal runs it, in a process that has imported the libraries."
    sys.argv = ["subspace-circuits", *map(str, args)]
    try: cli.main()
    except SystemExit as e:
        if e.code: raise


def in_session(job, args):
    "Run a job as the leader of a session, so that every process it starts can be found."
    os.setsid()
    torch.set_num_threads(1)
    with quiet(): job(*args)


def of_session(leader: int) -> list[psutil.Process]:
    "The processes of a session that still run."
    found = []
    for o in psutil.process_iter():
        try:
            if os.getsid(o.pid) == leader and o.status() != psutil.STATUS_ZOMBIE: found.append(o)
        except (psutil.Error, OSError): continue
    return found


def orphans(leader: int, patience: float = 15.) -> int:
    "How many processes a killed one left, after the seconds that an import takes in which nothing can be heard."
    until = time.time() + patience
    while (left := of_session(leader)) and time.time() < until: time.sleep(.2)
    for o in left: o.kill()
    return len(left)


def tree(folder: Path) -> dict:
    "What a job has written, but for what a clock says."
    out = {}
    for o in sorted(folder.rglob("*")):
        name = o.relative_to(folder).as_posix()
        if not o.is_file() or name.endswith(("seconds.json", "files.json", "report.html")): continue
        out[name] = o.read_bytes()
        if name.endswith("metrics.json") and b"peak_rss_mb" in out[name]:
            said = json.loads(out[name])
            out[name] = {k: v for k, v in said.items() if k not in ("seconds", "peak_rss_mb", "written")}
    return out


def kill_jobs(base: Path) -> dict:
    "Every kind of job: a function, and what it takes besides the folder it writes to."
    (base/"settings.json").write_text(json.dumps(SETTINGS))
    with quiet():
        command("capture", NAME, "--out", base/"store", "--shards", 3)
        for k, p in planted_partitions(plant("skip_trigram")).items(): p.save_pretrained(base/"cuts"/k)
    return {
        "capture": lambda out: command("capture", "induction", "--out", out/"store", "--shards", 40, "--sequences", 8),
        "partition": lambda out: command("partition", base/"store", "--site", "*", "--method", "closed-form", "--out",
                                         out/"cuts"),
        "circuit": lambda out: command("circuit", NAME, "--partitions", base/"cuts", "--out", out/"c.json", "--answers",
                                       50),
        "decompose": lambda out: command("decompose", "apd", base/"settings.json", "--out", out/"job"),
        "index": lambda out: build_indexes(ActivationStore(base/"store"), next(iter(planted_partitions(
            plant("skip_trigram")).values())), out/"index", exact=500),
        "run": lambda out: command("run", NAME, "--out", out/"run")}


def start(job, out: Path):
    "A job in a process of its own, that can have children."
    process = get_context("fork").Process(target=in_session, args=(job, (out,)))
    process.start()
    return process


def kill(name: str, job, base: Path, kills: int, draw: random.Random) -> dict:
    "End a job at random instants, up to four times in a row, and compare what comes out in the end."
    (base/name/"whole").mkdir(parents=True)
    began = time.time()
    process = start(job, base/name/"whole")
    process.join()
    if process.exitcode: raise SystemExit(f"{name} does not run: exit {process.exitcode}")
    length, whole = time.time() - began, tree(base/name/"whole")
    done, compared, lost, left = 0, 0, 0, 0
    while done < kills:
        out = base/name/f"killed-{compared}"
        out.mkdir()
        for _ in range(min(draw.randint(1, 4), kills - done)):
            process = start(job, out)
            process.join(draw.uniform(0, length))
            process.kill()
            process.join()
            done, left = done + 1, left + orphans(process.pid)
        process = start(job, out)
        process.join()
        compared += 1
        found = tree(out)
        if process.exitcode or found != whole:
            lost += 1
            other = [k for k in whole.keys() | found.keys() if whole.get(k) != found.get(k)]
            print(f"LOST {name}: exit {process.exitcode}, differs in {other[:5]}")
        else: shutil.rmtree(out)
    return dict(kills=done, resumed=compared, lost=lost, orphans=left)


# ## Mutations

def published(folder: Path):
    torch.save({"R.parametrizations.weight.0.base": torch.linalg.qr(torch.randn(8, 8))[0]}, folder/"R-toy-x0.mid.pt")
    (folder/"R_config-toy-x0.mid.json").write_text('{"partition": [5, 3]}')


def hugging_face(folder: Path):
    import tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
    bpe = tokenizers.Tokenizer(tokenizers.models.WordLevel({o: i for i, o in enumerate("a b c <s>".split())}, "a"))
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>").save_pretrained(folder)
    GPT2LMHeadModel(GPT2Config(vocab_size=4, n_positions=16, n_embd=4, n_layer=1, n_head=1, bos_token_id=3,
                               eos_token_id=3)).save_pretrained(folder)


def state_dict(folder: Path):
    from transformer_lens.model_bridge import TransformerBridge
    shapes = {"embed.W_E": (6, 4), "pos_embed.W_pos": (8, 4), "unembed.W_U": (4, 6), "unembed.b_U": (6,)}
    for o in "QKV": shapes |= {f"blocks.0.attn.W_{o}": (1, 4, 4), f"blocks.0.attn.b_{o}": (1, 4)}
    shapes |= {"blocks.0.attn.W_O": (1, 4, 4), "blocks.0.attn.b_O": (4,)}
    torch.save({k: torch.randn(v) for k, v in shapes.items()}, folder/"model.pt")
    (folder/"config.json").write_text(json.dumps(dict(normalization_type=None)))


def llama2c(folder: Path):
    d, m, n, h, k, v, t = header = 4, 6, 1, 1, 1, 260, 8
    count = v*d + n*d + 4*n*d*d + n*d + 3*n*m*d + d + 2*t*d//2
    (folder/"model.bin").write_bytes(struct.pack("<7i", *header) + torch.randn(count).numpy().tobytes())
    pieces = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % i for i in range(256)), b"a"]
    (folder/"tok260.bin").write_bytes(struct.pack("<i", 6) + b"".join(struct.pack("<fi", 0., len(o)) + o
                                                                      for o in pieces))


def dictionary(): return Dictionary("blocks.0.hook_resid_mid", "relu", *map(torch.randn, ((4, 6), (6,), (6, 4), (4,))))


def saelens(folder: Path):
    d = dictionary()
    save_file({k: getattr(d, k) for k in ("W_enc", "b_enc", "W_dec", "b_dec")}, folder/"sae_weights.safetensors")
    (folder/"cfg.json").write_text(json.dumps(dict(architecture="standard", hook_name=d.site,
                                                   activation_fn_kwargs={}, metadata={})))


def texts(folder: Path):
    lines = [dict(text=o) for o in ("1 2 3", "4 5 6 7", "8 9")]
    (folder/"a.txt").write_text("1 2 3<|endoftext|>4 5")
    (folder/"b.jsonl").write_text("".join(json.dumps(o) + "\n" for o in lines))
    (folder/"c.json").write_text(json.dumps(lines))
    with gzip.open(folder/"d.jsonl.gz", "wt") as f: f.writelines(json.dumps(o) + "\n" for o in lines)


def prompts(folder: Path):
    (folder/"p.jsonl").write_text("".join(json.dumps(dict(prompt=f"{i} {i + 1}", answer=f"{i + 2}", variables=dict(
        first=str(i)))) + "\n" for i in range(5)))


def grades(folder: Path):
    row = dict(family="induction", seed=0, learner="", bare=False, method="ours", strict=dict(exact=True))
    (folder/"grades.jsonl").write_text("".join(json.dumps(row | dict(seed=i)) + "\n" for i in range(3)))


def facts(folder: Path):
    asks = dict(question="{entity} studied", context="{entity} studied {attribute} ;", facts={"1": "2", "3": "4"},
                made_up=["5", "6"])
    (folder/"facts.json").write_text(json.dumps(asks))


def settings(folder: Path):
    (folder/"apd.json").write_text(json.dumps(SETTINGS))
    (folder/"circle.yaml").write_text("job: circle\nmodel: modular_addition\nseed: 3\n")


def trained(folder: Path, stop=None):
    task = UniqueCopy(8)
    model = new_model(len(task.tokenizer), n_ctx=24, d_model=8)
    curve = train(model, task, steps=4, batch=2, lengths=(0, 4), every=2, file=folder/"training.safetensors", stop=stop)
    return dict(model.named_parameters()), curve


def patched(folder: Path):
    known = plant("induction")
    pairs = next(iter(known_tests("planted-induction", known.task, 40, torch.Generator().manual_seed(0)).values()))
    patch = Patch("blocks.0.hook_resid_post", torch.eye(known.model.cfg.d_model))
    return interchange(known.model, pairs, {"all": patch}, 20, folder/"kept.safetensors").logits


def evaluation(folder: Path):
    cuts = folder.parent/"evaluated"
    if not cuts.exists():
        p = next(iter(planted_partitions(plant("skip_trigram")).values()))
        p.save_pretrained(cuts)
    return evaluate("mutual-information", NAME, cuts, folder/"e.json", n=128)


def named(model): return fingerprint(model), dict(model.named_parameters())


# Each format: what makes it in a folder, what reads it there, and whether it is ours, so that no change may pass
FORMATS = {
    "decomposition": (lambda o: decompose_parameters("apd", o.parent/"settings.json", o),
                      lambda o: (decompose_parameters("apd", o.parent/"settings.json", o),
                                 plain(open_trainer(o)[0].tensors())), True),
    "training": (lambda o: trained(o, 2), trained, True),
    "patches": (patched, patched, True),
    "evaluation": (evaluation, evaluation, True),
    "dictionary": (lambda o: save_dictionary(dictionary(), o), lambda o: read_dictionary(o)._asdict(), True),
    "partition": (lambda o: next(iter(planted_partitions(plant("induction")).values())).save_pretrained(o),
                  lambda o: [[p.site, p.bases, p.mean, p.info] for p in read_partitions(o).values()], True),
    "published NDM": (published, lambda o: read_published(o/"R-toy-x0.mid.pt").bases, False),
    "SAELens": (saelens, lambda o: read_dictionary(o)._asdict(), False),
    "toy model": (lambda o: save_model(load_model("induction")[0], o, load_model("induction")[2]),
                  lambda o: named(open_model(o)[0]), False),
    "Hugging Face": (hugging_face, lambda o: named(open_model(o)[0]), False),
    "state dict": (state_dict, lambda o: named(open_model(o)[0]), False),
    "llama2.c": (llama2c, lambda o: named(open_model(o/"model.bin")[0]), False),
    "texts": (texts, lambda o: {x.name: list(read_documents(x)) for x in sorted(o.iterdir())}, False),
    "prompts": (prompts, lambda o: PromptTask(o/"p.jsonl", load_model("induction")[1].tokenizer).prompts, False),
    "grades": (grades, lambda o: read_grades(o/"grades.jsonl"), False),
    "facts": (facts, lambda o: read_facts(o/"facts.json", load_model("induction")[1].tokenizer), False),
    "settings": (settings, lambda o: (read_settings(o/"apd.json", "apd"), read_multidim(o/"circle.yaml")), False)}


def cut(data, draw, other): return data[:draw.randrange(len(data))] if data else b"x"
def flip(data, draw, other):
    at = draw.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1:]
def zero(data, draw, other):
    at, n = draw.randrange(len(data)), draw.choice((1, 16, 512))
    return data[:at] + bytes(min(n, len(data) - at)) + data[at + n:]
def longer(data, draw, other): return data + draw.choice((b"\n", b"\0"*8, b"}", data[:100]))
def swapped(data, draw, other): return other
def deep(data, draw, other): return draw.choice((b"["*10**5, b'{"a":'*10**5, b"["*10**5 + b"]"*10**5))
def deep_inside(data, draw, other):
    at = data.find(b":") + 1
    return data[:at] + b"["*10**5 + b"]"*10**5 + b"," + data[at:] if at else b"["*10**5
def typed(data, draw, other):
    "One value of a JSON file, another type."
    try: value = json.loads(data)
    except ValueError: return b"null"
    holder, key = {"": value}, ""
    while isinstance(holder[key], dict | list) and holder[key] and draw.random() < .8:
        holder = holder[key]
        key = draw.choice(list(holder)) if isinstance(holder, dict) else draw.randrange(len(holder))
    holder[key] = draw.choice((None, -1, 1e400, "x", [], {}, True, [[1]], {"a": None}))
    return json.dumps(value if key != "" else holder[""]).encode()
def not_text(data, draw, other): return b"\xff\xfe" + data
def empty(data, draw, other): return b""


MUTATIONS = [cut, cut, flip, flip, flip, zero, longer, swapped, deep, deep_inside, typed, typed, not_text, empty]
FOLDER = "a folder in its place"


def mutate(folder: Path, draw: random.Random, pool: list[Path]) -> tuple[str, Path]:
    "Damage one file of a folder; how, and which."
    file = draw.choice(sorted(o for o in folder.rglob("*") if o.is_file()))
    if draw.random() < .04:
        file.unlink()
        file.mkdir()
        return FOLDER, file
    data, how = file.read_bytes(), draw.choice(MUTATIONS)
    new = how(data, draw, draw.choice(pool).read_bytes()) if data else b"\0"
    file.write_bytes(new)
    return how.__name__ if new != data else "nothing", file


def apart(read, folder: Path, seconds: int = 120):
    "What a reading says in a process of its own: a value, a refusal, a traceback, a signal, or a hang."
    r, w = os.pipe()
    if not (pid := os.fork()):
        os.close(r)
        signal.alarm(seconds)
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            files.hashed.clear()
            try: said = "value", plain(read(folder))
            except ValueError as e: said = ("refused" if files.raised_here(e) else "traceback"), (
                str(e) if files.raised_here(e) else traceback.format_exc())
            except BaseException: said = "traceback", traceback.format_exc()
        with os.fdopen(w, "wb") as f: pickle.dump(said, f)
        os._exit(0)
    os.close(w)
    with os.fdopen(r, "rb") as f: data = f.read()
    _, status = os.waitpid(pid, 0)
    if data: return pickle.loads(data)
    return ("hang", "") if os.WTERMSIG(status) == signal.SIGALRM else ("crash", f"signal {os.WTERMSIG(status)}")


def judge(read, folder: Path, whole, how: str, file: Path, ours: bool) -> tuple[str, str]:
    "What became of a damaged file, and what was said."
    kind, said = apart(read, folder)
    if kind == "refused":
        names = file.name, file.parent.name, str(folder)
        return ("refused", said) if any(o in said for o in names) and "\n" not in said else ("unnamed", said)
    if kind != "value": return kind, said
    if said == whole: return "unchanged", ""
    return "wrong" if ours else "another", f"{how} of {file.name}"


def mutations(base: Path, n: int, draw: random.Random, formats=None) -> dict[str, Counter]:
    "Damage files of every format; counts of what became of them."
    (base/"settings.json").write_text(json.dumps(SETTINGS))
    counts, jobs = {}, {}
    with quiet():
        for name, (make, read, ours) in FORMATS.items():
            if formats and name not in formats: continue
            (folder := base/name.replace(" ", "-")).mkdir()
            make(folder)
            jobs[name] = folder, read, ours
        if not formats or "run" in formats:
            run, about = finished_run(base/"run")
            jobs["run"] = run, lambda o: [(k, v) for k, v in read_all(o, about).items()], True
    pool = [o for folder, *_ in jobs.values() for o in folder.rglob("*") if o.is_file()]
    wholes = {k: apart(read, folder) for k, (folder, read, _) in jobs.items()}
    for k, (kind, said) in wholes.items():
        if kind != "value": raise SystemExit(f"{k} is not read as it was written: {said}")
    # of a run there are most kinds of files: half of all
    names = [o for o in jobs if o != "run"]
    order = [("run" if "run" in jobs and (i % 2 or not names) else draw.choice(names)) for i in range(n)]
    for i, name in enumerate(order):
        folder, read, ours = jobs[name]
        trial = base/"trial"
        shutil.copytree(folder, trial)
        how, file = mutate(trial, draw, [o for o in pool if o.suffix == file_suffix(draw, pool)] or pool)
        if name == "run": kind, said = judge_run(read, trial, wholes[name][1], how, file)
        else: kind, said = judge(read, trial, wholes[name][1], how, file, ours)
        counts.setdefault(name, Counter())[kind] += 1
        if kind not in ("refused", "unchanged", "another"):
            print(f"{kind.upper()} {name}, {how} of {file.relative_to(trial)}: {said.strip()[-600:]}", flush=True)
        shutil.rmtree(trial)
        if i % 200 == 199: print(f"{i + 1} of {n}", file=sys.stderr, flush=True)
    return counts


def file_suffix(draw, pool): return draw.choice(pool).suffix


def judge_run(read, folder, whole, how, file):
    "As `judge`; a run is read in many ways, each of which refuses or says what it said."
    kind, said = apart(lambda o: [(k, ("refused", str(v)) if isinstance(v, ValueError) else ("value", v))
                                  for k, v in read(o)], folder)
    if kind != "value": return kind, said
    refused = [v for _, (what, v) in said if what == "refused"]
    if bad := [k for (k, (what, v)), (_, before) in zip(said, whole) if what == "value" and v != before]:
        return "wrong", f"{bad} after {how} of {file.name}"
    if bad := [o for o in refused if "\n" in o or not any(x in o for x in (file.name, file.parent.name))]:
        return "unnamed", bad[0]
    return ("refused", refused[0]) if refused else ("unchanged", "")


COLUMNS = ["refused", "unchanged", "another", "unnamed", "traceback", "crash", "hang", "wrong"]


def table(counts: dict[str, Counter]) -> str:
    "Counts, a format a line."
    rows = [("format", *COLUMNS)] + [(k, *(str(v[o]) for o in COLUMNS)) for k, v in counts.items()]
    rows.append(("all", *(str(sum(v[o] for v in counts.values())) for o in COLUMNS)))
    return "\n".join("  ".join(o.ljust(14) if i == 0 else o.rjust(9) for i, o in enumerate(r)) for r in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="of each kind of job")
    parser.add_argument("--mutations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="jobs, or formats")
    o = parser.parse_args()
    torch.set_num_threads(1)
    bad, draw = 0, random.Random(o.seed)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        if o.kills:
            for name, job in kill_jobs(base).items():
                if o.only and name not in o.only: continue
                said = kill(name, job, base/"kills", o.kills, draw)
                print(f"{name}: {said['kills']} kills, {said['resumed']} resumed to the end, {said['lost']} lost, "
                      f"{said['orphans']} orphans", flush=True)
                bad += said["lost"] + said["orphans"]
        if o.mutations:
            (base/"mutations").mkdir()
            counts = mutations(base/"mutations", o.mutations, draw, o.only)
            print(table(counts))
            bad += sum(v[k] for v in counts.values() for k in COLUMNS[3:])
    print("nothing lost, nothing wrong" if not bad else f"{bad} faults")
    sys.exit(bool(bad))


if __name__ == "__main__": main()
