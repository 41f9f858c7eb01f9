"""`patchmill pretrain` as a user meets it: what it leaves, and one clear message for what cannot work."""

import errno
import json
import os
import resource
import signal
import tomllib

import pytest
from PIL import Image

from patchmill.tools import cli
from patchmill.trainer import run_folder
from patchmill.trainer.checkpoints import checkpoint
from patchmill.trainer.config.toml import from_toml
from patchmill.trainer.metrics import read_metrics
from patchmill.trainer.recipes.pretrain import get_recipe
from tests.support.photos import make_dataset

SMALL = """
--recipe mae-tiny --device cpu --model.image-size 32 --model.embed-dim 32 --model.depth 1 --model.num-heads 2
--model.decoder-embed-dim 16 --model.decoder-num-heads 2 --train.global-batch 8 --train.total-steps 6
--train.log-every-steps 4 --train.no-tensorboard
""".split()  # noqa: SIM905 (a command line reads better so)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"), count=20)


def run_cli(*options):
    """The exit code of `patchmill pretrain`."""
    try:
        return cli.run("pretrain", [str(option) for option in options])
    except SystemExit as ended:  # tyro's way out
        return ended.code


def refused(capsys, *options):
    """What a refused command says: exit code 2, one message, no traceback, nothing on stdout."""
    assert run_cli(*options) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err
    return " ".join(said.err.replace("│", " ").split())


def test_a_run_leaves_config_metrics_curve_checkpoint_and_summary(dataset, tmp_path, capsys):
    run = tmp_path / "run"
    assert run_cli(*SMALL, "--data.path", dataset, "--out", run) == 0
    said = capsys.readouterr().out
    assert "6 of 6 steps, complete" in said
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line.keys() >= {"step", "epoch", "loss", "lr", "images_per_s", "data_wait"} for line in lines)
    assert all(0 <= line["data_wait"] <= 1 and line["images_per_s"] > 0 for line in lines)
    assert lines[1]["epoch"] == 1.0
    assert lines[0]["lr"] == 0.0
    assert tomllib.loads((run / "config.toml").read_text())["train"]["total_steps"] == 6
    with Image.open(run / "loss.png") as picture:
        assert picture.size > (100, 100)
    assert (checkpoint.folder(run, 6) / "model.safetensors").exists()
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert not (run / "quarantine.jsonl").exists()


def test_the_saved_config_gives_the_same_run(dataset, tmp_path):
    assert run_cli(*SMALL, "--data.path", dataset, "--out", tmp_path / "a", "--seed", 7) == 0
    assert run_cli("--config", tmp_path / "a" / "config.toml", "--out", tmp_path / "b") == 0
    a, b = ([line["loss"] for line in read_metrics(tmp_path / name)] for name in "ab")
    assert a == b


def test_duration_may_be_given_in_images(dataset, tmp_path):
    options = [*SMALL, "--data.path", dataset, "--out", tmp_path / "run"]
    assert run_cli(*options, "--train.total-steps", "None", "--train.total-images", 24) == 0
    assert len(read_metrics(tmp_path / "run")) == 3


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--train.global-batch 0", "train.global_batch is 0; it must be at least 1"),
        ("--train.global-bacth 8", "--train.global-bacth"),
        ("--model.patch-size 7", "not a multiple of model.patch_size 7"),
        ("--train.precision fp7", "'bf16', 'fp16', 'fp32'"),
        ("--seed -1", "seed is -1"),
        ("--train.total-images 5", "leave one out"),
        ("--train.spike-factor 0.5", "greater than 1"),
        ("--train.accum-steps 3", "choose a multiple of 3"),
        ("--train.fp8", "torchao"),
        ("--train.cuda-graph", "one GPU"),
        ("--optim.kind apex-adam", "NVIDIA apex"),
        ("--train.global-batch 64", "do not fill one global batch of 64"),
        ("--resume nowhere", "cannot resume from nowhere: no such folder"),
    ],
)
def test_what_cannot_work_is_named(options, named, dataset, tmp_path, capsys):
    run = tmp_path / "run"
    assert named in refused(capsys, *SMALL, "--data.path", dataset, "--out", run, *options.split())
    assert not run.exists()


def test_an_unknown_recipe_is_answered_with_the_known_ones(tmp_path, capsys):
    assert "mae-vit-b16" in refused(capsys, "--recipe", "mae-vit-b61", "--data.path", "d", "--out", tmp_path / "run")


def test_data_that_are_none_are_answered_with_the_way_to_make_them(dataset, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "000000.tar").write_bytes(b"\0" * 10240)
    for place, remedy in (("absent", "patchmill shard"), ("empty", "patchmill shard"), ("tars", "patchmill index")):
        said = refused(capsys, *SMALL, "--data.path", tmp_path / place, "--out", tmp_path / "run")
        assert place in said
        assert remedy in said


def test_a_checkpoint_of_another_shape_is_refused_by_option(dataset, tmp_path, capsys):
    run = tmp_path / "run"
    options = [*SMALL, "--data.path", dataset, "--out", run]
    assert run_cli(*options) == 0
    capsys.readouterr()
    before = (run / "config.toml").read_text()
    assert "depth 1 there, 2 here" in refused(capsys, *options, "--model.depth", 2)
    assert "seed: was 0, is 1" in refused(capsys, *options, "--seed", 1)
    assert "give it more steps" in refused(capsys, *options, "--train.total-steps", 5)
    assert "already holds a run" in refused(capsys, *options, "--resume", "never")
    assert (run / "config.toml").read_text() == before
    assert len(read_metrics(run)) == 6


def test_a_run_folder_that_cannot_be_made_is_named(dataset, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "run"
    assert f"cannot write run folder {out}" in refused(capsys, *SMALL, "--data.path", dataset, "--out", out)


def test_a_full_disk_ends_in_one_message_and_keeps_the_last_checkpoint(dataset, tmp_path, capsys, monkeypatch):
    """Real short writes: no file may grow past 100 kB (RLIMIT_FSIZE), as on a full disk with another error number."""
    run = tmp_path / "run"
    options = [*SMALL, "--data.path", dataset, "--out", run]
    assert run_cli(*options) == 0
    capsys.readouterr()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
        said = refused(capsys, *options, "--train.total-steps", 9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert "cannot write checkpoint" in said
    assert "free space or choose another --out" in said
    assert checkpoint.all_checkpoints(run) == [checkpoint.folder(run, 6)]
    assert checkpoint.find_damage(checkpoint.folder(run, 6)) is None
    assert not list((run / "checkpoints").glob(".*"))
    assert run_folder.read_status(run).state == "failed"


def test_a_disk_that_fills_while_metrics_are_written_is_one_message_too(dataset, tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "status.json")

    monkeypatch.setattr("patchmill.trainer.pretrain.write_status", full)
    said = refused(capsys, *SMALL, "--data.path", dataset, "--out", tmp_path / "run")
    assert "No space left on device" in said


def test_a_dataset_is_not_taken_for_a_run_folder(dataset, capsys):
    before = sorted(dataset.iterdir())
    assert f"{dataset} is a dataset, not a run folder" in refused(
        capsys, *SMALL, "--data.path", dataset, "--out", dataset
    )
    assert sorted(dataset.iterdir()) == before


def test_a_config_file_that_is_not_there_is_named(tmp_path, capsys):
    said = refused(capsys, "--config", tmp_path / "none.toml", "--out", tmp_path / "run")
    assert f"cannot read {tmp_path / 'none.toml'}: No such file" in said


def test_help_shows_an_example_and_every_group_of_options(capsys):
    assert run_cli("--help") == 0
    said = capsys.readouterr().out
    for word in (
        "patchmill pretrain --recipe mae-tiny --data.path shards/ --out runs/first",
        "--optim.blr",
        "torchrun",
    ):
        assert word in said


def test_recipes_are_listed_and_printed_as_a_config(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.run("recipes", []) == 0
    listed = capsys.readouterr().out
    for name in ("mae-vit-b16", "table1-f-block-50", "probe-vit-l16", "scratch-vit-b16"):
        assert name in listed
    assert "Table 1f of the paper: kind block, ratio 0.5" in listed
    assert cli.run("recipes", ["mae-vit-h14"]) == 0
    (tmp_path / "mine.toml").write_text(capsys.readouterr().out)
    assert from_toml(tmp_path / "mine.toml") == get_recipe("mae-vit-h14")
    assert cli.run("recipes", ["mae-vit-b15"]) == 2
    assert "did you mean mae-vit-b16" in capsys.readouterr().err
