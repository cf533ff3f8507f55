"""What stages have in common that train the weights by a loss of their own."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from sophon.attacker import SCHEDULES, FineTuneStrategy
from sophon.finetune import rehearse
from sophon.models import build
from sophon.protection.context import Context
from sophon.protection.descent import Descent, Term
from sophon.protection.optimizer_state import defenders_adam, optimizer_state, restore_optimizer
from sophon.protection.stage import Remembered, Row, Stage, under
from sophon.seeds import derive_seed


class Training(Stage):
    """A round is ``ntr_steps`` steps on `terms` with `optimizer`.

    The optimizer's rates follow ``schedule``, which counts the steps of all rounds of the stage.
    """

    def terms(self, context: Context) -> Sequence[Term]:
        """Return what is minimised."""
        raise NotImplementedError

    def optimizer(self, context: Context) -> torch.optim.Optimizer:
        """Return the optimizer over the parameters of the context's model."""
        return defenders_adam(context.model.parameters(), context.method.ntr_lr)

    def check(self, context: Context) -> None:
        """Raise a `UserError` if a step fails."""
        super().check(context)
        for term in self.terms(context):
            context.ranks.require_work(term.batch_size, term.key)
            step, model = FineTuneStrategy(batch_size=term.batch_size), copy.deepcopy(context.model)
            rehearse(model, step, context.task, term.images, term.key, term.loss)

    def prepare(self, context: Context) -> None:
        """Make the loop."""
        super().prepare(context)
        self.work = Descent(context, type(self).__name__.lower(), self.terms(context), self.optimizer(context))

    def step(self, context: Context, number: int) -> Row:
        """Take the steps of a round."""
        method, steps = context.method, context.ntr_steps
        schedule, whole = SCHEDULES[method.schedule], max(1, method.rounds * steps)
        return {"loss": self.work.descend(steps, lambda i: schedule(number * steps + i, whole), number)}

    def roll_back(self) -> None:
        """Forget the optimizers' states."""
        super().roll_back()
        self.work.optimizer.state.clear()

    def state(self, context: Context) -> Remembered:
        """Return the optimizers' states."""
        own = {f"work/{name}": value for name, value in optimizer_state(self.work.optimizer).items()}
        return Remembered({**super().state(context).tensors, **own}, {})

    def restore(self, context: Context, remembered: Remembered) -> None:
        """Take them up again."""
        super().restore(context, remembered)
        restore_optimizer(self.work.optimizer, under("work", remembered.tensors))


def fresh(context: Context) -> nn.Module:
    """Build the model anew with random weights; the stage's seed decides them. Device and type are the model's.

    Raises:
        UserError: the model cannot be built anew.
    """
    like = next(context.model.parameters())
    with torch.random.fork_rng([like.device] if like.device.type == "cuda" else []):
        torch.manual_seed(derive_seed(context.seed, "fresh weights"))
        return build(context.task.spec).to(like.device, like.dtype)
