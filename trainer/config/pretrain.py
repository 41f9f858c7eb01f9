"""Defines and checks all options of a pretraining run, as frozen dataclasses.

A run resolves its config once, saves it in its folder as config.toml and never changes it. Names carry their unit
(`_steps`, `_epochs`). An unset option is None here and an absent key in TOML.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from patchmill.pipeline.config import DataConfig, MaskConfig
from patchmill.trainer.config.model import ModelConfig
from patchmill.trainer.config.size_schedule import Schedule, check_schedule


@dataclass(frozen=True)
class OnlineEvalConfig:
    """Evaluation during pretraining: kNN and a linear probe on the features so far."""

    every_epochs: float | None = None
    """how often; unset: never"""
    data_path: str = ""
    """labelled training data; unset: the pretraining data"""
    test_path: str = ""
    """labelled test data"""
    crop_fraction: float = 0.875
    """centre crop's share of the shorter side; 1 for images that already have the right size"""
    max_train_samples: int = 50_000
    """at most this many training images, always the same random ones"""
    neighbours: int = 20
    """neighbours that vote in kNN"""

    def __post_init__(self) -> None:
        if self.every_epochs is not None and self.every_epochs <= 0:
            raise ValueError(f"eval.every_epochs is {self.every_epochs}; it must be positive (leave it out for never)")
        if self.every_epochs is not None and not self.test_path:
            raise ValueError("eval.every_epochs needs eval.test_path, a packed dataset with labels")
        for name in ("max_train_samples", "neighbours"):
            if getattr(self, name) < 1:
                raise ValueError(f"eval.{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule (He et al. 2021, Table 8)."""

    kind: Literal["adamw", "apex-adam", "apex-lamb"] = "adamw"
    """torch's fused AdamW, or NVIDIA apex's FusedAdam or FusedLAMB (built from source: docs/scale.md)"""
    blr: float = 1.5e-4
    """base learning rate: lr = blr * global batch / 256"""
    min_lr: float = 0.0
    """learning rate at the end of the cosine"""
    warmup_epochs: float = 40.0
    """epochs of linear warm-up"""
    weight_decay: float = 0.05
    """for parameters of two or more dimensions, except biases"""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's momentum terms"""
    clip_grad: float | None = None
    """largest gradient norm; unset: no clipping, as published"""

    def __post_init__(self) -> None:
        if self.blr <= 0:
            raise ValueError(f"optim.blr is {self.blr}; it must be positive")
        if self.clip_grad is not None and self.clip_grad <= 0:
            raise ValueError(f"optim.clip_grad is {self.clip_grad}; it must be positive (leave it out for no clipping)")


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch, precision, parallelism, logging and checkpoints."""

    global_batch: int = 4096
    """images per update, over all ranks and accumulation steps"""
    accum_steps: int = 1
    """forward and backward passes per update"""
    total_epochs: float = 800.0
    """length of the run and of the learning-rate schedule"""
    total_steps: int | None = None
    """length of the run in updates, instead of total_epochs"""
    total_images: int | None = None
    """length of the run in images, instead of total_epochs"""
    size_schedule: Schedule = ()
    """growing image sizes: pairs of (share of the run from which on, pixels); the last is model.image_size"""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """matrix products in bf16 or fp16 with fp32 weights, or all in fp32; auto: bf16 if the hardware supports it"""
    fp8: bool = False
    """linear layers in fp8 through torchao (GPUs from Hopper on; worth trying for L and H)"""
    compile: bool = False
    """compile the model with torch.compile (takes minutes at the start; faster steps)"""
    compile_mode: Literal["default", "max-autotune-no-cudagraphs"] = "default"
    """how long torch.compile searches for the fastest kernels"""
    cuda_graph: bool = False
    """capture the whole update as one CUDA graph (one GPU; for steps dominated by kernel launches)"""
    deterministic: bool = False
    """make GPU runs bit-identical, which is slower; CPU runs always are"""
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """over several ranks: whole model on each, sharded over all, or sharded within a node and replicated over nodes"""
    activation_checkpointing: bool = False
    """recompute the blocks' activations in the backward pass: less memory, a third more work"""
    max_skipped_steps: int = 20
    """the run stops after this many skipped updates in a row (loss or gradient not finite, or a spike)"""
    spike_factor: float | None = None
    """skip an update whose loss exceeds this many times the usual one; unset: never"""
    log_every_steps: int = 10
    """how often measured values are copied from the device and written"""
    save_every_steps: int = 1000
    """how often a checkpoint is written"""
    keep_last: int = 3
    """newest checkpoints to keep on disk"""
    keep_every_steps: int | None = None
    """also keep the checkpoints of every so many steps; unset: only keep_last"""
    async_save: bool | None = None
    """write checkpoints in a thread during training (holds a copy of the state in main memory); unset: on a GPU"""
    rank_timeout_seconds: float = 600.0
    """how long ranks wait for a missing one before the run ends and names it"""
    picture_every_epochs: float | None = None
    """how often to draw a sheet of reconstructions into pictures/; unset: never"""
    spectrum_every_epochs: float | None = None
    """how often to measure the effective rank of a batch's class tokens (spectra.jsonl: collapse); unset: never"""
    tensorboard: bool = True
    """also write TensorBoard events"""
    wandb: str | None = None
    """name of a Weights & Biases project to write to; unset: none"""

    def __post_init__(self) -> None:
        for name in ("global_batch", "accum_steps", "max_skipped_steps", "log_every_steps", "save_every_steps"):
            _at_least_one(f"train.{name}", getattr(self, name))
        for name in ("keep_last", "keep_every_steps", "total_steps", "total_images"):
            _at_least_one(f"train.{name}", getattr(self, name))
        for name in ("total_epochs", "rank_timeout_seconds", "picture_every_epochs", "spectrum_every_epochs"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"train.{name} is {value}; it must be positive")
        if self.total_steps and self.total_images:
            raise ValueError("train.total_steps and train.total_images both set the length of the run; leave one out")
        if self.spike_factor is not None and self.spike_factor <= 1:
            raise ValueError(
                f"train.spike_factor is {self.spike_factor}; it must be greater than 1 (2 is a good start)"
            )
        if self.cuda_graph and self.parallel != "ddp":
            raise ValueError(f"train.cuda_graph cannot be used with train.parallel {self.parallel}; leave one out")

    def steps(self, steps_per_epoch: int) -> int:
        """Number of updates of the whole run."""
        if self.total_images is not None:
            return max(1, round(self.total_images / self.global_batch))
        return self.total_steps or max(1, round(self.total_epochs * steps_per_epoch))


@dataclass(frozen=True)
class PretrainConfig:
    """All options of a pretraining run.

    Example:
        patchmill pretrain --recipe mae-vit-b16 --data.path shards/ --out runs/b16 --train.global-batch 1024
    """

    target_path: str = ""
    """target file from `patchmill target`; for model.target pca, kmeans and dvae"""
    out: str = ""
    """folder of the run: config.toml, metrics.jsonl, checkpoints/, status.json, loss.png"""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: OnlineEvalConfig = field(default_factory=OnlineEvalConfig)
    seed: int = 0
    """seed of weights, order, crops, flips and masks"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda if there is a GPU"""
    init: str = ""
    """weights to start from instead of random ones: a run, or a file or folder of any format that `patchmill import`
    reads (facebookresearch/mae, timm, transformers, ...); a resumed run does not read it again"""
    resume: str = "auto"
    """auto (newest valid checkpoint of the run folder), never, or the path of a checkpoint"""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}; it must be in [0, 2**64)")
        check_schedule(self.train.size_schedule, self.model.image_size, self.model.patch_size)
        for _, size in self.train.size_schedule or ((0, self.model.image_size),):
            model = dataclasses.replace(self.model, image_size=size)
            kept, patches = self.mask.kept(model.grid_hw), model.num_patches
            if not 0 < kept < patches:
                what = "nothing" if kept == patches else "everything"
                raise ValueError(
                    f"mask.kind {self.mask.kind} with mask.ratio {self.mask.ratio} masks {what}; choose others"
                )
        if self.model.target == "dvae" and self.train.picture_every_epochs:
            raise ValueError("train.picture_every_epochs: dvae tokens cannot be drawn; leave it out")
        if self.eval.every_epochs is not None and self.train.parallel != "ddp":
            raise ValueError(
                f"eval.every_epochs needs whole weights on every rank and train.parallel is {self.train.parallel}; "
                "leave it out and evaluate the checkpoints (patchmill knn)"
            )


def _at_least_one(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1")
