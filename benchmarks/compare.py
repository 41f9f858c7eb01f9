"""Compares tensors within the rounding of their dtype, and fills memory that operators leave unwritten with NaN."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fills what torch.empty, empty_like and new_empty return inside the library with NaN (or a huge integer).

    An output that a kernel leaves unwritten then shows in every comparison instead of passing by luck.
    """
    originals: list[tuple[Any, str, Any]] = [
        (torch, "empty", torch.empty),
        (torch, "empty_like", torch.empty_like),
        (Tensor, "new_empty", Tensor.new_empty),
    ]

    def poison(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def replacement(*args: Any, **kwargs: Any) -> Tensor:
            tensor = original(*args, **kwargs)
            if torch.compiler.is_compiling() or not _is_library(sys._getframe(1).f_globals):
                return tensor
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return tensor.fill_(torch.iinfo(tensor.dtype).max) if tensor.dtype != torch.bool else tensor

        return replacement

    for owner, name, original in originals:
        setattr(owner, name, poison(original))
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _is_library(frame_globals: dict[str, Any]) -> bool:
    return str(frame_globals.get("__name__", "")).startswith("patchmill.")


def assert_close(name: str, found: Tensor | None, expected: Tensor | None, tolerance: float | None = None) -> None:
    """Compares by relative norm in float64; the tolerance follows from found's dtype unless given. NaN never passes."""
    assert found is not None, f"{name}: missing"
    assert expected is not None
    assert found.shape == expected.shape, f"{name}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    if tolerance is None:
        tolerance = 16 * _rounding(torch.float32) if found.dtype == torch.float32 else _rounding(found.dtype)
    difference, size = torch.linalg.vector_norm(found.double() - expected.double()), torch.linalg.vector_norm(expected)
    error = (difference / size.double().clamp(min=1e-30)).item()
    assert error <= tolerance, f"{name} ({found.dtype}, {found.device}): relative error {error:.3g} > {tolerance:.3g}"


def _rounding(dtype: torch.dtype) -> float:
    """Relative error of one rounding. Triton's interpreter truncates to bfloat16, where a device rounds to nearest."""
    truncates = dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1"
    return torch.finfo(dtype).eps / (1 if truncates else 2)


def sum_tolerance(dtype: torch.dtype) -> float:
    """Allows for a float32 sum over many rows, then rounded to dtype."""
    return 128 * _rounding(torch.float32) + (0 if dtype == torch.float32 else _rounding(dtype))


def assert_equal(name: str, found: Tensor | None, expected: Tensor) -> None:
    """Compares bit for bit."""
    assert found is not None, f"{name}: missing"
    assert found.dtype == expected.dtype, f"{name}: {found.dtype}, expected {expected.dtype}"
    assert torch.equal(found, expected), f"{name} ({found.device}): differs from the expected values"


def grad_of(tensor: Tensor) -> Tensor:
    """Returns a gradient that must be there."""
    assert tensor.grad is not None
    return tensor.grad
