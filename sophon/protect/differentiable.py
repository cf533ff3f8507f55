"""What `higher` lacks, and what has moved on since its last release, made good.

higher 0.2.1 has no AdamW, and its Adam adds epsilon before the bias correction, as torch did then; today's torch.optim
corrects first. One class serves both, so that the second-order engine takes the very steps of torch.optim. And its
functional modules cannot be sliced, which diffusers' U-Net blocks do.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import higher
import torch
from torch import Tensor, nn


class DifferentiableAdam(higher.optim.DifferentiableOptimizer):  # type: ignore[misc]
    """Adam and AdamW as torch.optim computes them (no AMSGrad), out of place.

    A second moment of exactly zero (a weight that never received a gradient) makes the square root's derivative
    infinite; there the step is zero whatever the gradient, so its derivative is set to zero.
    """

    def _update(self, grouped_grads: list[list[Tensor | None]], **kwargs: Any) -> None:
        for index, (group, grads) in enumerate(zip(self.param_groups, grouped_grads, strict=True)):
            for position, (parameter, grad) in enumerate(zip(group["params"], grads, strict=True)):
                if grad is not None:
                    state = self.state[index][position]
                    group["params"][position] = _adam_step(parameter, grad, state, group)


def _adam_step(parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    beta1, beta2 = group["betas"]
    lr, decay = group["lr"], group["weight_decay"]
    if decay and group.get("decoupled_weight_decay", False):
        parameter = parameter * (1 - lr * decay)
    elif decay:
        grad = grad + decay * parameter
    step = state["step"] = state.get("step", 0) + 1
    first = state["exp_avg"] = state.get("exp_avg", torch.zeros_like(grad)) * beta1 + (1 - beta1) * grad
    second = state["exp_avg_sq"] = state.get("exp_avg_sq", torch.zeros_like(grad)) * beta2 + (1 - beta2) * grad * grad
    untouched = second == 0
    root = torch.where(untouched, 1.0, second).sqrt()
    root = torch.where(untouched, 0.0, root)
    corrected = root / (1 - beta2**step) ** 0.5 + group["eps"]
    moved: Tensor = parameter - (lr / (1 - beta1**step)) * first / corrected
    return moved


@contextmanager
def innerloop(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[nn.Module, Any]]:
    """Open `higher`'s inner loop on ``model`` itself, so that gradients reach its own parameters.

    Yields:
        The functional model, and the differentiable optimizer whose ``step(loss)`` updates it. The model's own
        parameters and buffers stay as they are.
    """
    for kind in (torch.optim.Adam, torch.optim.AdamW):
        higher.optim._opt_mapping[kind] = DifferentiableAdam
    with warnings.catch_warnings():
        # higher doubts its RMSprop; the tests hold it against finite differences, as they do every optimizer
        warnings.filterwarnings("ignore", message="Differentiable RMSprop")
        with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as loop:
            _allow_slices(loop[0])
            yield loop


def _allow_slices(functional: nn.Module) -> None:
    """Let the module lists of `higher`'s functional model be sliced; a slice is a plain list of its modules.

    nn.ModuleList makes a slice by calling its own class, but the class of a functional module is built with other
    arguments. higher makes each functional module a class of its own, so setting a method there changes nothing else.
    """
    for module in functional.modules():
        if isinstance(module, nn.ModuleList):
            type(module).__getitem__ = _item  # type: ignore[method-assign, assignment]


def _item(modules: nn.ModuleList, index: int | slice) -> nn.Module | list[nn.Module]:
    return list(modules)[index]
