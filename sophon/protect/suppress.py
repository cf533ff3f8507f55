"""FTS, fine-tuning suppression: sample attackers, simulate them, step the released weights against their success."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sophon.config import MethodConfig
from sophon.domains import Batch, Domain, batches
from sophon.protect.first_order import first_order
from sophon.protect.pool import Pool
from sophon.protect.second_order import second_order
from sophon.protect.simulate import Engine, Past, Simulation, query_weights
from sophon.runs import derive_seed
from sophon.strategies import FineTuneStrategy, StrategySampler
from sophon.tasks import Task

ENGINES: dict[str, Engine] = {"first_order": first_order, "second_order": second_order}


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


class Suppressor:
    """Takes FTS steps on the released model.

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
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        restricted: Domain,
        sampler: StrategySampler,
        config: MethodConfig,
        seed: int,
    ) -> None:
        self.model = model
        self.task = task
        self.restricted = restricted
        self.sampler = sampler
        self.config = config
        self.seed = seed
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
        self.pool = Pool(config.pool)

    def step(self, *key: object, factor: float = 1.0, anchor: Mapping[str, Tensor] | None = None) -> SuppressionStep:
        """Simulate ``config.attackers`` attackers drawn from the run's seed and ``key``; take one Adam step.

        Args:
            key: what the attackers depend on besides the seed.
            factor: on the rate.
            anchor: the original domain's gradient by parameter, added with ``config.fts_original_weight``.
        """
        simulations = [self._simulate((*key, index)) for index in range(self.config.attackers)]
        finite = [(gradients, run) for gradients, run in simulations if _is_finite(run, gradients)]
        diverged = len(simulations) - len(finite)
        if not finite:
            return SuppressionStep(math.nan, math.nan, math.nan, diverged)
        parameters = dict(self.model.named_parameters())
        weight = self.config.fts_original_weight
        for name, parameter in parameters.items():
            parts = [gradients[name] for gradients, _ in finite if name in gradients]
            parameter.grad = torch.stack(parts).sum(0) / len(finite) if parts else torch.zeros_like(parameter)
            if anchor is not None:
                parameter.grad.add_(anchor[name], alpha=weight)
        limit = self.config.fts_max_norm
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), math.inf if limit is None else limit)
        self.optimizer.param_groups[0]["lr"] = self.config.fts_lr * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        queries = [loss for _, run in finite for loss in run.query_losses]
        last = [run.attacker_losses[-1] for _, run in finite]
        return SuppressionStep(sum(queries) / len(queries), sum(last) / len(last), float(norm), diverged)

    def _simulate(self, key: tuple[object, ...]) -> tuple[dict[str, Tensor], Simulation]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "fts", *key))
        torch.manual_seed(derive_seed(self.seed, "fts", "fresh head, noise and dropout", *key))
        strategy, attacker, run = (self._turn if self.pool.size else self._whole)(generator)
        dropped = self._unreleased(strategy, attacker)
        return {name: gradient for name, gradient in run.gradients.items() if name not in dropped}, run

    def _whole(self, generator: torch.Generator) -> tuple[FineTuneStrategy, nn.Module, Simulation]:
        """Simulate a new attacker from its first to its last step."""
        strategy = self.sampler.sample(generator)
        attacker = self._attacker(strategy, generator)
        engine = ENGINES[self.config.engine]
        gammas = query_weights(self.config.gamma, strategy.steps, self.config.query_every)
        run = engine(attacker, strategy, self.task, *self._streams(strategy, generator), gammas)
        return strategy, attacker, run

    def _turn(self, generator: torch.Generator) -> tuple[FineTuneStrategy, nn.Module, Simulation]:
        """Let an attacker of the pool go on for a chunk of steps; after its last one its place is empty."""
        place = int(torch.randint(self.pool.size, (), generator=generator))
        past = None
        if (member := self.pool.members.get(place)) is not None:
            strategy, past = member.strategy, Past(member.taken, member.moments)
            attacker = self._scratch["kept" if strategy.head == "kept" else "fresh"]
            self.pool.enter(place, attacker, self.model, self._unreleased(strategy, attacker))
        else:
            strategy = self.sampler.sample(generator)
            attacker = self._attacker(strategy, generator)
        taken = past.steps if past else 0
        steps = min(self.config.chunk, strategy.steps - taken)
        gammas = query_weights(self.config.gamma, steps, self.config.query_every)
        run = first_order(attacker, strategy, self.task, *self._streams(strategy, generator), gammas, past)
        self.pool.members.pop(place, None)
        if taken + steps < strategy.steps and _is_finite(run, run.gradients):
            own = self._unreleased(strategy, attacker)
            self.pool.leave(place, strategy, taken + steps, attacker, self.model, own, run.moments or {})
        return strategy, attacker, run

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

    def _attacker(self, strategy: FineTuneStrategy, generator: torch.Generator) -> nn.Module:
        """Return the scratch copy, reset to the released weights and buffers, with the strategy's head start."""
        attacker = self._scratch["kept" if strategy.head == "kept" else "fresh"]
        head = set() if strategy.head == "kept" else self.task.head_names(attacker)
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
        if strategy.head == "probed":
            self._refresh_probe(attacker, generator)
        return attacker

    def _refresh_probe(self, attacker: nn.Module, generator: torch.Generator) -> None:
        """Fit the defender's restricted-domain head to the features as they are now, and keep it for next time."""
        probe = FineTuneStrategy(
            optimizer="adam",
            lr=self.config.probe_lr,
            steps=self.config.probe_steps,
            scope="head",
            batch_size=self.config.query_batch_size,
        )
        gammas = [0.0] * probe.steps
        stream = self._stream("adapt", probe.batch_size, generator, "none")
        ENGINES["first_order"](attacker, probe, self.task, stream, iter(()), gammas)
        self.probed_head = {name: attacker.get_parameter(name).detach().clone() for name in self.probed_head}


def _is_finite(run: Simulation, gradients: dict[str, Tensor]) -> bool:
    # the norm, not the numbers: one that overflows would turn every weight into NaN when the gradient is clipped
    norm = float(torch.nn.utils.get_total_norm(gradients.values()))
    return all(map(math.isfinite, [norm, *run.query_losses, *run.attacker_losses]))
