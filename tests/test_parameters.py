"Parameter decomposition beyond what its pages prove: whole runs, their files, and what the command line refuses."
import json, shutil

import pytest
import torch
import yaml
from commands import call

from subspace_circuits.decompositions.parameter_masks import Draws
from subspace_circuits.decompositions.parameter_metrics import feature_scores, fresh_adversary, use_of
from subspace_circuits.decompositions.parameter_training import (
    Trainer, apd_losses, decompose, make_target, preset_names, read_settings, tms_top_k_gradients)
from subspace_circuits.decompositions.runs import LAYOUT, decompose_parameters, open_trainer
from subspace_circuits.files import kind_of

TINY = dict(batch=64, steps=300, seeds=2)
TOY = dict(steps=50, batch=64)


def config(tmp_path, preset, **changes):
    "A file of settings, made from a preset."
    o = read_settings(preset)
    changes["target"] = o["target"] | changes.get("target", {})
    file = tmp_path/f"{preset}.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in (o | changes).items() if v is not None}))
    return file


@pytest.mark.parametrize("preset", ["apd-tms-5-2", "spd-paper-tms-5-2", "vpd-current-tms-5-2", "vpd-paper-tms-5-2"])
def test_interrupted_and_unbroken_runs_give_the_same_bytes(tmp_path, preset):
    file, method = config(tmp_path, preset, target=TOY, **TINY), preset[:3]
    decompose_parameters(method, file, tmp_path/"whole")
    assert decompose_parameters(method, file, tmp_path/"broken", until=100)["step"] < 300
    assert not (tmp_path/"broken"/"metrics.json").exists()
    decompose_parameters(method, file, tmp_path/"broken", resume=True)
    kept = {k: v for k, v in LAYOUT.items() if v != "lock"}
    assert {o.name for o in (tmp_path/"whole").iterdir()} == set(kept)
    for name, kind in kept.items():
        assert (tmp_path/"whole"/name).read_bytes() == (tmp_path/"broken"/name).read_bytes(), name
        assert kind_of(tmp_path/"whole"/name) == kind
    lines = [json.loads(o) for o in (tmp_path/"whole"/"metrics.jsonl").read_text().splitlines()]
    assert [o["step"] for o in lines[1:]] == [100, 200, 300] and "faithfulness" in lines[1]
    trainer, _ = open_trainer(tmp_path/"whole")
    assert trainer.step == 300


def test_refusals(tmp_path):
    "Every mistake is one line, and nothing is left behind."
    file = config(tmp_path, "apd-tms-5-2", target=TOY, **TINY)
    assert call("decompose", "apd", file, "--out", tmp_path/"run")[0] == 0
    (tmp_path/"bad.yaml").write_text("method: apd\ntop_k: 1\n")
    (tmp_path/"list.yaml").write_text("- 1\n")
    for args, says in ((("nmf", file), "unknown method 'nmf': use one of apd, spd, vpd"),
                       (("apd", "apd-tms-5-3"), "no settings 'apd-tms-5-3'"),
                       (("spd", file), "these settings are of apd, not of spd"),
                       (("apd", tmp_path/"bad.yaml"), "unknown key 'top_k' of apd"),
                       (("apd", tmp_path/"list.yaml"), "holds no settings")):
        code, _, error = call("decompose", *args, "--out", tmp_path/"other")
        assert code == 2 and says in error and "Traceback" not in error and not (tmp_path/"other").exists()
    code, _, error = call("decompose", "apd", file, "--out", tmp_path/"run", "--seed", 5)
    assert code == 2 and "holds a decomposition with seed 0, not 5" in error
    code, _, error = call("decompose", "apd", file, "--out", tmp_path/"new", "--resume")
    assert code == 2 and "nothing to resume" in error and not (tmp_path/"new").exists()
    shutil.copy(file, tmp_path/"run"/"mine.yaml")
    code, _, error = call("decompose", "apd", file, "--out", tmp_path/"run", "--overwrite")
    assert code == 2 and "holds something else (mine.yaml" in error and (tmp_path/"run"/"config.json").exists()


def test_target_has_to_match():
    o = read_settings("apd-tms-5-2", target=TOY, **TINY)
    target, data = make_target(o)
    with pytest.raises(ValueError, match="the target has 2 networks, the settings 3 seeds"):
        Trainer(o | dict(seeds=3), target, data)


@pytest.mark.parametrize("preset", [o for o in preset_names() if "induction" not in o])
def test_every_preset_takes_a_step(preset):
    "Also the large ones, at a size that takes no time; losses are finite and the parameters move."
    o = read_settings(preset)
    toy = dict(TOY) if o["target"]["kind"] == "tms" else {} if o["target"]["kind"] == "gated" else dict(
        steps=2, batch=64, d_model=30, n_features=min(12, o["target"]["n_features"]))
    small = dict(components=min(6, o["components"]), batch=32, steps=2, seeds=2, target=toy)
    if o.get("topk"): small["topk"] = min(o["topk"], 3)
    if o.get("rank"): small["rank"] = min(o["rank"], 3)
    if "hidden" in o: small["hidden"] = 4
    o = read_settings(preset, **small)
    trainer = Trainer(o, *make_target(o))
    before = {k: v.detach().clone() for k, v in trainer.components.named().items()}
    for x in trainer.batches.draw(trainer.draws.generators)[:2]: losses = trainer.advance(x)
    assert all(v.isfinite().all() for v in losses.values())
    assert all((before[k] != v).any() for k, v in trainer.components.named().items())


@pytest.mark.parametrize("attribution", ["ablation", "activation"])
def test_other_attributions_train(attribution):
    o = read_settings("apd-tms-5-2", attribution=attribution, target=TOY, **TINY)
    trainer = decompose(o)
    assert not trainer.by_hand and trainer.components.V["W"].isfinite().all()


def test_gradients_by_hand_over_random_settings():
    "The sparse step is the dense one for other sizes, batches with empty samples, and seeds side by side."
    g = torch.Generator().manual_seed(0)
    for features, d, n, rank in ((3, 2, 2, 1), (9, 4, 6, 3), (20, 5, 30, 6)):
        o = read_settings("apd-tms-40-10-paper", components=n, rank=rank, seeds=3, batch=50, topk=min(1.5, n),
                          target=dict(n_features=features, d_model=d, p=.2, **TOY))
        target, data = make_target(o)
        trainer = Trainer(o, target, data)
        x = data.sample(3*50, g).view(3, 50, -1)
        V, U = (v["W"].requires_grad_() for v in trainer.components)
        found = tms_top_k_gradients(V, U, target.matrices["W"], target.bias, x, 50, o["topk"], o["power"], tuple(
            o[k] for k in ("faithfulness", "topk_reconstruction", "schatten")))
        losses = apd_losses(o, target, trainer.components, x, torch.full((50,), 1/50))
        sum(o[k]*v for k, v in losses.items()).sum().backward()
        for mine, theirs in ((found.dV, V.grad), (found.dU, U.grad)):
            assert (mine - theirs).abs().max() < 1e-4*theirs.abs().max()


def test_a_short_run_learns_the_pentagon():
    "A short run of VPD with three starts: components that are rows, and an adversary that gains nothing with time."
    o = read_settings("vpd-current-tms-5-2", batch=128, steps=2500, starts=3, seeds=1)
    trainer = decompose(o)
    found = feature_scores(trainer.components.matrices("W").detach(), trainer.target.matrices["W"])
    assert found.mmcs.min() > .97 and found.ml2r.min() > .7
    x = trainer.data.sample(256, torch.Generator().manual_seed(1))[None]
    worst = fresh_adversary(trainer, x, (20, 320))
    assert worst[320] <= 3*worst[20] < .5*trainer.target(x).square().mean()
    assert use_of(trainer, x)["W"].shape == (1, 256, 20) and Draws(0, 1)(2).shape == (1, 2)
