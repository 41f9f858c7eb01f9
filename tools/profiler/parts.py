"""Splits one update into the model's parts: seconds forward and backward, FLOPs and bytes, and a trace to look at.

torch.profiler sees operators; people think in parts. While the profiler runs, hooks put each module's forward pass
under its part's name; they are removed afterwards. An operator of the backward pass carries the sequence number of the
forward operator that it differentiates, which gives its part. The guard (gradient norm, decision, average over ranks)
and the optimizer follow the backward pass. The trace (ui.perfetto.dev) has the same ranges.
"""

import gzip
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from patchmill.tools.profiler.timing import wait_for

MARK = "part: "
BACKWARD = "autograd::engine::evaluate_function"
REST = "rest of the model"
OPERATORS = {
    "patchmill::gather_patches": "patch gather",
    "patchmill::unshuffle": "unshuffle",
    "patchmill::masked_loss": "loss",
}
"""our operators that the model calls outside any module"""
PARTS = (
    (r"patch_embed", "patch embed"),
    (r"blocks\.\d+\.attn", "encoder attention"),
    (r"blocks\.\d+\.mlp", "encoder MLP"),
    (r"blocks\.\d+(\.norm\d)?|norm", "encoder norms, residuals"),
    (r"decoder_embed", "decoder embed"),
    (r"decoder_blocks\.\d+\.(attn|cross\w*)", "decoder attention"),
    (r"decoder_blocks\.\d+\.mlp", "decoder MLP"),
    (r"decoder_blocks\.\d+(\.norm\w*)?|decoder_norm", "decoder norms, residuals"),
    (r"decoder_pred|head", "head"),
    (r"target", "loss"),
)
"""name of a module -> part; the first that fits"""


def part_of(module: str) -> str | None:
    """Returns the part that a module is, None for modules inside a part.

    Example: "blocks.3.mlp" -> "encoder MLP"; "blocks.3.mlp.fc1" -> None.
    """
    if not module:
        return REST
    return next((part for pattern, part in PARTS if re.fullmatch(pattern, module)), None)


def take_apart(
    model: nn.Module, step: Callable[[], object], device: torch.device, trace: Path | None, steps: int = 3
) -> dict[str, Any]:
    """Profiles a few updates of an eager model, and splits them.

    Args:
        step: one update, already warmed up.
        trace: a .json.gz file to write.

    Returns:
        The report's parts (seconds of one update; forward has all the time of parts without a backward pass),
        profiled_seconds and explained (the parts' share of them; on a GPU the rest is idle time).
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise it reports start and stop on stderr
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with around_parts(model, lambda part: record_function(MARK + part)), profile(activities=activities) as seen:
        wait_for(device)
        start = time.perf_counter()
        for _ in range(steps):
            step()
        wait_for(device)
        wall = time.perf_counter() - start
    events = sorted(seen.events() or [], key=lambda event: event.time_range.start)
    seconds: dict[str, list[float]] = {}
    backward_parts: dict[int, str] = {}
    for event, part, backward in _owners(events):
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        seconds.setdefault(part, [0.0, 0.0])[backward] += own / 1e6 / steps
        if backward:
            backward_parts[event.sequence_nr] = part
    if trace is not None:
        _write_trace(seen, backward_parts, trace)
    rows = sorted(seconds.items(), key=lambda item: -sum(item[1]))
    return {
        "parts": [{"name": name, "forward": both[0], "backward": both[1]} for name, both in rows if sum(both) > 0],
        "profiled_seconds": wall / steps,
        "explained": sum(map(sum, seconds.values())) * steps / wall,
    }


@contextmanager
def around_parts(model: nn.Module, span: Callable[[str], AbstractContextManager[object]]) -> Iterator[None]:
    """Runs each part's forward pass within `span(part)`; parts may contain parts."""
    entered: list[AbstractContextManager[object]] = []

    def enter(part: str) -> None:
        entered.append(span(part))
        entered[-1].__enter__()

    def leave(*_: object) -> None:
        entered.pop().__exit__(None, None, None)

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if (part := part_of(name)) is not None:
                hooks.callback(module.register_forward_pre_hook(lambda *_, part=part: enter(part)).remove)
                hooks.callback(module.register_forward_hook(leave).remove)
        yield


def _owners(events: list[Any]) -> Iterator[tuple[Any, str, bool]]:
    """Yields each operator with its part, and whether it belongs to the backward pass."""
    forward_part: dict[int, str] = {}
    last_backward, backward_began = REST, False
    for event in events:
        if event.name == "ProfilerStep" or event.device_type != DeviceType.CPU:
            continue
        chain = [event, *_parents(event)]
        top = next((each for each in chain if each.name.startswith(BACKWARD)), None)
        if top is not None:
            backward_began = True
            last_backward = forward_part.get(top.sequence_nr, last_backward)
            yield event, last_backward, True
            continue
        part = next((each.name.removeprefix(MARK) for each in chain if each.name.startswith(MARK)), None)
        if part is not None:
            backward_began = False
            if part == REST:
                part = next((OPERATORS[each.name] for each in chain if each.name in OPERATORS), REST)
            if event.sequence_nr >= 0:
                forward_part[event.sequence_nr] = part
        elif any(each.name.startswith("Optimizer.") for each in chain):
            part = "optimizer"
        else:
            part = "guard" if backward_began else "rest of the update"
        yield event, part, False


def _parents(event: Any) -> Iterator[Any]:
    while (event := event.cpu_parent) is not None:
        yield event


def _write_trace(seen: Any, backward_parts: dict[int, str], path: Path) -> None:
    """Writes the profiler's trace with the ranges of the parts, forward and backward."""
    plain = path.with_suffix("")
    seen.export_chrome_trace(str(plain))
    trace = json.loads(plain.read_text(encoding="utf-8"))
    plain.unlink()
    ranges: list[dict[str, Any]] = []
    part = REST
    for event in sorted(trace["traceEvents"], key=lambda event: event.get("ts", 0)):
        name = str(event.get("name", ""))
        if name.startswith(MARK):
            event["name"] = name.removeprefix(MARK)
        elif name.startswith(BACKWARD):
            part = backward_parts.get(event.get("args", {}).get("Sequence number"), part)
            last = ranges[-1] if ranges else {}
            if (last.get("name"), last.get("tid")) == (f"{part}, backward", event["tid"]):
                last["dur"] = event["ts"] + event["dur"] - last["ts"]
            else:
                ranges.append({**event, "name": f"{part}, backward", "cat": "user_annotation", "args": {}})
    trace["traceEvents"] += ranges
    with gzip.open(path, "wt", encoding="utf-8") as file:
        json.dump(trace, file)


class Counter(TorchDispatchMode):
    """Adds up the FLOPs and bytes of operators by part.

    Attributes:
        counts: part -> [FLOPs, bytes].
    """

    def __init__(self) -> None:
        super().__init__()
        self.stack = [REST]
        self.counts: dict[str, list[float]] = {}

    @contextmanager
    def inside(self, part: str) -> Iterator[None]:
        """Counts operators to a part."""
        self.stack.append(part)
        yield
        self.stack.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs and counts an operator."""
        out = func(*args, **(kwargs or {}))
        part = self.stack[-1] if self.stack[-1] != REST else OPERATORS.get(func.name().split(".")[0], REST)
        sums = self.counts.setdefault(part, [0.0, 0.0])
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            sums[0] += formula(*args, **(kwargs or {}), out_val=out)
        if not any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            sums[1] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return out


def count_forward(model: nn.Module, forward: Callable[[], object]) -> dict[str, list[float]]:
    """Returns [FLOPs, bytes] of each part in one forward pass."""
    with torch.no_grad(), Counter() as counter, around_parts(model, counter.inside):
        forward()
    return counter.counts
