"The command line with right and wrong input, as a user would call it."
import json, re, shutil, subprocess, sys

import pytest
import torch
from commands import call, refused

from subspace_circuits.files import read_json


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")/"store"
    assert call("capture", "induction", "--out", folder, "--sites", "blocks.0.hook_resid_mid", "--shards", 1)[0] == 0
    return folder


def test_models():
    # the one command here that is a process of its own: the others run in this one
    done = subprocess.run([sys.executable, "-m", "subspace_circuits.cli", "models", "--json"], capture_output=True)
    listed = json.loads(done.stdout)
    assert listed["induction"]["variables"] == ["token", "previous token", "position", "output"]
    assert listed["planted-induction"]["edges"] == 4
    assert {o["kind"] for o in listed.values()} == {"trained", "planted", "toy"}
    assert all(o["task"] and o["shape"] for o in listed.values())


def test_planted_model(tmp_path):
    assert call("capture", "planted-histogram", "--out", tmp_path/"store", "--shards", 1, "--sequences", 16)[0] == 0
    assert "unknown family 'histograms': use one of induction" in refused("capture", "planted-histograms", "--out",
                                                                          tmp_path/"other")
    assert "lengths '12': write the shortest and the longest" in refused("capture", "planted-histogram", "--out",
                                                                         tmp_path/"other", "--lengths", 12)


def test_run_of_a_planted_model(tmp_path):
    "The main job prints, stores and reports what the answer key says."
    code, out, error = call("run", "planted-skip_trigram", "--out", tmp_path/"run")
    assert code == 0, error
    metrics = json.loads((tmp_path/"run"/"metrics.json").read_text())
    key, circuit = metrics["partition"], metrics["circuit"]
    assert (key["variables"], key["isolated_one_block"], len(key["homes"])) == (3, 0, 3)
    assert 0 <= key["isolated_no_excuse"] <= key["isolated"] == sum(o["isolated"] for o in key["homes"]) <= 3
    assert circuit["no_excuse_average_precision"] <= circuit["strict_average_precision"] <= 1
    assert not {"exact", "average_precision"} & circuit.keys()
    assert circuit["strict_exact"] <= (key["isolated"] == 3)
    said = (f"the answer key: {key['isolated']} of 3 variables isolated ({key['isolated_no_excuse']} without excuse); "
            f"circuit {'' if circuit['strict_exact'] else 'not '}exact")
    assert said in out
    # no longer lists than it was planted for
    assert metrics["circuit"]["control"]["n_edges"] == 0 and list(metrics["accuracy"]["keep_only"].values()) == [1.]
    report = (tmp_path/"run"/"report.html").read_text()
    assert f"{key['isolated']} of 3 variables have a subspace to themselves" in report
    assert "none of the 3 would be isolated" in report
    code, out, error = call("attack", tmp_path/"run", "--steps", 20)
    assert code == 0 and [o.split(": ")[0] for o in out.splitlines()] == ["circuit", "random edges", "all but one edge",
                                                                          "report"], error
    attacked = json.loads((tmp_path/"run"/"attack.json").read_text())
    reached = {k: attacked[k][0][1] for k in ("circuit", "random edges", "all but one edge")}
    assert reached["circuit"] < .1 < min(reached["random edges"], reached["all but one edge"])
    assert "Can anything outside the circuit undo it?" in (tmp_path/"run"/"report.html").read_text()
    assert call("run", "planted-skip_trigram", "--out", tmp_path/"run")[0] == 0 # still a finished run
    assert "holds no finished run" in refused("attack", tmp_path)
    assert "unknown family 'skip_trigrams': use one of induction" in refused("run", "planted-skip_trigrams", "--out",
                                                                             tmp_path/"other")
    assert not (tmp_path/"other").exists()


def test_what_circuits_are_tried_on():
    "Lists up to twice as long if the model can read them, pairs that were held out."
    from subspace_circuits.pipeline import trials
    from subspace_circuits.toy_models import load_model
    for name, want in dict(induction=["0-50", "51-100"], bigram_copy=["0-30", "31-38"],
                           weekdays=["trained pairs", "held-out pairs"]).items():
        model, task, _ = load_model(name)
        assert list(trials(task, model.cfg.n_ctx)) == want


def test_a_task_of_ones_own(tmp_path):
    "The model is asked first, and what it does not do is not explained."
    said = refused("run", "induction", "--task", "reverse", "--out", tmp_path/"run")
    assert "induction does not do reverse: " in said and "would be chance" in said and not (tmp_path/"run").exists()
    code, out, error = call("capture", "induction", "--task", "unique_copy", "--out", tmp_path/"store", "--shards", 1,
                            "--sequences", 4)
    assert code == 0 and out.startswith("the task is unique_copy: 100.0% of "), error
    assert "pass --task or --data" in refused("capture", "induction", "--task", "unique_copy", "--data", "samples",
                                              "--out", tmp_path/"other")


def test_the_door(tmp_path, monkeypatch, capsys):
    "What memory or disk refuses is one line and exit 2; a bug of ours says where to report it and exits 1."
    from subspace_circuits import cli
    for error, code, said in ((RuntimeError("DefaultCPUAllocator: can't allocate memory: 16 GB"), 2, "--lengths"),
                              (OSError("No space left on device"), 2, "No space left on device: make room"),
                              (KeyError("x"), 1, "this is a bug of ours: please report")):
        def fails(**_): raise error
        monkeypatch.setattr(cli, "app", fails)
        with pytest.raises(SystemExit) as e: cli.main()
        printed = capsys.readouterr().err
        assert e.value.code == code and said in printed and ("Traceback" in printed) == (code == 1), printed


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


def test_patterns_and_dtype(tmp_path):
    from subspace_circuits.activations import ActivationStore
    job = ("capture", "induction", "--out", tmp_path/"store", "--sites", "blocks.*.hook_resid_mid", "--shards", 1,
           "--sequences", 8)
    assert call(*job, "--dtype", "bfloat16")[0] == 0
    store = ActivationStore(tmp_path/"store")
    assert store.sites == ["blocks.0.hook_resid_mid", "blocks.1.hook_resid_mid"]
    assert store.info["capture"]["dtype"] == "bfloat16"
    assert "holds a capture with dtype 'bfloat16', not 'float32'" in refused(*job)
    assert call(*job, "--overwrite")[0] == 0
    assert "unknown dtype 'int8': use one of float32, bfloat16, float16" in refused(*job, "--dtype", "int8")


def test_text(tmp_path):
    from subspace_circuits.activations import ActivationStore
    (tmp_path/"set").mkdir()
    (tmp_path/"set"/"text.jsonl").write_text("".join(json.dumps({"text": o}) + "\n" for o in ("3 1 4", "1 5", "9 2 6")))
    for data in (tmp_path/"set"/"text.jsonl", f"hf:{tmp_path/'set'}"):
        code, out, error = call("capture", "induction", "--data", data, "--out", tmp_path/"padded", "--shards", 2,
                                "--sequences", 2, "--overwrite")
        assert code == 0 and out.startswith("11 rows"), error # eight symbols and three times bos
    code, _, error = call("capture", "induction", "--data", data, "--out", tmp_path/"packed", "--packed", "--no-bos",
                          "--lengths", "0-4", "--shards", 9)
    store = ActivationStore(tmp_path/"packed")
    assert code == 0 and "ended early: 1 of 9 shards were written" in error
    assert store.column("token").tolist() == [3, 1, 4, 1, 5, 9, 2, 6]
    assert store.column("position").tolist() == [0, 1, 2, 3]*2
    assert "packed and bos are choices for a text" in refused("capture", "induction", "--packed", "--out",
                                                              tmp_path/"other")
    assert "cannot be opened: write hf:owner/name" in refused("capture", "induction", "--data",
                                                              f"hf:{tmp_path/'set'}::test", "--out", tmp_path/"other")
    assert "no data 'text.csv' for induction: use task" in refused("capture", "induction", "--data", "text.csv",
                                                                   "--out", tmp_path/"other")
    assert not (tmp_path/"other").exists()


def test_benchmark_store(tmp_path):
    code, out, error = call("benchmark", "store", "--quick", "--json", tmp_path/"figures.json")
    figures = json.loads((tmp_path/"figures.json").read_text())["figures"]
    assert code == 0 and len(out.splitlines()) == len(figures), error
    assert sum(o["bar"] == "at least .85" for o in figures) == 6 and all(o["figure"] > 0 for o in figures)


@pytest.mark.parametrize("area, bars", [("models", ["at least 50", "at least 1.5", "below .3", "below 20"]),
                                        ("neighbors", ["at most 3", "at least 1.5", "below 20", "at least 2"])])
def test_benchmark_of_models_and_neighbors(tmp_path, area, bars):
    code, out, error = call("benchmark", area, "--quick", "--json", tmp_path/"figures.json")
    figures = json.loads((tmp_path/"figures.json").read_text())["figures"]
    assert code == 0 and len(out.splitlines()) == len(figures), error
    assert [o["bar"] for o in figures if o["bar"]] == bars and all(o["figure"] > 0 for o in figures)


def test_store_of_another_seed(store):
    assert "holds a capture with seed 0, not 1" in refused("capture", "induction", "--out", store, "--sites",
                                                           "blocks.0.hook_resid_mid", "--shards", 1, "--seed", 1)


def test_store_of_another_model(store, tmp_path):
    from subspace_circuits.toy_models import load_model, save_model
    model, _, config = load_model("induction", trained=False)
    save_model(model, tmp_path/"other", config)
    assert "holds a capture with weights" in refused("capture", tmp_path/"other", "--out", store, "--sites",
                                                     "blocks.0.hook_resid_mid", "--shards", 1)


def test_nan_in_activations(tmp_path):
    from subspace_circuits.toy_models import load_model, parameters, save_model
    model, _, config = load_model("induction")
    parameters(model)["pos.weight"][3] = float("nan")
    save_model(model, tmp_path/"broken", config)
    assert re.search(r"NaN or infinite .*pos", refused("run", tmp_path/"broken", "--out", tmp_path/"run"))


def test_partition_refuses(store, tmp_path):
    assert "no site 'x0.mid'" in refused("partition", store, "--site", "x0.mid", "--out", tmp_path/"p")
    assert "unknown method 'pca': use one of ndm, closed-form, growth" in refused("partition", store, "--site",
                                                                                  "blocks.0.hook_resid_mid",
                                                                                  "--method", "pca", "--out",
                                                                                  tmp_path/"p")
    assert "holds no store.json" in refused("partition", tmp_path, "--site", "blocks.0.hook_resid_mid", "--out",
                                            tmp_path/"p")


def test_several_sites(tmp_path):
    "One folder for each site; a second call keeps them, another seed is refused before anything is written."
    sites = ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_mid"]
    assert call("capture", "induction", "--out", tmp_path/"store", "--sites", ",".join(sites), "--shards", 1)[0] == 0
    job = ["partition", tmp_path/"store", "--site", "blocks.0.*", "--method", "closed-form", "--out", tmp_path/"p"]
    code, out, error = call(*job)
    assert code == 0 and [o.split(":")[0] for o in out.splitlines()] == [f"Partition of {o}" for o in sites], error
    assert sorted(o.name for o in (tmp_path/"p").iterdir()) == sorted(sites) and call(*job)[1] == out
    shutil.rmtree(tmp_path/"p"/sites[0])
    assert "with seed 0: name another folder" in refused(*job, "--seed", 1) and not (tmp_path/"p"/sites[0]).exists()


def test_partition_by_writers(store, tmp_path):
    """With its model a store is cut by who wrote what, which is kept as another job; another model, or a method that
    asks for rows alone, is refused."""
    from subspace_circuits.partition import Partition
    assert "holds activations of weights" in refused("partition", store, "--site", "blocks.0.hook_resid_mid",
                                                     "--model", "planted-induction", "--out", tmp_path/"p")
    assert "--model is for method ndm" in refused("partition", store, "--site", "blocks.0.hook_resid_mid", "--model",
                                                  "induction", "--method", "growth", "--out", tmp_path/"p")
    assert call("capture", "planted-histogram", "--out", tmp_path/"planted", "--sites", "blocks.0.hook_resid_pre",
                "--shards", 2)[0] == 0
    job = ["partition", tmp_path/"planted", "--site", "blocks.0.hook_resid_pre", "--out", tmp_path/"p"]
    code, out, error = call(*job, "--model", "planted-histogram")
    info = Partition.from_pretrained(tmp_path/"p").info
    assert code == 0 and info["method"].endswith("writers") and info["wrote"]["s0"]["embed"] > .9, error
    assert call(*job, "--model", "planted-histogram")[1] == out
    assert "by ndm, writers with seed 0: name another folder" in refused(*job)


def test_too_few_activations(tmp_path):
    assert call("capture", "induction", "--out", tmp_path/"tiny", "--shards", 1, "--sequences", 3)[0] == 0
    assert "fewer than 1280" in refused("partition", tmp_path/"tiny", "--site", "blocks.0.hook_resid_mid", "--out",
                                        tmp_path/"p")
    assert not (tmp_path/"p").exists()


def test_circuit_and_diff(tmp_path):
    from subspace_circuits.edges import planted_partitions
    from subspace_circuits.circuit_graph import read_circuit
    from subspace_circuits.circuit_families import plant
    from subspace_circuits.partition import Partition
    known, cut, out = plant("induction"), tmp_path/"partitions", tmp_path/"circuit.json"
    for i, p in enumerate(planted_partitions(known).values()): p.save_pretrained(cut/str(i))
    job = ("circuit", "planted-induction", "--partitions", cut, "--out", out)
    code, printed, error = call(*job)
    assert code == 0 and "L1H0       QK       token ⋈ previous" in printed, error
    graph = read_circuit(out)
    assert graph.graph["choice"]["significant"] and "sequences could be asked, 0 of all go wrong\n" in printed
    kept = {(o["component"], o["type"]) for *_, o in graph.edges(data=True) if o["type"] in ("Q", "K", "OV")}
    assert kept == {(o["component"], t) for o in known.edges for t in (("Q", "K") if o["type"] == "QK" else ("OV",))}
    assert {o.name for o in tmp_path.iterdir()} == {"partitions", "circuit.json", "circuit.graphml", "circuit.html"}
    code, printed, error = call("compare", out, out, "--out", tmp_path/"diff.html")
    assert code == 0 and printed.splitlines()[1:] == ["7 of 7 edges between subspaces are the same"], error
    assert printed.startswith("circuit and circuit: 7 edges in both") and (tmp_path/"diff.html").exists()
    shutil.rmtree(cut/"1")
    Partition({"all": torch.eye(known.model.cfg.d_model)}, "blocks.0.hook_resid_post").save_pretrained(cut/"1")
    code, printed, error = call(*job[:-1], tmp_path/"coarse.json")
    assert code == 0 and "L1H0       QK       all ⋈ all" in printed, error
    assert "significant components alone do not do the task" in printed, error
    shutil.rmtree(cut/"1")
    assert "no partition of blocks.0.hook_resid_post" in refused(*job[:-1], tmp_path/"other.json")
    assert not list(tmp_path.glob("other*"))


def test_run_resumes_to_the_same_metrics(tmp_path):
    "A finished run is reused; one that lost its end, and one partition, comes out the same but for times."
    run = tmp_path/"run"
    code, out, error = call("run", "--out", run)
    assert code == 0 and "report: " in out, error
    metrics = read_json(run/"metrics.json", "metrics")
    assert all(metrics["accuracy"]["keep_only"][k] >= .95*metrics["accuracy"]["full"][k] for k in ("0-50", "51-100"))
    assert "holds a run with seed 0, not 1" in refused("run", "--out", run, "--seed", 1)
    for o in ("metrics.json", "report.html", "circuit.json"): (run/o).unlink()
    shutil.rmtree(run/"partitions"/"x0.mid")
    assert call("run", "--out", run, "--resume")[0] == 0
    again = read_json(run/"metrics.json", "metrics")
    for o in (metrics, again): o.pop("seconds"), o.pop("peak_rss_mb")
    assert again == metrics
