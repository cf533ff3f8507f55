"""The engine that takes the inner gradients as constants: it streams; see `sophon.protect.simulate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from sophon.domains import Batch
from sophon.protect.moments import moments_of, restore_moments
from sophon.protect.simulate import Past, Simulation, floats, frozen_statistics
from sophon.strategies import FineTuneStrategy, build_optimizer, learning_rate
from sophon.tasks import Task


def first_order(
    attacker: nn.Module,
    strategy: FineTuneStrategy,
    task: Task,
    adapt: Iterator[Batch],
    query: Iterator[Batch],
    gammas: Sequence[float],
    past: Past | None = None,
) -> Simulation:
    """Run the attacker in place; add up ``gamma_k`` times the query gradients at theta^1 .. theta^K.

    Args:
        attacker: scratch copy of the released model with the attacker's head; it ends as the fine-tuned model.
        strategy: how it fine-tunes.
        task: gives both losses.
        adapt: the attacker's batches; one is taken for each step.
        query: the defender's batches; one is taken for each gamma that is not zero.
        gammas: K weights, one for each step.
        past: of an attacker that has begun before and goes on.
    """
    trainable = task.train_mode(attacker, strategy.scope)
    attacker.requires_grad_(True)
    parameters = dict(attacker.named_parameters())
    optimizer = build_optimizer(strategy, trainable.values())
    done = 0
    if past is not None:
        done = past.steps
        restore_moments(optimizer, past.moments)
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    query_losses, attacker_losses = [], []
    for step, gamma in enumerate(gammas):
        _set_learning_rate(optimizer, strategy, done + step)
        loss = task.attacker_loss(attacker, next(adapt))
        # one that the loss does not reach gets None, and torch.optim leaves it alone, as after a backward()
        gradients = torch.autograd.grad(loss, list(trainable.values()), allow_unused=True)
        for parameter, gradient in zip(trainable.values(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        attacker_losses.append(loss.detach())
        if gamma:
            with frozen_statistics(attacker):
                suppression = task.suppression_loss(attacker, next(query))
            found = torch.autograd.grad(suppression, list(parameters.values()), allow_unused=True)
            for summed, part in zip(total.values(), found, strict=True):
                if part is not None:
                    summed.add_(part, alpha=gamma)
            query_losses.append(suppression.detach())
    optimizer.zero_grad(set_to_none=True)
    return Simulation(total, floats(query_losses), floats(attacker_losses), moments_of(optimizer))


def _set_learning_rate(optimizer: torch.optim.Optimizer, strategy: FineTuneStrategy, step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(strategy, step)
