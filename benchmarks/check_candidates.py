"""Checks the kernels that no model uses yet: residual + LayerNorm and short attention."""

import torch

from benchmarks.check_kernels import DTYPES
from benchmarks.compare import assert_close, grad_of, poisoned_empty, sum_tolerance
from patchmill.kernels.add_norm import add_norm
from patchmill.kernels.short_attention import short_attention


def check_add_norm(rows: int, width: int, dtype: torch.dtype, device: str) -> None:
    """Sum, norm and gradients equal those of an addition and PyTorch's LayerNorm, of the sum as it was rounded."""
    name = f"add_norm, {rows} x {width}: "
    x, delta = (torch.randn(rows, width, device=device).to(dtype).requires_grad_() for _ in range(2))
    weight, bias = (torch.randn(width, device=device).requires_grad_() for _ in range(2))
    leaves = (x, delta, weight, bias)
    found = add_norm(x, delta, weight, bias)
    x, delta, weight, bias = (leaf.detach().double().requires_grad_() for leaf in leaves)
    grads = [torch.randn(rows, width, device=device).to(dtype) for _ in range(2)]
    torch.autograd.backward(found, grads)
    total = x + delta
    rounded = total + (found[0].double() - total).detach()
    norm = torch.nn.functional.layer_norm(rounded, (width,), weight, bias, 1e-6)
    torch.autograd.backward((rounded, norm), [grad.double() for grad in grads])
    assert_close(name + "sum", found[0], total)
    assert_close(name + "norm", found[1], norm)
    for part, leaf, exact in zip(("dx", "ddelta", "dweight", "dbias"), leaves, (x, delta, weight, bias), strict=True):
        assert_close(name + part, leaf.grad, grad_of(exact), sum_tolerance(leaf.dtype))


def check_short_attention(tokens: int, heads: int, width: int, dtype: torch.dtype, device: str) -> None:
    """Output and gradient equal those of scaled_dot_product_attention in float64.

    Products take 16-bit weights and 16-bit gradients of scores: two roundings more than the result's.
    """
    qkv = torch.randn(2, tokens, 3, heads, width, device=device).to(dtype).requires_grad_()
    grad = torch.randn(2, tokens, heads, width, device=device).to(dtype)
    exact = qkv.detach().double().requires_grad_()
    found = short_attention(qkv)
    found.backward(grad)
    expected = torch.nn.functional.scaled_dot_product_attention(*exact.permute(2, 0, 3, 1, 4)).transpose(1, 2)
    expected.backward(grad.double())
    name, tolerance = f"short_attention, {tokens} tokens, {heads} x {width}: ", 3 * sum_tolerance(dtype)
    assert_close(name + "out", found, expected, tolerance)
    assert_close(name + "dqkv", qkv.grad, grad_of(exact), tolerance)


def check_candidates(device: str) -> int:
    """Runs the checks of the candidates at the sizes of the models; returns how many ran. For GPUs."""
    norms = [(513, width) for width in (512, 768, 1280)]
    heads = [(50, 12, 64), (65, 3, 32), (197, 16, 32), (197, 3, 64), (257, 4, 32)]
    with poisoned_empty():
        for rows, width in norms:
            for dtype in DTYPES:
                check_add_norm(rows, width, dtype, device)
        for tokens, number, width in heads:
            for dtype in (torch.bfloat16, torch.float16):
                check_short_attention(tokens, number, width, dtype, device)
    return len(norms) * len(DTYPES) + 2 * len(heads)
