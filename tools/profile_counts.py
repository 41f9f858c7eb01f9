"""one forward pass -> [profile_counts] -> FLOPs and bytes of the model's parts, for the roofline.

Bytes are what eager operators read and write: every input and every output once, views not at all. FLOPs are those of
matrix products, by torch's own formulas. Both are counts of one pass and not measurements.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from patchmill.tools.profile_parts import OPERATORS, REST, around_parts


class Counter(TorchDispatchMode):
    """Adds up FLOPs and bytes of operators, by the part that is on top of the stack.

    Attributes:
        counts: part -> [FLOPs, bytes].
    """

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.counts: dict[str, list[float]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator and counts it."""
        out = func(*args, **(kwargs or {}))
        part = self.stack[-1] if self.stack else REST
        if part == REST:
            part = OPERATORS.get(func.name().split(".")[0], REST)
        sums = self.counts.setdefault(part, [0.0, 0.0])
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            sums[0] += formula(*args, **(kwargs or {}), out_val=out)
        if not any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            sums[1] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return out


def count_forward(model: nn.Module, forward: Callable[[], object]) -> dict[str, tuple[float, float]]:
    """(FLOPs, bytes) of each part in one forward pass."""
    with torch.no_grad(), Counter() as counter, around_parts(model, counter.stack.append, counter.stack.pop):
        forward()
    return {part: (flops, size) for part, (flops, size) in counter.counts.items()}
