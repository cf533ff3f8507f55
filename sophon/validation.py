"""Where a DictConfig becomes the typed configuration, and what its types cannot say is checked."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import fields
from functools import cache
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from sophon.attacker import AUGMENTATIONS, HEADS, SCHEDULES, FineTuneStrategy
from sophon.config import (
    AttackConfig,
    Config,
    DomainConfig,
    DomainsConfig,
    MethodConfig,
    StrategyConfig,
    keyed,
)
from sophon.config.keys import keys
from sophon.errors import UserError, choose, likely
from sophon.sampler import SamplerConfig, StrategySampler


def from_omegaconf(config: DictConfig) -> Config:
    """Turn a composed configuration into the typed one, and check what types cannot say.

    Raises:
        UserError: a key is missing, a value is outside its range, or torchrun started what does not spread over ranks.
    """
    try:
        data: Any = OmegaConf.to_container(config, resolve=True)
        if isinstance(data.get("domain"), dict) and isinstance(data["domain"].get("restricted"), dict):
            data["domain"]["restricted"] = _by_name(data["domain"]["restricted"])
        # merged anew: a key appended with `+` has slipped past the types of the composed configuration
        merged = OmegaConf.merge(_schema(Config), data)
        for key in sorted(OmegaConf.missing_keys(merged)):
            raise UserError(f"{key}: missing; give a value")
        typed = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        name = getattr(error, "full_key", None) or "configuration"
        if isinstance(error, ConfigKeyError):
            raise UserError(f"{name}: no such key{likely(name, keys())}") from error
        raise UserError(f"{name}: {str(error).splitlines()[0]}") from error
    if not isinstance(typed, Config):
        raise UserError("the configuration is not a whole sophon configuration")
    typed.pretrain = strategy_from("pretrain", vars(typed.pretrain))
    typed.attack.strategies = {
        name: strategy_from(f"attack.strategies.{name}", values) for name, values in typed.attack.strategies.items()
    }
    validate(typed)
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1" and typed.verb != "protect":
        raise UserError(f"{typed.verb}: runs as one process, but WORLD_SIZE is {size}; only protect spreads over ranks")
    return typed


@cache
def _schema(kind: type) -> DictConfig:
    """Return the types of a configuration; reading a data class anew takes longer than merging into a copy of it."""
    schema: DictConfig = OmegaConf.structured(kind)
    return schema


def _by_name(given: dict[str, Any]) -> dict[str, Any]:
    """Return restricted domains by name: the one whose keys stand there, then those that stand there by name."""
    own = {part.name for part in fields(DomainConfig)}
    one = {key: value for key, value in given.items() if key in own}
    named = {key: value for key, value in given.items() if key not in own}
    for key, value in named.items():
        if not isinstance(value, dict):
            raise UserError(f"domain.restricted.{key}: no such key{likely(key, own)}; a further domain is a mapping")
        value.setdefault("name", key)
    name = one.get("name", MISSING)
    if name in named:
        raise UserError(f"domain.restricted: the name '{name}' is given 2 times; names must differ")
    if named and one.items() <= vars(DomainConfig()).items():
        return named
    if name == MISSING:
        raise UserError("domain.restricted.name: missing; give a value")
    return {name: one, **named}


def strategy_from(key: str, values: Any) -> FineTuneStrategy:
    """Make a strategy of plain data: untyped in `AttackConfig`, so that ``+attack.strategies.NAME.lr=...`` adds one."""
    try:
        strategy = OmegaConf.to_object(OmegaConf.merge(_schema(StrategyConfig), values))
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        below = getattr(error, "full_key", None)
        raise UserError(f"{key}{f'.{below}' if below else ''}: {str(error).splitlines()[0]}") from error
    return FineTuneStrategy.of(vars(strategy), key)


def validate(config: Config) -> None:
    """Raise a `UserError` that names the key if a value is outside its range."""
    config.pretrain.validate("pretrain")
    if config.pretrain.surgery or config.pretrain.scope == "lora":
        raise UserError("pretrain: surgery and scope lora are for audits")
    method, guard, attack = config.method, config.guard, config.attack
    for name in ("rounds", "attackers", "chunk", "query_every", "query_batch_size", "ntr_batch_size"):
        _within(f"method.{name}", getattr(method, name), 1)
    _within("method.segment", method.segment, 1)
    if method.window is not None:
        _within("method.window", method.window, 0)
    _within("guard.every", guard.every, 1)
    _within("attack.seeds", attack.seeds, 1)
    for name in ("fts_steps", "ntr_steps", "probe_steps", "distillation", "fts_original_weight", "pool"):
        _within(f"method.{name}", getattr(method, name), 0)
    for name in ("fts_lr", "ntr_lr", "probe_lr", "temperature"):
        _within(f"method.{name}", getattr(method, name), 0, exclusive=True)
    if not 0 < method.suppression_timesteps <= 1:
        raise UserError(
            f"method.suppression_timesteps: {method.suppression_timesteps} is not allowed; give > 0 and <= 1"
        )
    if method.pool and method.engine != "first_order":
        raise UserError(f"method.pool: {method.pool} is not allowed with engine {method.engine}; it needs first_order")
    if 0 < method.pool < method.attackers:
        raise UserError(
            f"method.pool: {method.pool} is not allowed with {method.attackers} attackers; give 0, or at least as many"
        )
    if not 0 <= method.curriculum_share <= 1:
        raise UserError(f"method.curriculum_share: {method.curriculum_share} is not allowed; give >= 0 and <= 1")
    if not 0 <= method.curriculum_memory < 1:
        raise UserError(f"method.curriculum_memory: {method.curriculum_memory} is not allowed; give >= 0 and < 1")
    _validate_objectives(method)
    _validate_coordinates(method)
    if method.fts_max_norm is not None:
        _within("method.fts_max_norm", method.fts_max_norm, 0, exclusive=True)
    for name in ("tolerance", "repair_steps", "patience", "max_ntr_steps"):
        _within(f"guard.{name}", getattr(guard, name), 0)
    _within("guard.growth", guard.growth, 1)
    _within("attack.eval_points", attack.eval_points, 2)
    _within("attack.samples", attack.samples, 0)
    if attack.frechet_samples:
        _within("attack.frechet_samples", attack.frechet_samples, 2)
    for name in ("evaluation_images", "sample_steps"):
        _within(f"task.{name}", getattr(config.task, name), 1)
    _within("n", config.n, 1)
    _within("threads", config.threads, 0)
    _within("workers", config.workers, 1)
    _validate_searches(attack)
    _validate_domains(config.domain)
    for head in attack.masking.heads:
        choose("attack.masking.heads", head, HEADS)
    _within("attack.masking.steps", attack.masking.steps, 0)
    _within("attack.masking.batches", attack.masking.batches, 1)
    _within("attack.shards", attack.shards, 1)
    if not 0 <= attack.shard < attack.shards:
        raise UserError(f"attack.shard: {attack.shard} is not allowed; it must be 0 to {attack.shards - 1}")
    choose("method.ntr_augmentation", method.ntr_augmentation, AUGMENTATIONS)
    choose("amp", config.amp, ("all", "cuda", "none"))
    choose("tracking.wandb", config.tracking.wandb, ("disabled", "offline", "online"))
    choose("method.engine", method.engine, ("first_order", "second_order"))
    choose("method.schedule", method.schedule, SCHEDULES)
    choose("method.curriculum", method.curriculum, ("uniform", "bandit"))
    choose("method.gamma", method.gamma, ("uniform", "linear", "last"))
    if not config.name or "/" in config.name or config.name.startswith("."):
        raise UserError(f"name: '{config.name}' is not allowed; it names a folder")


def _validate_domains(domains: DomainsConfig) -> None:
    _within("domain.memory_gb", domains.memory_gb, 0)
    names = [each.name for each in domains.restricted.values()]
    for name in names if len(names) > 1 else ():
        if names.count(name) > 1:
            raise UserError(
                f"domain.restricted: the name '{name}' is given {names.count(name)} times; names must differ"
            )
        if not name or "/" in name or name.startswith("."):
            raise UserError(f"domain.restricted: the name '{name}' is not allowed; among several it names a folder")
    for key, each in keyed(domains.restricted).items():
        choose(f"{key}.labels", each.labels, ("given", "none"))
        _within(f"{key}.clusters", each.clusters, 2)
    for key, other in (("domain.original", domains.original), ("domain.benign", domains.benign)):
        if other is not None and other.labels != "given":
            raise UserError(f"{key}.labels: '{other.labels}' is not allowed; only a restricted domain may be without")


def _validate_objectives(method: MethodConfig) -> None:
    clamp = method.clamp
    for name in ("suppression_weight", "sharpness", "condition"):
        _within(f"method.{name}", getattr(method, name), 0)
    for name in ("curvature", "contract", "tail", "inverse", "slack", "lipschitz"):
        _within(f"method.clamp.{name}", getattr(clamp, name), 0)
    for name in ("c_max", "probe_width"):
        _within(f"method.clamp.{name}", getattr(clamp, name), 0, exclusive=True)
    _within("method.clamp.probes", clamp.probes, 1)
    _within("method.clamp.kappa_min", clamp.kappa_min, -sys.float_info.max)
    if not 0 < clamp.c_limit < 1:
        raise UserError(f"method.clamp.c_limit: {clamp.c_limit} is not allowed; give > 0 and < 1")
    choose("method.fixed_norms", method.fixed_norms, ("none", "layer", "channel"))
    asked = {
        "suppression_weight": method.suppression_weight != 1,
        "sharpness": method.sharpness > 0,
        "clamp": clamp.on,
        "condition": method.condition > 0,
    }
    for name, on in asked.items():
        if on and method.engine != "first_order":
            raise UserError(f"method.{name}: is not allowed with engine {method.engine}; it needs first_order")
    if not (method.suppression_weight or clamp.on or method.condition):
        raise UserError("method.suppression_weight: 0 leaves nothing to ask; give > 0, or weigh clamp or condition")


def _validate_coordinates(method: MethodConfig) -> None:
    for index, gain in enumerate(method.gains):
        _within(f"method.gains[{index}]", gain, 0, exclusive=True)
    if not (method.gains or method.fts_steps):
        raise UserError("method.fts_steps: 0 is not allowed without method.gains; it must be >= 1")
    _within("method.spread", method.spread, 1)
    if method.spread > 1 and not method.gains:
        raise UserError(f"method.spread: {method.spread:g} is not allowed without method.gains; it must be 1")


def _validate_searches(attack: AttackConfig) -> None:
    for name, search in attack.search.items():
        key = f"attack.search.{name}"
        choose(f"{key}.sampler", search.sampler, ("tpe", "random"))
        for part in ("trials", "steps", "seeds"):
            _within(f"{key}.{part}", getattr(search, part), 1)
        _within(f"{key}.startup", search.startup, 0)
        _within(f"{key}.eval_points", search.eval_points, 2)
        StrategySampler(SamplerConfig(search.optimizers), where=f"{key}.optimizers")


def _within(key: str, value: float, lowest: float, *, exclusive: bool = False) -> None:
    if not math.isfinite(value) or value < lowest or (exclusive and value == lowest):
        raise UserError(f"{key}: {value} is not allowed; it must be {'>' if exclusive else '>='} {lowest}")
