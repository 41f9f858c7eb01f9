"""The encoder that is evaluated: of a run, a foreign file, random or from scratch; and where results go."""

from pathlib import Path

import pytest
import torch

from patchmill.trainer.checkpoints.checkpoint import find_model_file
from patchmill.trainer.checkpoints.interop import write_checkpoint
from patchmill.trainer.config.evaluate import SubjectConfig
from patchmill.trainer.evaluate.encoder_source import default_out, open_subject
from patchmill.trainer.pretrain import pretrain
from patchmill.trainer.recipes.pretrain import get_recipe, with_options
from tests.support.photos import make_dataset
from tests.support.small_models import TINY, random_checkpoint


def test_a_runs_newest_checkpoint_and_its_origin(tmp_path):
    data = make_dataset(tmp_path / "data", count=16, sides=(40, 64))
    small = {"embed_dim": 16, "depth": 1, "num_heads": 2, "decoder_embed_dim": 16, "decoder_num_heads": 2}
    pretrain(
        with_options(
            get_recipe("mae-cifar-nano-p4"),
            **{f"model__{name}": value for name, value in small.items()},
            data__path=str(data),
            out=str(tmp_path / "mae-s3"),
            seed=3,
            device="cpu",
            train__total_steps=2,
            train__global_batch=8,
            train__tensorboard=False,
        )
    )
    subject = open_subject(SubjectConfig(checkpoint=str(tmp_path / "mae-s3")), 0)
    assert subject.file == find_model_file(tmp_path / "mae-s3")
    assert subject.origin()["pretrained"] == {"run": "mae-s3", "seed": 3, "step": 2, "images": 16}
    assert default_out(subject.file, "probe", subject.start) == tmp_path / "mae-s3" / "probe"
    assert default_out(subject.file, "probe", "random") == tmp_path / "mae-s3" / "probe-random"


def test_random_weights_have_the_shape_and_follow_the_seed(tmp_path):
    file = tmp_path / "mae.safetensors"
    write_checkpoint(random_checkpoint(), file)
    config = SubjectConfig(checkpoint=str(file), random_init=True)
    first, again, other = (open_subject(config, seed).encoder.state_dict() for seed in (1, 1, 2))
    name = "blocks.1.mlp.fc1.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])
    loaded = open_subject(SubjectConfig(checkpoint=str(file)), 1)
    assert loaded.start == "pretrained"
    assert torch.equal(loaded.encoder.state_dict()[name], random_checkpoint().tensors[name])
    assert loaded.origin() == {"start": "pretrained", "checkpoint": str(file)}
    assert default_out(file, "knn", "pretrained") == tmp_path / "mae-knn"
    larger = open_subject(SubjectConfig(checkpoint=str(file), image_size=48), 1)
    assert larger.encoder.pos_embed.shape == (1, 1 + 36, 32)


def test_from_scratch_needs_no_file_and_a_place(tmp_path):
    subject = open_subject(SubjectConfig(model=TINY), 0)
    assert (subject.start, subject.file, subject.origin()) == ("scratch", None, {"start": "scratch"})
    with pytest.raises(ValueError, match="give --out DIR"):
        default_out(None, "finetune", "scratch")
    with pytest.raises(ValueError, match=r"give --subject\.checkpoint"):
        open_subject(SubjectConfig(), 0)
    with pytest.raises(ValueError, match="from-scratch recipe has its own model"):
        SubjectConfig(checkpoint="x", model=TINY)
    with pytest.raises(ValueError, match="no such file"):
        open_subject(SubjectConfig(checkpoint=str(Path(tmp_path, "absent"))), 0)
