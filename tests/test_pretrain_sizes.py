"""Runs of growing image sizes: the right size at every step, exact resume in every phase, positions interpolated."""

import dataclasses
import json
import re
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from patchmill.pipeline.config import MaskConfig
from patchmill.pipeline.plan.masks import MaskPlan
from patchmill.trainer import metrics
from patchmill.trainer.checkpoints import checkpoint
from patchmill.trainer.config.size_schedule import first_steps, size_at
from patchmill.trainer.config.toml import from_toml
from patchmill.trainer.flops import train_flops_per_image
from patchmill.trainer.metrics import read_metrics
from patchmill.trainer.model.build import build_model
from patchmill.trainer.model.resize_weights import resize_model
from patchmill.trainer.pretrain import pretrain
from tests.support.photos import make_dataset
from tests.support.ranks import next_world, run_ranks
from tests.support.small_models import TINY
from tests.support.small_runs import small_run

STEPS = 18  # 3.6 epochs of 5
SCHEDULE = ((0.0, 16), (0.3, 24), (0.6, 32))  # epoch 0; epoch 1; epochs 2 and 3
SIZES = [16] * 5 + [24] * 5 + [32] * 8


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
    fixed = {
        "train__total_steps": STEPS,
        "train__save_every_steps": 2,
        "train__keep_last": 20,
        "train__log_every_steps": 2,
        "train__tensorboard": False,
        "train__size_schedule": SCHEDULE,
    }
    return small_run(dataset, run, **fixed | changes)


def trajectory(run, *names):
    return [{k: line[k] for k in ("step", "loss", "lr", "grad_norm", *names)} for line in read_metrics(run)]


def weights(run, step=STEPS, name="model"):
    return load_file(checkpoint.folder(run, step) / f"{name}.safetensors")


def test_every_step_has_its_size(dataset, whole):
    assert [line["image_size"] for line in read_metrics(whole)] == SIZES
    model, _ = checkpoint.load_model(whole)
    assert model.config == config_of(dataset, whole).model
    assert model.input_hw == (32, 32)
    # the tables are those of the last size, in every checkpoint
    assert torch.equal(weights(whole, 2)["pos_embed"], build_model(model.config).pos_embed)
    assert from_toml(whole / "config.toml").train.size_schedule == SCHEDULE


@pytest.mark.parametrize("last", [5, 6, 9, 10, 13])
def test_a_run_that_dies_in_any_phase_ends_in_the_same_bits(last, dataset, whole, tmp_path):
    def on_progress(progress):
        if progress.step == last:
            raise OSError("the power is gone")

    with pytest.raises(OSError, match="the power is gone"):
        pretrain(config_of(dataset, tmp_path), on_progress)
    resumed = pretrain(config_of(dataset, tmp_path))
    assert resumed.resumed_from == checkpoint.folder(tmp_path, last // 2 * 2)
    assert trajectory(tmp_path, "image_size") == trajectory(whole, "image_size")
    for name in ("model", "optimizer"):
        ours, theirs = weights(tmp_path, name=name), weights(whole, name=name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_one_size_is_no_schedule(dataset, tmp_path):
    pretrain(config_of(dataset, tmp_path / "none", train__size_schedule=()))
    pretrain(config_of(dataset, tmp_path / "one", train__size_schedule=((0.0, 32),)))
    assert trajectory(tmp_path / "one") == trajectory(tmp_path / "none")
    ours, theirs = weights(tmp_path / "one"), weights(tmp_path / "none")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_the_rate_and_the_samples_are_those_of_a_run_of_one_size(dataset, whole, tmp_path):
    pretrain(config_of(dataset, tmp_path, train__size_schedule=()))
    assert [line["lr"] for line in read_metrics(tmp_path)] == [line["lr"] for line in read_metrics(whole)]
    states = [
        json.loads((checkpoint.folder(run, 12) / "state.json").read_text())["loader"] for run in (tmp_path, whole)
    ]
    assert states[0] == states[1]
    assert (states[0]["epoch"], states[0]["step"]) == (2, 2)


def test_an_image_is_charged_what_it_costs(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "device_peak", lambda device: 1e9)
    config = config_of(dataset, tmp_path)
    pretrain(config)
    for line in read_metrics(tmp_path):
        model = dataclasses.replace(config.model, image_size=line["image_size"])
        expected = train_flops_per_image(model, config.mask) * line["images_per_s"] / 1e9
        assert line["mfu"] == pytest.approx(expected, abs=2e-5)  # five digits of it are written
        assert expected > 1e-3


def train_on_two_ranks(rank, dataset, folder):
    middle = str(checkpoint.folder(folder / "one", 8))
    worlds: dict[str, dict[str, Any]] = {
        "ddp": {},
        "one_to_ddp": {"resume": middle},
        "one_to_fsdp": {"resume": middle, "train__parallel": "fsdp"},
    }
    for name, changes in worlds.items():
        next_world()
        pretrain(config_of(dataset, folder / name, **changes))


def test_two_ranks_and_resuming_on_another_number_of_them(dataset, tmp_path):
    pretrain(config_of(dataset, tmp_path / "one"))
    run_ranks(2, 4, train_on_two_ranks, dataset, tmp_path)
    resumed = str(checkpoint.folder(tmp_path / "ddp", 8))
    pretrain(config_of(dataset, tmp_path / "ddp_to_one", resume=resumed))
    expected = {line["step"]: line for line in read_metrics(tmp_path / "one")}
    for name in ("ddp", "one_to_ddp", "one_to_fsdp", "ddp_to_one"):
        lines = read_metrics(tmp_path / name)
        assert lines[-1]["step"] == STEPS
        for line in lines:
            # another order of fp32 sums, amplified by eighteen updates
            assert line["loss"] == pytest.approx(expected[line["step"]]["loss"], rel=1e-5)
            assert line["image_size"] == expected[line["step"]]["image_size"]


@pytest.mark.parametrize(
    "changes", [{}, {"kind": "simmim"}, {"kind": "crossmae"}, {"encoder_mask_tokens": True}], ids=str
)
def test_a_smaller_image_is_seen_as_by_a_model_made_for_it(changes, dataset):
    """resize.py makes that model: positions interpolated, all else the same."""
    torch.manual_seed(0)
    model = build_model(dataclasses.replace(TINY, **changes))
    config, tensors = resize_model(model.config, model.state_dict(), image_size=(24, 16))
    other = build_model(config)
    other.load_state_dict(tensors)
    images = torch.randint(0, 256, (4, 24, 16, 3), dtype=torch.uint8)
    plan = MaskPlan.draw(MaskConfig(ratio=0.5), seed=0, epoch=0, sample_ids_B=torch.arange(4), grid_hw=(3, 2))
    with pytest.raises(ValueError, match=re.escape("the model takes [B, 32, 32, 3]")):
        model(images, plan)
    model.input_hw = (24, 16)
    with torch.no_grad():
        ours, theirs = model(images, plan), other(images, plan)
    assert torch.equal(ours.loss, theirs.loss)
    assert torch.equal(ours.pred, theirs.pred)
    with pytest.raises(ValueError, match=re.escape("the model takes [B, 24, 16, 3]")):
        model(torch.zeros(4, 32, 32, 3, dtype=torch.uint8), plan)


def test_shares_are_whole_epochs():
    schedule = ((0.0, 160), (0.4, 192), (0.8, 224))
    phases = first_steps(schedule, steps_per_epoch=100, total_steps=1000)
    assert phases == [(0, 160), (400, 192), (800, 224)]
    assert [size_at(phases, step) for step in (0, 399, 400, 799, 800, 999)] == [160, 160, 192, 192, 224, 224]
    assert first_steps(schedule, steps_per_epoch=100, total_steps=370) == [(0, 160), (100, 192), (300, 224)]
    with pytest.raises(ValueError, match=r"160 px from 0 of the run would last for no epoch of 0\.9"):
        first_steps(schedule, steps_per_epoch=100, total_steps=90)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (((0.1, 16), (0.5, 32)), "start at 0, rise"),
        (((0.0, 16), (0.5, 24), (0.5, 32)), "start at 0, rise"),
        (((0.0, 16), (1.0, 32)), "stay below 1"),
        (((0.0, 16), (0.5, 24)), "ends with 24 px and model.image_size is 32"),
        (((0.0, 20), (0.5, 32)), "20 px is not a multiple of model.patch_size 8"),
        (((0.0, 0), (0.5, 32)), "0 px is not a multiple"),
        (((0.0, 8), (0.5, 32)), "masks everything"),
    ],
)
def test_a_schedule_that_cannot_work(schedule, message, dataset, tmp_path):
    with pytest.raises(ValueError, match=message):
        config_of(dataset, tmp_path, train__size_schedule=schedule)


def test_a_run_that_is_too_short_is_refused_before_it_begins(dataset, tmp_path):
    with pytest.raises(ValueError, match="would last for no epoch"):
        pretrain(config_of(dataset, tmp_path / "run", train__total_steps=4))
    assert not (tmp_path / "run" / "status.json").exists()


def test_compiled_it_is_one_graph_for_each_size():
    """As train.compile does it; fullgraph raises at a graph break."""
    torch.manual_seed(0)
    model = build_model(TINY)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    for side in (16, 32, 16):
        model.input_hw = (side, side)
        images = torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8)
        grid_hw, ids = (side // 8, side // 8), torch.arange(2)
        plan = MaskPlan.draw(MaskConfig(ratio=0.5), seed=0, epoch=0, sample_ids_B=ids, grid_hw=grid_hw)
        # the compiler takes the interpolation of positions apart, which rounds in another order
        torch.testing.assert_close(compiled(images, plan).loss, model(images, plan).loss, rtol=1e-5, atol=0)
