"""`patchmill launch` and `patchmill runs`: scripts that hold what is easy to forget, and runs that say how they are."""

import json
import os
import subprocess

import pytest
from PIL import Image

from patchmill.tools import cli
from patchmill.trainer.metrics import read_lines
from patchmill.trainer.run_folder import State, write_status

RUN = ["--recipe", "mae-vit-b16", "--data.path", "my shards", "--out", "runs/b16"]


def test_a_torchrun_script_passes_signals_on_and_keeps_arguments_whole(tmp_path, capsys):
    script = tmp_path / "run.sh"
    assert cli.run("launch", ["--gpus", "8", "--script", str(script), "--", *RUN]) == 0
    text = script.read_text()
    assert capsys.readouterr().out == text
    for part in (
        "--nproc-per-node=8",
        "--standalone",
        "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1",
        "--max-restarts=3",
    ):
        assert part in text
    assert "export PYTHONSAFEPATH=1" in text
    assert "-m patchmill pretrain --recipe mae-vit-b16 --data.path 'my shards' --out runs/b16" in text
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_the_script_runs_what_it_says(tmp_path):
    """A stand-in for torchrun writes down what it was given."""
    (tmp_path / "torchrun").write_text('#!/bin/bash\nprintf "%s\\n" "$@" "$PYTHONSAFEPATH" > called\n')
    (tmp_path / "torchrun").chmod(0o755)
    script = tmp_path / "run.sh"
    assert cli.run("launch", ["--gpus", "2", "--script", str(script), "--", *RUN]) == 0
    path = f"{tmp_path}:{os.environ['PATH']}"
    subprocess.run([str(script)], check=True, cwd=tmp_path, env=os.environ | {"PATH": path})
    called = (tmp_path / "called").read_text().splitlines()
    assert called[-len(RUN) - 1 :] == [*RUN, "1"]
    module = called.index("-m") + 1
    assert called[module : module + 2] == ["patchmill", "pretrain"]


def test_a_slurm_script_asks_for_what_it_needs_and_queues_a_stopped_run_again(tmp_path, capsys):
    script = tmp_path / "job.sbatch"
    options = ["--kind", "slurm", "--nodes", "4", "--gpus", "8", "--hours", "1.5", "--sbatch=--partition=gpu"]
    assert cli.run("launch", [*options, "--script", str(script), "--", *RUN]) == 0
    lines = script.read_text().splitlines()
    for option in ("--nodes=4", "--gpus-per-node=8", "--time=01:30:00", "--signal=USR1@120", "--partition=gpu"):
        assert f"#SBATCH {option}" in lines
    text = "\n".join(lines)
    assert "--nnodes=4" in text
    assert '--master-addr="$MASTER_ADDR"' in text
    assert 'grep -q \'"state": "stopped"\' runs/b16/status.json; then scontrol requeue' in text
    subprocess.run(["bash", "-n", str(script)], check=True)
    # what pretrain writes is what the script looks for
    write_status(tmp_path, "stopped", 3, 10, "SIGUSR1")
    assert '"state": "stopped"' in (tmp_path / "status.json").read_text()


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (["--gpus", "8"], "after --"),
        (["--gpus", "7", "--", *RUN], "must be divisible by 7 GPUs"),
        (["--", *RUN[2:]], "--recipe"),
        (["--submit", "--", *RUN], "--script"),
        (["--gpus", "0", "--", *RUN], "--gpus is 0"),
    ],
)
def test_a_script_that_could_not_run_is_not_written(line, named, capsys):
    try:
        assert cli.run("launch", line) == 2
    except SystemExit as ended:  # tyro's way out
        assert ended.code == 2  # noqa: PT017 (either way is right)
    said = capsys.readouterr()
    assert named in said.err
    assert said.out == ""


def test_runs_are_listed_with_their_state(tmp_path, capsys):
    runs_made: list[tuple[str, State, str | None]] = [
        ("a", "finished", None),
        ("b/c", "stopped", "SIGTERM"),
        ("d", "failed", "disk full"),
    ]
    for name, state, why in runs_made:
        run = tmp_path / name
        (run / "checkpoints" / "step-00000004").mkdir(parents=True)
        write_status(run, state, 4, 9, why)
        line = '{"step": 5, "epoch": 0.5, "loss": 0.25, "images_per_s": 10.0}\n'
        (run / "metrics.jsonl").write_text(line + '{"step": 6, "lo')
    write_status(tmp_path / "d", "running", 4, 9)
    ended = subprocess.Popen(["true"])
    ended.wait()
    status = json.loads((tmp_path / "d" / "status.json").read_text()) | {"pid": ended.pid}
    (tmp_path / "d" / "status.json").write_text(json.dumps(status))
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "status.json").write_text("not ours")
    assert cli.run("runs", [str(tmp_path), "--json"]) == 0
    (tmp_path / "out.jsonl").write_text(capsys.readouterr().out)
    runs = read_lines(tmp_path / "out.jsonl")
    assert [(run["run"][len(str(tmp_path)) + 1 :], run["state"], run["step"]) for run in runs] == [
        ("a", "finished", 5),
        ("b/c", "stopped", 5),
        ("d", "gone", 5),
    ]
    assert runs[1]["why"] == "SIGTERM"
    assert cli.run("runs", [str(tmp_path), "--figure", str(tmp_path / "losses.png")]) == 0
    assert "step-00000004" in capsys.readouterr().out
    with Image.open(tmp_path / "losses.png") as picture:
        assert picture.size == (960, 540)
    assert cli.run("runs", [str(tmp_path), "--figure", "losses.txt"]) == 2


def test_a_folder_without_runs_is_named(tmp_path, capsys):
    assert cli.run("runs", [str(tmp_path)]) == 2
    assert "has no runs" in capsys.readouterr().err
    assert cli.run("runs", [str(tmp_path / "absent")]) == 2
    assert "no folder" in capsys.readouterr().err
