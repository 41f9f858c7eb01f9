"""What the device gives at our shapes: `python -m benchmarks.bench_ceilings [--models b16 l16 h14]`.

No step can be faster than its matrix products and its attention alone, or move bytes faster than a copy does. Matrix
products are those of a step (forward, gradient of the input, gradient of the weight), attention those of encoder,
decoder and last decoder block through every backend of SDPA, and pointwise work what stands between them. Inputs are
random numbers: products of zeros run faster than real ones. A large product is held for some seconds first: a GPU at
its power limit runs slower than one that has just begun. The page is written after every row.

A backend of attention may be wrong: cuDNN is known for bf16 gradients that are not finite at some lengths. Gradients of
each are compared with those of the math backend in fp32; the relative error appears next to the time.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.attention_shapes import (
    BACKENDS,
    AttentionShape,
    attention_facts,
    attention_shapes,
    random_qkv,
    stacks,
    torch_choice,
)
from benchmarks.clocks import hold_product
from benchmarks.pages import markdown_table, write_page
from benchmarks.steps import RECIPES
from patchmill.kernels.permute import mask_indices
from patchmill.tools.profiler import machine, timing
from patchmill.trainer.config.model import ModelConfig
from patchmill.trainer.recipes.pretrain import get_recipe

BATCHES = {"b16": 512, "l16": 256, "h14": 128, "tiny": 8}
"""images a step, as the step benchmark takes them"""
REPEATS = 11
MASKED_IMAGES = 4096
ERROR_BATCH = 8
"""images of which gradients are compared"""


def products(config: ModelConfig, batch: int) -> Iterator[tuple[str, tuple[int, int, int], int]]:
    """(name, (rows, in, out), times in a step's forward pass) of every linear layer; last-block savings left out."""
    for stack in stacks(config):
        rows, dim, hidden = batch * stack.tokens, stack.dim, int(stack.dim * config.mlp_ratio)
        for name, inner, out in (("qkv", dim, 3 * dim), ("proj", dim, dim), ("fc1", dim, hidden), ("fc2", hidden, dim)):
            yield f"{stack.name} {name}", (rows, inner, out), stack.depth
    encoder, decoder = stacks(config)
    yield "patch embedding", (batch * (encoder.tokens - 1), config.patch_dim, encoder.dim), 1
    yield "to decoder", (batch * encoder.tokens, encoder.dim, decoder.dim), 1
    yield "head", (batch * decoder.queries, decoder.dim, config.patch_dim), 1


def time_products(config: ModelConfig, batch: int, device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Seconds and FLOP/s of each product in its three forms."""
    for name, (M, K, N), count in products(config, batch):
        x_MK, grad_MN = (torch.randn(M, size, device=device).to(dtype) for size in (K, N))
        weight_NK = torch.randn(N, K, device=device).to(dtype)
        candidates: dict[str, timing.Candidate] = {
            "forward": lambda x=x_MK, w=weight_NK: x @ w.mT,  # type: ignore[misc]
            "input": lambda g=grad_MN, w=weight_NK: g @ w,  # type: ignore[misc]
            "weight": lambda g=grad_MN, x=x_MK: g.mT @ x,  # type: ignore[misc]
        }
        seconds = timing.median_seconds(candidates, device, REPEATS)
        yield {"name": name, "rows": M, "in": K, "out": N, "count": count, "flops": 2.0 * M * K * N} | seconds


def time_attention(config: ModelConfig, batch: int, device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Seconds of SDPA, forward alone and with its backward pass, and its error, by backend; None where one refuses."""
    for shape in attention_shapes(config):
        qkv = random_qkv(shape, batch, device, dtype)
        grad = torch.randn(batch, shape.Q, shape.H, shape.d, device=device).to(dtype).transpose(1, 2)
        flops = 4.0 * batch * shape.H * shape.Q * shape.N * shape.d
        row = shape._asdict() | {"flops": flops, "choice": torch_choice(shape, batch, device, dtype)}
        for backend in ("chosen", *BACKENDS):
            row[backend] = _attention_seconds(backend, qkv, grad, device)
            if row[backend] is not None:
                row[backend]["error"] = attention_error(backend, shape, device, dtype)
        yield row


def _attention_seconds(
    backend: str, qkv: tuple[Tensor, Tensor, Tensor], grad: Tensor, device: str
) -> dict[str, float] | None:
    def both() -> tuple[Tensor, ...]:
        with _only(backend):
            out = F.scaled_dot_product_attention(*qkv)
        return torch.autograd.grad(out, qkv, grad)

    def forward() -> Tensor:
        with torch.no_grad(), _only(backend):
            return F.scaled_dot_product_attention(*qkv)

    try:
        both()  # outside of a graph, where a refusal is an error and nothing more
    except RuntimeError as error:
        print(f"{backend}: {str(error).splitlines()[0]}", file=sys.stderr)
        return None
    return timing.median_seconds({"forward": forward, "both": both}, device, REPEATS)


def _only(backend: str) -> AbstractContextManager[None]:
    return sdpa_kernel(BACKENDS[backend]) if backend in BACKENDS else nullcontext()


def attention_error(backend: str, shape: AttentionShape, device: str, dtype: torch.dtype) -> float:
    """Largest relative error of output and gradients against the math backend in fp32; NaN where one is not finite."""
    q, k, v = qkv = random_qkv(shape, ERROR_BATCH, device, dtype)
    grad = torch.randn(ERROR_BATCH, shape.H, shape.Q, shape.d, device=device).to(dtype)
    with _only(backend):
        out = F.scaled_dot_product_attention(q, k, v)
    found = (out, *torch.autograd.grad(out, qkv, grad))
    exact_qkv = [each.detach().float().requires_grad_() for each in (q, k, v)]
    with sdpa_kernel(SDPBackend.MATH):
        exact_out = F.scaled_dot_product_attention(exact_qkv[0], exact_qkv[1], exact_qkv[2])
    exact = (exact_out, *torch.autograd.grad(exact_out, exact_qkv, grad.float()))
    errors = torch.stack([(f.float() - e).norm() / e.norm() for f, e in zip(found, exact, strict=True)])
    return errors.max().item() if errors.isfinite().all() else math.nan


def time_pointwise(config: ModelConfig, batch: int, device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """What stands between the products, by PyTorch's own kernels: seconds and the bytes that must move."""
    for stack in stacks(config):
        shape, hidden = (batch, stack.tokens, stack.dim), int(stack.dim * config.mlp_ratio)
        count = batch * stack.tokens * stack.dim
        for kind in (torch.float32, dtype):
            x = torch.randn(shape, device=device).to(kind).requires_grad_()
            weight, bias = (torch.randn(stack.dim, device=device).requires_grad_() for _ in range(2))
            leaves = (x, weight, bias)
            grad, item = torch.randn(shape, device=device), kind.itemsize

            def norm(x: Tensor = x, weight: Tensor = weight, bias: Tensor = bias) -> Tensor:
                return F.layer_norm(x.float(), x.shape[-1:], weight, bias, 1e-6)

            def norm_both(
                norm: Callable[[], Tensor] = norm, grad: Tensor = grad, leaves: tuple[Tensor, ...] = leaves
            ) -> tuple[Tensor, ...]:
                return torch.autograd.grad(norm(), leaves, grad)

            name = f"{stack.name} LayerNorm of {str(kind).removeprefix('torch.')}"
            yield _moved(name, norm_both, count * (3 * item + 8), device)
        wide = torch.randn(batch, stack.tokens, hidden, device=device).to(dtype).requires_grad_()
        wide_grad = torch.randn_like(wide)

        def gelu(x: Tensor = wide, grad: Tensor = wide_grad) -> tuple[Tensor, ...]:
            return torch.autograd.grad(F.gelu(x), (x,), grad)

        yield _moved(f"{stack.name} GELU", gelu, wide.numel() * 5 * dtype.itemsize, device)


def _moved(name: str, call: timing.Candidate, moved: int, device: str) -> dict[str, Any]:
    return {"name": name, "bytes": moved, "seconds": timing.median_seconds({"both": call}, device, REPEATS)["both"]}


def mask_seconds(device: str) -> float:
    """Time of drawing the masks of a published batch, 49 of 196 patches kept."""
    ids_B = torch.arange(MASKED_IMAGES, device=device)
    return timing.median_seconds({"masks": lambda: mask_indices(0, 0, ids_B, 196, 49)}, device, REPEATS)["masks"]


def product_table(rows: list[dict[str, Any]], peak: float) -> list[str]:
    """One line a product, and what all of a step's products take at these rates."""
    forms = ("forward", "input", "weight")
    lines = [
        [
            f"{row['name']} [{row['rows']}, {row['in']}] to {row['out']}",
            row["count"],
            *(f"{row['flops'] / row[form] / 1e12:.1f}" for form in forms),
            f"{3 * row['flops'] / sum(row[form] for form in forms) / peak:.0%}",
        ]
        for row in rows
    ]
    seconds = sum(row["count"] * sum(row[form] for form in forms) for row in rows)
    flops = sum(3 * row["count"] * row["flops"] for row in rows)
    header = ["matrix product", "times", *(f"{form}, TFLOP/s" for form in forms), "of the large product"]
    return [
        *markdown_table(header, lines),
        f"All of them once forward and backward: {seconds * 1e3:.2f} ms, {flops / seconds / 1e12:.1f} TFLOP/s.",
        "",
    ]


def attention_table(rows: list[dict[str, Any]], batch: int) -> list[str]:
    """Microseconds an image and block, forward + backward, and the largest error."""
    lines = []
    for row in rows:
        cells = []
        for backend in ("chosen", *BACKENDS):
            found = row[backend]
            cells.append("refused" if found is None else f"{found['both'] / batch * 1e6:.3f} ({found['error']:.0e})")
        lines.append(
            [f"{row['name']}: {row['Q']} of {row['N']} tokens, {row['H']} x {row['d']}", row["choice"], *cells]
        )
    title = "attention, forward + backward, microseconds an image and block (error of gradients)"
    header = [title, "torch chooses", "chosen", *BACKENDS]
    return markdown_table(header, lines)


def pointwise_table(rows: list[dict[str, Any]], copy: float) -> list[str]:
    """Bytes that must move over the time, against a copy."""
    lines = [
        [
            row["name"],
            f"{row['seconds'] * 1e6:.0f}",
            f"{row['bytes'] / 1e6:.0f}",
            f"{row['bytes'] / row['seconds'] / copy:.0%}",
        ]
        for row in rows
    ]
    return markdown_table(["pointwise, forward + backward, eager", "microseconds", "MB at least", "of copy"], lines)


class Page:
    """What has been measured so far: written anew after every row."""

    def __init__(self, device: str, dtype: torch.dtype, facts: dict[str, str], data: dict[str, Any]) -> None:
        self.device, self.dtype, self.facts, self.data = device, dtype, facts, data
        self.text = ""

    def measure(self, name: str, batch: int) -> None:
        """Adds the rows of a model."""
        config = get_recipe(RECIPES[name]).model
        facts = attention_facts(config, batch, self.device, self.dtype)
        self.facts |= {f"{name}, {key}": value for key, value in facts.items()}
        found: dict[str, Any] = {"batch": batch, "products": [], "attention": [], "pointwise": []}
        self.data["models"][name] = found
        for part, times in (("products", time_products), ("attention", time_attention), ("pointwise", time_pointwise)):
            for row in times(config, batch, self.device, self.dtype):
                found[part].append(row)
                self.write()

    def write(self) -> None:
        """Writes page and JSON."""
        lines: list[str] = []
        peak, copy = self.data["product_flops_per_second"], self.data["copy_bytes_per_second"]
        for name, found in self.data["models"].items():
            lines += [f"## {name}, batch {found['batch']}", "", *product_table(found["products"], peak)]
            lines += attention_table(found["attention"], found["batch"])
            lines += pointwise_table(found["pointwise"], copy)
        name = f"ceilings_{self.device.split(':')[0]}_{machine.today()}"
        self.text = write_page(name, "What the device gives at our shapes", self.facts, lines, self.data)


def main(argv: list[str]) -> int:
    """Times everything; a row is written as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=RECIPES, default=["b16", "l16", "h14"])
    parser.add_argument("--batch", type=int, help="images, for all models")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    device, dtype = options.device, torch.bfloat16
    held = hold_product(torch.device(device))
    copy = timing.copy_bytes_per_second(device, repeats=REPEATS)
    peak = held or timing.matmul_flops_per_second(device, dtype)
    facts = {"command": f"python -m benchmarks.bench_ceilings {' '.join(argv)}", **timing.environment(device)}
    facts["device copy, read + written"] = f"{copy / 1e9:.0f} GB/s"
    facts["large bf16 product"] = f"{peak / 1e12:.1f} TFLOP/s" + (" after seconds of it" if held else "")
    masks = mask_seconds(device)
    facts[f"mask indices of {MASKED_IMAGES} images of 196 patches"] = f"{masks * 1e6:.1f} microseconds"
    data = {"copy_bytes_per_second": copy, "product_flops_per_second": peak, "mask_seconds": masks, "models": {}}
    page = Page(device, dtype, facts, data)
    for name in options.models:
        page.measure(name, options.batch or BATCHES[name])
    print(page.text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
