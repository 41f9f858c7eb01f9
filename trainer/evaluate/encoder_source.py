"""Opens the encoder to evaluate, from a checkpoint of any known format or from random weights."""

import tomllib
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from patchmill.trainer.checkpoints.interop import build_encoder, read_checkpoint, resized
from patchmill.trainer.config.evaluate import SubjectConfig
from patchmill.trainer.config.model import ModelConfig
from patchmill.trainer.model.build import build_model
from patchmill.trainer.model.encoder import Encoder

Start = Literal["pretrained", "random", "scratch"]


class Subject(NamedTuple):
    """An encoder and its origin."""

    encoder: Encoder
    start: Start
    """pretrained; random weights in a checkpoint's shape; or random weights of a given shape"""
    file: Path | None
    """source of the shape, and of the weights unless they are random"""

    @property
    def name(self) -> str:
        """The file's absolute path; "none" from scratch."""
        return "none" if self.file is None else str(self.file.resolve())

    def origin(self) -> dict[str, Any]:
        """For results.json: the file, and facts about the pretraining from its run's config.toml, if there is one."""
        if self.file is None:
            return {"start": self.start}
        found: dict[str, Any] = {"start": self.start, "checkpoint": str(self.file)}
        run = run_of(self.file)
        if run is not None and (run / "config.toml").is_file():
            table = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))
            step, batch = int(self.file.parent.name.removeprefix("step-")), table["train"]["global_batch"]
            found["pretrained"] = {"run": run.name, "seed": table["seed"], "step": step, "images": step * batch}
        return found


def open_subject(config: SubjectConfig, seed: int) -> Subject:
    """Reads the encoder, or makes one with random weights from `seed`, on the CPU.

    Raises:
        ValueError: no checkpoint is given, or it cannot be read.
    """
    if config.model is not None:
        return Subject(_random_encoder(config.model, seed), "scratch", None)
    if not config.checkpoint:
        raise ValueError(
            "nothing to evaluate: give --subject.checkpoint RUN (or a file of any known format); "
            "a from-scratch recipe needs none"
        )
    checkpoint = resized(read_checkpoint(config.checkpoint), image_size=config.image_size)
    if config.random_init:
        return Subject(_random_encoder(checkpoint.config, seed), "random", checkpoint.file)
    return Subject(build_encoder(checkpoint), "pretrained", checkpoint.file)


def run_of(file: Path) -> Path | None:
    """The run folder of a model.safetensors (RUN/checkpoints/step-XXXXXXXX/); None for other files."""
    step = file.resolve().parent
    return step.parents[1] if step.name.startswith("step-") and step.parent.name == "checkpoints" else None


def default_out(file: Path | None, protocol: str, start: Start) -> Path:
    """The folder for results when none is given: below the run folder, or next to the checkpoint file.

    Raises:
        ValueError: there is no checkpoint file.
    """
    if file is None:
        raise ValueError("nowhere to write: give --out DIR")
    name = protocol if start == "pretrained" else f"{protocol}-{start}"
    run = run_of(file)
    return run / name if run is not None else file.with_name(f"{file.stem}-{name}")


def _random_encoder(config: ModelConfig, seed: int) -> Encoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Encoder(build_model(config)).eval()
