"""Every Triton kernel, forward and backward, in the CPU interpreter against the published formulation in float64."""

import pytest
import torch

from benchmarks import check_candidates, check_kernels
from benchmarks.check_kernels import CASE_CHECKS, CASES, DTYPES, MANY_PATCHES, OTHER_LOSSES
from patchmill.kernels.backend import active_backend
from patchmill.kernels.philox import philox_numpy

pytest.importorskip("triton", reason="Triton has no wheel for this platform")
import triton
import triton.language as tl

from patchmill.kernels.philox_triton import as_int32, philox_triton

pytestmark = pytest.mark.interpreter


@pytest.fixture(autouse=True)
def _run_triton_on_cpu_tensors(monkeypatch):
    monkeypatch.setenv("PATCHMILL_KERNELS", "triton")
    assert active_backend(torch.zeros(1)) == "triton"
    torch.manual_seed(0)


@triton.jit
def philox_kernel(p_counters, p_words, k0, k1, SIZE: tl.constexpr):
    o = tl.arange(0, SIZE)
    c0, c1 = tl.load(p_counters + o).to(tl.uint32), tl.load(p_counters + SIZE + o).to(tl.uint32)
    c2, c3 = tl.load(p_counters + 2 * SIZE + o).to(tl.uint32), tl.load(p_counters + 3 * SIZE + o).to(tl.uint32)
    words = philox_triton(c0, c1, c2, c3, k0.to(tl.uint32), k1.to(tl.uint32))
    for i in tl.static_range(4):
        tl.store(p_words + i * SIZE + o, words[i].to(tl.int64))


def test_philox_gives_the_bits_of_numpy():
    counters = torch.randint(0, 2**32, (4, 64))
    counters[:, :2] = torch.tensor([[0, 2**32 - 1]])
    c0, c1, c2, c3 = counters.numpy()
    for key in ((0, 0), (2**32 - 1, 2**32 - 1), (0xA4093822, 0x299F31D0)):
        found = torch.zeros_like(counters)
        philox_kernel[(1,)](counters, found, as_int32(key[0]), as_int32(key[1]), SIZE=64)
        for f, e in zip(found, philox_numpy(c0, c1, c2, c3, key), strict=True):
            assert f.tolist() == e.tolist()


def test_mask_indices_equal_the_numpy_reference():
    check_kernels.check_mask_indices("cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("check", CASE_CHECKS, ids=lambda check: check.__name__)
def test_operator_equals_the_published_formulation(check, case, dtype):
    check(case, dtype, "cpu")


@pytest.mark.parametrize("check", CASE_CHECKS, ids=lambda check: check.__name__)
def test_operator_with_many_patches(check):
    check(MANY_PATCHES, torch.float32, "cpu")


@pytest.mark.parametrize(("power", "norm_pix"), OTHER_LOSSES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_other_losses(case, power, norm_pix):
    check_kernels.check_masked_loss(case, torch.float32, "cpu", power, norm_pix)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_norm(dtype):
    check_candidates.check_add_norm(67, 48, dtype, "cpu")  # two programs of the backward pass, a width beyond a block


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)  # the interpreter cannot multiply bfloat16
@pytest.mark.parametrize(("tokens", "heads", "width"), [(7, 1, 32), (40, 3, 32), (33, 1, 64)])
def test_short_attention(tokens, heads, width, dtype):
    check_candidates.check_short_attention(tokens, heads, width, dtype, "cpu")
