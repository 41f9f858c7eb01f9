"""Fits the targets of targets.py to patches of the data: a PCA basis or a k-means codebook.

Patches arrive in batches. Each batch updates the covariance in fp64 and is then dropped; k-means keeps its patches. On
a CPU the same patches and seed give the same bits; on a GPU the last digit of a sum may differ. Not yet run on a GPU.

Shapes: N patches (of a batch or in total), P values per patch, A coefficients, V codes.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from patchmill.trainer.model.targets import nearest_code

CHUNK_VALUES = 1 << 26
"""distances at a time: 256 MiB in fp32"""


class Covariance:
    """Mean and covariance of all patches so far, in fp64. Batches are merged as in Chan et al. 1979."""

    def __init__(self) -> None:
        self.count = 0
        self.mean_P = torch.zeros(())
        self.scatter_PP = torch.zeros(())

    def add(self, patches_NP: Tensor) -> None:
        """Merges the mean and covariance of another batch [N, P]."""
        patches_NP = patches_NP.double()
        new, mean_P = len(patches_NP), patches_NP.mean(0)
        centred_NP = patches_NP - mean_P
        scatter_PP = centred_NP.T @ centred_NP
        if self.count == 0:
            self.count, self.mean_P, self.scatter_PP = new, mean_P, scatter_PP
            return
        step_P, total = mean_P - self.mean_P, self.count + new
        self.scatter_PP += scatter_PP + torch.outer(step_P, step_P) * (self.count * new / total)
        self.mean_P = self.mean_P + step_P * (new / total)
        self.count = total


class PCABasis(NamedTuple):
    """Principal components, largest variance first."""

    mean: Tensor
    """[P] fp32"""
    basis: Tensor
    """[P, A] fp32, orthonormal columns; the largest entry of each is positive"""
    explained: Tensor
    """[A] fp64, share of the total variance"""


def principal_components(covariance: Covariance, width: int) -> PCABasis:
    """Computes the `width` components of largest variance.

    Raises:
        ValueError: there are too few patches for that many components.
    """
    if covariance.count <= width:
        raise ValueError(f"{covariance.count} patches cannot give {width} components; take more --images")
    values, vectors = torch.linalg.eigh(covariance.scatter_PP)
    basis_PA = vectors.flip(1)[:, :width]
    signs_A = basis_PA.gather(0, basis_PA.abs().argmax(0, keepdim=True)).sign()
    explained = values.flip(0)[:width].clamp_min(0) / values.sum()
    return PCABasis(covariance.mean_P.float(), (basis_PA * signs_A).float().contiguous(), explained.cpu())


class Codebook(NamedTuple):
    """The result of k-means."""

    codes: Tensor
    """[V, P] fp32"""
    error: float
    """mean squared distance of a patch to its code"""
    used: int
    """codes that are nearest to at least one patch"""
    rounds: int
    """rounds until nothing changed, or the number allowed"""


def first_codes(patches_NP: Tensor, count: int, seed: int) -> Tensor:
    """Draws `count` distinct patches to start k-means from: [count, P].

    Raises:
        ValueError: there are fewer distinct patches than codes.
    """
    distinct_NP = torch.unique(patches_NP, dim=0)
    if len(distinct_NP) < count:
        raise ValueError(
            f"{len(distinct_NP)} distinct patches cannot make {count} codes; "
            "take more images or --patches, or a smaller --width"
        )
    order = torch.randperm(len(distinct_NP), generator=torch.Generator().manual_seed(seed))
    return distinct_NP[order[:count].to(patches_NP.device)]


def k_means(
    patches_NP: Tensor,
    codes_VP: Tensor,
    rounds: int,
    on_round: Callable[[int, float], None] = lambda number, error: None,
) -> Codebook:
    """Runs Lloyd's algorithm: assigns patches to their nearest code, moves codes to the mean of their patches, repeats.

    It stops when no assignment changes. A code without patches moves to the patch that is farthest from its code.

    Args:
        patches_NP: fp32.
        codes_VP: the codes to start from.
        rounds: maximum number of rounds.
        on_round: called with each round's number, from 1, and the mean squared distance at its start.
    """
    number, nearest_N = 0, torch.full((len(patches_NP),), -1, device=patches_NP.device)
    for number in range(1, rounds + 1):
        assigned_N, distance_N = _assign(patches_NP, codes_VP)
        on_round(number, float(distance_N.mean()))
        if torch.equal(assigned_N, nearest_N):
            break
        nearest_N = assigned_N
        codes_VP = _means(patches_NP, nearest_N, distance_N, len(codes_VP))
    nearest_N, distance_N = _assign(patches_NP, codes_VP)
    return Codebook(codes_VP, float(distance_N.mean()), len(nearest_N.unique()), number)


def _assign(patches_NP: Tensor, codes_VP: Tensor) -> tuple[Tensor, Tensor]:
    """Finds the nearest code of each patch and the squared distance to it."""
    chunks = patches_NP.split(max(1, CHUNK_VALUES // len(codes_VP)))
    nearest_N = torch.cat([nearest_code(chunk, codes_VP) for chunk in chunks])
    return nearest_N, (patches_NP - codes_VP[nearest_N]).square().sum(1)


def _means(patches_NP: Tensor, nearest_N: Tensor, distance_N: Tensor, count: int) -> Tensor:
    sums_VP = patches_NP.new_zeros(count, patches_NP.shape[1], dtype=torch.float64)
    sums_VP.index_add_(0, nearest_N, patches_NP.double())
    sizes_V = nearest_N.bincount(minlength=count)
    codes_VP = (sums_VP / sizes_V[:, None].clamp_min(1)).float()
    empty = (sizes_V == 0).nonzero().flatten()
    codes_VP[empty] = patches_NP[distance_N.topk(len(empty)).indices]
    return codes_VP
