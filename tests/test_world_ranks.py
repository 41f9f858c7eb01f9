"""Two ranks are one trainer: same losses, same weights, same decisions, whatever shards the model (gloo, CPU)."""

import contextlib
import dataclasses
import json
import time
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch._dynamo.backends.debugging import aot_eager

from patchmill.pipeline.read.manifest import open_dataset
from patchmill.tools import cli
from patchmill.trainer.checkpoints import checkpoint
from patchmill.trainer.engine import world
from patchmill.trainer.engine.world import joined_world
from patchmill.trainer.metrics import read_lines, read_metrics
from patchmill.trainer.model.mae import MAEOutput, MaskedAutoencoder
from patchmill.trainer.pretrain import pretrain
from tests.support.photos import make_dataset
from tests.support.ranks import next_world, run_ranks
from tests.support.small_runs import STEPS, assert_close_runs, losses, twenty_steps, weights

BAD_STEP = 4
NOT_FINITE = {"nan_run": float("nan"), "inf_run": float("inf")}


def train_on_two_ranks(rank, dataset, folder):
    """Everything that needs two ranks, in one go: starting processes is what takes the time."""
    resumed = str(checkpoint.folder(folder / "one", STEPS // 2))
    worlds: dict[str, dict[str, Any]] = {
        "ddp": {},
        "fsdp": {"train__parallel": "fsdp"},
        "hsdp": {"train__parallel": "hsdp", "train__activation_checkpointing": True},
        "ddp_accumulated": {"train__accum_steps": 2},
        "fsdp_clipped": {"train__parallel": "fsdp", "optim__clip_grad": 0.5},
        "ddp_clipped": {"optim__clip_grad": 0.5},
        "one_to_fsdp": {"resume": resumed, "train__parallel": "fsdp"},
        "fsdp_compiled": {"train__parallel": "fsdp", "train__compile": True, "train__picture_every_epochs": 2.0},
        "hsdp_compiled": {"train__parallel": "hsdp", "train__compile": True, "train__activation_checkpointing": True},
        "ddp_bf16": {"train__precision": "bf16"},
        "fsdp_bf16": {
            "train__precision": "bf16",
            "train__parallel": "fsdp",
            "train__picture_every_epochs": 2.0,
            "train__spectrum_every_epochs": 2.0,
        },
        "fsdp_bf16_compiled": {"train__precision": "bf16", "train__parallel": "fsdp", "train__compile": True},
    }
    for name, changes in worlds.items():
        next_world()
        torch.compiler.reset()
        with _watched() as seen:
            pretrain(twenty_steps(dataset, folder / name, **changes))
        (folder / name / f"seen-{rank}.json").write_text(
            json.dumps({what: sorted(each) for what, each in seen.items()})
        )
    for name, value in NOT_FINITE.items():
        next_world()
        _with_a_bad_loss_on_rank_1(rank, twenty_steps(dataset, folder / name), value)


# what FSDP2 calls; the second names are those before torch 2.13
GATHER = next(name for name in ("all_gather_single", "all_gather_into_tensor") if hasattr(dist, name))
REDUCE = next(name for name in ("reduce_scatter_single", "reduce_scatter_tensor") if hasattr(dist, name))


@contextlib.contextmanager
def _watched():
    """Notes the dtypes that FSDP2 sends, and the shapes of what was compiled (traced only: code takes too long)."""
    seen: dict[str, set[str]] = {"gathered": set(), "reduced": set(), "compiled": set()}

    def sending(name, kind):
        send = getattr(dist, name)

        def call(*args, **options):
            sent = options["input"] if "input" in options else args[1]
            seen[kind].add(str(sent.dtype))
            return send(*args, **options)

        return mock.patch.object(dist, name, call)

    def trace(graph, inputs):
        seen["compiled"].add(str([tuple(each.shape) for each in inputs if not isinstance(each, torch.nn.Parameter)]))
        return aot_eager(graph, inputs)

    compile_ = torch.compile

    def traced(function, *, mode, **options):
        assert mode == "default"
        return compile_(function, backend=trace, **options)

    traced_compile = mock.patch.object(torch, "compile", traced)
    with sending(GATHER, "gathered"), sending(REDUCE, "reduced"), traced_compile:
        yield seen


def _with_a_bad_loss_on_rank_1(rank, config, value):
    forward, calls = MaskedAutoencoder.forward, iter(range(1, STEPS + 1))

    def bad_forward(self, images, plan):
        output = forward(self, images, plan)
        if next(calls) == BAD_STEP and rank == 1:
            return MAEOutput(output.loss * value, output.pred, output.latent)
        return output

    MaskedAutoencoder.forward = bad_forward  # type: ignore[method-assign]
    try:
        pretrain(
            dataclasses.replace(config, train=dataclasses.replace(config.train, save_every_steps=1, keep_last=STEPS))
        )
    finally:
        MaskedAutoencoder.forward = forward  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of all runs: one process, one process with accumulation, and those of two ranks."""
    folder = tmp_path_factory.mktemp("runs")
    dataset = make_dataset(tmp_path_factory.mktemp("data"), count=40)
    pretrain(twenty_steps(dataset, folder / "one"))
    pretrain(twenty_steps(dataset, folder / "accumulated", train__accum_steps=4))
    run_ranks(2, 14, train_on_two_ranks, dataset, folder)
    resumed = str(checkpoint.folder(folder / "ddp", STEPS // 2))
    pretrain(twenty_steps(dataset, folder / "ddp_to_one", resume=resumed))
    resumed = str(checkpoint.folder(folder / "fsdp", STEPS // 2))
    pretrain(twenty_steps(dataset, folder / "fsdp_to_one", resume=resumed))
    return folder


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("one", "ddp"),
        ("one", "accumulated"),
        ("ddp", "ddp_accumulated"),
        ("ddp", "fsdp"),
        ("ddp", "hsdp"),
        ("ddp_clipped", "fsdp_clipped"),
        ("one", "ddp_to_one"),
        ("one", "fsdp_to_one"),
        ("one", "one_to_fsdp"),
        ("ddp", "fsdp_compiled"),
        ("ddp", "hsdp_compiled"),
        ("fsdp_bf16", "fsdp_bf16_compiled"),
    ],
)
def test_the_same_run_whatever_carries_it(one, other, runs):
    assert_close_runs(runs / one, runs / other)


def test_sharded_checkpoints_hold_whole_tensors_under_published_names(runs):
    model = MaskedAutoencoder(twenty_steps("", "").model)
    saved = weights(runs / "fsdp")
    assert {name: tensor.shape for name, tensor in saved.items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert checkpoint.load_model(runs / "fsdp")[0].config == model.config


@pytest.mark.parametrize("rank", [0, 1])
def test_blocks_are_compiled_once_for_each_shape_and_evaluated_eagerly(rank, runs):
    """Encoder, decoder, last decoder block; the pictures of a run come from the code that was not compiled."""
    for name in ("fsdp_compiled", "hsdp_compiled", "fsdp_bf16_compiled"):
        assert len(json.loads((runs / name / f"seen-{rank}.json").read_text())["compiled"]) == 3, name
    assert list((runs / "fsdp_compiled" / "pictures").glob("*.png"))


def test_bf16_runs_gather_blocks_in_bf16_and_reduce_in_fp32(runs):
    """The rest of the model is gathered in fp32. Rounding the blocks' norms changed losses by at most 3.4e-4."""
    for name, gathered in (("fsdp", ["torch.float32"]), ("fsdp_bf16", ["torch.bfloat16", "torch.float32"])):
        seen = json.loads((runs / name / "seen-0.json").read_text())
        assert (seen["gathered"], seen["reduced"]) == (gathered, ["torch.float32"])
    ours, theirs = losses(runs / "fsdp_bf16"), losses(runs / "ddp_bf16")
    for step, loss in ours.items():
        assert loss == pytest.approx(theirs[step], rel=2e-3), step
    assert ours != theirs  # norms are rounded
    assert list((runs / "fsdp_bf16" / "pictures").glob("*.png"))  # evaluations without autocast work too
    assert len(read_lines(runs / "fsdp_bf16" / "spectra.jsonl")) == 2


def test_clipping_changes_the_run(runs):
    assert losses(runs / "ddp")[STEPS] != pytest.approx(losses(runs / "ddp_clipped")[STEPS], rel=1e-5)


@pytest.mark.parametrize("name", NOT_FINITE)
def test_a_bad_loss_on_one_rank_makes_all_ranks_skip_that_step_and_no_other(name, runs):
    run = runs / name
    assert [line["step"] for line in read_metrics(run) if line["skipped"]] == [BAD_STEP]
    for file in ("model.safetensors", "optimizer.safetensors"):
        before, after = (load_file(checkpoint.folder(run, step) / file) for step in (BAD_STEP - 1, BAD_STEP))
        assert all(torch.equal(before[name], after[name]) for name in before), file
    assert not torch.equal(weights(run, BAD_STEP)["mask_token"], weights(run, BAD_STEP + 1)["mask_token"])
    (entry,) = read_lines(run / "skipped.jsonl")
    assert (entry["step"], entry["loss"], entry["ranks"], len(entry["samples"])) == (BAD_STEP, None, [1], 4)
    assert entry["not_finite"] == "loss"
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


def wait_alone(i):
    """Begins three collectives and waits for one of them."""
    with joined_world("cpu", 1.0):
        under_way = [dist.all_reduce(torch.zeros(1), async_op=True) for _ in range(3)]
        under_way[i].wait()


def wait_for_a_rank_that_hangs(rank, done):
    """Rank 1 takes part in nothing; rank 0 has several collectives under way and sees the error of each in turn."""
    world.LAST_WORDS_SECONDS = 0.5
    for i in range(3):
        next_world()
        if rank == 0:
            with pytest.raises(ConnectionError, match=r"^rank 1 of 2 died or did not answer for 1 s"):
                wait_alone(i)
            (done / str(i)).touch()
        else:
            with joined_world("cpu", 60.0):
                while not (done / str(i)).exists():
                    time.sleep(0.05)


def test_a_rank_that_hangs_is_named_whichever_collective_notices(tmp_path):
    run_ranks(2, 3, wait_for_a_rank_that_hangs, tmp_path)


def pretrain_on_other_data(rank, datasets, folder):
    """The command on two ranks, whose data differ."""
    next_world()
    options = "--recipe mae-tiny --device cpu --model.image-size 32 --train.global-batch 8 --train.total-steps 2"
    places = ["--data.path", str(datasets[rank]), "--out", str(folder / "run")]
    with open(folder / f"{rank}.txt", "w", encoding="utf-8") as told, contextlib.redirect_stderr(told):
        assert cli.run("pretrain", [*options.split(), *places]) == 2


def test_ranks_with_different_data_stop_with_one_error_on_each(tmp_path):
    datasets = [make_dataset(tmp_path / str(rank), count=16 + rank) for rank in range(2)]
    run_ranks(2, 1, pretrain_on_other_data, datasets, tmp_path)
    first, second = (open_dataset(dataset).manifest.fingerprint() for dataset in datasets)
    for rank in range(2):
        told = (tmp_path / f"{rank}.txt").read_text()
        assert f"error: the ranks do not agree (dataset: {first} on rank 0, {second} on rank 1): give" in told
    assert not (tmp_path / "run" / "config.toml").exists()
