"""Distillation on original images alone: a student learns what the teacher answers there, and nothing else of it.

The teacher is what the last stage within the guard's tolerance released, the reference if there was none: unlearnt, it
answers nothing about the restricted domain. The student is the model as it is, damaged by `noise` say (UNDO, arXiv
2506.06278), or one with fresh weights. In the latter case whatever the released weights hold of the restricted domain
went through the teacher's answers on original images. The loss, with z the student's logits and t the teacher's:

    labels * CE(z, y) + distillation * T^2 KL(softmax(t / T) || softmax(z / T)) + features * |f_z/|f_z| - f_t/|f_t||^2

(Hinton et al., 2015), for denoisers the squared errors of the noise and of the teacher's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sophon.attacker import FineTuneStrategy
from sophon.domains import Batch
from sophon.errors import UserError
from sophon.optimizers import build_optimizer, check_optimizer
from sophon.protection.context import Context
from sophon.protection.descent import Term
from sophon.protection.stage import Information, Row
from sophon.protection.training import Training, fresh
from sophon.ranges import limited


@dataclass
class DistilConfig:
    """Who learns, and how.

    Attributes:
        student: ``given``, the weights that the stage before released; or ``fresh``, random ones.
        labels: weight of the labels' loss on the original domain (of a denoiser the noise's), >= 0.
        features: weight of the distance of the features before the head, both scaled to length one, >= 0; classifiers
            only.
        until: ``steps``, all rounds; or ``tolerance``, until the guard first finds the student within its tolerance.
        optimizer: a name or a dotted path, as of `FineTuneStrategy`, but for ``kfac`` and ``muon``; one of your own
            keeps all that it remembers in its ``state_dict``. Its rate is ``method.ntr_lr``.
        weight_decay: >= 0.
        optimizer_args: the optimizer's other arguments.
    """

    student: str = limited("given", choices=("given", "fresh"))
    labels: float = limited(0.0, ge=0)
    features: float = limited(0.0, ge=0)
    until: str = limited("steps", choices=("steps", "tolerance"))
    optimizer: str = "nesterov"
    weight_decay: float = limited(5.0e-4, ge=0)
    optimizer_args: dict[str, Any] = field(default_factory=dict)


class Distil(Training):
    """A step descends on original images; the restricted domains are not read."""

    Config = DistilConfig
    lenient = True
    mechanism = "removal"
    summary = "distillation: it was trained to answer as its teacher does on original images, which are all that it saw"

    def check(self, context: Context) -> None:
        """Raise a `UserError` if there is nothing to learn from, or the model cannot be built anew."""
        if context.method.distillation == 0:
            raise UserError("method.distillation: 0 is not allowed with the stage distil, whose weight it is; raise it")
        if (
            self.config.features
            and context.task.features(context.model, context.original["val"].first(1).images) is None
        ):
            raise UserError("method.stages.distil.features: this model has no features to go by; give 0")
        if self.config.student == "fresh":
            fresh(context)
        if self.config.optimizer in ("kfac", "muon"):  # what they remember is not in their state_dict
            raise UserError(
                f"method.stages.distil.optimizer: '{self.config.optimizer}' is not allowed, for a run that was "
                "interrupted could not go on with it; give one of torch's, such as nesterov or adamw"
            )
        check_optimizer(self._strategy(context), "method.stages.distil")
        super().check(context)

    def prepare(self, context: Context) -> None:
        """Begin with fresh weights if asked to."""
        if self.config.student == "fresh":
            context.model = fresh(context)
        super().prepare(context)

    def terms(self, context: Context) -> Sequence[Term]:
        """Return the distillation."""
        task, teacher, config = context.task, context.teacher, self.config

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            if not config.features:
                return task.original_loss(model, batch, teacher, labels=config.labels)
            with task.watching(model) as mine, task.watching(teacher) as wanted:
                total = task.original_loss(model, batch, teacher, labels=config.labels)
            distance = (F.normalize(mine[0], dim=1) - F.normalize(wanted[0], dim=1)).square().sum(1).mean()
            total += config.features * distance
            return total

        return [Term(context.original["train"], context.method.ntr_batch_size, "method.ntr_batch_size", loss)]

    def optimizer(self, context: Context) -> torch.optim.Optimizer:
        """Return the configured one."""
        return build_optimizer(self._strategy(context), context.model.parameters(), model=context.model)

    def ended(self, row: Row) -> bool:
        """Say whether the student is good enough."""
        return self.config.until == "tolerance" and bool(row["accepted"])

    def information(self, context: Context) -> Information:
        """Return that original images alone were read."""
        original = ("images", "labels") if self.config.labels else ("images",)
        teacher = "stage before, features too" if self.config.features else "stage before"
        return Information(self.config.student, original, (), teacher)

    def _strategy(self, context: Context) -> FineTuneStrategy:
        config = self.config
        values = {name: getattr(config, name) for name in ("optimizer", "weight_decay", "optimizer_args")}
        return FineTuneStrategy.of({**values, "lr": context.method.ntr_lr}, "method.stages.distil")
