"""Writes the results of an evaluation: results.json, confusion.json and pictures.

results.json: protocol, start (pretrained, random or scratch), top1, top5, test_loss, test_samples, unseen, per_class,
origin of the encoder, seed, options, history, seconds, versions. confusion.json: classes and matrix (rows are true
classes).
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from patchmill import __version__
from patchmill.pipeline.atomic import write_whole
from patchmill.trainer.checkpoints.files import config_json
from patchmill.trainer.config.evaluate import FinetuneConfig, KnnConfig, ProbeConfig
from patchmill.trainer.config.toml import to_toml
from patchmill.trainer.draw.charts import write_confusion, write_curve
from patchmill.trainer.engine.world import World
from patchmill.trainer.evaluate.encoder_source import Subject
from patchmill.trainer.evaluate.fit import Fitted
from patchmill.trainer.evaluate.labelled import Labelled
from patchmill.trainer.evaluate.scores import Scores
from patchmill.trainer.evaluate.state import STATE, Learning, changed_options, fixed_options, save_classifier

RESULTS = "results.json"


class Report(NamedTuple):
    """How an evaluation ended, on every rank."""

    run: Path
    results: dict[str, Any]
    """content of results.json; empty when the run was stopped"""
    step: int
    total_steps: int
    interrupted: str | None
    """name of the signal that stopped it"""


def open_folder(run: Path, config: KnnConfig | ProbeConfig | FinetuneConfig, world: World) -> None:
    """Makes the folder and writes config.toml. Raises OSError when it cannot be written."""
    if not world.is_first:
        return
    try:
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.toml").write_text(to_toml(config), encoding="utf-8")
    except OSError as error:
        raise OSError(f"cannot write {run}: {error.strerror or error}; choose another --out") from error


def find_finished(run: Path, config: ProbeConfig | FinetuneConfig, subject: Subject) -> Report | None:
    """The report of a finished run with these options; None when the folder holds none.

    Raises:
        ValueError: the folder holds a finished run with other options.
    """
    if not (run / RESULTS).is_file():
        return None
    results = json.loads((run / RESULTS).read_text(encoding="utf-8"))
    options = fixed_options(config) | {"encoder": subject.name}
    changed = changed_options(results.get("options", {}), options)
    if changed or config.resume == "never":
        why = f"another {', '.join(changed)}" if changed else "--resume never"
        raise ValueError(f"{run} holds a finished run and this one has {why}; give another --out")
    return Report(run, results, results["steps"], results["steps"], None)


def write_report(
    protocol: str,
    run: Path,
    config: ProbeConfig | FinetuneConfig,
    subject: Subject,
    learning: Learning,
    fitted: Fitted,
    train: Labelled,
    test: Labelled,
    world: World,
) -> Report:
    """Writes results, pictures and classifier of a finished fit and deletes its state; nothing for a stopped one."""
    if fitted.scores is None or fitted.interrupted:
        return Report(run, {}, fitted.step, fitted.total_steps, fitted.interrupted)
    options = fixed_options(config) | {"encoder": subject.name}
    results = common_results(protocol, subject, config.seed, test, fitted.scores)
    results |= {"steps": fitted.step, "seconds": round(fitted.seconds, 1), "options": options}
    results |= {"history": fitted.history}
    if world.is_first:
        about = {
            "protocol": protocol,
            "model": config_json(learning.model.config),
            "classes": train.classes,
            "pool": config.pool,
            "head": "probe" if isinstance(config, ProbeConfig) else "linear",
        }
        save_classifier(run, learning.model, learning.average, about)
        write_scores(run, results, fitted.scores, test.classes)
        write_curve(fitted.history, run / "curve.png", f"{protocol}, {subject.start}")
        (run / STATE).unlink(missing_ok=True)
    world.barrier()
    return Report(run, results, fitted.step, fitted.total_steps, None)


def common_results(protocol: str, subject: Subject, seed: int, test: Labelled, scores: Scores) -> dict[str, Any]:
    """The part of results.json that all protocols share."""
    shape = dataclasses.asdict(subject.encoder.config)
    kept = ("image_size", "patch_size", "embed_dim", "depth", "num_heads")
    return {
        "protocol": protocol,
        **subject.origin(),
        **scores.plain(),
        "unseen": test.num_samples - scores.samples,
        "classes": len(test.classes),
        "test": test.path,
        "seed": seed,
        "model": {name: shape[name] for name in kept},
        "per_class": per_class(scores, test.classes),
        "versions": {"patchmill": __version__, "torch": torch.__version__},
    }


def per_class(scores: Scores, classes: list[str]) -> dict[str, float]:
    """Accuracy on each class; empty where no confusion matrix was kept."""
    if scores.confusion is None:
        return {}
    right, all_of = scores.confusion.diagonal(), scores.confusion.sum(1)
    return {name: round(float(r) / max(int(n), 1), 6) for name, r, n in zip(classes, right, all_of, strict=True)}


def write_scores(run: Path, results: dict[str, Any], scores: Scores, classes: list[str]) -> None:
    """Writes confusion.json and confusion.png, then results.json. Raises OSError when that fails."""
    if scores.confusion is not None:
        table = {"classes": classes, "matrix": scores.confusion.tolist()}
        (run / "confusion.json").write_text(json.dumps(table) + "\n", encoding="utf-8")
        write_confusion(scores.confusion, classes, run / "confusion.png", f"top-1 {scores.top1:.2%}")
    write_whole(run / RESULTS, json.dumps(results, indent=1) + "\n")
