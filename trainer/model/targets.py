"""Defines what a model predicts about the masked patches, and the loss for each target.

    pixels   the values of the patch                                         squared error (SimMIM: absolute)
    pca      its first coefficients on principal components of patches       squared error
    kmeans   the index of its nearest code in a codebook fitted to patches   cross-entropy
    dvae     the token that DALL-E's encoder gives it (dvae.py)               cross-entropy (BEiT's target)

These are the targets of Table 1d of He et al. 2021, plus k-means. With norm_pix_loss, pixels, pca and kmeans normalise
each patch by its own mean and deviation. Fitted values come from a file (target_files.py) and live in buffers of the
model: a checkpoint is complete without that file.

A tokenizer is a module that maps (uint8 images, int32 ids [B, M]) to int64 tokens [B, M] in [0, vocabulary).

Shapes: B images, M masked, P values per patch, A coefficients, V vocabulary, T = P, A or V predicted values.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchmill.kernels.gather import gather_patches
from patchmill.kernels.masked_loss import masked_l1, masked_mse
from patchmill.kernels.reference import VARIANCE_EPS, normalize_patches
from patchmill.trainer.config.model import ModelConfig
from patchmill.trainer.model.dvae import DVAETokenizer


def build_target(config: ModelConfig) -> "Target":
    """Builds the target of a config. Fitted values are zero until a file or a checkpoint is loaded.

    A target maps (pred [B, M, T], uint8 images, ids_mask) to the loss, a scalar in fp32. Its method `patches` takes the
    same arguments and returns the predicted patches to look at: fp32 [B, M, P] in the units of normalised images.
    """
    if config.target == "pixels":
        return PixelTarget(config)
    if config.target == "pca":
        return PCATarget(config)
    return TokenTarget(config, KMeansTokenizer(config) if config.target == "kmeans" else DVAETokenizer(config))


class PixelTarget(nn.Module):
    """Predicts the pixels of the patch."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, pred_BMP: Tensor, images_BHWC: Tensor, ids_mask_BM: Tensor) -> Tensor:
        """Mean squared error; mean absolute error for SimMIM (Xie et al. 2022, section 3.4)."""
        c = self.config
        loss = masked_l1 if c.kind == "simmim" else masked_mse
        return loss(pred_BMP, images_BHWC, ids_mask_BM, c.patch_size, c.mean, c.std, c.norm_pix_loss)

    def patches(self, pred_BMP: Tensor, images_BHWC: Tensor, ids_mask_BM: Tensor) -> Tensor:
        """Returns the prediction as pixels."""
        return with_own_statistics(pred_BMP.float(), images_BHWC, ids_mask_BM, self.config)


class PCATarget(nn.Module):
    """Predicts the coefficients of the patch on principal components (Table 1d: the first 96)."""

    mean: Tensor
    basis: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.zeros(config.patch_dim))
        self.register_buffer("basis", torch.zeros(config.patch_dim, config.pred_dim))

    def forward(self, pred_BMA: Tensor, images_BHWC: Tensor, ids_mask_BM: Tensor) -> Tensor:
        """Mean squared error of the coefficients."""
        target_BMA = self.coefficients(target_patches(images_BHWC, ids_mask_BM, self.config))
        return (pred_BMA - target_BMA).square().mean()

    def coefficients(self, patches_BMP: Tensor) -> Tensor:
        """fp32 patches -> fp32 [B, M, A], largest variance first."""
        with torch.autocast(patches_BMP.device.type, enabled=False):
            return (patches_BMP - self.mean) @ self.basis

    def patches(self, pred_BMA: Tensor, images_BHWC: Tensor, ids_mask_BM: Tensor) -> Tensor:
        """Returns the patch that the predicted coefficients describe."""
        patches_BMP = pred_BMA.float() @ self.basis.T + self.mean
        return with_own_statistics(patches_BMP, images_BHWC, ids_mask_BM, self.config)


class TokenTarget(nn.Module):
    """Predicts the token of the patch, as logits."""

    def __init__(self, config: ModelConfig, tokenizer: nn.Module) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer

    def forward(self, pred_BMV: Tensor, images_BHWC: Tensor, ids_mask_BM: Tensor) -> Tensor:
        """Mean cross-entropy, in nats."""
        tokens_BM = self.tokenizer(images_BHWC, ids_mask_BM)
        return F.cross_entropy(pred_BMV.float().flatten(0, 1), tokens_BM.flatten())

    def patches(self, pred_BMV: Tensor, images_BHWC: Tensor, ids_mask_BM: Tensor) -> Tensor:
        """Returns the patch of the most likely token. Raises ValueError for dVAE tokens, which cannot be drawn."""
        if not isinstance(self.tokenizer, KMeansTokenizer):
            raise ValueError("dvae tokens cannot be drawn: the model does not hold their decoder")
        return with_own_statistics(self.tokenizer.codebook[pred_BMV.argmax(-1)], images_BHWC, ids_mask_BM, self.config)


class KMeansTokenizer(nn.Module):
    """Gives each patch the index of its nearest code (Euclidean)."""

    codebook: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("codebook", torch.zeros(config.pred_dim, config.patch_dim))

    def forward(self, images_BHWC: Tensor, ids_BM: Tensor) -> Tensor:
        """uint8 images and patch ids -> int64 [B, M]."""
        return nearest_code(target_patches(images_BHWC, ids_BM, self.config), self.codebook)


Target = PixelTarget | PCATarget | TokenTarget


def nearest_code(patches_P: Tensor, codebook_VP: Tensor) -> Tensor:
    """fp32 patches [..., P] -> int64 [...]: argmin |x - c|^2 = argmax x c - |c|^2 / 2, the first if codes tie."""
    with torch.autocast(patches_P.device.type, enabled=False):
        return (patches_P @ codebook_VP.T - codebook_VP.square().sum(-1) / 2).argmax(-1)


def target_patches(images_BHWC: Tensor, ids_BM: Tensor, config: ModelConfig) -> Tensor:
    """Gathers the patches to predict: fp32 [B, M, P], each normalised by itself if norm_pix_loss is set."""
    c = config
    patches_BMP = gather_patches(images_BHWC, ids_BM, c.patch_size, c.mean, c.std, torch.float32)
    return normalize_patches(patches_BMP) if c.norm_pix_loss else patches_BMP


def with_own_statistics(patches_BMP: Tensor, images_BHWC: Tensor, ids_BM: Tensor, config: ModelConfig) -> Tensor:
    """Gives normalised predictions the mean and deviation of the true patches, as published.

    Without norm_pix_loss it returns the patches unchanged.
    """
    c = config
    if not c.norm_pix_loss:
        return patches_BMP
    true_BMP = gather_patches(images_BHWC, ids_BM, c.patch_size, c.mean, c.std, torch.float32)
    deviation_BM1 = (true_BMP.var(-1, keepdim=True) + VARIANCE_EPS).sqrt()
    return patches_BMP * deviation_BM1 + true_BMP.mean(-1, keepdim=True)
