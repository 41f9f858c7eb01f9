"""Logs a run's values to metrics.jsonl, TensorBoard and Weights & Biases.

Values stay on the device until a log step; then one copy fetches them and every step gets its line.
"""

import hashlib
import json
import math
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor, nn

from patchmill.pipeline.waits import Waited, Waits
from patchmill.trainer.engine.step import StepValues, whole
from patchmill.trainer.engine.world import World
from patchmill.trainer.evaluate.spectrum import Spectrum
from patchmill.trainer.flops import device_peak

EVALUATIONS = "evaluations.jsonl"
"""file of a run folder: one object per evaluation during training"""

SPECTRA = "spectra.jsonl"
"""file of a run folder: one object per spectrum of class tokens during training"""


class _Pending(NamedTuple):
    """An update whose values are still on the device."""

    step: int
    epoch: float
    lr: float
    values: StepValues
    sample_ids_B: Tensor


class Metrics:
    """Collects a run's step values and writes them when flushed. Every rank has one; the first rank's writes.

    `latest` is the last line written: step, epoch, loss, lr, grad_norm, skipped, images_per_s, data_wait (share of wall
    time in which the device waited for the loader), host_wait (share that the host spent in the loader's `next`, on a
    GPU while the device may be busy), memory_gb, and mfu if the device's peak is known. With U-MAE's term, whose
    weighted value the loss includes: also reconstruction (the loss without it) and uniformity.
    """

    def __init__(
        self,
        run: Path,
        world: World,
        *,
        global_batch: int,
        flops_per_image: float,
        tensorboard: bool,
        wandb: str | None,
        uniformity_weight: float = 0.0,
    ) -> None:
        self.run, self.world = run, world
        self.global_batch = global_batch
        self.flops_per_image = flops_per_image
        self.uniformity_weight = uniformity_weight
        self.latest: dict[str, float] = {}
        self.latest_evaluation: dict[str, float] = {}
        self.skipped_in_a_row = 0
        self.why_skipped = ""
        """why the last skipped update was skipped, in words"""
        self.skipped = 0
        self._pending: list[_Pending] = []
        self._clock, self._waited = time.perf_counter(), Waited()
        self._peak = device_peak(world.device)
        self._file: TextIO | None = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        if world.is_first:
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self._tensorboard = SummaryWriter(str(run / "tensorboard"))
            if wandb is not None:
                self._wandb = _open_wandb(run, wandb)
            self._file = open(run / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def start(self, waits: Waits) -> None:
        """Restarts the clock: time before it (loading, compiling, evaluating) does not count."""
        self._waited, self._clock = waits.total(), time.perf_counter()

    def add(self, step: int, epoch: float, lr: float, values: StepValues, sample_ids_B: Tensor) -> None:
        """Keeps an update's values on the device; `step` counts updates done, from 1."""
        self._pending.append(_Pending(step, epoch, lr, values, sample_ids_B))

    def flush(self, waits: Waits, names: Sequence[str] = (), **watched: Tensor) -> None:
        """Fetches the pending values in one copy and writes a line for each step.

        Args:
            waits: of the loader.
            names: `Guard.names`, to name the gradient that was not finite.
            watched: current values to add to every line.
        """
        if not self._pending:
            return
        rows = torch.stack([torch.stack(each.values) for each in self._pending]).tolist()
        now = time.perf_counter()
        rate = len(rows) * self.global_batch / (now - self._clock)
        waited = waits.total()  # the copy above has waited for the device, so this does not
        shares = [min((new - old) / (now - self._clock), 1.0) for new, old in zip(waited, self._waited, strict=True)]
        data_wait, host_wait = shares
        now_values = {
            "images_per_s": round(rate, 2),
            "data_wait": round(data_wait, 5),
            "host_wait": round(host_wait, 5),
            "memory_gb": peak_memory_gb(self.world.device),
        }
        if self._peak:
            now_values["mfu"] = round(rate / self.world.size * self.flops_per_image / self._peak, 5)
        now_values |= {name: value.item() for name, value in watched.items()}
        for each, row in zip(self._pending, rows, strict=True):
            loss, grad_norm, skipped, own_loss, uniformity, first_bad = row
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
            line = {
                "step": each.step,
                "epoch": round(each.epoch, 6),
                "loss": loss,
                "lr": each.lr,
                "grad_norm": grad_norm,
            }
            if self.uniformity_weight:
                line |= {"reconstruction": loss - self.uniformity_weight * uniformity, "uniformity": uniformity}
            if skipped:
                self.skipped += 1
                self._explain(line, own_loss, int(first_bad), names, each.sample_ids_B)
            self._write(line | {"skipped": int(skipped)} | now_values)
        if self._file is not None:
            self._file.flush()
        self._pending.clear()
        self._clock, self._waited = now, waited

    def add_evaluation(self, step: int, epoch: float, found: dict[str, float]) -> None:
        """Writes a line to evaluations.jsonl and the values to the other sinks."""
        self.latest_evaluation = {"step": step, "epoch": round(epoch, 6)} | found
        if self.world.is_first:
            with open(self.run / EVALUATIONS, "a", encoding="utf-8") as file:
                file.write(json.dumps(_finite(self.latest_evaluation)) + "\n")
        self._show(step, found)

    def add_spectrum(self, step: int, epoch: float, spectrum: Spectrum) -> None:
        """Writes a line to spectra.jsonl and the effective rank to the other sinks. Call it on the first rank only."""
        line = {"step": step, "epoch": round(epoch, 6)} | spectrum._asdict()
        rank = {"effective_rank": spectrum.effective_rank}
        with open(self.run / SPECTRA, "a", encoding="utf-8") as file:
            file.write(json.dumps(line | _finite(rank)) + "\n")
        self._show(step, rank)

    def close(self) -> None:
        """Closes the files."""
        for sink in (self._file, self._tensorboard):
            if sink is not None:
                sink.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _write(self, line: dict[str, float]) -> None:
        self.latest = line
        if self._file is not None:
            self._file.write(json.dumps(_finite(line)) + "\n")
        self._show(int(line["step"]), {name: value for name, value in line.items() if name != "step"})

    def _show(self, step: int, values: dict[str, float]) -> None:
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def _explain(
        self, line: dict[str, float], own_loss: float, first_bad: int, names: Sequence[str], sample_ids_B: Tensor
    ) -> None:
        """Writes a skipped update to skipped.jsonl: what was not finite, and suspect samples. A collective call.

        Suspect are the samples of ranks whose own loss is not finite; if all are finite (a spike, or an overflow in the
        gradient), those of all ranks.
        """
        finite = self.world.gather(torch.tensor(math.isfinite(own_loss)))
        every_B = self.world.gather(sample_ids_B)
        bad = [int(each) for each in self.world.gather(torch.tensor(first_bad)) if each >= 0]
        guilty = [rank for rank, good in enumerate(finite) if not good] or list(range(self.world.size))
        what = None
        if not math.isfinite(line["loss"]):
            what = "loss"
        elif bad and names:
            what = f"gradient of {names[min(bad)]}"
        elif not math.isfinite(line["grad_norm"]):  # each gradient is finite, the sum of their squares is not
            what = "gradient norm"
        self.why_skipped = f"{what} not finite" if what else "the loss spiked"
        if self.world.is_first:
            samples = [sample for rank in guilty for sample in every_B[rank].tolist()]
            with open(self.run / "skipped.jsonl", "a", encoding="utf-8") as file:
                found = {"not_finite": what, "ranks": guilty, "samples": samples}
                file.write(json.dumps(_finite(line) | found) + "\n")


def mask_token_norm(model: nn.Module) -> dict[str, Tensor]:
    """Returns the norm of the mask token, whose growth reveals a decoder that cheats; empty for a model without one."""
    token = dict(model.named_parameters()).get("mask_token")
    if token is None:
        return {}
    return {"mask_token_norm": whole(token.detach().norm())}


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Reads a run's metrics.jsonl, oldest line first."""
    return read_lines(run / "metrics.jsonl")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads the objects of a .jsonl file; skips a line that a killed run left incomplete."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def _finite(line: dict[str, float]) -> dict[str, Any]:
    """Replaces values that are not finite by null: JSON has no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in line.items()}


def _open_wandb(run: Path, project: str) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ValueError(f"train.wandb needs Weights & Biases ({error}): pip install wandb, or leave it out") from error
    # the folder is the run's identity: a resumed run continues the same W&B run
    identity = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
    return wandb.init(project=project, name=run.name, id=identity, resume="allow", dir=str(run))


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory so far in GiB: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    try:
        # getrusage could report the peak of the parent that forked this process
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30, 3)
    return round(int(status.split("VmHWM:")[1].split()[0]) / 2**20, 3)
