"""The guard: a constraint on the original domain, which it measures on ``val`` alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.profiler import record_function

from sophon.config import GuardConfig
from sophon.errors import GuardError, UserError
from sophon.protection.context import Context
from sophon.protection.resume import Position
from sophon.protection.stage import Stage


class Guard:
    """Accepts states within the tolerance, repairs others, and goes back to the last accepted one from the rest.

    Args:
        context: the reference, ``val`` and the metric.

    Attributes:
        at: where the run stands; the guard's part of it is kept here.
        good: the weights that it accepted last, the stage's start before there are any.
    """

    at: Position
    good: dict[str, Tensor]

    def __init__(self, config: GuardConfig, context: Context) -> None:
        self.config = config
        self._task, self._val = context.task, context.original["val"]
        self._ranks, self._say = context.ranks, context.say

    def reference(self, model: nn.Module) -> float:
        """Return the reference's metric; say so where one image of ``val`` is more than the tolerance.

        Raises:
            UserError: nothing is relative to it.
        """
        before = self._ranks.first(lambda: self._task.evaluate(model, self._val))
        image = 100 / len(self._val)
        if self._task.metric.unit == "%" and not self.config.relative and image > self.config.tolerance:
            self._say(
                f"guard: one of the {len(self._val)} images of val is {image:.3g} points, more than guard.tolerance="
                f"{self.config.tolerance:g} allows to lose; raise guard.tolerance or domain.original.val_fraction"
            )
        if self.config.relative and before == 0:
            raise UserError("guard.relative: the reference's value on val is 0; give an absolute tolerance")
        return before

    def check(self, stage: Stage, context: Context, done: int, *, lenient: bool = False) -> dict[str, Any]:
        """Look at ``val``: keep the state if it is within tolerance, else repair it, else go back to the good one.

        Args:
            stage: repairs by NTR; told of a roll-back.
            context: its model is looked at.
            done: rounds of the stage so far.
            lenient: let a breach pass; the state is not kept.
        """
        value, loss = self._measure(context.model)
        # a metric that is NaN is within no tolerance
        repaired = not (lenient or loss <= self.config.tolerance) and self.config.repair_steps > 0
        if repaired:
            stage.ntr.run(self.config.repair_steps, done, "repair", anneal=True)
            stage.project()
            value, loss = self._measure(context.model)
        accepted = loss <= self.config.tolerance
        if accepted:
            self.good = copied(context.model.state_dict())
            self.at.good_round, self.at.good, self.at.breaches = self.at.round, value, 0
        elif not lenient:
            self.at.breaches += 1
            if self.at.breaches > self.config.patience:
                self._roll_back(stage, context, value, loss)
        measured = {name: v if math.isfinite(v) else None for name, v in (("val", value), ("val_loss", loss))}
        return {**measured, "repaired": repaired, "accepted": accepted}

    def require_acceptance(self, since: int) -> None:
        """Raise a `GuardError` if no round after ``since`` was accepted."""
        if self.at.good_round <= since:
            looks = [row for row in self.at.history if row["round"] > since and row.get("val_loss") is not None]
            nearest = min(looks, key=lambda row: row["val_loss"], default=None)
            came = "" if nearest is None else f" (round {nearest['round']} came nearest, with {nearest['val']:.4g})"
            raise GuardError(
                f"guard.tolerance: no round kept {self._task.metric.name} on val within {self.config.tolerance}"
                f"{self._unit} of {self.at.before:.4g}{came}; raise it, lower method.fts_lr or give NTR more steps or "
                "rounds"
            )

    @property
    def _unit(self) -> str:
        """What follows the tolerance in a message."""
        return " %" if self.config.relative else ""

    def _measure(self, model: nn.Module) -> tuple[float, float]:
        """Return the metric, and by how much it is worse than the reference's in the tolerance's unit."""
        before = self.at.before
        with record_function("sophon: guard"):
            value = self._ranks.first(lambda: self._task.evaluate(model, self._val))
        worse = before - value if self._task.metric.higher_is_better else value - before
        return value, 100 * worse / abs(before) if self.config.relative else worse

    def _roll_back(self, stage: Stage, context: Context, value: float, loss: float) -> None:
        """Put the good weights back, drop what led away from them, and give NTR more weight."""
        context.model.load_state_dict(self.good)
        stage.roll_back()
        self.at.rollbacks += 1
        self.at.breaches = 0
        grown = math.ceil(self.at.ntr_steps * self.config.growth)
        self.at.ntr_steps = context.ntr_steps = max(self.at.ntr_steps, min(grown, self.config.max_ntr_steps))
        self._say(
            f"guard: after round {self.at.round} {self._task.metric.name} on val is {value:.4g}, "
            f"{loss:.3g}{self._unit} worse than {self.at.before:.4g} (guard.tolerance={self.config.tolerance:g}); "
            f"back to round {self.at.good_round}, now {self.at.ntr_steps} NTR steps a round"
        )


def copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of tensors."""
    return copy.deepcopy({name: tensor.detach() for name, tensor in state.items()})
