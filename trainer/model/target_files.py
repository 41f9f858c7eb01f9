"""fitted target <-> [target file] -> model: a safetensors file whose header says what it was fitted for.

Its tensors are the buffers of `model.target`, under their names there.
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
    """What a target depends on, by option; a dVAE takes any image."""
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
    """Fills the model's target from a file; a model of pixels wants none.

    Raises:
        ValueError: no file, a foreign one, or one that was fitted for another model; the message says what to do.
    """
    config = model.config
    if config.target == "pixels":
        if path:
            raise ValueError(f"target_path {path} is given, but model.target is pixels, which needs none; drop one")
        return
    remedy = f"`patchmill target {config.target} --help` tells how to make it"
    if not path:
        raise ValueError(f"model.target {config.target} comes from a file: give --target-path; {remedy}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"target_path {path} is no safetensors file ({error}); {remedy}") from error
    if header.get("format") != FORMAT:
        raise ValueError(f"target_path {path} is no target file of patchmill; {remedy}")
    made, wanted = json.loads(header["model"]), fitted_for(config)
    differ = [
        f"{name} {made.get(name)} there, {value} here" for name, value in wanted.items() if made.get(name) != value
    ]
    if differ:
        raise ValueError(f"target_path {path} was made for another model ({'; '.join(differ)}); {remedy}")
    try:
        model.target.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"target_path {path} is not whole ({error}); {remedy}") from error
