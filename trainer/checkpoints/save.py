"""Saves checkpoints, synchronously or in a background thread."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from patchmill.trainer.checkpoints import checkpoint
from patchmill.trainer.checkpoints.staging import Staging
from patchmill.trainer.config.pretrain import TrainConfig
from patchmill.trainer.engine.step import Guard
from patchmill.trainer.engine.world import World
from patchmill.trainer.model.vit import VisionTransformer


class Saver:
    """Writes a run's checkpoints and deletes old ones.

    With train.async_save (unset: on a GPU) it copies the state to main memory and a thread writes the copy, one
    checkpoint at a time. The next `save` or `finish` raises an error of that thread.
    """

    def __init__(self, run: Path, config: TrainConfig, world: World) -> None:
        self.run, self.config, self.world = run, config, world
        in_thread = world.device.type == "cuda" if config.async_save is None else config.async_save
        self._thread = ThreadPoolExecutor(1, "patchmill-save") if in_thread and world.is_first else None
        self._staging = Staging() if self._thread is not None else None
        self._writing: Future[None] | None = None

    def save(
        self,
        step: int,
        model: VisionTransformer,
        optimizer: torch.optim.Optimizer,
        guard: Guard,
        state: dict[str, Any],
    ) -> None:
        """Saves after `step` updates. Every rank must call it.

        Raises:
            OSError: this checkpoint could not be written, or, if a thread writes them, the one before.
        """
        self._wait()
        snapshot = checkpoint.take_snapshot(
            model, optimizer, guard, state, staging=self._staging, keep=self.world.is_first
        )
        if self._thread is not None:
            self._writing = self._thread.submit(self._write, step, snapshot)
        elif self.world.is_first:
            self._write(step, snapshot)
        self.world.barrier()

    def finish(self) -> None:
        """Waits until the last checkpoint is on disk."""
        self._wait()
        if self._thread is not None:
            self._thread.shutdown()

    def _write(self, step: int, snapshot: checkpoint.Snapshot) -> None:
        checkpoint.write(self.run, step, snapshot)
        checkpoint.prune(self.run, self.config.keep_last, self.config.keep_every_steps)

    def _wait(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()
