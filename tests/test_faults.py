"""What a machine does to work: a small, seeded part of `make faults` (tests/faults.py), and ends of processes, disks,
folders and terminals, each as a kind."""
import json, os, random, resource, signal, subprocess, sys, time
from functools import cache
from multiprocessing import get_context

import pytest
import torch
from commands import call, refused
from faults import COLUMNS, mutations, of_session, tree
from test_files import NAME

from subspace_circuits import cli, explorer, files
from subspace_circuits.activations import ActivationStore, capture
from subspace_circuits.circuit_families import plant
from subspace_circuits.edges import planted_partitions
from subspace_circuits.files import one_writer, read_json, write_json
from subspace_circuits.partition import Partition
from subspace_circuits.preimages import build_indexes
from subspace_circuits.toy_models import load_model

torch.set_num_threads(1)
SITE = "blocks.0.hook_resid_mid"
planted = cache(plant)


@pytest.fixture(autouse=True)
def planted_once(monkeypatch):
    "Planting proves its circuit, which takes most of the time here."
    monkeypatch.setattr("subspace_circuits.text.plant", planted)


def test_damaged_files(tmp_path):
    counts = mutations(tmp_path, int(os.environ.get("MUTATIONS", 60)), random.Random(1), formats=[
        "training", "evaluation", "dictionary", "partition", "published NDM", "SAELens", "toy model", "state dict",
        "llama2.c", "texts", "prompts", "grades", "facts", "settings"])
    said = {o: sum(v[o] for v in counts.values()) for o in COLUMNS}
    assert not any(said[o] for o in COLUMNS[3:]) and said["refused"] > 30, counts


# processes

sleepers = """
import signal, time
from subspace_circuits.workers import in_workers
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler) # what starts tests may ignore it, and pass that on
    print("started", flush=True)
    list(in_workers([(time.sleep, (600,))]*3))
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda o: o.name)
def test_workers_end_with_their_parent(tmp_path, end):
    "However the parent ends: at the latest when they have started and can hear of it."
    (tmp_path/"sleepers.py").write_text(sleepers)
    parent = subprocess.Popen([sys.executable, tmp_path/"sleepers.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              start_new_session=True)
    parent.stdout.readline()
    until = time.time() + 60
    while len(of_session(parent.pid)) < 4 and time.time() < until: time.sleep(.05) # two workers, and what tracks them
    assert len(of_session(parent.pid)) == 4
    os.killpg(parent.pid, end) if end == signal.SIGINT else parent.send_signal(end) # a terminal tells all of them
    parent.wait(60)
    while of_session(parent.pid) and time.time() < until: time.sleep(.05)
    assert of_session(parent.pid) == []


@pytest.mark.parametrize("stage", ["capture", "partition_sites", "wire", "write_metrics"])
def test_an_interrupt_is_one_line(tmp_path, monkeypatch, stage):
    "At any stage of a run; the folder can be continued, and its lock is gone."
    from subspace_circuits import pipeline
    def stop(*_, **__): raise KeyboardInterrupt
    partitions = planted_partitions(planted("skip_trigram"))
    if stage != "partition_sites": monkeypatch.setattr(pipeline, "partition_sites", lambda *_: partitions)
    monkeypatch.setattr(pipeline, "write_evidence", lambda *_: {})
    if stage == "write_metrics":
        monkeypatch.setattr(pipeline, "wire", lambda *_: (None, [], {"candidates": [], "curve": []}))
        monkeypatch.setattr(pipeline, "keep_only_scores", lambda *_: {})
        monkeypatch.setattr(pipeline, "against_key", lambda *_: {})
        monkeypatch.setattr(pipeline, "circuit_counts", lambda *_: {})
    monkeypatch.setattr(pipeline, stage, stop)
    code, _, error = call("run", NAME, "--out", tmp_path/"run")
    assert code == 130 and error.splitlines()[-1].endswith("interrupted: the same command continues where it stopped")
    assert (tmp_path/"run"/"config.json").exists() and not (tmp_path/"run"/"writer.pid").exists()


def test_sigterm_is_an_interrupt(monkeypatch, capsys):
    monkeypatch.setattr(cli, "app", lambda **_: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(5))
    with pytest.raises(SystemExit) as e: cli.main()
    assert e.value.code == 130 and "the same command continues" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# folders

def test_two_processes_in_one_folder(tmp_path):
    "The second is refused in one line, whatever the first does there, and leaves nothing."
    settings = tmp_path/"s.yaml"
    settings.write_text("job: circle\nmodel: modular_addition\n")
    for p in planted_partitions(planted("skip_trigram")).values(): p.save_pretrained(tmp_path/"cuts"/p.site)
    jobs = {"run": (("run", NAME, "--out", tmp_path/"a"), tmp_path/"a"),
            "decompose": (("decompose", "apd", "apd-tms-5-2", "--out", tmp_path/"b"), tmp_path/"b"),
            "multidim": (("decompose", "multidim", settings, "--out", tmp_path/"c"), tmp_path/"c"),
            "evaluate": (("evaluate", "mutual-information", NAME, "--partitions", tmp_path/"cuts", "--out",
                          tmp_path/"d.json", "--prompts", 128), tmp_path/"d.parts")}
    for name, (args, folder) in jobs.items():
        with one_writer(folder):
            before = tree(tmp_path)
            assert f"{folder} is being written by process {os.getpid()}: wait for it" in refused(*args), name
            for more in ([], ["--overwrite"]): assert "is being written" in refused(*args, *more), name
            assert tree(tmp_path) == before
        assert not folder.exists()


def test_two_processes_write_one_file(tmp_path):
    "Each writes under a name of its own; what a dead one left goes."
    write_json(file := tmp_path/"o.json", dict(a=1), "metrics")
    left = tmp_path/f".o.json.4194305.{files.PROGRAM}"
    left.write_text("half")
    with files.replacing(file, "metrics") as part:
        assert part.name == f".o.json.{os.getpid()}.{files.PROGRAM}" and not left.exists()
        part.write_text("half")
        with pytest.raises(ZeroDivisionError), files.replacing(file, "metrics") as other: 1/0
        assert other == part # of one process there is one writer at a time
        part.write_text("half")
        assert read_json(file, "metrics") == dict(a=1)
    assert file.read_text() == "half"


def test_names_that_are_no_place_for_an_output(tmp_path):
    "Before the work, whichever command it is; nothing is written."
    for p in planted_partitions(planted("skip_trigram")).values(): p.save_pretrained(tmp_path/"cuts"/p.site)
    (tmp_path/"folder.json").mkdir()
    (tmp_path/"folder.html").mkdir()
    (tmp_path/"file").write_text("mine")
    cuts = ("--partitions", tmp_path/"cuts")
    commands = {".json": [("circuit", NAME, *cuts, "--out"), ("evaluate", "mutual-information", NAME, *cuts, "--out"),
                          ("benchmark", "models", "--quick", "--json")],
                ".html": [("explore", tmp_path, "--static"), ("compare", tmp_path/"a", tmp_path/"b", "--out")]}
    before = tree(tmp_path)
    for suffix, some in commands.items():
        for o in some:
            assert f"e.txt is no name of a {suffix} file" in refused(*o, tmp_path/"e.txt")
            assert "is a folder: name a file in it" in refused(*o, tmp_path/f"folder{suffix}")
            assert "cannot be written" in refused(*o, tmp_path/"file"/f"e{suffix}")
    assert tree(tmp_path) == before


def test_a_store_reads_no_file_outside_its_folder(tmp_path):
    model, task, _ = load_model("induction")
    store = capture(model, task, [SITE], tmp_path/"store", shards=1, sequences=4)
    shard = store.info["shards"][0]
    for name in ("../store/shard-00000.safetensors", str(tmp_path/"store"/"shard-00000.safetensors"),
                 "other.safetensors", "shard-00000.safetensors/..", ""):
        for bad in (shard | dict(file=name), shard | dict(moments=shard["moments"] | dict(file=name))):
            write_json(tmp_path/"store"/"store.json", store.info | dict(shards=[bad]), "store")
            with pytest.raises(ValueError, match="which is no shard of its folder"): ActivationStore(tmp_path/"store")
    for bad in (dict(shards=3), dict(shards=[dict(file=1)]), dict(capture=[]), dict(format="1")):
        write_json(tmp_path/"store"/"store.json", store.info | bad, "store")
        with pytest.raises(ValueError, match="store.json"): ActivationStore(tmp_path/"store")


# disks

def limited(size, job, said):
    "Run a job whose files may not grow beyond a size, as a full disk would have it; what its error says."
    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try: job()
        except (OSError, ValueError) as e: said.put(str(e))
        except BaseException as e: said.put(f"not expected: {e!r}")
        else: said.put("nothing was refused")
    process = get_context("fork").Process(target=work)
    process.start()
    process.join()
    return f"exit {process.exitcode}" if process.exitcode else said.get()


def test_a_full_disk(tmp_path):
    "Whatever is written, in one line and without half a file under its own name; no sparse file ends a process."
    model, task, _ = load_model("induction")
    store = capture(model, task, [SITE], tmp_path/"store", shards=1, sequences=64)
    eye, said = torch.eye(64), get_context("fork").SimpleQueue()
    p = Partition({"a": eye[:, :9], "b": eye[:, 9:]}, SITE)
    jobs = {"index": lambda: build_indexes(store, p, tmp_path/"index"),
            "partition": lambda: p.save_pretrained(tmp_path/"partition"),
            "json": lambda: write_json(tmp_path/"o.json", dict(a=["x"*100]*100), "metrics"),
            "tensors": lambda: files.write_tensors(tmp_path/"o.safetensors", dict(a=torch.zeros(9999)), "patches", {}),
            "page": lambda: files.write_text(tmp_path/"o.html", "x"*9999, "report")}
    for name, job in jobs.items():
        answer = limited(5000, job, said)
        assert "File too large" in answer or "could not be written" in answer, (name, answer)
    left = [o for o in tmp_path.rglob("*") if o.is_file() and o.parent.name != "store"]
    assert [o.name for o in left if not files.left_over(o) and o.name not in ("README.md",)] == []
    assert len(build_indexes(store, p, tmp_path/"index")) == 2 and p.save_pretrained(tmp_path/"partition") is None


# terminals and browsers

def test_a_terminal_that_cannot_show_a_sign(tmp_path):
    "No locale, no home, a path with spaces and signs: the same words, with codes for what cannot be shown."
    folder = tmp_path/"a b 🙂 ⋈"
    for p in planted_partitions(planted("skip_trigram")).values(): p.save_pretrained(folder/"cuts"/p.site)
    plain = {"PATH": os.environ["PATH"], "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
             "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    command = "circuit", NAME, "--partitions", folder/"cuts", "--out", folder/"c.json", "--answers", "20"
    done = subprocess.run([sys.executable, "-m", "subspace_circuits.cli", *command], env=plain, capture_output=True)
    assert done.returncode == 0 and b"\\u22c8" in done.stdout and b"a b " in done.stdout, done.stderr
    assert {o.name for o in folder.iterdir()} == {"cuts", "c.json", "c.graphml", "c.html"}


def test_a_store_of_one_document(tmp_path):
    "Nothing is near a query there, and what a browser gets is JSON all the same."
    model, task, _ = load_model("induction")
    capture(model, task, [SITE], tmp_path/"store", shards=1, sequences=1, lengths=(40, 40))
    eye = torch.eye(64)
    Partition({"a": eye[:, :4], "b": eye[:, 4:]}, SITE).save_pretrained(tmp_path/"partitions"/"x")
    opened = explorer.open_run(tmp_path, "induction")
    for asked in (dict(row="3"), dict(row="3", metric="euclidean"), dict(text="1 2 3 1")):
        view = opened.view(asked)
        json.dumps(view, allow_nan=False)
        assert ("text" in asked) == bool(view["neighbours"]) == bool(view["glance"])
    assert "NaN" not in explorer.static_page(opened, [3], shadings=()).split('id="about">')[1].split("</script>")[0]
