"""Five planted bottlenecks, each far slower than all else: the verdict names it."""

import json
import os
import time

import pytest
import torch

from patchmill.pipeline.decode import cpu as decode_cpu
from patchmill.pipeline.loader import BatchMaker
from patchmill.pipeline.read.image import decode_image
from patchmill.tools.profiler.bottleneck import FRONT, STEP, THREADS, judge
from patchmill.tools.profiler.loader import measure_loader
from patchmill.tools.profiler.loader_bound import loader_model
from patchmill.tools.profiler.remedies import remedies
from patchmill.tools.profiler.train import judge_train, measure_train
from patchmill.trainer.engine.step import Guard
from patchmill.trainer.model.mae import MaskedAutoencoder
from patchmill.trainer.recipes.pretrain import get_recipe, with_options
from tests.support.photos import make_dataset
from tests.support.ranks import next_world, run_ranks

CPU = torch.device("cpu")
SECONDS = 0.3


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"), count=24)


def config(dataset, out, *, workers=2, batch=4):
    return with_options(
        get_recipe("mae-tiny"),
        model__image_size=32, model__embed_dim=32, model__depth=1, model__num_heads=2, model__decoder_embed_dim=16,
        model__decoder_num_heads=2, data__path=str(dataset), data__decoder="cpu", data__workers=workers,
        train__global_batch=batch, train__tensorboard=False, device="cpu", out=str(out),
    )  # fmt: skip


def slowly(function, seconds):
    """The function, after a sleep."""

    def slow(*args, **options):
        time.sleep(seconds)
        return function(*args, **options)

    return slow


def loader_verdict(config):
    return judge(loader_model(measure_loader(config, CPU, SECONDS)))


def test_a_throttled_disk(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pread", slowly(os.pread, 0.015))
    profile = measure_loader(config(dataset, tmp_path), CPU, SECONDS)
    verdict = judge(loader_model(profile))
    assert (verdict.stage, verdict.resource) == ("storage", THREADS)
    assert "storage binds the loader" in verdict.sentence
    assert profile["storage"]["cold"]["p50_ms"] >= 15
    assert "reads that never wait" in [remedy.title for remedy in remedies(loader_model(profile), [], repeats=1)]


def test_one_decode_thread(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(decode_cpu, "decode_image", slowly(decode_image, 0.015))
    model = loader_model(measure_loader(config(dataset, tmp_path, workers=1), CPU, SECONDS))
    verdict = judge(model)
    assert (verdict.stage, verdict.resource) == ("decode", THREADS)
    assert "--data.workers 4" in [remedy.how for remedy in remedies(model, [], repeats=1)]


def test_a_slow_host_copy(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(BatchMaker, "_to_device", slowly(BatchMaker._to_device, 0.03))
    verdict = loader_verdict(config(dataset, tmp_path))
    assert (verdict.stage, verdict.resource) == ("host copy", FRONT)


def test_a_slow_step(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(Guard, "skip", slowly(Guard.skip, 0.1))
    train = measure_train(config(dataset, tmp_path), CPU, SECONDS)
    assert judge_train(train, None).stage == STEP
    assert train["data_wait"] < 0.5 < train["update_share"]


def slow_rank(rank, dataset, out):
    """What each of two ranks runs."""
    next_world()
    if rank == 1:
        forward = MaskedAutoencoder.forward
        MaskedAutoencoder.forward = slowly(forward, 0.2)  # type: ignore[method-assign]
    train = measure_train(config(dataset, out), CPU, SECONDS)
    if rank == 0:
        verdict = judge_train(train, None)
        out.joinpath("verdict.json").write_text(json.dumps([verdict.stage, verdict.sentence]))


def test_a_straggling_rank(dataset, tmp_path):
    run_ranks(2, 1, slow_rank, dataset, tmp_path)
    stage, sentence = json.loads(tmp_path.joinpath("verdict.json").read_text())
    assert stage == "rank 1"
    assert "most of it in its forward pass" in sentence
