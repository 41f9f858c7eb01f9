"""The operators against the published formulation: `python -m benchmarks.bench_kernels [--device cuda] [--batch 1024]`.

First every operator is checked on the device (check_kernels.py); if a check fails no number is printed. Then each
operator is timed, forward and backward, beside the published formulation in eager PyTorch and under torch.compile, and
the bytes it must move are set against a copy measured in the same run. Bytes count every input once and every output
once.

The published side gets what its pipeline gives it: under autocast, bf16 tokens and predictions with float32 mask token
and positions. In "all together", a step's work outside the network, its loss and its gather share one patchified image.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import published_operators as published
from benchmarks.check_kernels import check_all
from benchmarks.pages import results_folder
from patchmill.kernels.backend import active_backend
from patchmill.kernels.gather import gather_patches, gather_tokens
from patchmill.kernels.masked_loss import masked_mse
from patchmill.kernels.permute import mask_indices
from patchmill.kernels.unshuffle import unshuffle
from patchmill.tools import timing

# Patch and image size; the encoder's width does not enter.
MODELS = {"b16": (16, 224), "h14": (14, 224), "b16-448": (16, 448)}
DECODER_WIDTH = 512
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Operator:
    """One row of the table: the two sides, and the fewest bytes the operator can move."""

    name: str
    ours: Callable[[], object]
    published: Callable[[], object]
    bytes_moved: int


class Workload:
    """A batch of one model's sizes: B images, L patches, K kept, M masked, P values per patch, one class token."""

    def __init__(self, model: str, batch: int, device: str, dtype: torch.dtype) -> None:
        self.patch, size = MODELS[model]
        self.B, self.L, self.dtype = batch, (size // self.patch) ** 2, dtype
        self.K = self.L // 4
        self.M, self.P = self.L - self.K, 3 * self.patch**2
        self.images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device=device)
        self.samples = torch.arange(batch, device=device)
        self.keep, self.mask, self.restore = mask_indices(0, 0, self.samples, self.L, self.K)
        self.statistics = torch.tensor([MEAN, STD], device=device)

        def leaf(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, device=device).to(dtype).requires_grad_()

        self.tokens = leaf(batch, 1 + self.L, DECODER_WIDTH)
        self.x = leaf(batch, 1 + self.K, DECODER_WIDTH)
        self.token = leaf(DECODER_WIDTH, dtype=torch.float32)
        self.decoder_pos = torch.randn(1 + self.L, DECODER_WIDTH, device=device)
        self.pred, self.full_pred = leaf(batch, self.M, self.P), leaf(batch, self.L, self.P)
        self.grad_rows = torch.randn(batch, self.M, DECODER_WIDTH, device=device).to(dtype)
        self.grad_tokens = torch.randn(batch, 1 + self.L, DECODER_WIDTH, device=device).to(dtype)

    def our_masks(self) -> tuple[Tensor, ...]:
        return mask_indices(0, 0, self.samples, self.L, self.K)

    def published_masks(self) -> tuple[Tensor, ...]:
        return published.random_masking(torch.rand(self.B, self.L, device=self.images.device), self.K)

    def our_patches(self) -> Tensor:
        return gather_patches(self.images, self.keep, self.patch, MEAN, STD, self.dtype)

    def published_patches(self) -> Tensor:
        images = published.normalize_images(self.images, *self.statistics.unbind())
        return published.gather_rows(published.patchify(images, self.patch), self.keep).to(self.dtype)

    def our_tokens(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(gather_tokens(self.tokens, self.mask, None, 1), self.tokens, self.grad_rows)

    def published_tokens(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(published.gather_rows(self.tokens[:, 1:], self.mask), self.tokens, self.grad_rows)

    def our_unshuffle(self) -> tuple[Tensor, ...]:
        out = unshuffle(self.x, self.token, self.decoder_pos, self.restore, 1)
        return torch.autograd.grad(out, (self.x, self.token), self.grad_tokens)

    def published_unshuffle(self) -> tuple[Tensor, ...]:
        out = published.unshuffle(self.x, self.token, self.decoder_pos, self.restore, 1)
        return torch.autograd.grad(out, (self.x, self.token), self.grad_tokens.to(out.dtype))

    def our_loss(self) -> tuple[Tensor, ...]:
        loss = masked_mse(self.pred, self.images, self.mask, self.patch, MEAN, STD, True)
        return torch.autograd.grad(loss, self.pred)

    def published_loss(self) -> tuple[Tensor, ...]:
        target = published.patchify(published.normalize_images(self.images, *self.statistics.unbind()), self.patch)
        mask = (self.restore >= self.K).float()
        return torch.autograd.grad(published.masked_loss(self.full_pred, target, mask, True, 2), self.full_pred)

    def our_step(self) -> list[Tensor]:
        keep, mask, restore = self.our_masks()
        patches = gather_patches(self.images, keep, self.patch, MEAN, STD, self.dtype)
        out = unshuffle(self.x, self.token, self.decoder_pos, restore, 1)
        loss = masked_mse(self.pred, self.images, mask, self.patch, MEAN, STD, True)
        return [patches, *torch.autograd.grad((out, loss), (self.x, self.token, self.pred), (self.grad_tokens, None))]

    def published_step(self) -> list[Tensor]:
        keep, restore, mask = self.published_masks()
        patches = published.patchify(published.normalize_images(self.images, *self.statistics.unbind()), self.patch)
        visible = published.gather_rows(patches, keep).to(self.dtype)
        out = published.unshuffle(self.x, self.token, self.decoder_pos, restore, 1)
        loss = published.masked_loss(self.full_pred, patches, mask, True, 2)
        leaves = (self.x, self.token, self.full_pred)
        return [visible, *torch.autograd.grad((out, loss), leaves, (self.grad_tokens.to(out.dtype), None))]

    def operators(self) -> list[Operator]:
        """Every row, with its bytes: ids are 4 bytes, pixels 1, tokens and predictions `item`."""
        item, ids = self.dtype.itemsize, 4 * self.B
        row, kept, rows = DECODER_WIDTH * item, self.B * (1 + self.K), self.B * (1 + self.L)
        masks = ids * 2 * self.L + 8 * self.B
        patches = self.B * self.K * self.P * (1 + item) + ids * self.K
        tokens = row * (3 * self.B * self.M + rows) + 2 * ids * self.M
        shuffle = 2 * row * (kept + rows) + 2 * ids * self.L + 4 * DECODER_WIDTH * (1 + self.L)
        loss = self.B * self.M * self.P * (1 + 4 * item) + ids * self.M
        return [
            Operator("mask indices", self.our_masks, self.published_masks, masks),
            Operator("gather patches", self.our_patches, self.published_patches, patches),
            Operator("gather tokens, fwd + bwd", self.our_tokens, self.published_tokens, tokens),
            Operator("unshuffle, fwd + bwd", self.our_unshuffle, self.published_unshuffle, shuffle),
            Operator("masked loss, fwd + bwd", self.our_loss, self.published_loss, loss),
            Operator("all together", self.our_step, self.published_step, masks + patches + shuffle + loss),
        ]


def time_operators(
    workload: Workload, device: str, with_compile: bool, clock: timing.Clock
) -> list[dict[str, float | str]]:
    """Time every operator and its published form; seconds, bytes and ratios."""
    copy = timing.copy_bytes_per_second(device, clock)
    rows: list[dict[str, float | str]] = [{"operator": "device copy", "bytes_per_second": copy}]
    for operator in workload.operators():
        candidates = {"ours": operator.ours, "eager": operator.published}
        if with_compile:
            candidates["compiled"] = torch.compile(operator.published, dynamic=False)
        seconds = timing.median_seconds(candidates, device, clock=clock)
        row: dict[str, float | str] = {"operator": operator.name, "bytes": operator.bytes_moved}
        row |= {f"{name}_seconds": value for name, value in seconds.items()}
        row["fraction_of_copy"] = operator.bytes_moved / seconds["ours"] / copy
        row |= {f"faster_than_{name}": seconds[name] / seconds["ours"] for name in seconds if name != "ours"}
        rows.append(row)
    return rows


def as_markdown(rows: list[dict[str, float | str]], facts: dict[str, str]) -> str:
    """A page with the command, the circumstances and one line per operator."""
    lines = ["# Kernels against the published formulation", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += [f"- device copy, read + written: {float(rows[0]['bytes_per_second']) / 1e9:.0f} GB/s", ""]
    lines += ["| operator | ours, µs | eager, µs | compiled, µs | MB moved | of copy | vs eager | vs compiled |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|---:|"]
    for row in rows[1:]:

        def cell(key: str, scale: float, form: str, row: dict[str, float | str] = row) -> str:
            return format(float(row[key]) * scale, form) if key in row else "-"

        times = [cell(f"{name}_seconds", 1e6, ".0f") for name in ("ours", "eager", "compiled")]
        moved = [cell("bytes", 1e-6, ".1f"), cell("fraction_of_copy", 100, ".0f") + " %"]
        ratios = [cell(f"faster_than_{name}", 1, ".1f") for name in ("eager", "compiled")]
        lines.append("| " + " | ".join([str(row["operator"]), *times, *moved, *ratios]) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    """Check, time, print and write the table; 1 if a check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    has_cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if has_cuda else "cpu")
    parser.add_argument("--model", choices=MODELS, default="b16")
    parser.add_argument("--batch", type=int, default=1024 if has_cuda else 64)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds (shared machine; use --threads 1)")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    try:
        checks = check_all(options.device)
    except AssertionError as error:
        print(f"a check failed, so nothing is timed: {error}", file=sys.stderr)
        return 1
    dtype = torch.bfloat16 if options.device.startswith("cuda") else torch.float32
    workload = Workload(options.model, options.batch, options.device, dtype)
    clock = time.process_time if options.cpu_time else time.perf_counter
    rows = time_operators(workload, options.device, not options.no_compile, clock)
    facts = {
        "command": " ".join(["python -m benchmarks.bench_kernels", *argv]),
        **timing.environment(options.device),
        "sizes": f"{options.model}, batch {options.batch}, {workload.L} patches, {workload.K} kept, {dtype}",
        "backend": active_backend(workload.x),
        "checks passed before timing": str(checks),
        "times": f"{'CPU seconds' if options.cpu_time else 'wall clock'}, median of 21 alternated repeats",
    }
    page = as_markdown(rows, facts)
    folder = results_folder()
    name = f"kernels_{options.device.split(':')[0]}_{facts['date']}"
    (folder / f"{name}.md").write_text(page)
    (folder / f"{name}.json").write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
