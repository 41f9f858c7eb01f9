"""Profiles a run (`patchmill profile`): where its time goes, what binds it and what would help, in two minutes.

The measuring modes are profiler/{loader,step,train,kernels}.py. The verdict is arithmetic on their numbers
(bottleneck.py, loader_bound.py, remedies.py); tables.py, charts.py and page.py show it.
"""

import dataclasses
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from patchmill import __version__
from patchmill.pipeline.atomic import whole_file
from patchmill.pipeline.read.manifest import MANIFEST_NAME
from patchmill.tools import cli
from patchmill.tools.console.options import parse, require_data
from patchmill.tools.console.pretrain_options import split_pretrain
from patchmill.tools.console.progress import is_first
from patchmill.tools.profiler import diff as profile_diff
from patchmill.tools.profiler import report as profile_report
from patchmill.tools.profiler import tables as profile_tables
from patchmill.tools.profiler.bottleneck import CORES, Model, judge
from patchmill.tools.profiler.charts import write_charts
from patchmill.tools.profiler.kernels import measure_kernels
from patchmill.tools.profiler.loader import measure_loader
from patchmill.tools.profiler.loader_bound import loader_model, with_step
from patchmill.tools.profiler.page import page
from patchmill.tools.profiler.remedies import Trial, measure_trials, remedies
from patchmill.tools.profiler.step import fitting_batch, measure_step
from patchmill.tools.profiler.timing import Neighbours, environment
from patchmill.tools.profiler.train import judge_train, measure_train, train_model
from patchmill.tools.profiler.what_if import PlanConfig, predict
from patchmill.trainer.config.pretrain import PretrainConfig
from patchmill.trainer.engine.world import pick_device
from patchmill.trainer.flops import train_flops_per_image
from patchmill.trainer.recipes.pretrain import with_options
from patchmill.trainer.run_folder import STATUS

FOLDER = "profile-report"
NAMED_REMEDIES = 2
"""in the sentence"""
MODES = ("loader", "step", "train", "kernels", "all")
EXAMPLE = """\
Measures a loader, a step, the training loop or our operators, and says what binds, by how much, and what would help.

  patchmill profile loader --recipe mae-vit-b16 --data.path shards/
  patchmill profile all --recipe mae-vit-b16 --data.path shards/ --out before
  patchmill profile all --config runs/b16/config.toml --out after
  patchmill profile loader --recipe mae-vit-l16 --data.path shards/ --plan.gpus 8 --plan.cores 128 --plan.price 2.5
  patchmill profile plan before --gpus 8 --gpu H100 --cores 96 --disk-mb-per-s 3000
  patchmill profile diff before after
  torchrun --nproc-per-node 8 -m patchmill profile train --recipe mae-vit-l16 --data.path shards/

Modes: loader, step, train, kernels, all. --recipe NAME (`patchmill recipes` lists them) or --config FILE gives the
defaults of all options below, which are those of `patchmill pretrain`. Writes report.json, report.html, PNGs and
trace.json.gz (for ui.perfetto.dev) to --out.
"""


@dataclass(frozen=True)
class ProfileConfig:
    """Options of measuring, and of the run that is measured."""

    run: Annotated[PretrainConfig, tyro.conf.arg(name="")] = field(default_factory=PretrainConfig)
    seconds: float = 30.0
    """approximate time that each mode measures, without warm-ups"""
    plan: PlanConfig = field(default_factory=PlanConfig)
    """predicts images/s, hours and cost on another machine: --plan.gpus 8 --plan.cores 128"""
    batch: int | None = None
    """images of one device's step; unset: the recipe's, on a CPU no more than about a second's work"""

    def __post_init__(self) -> None:
        if self.seconds <= 0:
            raise ValueError(f"--seconds is {self.seconds}; it must be positive")
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"--batch is {self.batch}; it must be at least 1")


def main(argv: list[str]) -> int:
    """Runs the command."""
    mode, *rest = argv or ["--help"]
    if mode in ("-h", "--help"):
        parse_profile(["--help"])
    if mode == "diff":
        return profile_diff.show(parse(profile_diff.DiffArgs, "patchmill profile diff", rest))
    if mode == "plan":
        return plan(rest)
    if mode not in MODES:
        raise ValueError(f"profile what? one of {', '.join(MODES)}, plan REPORT or diff A B; got {mode!r}")
    options = parse_profile(rest)
    if mode not in ("step", "kernels"):
        require_data(options.run.data)
    report = measure(mode, options, shlex.join(["patchmill", "profile", mode, *rest]))
    if report is None:
        return 0
    folder = Path(options.run.out)
    if options.plan.gpus:
        report["plan"] = predict(report, options.plan)
    profile_report.write(report, folder)
    charts = write_charts(report, folder)
    with whole_file(folder / "report.html") as path:
        path.write_text(page(report, charts), encoding="utf-8")
    profile_tables.show(report, Console())
    print(f"report: {folder / 'report.html'}")
    return 0


@dataclass(frozen=True)
class PlanArgs:
    """Predicts images/s, GPU-hours and cost on a described machine from the rates of a report.

    Example:
        patchmill profile plan before --gpus 8 --gpu H100 --cores 96 --disk-mb-per-s 3000 --images 1281167 --price 2.5
    """

    report: tyro.conf.Positional[Path]
    """folder or report.json of an earlier `patchmill profile`"""
    machine: Annotated[PlanConfig, tyro.conf.arg(name="")] = field(default_factory=lambda: PlanConfig(gpus=1))


def plan(argv: list[str]) -> int:
    """Runs `patchmill profile plan`."""
    args = parse(PlanArgs, "patchmill profile plan", argv)
    if not args.machine.gpus:
        raise ValueError("--gpus is 0; it must be at least 1")
    report = profile_report.read(args.report)
    profile_tables.show({"plan": predict(report, args.machine)}, Console())
    return 0


def parse_profile(argv: list[str]) -> ProfileConfig:
    """Parses a command line. Raises ValueError for options that cannot work."""
    run, rest = split_pretrain(argv, "to profile")
    default = ProfileConfig(run=dataclasses.replace(run, out=FOLDER))  # never a run's own folder
    return parse(ProfileConfig, "patchmill profile MODE", rest, text=EXAMPLE, default=default)


def measure(mode: str, options: ProfileConfig, command: str) -> dict[str, Any] | None:
    """Measures and judges. Returns the report; None on every rank but the first."""
    device = pick_device(options.run.device)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1 and mode != "train":
        raise ValueError(f"profile {mode} measures one rank: start it without torchrun (only train takes several)")
    config = fitting_batch(options.run, device, options.batch, ranks)
    folder = _folder(Path(config.out))
    whole = with_options(config, train__global_batch=config.train.global_batch * ranks)
    steps: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
        "kernels": ("measuring our operators", lambda: measure_kernels(config, device)),
        "step": ("measuring the step", lambda: measure_step(config, device, options.seconds, folder / "trace.json.gz")),
        "loader": ("measuring the loader", lambda: measure_loader(config, device, options.seconds)),
        "train": ("running the training loop", lambda: measure_train(whole, device, options.seconds)),
    }
    sections: dict[str, Any] = {}
    console = Console(stderr=True, quiet=not is_first())
    with Neighbours() as around:
        for name, (what, run) in steps.items():
            if mode in (name, "all"):
                console.print(f"[dim]{what}")
                sections[name] = run()
        trials = measure_trials(config, device, options.seconds / 6) if "loader" in sections else []
    if not is_first():
        return None
    report = {
        "schema": profile_report.SCHEMA, "mode": mode, "command": command, "patchmill": __version__,
        "machine": environment(str(device)), "noise": around.noise, "device": device.type,
        "flops_per_image": train_flops_per_image(config.model, config.mask), "config": config,
        **sections, **conclude(sections, trials, config, around.noise),
    }  # fmt: skip
    return profile_report.plain(report)


def _folder(out: Path) -> Path:
    """Makes the folder of a report. Raises ValueError where the path is already used for something else."""
    for name, what in ((STATUS, "a run"), (MANIFEST_NAME, "a dataset")):
        if (out / name).exists():
            raise ValueError(f"--out {out} holds {what}; choose another folder for the report")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; choose a folder for the report")
    out.mkdir(parents=True, exist_ok=True)
    return out


def conclude(
    sections: dict[str, Any], trials: list[Trial], config: PretrainConfig, noise: str | None
) -> dict[str, Any]:
    """Returns the model of the stages, the verdict, and the remedies; nothing for operators alone."""
    loader, step, train = (sections.get(name) for name in ("loader", "step", "train"))
    model, measured = Model([], {CORES: float(len(os.sched_getaffinity(0)))}), None
    if loader is not None:
        model, measured = loader_model(loader), loader["together"]["images_per_s"]["median"]
    if step is not None:
        model, measured, trials = with_step(model, step), None, [*trials, *step["trials"]]
    if train is not None and (not model.stages or len(train["ranks"]) > 1):
        model, verdict = train_model(train), judge_train(train, noise)
    elif model.stages:
        verdict = judge(model, noise, train["images_per_s"] / train["world_size"] if train else measured)
    else:
        return {}
    found = remedies(model, trials, config.data.repeats)
    if found:
        best = ", ".join(f"{remedy.title} (x{remedy.gain:.1f})" for remedy in found[:NAMED_REMEDIES])
        verdict = dataclasses.replace(verdict, sentence=f"{verdict.sentence} Would help: {best}.")
    return {"model": {**vars(model), "supplies": model.supplies()}, "verdict": verdict, "remedies": found}


if __name__ == "__main__":
    sys.exit(cli.run("profile", sys.argv[1:]))
