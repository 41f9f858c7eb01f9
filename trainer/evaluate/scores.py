"""Counts what a classifier got right, over all ranks, with torchmetrics."""

import importlib.util
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_CONFUSION_CLASSES = 2000
"""most classes for which a confusion matrix is kept"""


class Scores(NamedTuple):
    """Scores of a classifier on test data."""

    top1: float
    """share of images whose top class is right, 0 to 1"""
    top5: float
    """share of images whose true class is among the top five (or all, where there are fewer)"""
    loss: float
    """mean cross entropy"""
    samples: int
    """images counted"""
    confusion: Tensor | None
    """int64 [A, A]: rows are true classes, columns predicted ones; None beyond MAX_CONFUSION_CLASSES classes"""

    def plain(self) -> dict[str, Any]:
        """For JSON, without the confusion matrix."""
        return {"top1": self.top1, "top5": self.top5, "test_loss": self.loss, "test_samples": self.samples}


class Scorer:
    """Accumulates batches and returns their scores, the same on every rank."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        check_torchmetrics()
        from torchmetrics import MeanMetric, MetricCollection, SumMetric
        from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

        top5 = MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro", validate_args=False)
        self.counts = MetricCollection(
            {"top1": MulticlassAccuracy(num_classes, average="micro", validate_args=False), "top5": top5},
            compute_groups=False,
        ).to(device)
        self.loss = MeanMetric(nan_strategy="disable").set_dtype(torch.float64).to(device)
        self.samples = SumMetric().set_dtype(torch.float64).to(device)
        self.confusion = None
        if num_classes <= MAX_CONFUSION_CLASSES:
            self.confusion = MulticlassConfusionMatrix(num_classes, validate_args=False).to(device)

    def add(self, logits_BA: Tensor, labels_B: Tensor, counts_B: Tensor) -> None:
        """Adds the rows of a batch that count."""
        logits_nA, labels_n = logits_BA[counts_B].float(), labels_B[counts_B]
        if not len(labels_n):
            return
        self.counts.update(logits_nA, labels_n)
        self.loss.update(F.cross_entropy(logits_nA, labels_n, reduction="none"))
        self.samples.update(float(len(labels_n)))
        if self.confusion is not None:
            self.confusion.update(logits_nA, labels_n)

    def result(self) -> Scores:
        """The scores over all ranks. Every rank must call it."""
        found = self.counts.compute()
        confusion = None if self.confusion is None else self.confusion.compute().cpu()
        top1, top5, loss, samples = (
            float(v) for v in (found["top1"], found["top5"], self.loss.compute(), self.samples.compute())
        )
        # torchmetrics divides in fp32: round to whole images and divide again in fp64
        top1, top5 = (round(share * samples) / max(samples, 1) for share in (top1, top5))
        return Scores(top1, top5, loss, int(samples), confusion)


def check_torchmetrics() -> None:
    """Raises ValueError when torchmetrics is not installed."""
    if importlib.util.find_spec("torchmetrics") is None:
        raise ValueError("evaluation needs torchmetrics: pip install 'patchmill[eval]'")
