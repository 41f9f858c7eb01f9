"""The arithmetic of the verdict on made-up timings: what binds, how much is left, and when it must not say."""

import pytest

from patchmill.tools.profiler.bottleneck import CORES, DEVICE, STEP, STORAGE, THREADS, Model, Stage, judge, straggler

DECODE = Stage("decode", {THREADS: 1.5e-3, CORES: 1.5e-3})
RESIZE = Stage("resize", {THREADS: 0.5e-3, CORES: 0.5e-3})
FAST_STEP = Stage(STEP, {DEVICE: 0.4e-3})


def test_the_worked_example_of_the_docstring():
    model = Model([DECODE, RESIZE, FAST_STEP], {THREADS: 2, CORES: 2, DEVICE: 1})
    assert model.supplies() == pytest.approx({THREADS: 1000, CORES: 1000, DEVICE: 2500})
    verdict = judge(model)
    assert (verdict.stage, verdict.resource) == ("decode", THREADS)
    assert verdict.wanted == pytest.approx(2500)
    assert verdict.share == pytest.approx(0.75)
    assert verdict.headroom == pytest.approx(2.5)
    assert verdict.next_stage == STEP
    assert verdict.sentence.startswith("decode binds: 1,000 of the 2,500 images/s that the step could take (40%); it")


def test_the_slowest_resource_binds_and_not_the_longest_stage():
    """Decode takes longest, but many threads do it; the disk is one."""
    read = Stage("storage", {THREADS: 1e-3, STORAGE: 1e-3})
    model = Model([read, DECODE], {THREADS: 16, CORES: 16, STORAGE: 1})
    assert judge(model).stage == "storage"
    assert judge(model).images_per_s == pytest.approx(1000)


def test_on_a_cpu_step_and_decoding_share_the_cores():
    step = Stage(STEP, {DEVICE: 10e-3, CORES: 20e-3})
    verdict = judge(Model([DECODE, step], {THREADS: 2, CORES: 2, DEVICE: 1}))
    assert (verdict.stage, verdict.resource) == (STEP, CORES)
    assert verdict.images_per_s == pytest.approx(2 / 21.5e-3)
    assert "the step binds: 93.0 images/s; the loader could give 14.3 times as many" in verdict.sentence


def test_two_stages_closer_than_their_spread_are_not_told_apart():
    read = Stage("storage", {STORAGE: 0.95e-3}, spread=0.1)
    one = Model([Stage("decode", {THREADS: 1e-3}, spread=0.02), read], {THREADS: 1, STORAGE: 1})
    assert not judge(one).certain
    assert "Too noisy to tell decode from storage" in judge(one).sentence
    clear = Model([Stage("decode", {THREADS: 2e-3}, spread=0.02), read], {THREADS: 1, STORAGE: 1})
    assert judge(clear).certain
    assert judge(clear, noise="other programs took 1.2 of 2 cores").certain
    assert not judge(Model([DECODE, Stage(STEP, {DEVICE: 1.1e-3})], {THREADS: 1, DEVICE: 1}), noise="busy").certain


def test_a_resource_that_nothing_holds_binds_nothing():
    assert STORAGE not in Model([DECODE], {THREADS: 1, CORES: 1, STORAGE: 1}).supplies()


@pytest.mark.parametrize(
    ("seconds", "rank"),
    [([0.10, 0.11, 0.31, 0.10], 2), ([0.1, 0.11], None), ([0.4, 0.1], 0), ([0.1], None)],
)
def test_stragglers(seconds, rank):
    assert straggler(seconds) == rank


def test_on_a_busy_machine_a_rank_must_be_much_slower():
    assert straggler([0.1, 0.15], noise="busy") is None
    assert straggler([0.1, 0.25], noise="busy") == 1
