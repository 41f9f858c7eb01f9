"""Fine-tuning and probing that are killed, stopped or repeated end with the same weights."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from patchmill.trainer.config.evaluate import FinetuneConfig
from patchmill.trainer.config.toml import read_toml
from patchmill.trainer.evaluate import fit as fit_module
from patchmill.trainer.evaluate.classify import load_classifier
from patchmill.trainer.evaluate.finetune import finetune, sweep
from patchmill.trainer.evaluate.probe import probe
from patchmill.trainer.evaluate.state import FINISHED, STATE, changed_options, fixed_options
from tests.support.eval_setup import files_of, finetune_config, make_setup, probe_config

ROOT = Path(__file__).parent.parent
DONE = ["classifier.safetensors", "config.toml", "confusion.json", "confusion.png", "curve.png", "results.json"]


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    return make_setup(tmp_path_factory.mktemp("setup"))


@pytest.fixture(scope="module")
def whole(setup):
    """An uninterrupted fine-tuning with everything on."""
    return finetune(finetune_config(setup, setup / "whole"))


def same(run, other):
    ours, theirs = load_file(run / FINISHED), load_file(other / FINISHED)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


class StopAt:
    """Asks a run to stop after some step, as a signal does."""

    def __init__(self, monkeypatch, module, step):
        self.names, self.step = [], step
        monkeypatch.setattr(f"patchmill.trainer.evaluate.{module}.stop_on_signals", self)

    def __call__(self):
        return self

    def __enter__(self):
        return self.names

    def __exit__(self, *error):
        pass

    def progress(self, progress):
        if progress.step == self.step:
            self.names.append("SIGTERM")


def test_it_learns_and_leaves_its_files(setup, whole):
    assert files_of(whole.run) == DONE
    assert whole.step == whole.total_steps == 9
    losses = [entry["loss"] for entry in whole.results["history"]]
    assert losses[-1] < losses[0]
    results = json.loads((whole.run / "results.json").read_text())
    assert results == json.loads(json.dumps(whole.results))
    assert (results["start"], results["test_samples"], results["unseen"]) == ("pretrained", 21, 0)
    assert results["top1"] == whole.results["history"][-1]["top1"]
    assert read_toml(whole.run / "config.toml", FinetuneConfig) == finetune_config(setup, whole.run)
    before, after = load_file(setup / "encoder.safetensors"), load_file(whole.run / FINISHED)
    assert not torch.equal(before["blocks.0.attn.qkv.weight"], after["blocks.0.attn.qkv.weight"])


def test_a_killed_finetune_ends_with_the_same_weights(setup, whole, tmp_path):
    config = finetune_config(setup, tmp_path / "killed")
    (tmp_path / "config.toml").write_text((whole.run / "config.toml").read_text())
    line = [sys.executable, "-m", "patchmill.tools.finetune", "--config", str(tmp_path / "config.toml")]
    process = subprocess.Popen([*line, "--out", config.out], cwd=ROOT, stdout=subprocess.DEVNULL)
    state = Path(config.out) / STATE
    while process.poll() is None and not state.exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert state.exists()
    report = finetune(config)
    assert report.interrupted is None
    assert same(report.run, whole.run)
    assert report.results["history"] == whole.results["history"]


@pytest.mark.parametrize("step", [1, 3, 7])
def test_a_stopped_finetune_ends_with_the_same_weights(setup, whole, tmp_path, monkeypatch, step):
    config = finetune_config(setup, tmp_path)
    stop = StopAt(monkeypatch, "finetune", step)
    report = finetune(config, stop.progress)
    assert report.interrupted == "SIGTERM"
    assert (report.step, report.results) == (step + 1, {})
    assert files_of(report.run) == ["config.toml", STATE]
    monkeypatch.undo()
    assert same(finetune(config).run, whole.run)


def test_a_stopped_probe_ends_with_the_same_weights(setup, tmp_path, monkeypatch):
    whole = probe(probe_config(setup, tmp_path / "whole"))
    config = probe_config(setup, tmp_path / "stopped")
    stop = StopAt(monkeypatch, "probe", 3)
    assert probe(config, stop.progress).interrupted == "SIGTERM"
    monkeypatch.undo()
    assert same(probe(config).run, whole.run)
    # what is frozen stays frozen, and the head's statistics are those of the training data
    before, after = load_file(setup / "encoder.safetensors"), load_file(whole.run / FINISHED)
    assert all(torch.equal(before[name], after[name]) for name in before.keys() & after.keys())
    assert int(after["head.0.num_batches_tracked"]) == 9
    assert after["head.1.weight"].std() > 0.0105  # drawn with 0.01


def test_the_same_command_again_gives_the_finished_result(setup, whole, monkeypatch):
    monkeypatch.setattr(fit_module, "update", None)
    again = finetune(finetune_config(setup, whole.run))
    assert (again.results, again.step) == (json.loads(json.dumps(whole.results)), 9)
    with pytest.raises(ValueError, match=r"finished run.*another layer_decay.*another --out"):
        finetune(finetune_config(setup, whole.run, layer_decay=0.5))
    with pytest.raises(ValueError, match=r"--resume never"):
        finetune(finetune_config(setup, whole.run, resume="never"))


def test_a_state_of_other_options_or_a_cut_one_is_refused(setup, tmp_path, monkeypatch):
    config = finetune_config(setup, tmp_path)
    stop = StopAt(monkeypatch, "finetune", 2)
    finetune(config, stop.progress)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"drop_path was 0\.3, is 0\.1"):
        finetune(dataclasses.replace(config, drop_path=0.1))
    state = tmp_path / STATE
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be used"):
        finetune(config)


def test_a_loss_that_is_not_finite_ends_the_run(setup, tmp_path):
    config = finetune_config(setup, tmp_path)
    with pytest.raises(ValueError, match="not finite"):
        finetune(dataclasses.replace(config, optim=dataclasses.replace(config.optim, blr=1e30)))


def test_a_finished_classifier_can_be_loaded(setup, whole):
    model, about = load_classifier(whole.run)
    assert (model.pool, about["head"], len(about["classes"])) == ("mean", "linear", 6)
    assert not model.training
    tensors = load_file(whole.run / FINISHED)
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="no classifier"):
        load_classifier(setup / "train")
    with pytest.raises(ValueError, match="not a Patchmill classifier"):
        load_classifier(setup / "encoder.safetensors")


def test_a_sweep_tunes_what_it_says_and_goes_on(setup, tmp_path):
    config = finetune_config(setup, tmp_path)
    config = dataclasses.replace(config, average=None, fit=dataclasses.replace(config.fit, epochs=1))
    reports = sweep(config, [0, 0.5])
    before = load_file(setup / "encoder.safetensors")
    for report, changed in zip(reports, (set(), {"blocks.1.norm2", "blocks.1.mlp"}), strict=True):
        after = load_file(report.run / FINISHED)
        for name in before.keys() & after.keys():
            assert torch.equal(before[name], after[name]) != name.startswith(tuple(changed) or "?"), name
    times = [(report.run / FINISHED).stat().st_mtime_ns for report in reports]
    again = sweep(config, [0, 0.5, 1])
    assert [(report.run / FINISHED).stat().st_mtime_ns for report in again][:2] == times
    assert [report.results["protocol"] for report in again] == ["partial-0", "partial-0.5", "partial-1"]


def test_a_batch_that_cannot_be_split_is_refused(setup, tmp_path):
    config = finetune_config(setup, tmp_path)
    config = dataclasses.replace(config, fit=dataclasses.replace(config.fit, accum_steps=3))
    with pytest.raises(ValueError, match=r"fit\.global_batch 16 cannot be split.*fit\.accum_steps 3"):
        finetune(config)


def test_options_that_were_never_obeyed_may_differ_in_an_older_run(setup, tmp_path):
    now = fixed_options(finetune_config(setup, tmp_path))
    assert changed_options(now | {"data.repeats": 1, "data.shuffle_buffer": 9}, now) == []
    assert changed_options(now | {"data.crop": "centre", "data.scale": [0.3, 1.0]}, now) == ["data.crop"]
