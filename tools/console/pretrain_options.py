"""Parses the options of a pretraining run, for the commands that start, schedule or measure one."""

from patchmill.tools.console.options import parse, require_data, split_defaults
from patchmill.trainer.config.pretrain import PretrainConfig
from patchmill.trainer.recipes.pretrain import RECIPES

TEXT = """\
Pretrains a masked autoencoder (He et al. 2021) on shards and writes a run folder.

  patchmill pretrain --recipe mae-tiny --data.path shards/ --out runs/first
  patchmill pretrain --recipe mae-vit-b16 --data.path shards/ --out runs/b16 --train.global-batch 1024
  patchmill pretrain --config runs/b16/config.toml --out runs/again --seed 1
  torchrun --nproc-per-node 8 -m patchmill pretrain --recipe mae-vit-l16 --data.path shards/ --out runs/l16

--recipe NAME (`patchmill recipes` lists them) or --config FILE (config.toml of a run) gives the defaults of all
options below.
The same command again continues a run that was stopped (--resume auto).
"""
HELP_RECIPE = "mae-vit-b16"
"""whose values --help shows"""


def parse_pretrain(argv: list[str]) -> PretrainConfig:
    """The config of a command line: recipe or file, then options. Raises ValueError for what cannot be right."""
    default, rest = split_pretrain(argv, "to train")
    config = parse(PretrainConfig, "patchmill pretrain", rest, text=TEXT, default=default)
    require_data(config.data)
    if not config.out:
        raise ValueError("no output folder: give --out DIR, the folder of the run")
    return config


def split_pretrain(argv: list[str], purpose: str) -> tuple[PretrainConfig, list[str]]:
    """The config that --recipe or --config names, and the rest of the command line, as `split_defaults`."""
    return split_defaults(argv, PretrainConfig, RECIPES, fallback=HELP_RECIPE, purpose=purpose)
