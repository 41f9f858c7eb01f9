"""patchmill export, patchmill import: checkpoints to and from mae, timm, transformers, detectron2, mmseg and ONNX.

Reading and converting is trainer/interop.py; here are the two commands, and folders that appear whole or not at all.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from patchmill.pipeline.atomic import whole_file, whole_folder
from patchmill.tools import cli
from patchmill.tools.model_card import find_provenance, write_card
from patchmill.trainer.checkpoints.export import Pool, only_encoder, write_files
from patchmill.trainer.checkpoints.infer import Hints
from patchmill.trainer.checkpoints.interop import (
    Checkpoint,
    build_encoder,
    read_checkpoint,
    resized,
    write_checkpoint,
)
from patchmill.trainer.checkpoints.onnx_export import export_onnx

Size = int | tuple[int, int]
CheckpointPath = Annotated[str, tyro.conf.Positional]


@dataclass(frozen=True)
class Reshape:
    """Changes on the way; unset keeps."""

    image_size: Size | None = None
    """pixels (one number, or height and width): positions are interpolated as published"""
    channels: int | None = None
    """image channels: the patch embedding's kernels are repeated over them and rescaled"""
    mean: tuple[float, ...] | None = None
    """per new channel, in 0..1 units"""
    std: tuple[float, ...] | None = None
    """per new channel, in 0..1 units"""


@dataclass(frozen=True)
class ExportConfig:
    """Writes a checkpoint as others read it, into a folder with a model card, ready to be uploaded to a hub.

    Example:
        patchmill export runs/b16 --format hf --out exported/
        patchmill export runs/b16 --format timm --to.image-size 448 --out exported448/
    """

    checkpoint: CheckpointPath
    """run folder (newest checkpoint), checkpoints/step-XXXXXXXX, or a file or folder of any known format"""
    format: Literal["mae", "timm", "hf", "detectron2", "mmseg", "onnx", "patchmill"]
    """timm, detectron2, mmseg and onnx hold the encoder alone"""
    out: str
    """folder to make"""
    encoder_only: bool = False
    """leave the decoder out of mae, hf or patchmill"""
    pool: Pool = "token"
    """timm only: avg names the last norm fc_norm, for models that average the patches"""
    to: Reshape = field(default_factory=Reshape)
    source: Hints = field(default_factory=Hints)


@dataclass(frozen=True)
class ImportConfig:
    """Turns a checkpoint of facebookresearch/mae, timm, Hugging Face ViTMAE, detectron2 or mmseg into one of ours.

    The format is recognised by the names in the file. Nothing in a file is ever run.

    Example:
        patchmill import mae_pretrain_vit_base_full.pth --out mae-b16.safetensors
        patchmill import vit-mae-large/ --to.image-size 448 --out mae-l16-448.safetensors
    """

    checkpoint: CheckpointPath
    """a .pth, .bin or .safetensors file, or a folder that holds one beside its config.json"""
    out: str
    """.safetensors file to write"""
    encoder_only: bool = False
    """leave the decoder out"""
    to: Reshape = field(default_factory=Reshape)
    source: Hints = field(default_factory=Hints)


def main(argv: list[str]) -> int:
    """Runs one of the two commands; `argv` opens with its name."""
    command, *options = argv
    if command == "export":
        return export(cli.parse(ExportConfig, "export", options))
    return import_(cli.parse(ImportConfig, "import", options))


def export(config: ExportConfig) -> int:
    """Writes the folder and says what is in it."""
    if config.pool != "token" and config.format != "timm":
        raise ValueError(f"--pool {config.pool} is for --format timm; {config.format} has no choice of pooling")
    checkpoint = _read(config)
    provenance = find_provenance(checkpoint.file)
    with whole_folder(Path(config.out)) as folder:
        if config.format == "onnx":
            error = export_onnx(build_encoder(checkpoint), folder)
            print(f"onnxruntime agrees with PyTorch within {error:.1e} (relative, batches of 1 and 3)")
            has_decoder = False
        else:
            write_files(folder, config.format, checkpoint, pool=config.pool)
            has_decoder = checkpoint.has_decoder and config.format in ("mae", "hf", "patchmill")
        write_card(folder, config.format, checkpoint.config, has_decoder, provenance)
    files = ", ".join(sorted(path.name for path in Path(config.out).iterdir()))
    print(f"wrote {config.out} ({config.format}, {'whole model' if has_decoder else 'encoder'}): {files}")
    return 0


def import_(config: ImportConfig) -> int:
    """Writes the file and says what it was made of."""
    out = Path(config.out)
    if out.suffix != ".safetensors":
        raise ValueError(f"--out {out} must end in .safetensors")
    if out.exists():
        raise ValueError(f"{out} exists already; choose another --out")
    checkpoint = _read(config)
    with whole_file(out) as path:
        write_checkpoint(checkpoint, path)
    c = checkpoint.config
    parts = "encoder and decoder" if checkpoint.has_decoder else "the encoder alone (no decoder in it)"
    print(
        f"wrote {out}: {parts} from {checkpoint.file} ({checkpoint.names} names), {c.depth} blocks of width "
        f"{c.embed_dim}, patches of {c.patch_size} px, images of {c.image_hw[0]} x {c.image_hw[1]}"
    )
    return 0


def _read(config: ExportConfig | ImportConfig) -> Checkpoint:
    checkpoint = read_checkpoint(config.checkpoint, config.source)
    for note in checkpoint.notes:
        print(f"note: {note}", file=sys.stderr)
    to = config.to
    checkpoint = resized(checkpoint, image_size=to.image_size, channels=to.channels, mean=to.mean, std=to.std)
    return only_encoder(checkpoint) if config.encoder_only else checkpoint


if __name__ == "__main__":
    sys.exit(cli.run(sys.argv[1], sys.argv[2:]))
