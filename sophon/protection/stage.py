"""What a stage of a protection is. `sophon.protection.runner` counts, logs, guards, saves and resumes it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from sophon.attacker import FineTuneStrategy
from sophon.finetune import rehearse
from sophon.protection.context import Context
from sophon.protection.ntr import NTR
from sophon.protection.optimizer_state import optimizer_state, restore_optimizer

Row = dict[str, Any]  # what a round came to: plain JSON data, None for what is not finite; the first entry is shown


class Constraint(Protocol):
    """What the weights have to satisfy after every update."""

    def project(self) -> None:
        """Move the weights to where it is satisfied, in place."""


class Remembered(NamedTuple):
    """What resuming needs: tensors by name, and plain JSON data."""

    tensors: Mapping[str, Tensor]
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Information:
    """What a stage gave to the weights, for ``sophon.json``; what is not known is taken to be everything.

    Attributes:
        start: ``given``, the weights that the stage before released; or ``fresh``, random ones, which hold nothing.
        original: what it read of the original domain: ``images``, ``labels``.
        restricted: what it read of the restricted domains, likewise.
        teacher: whose answers it learnt on those images: ``none``; ``reference``, the unprotected model's; or ``stage
            before``, those of what the last stage within the guard's tolerance released; with ``, features too`` where
            its features were learnt besides its outputs, and ``, weights too`` or ``, weights alone`` where its
            weights were read.
    """

    start: str = "given"
    original: tuple[str, ...] = ("images", "labels")
    restricted: tuple[str, ...] = ("images", "labels")
    teacher: str = "reference"


@dataclass
class NoSettings:
    """A stage without settings of its own."""


class Stage:
    """One stage of a protection; the base class of all, of which `step` is what a stage has to have.

    Nothing depends on what was drawn before: every draw derives from `Context.seed` and the round, so that going on
    from a round is the same computation as never having stopped there.

    Args:
        config: of the class ``Config``, a dataclass of the stage's own settings.

    Attributes:
        ntr: training on the original domain, which the guard repairs with.
        lenient: whether breaches of the tolerance belong to it, so that the guard neither repairs nor rolls back: it is
            to end within the tolerance all the same.
        damages: whether it may end outside the tolerance, and leaves it to a stage after it to come back. The last
            stage of a protection may not.
        once: whether it is a single round.
        simulates: whether it simulates the sampler's attackers, which an audit then calls seen.
        float32: whether the released weights need full float32 to work.
        mechanism: in one word how it protects, which says what an attacker who knows would do: ``suppression``,
            ``reparameterisation``, ``removal`` or another; None for the stage's own name.
        summary: what it protects with, for the model card; completes "made hard to fine-tune with".
        limits: sentences about what it does not do, for the same.
    """

    Config: ClassVar[type] = NoSettings
    simulates: ClassVar[bool] = False
    float32: ClassVar[bool] = False
    lenient: ClassVar[bool] = False
    damages: ClassVar[bool] = False
    once: ClassVar[bool] = False
    mechanism: ClassVar[str | None] = None
    summary: ClassVar[str] = "a method of its publisher's own"
    limits: ClassVar[Sequence[str]] = ()
    ntr: NTR

    def __init__(self, config: Any) -> None:
        self.config = config

    def check(self, context: Context) -> None:
        """Raise a `UserError` if this cannot work, before anything is written; the context stays as it is."""
        size = context.method.ntr_batch_size
        context.ranks.require_work(size, "method.ntr_batch_size")
        task, loss = context.task, partial(context.task.original_loss, reference=context.reference)
        step = FineTuneStrategy(batch_size=size)
        rehearse(copy.deepcopy(context.model), step, task, context.original["train"], "method.ntr_batch_size", loss)

    def prepare(self, context: Context) -> None:
        """Get ready, once: put another model into the context if need be, then call this, which makes NTR for it."""
        self.ntr = NTR(context)

    def step(self, context: Context, number: int) -> Row:
        """Do round ``number``, 0 .. rounds - 1."""
        raise NotImplementedError

    def constraints(self) -> Sequence[Constraint]:
        """Return what is projected after every round, and after the guard's repairs."""
        return ()

    def release(self, context: Context) -> nn.Module:
        """Return what is handed to the next stage, or written: an ordinary model of the reference's architecture.

        Raises:
            GuardError: it would lose what the guard has accepted.
        """
        return context.model

    def ended(self, row: Row) -> bool:
        """Say whether the rounds that are left may be left out, after one at which the guard looked."""
        return False

    def information(self, context: Context) -> Information:
        """Return what this stage gave to the weights."""
        return Information()

    def roll_back(self) -> None:
        """Forget what led away from weights that the guard has put back."""
        self.ntr.optimizer.state.clear()

    def state(self, context: Context) -> Remembered:
        """Return what `restore` needs besides the model's own state; all ranks call it, the first one's is kept."""
        return Remembered({f"ntr/{name}": value for name, value in optimizer_state(self.ntr.optimizer).items()}, {})

    def restore(self, context: Context, remembered: Remembered) -> None:
        """Take up what `state` returned, after `prepare`; the tensors lie on the CPU."""
        restore_optimizer(self.ntr.optimizer, under("ntr", remembered.tensors))

    def project(self) -> None:
        """Project on all constraints."""
        for constraint in self.constraints():
            constraint.project()


def under(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with ``part/``, by what follows."""
    return {name.removeprefix(f"{part}/"): value for name, value in tensors.items() if name.startswith(f"{part}/")}
