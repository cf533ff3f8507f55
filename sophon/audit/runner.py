"""The audit: every strategy against every role, over seeds; each attempt a file, so that an audit can go on later."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sophon.audit.attacks import attack
from sophon.audit.gallery import image_grid
from sophon.audit.verdict import ROLES, format_value
from sophon.config import AttackConfig, strategy_from
from sophon.domains import Domain, few_shot
from sophon.errors import UserError, choose
from sophon.models import ModelSpec, build
from sophon.runs import derive_seed, read_json, seed_all, write_bytes, write_json
from sophon.strategies import FineTuneStrategy, fields_outside
from sophon.tasks import Task
from sophon.tracking import Tracker

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Attempt:
    """An attack to run: who, against which role, with which of the audit's seeds."""

    attack: str
    strategy: FineTuneStrategy
    role: str
    seed: int

    def identifier(self, provenance: str) -> str:
        """Name the attempt's file: readable, and different as soon as anything that decides its result differs."""
        facts = json.dumps([asdict(self), provenance], sort_keys=True)
        return f"{self.attack}-{self.role}-{self.seed}-{hashlib.sha256(facts.encode()).hexdigest()[:12]}"


def strategies(config: AttackConfig) -> dict[str, FineTuneStrategy]:
    """Return the attacks by name: those named in ``config.strategies``, then the combinations of ``config.grid``.

    Raises:
        UserError: nothing to run, a name unfit for a file, or a field or value that no strategy has.
    """
    named = dict(config.strategies)
    for key, values in config.grid.items():
        if not values:
            raise UserError(f"attack.grid.{key}: empty; give at least one value")
    for combined in itertools.product(*config.grid.values()) if config.grid else ():
        combination = dict(zip(config.grid, combined, strict=True))
        name = "-".join(value if isinstance(value, str) else f"{key}{value}" for key, value in combination.items())
        if name in named:
            raise UserError(f"attack.grid: '{name}' is the name of another attack; rename that one")
        named[name] = strategy_from("attack.grid", combination)
    if not named:
        raise UserError("attack.strategies: empty; give at least one strategy or a grid")
    for name, strategy in named.items():
        if not name or not set(name) <= _SAFE:
            raise UserError(f"attack.strategies: the name '{name}' is not allowed; use letters, digits and ._-+")
        strategy.validate(f"attack.strategies.{name}")
    return named


_SAFE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-+")


class Frechet(NamedTuple):
    """How generated images are measured.

    Attributes:
        network: whose features.
        distance: of generated images, uint8 [N, C, H, W], to the restricted domain's.
    """

    network: str
    distance: Callable[[Tensor], float]


class Runner:
    """Runs what is missing of an audit.

    Args:
        models: the model of each role but ``scratch``; never changed.
        spec: of the protected model; ``scratch`` is built from it.
        task: the model kind.
        restricted: the domain that is attacked.
        config: the attacks.
        support: the sampler's support from the checkpoint's manifest; None if it was not protected by sophon.
        provenance: identifies models and data, so that an attempt is only reused for the same ones.
        seed: the audit's.
        folder: the run directory.

    Raises:
        UserError: an attack is not well formed or does not fit the models.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        spec: ModelSpec,
        task: Task,
        restricted: Domain,
        config: AttackConfig,
        support: Mapping[str, Any] | None,
        provenance: str,
        seed: int,
        folder: Path,
    ) -> None:
        self.models = models
        self.spec = spec
        self.task = task
        self.restricted = restricted
        self.config = config
        self.support = support
        self.provenance = provenance
        self.seed = seed
        self.folder = folder
        self.strategies = strategies(config)
        if not config.roles:
            raise UserError(f"attack.roles: empty; allowed: {', '.join(ROLES)}")
        for role in config.roles:
            choose("attack.roles", role, ROLES)
        for strategy in self.strategies.values():  # checked now rather than after hours of other attempts
            model = copy.deepcopy(next(iter(models.values())))
            few_shot(restricted["attack"], strategy.data_budget, torch.Generator())
            task.start_head(model, strategy.head, restricted.classes)
            task.train_mode(model, strategy.scope)

    def attempts(self) -> list[Attempt]:
        """Return every attempt of the audit, in a fixed order."""
        return [
            Attempt(name, strategy, role, seed)
            for name, strategy in self.strategies.items()
            for role in ROLES
            if role in self.config.roles
            for seed in range(self.config.seeds)
        ]

    def run(self, tracker: Tracker, frechet: Frechet | None = None) -> list[dict[str, Any]]:
        """Run the attempts that have no file yet; return the records of all.

        Args:
            tracker: told of each attempt.
            frechet: how to measure generated images; None not to.
        """
        # distances in the features of two networks do not compare
        provenance = self.provenance if frechet is None else f"{self.provenance} {frechet.network}"
        planned = {attempt.identifier(provenance): attempt for attempt in self.attempts()}
        missing = [key for key in planned if not self._path(key).exists()]
        with tracker.progress("audit", len(planned), len(planned) - len(missing)) as advance:
            for key in missing:
                record = self._attempt(key, planned[key], frechet)
                write_json(self._path(key), record)
                advance(f"{record['attack']} on {record['role']}: {format_value(record['test'], record['metric'])}")
        return [read_json(self._path(key)) for key in planned]

    def _path(self, key: str) -> Path:
        return self.folder / "attempts" / f"{key}.json"

    def _attempt(self, key: str, attempt: Attempt, frechet: Frechet | None) -> dict[str, Any]:
        # The role is not part of the seed: all roles face the same head, data order and augmentation.
        seed = derive_seed(self.seed, "attempt", attempt.attack, attempt.seed)
        victim = self._victim(attempt.role, seed)
        pictures: list[dict[str, Any]] = []

        def draw(step: int) -> None:
            if attempt.seed == 0 and self.config.samples:  # one seed's pictures are enough to look at
                self._draw(victim, f"samples/{key}-{step}.png", step, pictures)

        outcome = attack(
            victim,
            attempt.strategy,
            self.task,
            self.restricted,
            seed=seed,
            eval_points=self.config.eval_points,
            at_point=draw,
        )
        outside = None if self.support is None else fields_outside(self.support, attempt.strategy)
        return {
            "schema_version": SCHEMA_VERSION,
            "id": key,
            "attack": attempt.attack,
            "role": attempt.role,
            "seed": attempt.seed,
            "strategy": asdict(attempt.strategy),
            "exposure": exposure(outside),
            "outside": list(outside or ()),
            "metric": asdict(self.task.metric),
            "curve": [{"step": step, "select": _finite(value)} for step, value in outcome.curve],
            "test": _finite(outcome.test),
            "details": {name: _finite(value) for name, value in self._details(victim, frechet).items()},
            "samples": pictures,
            "finished": outcome.finished,
            "seconds": outcome.seconds,
            "flops": outcome.flops,
            "steps": attempt.strategy.steps,
        }

    def _details(self, victim: nn.Module, frechet: Frechet | None) -> dict[str, float]:
        details = self.task.details(victim, self.restricted["test"])
        if frechet is not None:
            images = self.task.sample(victim, self.config.frechet_samples, derive_seed(self.seed, "frechet"))
            if images is not None:
                details["Frechet distance"] = frechet.distance(images)
        return details

    def _draw(self, victim: nn.Module, name: str, step: int, pictures: list[dict[str, Any]]) -> None:
        """Write a grid of what the model generates, and note it; the same noise for every role, attack and step."""
        images = self.task.sample(victim, self.config.samples, derive_seed(self.seed, "samples"))
        if images is not None:
            write_bytes(self.folder / name, image_grid(images))
            pictures.append({"step": step, "file": name})

    def _victim(self, role: str, seed: int) -> nn.Module:
        if role != "scratch":
            return copy.deepcopy(self.models[role])
        seed_all(derive_seed(seed, "scratch"))
        device = next(next(iter(self.models.values())).parameters()).device
        return build(self.spec).to(device)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def exposure(outside: tuple[str, ...] | None) -> str:
    """Say whether protection could have drawn an attack: ``seen``, ``longer`` (but for its length) or ``held_out``."""
    if outside is None:
        return "held_out"
    return "seen" if not outside else "longer" if outside == ("steps",) else "held_out"
