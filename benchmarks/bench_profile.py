"""Checks what `patchmill profile` predicts: `python -m benchmarks.bench_profile IMAGES`.

IMAGES is a folder or a .zip of JPEGs. Remedies: profiles the loader, applies each remedy, and measures it against the
loader as it was, both in turn; a prediction is good when the two gains are within 25 %. CPU time counts as well as the
clock, because the machine may be shared: all remedies but the second thread change the work, which CPU time measures.
Meters: the training loop with and without its own metrics, in blocks that take turns, and the time inside their calls.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.bench_loader import prepare
from benchmarks.pages import results_folder
from patchmill.tools.packing.listing import list_folder
from patchmill.tools.packing.normalise import Policy
from patchmill.tools.packing.pack_dataset import pack_dataset
from patchmill.tools.packing.plan import PackOptions
from patchmill.tools.profiler.loader import consume, measure_loader
from patchmill.tools.profiler.loader_bound import loader_model
from patchmill.tools.profiler.machine import commit, processor, today, versions
from patchmill.tools.profiler.remedies import measure_trials, remedies
from patchmill.tools.profiler.spans import open_loader
from patchmill.tools.profiler.step import measure_step
from patchmill.tools.profiler.timing import Neighbours
from patchmill.tools.profiler.train import measure_train
from patchmill.trainer.config.pretrain import PretrainConfig
from patchmill.trainer.engine.world import World, hold_memory
from patchmill.trainer.flops import train_flops_per_image
from patchmill.trainer.metrics import Metrics, mask_token_norm
from patchmill.trainer.pretrain import build_trainee
from patchmill.trainer.recipes.pretrain import get_recipe, with_options

CPU = torch.device("cpu")
BATCH = 32
SMALLER = Policy(resize="shorter-side", size=256)
WITHIN = 1.25
BLOCK_STEPS = 10  # of the loop between two log lines, as recipes have it


class Outcome(NamedTuple):
    """A remedy as predicted and as measured."""

    name: str
    how: str
    predicted: float
    wall: list[float]
    """gain of each round, by the clock"""
    cpu: list[float]
    """by CPU time"""


def loader_config(shards: Path, out: Path, workers: int) -> PretrainConfig:
    """The loader of ViT-B/16's recipe on the CPU."""
    return with_options(
        get_recipe("mae-vit-b16"), data__path=str(shards), data__decoder="cpu", data__workers=workers,
        train__global_batch=BATCH, out=str(out), device="cpu",
    )  # fmt: skip


def try_remedies(data: Path, seconds: float, rounds: int) -> list[Outcome]:
    """Profiles the loader with one thread and with one for each core, and tries what the profiles propose."""
    full, small = data / "shards", data / "small"
    pack_dataset(list_folder(data / "images"), small, PackOptions(shard_size_mb=16, policy=SMALLER))
    cores = len(os.sched_getaffinity(0))
    outcomes = []
    for workers, hows in (
        (1, {f"--data.workers {max(2, cores)}": {"data__workers": max(2, cores)}}),
        (
            cores,
            {
                "patchmill shard --resize shorter-side --size 256": {"data__path": str(small)},
                "--data.repeats 2": {"data__repeats": 2},
                "--data.interpolation bilinear": {"data__interpolation": "bilinear"},
            },
        ),
    ):
        config = loader_config(full, data, workers)
        model = loader_model(measure_loader(config, CPU, 6 * seconds))
        proposed = {each.how: each for each in remedies(model, measure_trials(config, CPU, 2 * seconds), 1)}
        for how, changes in hows.items():
            if how in proposed:
                wall, cpu = gains(config, with_options(config, **changes), seconds, rounds)
                outcomes.append(Outcome(proposed[how].title, how, proposed[how].gain, wall, cpu))
                print(outcomes[-1], flush=True)
    return outcomes


def gains(now: PretrainConfig, then: PretrainConfig, seconds: float, rounds: int) -> tuple[list[float], list[float]]:
    """Images per second after a change over those before, of each round: by the clock, and by CPU time."""
    wall, cpu = [], []
    for _ in range(rounds):
        rates = []
        for config in (now, then):
            with open_loader(config, CPU) as loader:
                found = consume(loader, seconds)
            images = BATCH * len(found.seconds)
            rates.append((images / sum(found.seconds), images / found.around.own))
        wall.append(rates[1][0] / rates[0][0])
        cpu.append(rates[1][1] / rates[0][1])
    return wall, cpu


def try_precision(seconds: float) -> Outcome:
    """bf16 in a step that was measured in fp32 (a third of ViT-B/16's blocks): a trial, then a profile of its own."""
    config = with_options(
        get_recipe("mae-vit-b16"), model__depth=4, model__decoder_depth=3, train__global_batch=8,
        train__precision="fp32", device="cpu",
    )  # fmt: skip
    before = measure_step(config, CPU, seconds, None)
    trial = next((trial for trial in before["trials"] if "bf16" in trial.how), None)
    if trial is None:
        raise SystemExit("bf16 was not tried, since a step took too long: run this on a freer machine")
    after = measure_step(with_options(config, train__precision="bf16"), CPU, seconds, None)
    wall = before["seconds"]["median"] / after["seconds"]["median"]
    cpu = before["cpu_seconds"] / after["cpu_seconds"]
    return Outcome(trial.title + " (step)", trial.how, 1 / trial.factors["step"], [wall], [cpu])


class Meters(NamedTuple):
    """What measuring itself costs a run."""

    difference: float
    """of CPU seconds a step, metered over plain: median over pairs of neighbouring blocks"""
    error: float
    """standard error of that"""
    inside: float
    """share of the wall time inside the meters' calls"""
    step_ms: float


def try_meters(shards: Path, out: Path, blocks: int, tensorboard: bool) -> Meters:
    """mae-tiny's loop, blocks with and without meters in turn; also timed inside."""
    config = with_options(get_recipe("mae-tiny"), data__path=str(shards), out=str(out), device="cpu")
    hold_memory()
    world = World(0, 1, CPU)
    metrics = Metrics(
        out, world, global_batch=config.train.global_batch, wandb=None, tensorboard=tensorboard,
        flops_per_image=train_flops_per_image(config.model, config.mask),
    )  # fmt: skip
    ratios, inside, total, step = [], 0.0, 0.0, 0
    with open_loader(config, CPU) as loader:
        trainee = build_trainee(config, world)
        for number in range(blocks + 1):
            used: dict[bool, float] = {}
            for metered in (True, False) if number % 2 else (False, True):
                start, cpu = time.perf_counter(), time.process_time()
                metrics.start(loader.waits)
                for _ in range(BLOCK_STEPS):
                    batch = next(loader)
                    values = trainee.update(batch)
                    step += 1
                    if metered:
                        begun = time.perf_counter()
                        metrics.add(step, 0.0, 0.0, values, batch.sample_ids)
                        inside += (time.perf_counter() - begun) * bool(number)
                if metered:
                    begun = time.perf_counter()
                    metrics.flush(loader.waits, **mask_token_norm(trainee.model))
                    inside += (time.perf_counter() - begun) * bool(number)
                    total += (time.perf_counter() - start) * bool(number)
                used[metered] = time.process_time() - cpu
            if number:  # the first pair is the warm-up
                ratios.append(used[True] / used[False] - 1)
    metrics.close()
    error = statistics.stdev(ratios) / len(ratios) ** 0.5
    return Meters(statistics.median(ratios), error, inside / total, 1e3 * total / blocks / BLOCK_STEPS)


def page(arguments: argparse.Namespace, outcomes: list[Outcome], lines: list[str], others: float) -> str:
    """The result as Markdown."""
    rows = []
    for each in outcomes:
        wall, cpu = statistics.median(each.wall), statistics.median(each.cpu)
        off = [f"{each.predicted / found - 1:+.0%}" for found in (wall, cpu)]
        spread = f"{min(each.wall):.2f} to {max(each.wall):.2f}"
        rows.append(
            f"| {each.name} | `{each.how}` | {each.predicted:.2f} | {wall:.2f} ({spread}) | {off[0]} | {cpu:.2f} | "
            f"{off[1]} |"
        )
    return "\n".join(
        [
            "# Is `patchmill profile` right?",
            "",
            f"`python -m benchmarks.bench_profile {Path(arguments.source).name} --seconds {arguments.seconds:g} "
            f"--rounds {arguments.rounds} --blocks {arguments.blocks}`",
            "",
            f"Commit {commit()}, {today()}. {processor()}, {len(os.sched_getaffinity(0))} cores, "
            f"{torch.get_num_threads()} threads of torch; {versions('torch', 'numpy', 'simplejpeg')}.",
            f"Other programs took {others:.1f} cores on average meanwhile.",
            "",
            "| remedy | how | predicted gain | measured by the clock (rounds) | off | measured by CPU time | off |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
            *rows,
            "",
            *lines,
            "",
        ]
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder or .zip of JPEGs")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--blocks", type=int, default=40, help="pairs of blocks of ten steps, for the meters")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Neighbours() as around:
        data = Path(folder)
        prepare(Path(arguments.source), data)
        outcomes = [*try_remedies(data, arguments.seconds, arguments.rounds), try_precision(12 * arguments.seconds)]
        config = with_options(get_recipe("mae-tiny"), data__path=str(data / "shards"), out=folder, device="cpu")
        step = measure_step(config, CPU, 4 * arguments.seconds, None)
        train = measure_train(config, CPU, 4 * arguments.seconds)
        lines = [
            f"Explained: {step['explained']:.1%} of a profiled step of mae-tiny lies in its parts, "
            f"{train['explained']:.1%} of its training loop in data wait, update and metrics.",
            "",
        ]
        for tensorboard in (True, False):
            meters = try_meters(data / "shards", data, arguments.blocks, tensorboard)
            lines.append(
                f"Meters{' with TensorBoard' if tensorboard else ''}: {meters.inside:.2%} of the time of steps of "
                f"{meters.step_ms:.0f} ms lies inside their calls; CPU seconds a step with them over without: "
                f"{meters.difference:+.2%}, standard error {meters.error:.2%} ({arguments.blocks} pairs).  "
            )
    text = page(arguments, outcomes, lines, around.others)
    print(text)
    (results_folder() / f"profile_cpu_{today()}.md").write_text(text)


if __name__ == "__main__":
    main()
