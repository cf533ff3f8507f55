"""NTR, normal training reinforcement: ordinary training on the original domain between two bouts of suppression."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from sophon.domains import Batch
from sophon.protection.context import Context
from sophon.protection.descent import Descent, Term
from sophon.protection.inner_loop import Objective
from sophon.protection.optimizer_state import defenders_adam


class NTR(Descent):
    """Takes NTR steps on the context's model, with Adam; an objective sees each rank's slice by itself.

    Args:
        context: the model, what it is distilled from, the original domain; the method's rate (beta) and batches.
        objectives: what they ask of the original domain comes on top of its loss.
    """

    def __init__(self, context: Context, objectives: Sequence[Objective] = ()) -> None:
        self.objectives = objectives
        adam = defenders_adam(context.model.parameters(), context.method.ntr_lr)
        term = Term(context.original["train"], context.method.ntr_batch_size, "method.ntr_batch_size", self._loss)
        super().__init__(context, "ntr", [term], adam)

    def run(self, steps: int, *key: object, factor: float = 1.0, anneal: bool = False) -> float:
        """Take ``steps`` steps on batches drawn from the run's seed and ``key``; return the mean loss.

        Args:
            key: what the batches depend on besides the seed; "repair" in it is shown as such.
            factor: on the rate.
            anneal: let the rate fall along a half cosine, so that the last steps settle instead of wandering.

        Raises:
            UserError: the loss is not finite.
        """
        self.label = "repairing: NTR" if "repair" in key else "NTR"
        return self.descend(
            steps, lambda step: factor * (0.5 * (1 + math.cos(math.pi * step / steps)) if anneal else 1.0), *key
        )

    def _loss(self, model: nn.Module, part: Batch) -> Tensor:
        task = self.context.task
        loss = task.original_loss(model, part, self.context.reference)
        for objective in self.objectives:
            asked = objective.on_original(model, task, part)
            loss = loss if asked is None else loss + asked
        return loss
