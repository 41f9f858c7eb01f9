"""Classifies by nearest neighbours in feature space, without training.

Source: weighted kNN of Wu et al. 2018 as DINO uses it: cosine similarity, the k nearest training images vote with
weight exp(similarity / temperature).

Shapes: N training images, T test images, D width, A classes, k neighbours.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from patchmill.pipeline.config import ReadConfig
from patchmill.trainer.config.evaluate import KnnConfig, Pool
from patchmill.trainer.engine.world import World, autocast_dtype
from patchmill.trainer.evaluate.encoder_source import Subject
from patchmill.trainer.evaluate.labelled import class_columns, each_once, open_labelled, to_test_classes
from patchmill.trainer.evaluate.scores import Scorer, Scores, check_torchmetrics
from patchmill.trainer.model.encoder import Encoder

SIMILARITIES = 1 << 26
"""values per block of the similarity matrix: 256 MiB"""


class FeatureTable(NamedTuple):
    """Features of a dataset's readable images, on every rank, in the dataset's order."""

    features: Tensor
    """fp32 [N, D]"""
    labels: Tensor
    """int64 [N]"""


@torch.no_grad()
def make_table(
    encoder: Encoder,
    data: ReadConfig,
    path: str,
    crop_fraction: float,
    pool: Pool,
    world: World,
    autocast: torch.dtype | None,
    *,
    batch: int = 256,
    most: int | None = None,
) -> FeatureTable:
    """Encodes the images of a dataset, each once, centre-cropped; see `each_once` for `batch` and `most`."""
    features, labels, counts = [], [], []
    for found, counts_B in each_once(data, path, crop_fraction, encoder.config, world, batch, most=most):
        with torch.autocast(world.device.type, dtype=autocast, enabled=autocast is not None):
            cls_BD, patches_BLD = encoder(found.images)
        features.append((cls_BD if pool == "cls" else patches_BLD.float().mean(1)).float())
        labels.append(found.labels)
        counts.append(counts_B)
    # batches of all ranks interleave: [step, rank, row] is the dataset's order
    parts = [torch.stack(world.gather(torch.stack(each)), 1).flatten(0, 2) for each in (features, labels, counts)]
    counted = parts[2]
    return FeatureTable(*(part[counted].to(world.device) for part in parts[:2]))


def knn_scores(
    train: FeatureTable, test_TD: Tensor, neighbours: Sequence[int], temperature: float, num_classes: int
) -> dict[int, Tensor]:
    """Votes for each class, fp32 [T, A], for each number of neighbours (all images where there are fewer).

    Example: neighbours at cosine 1.0 (class 0) and 0.5 (class 1), temperature 0.5: votes e^2 and e^1.
    """
    bank_ND = torch.nn.functional.normalize(train.features, dim=1)
    most = min(max(neighbours), len(bank_ND))
    votes: dict[int, list[Tensor]] = {k: [] for k in neighbours}
    for part_tD in torch.nn.functional.normalize(test_TD, dim=1).split(max(1, SIMILARITIES // len(bank_ND))):
        cosine_tk, near_tk = (part_tD @ bank_ND.T).topk(most, 1)
        weight_tk, label_tk = (cosine_tk / temperature).exp(), train.labels[near_tk]
        for k in neighbours:
            empty_tA = weight_tk.new_zeros(len(part_tD), num_classes)
            votes[k].append(empty_tA.scatter_add_(1, label_tk[:, :k], weight_tk[:, :k]))
    return {k: torch.cat(parts) for k, parts in votes.items()}


def run_knn(config: KnnConfig, subject: Subject, world: World) -> dict[int, Scores]:
    """Scores for each number of neighbours.

    Raises:
        ValueError: the data have no labels, or the test data have classes that the training data lack.
    """
    check_torchmetrics()
    train, test = open_labelled(config.data.path, "data.path"), open_labelled(config.test.path, "test.path")
    columns = class_columns(config.test, test.classes, train.classes)
    encoder, autocast = subject.encoder.to(world.device), autocast_dtype(config.precision, world.device)
    tables = [
        make_table(
            encoder, config.data, which.path, config.test.crop_fraction, config.pool, world, autocast,
            batch=config.test.batch,
        )
        for which in (train, test)
    ]  # fmt: skip
    votes = knn_scores(tables[0], tables[1].features, config.neighbours, config.temperature, len(train.classes))
    return {k: _score(votes_TA, tables[1].labels, columns, len(test.classes), world) for k, votes_TA in votes.items()}


def _score(
    votes_TA: Tensor, labels_T: Tensor, columns: list[list[int]] | None, num_classes: int, world: World
) -> Scores:
    """Scores this rank's share: every rank holds all votes, and each image must count once over all ranks."""
    scorer = Scorer(num_classes, world.device)
    mine_T = torch.arange(len(labels_T), device=labels_T.device) % world.size == world.rank
    shares_TA = votes_TA / votes_TA.sum(1, keepdim=True)
    scorer.add(to_test_classes((shares_TA + 1e-6).log(), columns), labels_T, mine_T)
    return scorer.result()
