"""a model, labelled data -> [evaluate] -> accuracy: one pass over test data, and what pretraining asks on its way.

`classify` is the test of probing and fine-tuning, `evaluate_classifier` that of a finished one on any labelled shards
(ImageNet-A, -R, -C, Sketch, ...), `OnlineEvaluation` kNN and a linear probe while pretraining goes on.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from patchmill.pipeline.data_config import DataConfig
from patchmill.trainer.checkpoint import parse_model_config
from patchmill.trainer.classifier import Classifier
from patchmill.trainer.encoder import Encoder
from patchmill.trainer.eval_config import TestConfig
from patchmill.trainer.eval_state import read_classifier
from patchmill.trainer.knn import FeatureTable, knn_scores, make_table
from patchmill.trainer.labelled import Labelled, class_columns, each_once, open_labelled, to_test_classes
from patchmill.trainer.models import build_model
from patchmill.trainer.online_config import OnlineEvalConfig
from patchmill.trainer.scores import Scorer, Scores, check_torchmetrics
from patchmill.trainer.vit import VisionTransformer
from patchmill.trainer.world import World, autocast_dtype

L2 = 1e-4
"""of the online probe's weights, per image"""
PROBE_ITERATIONS = 100


class Tested(NamedTuple):
    """A finished classifier on a dataset."""

    path: str
    classes: list[str]
    scores: Scores
    unseen: int
    """images that could not be read"""


@torch.no_grad()
def classify(
    model: Classifier,
    data: DataConfig,
    test: TestConfig,
    columns: list[list[int]] | None,
    num_classes: int,
    world: World,
    autocast: torch.dtype | None,
    call: Callable[[Tensor], Tensor] | None = None,
) -> Scores:
    """Every test image once, centre-cropped.

    Args:
        columns: as `class_columns` gives them.
        num_classes: of the test data.
        call: what maps normalised images to logits, when not the model itself.
    """
    scorer = Scorer(num_classes, world.device)
    for batch, counts_B in each_once(data, test.path, test.crop_fraction, model.config, world, test.batch):
        images_BCHW = model.normalise(batch.images.permute(0, 3, 1, 2) / 255)
        with torch.autocast(world.device.type, dtype=autocast, enabled=autocast is not None):
            logits_BA = (call or model)(images_BCHW)
        scorer.add(to_test_classes(logits_BA.float(), columns), batch.labels, counts_B)
    return scorer.result()


def load_classifier(path: Path) -> tuple[Classifier, dict[str, Any]]:
    """A finished classifier in eval mode on the CPU, and its header: classes, pool, head, model, protocol.

    Raises:
        ValueError: it is not there or not whole.
    """
    tensors, about = read_classifier(path)
    encoder = Encoder(build_model(parse_model_config(about["model"], path)))
    model = Classifier(encoder, len(about["classes"]), about["pool"], about["head"])
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit its own header: {error}; give another") from error
    return model.eval(), about


def evaluate_classifier(
    path: Path, data: DataConfig, tests: list[TestConfig], precision: Any, world: World
) -> list[Tested]:
    """Scores of a finished classifier on each test set; classes are matched by name or class map.

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


class OnlineEvaluation:
    """kNN and a linear probe of a model in training; call it between two updates, on every rank.

    It draws nothing from torch's generators and changes nothing of the model, so that the run's trajectory is the same
    with and without it.
    """

    def __init__(self, config: OnlineEvalConfig, data: DataConfig, world: World) -> None:
        """Checks the data, so that a wrong path fails before training and not an epoch later.

        Args:
            data: of the pretraining: reader, decoder, and the training images when the config names none.
        Raises:
            ValueError, FileNotFoundError: data without labels, or not there.
        """
        self.config, self.data, self.world = config, data, world
        self.train: Labelled = open_labelled(config.data_path or data.path, "eval.data-path")
        self.test: Labelled = open_labelled(config.test_path, "eval.test-path")
        if self.train.classes != self.test.classes:
            raise ValueError(f"{self.train.path} and {self.test.path} have other classes; eval needs the same ones")

    def is_due(self, step: int, steps_per_epoch: int) -> bool:
        """Whether an evaluation falls on the update that made `step` updates done."""
        every = self.config.every_epochs
        return every is not None and step > 0 and step % max(1, round(every * steps_per_epoch)) == 0

    def __call__(self, model: VisionTransformer, autocast: torch.dtype | None) -> dict[str, float]:
        """knn_top1, probe_top1 (0 to 1, class token, centre crops) of the model as it is.

        Args:
            model: the bare model, not its DDP wrapper; with FSDP its parameters must be whole.
        """
        was_training = model.training
        encoder = Encoder(model).eval().to(self.world.device)
        most = self.config.max_train_samples if self.config.max_train_samples < self.train.num_samples else None
        train, test = (
            make_table(encoder, self.data, path, self.config.crop_fraction, "cls", self.world, autocast, most=limit)
            for path, limit in ((self.train.path, most), (self.test.path, None))
        )
        model.train(was_training)
        classes = len(self.train.classes)
        votes_TA = knn_scores(train, test.features, (self.config.neighbours,), 0.07, classes)[self.config.neighbours]
        weight_AD, bias_A = fit_logistic(train, classes)
        probe_TA = _standardise(test.features, train.features) @ weight_AD.T + bias_A
        return {
            name: float((found.argmax(1) == test.labels).double().mean())
            for name, found in (("knn_top1", votes_TA), ("probe_top1", probe_TA))
        }


def fit_logistic(table: FeatureTable, num_classes: int) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression on standardised features by L-BFGS from zero: weight [A, D] and bias [A].

    Full batches and no random number: the same features give the same classifier.
    """
    with torch.enable_grad():
        x_ND, labels_N = _standardise(table.features, table.features), table.labels
        weight = torch.zeros(num_classes, x_ND.shape[1], device=x_ND.device, requires_grad=True)
        bias = torch.zeros(num_classes, device=x_ND.device, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=PROBE_ITERATIONS, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(x_ND @ weight.T + bias, labels_N) + L2 * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
    return weight.detach(), bias.detach()


def _standardise(x: Tensor, like_ND: Tensor) -> Tensor:
    return (x - like_ND.mean(0)) / like_ND.std(0).clamp_min(1e-6)
