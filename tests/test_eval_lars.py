"""LARS against a calculation by hand: rates, momentum, decay, vectors, zero norms."""

import pytest
import torch
from torch import nn

from patchmill.trainer.evaluate.lars import Lars


def parameter(values, gradient):
    p = nn.Parameter(torch.tensor(values, dtype=torch.float64))
    p.grad = torch.tensor(gradient, dtype=torch.float64)
    return p


def test_two_steps_by_hand():
    weight, bias = parameter([[3.0, 4.0]], [[0.0, 2.0]]), parameter([1.0], [0.5])
    optimizer = Lars([weight, bias], lr=0.1, momentum=0.9, trust=0.001)
    optimizer.step()
    # |w| 5, |g| 2: g'' = 0.001 * 5 / 2 * [0, 2] = [0, 0.005]; w = [3, 4] - 0.1 * [0, 0.005]. The bias is not scaled.
    assert weight.tolist()[0] == pytest.approx([3.0, 3.9995], abs=1e-12)
    assert bias.tolist() == pytest.approx([0.95])
    weight.grad, bias.grad = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([-1.0]).double()
    optimizer.step()
    # |w| = sqrt(9 + 3.9995**2) = 4.9996, |g| 1: g'' = [0.0049996, 0]; mu = 0.9 * [0, 0.005] + g''
    norm = (9 + 3.9995**2) ** 0.5
    assert weight.tolist()[0] == pytest.approx([3 - 0.1 * 0.001 * norm, 3.9995 - 0.1 * 0.0045], abs=1e-12)
    assert bias.tolist() == pytest.approx([0.95 - 0.1 * (0.9 * 0.5 - 1.0)])


def test_decay_comes_before_the_norm_and_spares_vectors():
    weight, bias = parameter([[3.0, 4.0]], [[0.0, 0.0]]), parameter([2.0], [0.0])
    Lars([weight, bias], lr=1.0, weight_decay=0.1, momentum=0.0, trust=0.01).step()
    # g' = 0.1 * [3, 4], |g'| = 0.5: g'' = 0.01 * 5 / 0.5 * g' = [0.03, 0.04]
    assert weight.tolist()[0] == pytest.approx([2.97, 3.96])
    assert bias.tolist() == [2.0]


def test_a_zero_weight_takes_its_gradient_as_it_is():
    weight = parameter([[0.0, 0.0]], [[1.0, -2.0]])
    Lars([weight], lr=0.5).step()
    assert weight.tolist() == [[-0.5, 1.0]]


@pytest.mark.parametrize("skipped", [0.0, 1.0])
def test_a_skipped_update_changes_neither_weights_nor_momentum(skipped):
    weight, plain = parameter([[3.0, 4.0]], [[0.0, 2.0]]), parameter([[3.0, 4.0]], [[0.0, 2.0]])
    optimizer, expected = Lars([weight], lr=0.1), Lars([plain], lr=0.1)
    for each in (optimizer, expected):
        each.step()
    weight.grad = torch.full_like(weight, float("nan") if skipped else 1.0)
    plain.grad = torch.ones_like(plain)
    optimizer.found_inf = torch.tensor(skipped)
    optimizer.step()
    if not skipped:
        expected.step()
    assert torch.equal(weight, plain)
    assert torch.equal(optimizer.state[weight]["mu"], expected.state[plain]["mu"])
