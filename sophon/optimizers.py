"""The optimizers of attackers, made of the names and dotted paths that strategies have."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sophon.arguments import check_arguments, function_at
from sophon.attacker import OPTIMIZERS, FineTuneStrategy

# Whose fused kernels were measured to be faster than torch's default, by device: on the CPU that of SGD is not.
_FUSED: dict[str, tuple[str, ...]] = {"cpu": ("adam", "adamw", "adagrad")}


def build_optimizer(
    strategy: FineTuneStrategy, parameters: Iterable[Tensor], *, model: nn.Module | None = None, fused: bool = False
) -> torch.optim.Optimizer:
    """Make the strategy's optimizer over ``parameters`` at its peak learning rate.

    Args:
        model: whose they are, for optimizers that look at it.
        fused: take torch's fused kernel where it is faster. In float32 its steps differ from the default's by rounding:
            by less than 1e-5 of a step, and the last bit of a weight. The kernel takes gradients and optimizer state to
            lie in memory as the parameters do, and does not check: leave gradients to ``backward()``, which sees to it.
    """
    factory, arguments = _factory(strategy, "optimizer")
    owned = list(parameters)
    if fused and all(strategy.optimizer in _FUSED.get(parameter.device.type, ()) for parameter in owned):
        arguments = {**arguments, "fused": True}
    if _wants_model(factory):
        arguments = {**arguments, "model": model}
    return factory(owned, **arguments)


def check_optimizer(strategy: FineTuneStrategy, where: str) -> None:
    """Raise a `UserError` that names a key below ``where`` unless the optimizer can be had with its arguments."""
    factory, arguments = _factory(strategy, f"{where}.optimizer")
    if _wants_model(factory):
        arguments = {**arguments, "model": None}
    check_arguments(f"{where}.optimizer_args", strategy.optimizer, factory, ["parameters"], arguments)


def _factory(strategy: FineTuneStrategy, key: str) -> tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]:
    path, implied = OPTIMIZERS.get(strategy.optimizer, (strategy.optimizer, {}))
    given = {"lr": strategy.lr, "weight_decay": strategy.weight_decay}
    return function_at(path, key), given | implied | dict(strategy.optimizer_args)


def _wants_model(factory: Callable[..., torch.optim.Optimizer]) -> bool:
    return "model" in inspect.signature(factory).parameters
