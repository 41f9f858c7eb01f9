"""Implements LARS, the optimizer of the linear probe.

Source: You et al. 2017 as the published MAE code uses it (util/lars.py there, from MoCo v3): the layer-wise rate and
weight decay apply to matrices alone; biases take plain momentum steps.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Lars(torch.optim.Optimizer):
    """Momentum SGD whose step, for matrices, is scaled to `trust * |weight|` before momentum.

    For a matrix w with gradient g: g' = g + decay * w; g'' = g' * trust * |w| / |g'| (g' itself where a norm is 0);
    mu = momentum * mu + g''; w -= lr * mu. For vectors g'' = g.

    Example: w = [[3, 4]], g = [[0, 2]], lr 0.1, no decay: |w| = 5, |g| = 2, so g'' = 0.001 * 5 / 2 * g =
    [[0, 0.005]] and w becomes [[3, 3.9995]].
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust: float = 0.001,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust})
        self._step_supports_amp_scaling = True  # as torch's fused optimizers: `found_inf` skips a step on the device
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates all parameters that have a gradient; changes nothing where `found_inf` is not 0."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: dict) -> None:
        direction: Tensor = parameter.grad  # type: ignore[assignment]
        if parameter.ndim > 1:
            direction = direction.add(parameter, alpha=group["weight_decay"])
            norm, length = parameter.norm(), direction.norm()
            ratio = torch.where((norm > 0) & (length > 0), group["trust"] * norm / length, 1.0)
            direction = direction * ratio
        state = self.state[parameter]
        if "mu" not in state:
            state["mu"] = torch.zeros_like(parameter)
        mu = state["mu"].mul(group["momentum"]).add_(direction)
        moved = parameter.add(mu, alpha=-group["lr"])
        for held, new in ((state["mu"], mu), (parameter, moved)):
            held.copy_(new if self.found_inf is None else torch.where(self.found_inf > 0, held, new))
