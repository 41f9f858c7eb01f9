"""Checkpoints under attack: flipped bits, kills while saving, files made to harm. Nothing runs, none is trusted."""

import json
import os
import pickle
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from patchmill.pipeline import atomic
from patchmill.trainer.checkpoints import checkpoint
from tests.support.trained import GUARD, save, trained_pair

EVERY = 997


@pytest.mark.parametrize("name", [*checkpoint.FILES, checkpoint.SUMS])
def test_every_997th_byte_flipped_is_found(name, tmp_path):
    model, optimizer = trained_pair()
    good = save(tmp_path, 1, model, optimizer)
    bad = save(tmp_path, 2, model, optimizer)
    raw = (bad / name).read_bytes()
    for position in range(min(EVERY, len(raw)) - 1, len(raw), EVERY):
        for bit in (0x01, 0x20, 0x80):
            with open(bad / name, "r+b") as file:
                file.seek(position)
                file.write(bytes([raw[position] ^ bit]))
            found, passed_over = checkpoint.newest_valid(tmp_path)
            assert found == good, (name, position, bit)
            assert passed_over[0].path == bad
            with open(bad / name, "r+b") as file:
                file.seek(position)
                file.write(raw[position : position + 1])
    assert checkpoint.newest_valid(tmp_path) == (bad, [])


def save_and_die(run, model, optimizer, at):
    """Saves, but dies at the n-th thing that saving does to the disk."""
    left = iter(range(at, -1, -1))

    def deadly(function):
        def call(*args, **kwargs):
            if next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    changing = (checkpoint, ("save_file", "_sums")), (atomic, ("sync",)), (Path, ("mkdir", "write_text", "rename"))
    for owner, names in changing:
        for name in names:
            setattr(owner, name, deadly(getattr(owner, name)))
    try:
        save(run, 2, model, optimizer)
    finally:
        os._exit(0)


def test_a_kill_at_any_moment_of_saving_leaves_a_valid_checkpoint(tmp_path):
    model, optimizer = trained_pair()
    first = save(tmp_path, 1, model, optimizer)
    died, written = 0, False
    while not written:
        child = os.fork()
        if child == 0:
            save_and_die(tmp_path, model, optimizer, died)
        written = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        died += not written
        path, damaged = checkpoint.newest_valid(tmp_path)
        assert damaged == []
        assert path is not None
        assert path == first or checkpoint.find_damage(path) is None
        shutil.rmtree(checkpoint.folder(tmp_path, 2), ignore_errors=True)
    assert died >= 10
    left_over = tmp_path / "checkpoints" / ".step-00000009.tmp"
    left_over.mkdir()
    checkpoint.prune(tmp_path, keep_last=3)
    assert checkpoint.all_checkpoints(tmp_path) == [first]
    assert not left_over.exists()


@pytest.fixture
def hostile(tmp_path):
    """A checkpoint, and what makes its sums right again after it was changed."""
    path = save(tmp_path / "run", 1, *trained_pair())

    def seal():
        (path / checkpoint.SUMS).write_text(checkpoint._sums(path))
        assert checkpoint.find_damage(path) is None
        return path

    return path, seal


def header_of(file):
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def restore(path):
    model, optimizer = trained_pair(seed=1)
    checkpoint.restore(path, model, optimizer, GUARD)


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", checkpoint.FILES)
def test_a_pickle_in_place_of_a_file_is_refused_and_not_run(name, hostile, tmp_path):
    path, seal = hostile
    marker = tmp_path / "marker"
    for data in (pickle.dumps(Payload(marker)), pickle.dumps({"model": Payload(marker)}, protocol=0)):
        (path / name).write_bytes(data)
        with pytest.raises(ValueError, match=name):
            restore(seal())
    torch.save({"model": Payload(marker)}, path / name)
    with pytest.raises(ValueError, match=name):
        restore(seal())
    assert not marker.exists()
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()  # it would have


def test_path_tricks_in_the_sums_are_not_followed(hostile, tmp_path):
    path, _ = hostile
    (tmp_path / "secret").write_text("secret")
    for trick in ("../../../secret", str(tmp_path / "secret"), "/etc/passwd"):
        (path / checkpoint.SUMS).write_text(f"{'0' * 64}  {trick}\n")
        assert checkpoint.find_damage(path) == f"{checkpoint.SUMS} does not list {checkpoint.FILES[0]}"
        (path / checkpoint.SUMS).write_text(checkpoint._sums(path) + f"{'0' * 64}  {trick}\n")
        assert checkpoint.find_damage(path) == f"{checkpoint.SUMS} is not what was written"


def test_a_pipe_in_place_of_a_file_does_not_hang(hostile):
    path, _ = hostile
    (path / "state.json").unlink()
    os.mkfifo(path / "state.json")
    assert checkpoint.find_damage(path) == "state.json is missing"


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors | {"exp_avg.mask_token": torch.zeros(3)},
        lambda tensors: tensors | {"exp_avg_sq.norm.weight": tensors["exp_avg_sq.norm.weight"].double()},
        lambda tensors: tensors | {"step.cls_token": torch.zeros(5)},
        lambda tensors: {name: value for name, value in tensors.items() if name != "exp_avg.cls_token"},
        lambda tensors: {name: value for name, value in tensors.items() if name != "guard.loss_scale"},
    ],
)
def test_moments_of_another_shape_or_type_are_refused_by_name(change, hostile):
    path, seal = hostile
    file = path / "optimizer.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(ValueError, match=r"(mask_token|norm.weight|cls_token|loss_scale) is .*not fp32"):
        restore(seal())


def test_weights_of_another_shape_are_refused_by_name(hostile):
    path, seal = hostile
    file = path / "model.safetensors"
    header = header_of(file)
    save_file(load_file(file) | {"mask_token": torch.zeros(1, 1, 9)}, file, metadata=header)
    with pytest.raises(ValueError, match=r"mask_token is \(1, 1, 9\), the model has \(1, 1, 16\)"):
        restore(seal())


@pytest.mark.parametrize(
    "field",
    [
        {"embed_dim": 4 * 10**9, "num_heads": 1},
        {"depth": 10**9},
        {"image_size": 8 * 10**9},
        {"mlp_ratio": 1e300},
        {"mean": "code"},
    ],
)
def test_a_header_that_claims_a_giant_model_takes_no_memory(field, hostile):
    path, seal = hostile
    file = path / "model.safetensors"
    header = header_of(file)
    header["model"] = json.dumps(json.loads(header["model"]) | field)
    save_file(load_file(file), file, metadata=header)
    with pytest.raises(ValueError, match=r"larger model than the file holds|cannot be used"):
        checkpoint.load_model(seal())
    with pytest.raises(ValueError, match=r"another model|cannot be used"):
        restore(path)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "{}",
        "[]",
        '{"step": "1", "group_steps": [null, null], "loader": {"epoch": 0, "step": 0, "fingerprint": {}}}',
        '{"step": 1, "group_steps": [null, null], "loader": {"epoch": -1, "step": 0, "fingerprint": {}}}',
        '{"step": 1, "group_steps": 7, "loader": {"epoch": 0, "step": 0, "fingerprint": {}}}',
    ],
)
def test_a_state_that_is_none_is_refused(text, hostile):
    path, seal = hostile
    (path / "state.json").write_text(text)
    with pytest.raises(ValueError, match=r"state.json does not hold the state of a run"):
        restore(seal())


def test_a_header_length_beyond_the_file_is_refused(hostile):
    path, seal = hostile
    raw = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + raw[8:])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        restore(seal())
