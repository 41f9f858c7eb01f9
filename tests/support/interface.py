"""Writes down everything that users script, to compare two commits: `python -m tests.support.interface FOLDER`.

Run it in both checkouts and `diff -r` the folders: the help of every command, all recipes as TOML, the parameter names
and shapes of every kind of model, and the checksums of a small packed dataset.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ENVIRONMENT = os.environ | {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
PROFILES = ("loader", "step", "train", "kernels", "all", "plan", "diff")
MODELS: dict[str, dict[str, Any]] = {
    "mae": {},
    "mask-tokens": {"encoder_mask_tokens": True},
    "simmim": {"kind": "simmim"},
    "crossmae": {"kind": "crossmae"},
    "pca": {"target": "pca"},
    "kmeans": {"target": "kmeans", "target_width": 16},
}
SMALL: dict[str, Any] = {"image_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
SMALL |= {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}


def patchmill(*arguments: str) -> str:
    """What a command prints."""
    command = [sys.executable, "-m", "patchmill.tools.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    return f"exit code {done.returncode}\n{done.stdout}{done.stderr}"


def write_help(folder: Path) -> None:
    """One file a command."""
    from patchmill.tools.cli import COMMANDS

    (folder / "usage.txt").write_text(patchmill("--help"))
    for command in COMMANDS:
        (folder / f"help-{command}.txt").write_text(patchmill(command, "--help"))
    for mode in PROFILES:
        (folder / f"help-profile-{mode}.txt").write_text(patchmill("profile", mode, "--help"))


def write_recipes(folder: Path) -> None:
    """The table of recipes, and one file a recipe."""
    from patchmill.tools.recipes import KINDS
    from patchmill.trainer.config.toml import to_toml

    (folder / "recipes.txt").write_text(patchmill("recipes"))
    for kind, recipes in KINDS.items():
        for name, recipe in recipes.items():
            (folder / f"recipe-{kind}-{name}.toml").write_text(to_toml(recipe()))


def write_parameters(folder: Path) -> None:
    """Names and shapes of the parameters and buffers of every kind of model."""
    from patchmill import ModelConfig, build_model

    for name, options in MODELS.items():
        with torch.device("meta"):
            state = build_model(ModelConfig(**(SMALL | options))).state_dict()
        (folder / f"parameters-{name}.txt").write_text("".join(f"{key} {list(v.shape)}\n" for key, v in state.items()))


def write_dataset(folder: Path) -> None:
    """Checksums of the files of a small packed dataset."""
    from tests.support.photos import make_image_folder

    images, shards = folder / "images", folder / "shards"
    make_image_folder(images, count=24)
    patchmill("shard", str(images), str(shards), "--workers", "1")
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(shards.iterdir())}
    (folder / "dataset.txt").write_text("".join(f"{name} {digest}\n" for name, digest in sums.items()))


if __name__ == "__main__":
    out = Path(sys.argv[1])
    out.mkdir(parents=True)
    for write in (write_parameters, write_recipes, write_dataset, write_help):
        write(out)
