"""Two ranks under torchrun, killed in every way: the run goes on, in the same bits, and no process is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from patchmill.trainer.checkpoints import checkpoint
from patchmill.trainer.metrics import read_lines, read_metrics
from patchmill.trainer.run_folder import read_status
from tests.support.photos import make_dataset

ROOT = Path(__file__).parent.parent
STEPS = 90
OPTIONS = f"""
--recipe mae-tiny --device cpu --model.image-size 32 --model.embed-dim 32 --model.depth 1 --model.num-heads 2
--model.decoder-embed-dim 16 --model.decoder-num-heads 2 --train.global-batch 8 --train.total-steps {STEPS}
--train.log-every-steps 1 --train.save-every-steps 10 --train.no-tensorboard --train.rank-timeout-seconds 20
""".split()


class Launch:
    """torchrun with two ranks of `patchmill pretrain`."""

    def __init__(self, dataset, run, *options, torchrun=(), **environment):
        self.run = run
        line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
        line += ["--monitor-interval=0.1", "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1", *torchrun]
        line += ["tests/support/pretrain_driver.py", *OPTIONS, "--data.path", str(dataset), "--out", str(run), *options]
        env = os.environ | {"PYTHONPATH": str(ROOT), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5", **environment}
        self.log = run.with_suffix(".log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(line, cwd=ROOT, env=env, stdout=log, stderr=log)
        self.seen = {self.process.pid}

    def wait_for_step(self, step, rank=0):
        """Waits until a step is logged; returns the process of a rank."""
        while self.process.poll() is None:
            path = self.run / "metrics.jsonl"
            if path.exists() and any(line["step"] >= step for line in read_lines(path)):
                workers = self.workers()
                self.seen.update(workers.values())
                return workers[rank]
            time.sleep(0.01)
        raise AssertionError(self.log.read_text())

    def workers(self):
        """{rank: process id} of torchrun's children."""
        found = {}
        for place in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((place / "stat").read_text().rsplit(")", 1)[1].split()[1])
                variables = (place / "environ").read_bytes().split(b"\0")
            except (OSError, IndexError):
                continue
            ranks = [int(text[5:]) for text in variables if text.startswith(b"RANK=")]
            if parent == self.process.pid and ranks:
                found[ranks[0]] = int(place.name)
        return found

    def end(self):
        """torchrun's exit code, once it and all its workers have gone."""
        code = self.process.wait(timeout=100)
        alive = [pid for pid in self.seen - {self.process.pid} if Path(f"/proc/{pid}").exists()]
        assert not alive, self.log.read_text()
        return code


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"), count=40)


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """An uninterrupted run on two ranks."""
    launch = Launch(dataset, tmp_path_factory.mktemp("runs") / "whole")
    assert launch.end() == 0, launch.log.read_text()
    return launch.run


def assert_same(run, whole):
    for key in ("step", "loss", "lr", "grad_norm"):
        assert [line[key] for line in read_metrics(run)] == [line[key] for line in read_metrics(whole)]
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(checkpoint.folder(each, STEPS) / name) for each in (run, whole))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert read_status(run).state == "finished"
    assert not list((run / "checkpoints").glob(".*"))


def test_torchrun_restarts_after_a_killed_worker_and_a_kill_while_saving(dataset, whole, tmp_path):
    launch = Launch(dataset, tmp_path / "run", torchrun=["--max-restarts=2"], DIE_IN_SAVE="1")
    os.kill(launch.wait_for_step(35, rank=1), signal.SIGKILL)
    assert launch.end() == 0, launch.log.read_text()
    assert_same(launch.run, whole)


def test_signals_to_torchrun_stop_in_order_and_the_same_command_goes_on(dataset, whole, tmp_path):
    run, reached = tmp_path / "run", 0
    for number in (signal.SIGUSR1, signal.SIGTERM):
        launch = Launch(dataset, run)
        launch.wait_for_step(reached + 15)
        launch.process.send_signal(number)
        launch.end()  # torchrun itself calls a forwarded signal a failure: the marker tells
        status = read_status(run)
        assert (status.state, status.why) == ("stopped", number.name), launch.log.read_text()
        assert checkpoint.newest_valid(run) == (checkpoint.folder(run, status.step), [])
        assert reached + 15 <= status.step < STEPS
        reached = status.step
    assert Launch(dataset, run).end() == 0
    assert_same(run, whole)


def test_a_rank_that_hangs_ends_the_run_and_is_named(dataset, tmp_path):
    launch = Launch(dataset, tmp_path / "run", "--train.rank-timeout-seconds", "3")
    hung = launch.wait_for_step(10, rank=1)
    os.kill(hung, signal.SIGSTOP)
    while "error: rank 1 of 2 died or did not answer for 3 s" not in launch.log.read_text():
        assert launch.process.poll() is None, launch.log.read_text()
        time.sleep(0.05)
    os.kill(hung, signal.SIGCONT)  # or torchrun would wait 30 s before it kills a process that cannot hear it
    assert launch.end() != 0
    assert read_status(launch.run).state == "failed"
    assert checkpoint.newest_valid(launch.run)[0] is not None
