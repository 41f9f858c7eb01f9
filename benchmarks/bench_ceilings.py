"""What the device gives at our shapes: `python -m benchmarks.bench_ceilings [--models b16 l16 h14]`.

No step can be faster than its matrix products and its attention alone, or move bytes faster than a copy does. Matrix
products are those of a step (forward, gradient of the input, gradient of the weight), attention those of encoder,
decoder and last decoder block through every backend of SDPA, and pointwise work what stands between them. Inputs are
random numbers: products of zeros run faster than real ones.

Shapes: B images, N tokens, D width, H heads, d width of a head.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.pages import markdown_table, write_page
from benchmarks.steps import RECIPES
from patchmill.kernels.permute import mask_indices
from patchmill.tools.profiler import machine, timing
from patchmill.trainer.config.model import ModelConfig
from patchmill.trainer.recipes.pretrain import get_recipe

BATCHES = {"b16": 512, "l16": 256, "h14": 128, "tiny": 8}
"""images a step, as the step benchmark takes them"""
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
REPEATS = 11
MASKED_IMAGES = 4096


class Stack(NamedTuple):
    """A row of transformer blocks: tokens, and of these how many ask in the last block."""

    name: str
    tokens: int
    queries: int
    dim: int
    heads: int
    depth: int


def stacks(config: ModelConfig) -> list[Stack]:
    """Encoder and decoder at 75 %."""
    c, kept = config, config.num_patches // 4
    masked = c.num_patches - kept
    return [
        Stack("encoder", 1 + kept, 1 + kept, c.embed_dim, c.num_heads, c.depth),
        Stack("decoder", 1 + c.num_patches, masked, c.decoder_embed_dim, c.decoder_num_heads, c.decoder_depth),
    ]


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


def time_products(config: ModelConfig, batch: int, device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Seconds and FLOP/s of each product in its three forms."""
    rows = []
    for name, (M, K, N), count in products(config, batch):
        x_MK, grad_MN = (torch.randn(M, size, device=device).to(dtype) for size in (K, N))
        weight_NK = torch.randn(N, K, device=device).to(dtype)
        candidates: dict[str, timing.Candidate] = {
            "forward": lambda x=x_MK, w=weight_NK: x @ w.mT,  # type: ignore[misc]
            "input": lambda g=grad_MN, w=weight_NK: g @ w,  # type: ignore[misc]
            "weight": lambda g=grad_MN, x=x_MK: g.mT @ x,  # type: ignore[misc]
        }
        seconds = timing.median_seconds(candidates, device, REPEATS)
        rows.append({"name": name, "rows": M, "in": K, "out": N, "count": count, "flops": 2.0 * M * K * N} | seconds)
    return rows


def time_attention(config: ModelConfig, batch: int, device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Seconds of SDPA, forward alone and with its backward pass, by backend; None where a backend refuses."""
    rows = []
    cases = [(stack.name, stack, stack.tokens) for stack in stacks(config)]
    decoder = cases[-1][1]
    for name, stack, queries in [*cases, ("last decoder block", decoder, decoder.queries)]:
        head = stack.dim // stack.heads
        # as the model makes them: views of one [B, N, 3, H, d] product
        made = torch.randn(batch, stack.tokens, 3, stack.heads, head, device=device).to(dtype)
        q, k, v = (each.detach() for each in made.permute(2, 0, 3, 1, 4).unbind(0))
        q = q[:, :, :queries].detach()
        grad = torch.randn(batch, queries, stack.heads, head, device=device).to(dtype).transpose(1, 2)
        choice = SDPBackend(torch._fused_sdp_choice(q, k, v)).name
        flops = 4.0 * batch * stack.heads * queries * stack.tokens * head
        row: dict[str, Any] = {"name": name, "N": stack.tokens, "Q": queries, "H": stack.heads, "d": head}
        row |= {"flops": flops, "choice": choice}
        for backend in ("chosen", *BACKENDS):
            row[backend] = _attention_seconds(backend, (q, k, v), grad, device)
        rows.append(row)
    return rows


def _attention_seconds(
    backend: str, qkv: tuple[Tensor, Tensor, Tensor], grad: Tensor, device: str
) -> dict[str, float] | None:
    leaves = tuple(each.detach().requires_grad_() for each in qkv)

    def both() -> tuple[Tensor, ...]:
        with sdpa_kernel(BACKENDS[backend]) if backend in BACKENDS else nullcontext():
            out = F.scaled_dot_product_attention(*leaves)
        return torch.autograd.grad(out, leaves, grad)

    def forward() -> Tensor:
        with torch.no_grad(), sdpa_kernel(BACKENDS[backend]) if backend in BACKENDS else nullcontext():
            return F.scaled_dot_product_attention(*leaves)

    try:
        both()  # outside of a graph, where a refusal is an error and nothing more
    except RuntimeError as error:
        print(f"{backend}: {str(error).splitlines()[0]}", file=sys.stderr)
        return None
    return timing.median_seconds({"forward": forward, "both": both}, device, REPEATS)


def time_pointwise(config: ModelConfig, batch: int, device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """What stands between the products, by PyTorch's own kernels: seconds and the bytes that must move."""
    rows = []
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
            rows.append(_moved(name, norm_both, count * (3 * item + 8), device))
        wide = torch.randn(batch, stack.tokens, hidden, device=device).to(dtype).requires_grad_()
        wide_grad = torch.randn_like(wide)

        def gelu(x: Tensor = wide, grad: Tensor = wide_grad) -> tuple[Tensor, ...]:
            return torch.autograd.grad(F.gelu(x), (x,), grad)

        rows.append(_moved(f"{stack.name} GELU", gelu, wide.numel() * 5 * dtype.itemsize, device))
    return rows


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
    """Microseconds an image and block, forward + backward."""
    lines = []
    for row in rows:
        cells = []
        for backend in ("chosen", *BACKENDS):
            found = row[backend]
            cells.append("refused" if found is None else f"{found['both'] / batch * 1e6:.3f}")
        lines.append(
            [f"{row['name']}: {row['Q']} of {row['N']} tokens, {row['H']} x {row['d']}", row["choice"], *cells]
        )
    header = ["attention, forward + backward, microseconds an image and block", "SDPA chooses", "chosen", *BACKENDS]
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


def main(argv: list[str]) -> int:
    """Times everything; each model's part is written as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=RECIPES, default=["b16", "l16", "h14"])
    parser.add_argument("--batch", type=int, help="images, for all models")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    device, dtype = options.device, torch.bfloat16
    copy = timing.copy_bytes_per_second(device, repeats=REPEATS)
    peak = timing.matmul_flops_per_second(device, dtype)
    facts = {"command": f"python -m benchmarks.bench_ceilings {' '.join(argv)}", **timing.environment(device)}
    facts["device copy, read + written"] = f"{copy / 1e9:.0f} GB/s"
    facts["large bf16 product"] = f"{peak / 1e12:.1f} TFLOP/s"
    masks = mask_seconds(device)
    facts[f"mask indices of {MASKED_IMAGES} images of 196 patches"] = f"{masks * 1e6:.1f} microseconds"
    lines: list[str] = []
    data: dict[str, Any] = {"copy_bytes_per_second": copy, "product_flops_per_second": peak, "mask_seconds": masks}
    data["models"] = {}
    page = ""
    for name in options.models:
        config, batch = get_recipe(RECIPES[name]).model, options.batch or BATCHES[name]
        found = {
            "batch": batch,
            "products": time_products(config, batch, device, dtype),
            "attention": time_attention(config, batch, device, dtype),
            "pointwise": time_pointwise(config, batch, device, dtype),
        }
        data["models"][name] = found
        lines += [f"## {name}, batch {batch}", "", *product_table(found["products"], peak)]
        lines += [*attention_table(found["attention"], batch), *pointwise_table(found["pointwise"], copy)]
        page = write_page(
            f"ceilings_{device.split(':')[0]}_{machine.today()}",
            "What the device gives at our shapes",
            facts,
            lines,
            data,
        )
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
