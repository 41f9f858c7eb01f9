"""Tests a finished classifier on any labelled shards."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from patchmill.pipeline.config import ReadConfig
from patchmill.tools import cli
from patchmill.tools.console.options import parse
from patchmill.tools.console.progress import is_first
from patchmill.tools.console.report import column_table, show
from patchmill.trainer.config.evaluate import TestConfig
from patchmill.trainer.engine.world import joined_world
from patchmill.trainer.evaluate.classify import Tested, evaluate_classifier
from patchmill.trainer.evaluate.report import RESULTS, per_class, write_scores

ORIGIN_UNKNOWN = {"protocol": "classifier", "start": "scratch", "seed": 0}
"""facts about a classifier.safetensors without its results.json"""


@dataclass(frozen=True)
class TestReadConfig(ReadConfig):
    """How images are read and decoded; --tests names the datasets."""

    path: tyro.conf.Suppress[tyro.conf.Fixed[str]] = ""


@dataclass(frozen=True)
class EvaluateConfig:
    """Scores a classifier of `patchmill finetune` or `probe` on labelled datasets: ImageNet-A, -R, -C, Sketch, ...

    Classes match by name, and only those of the test set compete; other names need a class map.

    Example:
        patchmill evaluate --classifier runs/b16/finetune --tests imagenet-a/ imagenet-r/
        patchmill evaluate --classifier runs/b16/finetune --tests objects/ --class-map objects.json
    """

    classifier: str
    """folder of a finished run, or its classifier.safetensors"""
    tests: tuple[str, ...]
    """packed datasets with labels"""
    class_map: str = ""
    """JSON object from test class names to the classifier's class names (or lists of names)"""
    out: str = ""
    """folder for on-NAME/results.json, confusion.json and .png of each dataset; unset: the classifier's"""
    crop_fraction: float = 0.875
    """centre crop's share of the shorter side"""
    batch: int = 256
    """images at a time, over all ranks"""
    data: TestReadConfig = field(default_factory=TestReadConfig)
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"


def main(argv: list[str]) -> int:
    """Runs the command."""
    config = parse(EvaluateConfig, "patchmill evaluate", argv)
    if not config.tests:
        raise ValueError("--tests names no dataset: give one or more folders that `patchmill shard` wrote")
    tests = [TestConfig(path, config.class_map, config.crop_fraction, config.batch) for path in config.tests]
    with joined_world(config.device) as world:
        found = evaluate_classifier(Path(config.classifier), config.data, tests, config.precision, world)
    if is_first():
        _print(found)
        classifier = Path(config.classifier)
        run = classifier if classifier.is_dir() else classifier.parent
        for each in found:
            folder = Path(config.out or run) / f"on-{Path(each.path).name}"
            folder.mkdir(parents=True, exist_ok=True)
            write_scores(folder, _results(run, classifier, each), each.scores, each.classes)
            print(f"wrote {folder / RESULTS}")
    return 0


def _results(run: Path, classifier: Path, tested: Tested) -> dict[str, Any]:
    """The content of results.json: the classifier's protocol, seed and origin, with the scores of these data."""
    own = run / RESULTS
    about = json.loads(own.read_text(encoding="utf-8")) if own.is_file() else ORIGIN_UNKNOWN
    kept = {name: about[name] for name in ("protocol", "start", "checkpoint", "pretrained", "seed") if name in about}
    return {
        **kept,
        "classifier": str(classifier),
        "test": tested.path,
        "classes": len(tested.classes),
        **tested.scores.plain(),
        "unseen": tested.unseen,
        "per_class": per_class(tested.scores, tested.classes),
    }


def _print(found: list[Tested]) -> None:
    numbers = ("top-1", "top-5", "images", "not counted")
    table = column_table("dataset", *numbers, right=numbers)
    for each in found:
        scores = each.scores
        table.add_row(each.path, f"{scores.top1:.2%}", f"{scores.top5:.2%}", f"{scores.samples:,}", str(each.unseen))
    if len(found) > 1:
        mean1, mean5 = (sum(getattr(e.scores, name) for e in found) / len(found) for name in ("top1", "top5"))
        table.add_row("mean", f"{mean1:.2%}", f"{mean5:.2%}", "", "")
    show(table)


if __name__ == "__main__":
    sys.exit(cli.run("evaluate", sys.argv[1:]))
