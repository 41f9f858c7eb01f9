"""step values -> [metrics] -> metrics.jsonl, TensorBoard, loss.png: what a run says of itself.

Values stay on the device until a log step; then one copy brings them over, and every step gets its line.
"""

import json
import math
import time
from pathlib import Path

import torch

from patchmill.trainer.config import ModelConfig
from patchmill.trainer.step import StepValues
from patchmill.trainer.world import World

PEAK_BF16_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}
"""dense bf16 peak per second by a part of the device's name (data sheets)"""


def train_flops_per_image(config: ModelConfig, mask_ratio: float) -> float:
    """Matrix-product FLOPs of forward and backward for one image, whatever a fast path skips (2 per multiply-add).

    The published formulation is counted (all patches embedded and predicted): ViT-B/16, L/16 and H/14 at 224 px and
    75 % give 58.5, 124.2 and 291 G, the numbers that MFU is stated in.
    """
    c, patches = config, config.num_patches
    kept = int(patches * (1 - mask_ratio))

    def blocks(depth: int, tokens: int, dim: int) -> float:
        linear = 2 * tokens * dim * dim * (4 + 2 * c.mlp_ratio)
        return depth * (linear + 4 * tokens**2 * dim)

    embed = 2 * patches * c.patch_dim * c.embed_dim
    encoder = blocks(c.depth, kept + 1, c.embed_dim)
    bridge = 2 * (kept + 1) * c.embed_dim * c.decoder_embed_dim
    decoder = blocks(c.decoder_depth, patches + 1, c.decoder_embed_dim)
    head = 2 * (patches + 1) * c.decoder_embed_dim * c.patch_dim
    return 3.0 * (embed + encoder + bridge + decoder + head)


class Metrics:
    """Collects a run's step values and writes them every `log_every_steps`.

    `latest` is the newest written line, for the progress bar: step, epoch, loss, lr, grad_norm, images_per_s,
    data_wait (share of wall time spent waiting for the loader), and mfu where the device's peak is known.
    """

    def __init__(
        self, run: Path, world: World, *, global_batch: int, flops_per_image: float, tensorboard: bool
    ) -> None:
        self.world = world
        self.global_batch = global_batch
        self.flops_per_image = flops_per_image
        self.latest: dict[str, float] = {}
        self.skipped_in_a_row = 0
        self.skipped = 0
        self._pending: list[tuple[int, float, float, StepValues]] = []
        self._clock, self._waited = time.perf_counter(), 0.0
        self._peak = _device_peak(world)
        self._writer = self._file = None
        if world.is_first:
            self._file = open(run / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(run / "tensorboard"))

    def start(self, wait_seconds: float) -> None:
        """Starts the clock: what came before (loading, compiling) is not counted."""
        self._clock, self._waited = time.perf_counter(), wait_seconds

    def add(self, step: int, epoch: float, lr: float, values: StepValues) -> None:
        """Keeps an update's values, still on the device; `step` counts updates done, from 1."""
        self._pending.append((step, epoch, lr, values))

    def flush(self, wait_seconds: float) -> None:
        """Brings the pending values over (one copy, averaged over ranks) and writes a line for each step.

        Args:
            wait_seconds: the loader's running total of time that the trainer waited for it.
        """
        if not self._pending:
            return
        stacked = torch.stack([torch.stack(values) for *_, values in self._pending])
        rows = self.world.mean(stacked).tolist()
        now = time.perf_counter()
        rate = len(rows) * self.global_batch / (now - self._clock)
        wait = min((wait_seconds - self._waited) / (now - self._clock), 1.0)
        for (step, epoch, lr, _), (loss, grad_norm, skipped) in zip(self._pending, rows, strict=True):
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
            self.skipped += bool(skipped)
            line = {"step": step, "epoch": round(epoch, 6), "loss": loss, "lr": lr, "grad_norm": grad_norm}
            line |= {"images_per_s": round(rate, 2), "data_wait": round(wait, 5)}
            if self._peak:
                line["mfu"] = round(rate / self.world.size * self.flops_per_image / self._peak, 5)
            self._write(line)
        self._pending.clear()
        self._clock, self._waited = now, wait_seconds

    def close(self) -> None:
        """Closes the files."""
        for sink in (self._file, self._writer):
            if sink is not None:
                sink.close()

    def _write(self, line: dict[str, float]) -> None:
        self.latest = line
        if self._file is not None:
            # JSON has no NaN: a value that is not finite is written as null
            clean = {k: v if math.isfinite(v) else None for k, v in line.items()}
            self._file.write(json.dumps(clean) + "\n")
            self._file.flush()
        if self._writer is not None:
            for name, value in line.items():
                if name != "step":
                    self._writer.add_scalar(name, value, line["step"])


def read_metrics(run: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, oldest first; a line cut by a kill is left out."""
    lines = []
    for text in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def rewind_metrics(run: Path, step: int) -> None:
    """Drops the lines past `step`: a run that resumes there writes them again."""
    if not (run / "metrics.jsonl").exists():
        return
    kept = [json.dumps(line) + "\n" for line in read_metrics(run) if line["step"] <= step]
    beside = run / ".metrics.jsonl.tmp"
    beside.write_text("".join(kept), encoding="utf-8")
    beside.rename(run / "metrics.jsonl")


def _device_peak(world: World) -> float | None:
    if world.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(world.device)
    return next((peak for part, peak in PEAK_BF16_FLOPS.items() if part in name), None)
