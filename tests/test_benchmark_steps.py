"""What the step benchmarks rest on: a captured step keeps its tensors, shapes are right."""

import contextlib
import gc
import math
import weakref

import pytest
import torch
from torch import nn

from benchmarks.attention_shapes import attention_facts, attention_shapes
from benchmarks.bench_ceilings import attention_error
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
