"""Sharpness-aware suppression, after SAM (Foret et al., 2021, arXiv 2010.01412)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sophon.domains import Batch
from sophon.protection.inner_loop import Objective, Query, rewinder, standing_at
from sophon.ranges import limited
from sophon.tasks import Task


@dataclass(frozen=True)
class Sharpness(Objective):
    """The suppression loss where, within a ball around the attacker's weights, it is worst for the defender.

    The gradient is that at w + rho g / ||g||, g the loss's gradient at w = theta^k. Only the weights that the attacker
    moves are displaced. Both passes draw the same noise.

    Attributes:
        rho: radius, >= 0, in the weights' own units.
        weight: on its gradient, > 0.
    """

    rho: float = limited(0.05, ge=0)
    weight: float = limited(1.0, gt=0)

    def add(self, model: nn.Module, task: Task, batch: Batch, gamma: float, query: Query) -> Tensor:
        """Add ``gamma * weight`` times the gradient at the displaced weights; return the loss at theta^k itself."""
        moving = query.moving
        rewind = rewinder(moving[0].device)
        loss = task.suppression_loss(model, batch)
        slope = torch.autograd.grad(loss, moving, materialize_grads=True)
        norm = torch.nn.utils.get_total_norm(slope)
        # where the loss is flat to the bit there is nowhere to go
        reach = self.rho / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        with standing_at(moving, [weight.detach() + reach * part for weight, part in zip(moving, slope, strict=True)]):
            rewind()
            there = task.suppression_loss(model, batch)
            (gamma * self.weight * there).backward()  # type: ignore[no-untyped-call]
        return loss.detach()
