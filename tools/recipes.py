"""Lists the named configs that --recipe takes, or prints one as TOML."""

import dataclasses
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import tyro

from patchmill.tools import cli
from patchmill.tools.console.options import parse
from patchmill.tools.console.report import column_table, show
from patchmill.trainer.config.toml import to_toml
from patchmill.trainer.recipes.evaluate import FINETUNE_RECIPES, PROBE_RECIPES
from patchmill.trainer.recipes.pretrain import RECIPES, find_recipe
from patchmill.trainer.recipes.table1 import ROWS, TABLE1

KINDS: dict[str, Mapping[str, Callable[[], Any]]] = {
    "pretrain": RECIPES,
    "probe": PROBE_RECIPES,
    "finetune": FINETUNE_RECIPES,
}
"""command -> its recipes"""


@dataclasses.dataclass(frozen=True)
class RecipesArgs:
    """Lists the recipes of pretrain, probe and finetune, or prints one of them as TOML (unset options are left out).

    Example:
        patchmill recipes
        patchmill recipes mae-vit-b16 > mine.toml      # change it, then: patchmill pretrain --config mine.toml ...
    """

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[NAME]")] = ""
    """the recipe to print as TOML; unset: list them all"""


def main(argv: list[str]) -> int:
    """Runs the command."""
    args = parse(RecipesArgs, "patchmill recipes", argv)
    if args.name:
        everything = {name: make for recipes in KINDS.values() for name, make in recipes.items()}
        print(to_toml(find_recipe(everything, args.name)()), end="")
        return 0
    for command, recipes in KINDS.items():
        table = column_table("recipe", "what it is", title=command)
        for name, make in recipes.items():
            table.add_row(name, describe(name, make))
        show(table, "")
    return 0


def describe(name: str, make: Callable[[], Any]) -> str:
    """Describes a recipe in one line."""
    if name not in TABLE1:
        return " ".join((inspect.getdoc(make) or "").split("\n\n")[0].split())
    row = name.removeprefix("table1-")
    changes = {option: value for section in ROWS[row].values() for option, value in section.items()}
    what = ", ".join(f"{option} {value}" for option, value in changes.items()) or "the default setting"
    return f"ViT-L/16, Table 1{row[0]} of the paper: {what}"


if __name__ == "__main__":
    sys.exit(cli.run("recipes", sys.argv[1:]))
