"""FTS, fine-tuning suppression: sample attackers, simulate them, step the released weights against their success."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sophon.attacker import FineTuneStrategy
from sophon.config import MethodConfig
from sophon.domains import Batch
from sophon.errors import UserError
from sophon.protection.context import Context
from sophon.protection.curriculum import Curriculum
from sophon.protection.inner_loop import Objective, Past, Simulation, query_weights
from sophon.protection.meta_gradient.first_order import PLAIN, first_order
from sophon.protection.meta_gradient.second_order import second_order
from sophon.protection.optimizer_state import defenders_adam, set_gradient
from sophon.protection.persistent_attackers import Member, Pool
from sophon.protection.simulated_attackers import Attackers
from sophon.protection.simulated_surgery import Factors
from sophon.seeds import derive_seed, seed_torch

ENGINES: dict[str, Callable[..., Simulation]] = {"first_order": first_order, "second_order": second_order}


def engine_of(config: MethodConfig, objectives: Sequence[Objective] = PLAIN) -> Callable[..., Simulation]:
    """Return the engine that a configuration names, with its settings.

    Raises:
        UserError: it has no such objectives.
    """
    if config.engine != "second_order":
        return partial(ENGINES[config.engine], objectives=objectives)
    if tuple(objectives) != tuple(PLAIN):
        raise UserError("method.engine: second_order asks plain suppression alone; give engine first_order")
    return partial(ENGINES[config.engine], segment=config.segment)


class FTSStep(NamedTuple):
    """What one FTS step did.

    Attributes:
        query_loss: mean suppression loss over the queries of the attackers that stayed finite; NaN if none did.
        attacker_loss: mean loss of those attackers at the last step that they took.
        gradient_norm: of what Adam follows, the anchor included, before clipping.
        diverged: attackers left out because a loss or a gradient was not finite.
    """

    query_loss: float
    attacker_loss: float
    gradient_norm: float
    diverged: int


@dataclass
class _Turn:
    """What one attacker does in one FTS step.

    Attributes:
        index: which of the step's attackers it is.
        strategy: how it fine-tunes.
        generator: of its batches.
        seed: of torch's global generator, which surgery, a fresh head, noise and dropout are drawn from.
        domain: which of the restricted domains it fine-tunes for.
        place: in the pool; -1 without one.
        member: what its earlier turns have made of it; None if it begins.
    """

    index: int
    strategy: FineTuneStrategy
    generator: torch.Generator
    seed: int
    domain: int = 0
    place: int = -1
    member: Member | None = None


class FTS:
    """Takes FTS steps on the released model.

    The attackers of a step are spread over the ranks, and every rank takes the same Adam step on the sum of their
    meta-gradients. With two attackers on two ranks that is the serial result to the bit; more are added up in another
    order.

    The meta-gradient of a fresh or probed head belongs to a head that is not released, so it is dropped; that of a
    kept head is applied. The released model is never run here: attackers are scratch copies, so no simulated attacker
    touches its BatchNorm statistics.

    Args:
        context: the model, the domains and the sampler; the method's attackers, engine and rate (alpha).
        objectives: what is asked at an attacker's queries.
    """

    def __init__(self, context: Context, objectives: Sequence[Objective] = PLAIN) -> None:
        self.model = context.model
        self.task = context.task
        self.config = context.method
        self.seed = context.seed
        self.ranks = context.ranks
        self.show = context.show
        self.optimizer = defenders_adam(self.model.parameters(), self.config.fts_lr)
        self.attackers = Attackers(context)
        self.curriculum = Curriculum(context.sampler, self.config)
        self._engine = engine_of(self.config, objectives)
        mine = self.ranks.mine(self.config.attackers)
        self.pool = Pool(self.config.pool, {place for index in mine for place in self._places(index)})

    def step(self, *key: object, factor: float = 1.0, anchor: Mapping[str, Tensor] | None = None) -> FTSStep:
        """Simulate ``config.attackers`` attackers drawn from the run's seed and ``key``; take one Adam step.

        Args:
            key: what the attackers depend on besides the seed.
            factor: on the rate.
            anchor: the original domain's gradient by parameter, added with ``config.fts_original_weight``.
        """
        turns = [self._draw(key, index) for index in self.ranks.mine(self.config.attackers)]
        self._refresh_probes(key, turns)
        total: dict[str, Tensor] = {}
        # of the attackers that stay finite: how many, their queries, the sums of the losses
        facts = torch.zeros(4, dtype=torch.float64)
        successes = []
        for turn in turns:
            gradients, run = self._simulate(turn)
            successes.append([turn.strategy.plain(), _success(run)])
            if _is_finite(run, gradients):
                for name, gradient in gradients.items():
                    total[name] = total[name] + gradient if name in total else gradient
                facts += facts.new_tensor([1, len(run.query_losses), sum(run.query_losses), run.attacker_losses[-1]])
        parameters = self.model.named_parameters()
        parts = [total[name] if name in total else torch.zeros_like(p) for name, p in parameters]
        *sums, facts = self.ranks.sum([*parts, facts])
        self._learn(successes)
        finite, queries, query_loss, attacker_loss = facts.tolist()
        diverged = self.config.attackers - int(finite)
        if not finite:
            return FTSStep(math.nan, math.nan, math.nan, diverged)
        norm = self._follow(sums, finite, factor, anchor)
        return FTSStep(query_loss / queries, attacker_loss / finite, norm, diverged)

    def _follow(self, sums: list[Tensor], count: float, factor: float, anchor: Mapping[str, Tensor] | None) -> float:
        """Take the Adam step on the mean meta-gradient of ``count`` attackers; return its norm, before clipping."""
        parameters = dict(self.model.named_parameters())
        for (name, parameter), summed in zip(parameters.items(), sums, strict=True):
            gradient = summed / count
            if anchor is not None:
                gradient.add_(anchor[name], alpha=self.config.fts_original_weight)
            set_gradient(parameter, gradient)
        limit = self.config.fts_max_norm
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), math.inf if limit is None else limit)
        self.optimizer.param_groups[0]["lr"] = self.config.fts_lr * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def _learn(self, successes: list[list[Any]]) -> None:
        """Tell the curriculum of every rank how the attackers of all ranks did."""
        if self.config.curriculum != "uniform":
            reported = [pair for part in self.ranks.gather(successes) for pair in part]
            self.curriculum.learn_all([(FineTuneStrategy.of(plain), success) for plain, success in reported])

    def _draw(self, key: tuple[object, ...], index: int) -> _Turn:
        """Draw a new attacker, or one of the pool that goes on."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "fts", *key, index))
        seed = derive_seed(self.seed, "fts", "fresh head, noise and dropout", *key, index)
        place, member = -1, None
        if self.pool.size:
            places = self._places(index)
            place = places[int(torch.randint(len(places), (), generator=generator))]
            member = self.pool.members.get(place)
        if member is not None:
            return _Turn(index, member.strategy, generator, seed, member.domain, place, member)
        strategy, count = self.curriculum.draw(generator), len(self.attackers.restricted)
        domain = int(torch.randint(count, (), generator=generator)) if count > 1 else 0
        return _Turn(index, strategy, generator, seed, domain, place)

    def _places(self, index: int) -> range:
        """Return the places that are an attacker's to choose from: no two attackers of a step ever meet in one."""
        return range(index, self.config.pool, self.config.attackers)

    def _simulate(self, turn: _Turn) -> tuple[dict[str, Tensor], Simulation]:
        """Simulate an attacker's turn: in a pool a chunk of its steps, else all; return its meta-gradient."""
        seed_torch(turn.seed)
        strategy, past = turn.strategy, None
        if turn.member is None:
            attacker, factors = self.attackers.begin(strategy, turn.domain, turn.generator)
        else:
            attacker, factors = self.attackers.scratch(strategy, turn.domain), dict(turn.member.factors)
            self.pool.enter(turn.place, attacker, self.model)
            past = Past(turn.member.taken, turn.member.optimizer_state)
        streams = self.attackers.batches
        adapt = streams(turn.domain, "adapt", strategy.batch_size, turn.generator, strategy.augmentation)
        query = streams(turn.domain, "query", self.config.query_batch_size, turn.generator)
        taken = past.steps if past else 0
        steps = min(self.config.chunk, strategy.steps - taken) if self.pool.size else strategy.steps
        adapt = self._shown(adapt, turn.index, steps)
        gammas = query_weights(self.config.gamma, steps, self.config.query_every)
        going_on = {} if past is None else {"past": past}
        run = self._engine(attacker, strategy, self.task, adapt, query, gammas, **going_on)
        self.pool.members.pop(turn.place, None)
        if taken + steps < strategy.steps and _is_finite(run, run.gradients):
            optimizer_state = run.optimizer_state or {}
            self.pool.leave(
                turn.place, strategy, taken + steps, attacker, self.model, factors, optimizer_state, turn.domain
            )
        return _to_released(run.gradients, factors), run

    def _shown(self, batches: Iterator[Batch], index: int, steps: int) -> Iterator[Batch]:
        """Show each of an attacker's steps as it takes its batch."""
        for step, batch in enumerate(batches, start=1):
            self.show(f"attacker {index + 1} of {self.config.attackers}, step {step} of {steps}")
            yield batch

    def _refresh_probes(self, key: tuple[object, ...], turns: list[_Turn]) -> None:
        """Refresh the probed head of each domain for which an attacker, of any rank, begins from it; all ranks do."""
        if not self.attackers.probed:
            return
        begun = [turn.domain for turn in turns if turn.member is None and turn.strategy.head == "probed"]
        for domain in sorted({domain for part in self.ranks.gather(begun) for domain in part}):
            self.attackers.refresh_probe(domain, *key)
            self.ranks.broadcast(self.attackers.probed[domain])  # ranks on unlike hardware differ in the last bits


def _to_released(gradients: Mapping[str, Tensor], factors: Factors) -> dict[str, Tensor]:
    """Turn gradients of attackers' weights into those of released ones; a weight of the attacker's own has none."""
    released = {}
    for name, gradient in gradients.items():
        factor = factors.get(name, 1.0)
        if isinstance(factor, float):
            if factor:
                released[name] = gradient if factor == 1.0 else gradient * factor
        elif factor.any():
            released[name] = gradient * factor
    return released


# steps at the end of a turn over which an attacker's loss is averaged: one batch's says little
_LAST = 5


def _success(run: Simulation) -> float:
    """Say how well an attacker recovers: minus its own loss at the end of its turn."""
    last = run.attacker_losses[-_LAST:]
    return -sum(last) / len(last)


def _is_finite(run: Simulation, gradients: dict[str, Tensor]) -> bool:
    # the norm, not the numbers: one that overflows would turn every weight into NaN when the gradient is clipped
    norm = float(torch.nn.utils.get_total_norm(gradients.values()))
    return all(map(math.isfinite, [norm, *run.query_losses, *run.attacker_losses]))
