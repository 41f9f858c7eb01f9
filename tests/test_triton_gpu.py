"""The kernels on a CUDA device: the checks of the interpreter, larger offsets, and no wait for the device."""

import pytest
import torch

from benchmarks import check_kernels
from benchmarks.check_kernels import CASE_CHECKS, CASES, DTYPES, MANY_PATCHES

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, MANY_PATCHES], ids=lambda case: case.name)
def test_operators_equal_the_published_formulation(case, dtype):
    for check in CASE_CHECKS:
        check(case, dtype, "cuda")
    for power, norm_pix in ((2, False), (1, True), (1, False)):
        check_kernels.check_masked_loss(case, dtype, "cuda", power, norm_pix)


def test_mask_indices_equal_those_of_numpy():
    check_kernels.check_mask_indices("cuda")


def test_no_operator_waits_for_the_device():
    check_kernels.check_no_host_sync("cuda")


def test_offsets_beyond_32_bits():
    check_kernels.check_large_offsets("cuda")
