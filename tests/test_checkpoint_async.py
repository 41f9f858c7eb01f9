"""Checkpoints written in a thread: each holds the weights of its step alone, and no error of the thread is lost."""

import errno
import os
import threading

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoint_files import trained_pair

from patchmill.tools.console.options import parse
from patchmill.trainer.checkpoints import checkpoint
from patchmill.trainer.checkpoints.save import Saver
from patchmill.trainer.checkpoints.staging import Staging
from patchmill.trainer.config.pretrain import PretrainConfig, TrainConfig
from patchmill.trainer.config.toml import from_toml, to_toml
from patchmill.trainer.engine.step import Guard
from patchmill.trainer.engine.world import World
from tests.support.devices import ALONE, CPU

ON = TrainConfig(async_save=True)
STATE = {"loader": {"epoch": 0, "step": 0, "fingerprint": {}}}


def scale_all(model, optimizer, guard, factor):
    """Changes every value of a checkpoint in place, as training does."""
    with torch.no_grad():
        moments = [value for state in optimizer.state.values() for value in state.values()]
        for tensor in (*model.state_dict().values(), *moments, *guard.state.values()):
            tensor.mul_(factor).add_(1)


def contents(run, step):
    path = checkpoint.folder(run, step)
    assert checkpoint.find_damage(path) is None
    return load_file(path / "model.safetensors") | load_file(path / "optimizer.safetensors")


@pytest.fixture
def held(monkeypatch):
    """Lets the saving thread begin to write only when the event is set."""
    event, write = threading.Event(), checkpoint.write

    def late(*args):
        assert event.wait(60)
        return write(*args)

    monkeypatch.setattr(checkpoint, "write", late)
    yield event
    event.set()


def test_what_training_changes_after_a_save_is_not_in_it(held, tmp_path):
    model, optimizer = trained_pair()
    guard, saver = Guard(CPU), Saver(tmp_path, ON, ALONE)
    snapshot = checkpoint.take_snapshot(model, optimizer, guard, STATE)
    expected = {name: tensor.clone() for name, tensor in (snapshot.model | snapshot.optimizer).items()}
    saver.save(1, model, optimizer, guard, STATE)
    scale_all(model, optimizer, guard, 3.0)
    held.set()
    saver.finish()
    found = contents(tmp_path, 1)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_each_save_holds_its_own_step(held, tmp_path):
    model, optimizer = trained_pair()
    guard, saver = Guard(CPU), Saver(tmp_path, ON, ALONE)
    held.set()
    tokens = []
    for step in (1, 2, 3):
        tokens.append(model.mask_token.detach().clone())
        saver.save(step, model, optimizer, guard, STATE)
        scale_all(model, optimizer, guard, 3.0)
    saver.finish()
    for step, token in enumerate(tokens, 1):
        assert torch.equal(contents(tmp_path, step)["mask_token"], token)


def test_a_checkpoint_holds_the_same_values_of_the_guard_as_ever(tmp_path):
    """A resumed run reads all of them: another name would refuse every checkpoint written before."""
    model, optimizer = trained_pair()
    guard = Guard(CPU, named_parameters=model.named_parameters())
    path = checkpoint.write(tmp_path, 1, checkpoint.take_snapshot(model, optimizer, guard, STATE))
    names = {name for name in load_file(path / "optimizer.safetensors") if name.startswith("guard.")}
    assert names == {"guard.loss_scale", "guard.good_steps", "guard.usual_loss", "guard.losses_seen"}


def test_buffers_are_made_once():
    staging, values = Staging(), torch.arange(12.0).view(3, 4)
    first = staging.copy("x", values.T)  # safetensors takes contiguous tensors only
    assert first.is_contiguous()
    assert torch.equal(first, values.T)
    second = staging.copy("x", values.T + 1)
    assert second.data_ptr() == first.data_ptr()
    assert torch.equal(second, values.T + 1)
    assert staging.copy("y", values.T).data_ptr() != first.data_ptr()


def failing(*args, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_error_of_the_thread_ends_the_next_save(tmp_path, monkeypatch):
    model, optimizer = trained_pair()
    saver = Saver(tmp_path, ON, ALONE)
    monkeypatch.setattr(checkpoint, "save_file", failing)
    saver.save(1, model, optimizer, Guard(CPU), STATE)
    with pytest.raises(OSError, match="step-00000001: No space left on device; free space"):
        saver.save(2, model, optimizer, Guard(CPU), STATE)
    saver.finish()  # it was reported once


def test_an_error_of_the_last_save_ends_the_run(tmp_path, monkeypatch):
    model, optimizer = trained_pair()
    saver = Saver(tmp_path, ON, ALONE)
    monkeypatch.setattr(checkpoint, "save_file", failing)
    saver.save(1, model, optimizer, Guard(CPU), STATE)
    with pytest.raises(OSError, match="step-00000001: No space left on device"):
        saver.finish()


@pytest.mark.parametrize(
    ("device", "async_save", "in_thread"),
    [("cpu", None, False), ("cuda", None, True), ("cuda", False, False), ("cpu", True, True)],
)
def test_a_thread_writes_on_a_gpu_unless_told_otherwise(device, async_save, in_thread, tmp_path):
    saver = Saver(tmp_path, TrainConfig(async_save=async_save), World(0, 1, torch.device(device)))
    assert (saver._thread is not None) == in_thread
    other = Saver(tmp_path, TrainConfig(async_save=async_save), World(1, 2, torch.device(device)))
    assert other._thread is None
    saver.finish()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], None),
        (["--train.async-save"], True),
        (["--train.no-async-save"], False),
        (["--train.async_save", "--seed", "3"], True),
        (["--train.async-save", "False"], False),
        (["--train.async-save=False"], False),
    ],
)
def test_the_option_works_as_before(options, expected, tmp_path):
    config = parse(PretrainConfig, "patchmill pretrain", [*options, "--out", "x"])
    assert (config.train.async_save, config.out) == (expected, "x")
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert from_toml(tmp_path / "config.toml").train.async_save is expected
