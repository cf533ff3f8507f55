"""The optimizers of attackers: what a strategy's name stands for."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from sophon.attacker import OPTIMIZERS, FineTuneStrategy

# Whose fused kernels were measured to be faster than torch's default, by device: on the CPU that of SGD is not.
_FUSED: dict[str, tuple[str, ...]] = {"cpu": ("Adam", "AdamW", "Adagrad")}


def build_optimizer(
    strategy: FineTuneStrategy, parameters: Iterable[Tensor], *, fused: bool = False
) -> torch.optim.Optimizer:
    """Make the strategy's torch optimizer over ``parameters`` at its peak learning rate.

    Args:
        strategy: says which, and its settings.
        parameters: what it steps.
        fused: take torch's fused kernel where it is faster. In float32 its steps differ from the default's by rounding:
            by less than 1e-5 of a step, and the last bit of a weight. The kernel takes gradients and moments to lie in
            memory as the parameters do, and does not check: leave gradients to ``backward()``, which sees to it.
    """
    name, settings = OPTIMIZERS[strategy.optimizer]
    owned = list(parameters)
    if fused and all(name in _FUSED.get(parameter.device.type, ()) for parameter in owned):
        settings = {**settings, "fused": True}
    optimizer: type[torch.optim.Optimizer] = getattr(torch.optim, name)
    return optimizer(owned, lr=strategy.lr, weight_decay=strategy.weight_decay, **settings)  # type: ignore[call-arg]
