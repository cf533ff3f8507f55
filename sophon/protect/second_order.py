"""The engine that differentiates through the attacker's steps, exactly; see `sophon.protect.simulate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sophon.domains import Batch
from sophon.protect import differentiable
from sophon.protect.simulate import Simulation, floats, frozen_statistics
from sophon.strategies import FineTuneStrategy, build_optimizer, learning_rate
from sophon.tasks import Task


def second_order(
    attacker: nn.Module,
    strategy: FineTuneStrategy,
    task: Task,
    adapt: Iterator[Batch],
    query: Iterator[Batch],
    gammas: Sequence[float],
) -> Simulation:
    """Compute the exact gradient of the same objective through the attacker's steps; arguments as for `first_order`.

    Memory grows with K times the activations of a step. Flash attention has no second derivative, so attention runs as
    plain matrix products.
    """
    trainable = task.train_mode(attacker, strategy.scope)
    attacker.requires_grad_(True)
    parameters = dict(attacker.named_parameters())
    optimizer = build_optimizer(strategy, trainable.values())
    query_losses, attacker_losses = [], []
    device = next(attacker.parameters()).device
    objective = torch.zeros((), dtype=next(iter(parameters.values())).dtype, device=device)
    with (
        sdpa_kernel(SDPBackend.MATH),
        differentiable.innerloop(attacker, optimizer) as (model, steps),
    ):
        for step, gamma in enumerate(gammas):
            loss = task.attacker_loss(model, next(adapt))
            steps.step(loss, override={"lr": [learning_rate(strategy, step)]})
            attacker_losses.append(loss.detach())
            if gamma:
                with frozen_statistics(model):
                    suppression = task.suppression_loss(model, next(query))
                objective = objective + gamma * suppression
                query_losses.append(suppression.detach())
        found = torch.autograd.grad(objective, list(parameters.values()), allow_unused=True)
    total = {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(parameters.items(), found, strict=True)
    }
    return Simulation(total, floats(query_losses), floats(attacker_losses))
