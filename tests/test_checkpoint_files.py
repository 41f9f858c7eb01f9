"""Checkpoints: atomic, verified, readable by anyone, and never of another model."""

import errno
import os

import pytest
import torch
from safetensors import safe_open

from patchmill.trainer.checkpoints import checkpoint
from patchmill.trainer.config.model import ModelConfig
from tests.support.small_models import SMALLEST
from tests.support.trained import GUARD, save, trained_pair


def test_what_was_saved_comes_back_bit_for_bit(tmp_path):
    model, optimizer = trained_pair()
    path = save(tmp_path, 7, model, optimizer, {"epoch": 1, "step": 2, "fingerprint": {"seed": 3}})
    assert path == tmp_path / "checkpoints" / "step-00000007"
    assert checkpoint.find_damage(path) is None
    other, other_optimizer = trained_pair(seed=1)
    state = checkpoint.restore(path, other, other_optimizer, GUARD)
    assert (state["step"], state["loader"]) == (7, {"epoch": 1, "step": 2, "fingerprint": {"seed": 3}})
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        for key, value in optimizer.state.get(a, {}).items():
            assert torch.equal(value, other_optimizer.state[b][key]), (name, key)
    with safe_open(path / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(model.state_dict())
        assert "blocks.0.attn.qkv.weight" in file.keys()  # noqa: SIM118 (safe_open is no dict)


@pytest.mark.parametrize("name", [*checkpoint.FILES, checkpoint.SUMS])
def test_damage_anywhere_is_found_and_the_one_before_is_taken(name, tmp_path):
    model, optimizer = trained_pair()
    good = save(tmp_path, 1, model, optimizer)
    bad = save(tmp_path, 2, model, optimizer)
    raw = bytearray((bad / name).read_bytes())
    for position in (0, len(raw) // 2, len(raw) - 1):
        damaged = raw.copy()
        damaged[position] ^= 0x10
        (bad / name).write_bytes(damaged)
        path, passed_over = checkpoint.newest_valid(tmp_path)
        assert path == good
        assert [entry.path for entry in passed_over] == [bad]
    (bad / name).unlink()
    assert name in str(checkpoint.find_damage(bad))


def test_a_full_disk_leaves_the_checkpoint_before_and_nothing_half_written(tmp_path, monkeypatch):
    model, optimizer = trained_pair()
    good = save(tmp_path, 1, model, optimizer)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match=r"No space left.*free space"):
        save(tmp_path, 2, model, optimizer)
    assert sorted((tmp_path / "checkpoints").iterdir()) == [good]
    assert checkpoint.find_damage(good) is None


def test_prune_keeps_the_newest(tmp_path):
    model, optimizer = trained_pair()
    paths = [save(tmp_path, step, model, optimizer) for step in (1, 2, 30)]
    checkpoint.prune(tmp_path, keep_last=2)
    assert checkpoint.all_checkpoints(tmp_path) == paths[1:]


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path):
    model, optimizer = trained_pair()
    path = save(tmp_path, 1, model, optimizer)
    other = trained_pair(ModelConfig(**{**SMALLEST.__dict__, "embed_dim": 24}))
    with pytest.raises(ValueError, match="embed_dim 16 there, 24 here"):
        checkpoint.restore(path, other[0], other[1], GUARD)


def test_load_model_takes_run_folder_checkpoint_or_file(tmp_path):
    model, optimizer = trained_pair()
    path = save(tmp_path, 3, model, optimizer)
    for given in (tmp_path, path, path / "model.safetensors"):
        loaded, source = checkpoint.load_model(given)
        assert source == path / "model.safetensors"
        assert loaded.config == SMALLEST
        assert torch.equal(loaded.norm.weight, model.norm.weight)
        assert not loaded.training


def test_load_model_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        checkpoint.load_model(tmp_path / "absent")
    (tmp_path / "junk.safetensors").write_bytes(b"junk" * 100)
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        checkpoint.load_model(tmp_path / "junk.safetensors")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="no valid checkpoint"):
        checkpoint.load_model(tmp_path / "run")
