"""Gathers the results of all runs below a folder into one Markdown table.

Each results.json gives one number. A row is a pretraining run (or random weights, or none); runs whose folders differ
only in a trailing -s<seed> share a row, with mean and standard deviation.
"""

import json
import re
import statistics
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from patchmill.tools import cli
from patchmill.tools.console.options import parse
from patchmill.trainer.draw.charts import write_sweep
from patchmill.trainer.evaluate.report import RESULTS

ORDER = ("knn", "probe", "finetune")
"""the first columns; partial fine-tuning follows by number of blocks"""


@dataclass(frozen=True)
class ResultsConfig:
    """Gathers the results of all runs below a folder into a Markdown table.

    Example:
        patchmill results runs/ --out results.md --figure partial.png
    """

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
    """where to look for results.json"""
    out: str = ""
    """Markdown file to write; unset: print"""
    figure: str = ""
    """PNG of partial fine-tuning to draw, a line for each row; unset: none"""


def main(argv: list[str]) -> int:
    """Runs the command."""
    config = parse(ResultsConfig, "patchmill results", argv)
    table = gather(Path(config.folder))
    if not table:
        raise ValueError(
            f"no {RESULTS} below {config.folder}; `patchmill knn`, `probe`, `finetune` and `evaluate` write them"
        )
    text = to_markdown(table)
    if config.out:
        Path(config.out).write_text(text, encoding="utf-8")
        print(f"wrote {config.out}: {len(table)} rows")
    else:
        print(text, end="")
    if config.figure:
        _draw(table, Path(config.figure))
    return 0


class Found(NamedTuple):
    """One results.json."""

    row: str
    protocol: str
    top1: float
    test: str
    """the test data"""
    seeds: tuple
    """of pretraining and evaluation"""
    folder: str
    """name of the run's folder"""


def gather(folder: Path) -> dict[str, dict[str, list[float]]]:
    """Top-1 of each seed by row and column, in the order of paths.

    A column is a protocol. Its title adds the test data where there are several, and the folder where a seed occurs
    twice.

    Raises:
        ValueError: a results.json that Patchmill did not write.
    """
    everything = [_read(path) for path in sorted(folder.rglob(RESULTS))]
    tests = {found.test for found in everything}
    names = {test: Path(test).name for test in tests}
    if len(set(names.values())) < len(tests):
        names = {test: test for test in tests}
    cells = Counter((found.row, found.protocol, found.test, found.seeds) for found in everything)
    twice = {(row, protocol, test) for (row, protocol, test, _), count in cells.items() if count > 1}
    table: dict[str, dict[str, list[float]]] = {}
    for found in everything:
        column = f"{found.protocol} on {names[found.test]}" if len(tests) > 1 else found.protocol
        if (found.row, found.protocol, found.test) in twice:
            column += f" ({found.folder})"
        table.setdefault(found.row, {}).setdefault(column, []).append(found.top1)
    return table


def _read(path: Path) -> Found:
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        seeds = (results.get("pretrained", {}).get("seed"), results["seed"])
        protocol, top1, test = results["protocol"], float(results["top1"]), results["test"]
        return Found(row_name(results), protocol, top1, test, seeds, path.parent.name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a results file of Patchmill ({error!r}); move it elsewhere") from error


def row_name(results: dict[str, Any]) -> str:
    """The title of a result's row: the pretraining run without its seed, and the initial weights."""
    if results["start"] == "scratch":
        return "from scratch"
    name = results.get("pretrained", {}).get("run") or Path(results["checkpoint"]).stem
    name = re.sub(r"-s(eed)?\d+$", "", name)
    return name if results["start"] == "pretrained" else f"{name}, {results['start']} weights"


def to_markdown(table: dict[str, dict[str, list[float]]]) -> str:
    """The table, percent; `mean ± standard deviation (n)` where there are several seeds."""
    protocols = sorted({name for row in table.values() for name in row}, key=_place)
    lines = ["| top-1 (%) | " + " | ".join(protocols) + " |", "|---" * (len(protocols) + 1) + "|"]
    for name, row in sorted(table.items()):
        lines.append(f"| {name} | " + " | ".join(_cell(row.get(protocol, [])) for protocol in protocols) + " |")
    return "\n".join(lines) + "\n"


def _cell(values: list[float]) -> str:
    if not values:
        return "-"
    mean = 100 * statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.2f}"
    return f"{mean:.2f} ± {100 * statistics.stdev(values):.2f} ({len(values)})"


def _place(column: str) -> tuple[int, float, str]:
    """Sort key of a column."""
    protocol, blocks = column.split()[0], _blocks(column)
    if blocks is not None:
        return len(ORDER), blocks, column
    return (ORDER.index(protocol) if protocol in ORDER else len(ORDER) + 1), 0.0, column


def _blocks(column: str) -> float | None:
    found = re.match(r"partial-([0-9.]+)", column)
    return float(found[1]) if found else None


def _draw(table: dict[str, dict[str, list[float]]], path: Path) -> None:
    lines = {}
    for name, row in sorted(table.items()):
        points = [(_blocks(p), statistics.mean(v)) for p, v in row.items()]
        kept = [(blocks, top1) for blocks, top1 in points if blocks is not None]
        if kept:
            lines[name] = kept
    if not lines:
        raise ValueError("--figure draws partial fine-tuning, and the results have none; leave it out")
    write_sweep(lines, path)
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(cli.run("results", sys.argv[1:]))
