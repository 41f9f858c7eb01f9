"""prediction, images, ids_mask -> [targets] -> loss: what a model is to say about the masked patches.

    pixels   the patch itself                                                squared error (SimMIM: absolute)
    pca      its largest coefficients on a basis fitted to patches            squared error
    kmeans   the number of the nearest of many patches, fitted to patches     cross-entropy
    dvae     the number that DALL-E's encoder gives to its place (dvae.py)    cross-entropy (BEiT's target)

These are Table 1d of He et al. 2021, with k-means beside the dVAE. With norm_pix_loss, pixels, pca and kmeans look at
patches normalised by their own mean and deviation. What is fitted comes from a file (target_files.py) and lives in
buffers of the model, so that a checkpoint is whole without that file.

A tokenizer is a module whose call (uint8 images, ids int32 [B, M]) gives int64 [B, M], each in [0, vocabulary).

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
    """The target of a config; what is to be fitted is zero until a file or a checkpoint is loaded.

    Its call (pred [B, M, T], uint8 images, ids_mask) gives the loss, a scalar in fp32; `patches` with the same
    arguments gives what the prediction looks like: [B, M, P] fp32 in the units of normalised images.
    """
    if config.target == "pixels":
        return PixelTarget(config)
    if config.target == "pca":
        return PCATarget(config)
    return TokenTarget(config, KMeansTokenizer(config) if config.target == "kmeans" else DVAETokenizer(config))


class PixelTarget(nn.Module):
    """The pixels of the patch."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, pred_BMP: Tensor, images_BHWC: Tensor, ids_mask_BM: Tensor) -> Tensor:
        """Mean squared error; mean absolute error for SimMIM (Xie et al. 2022, section 3.4)."""
        c = self.config
        loss = masked_l1 if c.kind == "simmim" else masked_mse
        return loss(pred_BMP, images_BHWC, ids_mask_BM, c.patch_size, c.mean, c.std, c.norm_pix_loss)

    def patches(self, pred_BMP: Tensor, images_BHWC: Tensor, ids_mask_BM: Tensor) -> Tensor:
        """The prediction as pixels."""
        return with_own_statistics(pred_BMP.float(), images_BHWC, ids_mask_BM, self.config)


class PCATarget(nn.Module):
    """The coefficients of the patch on the principal components of many patches (Table 1d: the 96 largest)."""

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
        """The patch that has the predicted coefficients and none else."""
        patches_BMP = pred_BMA.float() @ self.basis.T + self.mean
        return with_own_statistics(patches_BMP, images_BHWC, ids_mask_BM, self.config)


class TokenTarget(nn.Module):
    """The number that a tokenizer gives to the patch; the prediction is its logits."""

    def __init__(self, config: ModelConfig, tokenizer: nn.Module) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer

    def forward(self, pred_BMV: Tensor, images_BHWC: Tensor, ids_mask_BM: Tensor) -> Tensor:
        """Mean cross-entropy, in nats."""
        tokens_BM = self.tokenizer(images_BHWC, ids_mask_BM)
        return F.cross_entropy(pred_BMV.float().flatten(0, 1), tokens_BM.flatten())

    def patches(self, pred_BMV: Tensor, images_BHWC: Tensor, ids_mask_BM: Tensor) -> Tensor:
        """The patch of the most likely token. Raises ValueError where tokens have no look."""
        if not isinstance(self.tokenizer, KMeansTokenizer):
            raise ValueError("dvae tokens cannot be drawn: their decoder is not part of the model")
        return with_own_statistics(self.tokenizer.codebook[pred_BMV.argmax(-1)], images_BHWC, ids_mask_BM, self.config)


class KMeansTokenizer(nn.Module):
    """Patches to the number of the nearest code (Euclidean)."""

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
    """fp32 patches [..., P] -> int64 [...]: argmin |x - c|^2 = argmax x c - |c|^2 / 2, the first among equals."""
    with torch.autocast(patches_P.device.type, enabled=False):
        return (patches_P @ codebook_VP.T - codebook_VP.square().sum(-1) / 2).argmax(-1)


def target_patches(images_BHWC: Tensor, ids_BM: Tensor, config: ModelConfig) -> Tensor:
    """The patches that a target is made of: fp32 [B, M, P], normalised one by one if the config says so."""
    c = config
    patches_BMP = gather_patches(images_BHWC, ids_BM, c.patch_size, c.mean, c.std, torch.float32)
    return normalize_patches(patches_BMP) if c.norm_pix_loss else patches_BMP


def with_own_statistics(patches_BMP: Tensor, images_BHWC: Tensor, ids_BM: Tensor, config: ModelConfig) -> Tensor:
    """Patches as they are; for a model of normalised pixels with the true patches' mean and deviation, as published."""
    c = config
    if not c.norm_pix_loss:
        return patches_BMP
    true_BMP = gather_patches(images_BHWC, ids_BM, c.patch_size, c.mean, c.std, torch.float32)
    deviation_BM1 = (true_BMP.var(-1, keepdim=True) + VARIANCE_EPS).sqrt()
    return patches_BMP * deviation_BM1 + true_BMP.mean(-1, keepdim=True)
