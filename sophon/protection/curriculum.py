"""Which attacker is simulated next: any that the sampler knows, or rather those that recover most at present.

Each field with several choices has a bandit of its own, and all learn from every attacker, as if a choice's worth
showed whatever the others are (Ontanon, AIIDE 2013). An arm is a choice; for the optimizer, together with one third of
its range of rates (on a log scale). Lengths are no arms: a longer attack always recovers more.

A success is ranked among those of the last `RECENT` steps, its own included (after Graves et al., arXiv 1704.03003)::

    rank = (recent ones that are lower - recent ones that are higher) / recent ones          in (-1, 1)

An arm's score starts from 0 and, where the arm was seen, becomes ``MEMORY * score + (1 - MEMORY) * mean rank in this
step``. The next choice has the probability, after Exp3 (Auer et al., SIAM J. Comput. 32, 2002)::

    p = SHARE * prior + (1 - SHARE) * prior * exp(score / TEMPERATURE) / (the sum of these over the field's arms)

with the sampler's own probability as prior, so that before anything is learnt the draws are the sampler's. Exp3 divides
a gain by the probability of the choice; here means are taken, since an attacker of a pool is drawn once and seen often.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from sophon.attacker import FineTuneStrategy, Operation
from sophon.config import MethodConfig
from sophon.sampler import StrategySampler

# Steps whose successes a success is compared with: long enough for ranks, short against the drift of a protection.
RECENT = 64
# Of a softmax over scores that lie between -1 and 1: where two arms are told apart with certainty these differ by 1,
# and one is drawn 3000 times as often as the other; where all are equal, by about 0.2, what their noise leaves.
TEMPERATURE = 0.125
SHARE = 0.3  # of the draws that stay as the sampler has them
MEMORY = 0.9  # what an arm's score keeps of itself whenever the arm is seen


class Rates(NamedTuple):
    """An optimizer with a part of its range: logarithms of the lowest and the highest learning rate."""

    optimizer: str
    low: float
    high: float


class Arm(NamedTuple):
    """One choice for a field: its name in states, the strategy's value (`Rates` for the optimizer), the sampler's p."""

    label: str
    value: Any
    prior: float


class Curriculum:
    """Draws the strategies of a `StrategySampler` by what is learnt of them.

    The generator given to `draw` is the only randomness; the same successes in the same steps give the same table, to
    the bit, whatever their order within a step: so ranks that learn the same gathered list agree. All is float64.

    Args:
        sampler: what can be drawn; nothing else ever is.
        config: its key ``curriculum``; with ``uniform`` nothing is learnt, and draws are `StrategySampler.sample`'s.
    """

    def __init__(self, sampler: StrategySampler, config: MethodConfig) -> None:
        self.sampler = sampler
        self.config = config
        choices = {name: _arms(values) for name, values in sampler.choices().items()}
        self._arms: dict[str, tuple[Arm, ...]] = {"optimizer": _rates(sampler), **choices}
        self._scores = {name: [0.0] * len(arms) for name, arms in self._arms.items()}
        self._recent: list[list[float]] = []

    def draw(self, generator: torch.Generator) -> FineTuneStrategy:
        """Draw one strategy; ``generator`` (on the CPU) is the only source of randomness."""
        if self.config.curriculum == "uniform":
            return self.sampler.sample(generator)
        drawn = {name: self._pick(name, generator) for name in self._arms}
        optimizer, low, high = drawn.pop("optimizer")
        lr = math.exp(low + (high - low) * _uniform(generator))
        return FineTuneStrategy(optimizer=optimizer, lr=lr, steps=self.sampler.steps(generator), **drawn)

    def learn_all(self, successes: Sequence[tuple[FineTuneStrategy, float]]) -> None:
        """Learn from all attackers of one step, in any order.

        Args:
            successes: each attacker with its success: how well it recovers, higher for better, in a unit that compares
                across strategies, such as minus its own loss at the end of its turn. Those that are not finite are
                ignored, and a value that the sampler does not have teaches nothing about its field.
        """
        finite = [(strategy, float(success)) for strategy, success in successes if math.isfinite(success)]
        if not finite or self.config.curriculum == "uniform":
            return
        self._recent = [*self._recent[1 - RECENT :], sorted(success for _, success in finite)]
        recent = sorted(success for step in self._recent for success in step)
        ranks = [(bisect_left(recent, own) + bisect_right(recent, own)) / len(recent) - 1 for _, own in finite]
        for name, arms in self._arms.items():
            places = [_place(name, arms, strategy) for strategy, _ in finite]
            for place in {place for place in places if place is not None}:
                seen = [rank for rank, at in zip(ranks, places, strict=True) if at == place]
                mean = math.fsum(seen) / len(seen)  # rounded once, so without regard to their order
                self._scores[name][place] = MEMORY * self._scores[name][place] + (1 - MEMORY) * mean

    def record(self) -> dict[str, Any]:
        """Return all that was learnt as plain JSON data."""
        scores = {
            name: {arm.label: score for arm, score in zip(arms, self._scores[name], strict=True)}
            for name, arms in self._arms.items()
        }
        return {"scores": scores, "recent": [list(step) for step in self._recent]}

    def restore(self, record: Mapping[str, Any]) -> None:
        """Take up what `record` returned for the same sampler, in place of what was learnt."""
        for name, arms in self._arms.items():
            self._scores[name] = [record["scores"][name][arm.label] for arm in arms]
        self._recent = record["recent"]

    def probabilities(self, name: str) -> list[float]:
        """Return the probability of each arm of a field, in the order of `record`."""
        arms, scores = self._arms[name], self._scores[name]
        weights = [arm.prior * math.exp(score / TEMPERATURE) for arm, score in zip(arms, scores, strict=True)]
        total = math.fsum(weights)
        return [SHARE * arm.prior + (1 - SHARE) * weight / total for arm, weight in zip(arms, weights, strict=True)]

    def _pick(self, name: str, generator: torch.Generator) -> Any:
        left = _uniform(generator)
        *arms, last = zip(self._arms[name], self.probabilities(name), strict=True)
        for arm, probability in arms:
            left -= probability
            if left < 0:
                return arm.value
        return last[0].value


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator, dtype=torch.float64))


def _rates(sampler: StrategySampler) -> tuple[Arm, ...]:
    """Cut the range of each optimizer into thirds, unless it is a single rate."""
    arms = []
    for optimizer, (lowest, highest) in sorted(sampler.ranges.items()):
        low, high = math.log(lowest), math.log(highest)
        parts = ("low", "middle", "high") if low < high else ("",)
        edges = [low + (high - low) * part / len(parts) for part in range(len(parts))] + [high]
        for part, start, end in zip(parts, edges, edges[1:], strict=False):
            prior = 1 / (len(sampler.ranges) * len(parts))
            arms.append(Arm(f"{optimizer} {part}".strip(), Rates(optimizer, start, end), prior))
    return tuple(arms)


def _arms(values: Sequence[Any]) -> tuple[Arm, ...]:
    return tuple(Arm(_label(value), value, values.count(value) / len(values)) for value in dict.fromkeys(values))


def _label(value: Any) -> str:
    if not isinstance(value, tuple):
        return str(value)
    return " + ".join(_named(operation) for operation in value) or "none"


def _named(operation: Operation) -> str:
    arguments = ", ".join(f"{name}={value!r}" for name, value in operation.arguments)
    return f"{operation.name}({arguments})" if arguments else operation.name


def _place(name: str, arms: Sequence[Arm], strategy: FineTuneStrategy) -> int | None:
    """Return which of a field's arms a strategy has chosen; None if it is none of them."""
    if name != "optimizer":
        return next((place for place, arm in enumerate(arms) if arm.value == getattr(strategy, name)), None)
    lr = math.log(strategy.lr)
    for place, arm in enumerate(arms):
        optimizer, low, high = arm.value
        # as in `sophon.held_out.fields_outside`, a rate at an end of the range may lie outside by rounding
        if strategy.optimizer == optimizer and low - 1e-9 <= lr <= high + 1e-9:
            return place
    return None
