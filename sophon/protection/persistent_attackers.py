"""Persistent attackers: a pool that lives across rounds, so that a long horizon costs no more than a short one.

A simulated attacker's weights are kept as its displacement from the released ones. When its turn comes again the
released weights have moved, and it goes on from them plus its displacement. To first order, whose meta-gradient is the
sum of the query gradients along the trajectory, this is FTS with the horizon of a whole life at the price of a chunk.

Surgery may have scaled a released weight, or put another in its place. So the displacement is from the released weight
times its factor, d attacker's weight / d released weight.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sophon.attacker import FineTuneStrategy


@dataclass
class Member:
    """An attacker between two of its turns.

    Attributes:
        strategy: how it fine-tunes.
        taken: steps that it has taken.
        displacement: by parameter, from its factor times the released weight.
        buffers: those that its training has changed, normalisation statistics among them; all others are the released
            ones, as a frozen backbone's statistics are.
        optimizer_state: of its optimizer.
        factors: by parameter, of a shape that the parameter's contains; 1 for those that are not named. 0 for a head
            that is not released, so that its displacement is its value.
        domain: which of the restricted domains it fine-tunes for.
    """

    strategy: FineTuneStrategy
    taken: int
    displacement: dict[str, Tensor]
    buffers: dict[str, Tensor]
    optimizer_state: dict[str, Tensor]
    factors: dict[str, Tensor] = field(default_factory=dict)
    domain: int = 0


_PARTS = ("displacement", "buffers", "optimizer_state", "factors")


class Pool:
    """A fixed number of places for attackers; a place is empty until one is drawn for it, and after its last step.

    Args:
        size: the number of places, >= 1; 0 for no pool at all.
        own: the places whose attackers live in this process; None for all.
    """

    def __init__(self, size: int, own: Collection[int] | None = None) -> None:
        self.size = size
        self.own = range(size) if own is None else own
        self.members: dict[int, Member] = {}

    def leave(
        self,
        place: int,
        strategy: FineTuneStrategy,
        taken: int,
        attacker: nn.Module,
        released: nn.Module,
        factors: Mapping[str, Tensor | float],
        optimizer_state: Mapping[str, Tensor],
        domain: int = 0,
    ) -> None:
        """Keep copies of what an attacker needs for its next turn; see `Member`.

        ``attacker`` is its model as it is now, ``released`` the released model as it was during the turn.
        """
        start = dict(released.named_parameters())
        kept = {name: torch.as_tensor(factor).clone() for name, factor in factors.items()}
        with torch.no_grad():
            displacement = {n: value - _share(start[n], kept.get(n)) for n, value in attacker.named_parameters()}
        given = dict(released.named_buffers())
        buffers = {n: value.clone() for n, value in attacker.named_buffers() if not torch.equal(value, given[n])}
        own = {name: value.clone() for name, value in optimizer_state.items()}
        self.members[place] = Member(strategy, taken, displacement, buffers, own, kept, domain)

    def enter(self, place: int, attacker: nn.Module, released: nn.Module) -> Member:
        """Put the attacker at ``place`` into ``attacker``: its displacement from what is released now."""
        member, start = self.members[place], dict(released.named_parameters())
        buffers = dict(released.named_buffers()) | member.buffers
        with torch.no_grad():
            for name, value in attacker.named_parameters():
                value.copy_(_share(start[name], member.factors.get(name)) + member.displacement[name])
            for name, buffer in attacker.named_buffers():
                buffer.copy_(buffers[name])
        return member

    def tensors(self) -> dict[str, Tensor]:
        """Return every member's tensors by ``<place>/<part>/<name>``, for a state file."""
        return {
            f"{place}/{part}/{name}": value
            for place, member in self.members.items()
            for part in _PARTS
            for name, value in getattr(member, part).items()
        }

    def record(self) -> dict[str, Any]:
        """Return the rest of every member as plain JSON data, for the same file."""
        return {
            str(place): {"strategy": member.strategy.plain(), "taken": member.taken, "domain": member.domain}
            for place, member in self.members.items()
        }

    def restore(
        self, tensors: Mapping[str, Tensor], record: Mapping[str, Any], device: torch.device | str = "cpu"
    ) -> None:
        """Take up what `tensors` and `record` returned, of all processes together, as far as it belongs here."""
        self.members = {
            int(place): Member(FineTuneStrategy.of(facts["strategy"]), facts["taken"], {}, {}, {}, {}, facts["domain"])
            for place, facts in record.items()
            if int(place) in self.own
        }
        for key, value in tensors.items():
            place, part, name = key.split("/", 2)
            if int(place) in self.own:
                getattr(self.members[int(place)], part)[name] = value.to(device)


def _share(released: Tensor, factor: Tensor | None) -> Tensor:
    """Return the part of an attacker's weight that moves with the released one, ready to be added."""
    if factor is None:
        return released
    # a head of another domain has another shape than the released one's
    return released * factor if factor.any() else factor
