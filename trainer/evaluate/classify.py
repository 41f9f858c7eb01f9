"""Scores a classifier on labelled data in one pass.

`classify` is the test of probing and fine-tuning; `evaluate_classifier` scores a finished classifier on any labelled
dataset (ImageNet-A, -R, -C, Sketch, ...).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from patchmill.pipeline.config import ReadConfig
from patchmill.trainer.checkpoints.model_file import parse_model_config
from patchmill.trainer.config.evaluate import TestConfig
from patchmill.trainer.engine.world import World, autocast_dtype
from patchmill.trainer.evaluate.classifier import Classifier
from patchmill.trainer.evaluate.labelled import class_columns, each_once, open_labelled, to_test_classes
from patchmill.trainer.evaluate.scores import Scorer, Scores, check_torchmetrics
from patchmill.trainer.evaluate.state import read_classifier
from patchmill.trainer.model.build import build_model
from patchmill.trainer.model.encoder import Encoder


class Tested(NamedTuple):
    """Scores of a finished classifier on one dataset."""

    path: str
    classes: list[str]
    scores: Scores
    unseen: int
    """images that could not be read"""


@torch.no_grad()
def classify(
    model: Classifier,
    data: ReadConfig,
    test: TestConfig,
    columns: list[list[int]] | None,
    num_classes: int,
    world: World,
    autocast: torch.dtype | None,
    call: Callable[[Tensor], Tensor] | None = None,
) -> Scores:
    """Scores every test image once, centre-cropped.

    Args:
        columns: from `class_columns`.
        num_classes: of the test data.
        call: maps normalised images to logits; unset: the model itself.
    """
    scorer = Scorer(num_classes, world.device)
    for batch, counts_B in each_once(data, test.path, test.crop_fraction, model.config, world, test.batch):
        images_BCHW = model.normalise(batch.images.permute(0, 3, 1, 2) / 255)
        with torch.autocast(world.device.type, dtype=autocast, enabled=autocast is not None):
            logits_BA = (call or model)(images_BCHW)
        scorer.add(to_test_classes(logits_BA.float(), columns), batch.labels, counts_B)
    return scorer.result()


def load_classifier(path: Path) -> tuple[Classifier, dict[str, Any]]:
    """Loads a finished classifier in eval mode on the CPU, with its header: classes, pool, head, model, protocol.

    Raises:
        ValueError: the file is missing or damaged.
    """
    tensors, about = read_classifier(path)
    encoder = Encoder(build_model(parse_model_config(about["model"], path)))
    model = Classifier(encoder, len(about["classes"]), about["pool"], about["head"])
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"the tensors of {path} do not match its header: {error}; give another file") from error
    return model.eval(), about


def evaluate_classifier(
    path: Path, data: ReadConfig, tests: list[TestConfig], precision: Any, world: World
) -> list[Tested]:
    """Scores a finished classifier on each test set; classes match by name or class map.

    Raises:
        ValueError: a classifier or dataset that cannot be used.
    """
    check_torchmetrics()
    model, about = load_classifier(path)
    model.to(world.device)
    autocast = autocast_dtype(precision, world.device)
    results = []
    for test in tests:
        opened = open_labelled(test.path, "tests")
        columns = class_columns(test, opened.classes, about["classes"])
        scores = classify(model, data, test, columns, len(opened.classes), world, autocast)
        results.append(Tested(test.path, opened.classes, scores, opened.num_samples - scores.samples))
    return results
