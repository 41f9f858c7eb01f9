"""Settles a GPU's clocks and power before something is timed."""

import statistics
import time

import torch

from patchmill.tools.profiler import timing

HOLD_SECONDS = 3.0
"""of large products before timing, until clocks and power have settled"""
SIDE = 8192


def hold_product(device: torch.device, seconds: float = HOLD_SECONDS) -> float | None:
    """Multiplies large bf16 matrices on a GPU for some seconds, which settles its clocks for what is timed next.

    Returns:
        FLOP/s over the last tenth of the time; None on a CPU, whose clocks need no settling.
    """
    if device.type != "cuda":
        return None
    a, b = (torch.randn(SIDE, SIDE, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    began, rates = time.perf_counter(), list[float]()
    while (start := time.perf_counter()) - began < seconds:
        for _ in range(20):
            torch.mm(a, b, out=out)
        timing.wait_for(device)
        rates.append(20 * 2.0 * SIDE**3 / (time.perf_counter() - start))
    return statistics.fmean(rates[-max(1, len(rates) // 10) :])
