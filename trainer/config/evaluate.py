"""Defines every option of an evaluation in frozen dataclasses.

Defaults are those of the published `main_linprobe.py` and `main_finetune.py` (He et al. 2021, Tables 9 and 10). Names
carry their unit; an unset option is an absent key.
"""

from dataclasses import dataclass, field
from typing import Literal

from patchmill.pipeline.config import EpochConfig, ReadConfig
from patchmill.trainer.config.model import ModelConfig
from patchmill.trainer.config.pretrain import OptimConfig

Pool = Literal["cls", "mean"]


@dataclass(frozen=True)
class SubjectConfig:
    """Which encoder to evaluate."""

    checkpoint: str = ""
    """run folder (newest checkpoint), or a file or folder of any format that `patchmill import` reads"""
    random_init: bool = False
    """use random weights in the checkpoint's shape: the floor that pretraining must beat"""
    model: ModelConfig | None = None
    """shape of an encoder with random weights, instead of a checkpoint"""
    image_size: int | tuple[int, int] | None = None
    """pixels, if not the pretraining's: positions are interpolated as published"""

    def __post_init__(self) -> None:
        if self.checkpoint and self.model is not None:
            raise ValueError(
                "a from-scratch recipe has its own model (subject.model); leave subject.checkpoint out, or take a "
                "fine-tuning recipe with --subject.random-init for random weights in the checkpoint's shape"
            )
        if self.model is not None and self.image_size is not None:
            raise ValueError("subject.image_size is for checkpoints; from scratch give --subject.model.image-size")


@dataclass(frozen=True)
class TestConfig:
    """The test data: every sample counts once, centre crop, no flip."""

    __test__ = False  # pytest would collect a class of this name

    path: str = ""
    """folder of a packed dataset with labels"""
    class_map: str = ""
    """JSON object from test class names to training class names (or lists of names); unset: names must be equal"""
    crop_fraction: float = 0.875
    """centre crop's share of the shorter side (224 of 256); 1 for images that already have the model's size"""
    batch: int = 256
    """images at a time, over all ranks"""

    def __post_init__(self) -> None:
        if not 0 < self.crop_fraction <= 1:
            raise ValueError(f"test.crop_fraction is {self.crop_fraction}; it must be in (0, 1]")
        _at_least_one("test.batch", self.batch)


@dataclass(frozen=True)
class FitConfig:
    """Length, batch, precision and saving of a training."""

    global_batch: int = 1024
    """images per update, over all ranks and accumulation steps"""
    accum_steps: int = 1
    """forward and backward passes per update"""
    epochs: int = 100
    """passes over the training data; the schedule ends here"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """matrix products in bf16 with fp32 weights, or all in fp32; auto: bf16 where the hardware has it"""
    deterministic: bool = False
    """bit-identical runs on a GPU too (slower there; a CPU run always is)"""
    test_every_epochs: int = 1
    """how often to classify the test data; always after the last epoch"""
    save_every_steps: int = 500
    """how often to write the state, besides at the end of each epoch"""

    def __post_init__(self) -> None:
        for name in ("global_batch", "accum_steps", "epochs", "test_every_epochs", "save_every_steps"):
            _at_least_one(f"fit.{name}", getattr(self, name))


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation beyond crop and flip, and of labels (Table 9; DeiT's random erasing)."""

    ops: int = 2
    """RandAugment operations per image; 0 for none"""
    magnitude: float = 9.0
    """of RandAugment, 0 to 10"""
    magnitude_std: float = 0.5
    """standard deviation of the magnitude"""
    erase: float = 0.25
    """probability of replacing a rectangle with noise"""
    mixup: float = 0.8
    """alpha of mixup's Beta distribution; 0 for none"""
    cutmix: float = 1.0
    """alpha of cutmix's Beta distribution; 0 for none"""
    smoothing: float = 0.1
    """label smoothing: probability spread evenly over all classes"""

    def __post_init__(self) -> None:
        if self.ops < 0 or min(self.mixup, self.cutmix, self.magnitude_std) < 0 or not 0 <= self.magnitude <= 10:
            raise ValueError(f"augment: ops, mixup, cutmix, magnitude (to 10) and its std cannot be negative: {self}")
        if not 0 <= self.erase <= 1 or not 0 <= self.smoothing < 1:
            raise ValueError(f"augment.erase {self.erase} and augment.smoothing {self.smoothing} are probabilities")


@dataclass(frozen=True)
class KnnConfig:
    """Classifies by the nearest neighbours in feature space; nothing is trained (Wu et al. 2018, as in DINO).

    Example:
        patchmill knn --subject.checkpoint runs/b16 --data.path train/ --test.path val/
    """

    subject: SubjectConfig = field(default_factory=SubjectConfig)
    out: str = ""
    """folder for results; unset: knn/ in the checkpoint's run, or next to its file"""
    data: ReadConfig = field(default_factory=ReadConfig)
    test: TestConfig = field(default_factory=TestConfig)
    pool: Pool = "cls"
    """feature: the class token, or the mean of the patches"""
    neighbours: tuple[int, ...] = (10, 20, 100, 200)
    """numbers of neighbours to vote; the first is reported, all are written"""
    temperature: float = 0.07
    """a neighbour votes with weight exp(cosine / temperature)"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    seed: int = 0
    """of random weights (--subject.random-init)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        if not self.neighbours or min(self.neighbours) < 1 or self.temperature <= 0:
            raise ValueError(f"neighbours {self.neighbours} and temperature {self.temperature} must be positive")


@dataclass(frozen=True)
class ProbeConfig:
    """Trains a linear classifier on frozen features (Table 10, published `main_linprobe.py`: LARS, BatchNorm).

    Example:
        patchmill probe --recipe probe-vit-b16 --subject.checkpoint runs/b16 --data.path train/ --test.path val/
    """

    subject: SubjectConfig = field(default_factory=SubjectConfig)
    out: str = ""
    """folder of the run; unset: probe/ in the checkpoint's run, or next to its file"""
    data: EpochConfig = field(default_factory=lambda: EpochConfig(crop_rule="tf", scale=(0.08, 1.0)))
    test: TestConfig = field(default_factory=TestConfig)
    pool: Pool = "cls"
    """feature: the class token (published), or the mean of the patches"""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(blr=0.1, warmup_epochs=10, weight_decay=0.0))
    """of LARS with momentum 0.9; betas are refused"""
    fit: FitConfig = field(default_factory=lambda: FitConfig(global_batch=16384, epochs=90))
    seed: int = 0
    """of head, order, crops and flips"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    resume: Literal["auto", "never"] = "auto"
    """auto continues a run that the folder holds; never refuses it"""

    def __post_init__(self) -> None:
        _check_optim(self.optim)
        if self.optim.betas != OptimConfig().betas:
            raise ValueError("the probe trains with LARS, which has no betas; leave --optim.betas out")


@dataclass(frozen=True)
class FinetuneConfig:
    """Trains the encoder, or its last blocks, with a classifier on top (Table 9, published `main_finetune.py`).

    Example:
        patchmill finetune --recipe finetune-vit-b16 --subject.checkpoint runs/b16 --data.path train/ --test.path val/
    """

    subject: SubjectConfig = field(default_factory=SubjectConfig)
    out: str = ""
    """folder of the run; unset: finetune/ in the checkpoint's run, or next to its file"""
    data: EpochConfig = field(default_factory=lambda: EpochConfig(scale=(0.08, 1.0)))
    test: TestConfig = field(default_factory=TestConfig)
    pool: Pool = "mean"
    """classify the mean of the patches (published code), or the class token (the paper)"""
    tuned_blocks: float | None = None
    """number of last blocks that learn; 0.5 is the last block's MLP, 0 only last norm and head; unset: everything"""
    layer_decay: float = 0.75
    """factor of the learning rate from each layer to the one before it"""
    drop_path: float = 0.1
    """probability of skipping the last block's branches; falls linearly to 0 at the first block"""
    average: float | None = None
    """decay of a moving average of the weights, which is then tested and saved; unset: none"""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(blr=5e-4, min_lr=1e-6, warmup_epochs=5, betas=(0.9, 0.999))
    )
    fit: FitConfig = field(default_factory=FitConfig)
    seed: int = 0
    """of head, order, crops, flips and every other draw"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    resume: Literal["auto", "never"] = "auto"
    """auto continues a run that the folder holds; never refuses it"""

    def __post_init__(self) -> None:
        _check_optim(self.optim)
        if not 0 < self.layer_decay <= 1 or not 0 <= self.drop_path < 1:
            raise ValueError(f"layer_decay {self.layer_decay} must be in (0, 1], drop_path {self.drop_path} in [0, 1)")
        if self.average is not None and not 0 < self.average < 1:
            raise ValueError(f"average is {self.average}; it must be between 0 and 1 (0.9999 as published)")
        blocks = self.tuned_blocks
        if blocks is not None and blocks != 0.5 and (blocks < 0 or blocks != int(blocks)):
            raise ValueError(f"tuned_blocks is {blocks}; give 0, 0.5 or a whole number of blocks")


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1")


def _check_optim(optim: OptimConfig) -> None:
    if optim.kind != "adamw":
        raise ValueError(f"optim.kind {optim.kind} is for pretraining; evaluation has its published optimizers")
