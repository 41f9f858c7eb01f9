"""Splits a step's time on the GPU by kind of work and by kernel.

Kernels are sorted by their names; matrix products, whose kernels do not tell, are given to encoder or decoder by the
shapes of the operator that launched them. Times are the device's own: gaps between kernels show as the difference from
the time of the step.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from patchmill.trainer.config.model import ModelConfig

# The first kind that a part of a kernel's name belongs to; attention kernels are called after their products too.
KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("ours", ("gather_patches_k", "gather_tokens_", "unshuffle_", "masked_loss_k", "scale_kernel", "mask_indices_k")),
    ("attention", ("flash", "fmha", "attention", "softmax", "sdpa", "cudnn_generated")),
    ("optimizer and guard", ("multi_tensor", "adam", "lpnorm")),
    ("copies", ("memcpy", "memset")),
    ("matrix products", ("gemm", "nvjet", "cutlass", "cublas", "wgmma", "splitk")),
)
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_addmm_activation", "aten::linear")
TOP = 15


class Kernel(NamedTuple):
    """All launches of one kernel in a step."""

    name: str
    kind: str
    launches: int
    milliseconds: float


class Profile(NamedTuple):
    """Where a step's time on the device goes."""

    kernels: list[Kernel]
    """longest first"""
    products: dict[str, float]
    """milliseconds of encoder and decoder products, by the operators' shapes"""

    def by_kind(self) -> dict[str, float]:
        """Milliseconds of each kind of work, most first."""
        sums: dict[str, float] = {}
        for kernel in self.kernels:
            sums[kernel.kind] = sums.get(kernel.kind, 0.0) + kernel.milliseconds
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "by_kind_ms": self.by_kind(),
            "products_ms": self.products,
            "launches": sum(kernel.launches for kernel in self.kernels),
            "kernels": [kernel._asdict() for kernel in self.kernels],
        }


def profile_step(step: Callable[[], object], config: ModelConfig, steps: int = 3) -> Profile:
    """Profiles steps that have been warmed up, launched one by one (a replayed graph does not tell who launched what).

    Returns:
        the mean of `steps` steps.
    """
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True) as seen:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    return summarise(seen.key_averages(group_by_input_shape=True), config, steps)


def summarise(rows: Iterable[Any], config: ModelConfig, steps: int) -> Profile:
    """Sorts the profiler's rows: kernels are rows of the device, operators rows of the host that launched some."""
    times: dict[str, list[float]] = {}
    products = {"encoder": 0.0, "decoder": 0.0}
    for row in rows:
        milliseconds = row.self_device_time_total / 1e3 / steps
        if row.device_type.name != "CPU":
            if not row.is_user_annotation:  # a span that a program names covers kernels that count by themselves
                found = times.setdefault(row.key, [0.0, 0.0])
                found[0] += row.count / steps
                found[1] += milliseconds
        elif row.key in PRODUCTS:
            products[_side(row.input_shapes, config)] += milliseconds
    kernels = [Kernel(name, kind_of(name), round(count), spent) for name, (count, spent) in times.items()]
    return Profile(sorted(kernels, key=lambda kernel: -kernel.milliseconds), products)


def kind_of(name: str) -> str:
    """The kind of work of a kernel; what no name tells is pointwise (norms, GELU, additions, casts, reductions)."""
    lower = name.lower()
    return next((kind for kind, parts in KINDS if any(part in lower for part in parts)), "pointwise")


def profile_lines(name: str, found: Profile, step_seconds: float) -> list[str]:
    """A profile as Markdown: shares of a step's time, then the longest kernels."""
    step = step_seconds * 1e3
    shares = [f"{kind} {spent:.2f} ms ({spent / step:.0%})" for kind, spent in found.by_kind().items()]
    busy = sum(kernel.milliseconds for kernel in found.kernels)
    longest = [
        f"| {kernel.name[:90].replace('|', '/')} | {kernel.kind} | {kernel.launches} | {kernel.milliseconds:.3f} |"
        for kernel in found.kernels[:TOP]
    ]
    return [
        f"Time on the device in a step of `{name}` ({step:.2f} ms; {sum(k.launches for k in found.kernels)} launches): "
        + ", ".join(shares)
        + f"; idle {max(0.0, step - busy):.2f} ms ({max(0.0, 1 - busy / step):.0%}). By the shapes of operators, "
        + ", ".join(f"{side} products {spent:.2f} ms" for side, spent in found.products.items())
        + ".",
        "",
        "| kernel | kind | launches | ms |",
        "|---|---|---:|---:|",
        *longest,
        "",
    ]


def _side(shapes: list[Any], config: ModelConfig) -> str:
    """Encoder where every size of the matrices could be of the encoder; a size of the decoder's own decides."""
    E, D = config.decoder_embed_dim, config.embed_dim
    widths = {E, 3 * E, int(E * config.mlp_ratio)} - {D, 3 * D, int(D * config.mlp_ratio)}
    sizes = {size for shape in shapes for size in shape if isinstance(size, int)}
    return "decoder" if sizes & widths else "encoder"
