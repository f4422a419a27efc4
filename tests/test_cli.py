"The command line with right and wrong input, as a user would call it."
import json, shutil, subprocess, sys

import pytest


def call(*args):
    "Exit code, output and error of one command."
    done = subprocess.run([sys.executable, "-m", "subspace_circuits.cli", *map(str, args)], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def refused(*args):
    "The one line that a refused command prints."
    code, _, error = call(*args)
    lines = [o for o in error.splitlines() if o.startswith("subspace-circuits: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in error, error
    return lines[0]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")/"store"
    assert call("capture", "induction", "--out", folder, "--sites", "blocks.0.hook_resid_mid", "--shards", 1)[0] == 0
    return folder


def test_models():
    listed = json.loads(call("models", "--json")[1])
    assert listed["induction"]["variables"] == ["token", "previous token", "position", "output"] and listed["planted-induction"]["edges"] == 4
    assert {o["kind"] for o in listed.values()} == {"trained", "planted", "toy"} and all(o["task"] and o["shape"] for o in listed.values())


def test_planted_model(tmp_path):
    assert call("capture", "planted-histogram", "--out", tmp_path/"store", "--shards", 1, "--sequences", 16)[0] == 0
    assert "unknown family 'histograms': use one of induction" in refused("capture", "planted-histograms", "--out", tmp_path/"other")
    assert "lengths '12': write the shortest and the longest" in refused("capture", "planted-histogram", "--out", tmp_path/"other", "--lengths", 12)


def test_models_that_run_cannot_take(tmp_path):
    assert "which ioi does not have: use one of bigram_copy, induction" in refused("run", "ioi", "--out", tmp_path/"run")
    assert not (tmp_path/"run").exists()


def test_unknown_model_leaves_nothing(tmp_path):
    assert "unknown model 'inductoin': use one of induction" in refused("run", "inductoin", "--out", tmp_path/"run")
    assert not (tmp_path/"run").exists()


def test_folder_with_something_else(tmp_path):
    (tmp_path/"thesis.tex").write_text("…")
    assert "holds something else" in refused("run", "--out", tmp_path)
    assert [o.name for o in tmp_path.iterdir()] == ["thesis.tex"]


def test_nothing_to_resume(tmp_path): assert "nothing to resume" in refused("run", "--out", tmp_path/"run", "--resume")


def test_unknown_site(tmp_path):
    assert "unknown site 'blocks.9.hook_resid_mid': use one of blocks.0.hook_resid_pre" in refused(
        "capture", "induction", "--out", tmp_path/"store", "--sites", "blocks.9.hook_resid_mid")
    assert not (tmp_path/"store").exists()


def test_store_of_another_seed(store):
    assert "holds a capture with seed 0, not 1" in refused("capture", "induction", "--out", store, "--sites", "blocks.0.hook_resid_mid", "--shards", 1, "--seed", 1)


def test_store_of_another_model(store, tmp_path):
    from subspace_circuits.toy_models import load_model, save_model
    model, _, config = load_model("induction", trained=False)
    save_model(model, tmp_path/"other", config)
    assert "holds a capture with weights" in refused("capture", tmp_path/"other", "--out", store, "--sites", "blocks.0.hook_resid_mid", "--shards", 1)


def test_nan_in_activations(tmp_path):
    from subspace_circuits.toy_models import load_model, parameters, save_model
    model, _, config = load_model("induction")
    parameters(model)["pos.weight"][3] = float("nan")
    save_model(model, tmp_path/"broken", config)
    assert "NaN or infinite activations at blocks.0.hook_resid_pre" in refused("run", tmp_path/"broken", "--out", tmp_path/"run")


def test_partition_refuses(store, tmp_path):
    assert "no site 'x0.mid'" in refused("partition", store, "--site", "x0.mid", "--out", tmp_path/"p")
    assert "holds no store.json" in refused("partition", tmp_path, "--site", "blocks.0.hook_resid_mid", "--out", tmp_path/"p")


def test_too_few_activations(tmp_path):
    assert call("capture", "induction", "--out", tmp_path/"tiny", "--shards", 1, "--sequences", 3)[0] == 0
    assert "fewer than 256" in refused("partition", tmp_path/"tiny", "--site", "blocks.0.hook_resid_mid", "--out", tmp_path/"p")
    assert not (tmp_path/"p").exists()


def test_run_resumes_to_the_same_metrics(tmp_path):
    "A finished run is reused; one that lost its end, and one partition, comes out the same but for times."
    run = tmp_path/"run"
    code, out, error = call("run", "--out", run)
    assert code == 0 and "report: " in out, error
    metrics = json.loads((run/"metrics.json").read_text())
    assert all(metrics["accuracy"]["keep_only"][k] >= .95*metrics["accuracy"]["full"][k] for k in ("0-50", "51-100"))
    assert "holds a run with seed 0, not 1" in refused("run", "--out", run, "--seed", 1)
    for o in ("metrics.json", "report.html", "circuit.json"): (run/o).unlink()
    shutil.rmtree(run/"partitions"/"x0.mid")
    assert call("run", "--out", run, "--resume")[0] == 0
    again = json.loads((run/"metrics.json").read_text())
    for o in (metrics, again): o.pop("seconds"), o.pop("peak_rss_mb")
    assert again == metrics
