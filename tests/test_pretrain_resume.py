"""A run that is killed, stopped or moved goes on as if nothing had been: bit for bit, in one process on a CPU."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from patchmill.trainer.checkpoints import checkpoint
from patchmill.trainer.metrics import EVALUATIONS, read_lines, read_metrics
from patchmill.trainer.pretrain import pretrain
from patchmill.trainer.recipes.pretrain import get_recipe, with_options
from patchmill.trainer.run_folder import read_status
from tests.support.photos import make_dataset

ROOT = Path(__file__).parent.parent
STEPS = 24
OPTIONS = {
    "model.image_size": 32,
    "model.embed_dim": 32,
    "model.depth": 2,
    "model.num_heads": 2,
    "model.decoder_embed_dim": 16,
    "model.decoder_num_heads": 2,
    "train.global_batch": 8,
    "train.total_steps": STEPS,
    "train.save_every_steps": 3,
    "train.log_every_steps": 2,
    "device": "cpu",
}
"""mae-tiny, made smaller still"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"), count=40)


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """An uninterrupted run."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    pretrain(config_of(dataset, run))
    return run


def config_of(dataset, run, **changes):
    options = {name.replace(".", "__"): value for name, value in OPTIONS.items()}
    return with_options(get_recipe("mae-tiny"), data__path=str(dataset), out=str(run), **options | changes)


def command(dataset, run, *more):
    line = [sys.executable, "-m", "patchmill.tools.pretrain", "--recipe", "mae-tiny"]
    for name, value in {"data.path": dataset, "out": run, **OPTIONS}.items():
        line += [f"--{name}", str(value)]
    return [*line, *more]


def start(line):
    return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(run, step, process):
    """Waits until metrics.jsonl has that step."""
    while process.poll() is None:
        if (run / "metrics.jsonl").exists() and any(line["step"] >= step for line in read_lines(run / "metrics.jsonl")):
            return
        time.sleep(0.005)
    raise AssertionError(f"the run ended before step {step}: {process.communicate()}")


def trajectory(run):
    """What does not depend on the clock."""
    return [{k: line[k] for k in ("step", "epoch", "loss", "lr", "grad_norm")} for line in read_metrics(run)]


def assert_same(run, whole):
    assert trajectory(run) == trajectory(whole)
    assert [line["step"] for line in read_metrics(run)] == list(range(1, STEPS + 1))
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(checkpoint.folder(r, STEPS) / name) for r in (run, whole))
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert torch.equal(value, theirs[key]), key


def test_killed_anywhere_it_ends_in_the_same_bits(dataset, whole, tmp_path):
    run = tmp_path / "run"
    step = random.randrange(2, STEPS - 2)
    process = start(command(dataset, run))
    wait_for_step(run, step, process)
    process.kill()
    process.communicate()
    assert read_status(run).is_gone
    done = subprocess.run(command(dataset, run), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_same(run, whole)
    assert read_status(run).state == "finished"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_finishes_the_step_saves_and_leaves_a_marker(number, dataset, whole, tmp_path):
    run = tmp_path / "run"

    def on_progress(progress):
        if progress.step == 10:
            os.kill(os.getpid(), number)

    summary = pretrain(config_of(dataset, run), on_progress)
    assert (summary.step, summary.interrupted) == (11, number.name)
    assert checkpoint.newest_valid(run) == (checkpoint.folder(run, 11), [])
    status = read_status(run)
    assert (status.state, status.step, status.why) == ("stopped", 11, number.name)
    assert pretrain(config_of(dataset, run)).resumed_from == checkpoint.folder(run, 11)
    assert_same(run, whole)


def test_ctrl_c_on_the_command_line_leaves_a_usable_checkpoint(dataset, tmp_path):
    run = tmp_path / "run"
    process = start(command(dataset, run, "--train.total-steps", "100000"))
    wait_for_step(run, 4, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "stopped by SIGINT" in out
    assert "same command continues" in out
    assert "Traceback" not in err
    assert (run / "loss.png").stat().st_size > 1000
    path, damaged = checkpoint.newest_valid(run)
    assert path == checkpoint.folder(run, read_status(run).step)
    assert not damaged


def test_a_damaged_newest_checkpoint_is_passed_over_and_said(dataset, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    newest = checkpoint.folder(run, STEPS) / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    summary = pretrain(config_of(dataset, run))
    assert [entry.path.name for entry in summary.damaged] == [f"step-{STEPS:08d}"]
    assert summary.resumed_from == checkpoint.folder(run, STEPS - 3)
    assert_same(run, whole)


def test_resume_takes_a_given_checkpoint_into_another_run(dataset, whole, tmp_path):
    run = tmp_path / "run"
    summary = pretrain(config_of(dataset, run, resume=str(checkpoint.folder(whole, STEPS - 3))))
    assert (summary.step, summary.resumed_from) == (STEPS, checkpoint.folder(whole, STEPS - 3))
    assert trajectory(run) == trajectory(whole)[-3:]


def test_a_finished_run_is_left_as_it_is(dataset, whole):
    before = trajectory(whole)
    assert pretrain(config_of(dataset, whole)).step == STEPS
    assert trajectory(whole) == before


def test_checkpoints_written_in_a_thread_are_the_same(dataset, whole, tmp_path):
    run = tmp_path / "run"
    pretrain(config_of(dataset, run, train__async_save=True, train__keep_every_steps=6, train__keep_last=1))
    assert_same(run, whole)
    assert [checkpoint.step_of(path) for path in checkpoint.all_checkpoints(run)] == [6, 12, 18, 24]
    state = json.loads((checkpoint.folder(run, 24) / "state.json").read_text())
    assert state["loader"]["fingerprint"]["global_batch"] == 8


def test_logging_and_pictures_leave_the_trajectory_alone(dataset, whole, tmp_path):
    run = tmp_path / "run"
    pretrain(
        config_of(dataset, run, train__log_every_steps=7, train__picture_every_epochs=2.0, train__tensorboard=False)
    )
    assert_same(run, whole)
    assert sorted(path.name for path in (run / "pictures").iterdir()) == ["step-00000010.png", "step-00000020.png"]


def test_evaluations_on_the_way_leave_the_trajectory_alone(dataset, whole, tmp_path):
    """Stopped once and resumed, killed once behind its last checkpoint: each evaluation stands there once."""
    run, chosen = tmp_path / "run", {"eval__every_epochs": 1.0, "eval__test_path": str(dataset)}

    def on_progress(progress):
        if progress.step == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    assert pretrain(config_of(dataset, run, **chosen), on_progress).step == 11
    lost = {"step": 99, "epoch": 20.0, "knn_top1": 0.0, "probe_top1": 0.0}
    with open(run / EVALUATIONS, "a") as file:
        file.write(json.dumps(lost) + "\n")
    summary = pretrain(config_of(dataset, run, **chosen))
    assert_same(run, whole)
    lines = read_lines(run / EVALUATIONS)
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    assert lines[-1] == summary.evaluation
    assert all(0 < line["knn_top1"] <= 1 and 0 < line["probe_top1"] <= 1 for line in lines)
    with pytest.raises(ValueError, match="patchmill knn"):
        config_of(dataset, run, **chosen, train__parallel="fsdp")
    with pytest.raises(ValueError, match="no manifest"):
        pretrain(config_of(dataset, tmp_path / "wrong", **chosen | {"eval__test_path": str(tmp_path)}))
