"The store under a writer that is killed, a disk that refuses, a second writer, and several ranks."
import json, os, random, subprocess, sys, time
from multiprocessing import get_context

import pytest
import torch

from subspace_circuits.toy_models import load_model
from subspace_circuits.activations import ActivationStore, capture, verify
from subspace_circuits.files import one_writer

sites = ["blocks.0.hook_resid_mid"]
args = dict(shards=120, sequences=16, lengths=(0, 20))
kills = int(os.environ.get("STORE_KILLS", 6)) # STORE_KILLS=25 is the bar
program = """
import resource, signal, sys, torch
torch.set_num_threads(1)
from pathlib import Path
from subspace_circuits.activations import capture
from subspace_circuits.toy_models import load_model
model, task, _ = load_model("induction")
if len(sys.argv) > 2:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),)*2)
capture(model, task, %r, Path(sys.argv[1]), **%r)
""" % (sites, args)
rank_that_dies = """
import os, signal, subspace_circuits.activations as a
from pathlib import Path
import sys, torch
from subspace_circuits import files
torch.set_num_threads(1)
rank, save = a.ranks()[0], files.save_file
def die(rows, file, metadata):
    save(rows, file, metadata)
    if rank == 1 and "00005" in str(file): os.kill(os.getpid(), signal.SIGKILL)
files.save_file = die
from subspace_circuits.toy_models import load_model
model, task, _ = load_model("induction")
a.capture(model, task, ["blocks.0.hook_resid_mid"], Path(sys.argv[1]), shards=9, sequences=16)
"""


def start(*args):
    return subprocess.Popen([sys.executable, "-c", program, *map(str, args)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def torchrun(*args):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *map(str, args)],
                          capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=1800)


def write(folder):
    "The same capture, in a copy of this process, which has no libraries to import first."
    torch.set_num_threads(1)
    model, task, _ = load_model("induction")
    capture(model, task, sites, folder, **args)


def contents(folder): return {o.name: o.read_bytes() for o in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "An unbroken capture."
    folder, (model, task, _) = tmp_path_factory.mktemp("store")/"whole", load_model("induction")
    capture(model, task, sites, folder, **args)
    return folder


def listed(folder):
    "How many shards a store lists."
    return len(json.loads((folder/"store.json").read_text())["shards"]) if (folder/"store.json").exists() else 0


def test_killed_at_random_instants(tmp_path, whole):
    "However fast the machine is: somewhere within a shard, after a number of shards that is drawn."
    folder, draw, counts = tmp_path/"killed", random.Random(0), [0]
    for _ in range(kills):
        least = counts[-1] + draw.randrange(max(1, args["shards"]//kills))
        process = get_context("fork").Process(target=write, args=(folder,))
        process.start()
        while listed(folder) < least and process.is_alive(): time.sleep(.001)
        time.sleep(draw.uniform(0, .02))
        process.kill()
        process.join()
        if listed(folder): verify(ActivationStore(folder))
        counts.append(listed(folder))
        assert counts[-1] >= least
    assert counts == sorted(counts) and counts[-1] > 0
    print(f"shards after each of {kills} kills: {counts[1:]}")
    model, task, _ = load_model("induction")
    capture(model, task, sites, folder, **args)
    killed, unbroken = contents(folder), contents(whole)
    assert killed.keys() == unbroken.keys() and all(killed[k] == unbroken[k] for k in unbroken)


def test_rank_that_is_killed(tmp_path):
    (tmp_path/"job.py").write_text(rank_that_dies)
    assert torchrun(tmp_path/"job.py", tmp_path/"killed").returncode != 0
    verify(store := ActivationStore(tmp_path/"killed"))
    assert len(store.info["shards"]) == 4 # two rounds of two ranks
    model, task, _ = load_model("induction")
    for name in ("killed", "fresh"): capture(model, task, sites, tmp_path/name, shards=9, sequences=16)
    assert contents(tmp_path/"killed") == contents(tmp_path/"fresh")


def test_what_one_rank_refuses_all_say(tmp_path):
    (tmp_path/"bad.jsonl").write_text("".join(json.dumps({"text": o}) + "\n" for o in ("1 2 3", "4 5 6"))
                                      + '{"body": "7"}\n')
    done = torchrun("-m", "subspace_circuits.cli", "capture", "induction", "--data", tmp_path/"bad.jsonl", "--out",
                    tmp_path/"store", "--shards", 3, "--sequences", 1)
    lines = [o for o in done.stderr.splitlines() if o.startswith("subspace-circuits: ")]
    assert done.returncode != 0 and lines and all("bad.jsonl, line 3: it must be a JSON object" in o
                                                  for o in lines), done.stderr
    # refused before anything was written
    assert not any((tmp_path/"store"/o).exists() for o in ("store.json", "writer.pid"))


def test_files_that_cannot_be_written(tmp_path, whole):
    process = start(tmp_path/"full", 40_000) # shards of this capture are larger
    assert "could not be written" in process.communicate()[1]
    assert not (tmp_path/"full").exists()
    model, task, _ = load_model("induction")
    assert len(capture(model, task, sites, tmp_path/"full", **args)) == len(ActivationStore(whole))


def test_second_writer(tmp_path):
    with one_writer(tmp_path/"store"):
        _, error = start(tmp_path/"store").communicate()
        assert f"is being written by process {os.getpid()}" in error
    assert not (tmp_path/"store").exists()
    (tmp_path/"store").mkdir()
    for left in ("4194305", str(os.getpid()), ""): # a dead process; our own id, from before a restart; a file cut short
        (tmp_path/"store"/"writer.pid").write_text(left)
        with one_writer(tmp_path/"store"): assert (tmp_path/"store"/"writer.pid").read_text() == str(os.getpid())
    with one_writer(tmp_path/"store"), pytest.raises(ValueError, match="is being written by process"):
        with one_writer(tmp_path/"store"): pass
    (tmp_path/"file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        with one_writer(tmp_path/"file"): pass


def test_writers_that_start_at_once(tmp_path):
    "Of many processes that claim one folder over and over, no two ever hold it together."
    claim = """
import sys
from pathlib import Path
from subspace_circuits.files import one_writer
folder, got = Path(sys.argv[1]), 0
print("ready", flush=True)
sys.stdin.readline()
while got < 50:
    try:
        with one_writer(folder):
            (folder/"held").touch(exist_ok=False)
            (folder/"held").unlink()
            got += 1
    except ValueError: pass
"""
    job, pipe = [sys.executable, "-c", claim, str(tmp_path/"store")], subprocess.PIPE
    runs = [subprocess.Popen(job, stdin=pipe, stdout=pipe, text=True) for _ in range(3)]
    assert [o.stdout.readline() for o in runs] == ["ready\n"]*3
    for o in runs: print(file=o.stdin, flush=True)
    assert [o.wait() for o in runs] == [0]*3 and not list((tmp_path/"store").iterdir())
