"""Fits what a model predicts instead of pixels: a PCA basis or k-means codes; or checks the weights of a dVAE.

trainer/model/target_fit.py does the fitting; this file parses options and reports.
"""

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.progress import Progress
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from patchmill.pipeline.atomic import whole_file
from patchmill.pipeline.config import DataConfig, MaskConfig
from patchmill.pipeline.loader import build_loader
from patchmill.tools import cli
from patchmill.tools.console.options import parse, require_data, split_off
from patchmill.tools.console.progress import progress_bar
from patchmill.trainer.config.model import ModelConfig
from patchmill.trainer.engine.world import join_world
from patchmill.trainer.model.dvae import DVAETokenizer
from patchmill.trainer.model.target_files import write_target
from patchmill.trainer.model.target_fit import Covariance, first_codes, k_means, principal_components
from patchmill.trainer.model.targets import target_patches
from patchmill.trainer.recipes.pretrain import get_recipe

BATCH = 64
"""images at a time"""


@dataclass(frozen=True)
class TargetConfig:
    """Makes the file that `patchmill pretrain --target-path` takes: a target to predict instead of pixels.

    pca fits principal components to all patches of some images, kmeans fits codes to some patches of them; both see the
    crops that training sees. dvae checks a safetensors file with the tensors of DALL-E's encoder (docs/methods.md says
    how to make one) and needs no data. --recipe NAME gives the model: patch size, width and normalisation must agree.

    Example:
        patchmill target pca    --recipe table1-d-pca --data.path shards/ --out pca.safetensors
        patchmill target kmeans --recipe mae-vit-b16  --data.path shards/ --out kmeans.safetensors
        patchmill target dvae   --weights dalle_encoder.safetensors --out dvae.safetensors
        patchmill pretrain --recipe table1-d-pca --data.path shards/ --target-path pca.safetensors --out runs/pca
    """

    kind: tyro.conf.Positional[Literal["pca", "kmeans", "dvae"]]
    out: str
    """file to write, .safetensors"""
    data: DataConfig = field(default_factory=lambda: DataConfig(last_batch="fill"))
    model: ModelConfig = field(default_factory=ModelConfig)
    width: int = 0
    """coefficients or codes; 0: the recipe's, else 96 and 8192"""
    images: int = 10_000
    """images to fit to (fewer where an epoch has fewer)"""
    patches: int = 262_144
    """of kmeans: patches to fit codes to, equally many from each image"""
    rounds: int = 30
    """of kmeans: most rounds of Lloyd's algorithm"""
    weights: str = ""
    """of dvae: safetensors file with the encoder's tensors under their published names"""
    seed: int = 0
    """of order, crops, patches and first codes"""
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        for name in ("images", "patches", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        if self.kind != "dvae" and self.weights:
            raise ValueError(f"--weights is for dvae; {self.kind} is fitted to --data.path, leave --weights out")


def main(argv: list[str]) -> int:
    """Runs the command."""
    chosen, rest = split_off(argv, recipe={"default": "mae-vit-b16"})
    recipe = get_recipe(chosen.recipe)
    data = dataclasses.replace(recipe.data, last_batch="fill")
    default = TargetConfig(kind=tyro.MISSING, out=tyro.MISSING, data=data, model=recipe.model)
    config = parse(TargetConfig, "patchmill target", rest, default=default)
    if Path(config.out).suffix != ".safetensors":
        raise ValueError(f"--out {config.out} must end in .safetensors")
    width = config.width or (config.model.target_width if config.model.target == config.kind else 0)
    model = dataclasses.replace(config.model, target=config.kind, target_width=width)
    tensors, summary = _read_dvae(config.weights) if config.kind == "dvae" else _fit(config, model)
    with whole_file(Path(config.out)) as path:
        write_target(tensors, model, path)
    print(f"wrote {config.out}: {summary}")
    options = f"--model.target {config.kind}" + (f" --model.target-width {width}" if width else "")
    print(f"train with it: patchmill pretrain {options} --target-path {config.out} ...")
    return 0


def _fit(config: TargetConfig, model: ModelConfig) -> tuple[dict[str, Tensor], str]:
    """Fits a target: its tensors, and a line that says how well they fit."""
    require_data(config.data)
    device = join_world(config.device).device
    with progress_bar() as bar:
        if config.kind == "pca":
            covariance = Covariance()
            for patches_BLP in _patches(config, model, device, None, bar):
                covariance.add(patches_BLP.flatten(0, 1))
            found = principal_components(covariance, model.pred_dim)
            summary = (
                f"{model.pred_dim} components of {covariance.count:,} patches explain {found.explained.sum():.2%} of "
                f"their variance (the first {found.explained[0]:.2%}, the last {found.explained[-1]:.4%})"
            )
            return {"mean": found.mean.cpu(), "basis": found.basis.cpu()}, summary
        every = [patches_BKP.flatten(0, 1) for patches_BKP in _patches(config, model, device, config.patches, bar)]
        patches_NP = torch.cat(every)[: config.patches]
        task = bar.add_task("rounds", total=config.rounds)
        start_VP = first_codes(patches_NP, model.pred_dim, config.seed)
        book = k_means(patches_NP, start_VP, config.rounds, lambda number, error: bar.update(task, completed=number))
        spread = float((patches_NP - patches_NP.mean(0)).square().sum(1).mean())
        summary = (
            f"{model.pred_dim} codes ({book.used} used) of {len(patches_NP):,} patches after {book.rounds} rounds "
            f"explain {1 - book.error / spread:.2%} of their variance"
        )
        return {"tokenizer.codebook": book.codes.cpu()}, summary


def _patches(
    config: TargetConfig, model: ModelConfig, device: torch.device, most: int | None, bar: Progress
) -> Iterator[Tensor]:
    """fp32 [B, K, P] batch by batch: K random patches of each training crop, normalised as the model's.

    Args:
        most: patches to draw from all images together, equally many from each; None: all.
    """
    with build_loader(
        config.data,
        image_size=model.image_size,
        patch_size=model.patch_size,
        channels=model.channels,
        mask=MaskConfig("random", 0.0),
        seed=config.seed,
        global_batch=BATCH,
        device=device,
    ) as loader:
        batches = min(-(-config.images // BATCH), loader.steps_per_epoch)
        per_image = model.num_patches if most is None else min(model.num_patches, -(-most // (batches * BATCH)))
        for _, batch in zip(bar.track(range(batches), description="batches"), loader, strict=False):
            yield target_patches(batch.images, batch.plan.ids_keep[:, :per_image].contiguous(), model)


def _read_dvae(path: str) -> tuple[dict[str, Tensor], str]:
    """The tensors of DALL-E's encoder, checked against its published shapes."""
    if not path:
        raise ValueError("give --weights FILE: DALL-E's encoder as safetensors; docs/methods.md says how to make it")
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"--weights {path} is not a safetensors file ({error}); pickles are never opened") from error
    with torch.device("meta"):
        wanted = DVAETokenizer(ModelConfig()).state_dict()
    wrong = [name for name, tensor in wanted.items() if name not in found or found[name].shape != tensor.shape]
    if wrong or len(found) != len(wanted):
        raise ValueError(
            f"--weights {path} is not DALL-E's encoder: {len(wrong)} of its {len(wanted)} tensors are missing or have "
            f"another shape{f', the first is {wrong[0]}' if wrong else ''}; the file has {len(found)} tensors"
        )
    tensors = {f"tokenizer.{name}": tensor.float() for name, tensor in found.items()}
    return tensors, f"DALL-E's encoder, {sum(t.numel() for t in tensors.values()):,} values"


if __name__ == "__main__":
    sys.exit(cli.run("target", sys.argv[1:]))
