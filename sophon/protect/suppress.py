"""FTS, fine-tuning suppression: sample attackers, simulate them, step the released weights against their success."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from sophon.config import MethodConfig
from sophon.domains import Batch, Domain, batches
from sophon.protect.first_order import first_order
from sophon.protect.pool import Member, Pool
from sophon.protect.ranks import ALONE, Ranks
from sophon.protect.regions import META_STEP, PREPARE, REDUCE
from sophon.protect.second_order import second_order
from sophon.protect.simulate import Engine, Past, Simulation, query_weights
from sophon.runs import derive_seed
from sophon.strategies import FineTuneStrategy, StrategySampler
from sophon.tasks import Task

ENGINES: dict[str, Callable[..., Simulation]] = {"first_order": first_order, "second_order": second_order}


def engine_of(config: MethodConfig) -> Engine:
    """Return the engine that a configuration names, with its settings."""
    engine = ENGINES[config.engine]
    exact = config.engine == "second_order"
    return partial(engine, segment=config.segment, window=config.window) if exact else engine


class SuppressionStep(NamedTuple):
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
        seed: of torch's global generator, which a fresh head, noise and dropout are drawn from.
        place: in the pool; -1 without one.
        member: what its earlier turns have made of it; None if it begins.
        seeded: whether the global generator has been seeded for it, and is where it goes on.
    """

    index: int
    strategy: FineTuneStrategy
    generator: torch.Generator
    seed: int
    place: int = -1
    member: Member | None = None
    seeded: bool = False


class Suppressor:
    """Takes FTS steps on the released model.

    The attackers of a step are spread over the ranks, and every rank takes the same Adam step on the sum of what they
    teach. With two attackers on two ranks that is the serial result to the bit; more are added up in another order.

    The meta-gradient of a fresh or probed head belongs to a head that is not released, so it is dropped; that of a
    kept head is applied. The released model is never run here: attackers are scratch copies, so no simulated attacker
    touches its BatchNorm statistics.

    Args:
        model: the released model; its parameters are stepped in place.
        task: gives the attacker's and the suppression loss.
        restricted: the domain whose ``adapt`` and ``query`` splits the simulation uses.
        sampler: the strategies to simulate.
        config: how many attackers, which engine, the rate (alpha).
        seed: the run's.
        ranks: who simulates which attacker.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        restricted: Domain,
        sampler: StrategySampler,
        config: MethodConfig,
        seed: int,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model = model
        self.task = task
        self.restricted = restricted
        self.sampler = sampler
        self.config = config
        self.seed = seed
        self.ranks = ranks
        self.optimizer = torch.optim.Adam(model.parameters(), lr=config.fts_lr)
        # One scratch copy with the released head and one with a restricted-domain head, allocated once.
        heads = set(sampler.config.heads)
        if "kept" in heads:
            task.start_head(model, "kept", restricted.classes)
        self._scratch = {"kept": copy.deepcopy(model)} if "kept" in heads else {}
        if heads - {"kept"}:
            other = self._scratch["fresh"] = copy.deepcopy(model)
            torch.manual_seed(derive_seed(seed, "probed head"))
            task.start_head(other, "fresh", restricted.classes)
            self.probed_head = {name: other.get_parameter(name).detach().clone() for name in task.head_names(other)}
        else:
            self.probed_head = {}
        mine = ranks.mine(config.attackers)
        self._engine = engine_of(config)
        self.pool = Pool(config.pool, {place for index in mine for place in self._places(index)})

    def step(self, *key: object, factor: float = 1.0, anchor: Mapping[str, Tensor] | None = None) -> SuppressionStep:
        """Simulate ``config.attackers`` attackers drawn from the run's seed and ``key``; take one Adam step.

        Args:
            key: what the attackers depend on besides the seed.
            factor: on the rate.
            anchor: the original domain's gradient by parameter, added with ``config.fts_original_weight``.
        """
        with record_function(PREPARE):
            turns = [self._draw(key, index) for index in self.ranks.mine(self.config.attackers)]
        self._refresh_probe(key, turns)
        total: dict[str, Tensor] = {}
        # of the attackers that stay finite: how many, their queries, the sums of the losses
        facts = torch.zeros(4, dtype=torch.float64)
        for turn in turns:
            gradients, run = self._simulate(turn)
            if _is_finite(run, gradients):
                for name, gradient in gradients.items():
                    total[name] = total[name] + gradient if name in total else gradient
                facts += facts.new_tensor([1, len(run.query_losses), sum(run.query_losses), run.attacker_losses[-1]])
        with record_function(REDUCE):
            parameters = self.model.named_parameters()
            parts = [total[name] if name in total else torch.zeros_like(p) for name, p in parameters]
            *sums, facts = self.ranks.sum([*parts, facts])
        finite, queries, query_loss, attacker_loss = facts.tolist()
        diverged = self.config.attackers - int(finite)
        if not finite:
            return SuppressionStep(math.nan, math.nan, math.nan, diverged)
        with record_function(META_STEP):
            norm = self._follow(sums, finite, factor, anchor)
        return SuppressionStep(query_loss / queries, attacker_loss / finite, norm, diverged)

    def _follow(self, sums: list[Tensor], count: float, factor: float, anchor: Mapping[str, Tensor] | None) -> float:
        """Take the Adam step on the mean of what ``count`` attackers teach; return its norm, before clipping."""
        parameters = dict(self.model.named_parameters())
        for (name, parameter), summed in zip(parameters.items(), sums, strict=True):
            parameter.grad = summed / count
            if anchor is not None:
                parameter.grad.add_(anchor[name], alpha=self.config.fts_original_weight)
        limit = self.config.fts_max_norm
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), math.inf if limit is None else limit)
        self.optimizer.param_groups[0]["lr"] = self.config.fts_lr * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def _draw(self, key: tuple[object, ...], index: int) -> _Turn:
        """Draw a new attacker, or one of the pool that goes on."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "fts", *key, index))
        seed = derive_seed(self.seed, "fts", "fresh head, noise and dropout", *key, index)
        if not self.pool.size:
            return _Turn(index, self.sampler.sample(generator), generator, seed)
        places = self._places(index)
        place = places[int(torch.randint(len(places), (), generator=generator))]
        member = self.pool.members.get(place)
        strategy = self.sampler.sample(generator) if member is None else member.strategy
        return _Turn(index, strategy, generator, seed, place, member)

    def _places(self, index: int) -> range:
        """Return the places that are an attacker's to choose from: no two attackers of a step ever meet in one."""
        return range(index, self.config.pool, self.config.attackers)

    def _simulate(self, turn: _Turn) -> tuple[dict[str, Tensor], Simulation]:
        """Simulate an attacker's turn: in a pool a chunk of its steps, else all; return what it teaches."""
        if not turn.seeded:
            torch.manual_seed(turn.seed)
        strategy, member, past = turn.strategy, turn.member, None
        with record_function(PREPARE):
            if member is None:
                attacker = self._attacker(strategy)
            else:
                attacker = self._scratch["kept" if strategy.head == "kept" else "fresh"]
                self.pool.enter(turn.place, attacker, self.model, self._unreleased(strategy, attacker))
                past = Past(member.taken, member.moments)
            own = self._unreleased(strategy, attacker)
            adapt, query = self._streams(strategy, turn.generator)
        taken = past.steps if past else 0
        steps = min(self.config.chunk, strategy.steps - taken) if self.pool.size else strategy.steps
        gammas = query_weights(self.config.gamma, steps, self.config.query_every)
        if past is None:
            run = self._engine(attacker, strategy, self.task, adapt, query, gammas)
        else:
            run = first_order(attacker, strategy, self.task, adapt, query, gammas, past)
        self.pool.members.pop(turn.place, None)
        if taken + steps < strategy.steps and _is_finite(run, run.gradients):
            with record_function(PREPARE):
                self.pool.leave(turn.place, strategy, taken + steps, attacker, self.model, own, run.moments or {})
        return {name: gradient for name, gradient in run.gradients.items() if name not in own}, run

    def _unreleased(self, strategy: FineTuneStrategy, attacker: nn.Module) -> set[str]:
        return set() if strategy.head == "kept" else self.task.head_names(attacker)

    def _streams(
        self, strategy: FineTuneStrategy, generator: torch.Generator
    ) -> tuple[Iterator[Batch], Iterator[Batch]]:
        return (
            self._stream("adapt", strategy.batch_size, generator, strategy.augmentation),
            self._stream("query", self.config.query_batch_size, generator, "none"),
        )

    def _stream(self, split: str, size: int, generator: torch.Generator, augmentation: str) -> Iterator[Batch]:
        # its own generator: how many batches the attacker takes must not shift what the query sees
        own = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
        return batches(self.restricted[split], size, own, augmentation)

    def _attacker(self, strategy: FineTuneStrategy) -> nn.Module:
        """Return the scratch copy, reset to the released weights and buffers, with the strategy's head start."""
        attacker = self._scratch["kept" if strategy.head == "kept" else "fresh"]
        head = self._unreleased(strategy, attacker)
        released = self.model.state_dict()
        with torch.no_grad():
            for name, value in attacker.state_dict().items():
                if name not in head:
                    value.copy_(released[name])
            if strategy.head == "fresh":
                self.task.start_head(attacker, "fresh", self.restricted.classes)
            elif strategy.head == "probed":
                for name, value in self.probed_head.items():
                    attacker.get_parameter(name).copy_(value)
        return attacker

    def _refresh_probe(self, key: tuple[object, ...], turns: list[_Turn]) -> None:
        """Fit the defender's restricted-domain head to the features as they are now, if an attacker starts from it.

        All ranks do the same, on the draws of the first such attacker; ``turns``, this rank's, then begin with it, for
        it goes on where the probe has left its draws.
        """
        if "probed" not in self.sampler.config.heads:
            return
        probed = [turn.index for turn in turns if turn.member is None and turn.strategy.head == "probed"]
        index = min(chain.from_iterable(self.ranks.gather(probed)), default=None)
        if index is None:
            return
        turns.sort(key=lambda turn: turn.index != index)
        turn = turns[0] if turns[0].index == index else self._draw(key, index)
        torch.manual_seed(turn.seed)
        turn.seeded = True
        probe = FineTuneStrategy(
            optimizer="adam",
            lr=self.config.probe_lr,
            steps=self.config.probe_steps,
            scope="head",
            batch_size=self.config.query_batch_size,
        )
        with record_function(PREPARE):
            attacker = self._attacker(turn.strategy)
            stream = self._stream("adapt", probe.batch_size, turn.generator, "none")
        ENGINES["first_order"](attacker, probe, self.task, stream, iter(()), [0.0] * probe.steps)
        self.probed_head = {name: attacker.get_parameter(name).detach().clone() for name in self.probed_head}
        self.ranks.broadcast(self.probed_head)  # ranks on unlike hardware differ in the last bits


def _is_finite(run: Simulation, gradients: dict[str, Tensor]) -> bool:
    # the norm, not the numbers: one that overflows would turn every weight into NaN when the gradient is clipped
    norm = float(torch.nn.utils.get_total_norm(gradients.values()))
    return all(map(math.isfinite, [norm, *run.query_losses, *run.attacker_losses]))
