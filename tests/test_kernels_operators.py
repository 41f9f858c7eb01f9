"""The operators on CPU tensors: values, gradients, registration, and what they refuse."""

import logging
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import check_candidates, check_kernels, compare
from benchmarks.check_kernels import CASE_CHECKS, CASES, DTYPES, MANY_PATCHES
from patchmill.kernels import backend
from patchmill.kernels.add_norm import add_norm
from patchmill.kernels.gather import gather_patches, gather_tokens
from patchmill.kernels.masked_loss import masked_l1, masked_mse
from patchmill.kernels.permute import mask_indices
from patchmill.kernels.short_attention import short_attention
from patchmill.kernels.unshuffle import unshuffle

ops = torch.ops.patchmill
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BYTES_AS_THEY_ARE = ((0.0,), (1 / 255,))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def ids(*rows):
    return torch.tensor(rows, dtype=torch.int32)


def small_batch(dtype=torch.float64):
    """Two images of 8 x 12 pixels, patch 4: six patches, two kept, one class token."""
    images = torch.randint(0, 256, (2, 8, 12, 3), dtype=torch.uint8)
    keep, mask, restore = mask_indices(3, 1, torch.tensor([5, 6]), 6, 2)
    pred = torch.randn(2, 4, 48, dtype=dtype, requires_grad=True)
    x = torch.randn(2, 3, 5, dtype=dtype, requires_grad=True)
    token, pos = torch.randn(5, dtype=dtype, requires_grad=True), torch.randn(7, 5, dtype=dtype, requires_grad=True)
    return images, keep, mask, restore, pred, x, token, pos


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, MANY_PATCHES], ids=lambda case: case.name)
@pytest.mark.parametrize("check", CASE_CHECKS, ids=lambda check: check.__name__)
def test_operator_equals_the_published_formulation(check, case, dtype):
    check(case, dtype, "cpu")


@pytest.mark.parametrize(("power", "norm_pix"), [(2, False), (1, True), (1, False)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_other_losses(case, power, norm_pix):
    check_kernels.check_masked_loss(case, torch.float32, "cpu", power, norm_pix)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_candidates_equal_pytorch(dtype):
    check_candidates.check_add_norm(67, 48, dtype, "cpu")
    check_candidates.check_short_attention(21, 3, 32, dtype, "cpu")


def test_candidates_examples():
    total, norm = add_norm(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]]), torch.ones(2), torch.zeros(2))
    assert total.tolist() == [[2, 6]]
    torch.testing.assert_close(norm, torch.tensor([[-1.0, 1.0]]))
    qkv = torch.zeros(1, 2, 3, 1, 32)
    qkv[0, :, 2] = torch.tensor([1.0, 3.0])[:, None, None]
    torch.testing.assert_close(short_attention(qkv), torch.full((1, 2, 1, 32), 2.0))


def test_gather_patches_example():
    images = torch.arange(8, dtype=torch.uint8).view(1, 2, 4, 1)
    assert gather_patches(images, ids([1]), 2, *BYTES_AS_THEY_ARE, torch.float32).tolist() == [[[2, 3, 6, 7]]]


def test_gather_patches_from_a_slice_of_a_batch():
    # odd storage offset: rows may not be moved as 8-byte words
    images = torch.arange(3 * 3 * 3, dtype=torch.uint8).view(3, 3, 3, 1)[1:]
    patches = gather_patches(images, ids([0], [0]), 3, *BYTES_AS_THEY_ARE, torch.float64)
    torch.testing.assert_close(patches.flatten(), torch.arange(9.0, 27.0, dtype=torch.float64))


def test_unshuffle_example():
    x, token, pos = torch.tensor([[[1.0], [2.0]]]), torch.tensor([7.0]), torch.zeros(4, 1)
    assert unshuffle(x, token, pos, ids([1, 0, 2]), num_prefix=1).flatten().tolist() == [1, 7, 2, 7]


@pytest.mark.parametrize(("loss", "value", "slope"), [(masked_mse, 1.0, -1.0), (masked_l1, 0.5, -0.25)])
def test_masked_loss_example(loss, value, slope):
    images = torch.arange(4, dtype=torch.uint8).view(1, 2, 2, 1)
    pred = torch.tensor([[[0.0, 1.0, 2.0, 1.0]]], requires_grad=True)
    found = loss(pred, images, ids([0]), 2, *BYTES_AS_THEY_ARE, norm_pix=False)
    found.backward()
    torch.testing.assert_close(found, torch.tensor(value))
    torch.testing.assert_close(pred.grad, torch.tensor([[[0.0, 0.0, 0.0, slope]]]))


def test_a_perfect_prediction_of_absolute_error_has_no_gradient():
    images = torch.randint(0, 256, (1, 4, 4, 1), dtype=torch.uint8)
    pred = gather_patches(images, ids([0]), 4, *BYTES_AS_THEY_ARE, torch.float32).requires_grad_()
    masked_l1(pred, images, ids([0]), 4, *BYTES_AS_THEY_ARE, norm_pix=False).backward()
    assert not compare.grad_of(pred).any()


def test_float16_gradient_of_a_large_batch_survives_loss_scaling():
    # Unscaled it is below 2**-24; only because the forward pass stores it times a power of two does the scale reach it.
    images = torch.randint(0, 256, (64, 64, 64, 3), dtype=torch.uint8)
    keep_none = torch.arange(16, dtype=torch.int32).repeat(64, 1)
    pred = torch.randn(64, 16, 768).half().requires_grad_()
    (masked_mse(pred, images, keep_none, 16, MEAN, STD, True) * 2.0**16).backward()
    exact = pred.detach().double().requires_grad_()
    (masked_mse(exact, images, keep_none, 16, MEAN, STD, True) * 2.0**16).backward()
    compare.assert_close("dpred", pred.grad, exact.grad)


def test_gradients_by_finite_differences():
    images, keep, mask, restore, pred, x, token, pos = small_batch()
    for loss in (masked_mse, masked_l1):
        for norm_pix in (True, False):
            assert torch.autograd.gradcheck(lambda p: loss(p, images, mask, 4, MEAN, STD, norm_pix), (pred,))  # noqa: B023
    assert torch.autograd.gradcheck(lambda x, token, pos: unshuffle(x, token, pos, restore, 1), (x, token, pos))
    tokens = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: gather_tokens(t, keep), (tokens,))
    assert torch.autograd.gradcheck(lambda t, p: gather_tokens(t, keep, p, 1), (tokens, pos))
    repeated = ids([0, 0, 3], [5, 1, 5])
    assert torch.autograd.gradcheck(lambda t, p: gather_tokens(t, repeated, p, 1), (tokens, pos))


def operator_calls():
    images, keep, mask, restore, pred, x, token, pos = small_batch(torch.float32)
    tokens, samples = torch.randn(2, 7, 5, requires_grad=True), torch.tensor([5, 6])
    stored = torch.randn(2, 4, 48)
    return {
        "mask_indices": (samples, None, 1, 2, 3, 6, 2),
        "gather_patches": (images, keep, 4, list(MEAN), list(STD), torch.bfloat16),
        "gather_tokens": (tokens, keep, pos, 1),
        "gather_tokens_backward": (torch.randn(2, 2, 5), keep, 7, 1),
        "unshuffle": (x, token, pos, restore, 1),
        "unshuffle_backward": (torch.randn(2, 7, 5), restore, 2, 1),
        "masked_loss": (pred, images, mask, 4, list(MEAN), list(STD), True, 2, True),
        "masked_loss_backward": (torch.tensor(0.5), stored),
        **candidate_calls(),
    }


def candidate_calls():
    rows, width, row = torch.randn(3, 6, requires_grad=True), torch.ones(6, requires_grad=True), torch.ones(3)
    qkv, out = torch.randn(1, 4, 3, 2, 32, requires_grad=True), torch.randn(1, 4, 2, 32)
    return {
        "add_norm": (rows, torch.randn(3, 6, requires_grad=True), width, torch.zeros(6, requires_grad=True), 1e-6),
        "add_norm_backward": (rows.detach(), rows.detach(), rows.detach(), width.detach(), row, row),
        "short_attention": (qkv,),
        "short_attention_backward": (out, qkv.detach(), out, torch.randn(1, 2, 4)),
    }


@pytest.mark.parametrize("name", operator_calls())
def test_opcheck(name):
    torch.library.opcheck(getattr(ops, name).default, operator_calls()[name])


def test_every_operator_is_checked():
    registered = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("patchmill::")
    }
    assert registered == set(operator_calls())


def model_like(images, samples, x, token, pos):
    keep, mask, restore = mask_indices(3, 1, samples, 6, 2)
    patches = gather_patches(images, keep, 4, MEAN, STD, torch.float32)
    decoded = unshuffle(x * patches.mean(), token, pos, restore, 1)
    pred = gather_tokens(decoded, mask, pos, 1).repeat(1, 1, 10)[..., :48].contiguous()
    return masked_mse(pred, images, mask, 4, MEAN, STD, True)


def test_compiles_without_a_graph_break():
    images, _, _, _, _, x, token, pos = small_batch(torch.float32)
    leaves, samples = (x, token, pos), torch.tensor([5, 6])
    eager = model_like(images, samples, *leaves)
    expected = torch.autograd.grad(eager, leaves)
    compiled = torch.compile(model_like, fullgraph=True, backend="aot_eager")(images, samples, *leaves)
    found = torch.autograd.grad(compiled, leaves)
    assert compiled == eager
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f, e)


def test_the_flop_counter_lists_the_operators():
    images, _, _, _, _, x, token, pos = small_batch(torch.float32)
    with FlopCounterMode(display=False) as counter:
        model_like(images, torch.tensor([5, 6]), x, token, pos).backward()
    counts = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    listed = {f"patchmill.{name}" for name in operator_calls().keys() - candidate_calls().keys()}
    assert listed <= counts.keys()
    assert not any(counts[name] for name in listed)


def test_the_flop_counter_knows_the_products_of_attention():
    qkv = torch.randn(2, 5, 3, 4, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        short_attention(qkv).sum().backward()
    assert counter.get_total_flops() == (2 + 5) * 2 * 2 * 4 * 5 * 5 * 32


def test_bad_arguments_are_named():
    images, keep, mask, restore, _, x, token, pos = small_batch(torch.float32)
    tokens, no_ids = torch.randn(2, 7, 5), torch.zeros(2, 0, dtype=torch.int32)
    refused: list[tuple[Any, ...]] = [
        (TypeError, "images must be one of torch.uint8", gather_patches, images.float(), keep, 4, MEAN, STD, x.dtype),
        (ValueError, "images must be contiguous", gather_patches, images.mT, keep, 4, MEAN, STD, x.dtype),
        (ValueError, "do not divide into patches of 5", gather_patches, images, keep, 5, MEAN, STD, x.dtype),
        (ValueError, "mean has 1 values", gather_patches, images, keep, 4, (0.5,), STD, x.dtype),
        (ValueError, "std must be positive", gather_patches, images, keep, 4, MEAN, (1.0, 1.0, 0.0), x.dtype),
        (TypeError, "out_dtype must be one of", gather_patches, images, keep, 4, MEAN, STD, torch.int32),
        (TypeError, "ids must be one of torch.int32", gather_tokens, tokens, keep.long()),
        (ValueError, "ids has 1 rows for a batch of 2", gather_tokens, tokens, keep[:1]),
        (ValueError, "ids is on meta", gather_tokens, tokens, keep.to("meta")),
        (TypeError, "x must be a tensor, got list", gather_tokens, [1.0], keep),
        (ValueError, "num_prefix must be 0 to 6", gather_tokens, tokens, keep, None, 7),
        (ValueError, r"pos must be \(7, 5\)", gather_tokens, tokens, keep, pos[:6]),
        (ValueError, "mask_token must have the width of x", unshuffle, x, token[:4], pos, restore, 1),
        (ValueError, r"pos must be \(6, 5\)", unshuffle, x, token, pos, restore, 0),
        (ValueError, "must hold 0 to 6 patches", unshuffle, torch.randn(2, 9, 5), token, pos, restore, 1),
        (ValueError, r"pred must be \(2, 4, 48\)", masked_mse, torch.randn(2, 3, 48), images, mask, 4, MEAN, STD, True),
        (ValueError, "ids_mask is empty", masked_mse, torch.randn(2, 0, 48), images, no_ids, 4, MEAN, STD, True),
        (ValueError, r"delta must be \(2, 3\) like x", add_norm, torch.ones(2, 3), torch.ones(2, 4), token, token),
        (ValueError, "weight must have the width of x, 3", add_norm, torch.ones(2, 3), torch.ones(2, 3), token, token),
        (ValueError, "at most 264 tokens", short_attention, torch.ones(1, 265, 3, 1, 32)),
        (ValueError, r"qkv must be \[B, N, 3, heads, d\]", short_attention, torch.ones(1, 4, 2, 1, 32)),
        (TypeError, "sample_ids must be one of torch.int64", mask_indices, 0, 0, keep[0], 6, 2),
        (ValueError, "num_patches must be 1 to 4096", mask_indices, 0, 0, torch.tensor([1]), 5000, 2),
        (ValueError, "num_keep must be 1 to num_patches = 6", mask_indices, 0, 0, torch.tensor([1]), 6, 7),
        (ValueError, "repeats has 2 entries for 1", mask_indices, 0, 0, torch.tensor([1]), 6, 2, torch.tensor([1, 2])),
        (ValueError, "seed must be in", mask_indices, -1, 0, torch.tensor([1]), 6, 2),
    ]  # fmt: skip
    for error, message, function, *arguments in refused:
        with pytest.raises(error, match=message):
            function(*arguments)


@pytest.mark.parametrize(
    ("choice", "device_type", "is_float64", "expected"),
    [
        ("", "cpu", False, "reference"),
        ("", "cuda", False, "triton"),
        ("", "cuda", True, "reference"),
        ("reference", "cuda", False, "reference"),
        ("triton", "cuda", False, "triton"),
    ],
)
def test_backend_choice_is_logged_and_a_fallback_is_a_warning(choice, device_type, is_float64, expected, caplog):
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    backend._choose.cache_clear()
    with caplog.at_level(logging.INFO, logger="patchmill.kernels"):
        assert backend._choose(choice, False, device_type, is_float64) == expected
    (record,) = caplog.records
    assert expected in record.message
    is_fallback = device_type == "cuda" and expected == "reference"
    assert record.levelno == (logging.WARNING if is_fallback else logging.INFO)


def test_a_gpu_without_triton_falls_back_loudly(caplog, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    backend._choose.cache_clear()
    with caplog.at_level(logging.WARNING, logger="patchmill.kernels"):
        assert backend._choose("", False, "cuda", False) == "reference"
    assert "pip install triton" in caplog.text
    with pytest.raises(ValueError, match="Triton is not installed"):
        backend._choose("triton", False, "cuda", False)
    backend._choose.cache_clear()


def test_the_environment_chooses_the_backend(monkeypatch):
    assert backend.active_backend(torch.zeros(1)) == "reference"
    monkeypatch.setenv("PATCHMILL_KERNELS", "cutlass")
    with pytest.raises(ValueError, match="use triton or reference"):
        mask_indices(0, 0, torch.tensor([1]), 6, 2)
    monkeypatch.setenv("PATCHMILL_KERNELS", "triton")
    with pytest.raises(ValueError, match=r"tensor is on 'cpu'.*TRITON_INTERPRET=1"):
        mask_indices(0, 0, torch.tensor([1]), 6, 2)
