"""The operators against the published formulation: `python -m benchmarks.bench_kernels [--device cuda] [--batch 1024]`.

First every operator is checked on the device (check_kernels.py); if a check fails no number is printed. Then each
operator is timed, forward and backward, beside the published formulation in eager PyTorch and under torch.compile, and
the bytes it must move are set against a copy measured in the same run. Bytes count every input once and every output
once.

With --candidates the kernels that no model uses yet are timed instead, forward and backward: add_norm against an
addition and F.layer_norm, eager and compiled, and short_attention against the backends of scaled_dot_product_attention,
with the unbinding and transposing that they need.

The published side gets what its pipeline gives it: under autocast, bf16 tokens and predictions with float32 mask token
and positions. In "all together", a step's work outside the network, its loss and its gather share one patchified image.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import published_operators as published
from benchmarks.check_candidates import check_candidates
from benchmarks.check_kernels import check_all
from benchmarks.pages import results_folder
from patchmill.kernels.add_norm import add_norm
from patchmill.kernels.backend import active_backend
from patchmill.kernels.short_attention import short_attention
from patchmill.tools.profiler import timing
from patchmill.tools.profiler.kernels import MEAN, STD, Operator, Workload

# Patch and image size; the encoder's width does not enter.
MODELS = {"b16": (16, 224), "h14": (14, 224), "b16-448": (16, 448)}
DECODER_WIDTH = 512


class Contest(Workload):
    """A batch of one model's sizes (see Workload), with the published side of every operator."""

    def __init__(self, model: str, batch: int, device: str, dtype: torch.dtype) -> None:
        patch, size = MODELS[model]
        super().__init__(patch, (size, size), DECODER_WIDTH, batch, device, dtype)
        self.statistics = torch.tensor([MEAN, STD], device=device)
        self.full_pred = torch.randn(batch, self.L, self.P, device=device).to(dtype).requires_grad_()

    def published_masks(self) -> tuple[Tensor, ...]:
        return published.random_masking(torch.rand(self.B, self.L, device=self.images.device), self.K)

    def published_patches(self) -> Tensor:
        images = published.normalize_images(self.images, *self.statistics.unbind())
        return published.gather_rows(published.patchify(images, self.patch), self.keep).to(self.dtype)

    def published_tokens(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(published.gather_rows(self.tokens[:, 1:], self.mask), self.tokens, self.grad_rows)

    def published_unshuffle(self) -> tuple[Tensor, ...]:
        out = published.unshuffle(self.x, self.token, self.decoder_pos, self.restore, 1)
        return torch.autograd.grad(out, (self.x, self.token), self.grad_tokens.to(out.dtype))

    def published_loss(self) -> tuple[Tensor, ...]:
        target = published.patchify(published.normalize_images(self.images, *self.statistics.unbind()), self.patch)
        mask = (self.restore >= self.K).float()
        return torch.autograd.grad(published.masked_loss(self.full_pred, target, mask, True, 2), self.full_pred)

    def published_step(self) -> list[Tensor]:
        keep, restore, mask = self.published_masks()
        patches = published.patchify(published.normalize_images(self.images, *self.statistics.unbind()), self.patch)
        visible = published.gather_rows(patches, keep).to(self.dtype)
        out = published.unshuffle(self.x, self.token, self.decoder_pos, restore, 1)
        loss = published.masked_loss(self.full_pred, patches, mask, True, 2)
        leaves = (self.x, self.token, self.full_pred)
        return [visible, *torch.autograd.grad((out, loss), leaves, (self.grad_tokens.to(out.dtype), None))]

    def pairs(self) -> list[tuple[Operator, Callable[[], object]]]:
        """Each of our operators with its published form."""
        forms = (
            self.published_masks,
            self.published_patches,
            self.published_tokens,
            self.published_unshuffle,
            self.published_loss,
            self.published_step,
        )
        return list(zip(self.operators(), forms, strict=True))


def time_operators(
    workload: Contest, device: str, with_compile: bool, clock: timing.Clock
) -> list[dict[str, float | str]]:
    """Time every operator and its published form; seconds, bytes and ratios."""
    copy = timing.copy_bytes_per_second(device, clock)
    rows: list[dict[str, float | str]] = [{"operator": "device copy", "bytes_per_second": copy}]
    for operator, form in workload.pairs():
        candidates = {"ours": operator.call, "eager": form}
        if with_compile:
            candidates["compiled"] = torch.compile(form, dynamic=False)
        seconds = timing.median_seconds(candidates, device, clock=clock)
        row: dict[str, float | str] = {"operator": operator.name, "bytes": operator.bytes_moved}
        row |= {f"{name}_seconds": value for name, value in seconds.items()}
        row["fraction_of_copy"] = operator.bytes_moved / seconds["ours"] / copy
        row |= {f"faster_than_{name}": seconds[name] / seconds["ours"] for name in seconds if name != "ours"}
        rows.append(row)
    return rows


# tokens, heads and width of a head: encoder and decoder of ViT-B/16 (the encoder of L/16 has 16 heads)
STAGES = {"encoder B/16": (50, 12, 64), "decoder": (197, 16, 32)}
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
BACKENDS |= {"cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}


def norm_calls(rows: int, width: int, device: str, dtype: torch.dtype, with_compile: bool) -> dict[str, Callable]:
    """Residual addition and LayerNorm, forward and backward: ours, eager and compiled."""
    x, delta = (torch.randn(rows, width, device=device).to(dtype).requires_grad_() for _ in range(2))
    weight, bias = (torch.ones(width, device=device).requires_grad_() for _ in range(2))
    grads = tuple(torch.randn(rows, width, device=device).to(dtype) for _ in range(2))

    def eager(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        total = x + delta
        return total, F.layer_norm(total, (width,), weight.to(dtype), bias.to(dtype), 1e-6)

    forms = {"ours": add_norm, "eager": eager}
    if with_compile:
        forms["compiled"] = torch.compile(eager, dynamic=False)
    leaves = (x, delta, weight, bias)
    return {
        name: lambda form=form: torch.autograd.grad(form(*leaves), leaves, grads)  # type: ignore[misc]
        for name, form in forms.items()
    }


def attention_calls(batch: int, stage: str, device: str, dtype: torch.dtype) -> dict[str, Callable]:
    """Attention of packed qkv, forward and backward: ours, and every backend of PyTorch's that takes these sizes."""
    tokens, heads, width = STAGES[stage]
    qkv = torch.randn(batch, tokens, 3, heads, width, device=device).to(dtype).requires_grad_()
    grad = torch.randn(batch, tokens, heads, width, device=device).to(dtype)

    def pytorch(backend: SDPBackend) -> tuple[Tensor, ...]:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return torch.autograd.grad(out, qkv, grad)

    calls: dict[str, Callable] = {"ours": lambda: torch.autograd.grad(short_attention(qkv), qkv, grad)}
    for name, backend in BACKENDS.items():
        try:
            pytorch(backend)
        except RuntimeError as error:
            print(f"scaled_dot_product_attention, {stage}: no {name} ({str(error).splitlines()[0]})", file=sys.stderr)
        else:
            calls[name] = lambda backend=backend: pytorch(backend)  # type: ignore[misc]
    return calls


def time_candidates(
    batch: int, device: str, dtype: torch.dtype, with_compile: bool, clock: timing.Clock
) -> list[dict[str, float | str]]:
    """Time every candidate beside its rivals; seconds, and the best rival's over ours."""
    rows: list[dict[str, float | str]] = []
    for stage, (tokens, heads, width) in STAGES.items():
        contests = {
            "add_norm": norm_calls(batch * tokens, heads * width, device, dtype, with_compile),
            "short_attention": attention_calls(batch, stage, device, dtype),
        }
        for name, calls in contests.items():
            seconds = timing.median_seconds(calls, device, clock=clock)
            best = min(value for rival, value in seconds.items() if rival != "ours")
            row: dict[str, float | str] = {"candidate": f"{name}, {stage}", "faster_than_best": best / seconds["ours"]}
            rows.append(row | {f"{rival}_seconds": value for rival, value in seconds.items()})
    return rows


def candidates_as_markdown(rows: list[dict[str, float | str]], facts: dict[str, str]) -> str:
    """A page with one line per candidate."""
    lines = ["# Candidate kernels, forward and backward", "", *(f"- {name}: {value}" for name, value in facts.items())]
    lines += ["", "| candidate | microseconds | against the best rival |", "|---|---|---:|"]
    for row in rows:
        times = ", ".join(
            f"{name.removesuffix('_seconds')} {float(value) * 1e6:.0f}"
            for name, value in row.items()
            if name.endswith("_seconds")
        )
        lines.append(f"| {row['candidate']} | {times} | {float(row['faster_than_best']):.2f} |")
    return "\n".join(lines) + "\n"


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
    parser.add_argument("--no-check", action="store_true", help="leave the checks out: tests have just passed")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--candidates", action="store_true", help="time the kernels that no model uses yet instead")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds (shared machine; use --threads 1)")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    check = check_candidates if options.candidates else check_all
    try:
        checks = "left out" if options.no_check else str(check(options.device))
    except AssertionError as error:
        print(f"a check failed, so nothing is timed: {error}", file=sys.stderr)
        return 1
    dtype = torch.bfloat16 if options.device.startswith("cuda") else torch.float32
    clock = time.process_time if options.cpu_time else time.perf_counter
    facts = {
        "command": " ".join(["python -m benchmarks.bench_kernels", *argv]),
        **timing.environment(options.device),
        "backend": active_backend(torch.empty(0, device=options.device)),
        "checks passed before timing": checks,
        "times": f"{'CPU seconds' if options.cpu_time else 'wall clock'}, median of 21 alternated repeats",
    }
    if options.candidates:
        facts["sizes"] = f"batch {options.batch}, {dtype}"
        rows = time_candidates(options.batch, options.device, dtype, not options.no_compile, clock)
        page = candidates_as_markdown(rows, facts)
    else:
        workload = Contest(options.model, options.batch, options.device, dtype)
        facts["sizes"] = f"{options.model}, batch {options.batch}, {workload.L} patches, {workload.K} kept, {dtype}"
        rows = time_operators(workload, options.device, not options.no_compile, clock)
        page = as_markdown(rows, facts)
    folder = results_folder()
    name = f"{'candidates' if options.candidates else 'kernels'}_{options.device.split(':')[0]}_{facts['date']}"
    (folder / f"{name}.md").write_text(page)
    (folder / f"{name}.json").write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
