"""What the step benchmarks rest on: a captured step keeps its tensors, waits are the device's, shapes are right."""

import contextlib
import gc
import math
import weakref

import pytest
import torch
from torch import nn

from benchmarks.attention_shapes import attention_facts, attention_shapes
from benchmarks.bench_ceilings import attention_error
from benchmarks.bench_dali_gpu import Waits
from benchmarks.steps import Captured
from patchmill.trainer.config.model import ModelConfig


class FakeGraph:
    """Runs nothing when it is captured, as a CUDA graph does, and counts its replays."""

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


class FakeStream:
    def wait_stream(self, other: "FakeStream") -> None: ...


@pytest.fixture
def fake_cuda(monkeypatch):
    """The calls of torch.cuda that a capture makes, without a device."""
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: contextlib.nullcontext())


def trained_step() -> tuple[object, list[weakref.ref]]:
    """A step over tensors that only it knows, and references that do not keep them alive."""
    model, images = nn.Linear(4, 4), torch.randn(8, 4)
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> torch.Tensor:
        loss = model(images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    step()
    moments = [state["exp_avg"] for state in optimizer.state.values()]
    return step, [weakref.ref(each) for each in (*model.parameters(), *moments, images)]


@pytest.mark.usefixtures("fake_cuda")
def test_a_captured_step_keeps_what_its_graph_reads_and_writes():
    step, references = trained_step()
    captured = Captured(step)  # type: ignore[arg-type]
    del step
    gc.collect()
    assert all(reference() is not None for reference in references)
    values = [captured(), captured()]
    assert captured.graph.replays == 2  # type: ignore[attr-defined]
    assert all(value is captured.values for value in values)
    del captured, values
    gc.collect()
    assert all(reference() is None for reference in references)  # nothing else held them


class FakeEvent:
    """Time at which a simulated stream reaches it."""

    def __init__(self, stream: "Simulated") -> None:
        self.stream = stream

    def record(self) -> None:
        self.at = self.stream.device_time

    def elapsed_time(self, other: "FakeEvent") -> float:
        return (other.at - self.at) * 1e3


class Simulated:
    """A device and a loader whose batch k is ready after `ready[k]` s: the host waits for it, or the stream."""

    def __init__(self, ready: list[float], host_waits: bool) -> None:
        self.ready, self.host_waits = iter(ready), host_waits
        self.host_time = self.device_time = 0.0

    def __next__(self) -> str:
        ready = next(self.ready)
        if self.host_waits:
            self.host_time = max(self.host_time, ready)
        self.device_time = max(self.device_time, ready)
        return "batch"

    def step(self, seconds: float) -> None:
        self.device_time = max(self.device_time, self.host_time) + seconds


@pytest.mark.parametrize("host_waits", [True, False])
def test_data_wait_is_idle_time_of_the_device(host_waits, monkeypatch):
    """Steps of 1 s; the third batch comes half a second late. The host blocks in `next` for far longer."""
    world = Simulated([0.0, 0.9, 2.5, 3.4], host_waits)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: FakeEvent(world))
    monkeypatch.setattr("benchmarks.bench_dali_gpu.timing.wait_for", lambda device: None)
    monkeypatch.setattr("benchmarks.bench_dali_gpu.time.perf_counter", lambda: world.host_time)
    waits = Waits(world, torch.device("cuda"))  # type: ignore[arg-type]
    for _ in range(4):
        waits.next()
        world.step(1.0)
    assert waits.device_seconds() == pytest.approx(0.5)
    assert waits.host_seconds == pytest.approx(3.4 if host_waits else 0.0)
    assert Waits(iter([]), torch.device("cpu")).device_seconds() == 0.0  # type: ignore[arg-type]


def test_shapes_of_attention_are_those_of_the_model():
    shapes = {shape.name: shape[1:] for shape in attention_shapes(ModelConfig())}
    assert shapes == {
        "encoder": (50, 50, 12, 64),
        "decoder": (197, 197, 16, 32),
        "last decoder block": (147, 197, 16, 32),
    }
    facts = attention_facts(ModelConfig(image_size=64), 2, "cpu", torch.bfloat16)
    choice = facts["SDPA, torch's choice"]
    assert choice.count("attention") + choice.count("math") == 3
    assert "math" in facts["SDPA, enabled"]
    assert facts["SDPA, the model's choice"].count("products") == 3


def test_a_wrong_backend_shows_in_its_error(monkeypatch):
    shape = attention_shapes(ModelConfig(image_size=64))[0]
    assert 0 < attention_error("math", shape, "cpu", torch.bfloat16) < 1e-2
    right = torch.nn.functional.scaled_dot_product_attention

    def wrong(q, k, v):
        return right(q, k, v) * torch.where(torch.arange(q.shape[2]) == 0, math.nan, 1.0)[:, None].to(q.dtype)

    monkeypatch.setattr("benchmarks.bench_ceilings.F.scaled_dot_product_attention", wrong)
    assert math.isnan(attention_error("math", shape, "cpu", torch.bfloat16))
