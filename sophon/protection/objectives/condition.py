"""Condition numbers of features (CN, arXiv 2505.23760): up on the restricted domain, down on the original one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sophon.domains import Batch
from sophon.errors import UserError
from sophon.losses import ill_conditioning, well_conditioning
from sophon.protection.inner_loop import Objective, Query, frozen_statistics, standing_at
from sophon.ranges import limited
from sophon.tasks import Task


@dataclass(frozen=True)
class Condition(Objective):
    """Ill-conditioning of the restricted domain's features at theta^0; in NTR, well-conditioning of the original's.

    The condition number of the features' second moment is the one that a linear probe's descent suffers from. It is
    asked once of each attacker that begins, with the batch of its last query. See `sophon.losses.ill_conditioning` for
    what differs from the paper; its preconditioner of the features' gradient is left out.

    Attributes:
        weight: on both gradients, > 0.
    """

    weight: float = limited(1.0, gt=0)
    remembers = True

    def add(self, model: nn.Module, task: Task, batch: Batch, gamma: float, query: Query) -> Tensor:
        """Add ``weight`` times the gradient at theta^0; return the regulariser, 0 where it is not asked."""
        if not (query.last and query.begun):
            return torch.zeros((), device=batch.images.device)
        with standing_at(query.moving, query.start):
            loss = ill_conditioning(_features(task, model, batch.images))
            (self.weight * loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def on_original(self, model: nn.Module, task: Task, batch: Batch) -> Tensor:
        """Return ``weight`` times the regulariser of the original domain's features."""
        with frozen_statistics(model):  # the pass before has recorded this batch
            features = _features(task, model, batch.images)
        return self.weight * well_conditioning(features)


def _features(task: Task, model: nn.Module, images: Tensor) -> Tensor:
    features = task.features(model, images)
    if features is None:
        raise UserError(
            "method.objectives.condition: is for models with a head on features, which one measured by "
            f"{task.metric.name} lacks; leave it out"
        )
    return features
