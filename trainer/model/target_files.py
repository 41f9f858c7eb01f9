"""Reads and writes fitted targets as safetensors files whose header says which model they were fitted for.

The tensors are the buffers of `model.target`, under the same names.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from patchmill.trainer.config.model import ModelConfig
from patchmill.trainer.model.vit import VisionTransformer

FORMAT = "patchmill-target"


def fitted_for(config: ModelConfig) -> dict[str, Any]:
    """The model options that a target depends on, by name. A dVAE depends on none of them."""
    if config.target == "dvae":
        return {"target": "dvae"}
    names = ("target", "patch_size", "channels", "mean", "std", "norm_pix_loss")
    made = {name: getattr(config, name) for name in names} | {"target_width": config.pred_dim}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in made.items()}


def write_target(tensors: dict[str, Tensor], config: ModelConfig, path: Path) -> None:
    """Writes a target file. Raises OSError when it cannot be written."""
    header = {"format": FORMAT, "model": json.dumps(fitted_for(config))}
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=header)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}; free space or choose another --out") from error


def load_target(model: VisionTransformer, path: str) -> None:
    """Fills the model's target from a file; a model that predicts pixels needs none.

    Raises:
        ValueError: the file is missing, foreign, incomplete or fitted for another model.
    """
    config = model.config
    if config.target == "pixels":
        if path:
            raise ValueError(
                f"target_path {path} is given but model.target pixels needs no file; leave out one of them"
            )
        return
    remedy = f"`patchmill target {config.target} --help` shows how to make one"
    if not path:
        raise ValueError(f"model.target {config.target} comes from a file: give --target-path; {remedy}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"target_path {path} is not a readable safetensors file ({error}); {remedy}") from error
    if header.get("format") != FORMAT:
        raise ValueError(f"target_path {path} is not a target file of patchmill; {remedy}")
    there, here = json.loads(header["model"]), fitted_for(config)
    differ = [
        f"{name} {there.get(name)} there, {value} here" for name, value in here.items() if there.get(name) != value
    ]
    if differ:
        raise ValueError(f"target_path {path} was made for another model ({'; '.join(differ)}); {remedy}")
    try:
        model.target.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"target_path {path} does not hold all of the target's tensors ({error}); {remedy}") from error
