"""What a stage works with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from sophon.attacker import SCHEDULES
from sophon.config import MethodConfig
from sophon.domains import LoadedDomain
from sophon.protection.distributed import ALONE, Ranks
from sophon.sampler import StrategySampler
from sophon.tasks import Task


@dataclass
class Context:
    """The model, what it is to be protected from, and how.

    Attributes:
        model: at first what the stage before has released; trained in place. A stage may put another one here while it
            prepares.
        reference: the unprotected model.
        teacher: whose answers are learnt where the weights have lost them: at first the reference, then what the last
            stage before this one has released within the tolerance.
        task: the model kind, with the losses that the method names.
        original: domain with ``train`` and ``val``.
        restricted: the domains, one or more, each with ``adapt`` and ``query``.
        sampler: the attackers to simulate.
        method: the keys of the method, as they are for this stage.
        seed: of all that the stage draws: derive from it, the round and what is drawn.
        ranks: who shares the work. All take the same steps; the first alone measures, and writes.
        say: tells the user a line.
        show: shows how far a round is, where progress is shown and the round takes long.
        ntr_steps: NTR steps of a round, which roll-backs let grow.
    """

    model: nn.Module
    reference: nn.Module
    teacher: nn.Module
    task: Task
    original: LoadedDomain
    restricted: Sequence[LoadedDomain]
    sampler: StrategySampler
    method: MethodConfig
    seed: int
    ranks: Ranks = ALONE
    say: Callable[[str], None] = print
    ntr_steps: int = 0
    show: Callable[[str], None] = lambda note: None

    def rate(self, number: int) -> float:
        """Return the factor on all rates in round ``number``, 0 .. rounds - 1."""
        return SCHEDULES[self.method.schedule](number, self.method.rounds)
