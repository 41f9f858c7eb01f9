"""Positions, learning rate and layer decay against the published code's numbers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from patchmill.trainer.config.pretrain import OptimConfig
from patchmill.trainer.engine.optim import layer_scale, learning_rate
from patchmill.trainer.model.vit import sincos_positions

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize(("dim", "grid"), [(48, (4, 4)), (768, (14, 14))])
def test_sincos_tables(dim, grid):
    golden = load_file(GOLDEN / "sincos.safetensors")[f"sincos_{dim}_{grid[0]}x{grid[1]}"]
    table = sincos_positions(dim, grid)
    assert table.shape == (1, *golden.shape)
    # both are fp64 rounded to fp32; exp(-x log 10000) against 10000 ** -x may differ in the last bit
    torch.testing.assert_close(table[0], golden, rtol=0, atol=1e-7)


def test_sincos_columns_come_first_on_a_wide_grid():
    table = sincos_positions(8, (2, 3))[0, 1:].view(2, 3, 8)
    assert torch.equal(table[0, :, :4], table[1, :, :4])
    assert torch.equal(table[:, 0, 4:], table[:, 2, 4:])
    assert not torch.equal(table[0, 0, :4], table[0, 1, :4])


def test_learning_rate_schedule():
    golden = json.loads((GOLDEN / "lr_schedule.json").read_text())
    # the file's peak is given as such; a batch of 256 makes base and peak the same
    config = OptimConfig(blr=golden["lr"], min_lr=golden["min_lr"], warmup_epochs=golden["warmup_epochs"])
    values = [
        learning_rate(
            config,
            step,
            global_batch=256,
            steps_per_epoch=golden["steps_per_epoch"],
            total_epochs=golden["epochs"],
        )
        for step in range(len(golden["values"]))
    ]
    assert values == pytest.approx(golden["values"], rel=1e-9, abs=1e-15)


def test_learning_rate_scales_with_the_batch():
    rates = [
        learning_rate(OptimConfig(warmup_epochs=0), 0, global_batch=batch, steps_per_epoch=10, total_epochs=1)
        for batch in (256, 4096)
    ]
    assert rates == pytest.approx([1.5e-4, 2.4e-3])


def test_layer_decay():
    golden = json.loads((GOLDEN / "layer_decay.json").read_text())
    scales = {name: layer_scale(name, golden["layers"], golden["decay"]) for name in golden["scales"]}
    assert scales == pytest.approx(golden["scales"])
