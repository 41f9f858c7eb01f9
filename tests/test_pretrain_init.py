"""Pretraining that begins from weights: a run's own, another format's, another size's, and what cannot fit."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from patchmill.trainer.checkpoints import checkpoint
from patchmill.trainer.checkpoints.interop import read_checkpoint, write_checkpoint
from patchmill.trainer.checkpoints.names import encoder_only, is_decoder
from patchmill.trainer.checkpoints.warm_start import begin_from
from patchmill.trainer.model.build import build_model
from patchmill.trainer.pretrain import pretrain
from tests.support.photos import make_dataset
from tests.support.small_runs import small_run


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"), count=16)


@pytest.fixture(scope="module")
def first(dataset, tmp_path_factory):
    """A finished run."""
    run = tmp_path_factory.mktemp("runs") / "first"
    pretrain(config_of(dataset, run, seed=5))
    return run


def config_of(dataset, run, **changes):
    return small_run(dataset, run, **{"train__total_steps": 2} | changes)


def weights(run, step):
    return load_file(checkpoint.folder(run, step) / "model.safetensors")


def test_a_run_begins_with_the_weights_of_another(dataset, first, tmp_path):
    """With a learning rate of next to nothing they are still there after two updates, and after a resume.

    Adam moves a weight by about the learning rate (4e-32 here), whatever the processor's rounding makes of a gradient;
    only a weight near 0 shows so small a step. Weights of another seed differ by far more.
    """
    run = tmp_path / "run"
    still = {"init": str(first), "optim__blr": 1e-30, "optim__weight_decay": 0.0, "train__save_every_steps": 1}
    summary = pretrain(config_of(dataset, run, **still))
    assert summary.began_from is not None
    assert summary.began_from.endswith("model.safetensors: encoder and decoder")
    before, after = weights(first, 2), weights(run, 2)
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-20, msg=name)
    (checkpoint.folder(run, 2) / "model.safetensors").unlink()
    resumed = pretrain(config_of(dataset, run, **still | {"init": "gone"}))  # a checkpoint comes first
    assert (resumed.began_from, resumed.resumed_from) == (None, checkpoint.folder(run, 1))


def test_an_encoder_alone_leaves_the_decoder_to_the_seed(first, tmp_path):
    found = read_checkpoint(first)
    write_checkpoint(found._replace(tensors=encoder_only(found.tensors)), tmp_path / "encoder.safetensors")
    check_decoder_is_of_the_seed(found, tmp_path / "encoder.safetensors", "encoder; the file has no decoder")
    shallow = found._replace(config=dataclasses.replace(found.config, decoder_depth=1))
    check_decoder_is_of_the_seed(shallow, first, "encoder; its decoder differs (decoder_depth 2 there, 1 here)")


def check_decoder_is_of_the_seed(found, path, words):
    model = build_model(found.config)
    seeded = {name: value.clone() for name, value in model.state_dict().items()}
    assert begin_from(model, str(path)).endswith(words)
    for name, value in model.state_dict().items():
        assert torch.equal(value, seeded[name] if is_decoder(name) else found.tensors[name]), name


def test_positions_are_interpolated_to_another_size(first):
    found = read_checkpoint(first)
    model = build_model(dataclasses.replace(found.config, image_size=64))
    begin_from(model, str(first))
    table = model.state_dict()["pos_embed"]
    assert table.shape == (1, 65, 32)
    small = torch.nn.functional.interpolate(
        found.tensors["pos_embed"][:, 1:].view(1, 4, 4, 32).permute(0, 3, 1, 2), (8, 8), mode="bicubic"
    )
    torch.testing.assert_close(table[:, 1:], small.flatten(2).transpose(1, 2))


def test_what_does_not_fit_is_said_with_a_remedy(dataset, first, tmp_path):
    for changes, said in (
        ({"init": str(first), "model__depth": 3}, "encoder of another shape .depth 2 there, 3 here"),
        ({"init": str(tmp_path / "none")}, "none"),
    ):
        with pytest.raises((ValueError, OSError), match=said):
            pretrain(config_of(dataset, tmp_path / "run", **changes))
        assert not (tmp_path / "run" / "metrics.jsonl").exists()
