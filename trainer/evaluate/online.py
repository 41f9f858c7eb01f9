"""Scores a model during pretraining with kNN and a linear probe.

Shapes: N training images, T test images, D width, A classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from patchmill.pipeline.config import ReadConfig
from patchmill.trainer.config.pretrain import OnlineEvalConfig
from patchmill.trainer.engine.world import World
from patchmill.trainer.evaluate.knn import FeatureTable, knn_scores, make_table
from patchmill.trainer.evaluate.labelled import Labelled, open_labelled
from patchmill.trainer.model.encoder import Encoder
from patchmill.trainer.model.vit import VisionTransformer

L2 = 1e-4
"""penalty of the online probe: times the sum of squared weights, added to the mean loss"""
PROBE_ITERATIONS = 100
"""most iterations of L-BFGS"""


class OnlineEvaluation:
    """Scores a model in training with kNN and a linear probe; call it between two updates, on every rank.

    It draws nothing from torch's generators and leaves the model unchanged: the run's trajectory is the same with and
    without it.
    """

    def __init__(self, config: OnlineEvalConfig, data: ReadConfig, world: World) -> None:
        """Checks the data now, because a wrong path must fail before training and not an epoch later.

        Args:
            data: how pretraining reads; its path gives the training images when `config` names none.
        Raises:
            ValueError, FileNotFoundError: the data have no labels, or are missing.
        """
        self.config, self.data, self.world = config, data, world
        self.train: Labelled = open_labelled(config.data_path or data.path, "eval.data-path")
        self.test: Labelled = open_labelled(config.test_path, "eval.test-path")
        if self.train.classes != self.test.classes:
            raise ValueError(f"{self.train.path} and {self.test.path} have different classes; eval needs the same ones")

    def is_due(self, step: int, steps_per_epoch: int) -> bool:
        """Whether to evaluate now that `step` updates are done."""
        every = self.config.every_epochs
        return every is not None and step > 0 and step % max(1, round(every * steps_per_epoch)) == 0

    def __call__(self, model: VisionTransformer, autocast: torch.dtype | None) -> dict[str, float]:
        """Returns knn_top1 and probe_top1 (0 to 1; class token, centre crops).

        Args:
            model: the bare model, not its DDP wrapper; FSDP parameters must be gathered first.
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
    """Fits multinomial logistic regression to standardised features by L-BFGS from zero: weight [A, D] and bias [A].

    It uses full batches and no random numbers: the same features give the same classifier.
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
