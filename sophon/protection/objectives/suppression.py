"""Suppression alone, the objective of SOPHON's FTS (arXiv 2404.12699)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sophon.domains import Batch
from sophon.protection.inner_loop import Objective, Query
from sophon.ranges import limited
from sophon.tasks import Task


@dataclass(frozen=True)
class Suppression(Objective):
    """The task's suppression loss at theta^k: one pass, one gradient.

    Attributes:
        weight: on its gradient, >= 0; with 0 the loss is measured only.
    """

    weight: float = limited(1.0, ge=0)

    @property
    def weighs(self) -> bool:
        """Whether it has a gradient."""
        return self.weight > 0

    def add(self, model: nn.Module, task: Task, batch: Batch, gamma: float, query: Query) -> Tensor:
        """Add the gradient of ``gamma * weight * loss``; return the loss."""
        with torch.set_grad_enabled(self.weighs):
            loss = task.suppression_loss(model, batch)
        if self.weighs:
            # into .grad, so that autograd adds each gradient as it comes: there never is a second set of them
            (gamma * self.weight * loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach()
