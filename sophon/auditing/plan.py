"""What an audit is to run: attempts and searches, each with a name that changes with whatever decides its result."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sophon import surgery
from sophon.attacker import OF_SCOPE, FineTuneStrategy
from sophon.auditing.scene import Scene, unfit
from sophon.auditing.words import FILTERED, ORACLE, ROLES, in_order
from sophon.config import AttackConfig, SearchConfig
from sophon.domains import LoadedDomain
from sophon.domains.names import few
from sophon.errors import UserError, choose, likely
from sophon.finetune import check
from sophon.validation import strategy_from

ORACLE_TIMES = 10
ORACLE_SPLITS = ("attack", "adapt", "query")  # all but those that judge


@dataclass(frozen=True)
class Attempt:
    """An attack to run: who, against which role in which domain, with which of the audit's seeds."""

    attack: str
    strategy: FineTuneStrategy
    role: str
    seed: int
    domain: str = "restricted"
    search: str | None = None

    cost = 1

    def identifier(self, provenance: str) -> str:
        """Name the attempt's file: readable, and different as soon as anything that decides its result differs."""
        facts = {**vars(self), "strategy": self.strategy.plain()}
        where = [self.attack, *(["benign"] if self.domain == "benign" else []), self.role, str(self.seed)]
        return "-".join([*where, _digest([facts, provenance])])


@dataclass(frozen=True)
class Search:
    """A search to run against a role; its winner's attempts are part of it."""

    name: str
    config: SearchConfig
    role: str

    @property
    def cost(self) -> int:
        """Return what it costs at most, in attempts."""
        return self.config.trials + self.config.seeds

    def identifier(self, provenance: str) -> str:
        """Name the search's files, as an attempt's."""
        return f"{self.name}-{self.role}-{_digest([self.name, dataclasses.asdict(self.config), self.role, provenance])}"


Job = Attempt | Search


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


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
        name, combination = _combine(dict(zip(config.grid, combined, strict=True)))
        if name in named:
            raise UserError(f"attack.grid: '{name}' is the name of another attack; rename that one")
        named[name] = strategy_from("attack.grid", combination)
    if not named and not config.search:
        raise UserError("attack.strategies: empty; give at least one strategy, a grid or a search")
    for name in (*named, *config.search):
        if not name or not set(name) <= _SAFE:
            raise UserError(f"attack.strategies: the name '{name}' is not allowed; use letters, digits and ._-+")
    for name, strategy in named.items():
        strategy.validate(f"attack.strategies.{name}")
        surgery.check(strategy.surgery, f"attack.strategies.{name}.surgery")
        check(strategy, f"attack.strategies.{name}")
    return named


def few_shots(config: AttackConfig, named: Mapping[str, FineTuneStrategy], classes: int) -> dict[str, FineTuneStrategy]:
    """Return the attacks of ``config.shots`` by name, for so many classes.

    Raises:
        UserError: one is not among ``named``, or the name of another.
    """
    attacks = {}
    for name, counts in config.shots.items():
        choose("attack.shots", name, named)
        for count in counts:
            budget, few = count * classes, f"{name}_{count}_shot"
            if few in named:
                raise UserError(f"attack.shots.{name}: '{few}' is the name of another attack; rename that one")
            attacks[few] = replace(named[name], data_budget=budget, batch_size=min(named[name].batch_size, budget))
    return attacks


def _combine(parts: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name a combination of the grid, and put its fields together."""
    names: list[str] = []
    combination: dict[str, Any] = {}
    for key, value in parts.items():
        fields = dict(value) if isinstance(value, Mapping) else {key: value}
        if isinstance(value, Mapping):
            name = fields.pop("name", None)
            if not isinstance(name, str):
                raise UserError(f"attack.grid.{key}: {value} has no name; write {{name: NAME, FIELD: VALUE, ...}}")
        else:
            name = value if isinstance(value, str) else f"{key}{value}"
        for twice in fields.keys() & combination.keys():
            raise UserError(f"attack.grid.{key}: sets '{twice}', as does another list of the grid")
        names.append(name)
        combination |= fields
    return "-".join(names), combination


_SAFE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-+")


class Plan:
    """Everything that an audit runs.

    Attributes:
        jobs: every search and attempt, in a fixed order, the longest first.
        left_out: attacks that do not fit the models, with the reason.

    Raises:
        UserError: an attack is not well formed, or none fits the models.
    """

    def __init__(self, config: AttackConfig, scene: Scene) -> None:
        if not config.roles:
            raise UserError(f"attack.roles: empty; allowed: {', '.join(ROLES)}")
        for role in config.roles:
            choose("attack.roles", role, ROLES)
        self.config = config
        self.scene = scene
        self.left_out: dict[str, str] = {}
        self.named = strategies(config)
        self.named |= few_shots(config, self.named, len(scene.restricted.classes))
        for name in (*config.benign, *([] if config.oracle is None else [config.oracle])):
            key = "attack.oracle" if name == config.oracle else "attack.benign"
            choose(key, name, self.named)
        for name in config.knowing:
            if name not in (known := [*self.named, *config.search]):
                raise UserError(
                    f"attack.knowing: there is no attack '{name}'{likely(name, known)}; it names attacks of the suite: "
                    f"{few(known)}; attack.knowing={{}} names none"
                )
        fitting = self._fitting(self.named, scene.restricted)
        narrowed = {name: self._narrowed(name, search) for name, search in config.search.items()}
        searches = {name: search for name, search in narrowed.items() if search is not None}
        if not fitting and not searches:
            name, reason = next((name, self.left_out[name]) for name in (*self.named, *narrowed))
            raise UserError(f"attack.{'strategies' if name in self.named else 'search'}.{name}: {reason}")
        self.jobs = sorted(self._jobs(fitting, searches), key=lambda job: -_length(job))

    def _jobs(self, fitting: Mapping[str, FineTuneStrategy], searches: Mapping[str, SearchConfig]) -> Iterator[Job]:
        filtered = [role for role in self.scene.models if role.startswith(FILTERED)]
        roles = in_order([*self.config.roles, *filtered])
        if "scratch" in roles and not self.scene.buildable:
            self.left_out["the scratch role"] = "the model cannot be built with random weights; give a factory"
            roles.remove("scratch")
        for name, search in searches.items():
            yield from (Search(name, search, role) for role in roles)
        for name, strategy in fitting.items():
            for role in roles:
                yield from (Attempt(name, strategy, role, seed) for seed in range(self.config.seeds))
        if self.scene.benign is not None:
            chosen = {name: self.named[name] for name in self.config.benign}
            for name, strategy in self._fitting(chosen, self.scene.benign, " on the benign domain").items():
                for role in roles:
                    yield from (Attempt(name, strategy, role, seed, "benign") for seed in range(self.config.seeds))
        oracle = self.config.oracle
        if oracle is not None and oracle in fitting and "unprotected" in roles:
            strategy = fitting[oracle]
            own, ratio = oracle_data(strategy, self.scene.restricted)
            longer = replace(strategy, steps=round(strategy.steps * ratio), data_budget=round(own * ratio))
            yield from (Attempt(oracle, longer, ORACLE, seed) for seed in range(self.config.seeds))

    def _fitting(
        self, named: Mapping[str, FineTuneStrategy], domain: LoadedDomain, where: str = ""
    ) -> dict[str, FineTuneStrategy]:
        reasons = {name: unfit(strategy, self.scene, domain) for name, strategy in named.items()}
        self.left_out |= {f"{name}{where}": reason for name, reason in reasons.items() if reason is not None}
        return {name: strategy for name, strategy in named.items() if reasons[name] is None}

    def _narrowed(self, name: str, config: SearchConfig) -> SearchConfig | None:
        """Take out of a search's choices those values that do not fit the models; None if no value of one is left."""
        from sophon.auditing import search  # optuna takes a second to import

        search.check(name, config)
        if name in self.named:
            raise UserError(f"attack.search.{name}: the name of another attack; rename one of them")
        choices: dict[str, list[Any]] = {}
        for key, values in sorted(config.choices.items(), key=lambda item: item[0] != "scope"):
            # what matters to certain scopes only is judged with one of these
            scopes = [scope for scope in choices.get("scope", ()) if scope in OF_SCOPE.get(key, ())]
            beside = {"head": "fresh", **({"scope": scopes[0]} if scopes else {})}
            kept = []
            for value in values:
                strategy = strategy_from(f"attack.search.{name}.choices", {**beside, key: value})
                surgery.check(strategy.surgery, f"attack.search.{name}.choices.surgery")
                check(strategy, f"attack.search.{name}.choices")
                reason = unfit(self._headed(strategy, key), self.scene, self.scene.restricted)
                if reason is None:
                    kept.append(value)
                else:
                    self.left_out[f"{name}: {key} {value}"] = reason
            if not kept:
                self.left_out[name] = f"none of the values of its choice {key} fits the model"
                return None
            choices[key] = kept
        return replace(config, choices=choices)

    def _headed(self, strategy: FineTuneStrategy, key: str) -> FineTuneStrategy:
        """Let a choice other than the head's be judged with a head that the model can have."""
        has_head = bool(self.scene.task.head_names(self.scene.models["protected"]))
        return strategy if key == "head" or has_head else replace(strategy, head="kept")


def _length(job: Job) -> int:
    return job.config.steps * job.cost if isinstance(job, Search) else job.strategy.steps


def oracle_data(strategy: FineTuneStrategy, restricted: LoadedDomain) -> tuple[int, float]:
    """Return how many images the attacker has, and how many times as many the oracle: ten, or all that there are."""
    own = strategy.data_budget or len(restricted["attack"])
    everything = sum(len(restricted[split]) for split in ORACLE_SPLITS)
    return own, min(ORACLE_TIMES, everything / own)
