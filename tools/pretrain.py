"""Pretrains a model from a recipe and options, with a progress bar and a summary.

trainer/pretrain.py does the work; this file shows it.
"""

import sys

from patchmill.tools import cli
from patchmill.tools.console.pretrain_options import parse_pretrain
from patchmill.tools.console.progress import is_first, progress_bar
from patchmill.tools.console.report import fact_table, show
from patchmill.trainer.config.pretrain import PretrainConfig
from patchmill.trainer.draw.charts import write_loss_curve, write_spectra
from patchmill.trainer.evaluate.spectrum import Spectrum
from patchmill.trainer.loop import Progress
from patchmill.trainer.metrics import EVALUATIONS, SPECTRA, read_lines, read_metrics
from patchmill.trainer.pretrain import Summary, pretrain

STAGES = 6
"""spectra in spectra.png, evenly spaced over the run"""
SPECTRA_TITLE = "Spectrum of a training batch's class tokens"


def main(argv: list[str]) -> int:
    """Runs the command; returns 0 when the run completed or was stopped by a signal."""
    summary = run(parse_pretrain(argv))
    if summary is None:
        return 0
    report(summary)
    return 0


def run(config: PretrainConfig) -> Summary | None:
    """Pretrains under a progress bar and writes loss.png; None on every rank but the first."""
    with progress_bar() as bar:
        task = bar.add_task("step", total=None, line="starting")

        def draw(progress: Progress) -> None:
            line = _line(progress.latest, progress.evaluation) if progress.latest else "starting"
            bar.update(task, completed=progress.step, total=progress.total_steps, line=line)

        summary = pretrain(config, draw)
    if not is_first():
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
    """The spectra to draw: the first, the last, and some in between."""
    count = min(STAGES, len(lines))
    chosen = [lines[round(i * (len(lines) - 1) / max(count - 1, 1))] for i in range(count)]
    return [
        (f"step {line['step']:,}", Spectrum(line["effective_rank"], line["singular_values"], line["images"]))
        for line in chosen
        if line["singular_values"]
    ]


def report(summary: Summary) -> None:
    """Prints how the run ended and where its files are."""
    for path, reason in summary.damaged:
        print(f"skipped the damaged checkpoint {path}: {reason}", file=sys.stderr)
    table = fact_table()
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
    table.add_row("attention", summary.attention)
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
    show(table)
    if summary.interrupted:
        print("the same command continues this run")


def _line(latest: dict[str, float], evaluation: dict[str, float]) -> str:
    text = f"loss {latest['loss']:.4f}  lr {latest['lr']:.2e}  {latest['images_per_s']:,.0f} images/s"
    text += f"  data wait {latest['data_wait']:.1%}"
    text += f"  MFU {latest['mfu']:.1%}" if "mfu" in latest else ""
    return text + (f"  kNN {evaluation['knn_top1']:.1%}" if evaluation else "")


if __name__ == "__main__":
    sys.exit(cli.run("pretrain", sys.argv[1:]))
