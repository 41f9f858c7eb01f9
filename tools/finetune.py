"""Fine-tunes a checkpoint's encoder as a classifier: whole, its last blocks, or from random weights."""

import sys
from pathlib import Path

from patchmill.tools import cli
from patchmill.tools.console.options import parse_with_recipes, split_off
from patchmill.tools.console.progress import fit_bar, is_first
from patchmill.tools.console.report import print_report
from patchmill.trainer.config.evaluate import FinetuneConfig
from patchmill.trainer.draw.charts import write_sweep
from patchmill.trainer.evaluate.finetune import finetune, sweep
from patchmill.trainer.evaluate.fit import Progress
from patchmill.trainer.evaluate.report import Report
from patchmill.trainer.recipes.evaluate import FINETUNE_RECIPES

TEXT = """\
Trains encoder and classifier on labelled shards, as published; or only the last blocks, or from random weights.

  patchmill finetune --recipe finetune-vit-b16 --subject.checkpoint runs/b16 --data.path train/ --test.path val/
  patchmill finetune --subject.checkpoint runs/b16 --partial 0 0.5 1 2 4 6 12 --data.path train/ --test.path val/
  patchmill finetune --recipe scratch-vit-b16 --data.path train/ --test.path val/ --out runs/scratch
  torchrun --nproc-per-node 8 -m patchmill finetune --subject.checkpoint runs/b16 --data.path train/ ...

--recipe NAME ({names}; without one {default}) or --config FILE (config.toml of a run) gives the defaults below.
--partial N ... fine-tunes the last N blocks for each N (Figure 9; 0.5: the MLP of the last one, 0: last norm and head).
The same command continues a stopped run. Results go to RUN/finetune (RUN/partial), or to --out.
"""


def main(argv: list[str]) -> int:
    """Runs the command; returns 0 when training completed or was stopped by a signal."""
    chosen, rest = split_off(argv, partial={"nargs": "+"})
    config = parse_with_recipes(FinetuneConfig, "patchmill finetune", rest, FINETUNE_RECIPES, text=TEXT)
    if chosen.partial:
        return _sweep(config, _blocks(chosen.partial))
    with fit_bar("fine-tune") as draw:
        report = finetune(config, draw)
    print_report(report)
    return 0


def _blocks(values: list[str]) -> list[float]:
    try:
        return sorted({float(value) for value in values})
    except ValueError:
        raise ValueError(f"--partial {' '.join(values)}: give numbers of blocks, such as 0 0.5 1 2 4") from None


def _sweep(config: FinetuneConfig, blocks: list[float]) -> int:
    with fit_bar("partial") as draw:

        def shown(number: float, progress: Progress) -> None:
            done = blocks.index(number) * progress.total_steps
            draw(Progress(done + progress.step, len(blocks) * progress.total_steps, progress.history))

        reports = sweep(config, blocks, shown)
    for report in reports:
        print_report(report)
    finished = [report for report in reports if not report.interrupted]
    if finished and is_first():
        print(f"figure: {_draw(finished)}")
    return 0


def _draw(reports: list[Report]) -> Path:
    """Writes sweep.png next to the runs' folders."""
    points = [(float(report.run.name.removeprefix("blocks-")), report.results["top1"]) for report in reports]
    path = reports[0].run.parent / "sweep.png"
    write_sweep({reports[0].results["start"]: points}, path)
    return path


if __name__ == "__main__":
    sys.exit(cli.run("finetune", sys.argv[1:]))
