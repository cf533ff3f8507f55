"""The audit: every strategy against every role, over seeds; each attempt a file, so that an audit can go on later."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sophon.audit.attacks import attack
from sophon.audit.verdict import ROLES
from sophon.config import AttackConfig, strategy_from
from sophon.domains import Domain, few_shot
from sophon.errors import UserError, choose
from sophon.models import ModelSpec, build
from sophon.runs import derive_seed, read_json, seed_all, write_json
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
        self.folder = folder / "attempts"
        self.strategies = strategies(config)
        if not config.roles:
            raise UserError(f"attack.roles: empty; allowed: {', '.join(ROLES)}")
        for role in config.roles:
            choose("attack.roles", role, ROLES)
        for strategy in self.strategies.values():  # checked now rather than after hours of other attempts
            few_shot(restricted["attack"], strategy.data_budget, torch.Generator())
            if strategy.head == "kept":
                task.start_head(next(iter(models.values())), "kept", restricted.classes)

    def attempts(self) -> list[Attempt]:
        """Return every attempt of the audit, in a fixed order."""
        return [
            Attempt(name, strategy, role, seed)
            for name, strategy in self.strategies.items()
            for role in ROLES
            if role in self.config.roles
            for seed in range(self.config.seeds)
        ]

    def run(self, tracker: Tracker) -> list[dict[str, Any]]:
        """Run the attempts that have no file yet, telling ``tracker`` of each; return the records of all."""
        planned = {attempt.identifier(self.provenance): attempt for attempt in self.attempts()}
        missing = [key for key in planned if not self._path(key).exists()]
        with tracker.progress("audit", len(planned), len(planned) - len(missing)) as advance:
            for key in missing:
                record = self._attempt(key, planned[key])
                write_json(self._path(key), record)
                advance(f"{record['attack']} on {record['role']}: {record['test']:.1f}")
        return [read_json(self._path(key)) for key in planned]

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def _attempt(self, key: str, attempt: Attempt) -> dict[str, Any]:
        # The role is not part of the seed: all roles face the same head, data order and augmentation.
        seed = derive_seed(self.seed, "attempt", attempt.attack, attempt.seed)
        outcome = attack(
            self._victim(attempt.role, seed),
            attempt.strategy,
            self.task,
            self.restricted,
            seed=seed,
            eval_points=self.config.eval_points,
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
            "curve": [{"step": step, "select": value} for step, value in outcome.curve],
            "test": outcome.test,
            "finished": outcome.finished,
            "seconds": outcome.seconds,
            "flops": outcome.flops,
            "steps": attempt.strategy.steps,
        }

    def _victim(self, role: str, seed: int) -> nn.Module:
        if role != "scratch":
            return copy.deepcopy(self.models[role])
        seed_all(derive_seed(seed, "scratch"))
        device = next(next(iter(self.models.values())).parameters()).device
        return build(self.spec).to(device)


def exposure(outside: tuple[str, ...] | None) -> str:
    """Say whether protection could have drawn an attack: ``seen``, ``longer`` (but for its length) or ``held_out``."""
    if outside is None:
        return "held_out"
    return "seen" if not outside else "longer" if outside == ("steps",) else "held_out"
