"""Runs `patchmill COMMAND`: one command line, one file of this folder per command.

A user's mistake ends in one message on stderr and exit code 2; a traceback means a bug of ours.
"""

import importlib
import sys

from patchmill import __version__

COMMANDS = {
    "shard": "pack any collection of images into WebDataset shards with an index, a manifest and checksums",
    "verify": "check a dataset: every checksum, every index, every image",
    "info": "tell what a dataset holds, and draw a contact sheet",
    "index": "make a dataset of WebDataset tars that another program wrote",
    "merge": "finish a dataset that was packed in parts, or join datasets",
    "convert": "write a dataset as class folders or as one .beton file",
    "pretrain": "pretrain a masked autoencoder on shards",
    "profile": "measure loader, step and training loop: what binds, by how much, what would help",
    "target": "fit what a model is to predict instead of pixels: a PCA basis, k-means codes",
    "recipes": "list the named configs that --recipe takes, or print one",
    "launch": "write a torchrun or SLURM script for pretraining on many GPUs",
    "runs": "list runs with their state",
    "reconstruct": "draw masked | reconstruction | original for a checkpoint",
    "look": "draw patch features as colours and where each attention head looks",
    "knn": "classify by nearest neighbours in feature space",
    "probe": "train a linear classifier on frozen features",
    "finetune": "fine-tune the encoder, whole or its last blocks, or train one from scratch",
    "evaluate": "test a finished classifier on any labelled dataset",
    "results": "gather the results of all runs into a table",
    "spectrum": "draw how many directions the features of checkpoints use",
    "features": "write the encoder's features of a dataset to a safetensors or Parquet file",
    "export": "write a checkpoint for facebookresearch/mae, timm, transformers, detectron2, mmseg or ONNX",
    "import": "turn a checkpoint of facebookresearch/mae, timm, transformers, detectron2 or mmseg into one of ours",
}

# `import` is a keyword; a file profile.py, run by its path, would replace the standard library's module of that name
UNDERSCORED = ("import", "profile")


def usage() -> str:
    """The text of `patchmill --help`."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items())
    return (
        f"patchmill {__version__}: masked autoencoders pretrained at the speed of the accelerator\n\n"
        f"usage: patchmill COMMAND [OPTIONS]\n\ncommands:\n{commands}\n\n"
        "`patchmill COMMAND --help` lists a command's options and an example.\n"
        "A first run:\n"
        "  patchmill shard photos/ shards/\n"
        "  patchmill pretrain --recipe mae-tiny --data.path shards/ --out runs/first\n"
        "  patchmill reconstruct --checkpoint runs/first --data.path shards/ --out grid.png\n"
    )


def run(command: str, argv: list[str]) -> int:
    """Runs one command and returns its exit code; `ValueError` and `OSError` become one message and 2."""
    name = f"{command}_" if command in UNDERSCORED else command
    module = importlib.import_module(f"patchmill.tools.{name}")
    try:
        return module.main(argv)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def main() -> int:
    """Entry point of the `patchmill` script and of `python -m patchmill`."""
    argv = sys.argv[1:]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0 if argv else 2
    if argv[0] == "--version":
        print(__version__)
        return 0
    if argv[0] not in COMMANDS:
        print(f"error: no command {argv[0]!r}; choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return run(argv[0], argv[1:])


if __name__ == "__main__":
    sys.exit(main())
