"""Imports checkpoints of facebookresearch/mae, timm, transformers, detectron2 and mmseg.

trainer/checkpoints/interop.py reads and converts; this file parses options, and writes the whole file or none.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from patchmill.pipeline.atomic import whole_file
from patchmill.tools import cli
from patchmill.tools.console.options import parse
from patchmill.tools.console.reshape import CheckpointPath, Reshape, read_reshaped
from patchmill.trainer.checkpoints.infer import Hints
from patchmill.trainer.checkpoints.interop import write_checkpoint


@dataclass(frozen=True)
class ImportConfig:
    """Turns a checkpoint of facebookresearch/mae, timm, Hugging Face ViTMAE, detectron2 or mmseg into one of ours.

    The names in the file tell its format. Nothing in a file is ever executed.

    Example:
        patchmill import mae_pretrain_vit_base_full.pth --out mae-b16.safetensors
        patchmill import vit-mae-large/ --to.image-size 448 --out mae-l16-448.safetensors
    """

    checkpoint: CheckpointPath
    """a .pth, .bin or .safetensors file, or a folder that holds one next to its config.json"""
    out: str
    """.safetensors file to write"""
    encoder_only: bool = False
    """leave the decoder out"""
    to: Reshape = field(default_factory=Reshape)
    source: Hints = field(default_factory=Hints)


def main(argv: list[str]) -> int:
    """Runs the command."""
    config = parse(ImportConfig, "patchmill import", argv)
    out = Path(config.out)
    if out.suffix != ".safetensors":
        raise ValueError(f"--out {out} must end in .safetensors")
    if out.exists():
        raise ValueError(f"{out} exists already; choose another --out")
    checkpoint = read_reshaped(config.checkpoint, config.source, config.to, encoder_only=config.encoder_only)
    with whole_file(out) as path:
        write_checkpoint(checkpoint, path)
    c = checkpoint.config
    parts = "encoder and decoder" if checkpoint.has_decoder else "the encoder alone (the source has no decoder)"
    print(
        f"wrote {out}: {parts} from {checkpoint.file} ({checkpoint.names} names), {c.depth} blocks of width "
        f"{c.embed_dim}, patches of {c.patch_size} px, images of {c.image_hw[0]} x {c.image_hw[1]}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(cli.run("import", sys.argv[1:]))
