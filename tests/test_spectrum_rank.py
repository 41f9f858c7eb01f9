"""Effective rank and spectrum: by hand, on the way of a run without touching it, over ranks, and of checkpoints."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from patchmill.tools import cli
from patchmill.trainer.checkpoints import checkpoint
from patchmill.trainer.checkpoints.interop import write_checkpoint
from patchmill.trainer.engine.world import World
from patchmill.trainer.evaluate.spectrum import take_spectrum
from patchmill.trainer.metrics import SPECTRA, read_lines, read_metrics
from patchmill.trainer.pretrain import open_loader, pretrain
from tests.support.photos import make_dataset
from tests.support.ranks import next_world, run_ranks
from tests.support.small_models import random_checkpoint
from tests.support.small_runs import small_run

STEPS = 11  # of five an epoch


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"), count=40)


def config_of(dataset, run, **changes):
    fixed = {
        "train__total_steps": STEPS,
        "train__save_every_steps": 5,
        "train__log_every_steps": 3,
        "train__spectrum_every_epochs": 1.0,
    }
    return small_run(dataset, run, **fixed | changes)


def train_on_two_ranks(rank, dataset, folder):
    next_world()
    pretrain(config_of(dataset, folder / "two"))
    next_world()
    pretrain(config_of(dataset, folder / "sharded", train__parallel="fsdp"))


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory):
    """One run without spectra, one with, one of two ranks, one of two sharded."""
    folder = tmp_path_factory.mktemp("runs")
    pretrain(config_of(dataset, folder / "plain", train__spectrum_every_epochs=None))
    pretrain(config_of(dataset, folder / "one"))
    run_ranks(2, 3, train_on_two_ranks, dataset, folder)
    return folder


def test_a_square_spreads_alike_along_both_axes():
    found = take_spectrum(torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]]))
    assert found.effective_rank == pytest.approx(2)
    assert found.singular_values == pytest.approx([1, 1])
    assert found.images == 4


def test_the_formula_of_roy_and_vetterli():
    features = np.random.default_rng(0).normal(size=(50, 12)) * np.geomspace(1, 1e-3, 12)
    values = np.linalg.svd(features - features.mean(0), compute_uv=False)
    p = values / values.sum()
    found = take_spectrum(torch.from_numpy(features))
    assert found.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-10)
    assert found.singular_values == pytest.approx((values / np.sqrt(50)).tolist(), rel=1e-10)


def test_collapse_is_seen():
    one_line = torch.linspace(-1, 1, 20)[:, None] * torch.randn(8, generator=torch.Generator().manual_seed(0))
    # fp32 features off their line by rounding alone
    assert take_spectrum(one_line).effective_rank == pytest.approx(1, abs=1e-5)
    assert take_spectrum(torch.full((20, 8), 0.25)).effective_rank == 0
    found = take_spectrum(torch.tensor([[0.0, math.nan], [1.0, 2.0]]))
    assert math.isnan(found.effective_rank)
    assert found.singular_values == []


def test_what_it_does_not_depend_on():
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(30, 6, generator=generator, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    found = take_spectrum(features)
    for same in (features @ rotation, features + 3, torch.cat([features, features])):
        assert take_spectrum(same).singular_values == pytest.approx(found.singular_values, rel=1e-10)
    assert take_spectrum(5 * features).effective_rank == pytest.approx(found.effective_rank, rel=1e-10)


def test_few_images_span_one_direction_less():
    found = take_spectrum(torch.randn(5, 64, generator=torch.Generator().manual_seed(2)))
    assert len(found.singular_values) == 4
    assert found.singular_values[-1] > 0.1


def test_a_run_is_the_same_with_and_without(runs):
    ours, theirs = (load_file(checkpoint.folder(runs / name, STEPS) / "model.safetensors") for name in ("one", "plain"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    losses = [[(line["step"], line["loss"]) for line in read_metrics(runs / name)] for name in ("one", "plain")]
    assert losses[0] == losses[1]
    assert not (runs / "plain" / SPECTRA).exists()


def test_its_lines_are_those_of_the_batch_that_was_trained_on(dataset, runs):
    lines = read_lines(runs / "one" / SPECTRA)
    assert [(line["step"], line["epoch"], line["images"]) for line in lines] == [(5, 1.0, 8), (10, 2.0, 8)]
    model, _ = checkpoint.load_model(checkpoint.folder(runs / "one", 10))
    with open_loader(config_of(dataset, runs / "again"), World(0, 1, torch.device("cpu"))) as loader:
        loader.seek(1, 4)  # the tenth step's batch
        batch = next(loader)
    with torch.no_grad():
        expected = take_spectrum(model(batch.images, batch.plan).latent[:, 0])
    assert lines[1]["effective_rank"] == expected.effective_rank
    assert lines[1]["singular_values"] == expected.singular_values
    assert 1 < expected.effective_rank < 7


@pytest.mark.parametrize("name", ["two", "sharded"])
def test_two_ranks_see_the_global_batch(name, runs):
    for ours, theirs in zip(read_lines(runs / name / SPECTRA), read_lines(runs / "one" / SPECTRA), strict=True):
        assert ours["images"] == 8
        # ten updates in another order of fp32 sums
        assert ours["effective_rank"] == pytest.approx(theirs["effective_rank"], rel=1e-4)


def test_a_resumed_run_writes_each_line_once(dataset, tmp_path):
    run = tmp_path / "run"
    pretrain(config_of(dataset, run, train__total_steps=10))
    with open(run / SPECTRA, "a") as file:
        file.write('{"step": 99, "effective_rank": 1.0}\n')
    pretrain(config_of(dataset, run, train__total_steps=15))
    assert [line["step"] for line in read_lines(run / SPECTRA)] == [5, 10, 15]


def test_the_command_line_leaves_a_picture(dataset, tmp_path):
    run = tmp_path / "run"
    config = config_of(dataset, run)
    options = ["--recipe", "mae-tiny", "--data.path", str(dataset), "--out", str(run), "--device", "cpu"]
    options += ["--train.global-batch", "8", "--train.total-steps", "2", "--train.spectrum-every-epochs", "0.2"]
    for name in ("image_size", "embed_dim", "depth", "num_heads", "decoder_embed_dim", "decoder_num_heads"):
        options += [f"--model.{name}", str(getattr(config.model, name))]
    assert cli.run("pretrain", options) == 0
    assert len(read_lines(run / SPECTRA)) == 2
    assert Image.open(run / "spectra.png").size == (960, 540)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for seed in (0, 1):
        write_checkpoint(random_checkpoint(seed=seed), folder / f"{seed}.safetensors")
    return [str(folder / f"{seed}.safetensors") for seed in (0, 1)]


def test_checkpoints_are_compared(checkpoints, dataset, tmp_path, capsys):
    out, features = tmp_path / "new" / "spectra.png", tmp_path / "f.safetensors"
    options = ["--data.path", str(dataset), "--out", str(out), "--batch-size", "16"]
    assert cli.run("spectrum", ["--checkpoints", *checkpoints, *options, "--names", "seeds", "seeds"]) == 0
    shown = capsys.readouterr().out
    lines = json.loads(out.with_suffix(".json").read_text())
    assert [(line["name"], line["checkpoint"], line["images"]) for line in lines] == [
        ("seeds", checkpoints[0], 40),
        ("seeds", checkpoints[1], 40),
    ]
    assert len(lines[0]["singular_values"]) == 32
    options = ["--data.path", str(dataset), "--out", str(features)]
    assert cli.run("features", ["--checkpoint", checkpoints[0], *options]) == 0
    expected = take_spectrum(load_file(features)["cls"])
    # another batch size sums in another order
    assert lines[0]["effective_rank"] == pytest.approx(expected.effective_rank, rel=1e-4)
    assert lines[0]["effective_rank"] != lines[1]["effective_rank"]
    assert f"{lines[0]['effective_rank']:.1f}" in shown
    assert Image.open(out).size == (960, 540)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "s.pdf", "--data.path", "x"], "must end in .png"),
        (["--out", "s.png"], "give --data.path DIR"),
        (["--out", "s.png", "--data.path", "x", "--names", "a"], "one for each: 2"),
        (["--out", "s.png", "--data.path", "x", "--max-images", "1"], "--max-images must be at least 2"),
        (["--out", "s.png", "--data.path", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(options, message, checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.run("spectrum", ["--checkpoints", *checkpoints, *options]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
