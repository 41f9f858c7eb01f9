"""kNN's votes by hand."""

import math

import pytest
import torch

from patchmill.trainer.evaluate.knn import FeatureTable, knn_scores
from patchmill.trainer.evaluate.online import fit_logistic


def test_votes_by_hand():
    angles = torch.tensor([0.0, 60.0, 90.0, 180.0]).deg2rad()
    train = FeatureTable(3.0 * torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([0, 1, 1, 2]))
    votes = knn_scores(train, torch.tensor([[2.0, 0.0]]), (1, 2, 9), 0.5, 3)
    # cosines to the test image: 1, 0.5, 0, -1; a vote is exp(cosine / 0.5)
    assert votes[1].tolist()[0] == pytest.approx([math.e**2, 0, 0], rel=1e-5)
    assert votes[2].tolist()[0] == pytest.approx([math.e**2, math.e, 0], rel=1e-5)
    assert votes[9].tolist()[0] == pytest.approx([math.e**2, math.e + 1, math.e**-2], rel=1e-5)


def test_blocks_of_the_similarity_matrix_do_not_show(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    train = FeatureTable(torch.randn(50, 8, generator=generator), torch.arange(50) % 4)
    test = torch.randn(33, 8, generator=generator)
    whole = knn_scores(train, test, (5,), 0.07, 4)[5]
    monkeypatch.setattr("patchmill.trainer.evaluate.knn.SIMILARITIES", 50 * 4)
    torch.testing.assert_close(knn_scores(train, test, (5,), 0.07, 4)[5], whole)
    assert torch.equal(knn_scores(train, train.features, (1,), 0.07, 4)[1].argmax(1), train.labels)


def test_the_online_probe_finds_what_is_linear():
    generator = torch.Generator().manual_seed(0)
    centres, labels = 3 * torch.randn(4, 6, generator=generator), torch.arange(200) % 4
    features = centres[labels] + 0.3 * torch.randn(200, 6, generator=generator)
    table = FeatureTable(features * torch.tensor([1, 10, 100, 1, 1, 1e-3]) + 50, labels)
    weight, bias = fit_logistic(table, 4)
    again, _ = fit_logistic(table, 4)
    assert torch.equal(weight, again)
    standard = (table.features - table.features.mean(0)) / table.features.std(0)
    assert ((standard @ weight.T + bias).argmax(1) == labels).all()
