"""Lists the runs below a folder with their state, and draws their losses."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Table

from patchmill.tools import cli
from patchmill.tools.console.options import parse
from patchmill.tools.console.report import column_table, show
from patchmill.trainer.checkpoints.checkpoint import all_checkpoints
from patchmill.trainer.draw.charts import compare_losses
from patchmill.trainer.metrics import read_metrics
from patchmill.trainer.run_folder import STATUS, Status, read_status


@dataclass(frozen=True)
class RunsArgs:
    """Lists the runs in a folder with their state: running, finished, stopped, failed, or gone (killed).

    Example:
      patchmill runs runs/
      patchmill runs runs/ --figure losses.png
    """

    folder: tyro.conf.Positional[Path] = Path("runs")
    """folder to search for runs, at any depth"""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """print one JSON object per line instead of a table"""
    figure: Path | None = None
    """PNG to draw the losses of all runs into; unset: none"""


def main(argv: list[str]) -> int:
    """Runs the command."""
    args = parse(RunsArgs, "patchmill runs", argv)
    if not args.folder.is_dir():
        raise ValueError(f"no folder {args.folder}; give the --out of a run, or a folder above it")
    runs = []
    for path in sorted(args.folder.rglob(STATUS)):
        try:
            runs.append(describe(path.parent))
        except ValueError as error:
            print(f"left out: {error}", file=sys.stderr)
    if not runs:
        raise ValueError(f"{args.folder} has no runs; make one: `patchmill pretrain --out {args.folder}/first ...`")
    if args.figure is not None:
        _draw(args.folder, runs, args.figure)
    if args.as_json:
        for run in runs:
            print(json.dumps(run))
    else:
        show(_table(runs))
    return 0


def describe(run: Path) -> dict[str, Any]:
    """Summarises a run folder. Raises ValueError for any other folder."""
    status = read_status(run)
    lines = read_metrics(run) if (run / "metrics.jsonl").exists() else []
    last = lines[-1] if lines else {}
    saved = all_checkpoints(run)
    return {
        "run": str(run),
        "state": _state(status),
        "step": last.get("step", status.step),
        "total_steps": status.total_steps,
        "loss": last.get("loss"),
        "images_per_s": last.get("images_per_s"),
        "checkpoint": saved[-1].name if saved else None,
        "why": status.why,
    }


def _draw(folder: Path, runs: list[dict[str, Any]], figure: Path) -> None:
    if figure.suffix.lower() != ".png":
        raise ValueError(f"--figure {figure} must end in .png")
    found = {run["run"]: read_metrics(Path(run["run"])) for run in runs if run["loss"] is not None}
    if not found:
        raise ValueError(f"no run in {folder} has written metrics yet; leave --figure out")
    figure.parent.mkdir(parents=True, exist_ok=True)
    compare_losses({str(Path(name).relative_to(folder)): lines for name, lines in found.items()}, figure)
    print(f"wrote {figure}", file=sys.stderr)


def _state(status: Status) -> str:
    return "gone" if status.is_gone else status.state


def _table(runs: list[dict[str, Any]]) -> Table:
    names = ("run", "state", "step", "loss", "images/s", "newest checkpoint", "why")
    table = column_table(*names, right=("step", "loss", "images/s"))
    for run in runs:
        loss = "" if run["loss"] is None else f"{run['loss']:.4f}"
        rate = "" if run["images_per_s"] is None else f"{run['images_per_s']:,.0f}"
        step = f"{run['step']}/{run['total_steps']}"
        table.add_row(run["run"], run["state"], step, loss, rate, run["checkpoint"] or "", run["why"] or "")
    return table


if __name__ == "__main__":
    sys.exit(cli.run("runs", sys.argv[1:]))
