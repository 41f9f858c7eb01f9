"""Data wait is idle time of the device, measured on a simulated device whose host runs ahead."""

import json
import weakref

import pytest
import torch

from patchmill.pipeline.waits import Waited, Waits
from patchmill.trainer.engine.step import StepValues
from patchmill.trainer.engine.world import World
from patchmill.trainer.metrics import Metrics

CUDA = torch.device("cuda")
LAUNCH = 0.01
"""seconds in which the host launches a step"""


class Event:
    """A mark on the simulated stream; `query` compares the times of host and device."""

    def __init__(self, world: "Simulated") -> None:
        self.world, self.at = world, world.device_time
        world.events.add(self)

    def query(self) -> bool:
        return self.at <= self.world.host_time

    def synchronize(self) -> None:
        self.world.host_time = max(self.world.host_time, self.at)

    def elapsed_time(self, end_event: "Event") -> float:
        assert end_event.query(), "CUDA raises for an event that was not reached"
        return (end_event.at - self.at) * 1e3


class Simulated:
    """A host, a device, and batches that are ready after `ready[k]` s: the host waits for them, or the stream does."""

    def __init__(self, ready: list[float], host_waits: bool = True) -> None:
        self.ready, self.host_waits = iter(ready), host_waits
        self.host_time = self.device_time = self.idle = 0.0
        self.events: weakref.WeakSet[Event] = weakref.WeakSet()
        self.waits = Waits(CUDA, mark=self.mark, clock=lambda: self.host_time)

    def mark(self) -> Event:
        self.device_time = max(self.device_time, self.host_time)  # the stream reaches it no sooner than it is recorded
        return Event(self)

    def next(self) -> None:
        with self.waits.waiting():
            ready = next(self.ready)
            self.idle += max(0.0, ready - self.device_time)
            if self.host_waits:
                self.host_time = max(self.host_time, ready)
            self.device_time = max(self.device_time, ready)

    def step(self, seconds: float) -> None:
        self.host_time += LAUNCH
        self.device_time = max(self.device_time, self.host_time) + seconds

    def synchronize(self) -> None:
        self.host_time = max(self.host_time, self.device_time)


def loader_times(batches: int, stalls: dict[int, float]) -> list[float]:
    """When the batches of a loader that needs 90 ms for each are ready, with stalls of some."""
    times, now = list[float](), 0.0
    for number in range(batches):
        now += 0.09 + stalls.get(number, 0.0)
        times.append(now)
    return times


@pytest.mark.parametrize("host_waits", [True, False])
def test_a_late_batch_counts_wherever_it_is_waited_for(host_waits):
    """Steps of 1 s; the third batch comes half a second late. The host blocks in `next` for longer, or not at all."""
    world = Simulated([0.0, 0.9, 2.5 + LAUNCH, 3.4], host_waits)
    for _ in range(4):
        world.next()
        world.step(1.0)
    device, host = world.waits.total()
    assert device == pytest.approx(0.5)
    assert host == pytest.approx(3.4 - 3 * LAUNCH if host_waits else 0.0, abs=2 * LAUNCH)


def test_the_host_runs_ahead_and_the_device_is_hardly_ever_idle():
    """Steps of 100 ms, batches every 90 ms and one that is 400 ms late: the host blocks for four fifths of the time."""
    world = Simulated(loader_times(200, {60: 0.4}))
    for _ in range(200):
        world.next()
        world.step(0.1)
    device, host = world.waits.total()
    assert device == pytest.approx(world.idle)
    assert 0 < device / world.device_time < 0.02
    assert host / world.device_time > 0.7


def test_marks_do_not_pile_up():
    """A consumer that never asks for the sum keeps only the events that the device has not reached."""
    world = Simulated(loader_times(300, {}))
    for _ in range(300):
        world.next()
        world.step(0.05)
        world.synchronize()
    assert len(world.events) <= 4


def test_a_cpu_has_one_figure():
    times = iter([1.0, 3.5])
    waits = Waits(torch.device("cpu"), clock=lambda: next(times))
    with waits.waiting():
        pass
    assert waits.total() == Waited(2.5, 2.5)


def test_metrics_log_both_shares(tmp_path, monkeypatch):
    world = Simulated(loader_times(20, {}))
    monkeypatch.setattr("patchmill.trainer.metrics.time.perf_counter", lambda: world.host_time)
    metrics = Metrics(
        tmp_path, World(0, 1, torch.device("cpu")), global_batch=4, flops_per_image=1.0, tensorboard=False, wandb=None
    )
    world.next()  # the wait for the first batch comes before the clock starts
    metrics.start(world.waits)
    begin, idle = world.host_time, world.idle
    for step in range(1, 20):
        world.step(0.06)
        values = StepValues(*torch.zeros(len(StepValues._fields)))
        metrics.add(step, 0.0, 0.0, values, torch.zeros(4))
        if step < 19:
            world.next()
    world.synchronize()
    took = world.host_time - begin
    metrics.flush(world.waits)
    metrics.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["data_wait"] == pytest.approx((world.idle - idle) / took, abs=1e-4)
    assert line["host_wait"] > line["data_wait"] > 0.2
