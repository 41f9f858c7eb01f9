"""Makes labelled photographs, a small encoder on disk and short configs for the evaluation tests."""

import dataclasses
from pathlib import Path
from typing import Any

from patchmill.pipeline.config import EpochConfig
from patchmill.trainer.checkpoints.interop import write_checkpoint
from patchmill.trainer.config.evaluate import SubjectConfig, TestConfig
from patchmill.trainer.recipes.cifar import finetune_cifar, probe_cifar_nano
from tests.support.photos import make_dataset
from tests.support.small_models import random_checkpoint


def make_setup(root):
    """root/train (48 photographs), root/test (21, no multiple of any batch here) and root/encoder.safetensors."""
    for name, count, seed in (("train", 48, 0), ("test", 21, 5)):
        make_dataset(root / name, count=count, seed=seed, sides=(40, 64))
    write_checkpoint(random_checkpoint(), root / "encoder.safetensors")
    return root


def where(root) -> dict[str, Any]:
    return {
        "subject": SubjectConfig(checkpoint=str(root / "encoder.safetensors")),
        "data": EpochConfig(path=str(root / "train" / "dataset"), scale=(0.3, 1.0)),
        "test": TestConfig(path=str(root / "test" / "dataset"), batch=8),
        "device": "cpu",
    }


def finetune_config(root, out, **changes):
    """Every augmentation on; 3 epochs of 3 steps."""
    config = finetune_cifar()
    fit = dataclasses.replace(config.fit, global_batch=16, accum_steps=2, epochs=3, save_every_steps=2)
    optim = dataclasses.replace(config.optim, blr=2e-2, warmup_epochs=1)
    fixed: dict[str, Any] = {"out": str(out), "fit": fit, "optim": optim, "average": 0.9, "drop_path": 0.3}
    return dataclasses.replace(config, **where(root), **fixed | changes)


def probe_config(root, out, **changes):
    config = probe_cifar_nano()
    fit = dataclasses.replace(config.fit, global_batch=16, epochs=3, save_every_steps=2, test_every_epochs=1)
    return dataclasses.replace(config, **where(root), out=str(out), fit=fit, **changes)


def files_of(run: Path):
    return sorted(path.name for path in run.iterdir())
