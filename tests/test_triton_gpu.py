"""The kernels on a CUDA device: the checks of the interpreter, larger offsets, and no wait for the device."""

import pytest
import torch

from benchmarks import check_candidates, check_kernels
from benchmarks.check_kernels import CASE_CHECKS, CASES, COVERING, OTHER_LOSSES

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(("case", "dtype"), COVERING, ids=lambda value: getattr(value, "name", str(value)))
def test_operators_equal_the_published_formulation(case, dtype):
    for check in CASE_CHECKS:
        check(case, dtype, "cuda")


@pytest.mark.parametrize(("power", "norm_pix"), OTHER_LOSSES)
def test_other_losses(power, norm_pix):
    check_kernels.check_masked_loss(CASES[0], torch.bfloat16, "cuda", power, norm_pix)
    check_kernels.check_masked_loss(CASES[3], torch.float32, "cuda", power, norm_pix)


def test_candidates_equal_pytorch():
    check_candidates.check_candidates("cuda")


def test_mask_indices_equal_those_of_numpy():
    check_kernels.check_mask_indices("cuda")


def test_no_operator_waits_for_the_device():
    check_kernels.check_no_host_sync("cuda")


def test_offsets_beyond_32_bits():
    check_kernels.check_large_offsets("cuda")
