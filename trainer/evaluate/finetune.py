"""Trains a classifier from an encoder: all of it, its last blocks, or from random weights.

Source: the published `main_finetune.py` (He et al. 2021, Table 9; partial: section 4.4 and Figure 9; from scratch:
Table 11). Layer-wise rates, drop path, RandAugment, random erasing, mixup or cutmix, smoothed labels.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from patchmill.pipeline.batch import Batch
from patchmill.trainer.config.evaluate import FinetuneConfig
from patchmill.trainer.engine.optim import is_decayed, layer_scale
from patchmill.trainer.engine.signals import stop_on_signals
from patchmill.trainer.engine.world import World, autocast_dtype, joined_world
from patchmill.trainer.evaluate.augment import check_kornia, rand_augment, random_erase
from patchmill.trainer.evaluate.classifier import Classifier, path_scales
from patchmill.trainer.evaluate.classify import classify
from patchmill.trainer.evaluate.encoder_source import default_out, open_subject
from patchmill.trainer.evaluate.fit import Fit, Progress, check_batch, fit
from patchmill.trainer.evaluate.labelled import class_columns, open_labelled, training_loader
from patchmill.trainer.evaluate.mixup import draw_mix, mix_images, mix_labels, soft_cross_entropy
from patchmill.trainer.evaluate.report import Report, find_finished, open_folder, write_report
from patchmill.trainer.evaluate.scores import Scores, check_torchmetrics
from patchmill.trainer.evaluate.state import Learning

UNDECAYED = ("cls_token", "pos_embed")
"""not decayed, nor are biases and norms, as published for fine-tuning (pretraining decays the class token)"""


def finetune(config: FinetuneConfig, on_progress: Callable[[Progress], None] = lambda progress: None) -> Report:
    """Fine-tunes as `config` describes and writes the run folder; a signal saves the state and stops it.

    Raises:
        ValueError: an option cannot work; the message says what to change.
        OSError: the data cannot be read, or the run folder cannot be written.
    """
    with joined_world(config.device) as world, stop_on_signals() as stop:
        return run_finetune(config, world, stop, on_progress)


def run_finetune(
    config: FinetuneConfig, world: World, stop: list[str], on_progress: Callable[[Progress], None]
) -> Report:
    """As `finetune`, on ranks that have already joined."""
    check_torchmetrics()
    check_batch(config, world)
    train, test = open_labelled(config.data.path, "data.path"), open_labelled(config.test.path, "test.path")
    columns = class_columns(config.test, test.classes, train.classes)
    subject = open_subject(config.subject, config.seed)
    check_kornia(config.augment, subject.encoder.config.channels)
    run = Path(config.out) if config.out else default_out(subject.file, protocol_of(config), subject.start)
    if (done := find_finished(run, config, subject)) is not None:
        return done
    torch.use_deterministic_algorithms(config.fit.deterministic)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = Classifier(subject.encoder, len(train.classes), config.pool, "linear").to(world.device)
    model.tune(config.tuned_blocks)
    optimizer = build_optimizer(model, config)
    learnt = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    average = {} if config.average is None else learnt
    autocast = autocast_dtype(config.fit.precision, world.device)

    def loss(forward: nn.Module, batch: Batch, part: int) -> Tensor:
        return finetune_loss(forward, model, batch, config, (world.rank, part), autocast)

    def run_test() -> Scores:
        def tested(images_BCHW: Tensor) -> Tensor:
            return functional_call(model, average, (images_BCHW,)) if average else model(images_BCHW)

        return classify(model, config.data, config.test, columns, len(test.classes), world, autocast, tested)

    open_folder(run, config, world)
    about = {"encoder": subject.name, "classes": len(train.classes), "ranks": world.size}
    with training_loader(
        config.data,
        model.config,
        world,
        seed=config.seed,
        global_batch=config.fit.global_batch,
        quarantine=run / "quarantine.jsonl",
    ) as loader:
        about["dataset"] = loader.fingerprint["dataset"]
        task = Fit(run, Learning(model, optimizer, average), loss, run_test, config.average)
        fitted = fit(task, config, about, loader, world, stop, on_progress)
    return write_report(protocol_of(config), run, config, subject, task.learning, fitted, train, test, world)


def protocol_of(config: FinetuneConfig) -> str:
    """Name of the protocol: finetune, or partial-<blocks>."""
    return "finetune" if config.tuned_blocks is None else f"partial-{config.tuned_blocks:g}"


def build_optimizer(model: Classifier, config: FinetuneConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that learn: one group per layer's rate, with and without weight decay."""
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = layer_scale(name, model.config.depth, config.layer_decay)
            decayed = is_decayed(name, parameter) and name not in UNDECAYED
            groups.setdefault((scale, decayed), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": params, "rate_scale": scale, "weight_decay": config.optim.weight_decay if decayed else 0.0}
            for (scale, decayed), params in groups.items()
        ],
        lr=config.optim.blr,
        betas=config.optim.betas,
        fused=True,
    )


def finetune_loss(
    forward: nn.Module,
    model: Classifier,
    batch: Batch,
    config: FinetuneConfig,
    place: tuple[int, int],
    autocast: torch.dtype | None,
) -> Tensor:
    """Augments, mixes and classifies a part of a batch; returns the mean soft cross entropy.

    Args:
        forward: the model to call, perhaps wrapped.
        place: rank and number of the part (mixing pairs images within a part).
    """
    augment, where = config.augment, {"seed": config.seed, "epoch": batch.epoch}
    ids_B = batch.sample_ids.cpu().numpy().astype(np.int64)
    images_BCHW = batch.images.permute(0, 3, 1, 2) / 255
    if augment.ops:
        images_BCHW = rand_augment(images_BCHW, ids_B, model.config.mean, augment, **where)
    images_BCHW = random_erase(model.normalise(images_BCHW), ids_B, augment.erase, **where)
    mix = draw_mix(augment, model.config.image_hw, (config.seed, batch.epoch, batch.step, *place))
    images_BCHW = mix_images(images_BCHW, mix)
    target_BA = mix_labels(batch.labels, _num_classes(model), augment.smoothing, mix)
    scales_SB = None
    if config.drop_path:
        scales_SB = path_scales(
            config.seed, batch.epoch, ids_B, model.config.depth, config.drop_path, config.tuned_blocks
        ).to(images_BCHW.device)
    with torch.autocast(images_BCHW.device.type, dtype=autocast, enabled=autocast is not None):
        logits_BA = forward(images_BCHW, scales_SB)
    return soft_cross_entropy(logits_BA, target_BA)


def sweep(
    config: FinetuneConfig,
    tuned_blocks: list[float],
    on_progress: Callable[[float, Progress], None] = lambda blocks, progress: None,
) -> list[Report]:
    """Fine-tunes the last blocks for each number in turn (Figure 9), each in its own folder below `out`.

    Ends early when a signal stops one of them; the same call continues.
    """
    reports: list[Report] = []
    with joined_world(config.device) as world, stop_on_signals() as stop:
        subject = open_subject(config.subject, config.seed)
        base = Path(config.out) if config.out else default_out(subject.file, "partial", subject.start)
        for blocks in tuned_blocks:
            one = dataclasses.replace(config, tuned_blocks=blocks, out=str(base / f"blocks-{blocks:g}"))
            reports.append(run_finetune(one, world, stop, partial(on_progress, blocks)))
            if reports[-1].interrupted:
                break
    return reports


def _num_classes(model: Classifier) -> int:
    assert isinstance(model.head, nn.Linear)
    return model.head.out_features
