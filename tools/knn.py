"""Classifies labelled images by their nearest neighbours in a checkpoint's feature space."""

import sys
from pathlib import Path

from patchmill.tools import cli
from patchmill.tools.console.options import parse
from patchmill.tools.console.progress import is_first
from patchmill.tools.console.report import print_results
from patchmill.trainer.config.evaluate import KnnConfig
from patchmill.trainer.engine.world import joined_world
from patchmill.trainer.evaluate.encoder_source import default_out, open_subject
from patchmill.trainer.evaluate.knn import run_knn
from patchmill.trainer.evaluate.labelled import open_labelled
from patchmill.trainer.evaluate.report import common_results, open_folder, write_scores


def main(argv: list[str]) -> int:
    """Runs the command."""
    config = parse(KnnConfig, "patchmill knn", argv)
    test = open_labelled(config.test.path, "test.path")
    subject = open_subject(config.subject, config.seed)
    run = Path(config.out) if config.out else default_out(subject.file, "knn", subject.start)
    with joined_world(config.device) as world:
        open_folder(run, config, world)
        scores = run_knn(config, subject, world)
    first = scores[config.neighbours[0]]
    results = common_results("knn", subject, config.seed, test, first)
    results |= {"pool": config.pool, "by_neighbours": {str(k): each.plain() for k, each in scores.items()}}
    if is_first():
        write_scores(run, results, first, test.classes)
        print_results(run, results)
        others = ", ".join(f"k {k}: {each.top1:.2%}" for k, each in scores.items())
        print(f"by number of neighbours: {others}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run("knn", sys.argv[1:]))
