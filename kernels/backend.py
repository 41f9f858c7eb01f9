"""Chooses Triton kernels or plain PyTorch for an operator.

CUDA tensors take the Triton kernels; tensors on any other device, and float64 everywhere (it serves gradient checks),
take the plain PyTorch of reference.py. PATCHMILL_KERNELS=triton|reference chooses by hand; with TRITON_INTERPRET=1 as
well, `triton` runs the kernels on CPU tensors in Triton's interpreter.
"""

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

Backend = Literal["triton", "reference"]
logger = logging.getLogger("patchmill.kernels")


def active_backend(tensor: Tensor) -> Backend:
    """Say which implementation an operator runs for this tensor; each answer is logged once, a fallback as a warning.

    Raises:
        ValueError: PATCHMILL_KERNELS holds another word, or asks for Triton where it cannot run.
    """
    choice = os.environ.get("PATCHMILL_KERNELS", "")
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    return _choose(choice, interpreted, tensor.device.type, tensor.dtype == torch.float64)


@functools.cache
def _choose(choice: str, interpreted: bool, device_type: str, is_float64: bool) -> Backend:
    if choice not in ("", "triton", "reference"):
        raise ValueError(f"PATCHMILL_KERNELS={choice!r}: use triton or reference, or leave it unset")
    has_triton = importlib.util.find_spec("triton") is not None
    if choice == "triton":
        if not has_triton:
            raise ValueError("PATCHMILL_KERNELS=triton, but Triton is not installed: pip install triton")
        if device_type != "cuda" and not interpreted:
            raise ValueError(
                f"PATCHMILL_KERNELS=triton, but the tensor is on {device_type!r}: move it to CUDA, unset the variable,"
                " or set TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's interpreter"
            )
    backend: Backend = "reference"
    if is_float64:
        reason = "float64 has no Triton kernel"
    elif choice:
        backend, reason = ("triton" if choice == "triton" else "reference"), "chosen by PATCHMILL_KERNELS"
    elif device_type != "cuda":
        reason = f"the path of {device_type} tensors"
    elif has_triton:
        backend, reason = "triton", "the path of cuda tensors"
    else:
        reason = "Triton is not installed: pip install triton for the fast kernels"
    is_fallback = device_type == "cuda" and backend == "reference"
    logger.log(logging.WARNING if is_fallback else logging.INFO, "kernels on %s: %s (%s)", device_type, backend, reason)
    return backend


def register_as_data_movement(*operators: Any) -> None:
    """Tell PyTorch's FLOP counter that these operators count no operations.

    The counter counts matrix products alone, as does the training-FLOPs table behind MFU; the elementwise work of these
    operators is bound by bytes. Without a formula the counter would not list them at all.
    """
    formula: Callable[..., int] = _no_operations
    register_flop_formula(list(operators))(formula)


def _no_operations(*_: Any, **__: Any) -> int:
    return 0
