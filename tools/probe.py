"""Trains a linear classifier on a checkpoint's frozen features and tests it."""

import sys

from patchmill.tools import cli
from patchmill.tools.console.options import parse_with_recipes
from patchmill.tools.console.progress import fit_bar
from patchmill.tools.console.report import print_report
from patchmill.trainer.config.evaluate import ProbeConfig
from patchmill.trainer.evaluate.probe import probe
from patchmill.trainer.recipes.evaluate import PROBE_RECIPES

TEXT = """\
Trains a linear classifier on frozen features, as published (class token, BatchNorm without affine, LARS).

  patchmill probe --subject.checkpoint runs/b16 --data.path train/ --test.path val/
  patchmill probe --recipe probe-cifar-nano --subject.checkpoint runs/nano --data.path train/ --test.path test/
  patchmill probe --subject.checkpoint runs/b16 --subject.random-init --data.path train/ --test.path val/
  torchrun --nproc-per-node 8 -m patchmill probe --subject.checkpoint runs/b16 --data.path train/ --test.path val/

--recipe NAME ({names}; without one {default}) or --config FILE (config.toml of a run) gives the defaults below.
The same command continues a stopped run. Results go to RUN/probe, or to --out.
"""


def main(argv: list[str]) -> int:
    """Runs the command; returns 0 when training completed or was stopped by a signal."""
    config = parse_with_recipes(ProbeConfig, "patchmill probe", argv, PROBE_RECIPES, text=TEXT)
    with fit_bar("probe") as draw:
        report = probe(config, draw)
    print_report(report)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run("probe", sys.argv[1:]))
