"""What the commands of evaluation share: recipe or config file, then options; a progress bar; a table of the result."""

import argparse
from collections.abc import Callable, Mapping
from typing import TypeVar

import tyro

from patchmill.trainer.config.toml import read_toml
from patchmill.trainer.recipes.pretrain import find_recipe

Config = TypeVar("Config")


def parse(
    argv: list[str], kind: type[Config], recipes: Mapping[str, Callable[[], Config]], *, prog: str, text: str
) -> Config:
    """The config of a command line. Raises ValueError for what cannot be right."""
    first = argparse.ArgumentParser("patchmill", add_help=False, allow_abbrev=False)
    first.add_argument("--recipe")
    first.add_argument("--config")
    chosen, rest = first.parse_known_args(argv)
    if chosen.recipe and chosen.config:
        raise ValueError("--recipe and --config both give defaults; leave one out")
    name = chosen.recipe or next(iter(recipes))
    default = read_toml(chosen.config, kind) if chosen.config else find_recipe(recipes, name)()
    description = text.format(names=", ".join(recipes), default=next(iter(recipes)))
    return tyro.cli(
        tyro.conf.AvoidSubcommands[kind],  # type: ignore[valid-type, misc]
        prog=prog,
        description=description,
        default=default,
        args=rest,
    )
