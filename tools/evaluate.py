"""patchmill evaluate: a finished classifier + any labelled shards -> its accuracy there."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.table import Table

from patchmill.pipeline.data_config import DataConfig
from patchmill.tools import cli
from patchmill.tools.eval_cli import is_first
from patchmill.trainer.eval_config import TestConfig
from patchmill.trainer.eval_report import per_class
from patchmill.trainer.evaluate import Tested, evaluate_classifier
from patchmill.trainer.world import joined_world


@dataclass(frozen=True)
class EvaluateConfig:
    """Classifies labelled datasets with what `patchmill finetune` or `probe` made: ImageNet-A, -R, -C, Sketch, ...

    Classes are matched by name, and only those of the test set compete; other names need a class map.

    Example:
        patchmill evaluate --classifier runs/b16/finetune --tests imagenet-a/ imagenet-r/ --out robustness.json
        patchmill evaluate --classifier runs/b16/finetune --tests objects/ --class-map objects.json
    """

    classifier: str
    """folder of a finished run, or its classifier.safetensors"""
    tests: tuple[str, ...]
    """packed datasets with labels"""
    class_map: str = ""
    """JSON file: class name there -> class name (or list of names) that the classifier knows"""
    out: str = ""
    """JSON file for the results; unset: they are only printed"""
    crop_fraction: float = 0.875
    """centre crop's share of the shorter side"""
    batch: int = 256
    """images at a time, over all ranks"""
    data: DataConfig = field(default_factory=DataConfig)
    """decoder, workers and interpolation"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"


def main(argv: list[str]) -> int:
    """Runs the command."""
    config = tyro.cli(EvaluateConfig, prog="patchmill evaluate", args=argv)
    tests = [TestConfig(path, config.class_map, config.crop_fraction, config.batch) for path in config.tests]
    with joined_world(config.device) as world:
        found = evaluate_classifier(Path(config.classifier), config.data, tests, config.precision, world)
    if is_first():
        _print(found)
        if config.out:
            _write(Path(config.out), config.classifier, found)
    return 0


def _print(found: list[Tested]) -> None:
    table = Table("dataset", "top-1", "top-5", "images", "not counted")
    for each in found:
        scores = each.scores
        table.add_row(each.path, f"{scores.top1:.2%}", f"{scores.top5:.2%}", f"{scores.samples:,}", str(each.unseen))
    if len(found) > 1:
        mean1, mean5 = (sum(getattr(e.scores, name) for e in found) / len(found) for name in ("top1", "top5"))
        table.add_row("mean", f"{mean1:.2%}", f"{mean5:.2%}", "", "")
    Console(file=sys.stdout).print(table)


def _write(path: Path, classifier: str, found: list[Tested]) -> None:
    rows = [
        {"test": e.path, **e.scores.plain(), "unseen": e.unseen, "per_class": per_class(e.scores, e.classes)}
        for e in found
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"classifier": classifier, "tests": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(cli.run("evaluate", sys.argv[1:]))
