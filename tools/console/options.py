"""Parses command lines: a plain options class, or a recipe or config file first and options on top of it."""

import argparse
import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import tyro

from patchmill.pipeline.config import ReadConfig
from patchmill.trainer.config.toml import read_toml
from patchmill.trainer.recipes.pretrain import find_recipe

Options = TypeVar("Options")
UNSET_FLAGS = ("--train.async-save",)
"""flags that are neither on nor off by default; tyro would ask for a value"""


def parse(
    kind: type[Options], prog: str, argv: list[str], *, text: str = "", default: Options | None = None
) -> Options:
    """The options of a command line. tyro prints help and mistakes, and exits (0 and 2).

    Args:
        kind: a dataclass. Its docstring, with the example that tyro alone would leave out, opens --help.
        prog: what usage lines call the command, as in "patchmill shard".
        text: opens --help instead of the docstring.
        default: values of the options that are not given.
    """
    more: dict[str, Any] = {} if default is None else {"default": default}
    return tyro.cli(
        tyro.conf.AvoidSubcommands[kind],  # type: ignore[valid-type, misc]
        prog=prog,
        description=text or inspect.getdoc(kind),
        args=_spell_out(argv),
        **more,
    )


def _spell_out(argv: list[str]) -> list[str]:
    """Gives those of UNSET_FLAGS that have no value theirs: --train.async-save True, --train.no-async-save False."""
    spelled = []
    for here, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        spelled.append(here)
        for flag in UNSET_FLAGS:
            group, _, name = flag.rpartition(".")
            if here.replace("_", "-") == flag and following not in ("True", "False", "None"):
                spelled.append("True")
            elif here.replace("_", "-") == f"{group}.no-{name}":
                spelled[-1:] = [flag, "False"]
    return spelled


def parse_with_recipes(
    kind: type[Options], prog: str, argv: list[str], recipes: Mapping[str, Callable[[], Options]], *, text: str
) -> Options:
    """The options of a command line on top of --recipe or --config; without either, of the first recipe.

    Args:
        text: opens --help; {names} and {default} in it become the recipes' names and the first of them.
    Raises:
        ValueError: as `split_defaults`.
    """
    fallback = next(iter(recipes))
    default, rest = split_defaults(argv, kind, recipes, fallback=fallback)
    text = text.format(names=", ".join(recipes), default=fallback)
    return parse(kind, prog, rest, text=text, default=default)


def split_defaults(
    argv: list[str],
    kind: type[Options],
    recipes: Mapping[str, Callable[[], Options]],
    *,
    fallback: str,
    purpose: str = "",
) -> tuple[Options, list[str]]:
    """The config that --recipe or --config names, and the rest of the command line.

    Args:
        fallback: the recipe when neither is given.
        purpose: makes one of the two mandatory (except with --help); the error names it, as in "to train".
    Raises:
        ValueError: both are given or neither where one is mandatory, an unknown recipe, a file with a wrong key.
        OSError: the file cannot be read.
    """
    chosen, rest = split_off(argv, recipe={}, config={})
    if chosen.recipe and chosen.config:
        raise ValueError("--recipe and --config both give defaults; leave one out")
    if chosen.config:
        return read_toml(chosen.config, kind), rest
    if purpose and not chosen.recipe and not {"-h", "--help"} & set(rest):
        raise ValueError(f"say what {purpose}: --recipe NAME (`patchmill recipes` lists them) or --config FILE")
    return find_recipe(recipes, chosen.recipe or fallback)(), rest


def split_off(argv: list[str], **options: dict[str, Any]) -> tuple[argparse.Namespace, list[str]]:
    """Takes the named options out of a command line: (their values, None where not given; the rest).

    Args:
        options: how argparse reads each, as in `split_off(argv, partial={"nargs": "+"})`.
    """
    first = argparse.ArgumentParser("patchmill", add_help=False, allow_abbrev=False)
    for name, settings in options.items():
        first.add_argument(f"--{name}", **settings)
    return first.parse_known_args(argv)


def require_data(data: ReadConfig) -> None:
    """Raises ValueError when --data.path is missing."""
    if not data.path:
        raise ValueError("no data: give --data.path DIR, a folder that `patchmill shard` wrote")
