"""The main job on a tiny language model, from the command line: what it writes, that it is not made twice, and what is
refused before anything is captured."""
import gzip, json

import pytest
import torch
from commands import call, refused

from subspace_circuits.language_run import LENGTH, is_language_model, shipped_text, window_layers
from subspace_circuits.models import open_model
from subspace_circuits.suites import save_small_gpt2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.set_num_threads(1)
    return save_small_gpt2(tmp_path_factory.mktemp("model"), n_layers=3)


def test_run_and_reuse(tmp_path, model):
    run = tmp_path/"run"
    code, out, _ = call("run", model, "--layers", "1-2", "--out", run)
    assert code == 0 and "found: " in out and "whole sites: " in out and "subspaces have a name" in out
    metrics = json.loads((run/"metrics.json").read_text())
    circuit = metrics["circuit"]
    assert set(circuit["needed"]) == {"found", "pca", "random", "whole sites"}
    assert circuit["candidates"]["found"] == circuit["candidates"]["pca"] > circuit["candidates"]["whole sites"]
    assert set(metrics["grade"]["graded"]) == {"found", "ndm", "pca", "ica", "random"}
    assert list(metrics["sites"]) == [f"blocks.{o}" for o in (
        "0.hook_resid_post", "1.hook_resid_mid", "1.hook_resid_post", "2.hook_resid_mid", "2.hook_resid_post")]
    report = (run/"report.html").read_text()
    assert "would have refuted" in report and "random rotation" in report and "NaN" not in report.split("<script>")[0]
    assert not {"writer.pid", "files.json"} & json.loads((run/"files.json").read_text()).keys() # of this process alone
    written = {o: o.stat().st_mtime_ns for o in run.rglob("*") if o.is_file()}
    assert call("run", model, "--layers", "1-2", "--out", run)[0] == 0
    assert {o: o.stat().st_mtime_ns for o in run.rglob("*") if o.is_file()} == written
    assert "holds a run with layers [1, 2], not [1, 1]" in refused("run", model, "--layers", "1", "--out", run)


def test_run_on_a_behaviour(tmp_path, model):
    "What a random model prefers is its behaviour: with all edges it is left, with none it is not."
    net, tokenizer = open_model(model)
    people, lines = ("John", "Mary", "Tom", "James"), []
    for a in people:
        for b in people:
            for c in people[:3] if a != b else ():
                prompt = f"Then {a} and {b} went to the park and {c}"
                ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(prompt)]])
                logits = dict(zip(people, net(ids)[0, -1, [tokenizer.encode(f" {o}")[-1] for o in people]].tolist()))
                lines.append(dict(prompt=prompt, answer=max(logits, key=logits.get),
                                  wrong=min(logits, key=logits.get),
                                  counterfactual=prompt.replace(f"{a} and {b}", f"{b} and {a}")))
    (tmp_path/"mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    code, out, said = call("run", model, "--layers", "1-2", "--task", tmp_path/"mine.jsonl", "--out", tmp_path/"run")
    assert code == 0, said
    assert "whole model: 100.0% right" in out and "resample elsewhere: none " in out
    circuit = json.loads((tmp_path/"run"/"circuit.json").read_text())
    assert circuit["tokens"] == {"ranked": 18, "judged": 18}
    found = circuit["behaviour"]
    assert found["whole"]["kl"] < 1e-6 < found["mean"]["found"]["kl"] < found["mean"]["none"]["kl"]
    assert set(found["zero"]) == {"none", "found", "pca", "random", "whole sites"}
    assert "On prompts of mine.jsonl the right answer wins in 100.0%" in (tmp_path/"run"/"report.html").read_text()


@pytest.mark.parametrize("options, why", [
    (("--layers", "1-3"), "this model has layers 0 to 2"), (("--layers", "2-1"), "the first one first"),
    (("--layers", "middle"), "write the first and the last, as 10-12"),
    (("--layers", "1", "--method", "ica"), "unknown method 'ica': use one of ndm, readers"),
    (("--layers", "1", "--task", "ioi"), "does not do test1"),
    (("--data", "none.txt", "--task", "ioi"), "needs the layers to look at"),
    (("--data", "none.txt"), "no text in none.txt")])
def test_bad_input_is_one_line(tmp_path, model, options, why):
    assert why in refused("run", model, *options, "--out", tmp_path/"run")
    assert not (tmp_path/"run").exists()


def test_short_text_is_refused(tmp_path, model):
    (tmp_path/"short.txt").write_text("John went to the park . "*60)
    assert "10 are needed" in refused("run", model, "--data", tmp_path/"short.txt", "--out", tmp_path/"run")


def test_behaviour_that_is_not_there_is_refused(model):
    said = refused("locate", model, "--task", "ioi")
    assert "does not do test1: " in said and "50% would be chance" in said
    assert "unknown task 'capitals'" in refused("locate", model, "--task", "capitals")


def test_shipped_text_and_default_window(model):
    text = gzip.open(shipped_text(), "rt").read()
    assert len(text) > 400_000 and text.count("<|endoftext|>") == 30 and LENGTH == 128
    class Shape: cfg = type("cfg", (), dict(n_layers=30))
    assert window_layers(Shape, None) == range(13, 16) and window_layers(Shape, "10-12") == range(10, 13)
    assert not is_language_model("induction") and not is_language_model("planted-induction")
