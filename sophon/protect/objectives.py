"""What the defender asks at the queries of a simulation: suppression, and what may be asked with it or instead.

Each is an `Objective` (see `sophon.protect.inner_loop`); `objectives_of` makes those of a configuration.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sophon.config import MethodConfig
from sophon.domains import Batch
from sophon.errors import UserError
from sophon.losses import ill_conditioning
from sophon.protect.clamp import Clamp
from sophon.protect.inner_loop import Objective, Query, rewinder, standing_at
from sophon.tasks import Task


class Suppression:
    """The task's suppression loss, at theta^k: one pass, one gradient (SOPHON's FTS, arXiv 2404.12699).

    Args:
        weight: on its gradient, >= 0; with 0 the loss is measured only.
    """

    remembers = False

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight

    def add(self, model: nn.Module, task: Task, batch: Batch, gamma: float, query: Query) -> Tensor:
        """Add the gradient of ``gamma * weight * loss``; return the loss."""
        with torch.set_grad_enabled(self.weight > 0):
            loss = task.suppression_loss(model, batch)
        if self.weight:
            # into .grad, so that autograd adds each gradient as it comes: there never is a second set of them
            (gamma * self.weight * loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach()


class SharpSuppression:
    """Sharpness-aware suppression (after SAM, Foret et al., 2021, arXiv 2010.01412).

    The gradient is that of the suppression loss at w + rho g / ||g||, g its gradient at w = theta^k: to first order
    where an attacker undoes most within a ball of radius rho. Only the weights that the attacker moves are displaced.
    Both passes draw the same noise.

    Args:
        rho: radius, >= 0, in the weights' own units.
        weight: on its gradient, > 0.
    """

    remembers = False

    def __init__(self, rho: float, weight: float = 1.0) -> None:
        self.rho = rho
        self.weight = weight

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


class Condition:
    """Ill-conditioning of the restricted domain's features at theta^0 (CN, arXiv 2505.23760).

    The condition number of the features' second moment is the one that a linear probe's descent suffers from. Asked
    once of each attacker that begins, with the batch of its last query; the other half, keeping the original domain's
    features well-conditioned, is NTR's. See `sophon.losses.ill_conditioning` for what differs from the paper; its
    preconditioner of the features' gradient is left out.

    Args:
        weight: on its gradient, > 0.
    """

    remembers = True

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def add(self, model: nn.Module, task: Task, batch: Batch, gamma: float, query: Query) -> Tensor:
        """Add ``weight`` times the gradient at theta^0; return the regulariser, 0 where it is not asked."""
        if not (query.last and query.begun):
            return torch.zeros((), device=batch.images.device)
        with standing_at(query.moving, query.start):
            loss = ill_conditioning(features_of(task, model, batch.images))
            (self.weight * loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach()


def features_of(task: Task, model: nn.Module, images: Tensor) -> Tensor:
    """Return the features that a head sees, float [B, D].

    Raises:
        UserError: the model's kind has none.
    """
    features = task.features(model, images)
    if features is None:
        raise UserError(
            f"method.condition: is for models with a head on features, which one measured by {task.metric.name} lacks; "
            "give 0"
        )
    return features


PLAIN: Sequence[Objective] = (Suppression(),)


def objectives_of(config: MethodConfig) -> tuple[Objective, ...]:
    """Return what a configuration asks; suppression, whose loss is recorded, comes first."""
    weight = config.suppression_weight
    sharp = config.sharpness > 0 and weight > 0
    asked: list[Objective] = [SharpSuppression(config.sharpness, weight) if sharp else Suppression(weight)]
    if config.clamp.on:
        asked.append(Clamp(config.clamp))
    if config.condition:
        asked.append(Condition(config.condition))
    return tuple(asked)
