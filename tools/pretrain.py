"""patchmill pretrain: recipe + options -> a run folder, with a progress bar and a summary.

The work is trainer/pretrain.py; here are the command line and what a person sees of it.
"""

import argparse
import os
import sys

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column, Table

from patchmill.tools import cli
from patchmill.trainer.config.pretrain import PretrainConfig
from patchmill.trainer.config.toml import from_toml
from patchmill.trainer.draw.charts import write_loss_curve, write_spectra
from patchmill.trainer.evaluate.spectrum import Spectrum
from patchmill.trainer.loop import Progress
from patchmill.trainer.metrics import EVALUATIONS, SPECTRA, read_lines, read_metrics
from patchmill.trainer.pretrain import Summary, pretrain
from patchmill.trainer.recipes.pretrain import get_recipe

STAGES = 6
"""spectra that spectra.png shows, evenly over the run"""
SPECTRA_TITLE = "Spectrum of a training batch's class tokens"

EXAMPLE = """\
Pretrains a masked autoencoder (He et al. 2021) on shards and writes a run folder.

  patchmill pretrain --recipe mae-tiny --data.path shards/ --out runs/first
  patchmill pretrain --recipe mae-vit-b16 --data.path shards/ --out runs/b16 --train.global-batch 1024
  patchmill pretrain --config runs/b16/config.toml --out runs/again --seed 1
  torchrun --nproc-per-node 8 -m patchmill.tools.pretrain --recipe mae-vit-l16 --data.path shards/ --out runs/l16

--recipe NAME (`patchmill recipes` lists them) or --config FILE (config.toml of a run) gives the defaults of all
options below.
The same command again continues a run that was stopped (--resume auto).
"""


def main(argv: list[str]) -> int:
    """Runs the command; 0 when the run ended in order, a stop by a signal included."""
    config = parse(argv)
    summary = run(config)
    if summary is None:
        return 0
    report(summary)
    return 0


def split_defaults(argv: list[str], purpose: str) -> tuple[PretrainConfig, list[str]]:
    """The config that --recipe or --config names, and the options that are left.

    Raises:
        ValueError: both, or neither (and no --help); `purpose` says what for, as in "to train".
    """
    first = argparse.ArgumentParser("patchmill", add_help=False, allow_abbrev=False)
    first.add_argument("--recipe")
    first.add_argument("--config")
    chosen, rest = first.parse_known_args(argv)
    if chosen.recipe and chosen.config:
        raise ValueError("--recipe and --config both give defaults; leave one out")
    if not (chosen.recipe or chosen.config) and not {"-h", "--help"} & set(rest):
        raise ValueError(f"say what {purpose}: --recipe NAME (`patchmill recipes` lists them) or --config FILE")
    return from_toml(chosen.config) if chosen.config else get_recipe(chosen.recipe or "mae-vit-b16"), rest


def parse(argv: list[str]) -> PretrainConfig:
    """The config of a command line: recipe or file, then options. Raises ValueError for what cannot be right."""
    default, rest = split_defaults(argv, "to train")
    config = tyro.cli(
        PretrainConfig,
        prog="patchmill pretrain",
        description=EXAMPLE,
        default=default,
        args=rest,
    )
    if not config.data.path:
        raise ValueError("no data: give --data.path DIR, a folder that `patchmill shard` wrote")
    if not config.out:
        raise ValueError("nowhere to write: give --out DIR, the folder of the run")
    return config


def run(config: PretrainConfig) -> Summary | None:
    """Pretrains under a progress bar and writes loss.png; None on every rank but the first."""
    console = Console(stderr=True)
    with Bar(
        TextColumn("[bold]step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[line]}", table_column=Column(no_wrap=False)),  # this one gives way when narrow
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
        console=console,
        disable=not _is_first(),
    ) as bar:
        task = bar.add_task("pretrain", total=None, line="starting")

        def draw(progress: Progress) -> None:
            line = _line(progress.latest, progress.evaluation) if progress.latest else "starting"
            bar.update(task, completed=progress.step, total=progress.total_steps, line=line)

        summary = pretrain(config, draw)
    if not _is_first():
        return None
    lines = read_metrics(summary.run)
    if lines:
        evaluations = summary.run / EVALUATIONS
        found = read_lines(evaluations) if evaluations.exists() else []
        write_loss_curve(lines, summary.run / "loss.png", found)
    if (summary.run / SPECTRA).exists():
        write_spectra(
            _stages(read_lines(summary.run / SPECTRA)), summary.run / "spectra.png", SPECTRA_TITLE, in_order=True
        )
    return summary


def _stages(lines: list[dict]) -> list[tuple[str, Spectrum]]:
    """Spectra of spectra.jsonl for the picture: the first, the last, and some between."""
    count = min(STAGES, len(lines))
    chosen = [lines[round(i * (len(lines) - 1) / max(count - 1, 1))] for i in range(count)]
    return [
        (f"step {line['step']:,}", Spectrum(line["effective_rank"], line["singular_values"], line["images"]))
        for line in chosen
        if line["singular_values"]
    ]


def report(summary: Summary) -> None:
    """Prints how the run ended and where everything lies."""
    for path, reason in summary.damaged:
        print(f"passed over damaged checkpoint {path}: {reason}", file=sys.stderr)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    how = f"stopped by {summary.interrupted}" if summary.interrupted else "complete"
    table.add_row("run", f"{summary.step} of {summary.total_steps} steps, {how}")
    if summary.began_from:
        table.add_row("began from", summary.began_from)
    if summary.resumed_from:
        table.add_row("resumed from", str(summary.resumed_from))
    last = summary.latest
    if last:
        table.add_row("loss", f"{last['loss']:.4f}")
        table.add_row("speed", f"{last['images_per_s']:.1f} images/s, data wait {last['data_wait']:.1%}")
    if "mfu" in last:
        table.add_row("MFU", f"{last['mfu']:.1%}")
    if summary.evaluation:
        values = summary.evaluation
        top1 = f"kNN {values['knn_top1']:.1%}, linear probe {values['probe_top1']:.1%} top-1"
        table.add_row("features", f"{top1} at step {values['step']:,}, see {summary.run / EVALUATIONS}")
    if summary.skipped_updates:
        table.add_row("left out", f"{summary.skipped_updates} updates, listed in {summary.run / 'skipped.jsonl'}")
    if summary.bad_samples:
        table.add_row("bad images", f"{summary.bad_samples}, listed in {summary.run / 'quarantine.jsonl'}")
    table.add_row("metrics", str(summary.run / "metrics.jsonl"))
    table.add_row("loss curve", str(summary.run / "loss.png"))
    table.add_row("checkpoint", str(summary.run / "checkpoints" / f"step-{summary.step:08d}"))
    Console().print(table)
    if summary.interrupted:
        print("the same command continues this run")


def _line(latest: dict[str, float], evaluation: dict[str, float]) -> str:
    text = f"loss {latest['loss']:.4f}  lr {latest['lr']:.2e}  {latest['images_per_s']:,.0f} images/s"
    text += f"  data wait {latest['data_wait']:.1%}"
    text += f"  MFU {latest['mfu']:.1%}" if "mfu" in latest else ""
    return text + (f"  kNN {evaluation['knn_top1']:.1%}" if evaluation else "")


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    sys.exit(cli.run("pretrain", sys.argv[1:]))
