"""An attack loop that steps out of the directions in which the released weights were made to resist."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from sophon.attacker import FineTuneStrategy
from sophon.domains import ImageSet, batches
from sophon.finetune import OnStep, fine_tune, thaw
from sophon.tasks import Task

DIRECTIONS = 8  # gradients at the released weights, one a batch, that span what is avoided


def complement(
    model: nn.Module,
    strategy: FineTuneStrategy,
    task: Task,
    images: ImageSet,
    generator: torch.Generator,
    on_step: OnStep,
) -> nn.Module:
    """Fine-tune without the part of each gradient that lies in the span of the first ones, tensor by tensor.

    A defence that simulates attackers shapes the directions in which fine-tuning sets out from the released weights.
    Whoever knows that leaves these alone. After an idea of arXiv 2605.14605, known to us from its abstract only; the
    head, and tensors of hardly more elements than directions, are trained as usual.
    """
    parameters = {
        name: part
        for name, part in thaw(model, strategy, task).items()
        if name not in task.head_names(model) and part.numel() > 2 * DIRECTIONS
    }
    stream = batches(images, strategy.batch_size, generator)
    directions: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for _ in range(DIRECTIONS):
        loss = task.attacker_loss(model, next(stream))
        gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True, allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            directions[name].append(gradient.flatten())
    hooks = []
    for name, part in parameters.items():
        basis = torch.linalg.qr(torch.stack(directions[name], 1)).Q
        hooks.append(part.register_hook(partial(_outside, basis)))  # type: ignore[no-untyped-call]
    try:
        return fine_tune(model, strategy, task, images, generator, on_step)
    finally:
        for hook in hooks:
            hook.remove()


def _outside(basis: Tensor, gradient: Tensor) -> Tensor:
    """Return the part of a gradient that is orthogonal to a basis [N, directions]."""
    flat = gradient.flatten()
    return (flat - basis @ (basis.T @ flat)).view_as(gradient)
