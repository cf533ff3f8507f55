"""Weights pushed away from the reference's, as far as the original work allows.

Fine-tuning finds forgotten knowledge the faster, the closer in weight space it lies (arXiv 2505.22310). The loss:

    original domain's loss - weight * mean over matrices and filters of |w/|w| - r/|r||^2 / 2,   r the reference's w

Both are scaled to length one, since where a normalisation follows, a weight's length means nothing. The distance is in
[0, 2], 1 where the two are orthogonal; it counts up to ``at_most``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sophon.domains import Batch
from sophon.protection.context import Context
from sophon.protection.descent import Term
from sophon.protection.stage import Information, Row
from sophon.protection.training import Training
from sophon.ranges import limited


@dataclass
class DistanceConfig:
    """How far the weights are pushed.

    Attributes:
        weight: of the distance, > 0; that of the original domain's loss is 1.
        at_most: the distance counts up to this, > 0 and <= 2.
    """

    weight: float = limited(1.0, gt=0)
    at_most: float = limited(1.0, gt=0, le=2)


class Distance(Training):
    """A step descends on original images, and away from the reference."""

    Config = DistanceConfig
    mechanism = "removal"
    summary = "distance: its weights were pushed away from the unprotected model's"

    def terms(self, context: Context) -> Sequence[Term]:
        """Return the original domain's loss with the distance."""
        task, config, reference = context.task, self.config, context.reference

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            pushed = distance(model, reference).clamp(max=config.at_most)
            loss: Tensor = task.original_loss(model, batch, reference) - config.weight * pushed
            return loss

        return [Term(context.original["train"], context.method.ntr_batch_size, "method.ntr_batch_size", loss)]

    def step(self, context: Context, number: int) -> Row:
        """Take the steps of a round, and say how far the weights are."""
        row = super().step(context, number)
        with torch.no_grad():
            return {**row, "distance": float(distance(context.model, context.reference))}

    def information(self, context: Context) -> Information:
        """Return that original images and the reference's weights were read."""
        read = "weights too" if context.method.distillation else "weights alone"
        return Information(restricted=(), teacher=f"reference, {read}")


def distance(model: nn.Module, reference: nn.Module) -> Tensor:
    """Return the mean over matrices and filters of half the squared distance at length one, in [0, 2]."""
    cosines = [
        torch.cosine_similarity(weight.flatten(), reference.get_parameter(name).detach().flatten(), dim=0)
        for name, weight in model.named_parameters()
        if weight.dim() > 1
    ]
    return 1 - torch.stack(cosines).mean()
