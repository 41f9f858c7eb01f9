"""Trains and tests a linear classifier on frozen features.

Source: the published `main_linprobe.py` (He et al. 2021, Table 10): class token, BatchNorm without affine, one linear
layer, LARS, lr = 0.1 * batch / 256, no weight decay, random-resized crops by the TensorFlow rule, flips.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchmill.pipeline.batch import Batch
from patchmill.trainer.config.evaluate import ProbeConfig
from patchmill.trainer.engine.signals import stop_on_signals
from patchmill.trainer.engine.world import World, autocast_dtype, joined_world
from patchmill.trainer.evaluate.classifier import Classifier
from patchmill.trainer.evaluate.classify import classify
from patchmill.trainer.evaluate.encoder_source import default_out, open_subject
from patchmill.trainer.evaluate.fit import Fit, Progress, check_batch, fit
from patchmill.trainer.evaluate.labelled import class_columns, open_labelled, training_loader
from patchmill.trainer.evaluate.lars import Lars
from patchmill.trainer.evaluate.report import Report, find_finished, open_folder, write_report
from patchmill.trainer.evaluate.scores import Scores, check_torchmetrics
from patchmill.trainer.evaluate.state import Learning


def probe(config: ProbeConfig, on_progress: Callable[[Progress], None] = lambda progress: None) -> Report:
    """Runs the probe that `config` describes and writes the run folder; a signal saves the state and stops it.

    Raises:
        ValueError: an option cannot work; the message says what to change.
        OSError: the data cannot be read, or the run folder cannot be written.
    """
    with joined_world(config.device) as world, stop_on_signals() as stop:
        return run_probe(config, world, stop, on_progress)


def run_probe(config: ProbeConfig, world: World, stop: list[str], on_progress: Callable[[Progress], None]) -> Report:
    """As `probe`, on ranks that have already joined."""
    check_torchmetrics()
    check_batch(config, world)
    train, test = open_labelled(config.data.path, "data.path"), open_labelled(config.test.path, "test.path")
    columns = class_columns(config.test, test.classes, train.classes)
    subject = open_subject(config.subject, config.seed)
    run = Path(config.out) if config.out else default_out(subject.file, "probe", subject.start)
    if (done := find_finished(run, config, subject)) is not None:
        return done
    torch.use_deterministic_algorithms(config.fit.deterministic)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = Classifier(subject.encoder, len(train.classes), config.pool, "probe").to(world.device).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head."))
    optimizer = Lars(model.head.parameters(), lr=config.optim.blr, weight_decay=config.optim.weight_decay)
    autocast = autocast_dtype(config.fit.precision, world.device)

    def loss(forward: nn.Module, batch: Batch, part: int) -> Tensor:
        del part
        model.head.train()
        images_BCHW = model.normalise(batch.images.permute(0, 3, 1, 2) / 255)
        with torch.autocast(world.device.type, dtype=autocast, enabled=autocast is not None):
            logits_BA = forward(images_BCHW)
        return F.cross_entropy(logits_BA.float(), batch.labels)

    def run_test() -> Scores:
        model.head.eval()
        return classify(model, config.data, config.test, columns, len(test.classes), world, autocast)

    open_folder(run, config, world)
    about = {"encoder": subject.name, "classes": len(train.classes)}
    with training_loader(
        config.data,
        model.config,
        world,
        seed=config.seed,
        global_batch=config.fit.global_batch,
        quarantine=run / "quarantine.jsonl",
    ) as loader:
        about["dataset"] = loader.fingerprint["dataset"]
        task = Fit(run, Learning(model, optimizer, {}), loss, run_test, None)
        fitted = fit(task, config, about, loader, world, stop, on_progress)
    return write_report("probe", run, config, subject, task.learning, fitted, train, test, world)
