"""Defines and checks the options of a model: shape, method, target and normalisation."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from patchmill.pipeline.config import check_choices

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DVAE_VOCABULARY, PCA_COEFFICIENTS = 8192, 96
"""tokens of DALL-E's encoder, and coefficients of the published PCA target (He et al. 2021, Table 1d)"""


@dataclass(frozen=True)
class ModelConfig:
    """A model's shape and method (He et al. 2021, section 3; defaults: ViT-B/16 with the 8 x 512 decoder)."""

    image_size: int | tuple[int, int] = 224
    """pixels: one number for square images, or height and width"""
    patch_size: int = 16
    """side of a patch, in pixels"""
    embed_dim: int = 768
    """encoder width"""
    depth: int = 12
    """encoder blocks"""
    num_heads: int = 12
    """encoder attention heads"""
    decoder_embed_dim: int = 512
    """decoder width"""
    decoder_depth: int = 8
    """decoder blocks"""
    decoder_num_heads: int = 16
    """decoder attention heads"""
    mlp_ratio: float = 4.0
    """hidden width of an MLP, divided by the width of its block"""
    channels: int = 3
    """image channels"""
    norm_pix_loss: bool = True
    """predict pixels normalised by the mean and variance of their patch (section 4.1: better features)"""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """per channel, in 0..1 units; subtracted from the images"""
    std: tuple[float, ...] = IMAGENET_STD
    """per channel, in 0..1 units; the images are divided by it"""
    kind: Literal["mae", "simmim", "crossmae"] = "mae"
    """mae; simmim: mask tokens in the encoder, a linear layer as decoder, L1 loss; crossmae: cross-attention decoder"""
    encoder_mask_tokens: bool = False
    """for mae: put mask tokens into the encoder (Table 1c: worse features, three times the work)"""
    target: Literal["pixels", "pca", "kmeans", "dvae"] = "pixels"
    """what to predict (Table 1d): pixels, PCA coefficients, or tokens of k-means or of DALL-E's dVAE"""
    target_width: int = 0
    """number of PCA coefficients or k-means codes; 0: 96 coefficients, 8192 codes"""
    uniformity_weight: float = 0.0
    """weight of U-MAE's uniformity term on the class tokens (0.01 as published); 0: none"""
    uniformity_form: Literal["as-published", "global-gradient"] = "as-published"
    """as-published divides the term's gradient by the number of ranks and norms class tokens twice (uniformity.py)"""

    def __post_init__(self) -> None:
        check_choices(self, "model")
        height, width = self.image_hw
        for name in ("patch_size", "embed_dim", "depth", "num_heads", "decoder_embed_dim", "decoder_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"model.image_size {height}x{width} is not a multiple of model.patch_size {self.patch_size}; "
                f"the nearest multiple is {_nearest(height, self.patch_size)}x{_nearest(width, self.patch_size)}"
            )
        for width_name, heads_name in (("embed_dim", "num_heads"), ("decoder_embed_dim", "decoder_num_heads")):
            dim, heads = getattr(self, width_name), getattr(self, heads_name)
            if heads < 1 or dim % heads:
                raise ValueError(
                    f"model.{width_name} {dim} cannot be split over model.{heads_name} {heads}; choose a divisor"
                )
            if dim % 4:
                raise ValueError(f"model.{width_name} {dim} must be a multiple of 4 (for 2-D sin-cos positions)")
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(
                f"model.mean has {len(self.mean)} and model.std {len(self.std)} values for "
                f"model.channels {self.channels}; give one of each per channel"
            )
        if min(self.std) <= 0:
            raise ValueError(f"model.std {self.std} must be positive")
        self._check_method()
        if self.uniformity_weight < 0:
            raise ValueError(f"model.uniformity_weight is {self.uniformity_weight}; it must not be negative")

    def _check_method(self) -> None:
        if self.encoder_mask_tokens and self.kind != "mae":
            raise ValueError(
                f"model.encoder_mask_tokens is for model.kind mae, not {self.kind}; leave it out "
                "(simmim always has mask tokens in its encoder, crossmae never)"
            )
        if self.target_width < 0 or (self.target_width and self.target in ("pixels", "dvae")):
            raise ValueError(
                f"model.target_width {self.target_width} does not apply to model.target {self.target}; leave it out"
            )
        if self.target == "pca" and self.pred_dim > self.patch_dim:
            raise ValueError(
                f"model.target_width is {self.pred_dim} PCA coefficients, but patches have {self.patch_dim} values; "
                f"give at most {self.patch_dim}"
            )
        if self.target == "dvae" and self.channels != 3:
            raise ValueError(f"model.target dvae takes 3 channels, not {self.channels}; use kmeans or pca")

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def grid_hw(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.image_hw
        return height // self.patch_size, width // self.patch_size

    @property
    def num_patches(self) -> int:
        """L: patches per image."""
        return self.grid_hw[0] * self.grid_hw[1]

    @property
    def patch_dim(self) -> int:
        """P: values per patch."""
        return self.patch_size**2 * self.channels

    @property
    def pred_dim(self) -> int:
        """T: values predicted per patch."""
        published = {"pca": PCA_COEFFICIENTS, "kmeans": DVAE_VOCABULARY, "dvae": DVAE_VOCABULARY}
        return self.patch_dim if self.target == "pixels" else self.target_width or published[self.target]

    @property
    def sees_mask_tokens(self) -> bool:
        """Whether the encoder sees all patches of the image, the masked ones as mask tokens."""
        return self.encoder_mask_tokens or self.kind == "simmim"


def list_changes(there: ModelConfig, here: ModelConfig, names: Sequence[str] = ()) -> str:
    """Lists in words the options (of `names`, or all) in which two configs differ; empty if they do not."""
    pairs = [(n, getattr(there, n), getattr(here, n)) for n in names or [field.name for field in fields(ModelConfig)]]
    return ", ".join(f"{name} {was} there, {now} here" for name, was, now in pairs if was != now)


def _nearest(size: int, patch: int) -> int:
    return max(1, round(size / patch)) * patch
