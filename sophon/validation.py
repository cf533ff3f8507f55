"""Convert a DictConfig to the typed configuration, and check what types cannot express."""

from __future__ import annotations

import os
import re
from dataclasses import fields
from functools import cache
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from sophon.attacker import FineTuneStrategy
from sophon.config import Config, DomainConfig, MethodConfig, StrategyConfig
from sophon.config.keys import find, keys, type_name
from sophon.errors import UserError, likely
from sophon.ranges import check, expand_paths


def from_omegaconf(config: DictConfig) -> Config:
    """Turn a composed configuration into the typed one, and check what types cannot say.

    Raises:
        UserError: a key is missing, a value is outside its range, or torchrun started what does not spread over ranks.
    """
    data: Any = {}
    try:
        data = OmegaConf.to_container(config, resolve=True)
        if isinstance(domain := data.get("domain"), dict):
            for role in ("original", "benign"):
                if isinstance(domain.get(role), dict) and domain[role].get("name", MISSING) == MISSING:
                    domain[role]["name"] = role
            if isinstance(domain.get("restricted"), dict):
                domain["restricted"] = _by_name(domain["restricted"])
        # merged anew: a key appended with `+` has slipped past the types of the composed configuration
        merged = OmegaConf.merge(_schema(Config), data)
        for key in sorted(OmegaConf.missing_keys(merged)):
            raise UserError(f"{_typed_key(key, data)}: missing; give a value")
        typed = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        name = _typed_key(getattr(error, "full_key", None) or "configuration", data)
        if isinstance(error, ConfigKeyError):
            raise UserError(f"{name}: no such key{likely(name, keys())}") from error
        raise _misfit(name, error) from error
    if not isinstance(typed, Config):
        raise UserError("the configuration is not a whole sophon configuration")
    typed.pretrain = strategy_from("pretrain", vars(typed.pretrain))
    typed.attack.strategies = {
        name: strategy_from(f"attack.strategies.{name}", values) for name, values in typed.attack.strategies.items()
    }
    check(typed)
    expand_paths(typed)
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1" and typed.verb != "protect":
        raise UserError(f"{typed.verb}: runs as one process, but WORLD_SIZE is {size}; only protect spreads over ranks")
    return typed


def _typed_key(key: str, data: Any) -> str:
    """Return a key as people type it: without the name of a restricted domain that is the only one."""
    domains = data["domain"].get("restricted") if isinstance(data.get("domain"), dict) else None
    alone = isinstance(domains, dict) and len(domains) == 1
    return re.sub(r"(?<=^domain\.restricted\.)[^.]*\.", "", key) if alone else key


def _misfit(key: str, error: Exception) -> UserError:
    known = find(key)
    must = f"; it must be {type_name(known.type)}" if known else ""
    return UserError(f"{key}: {str(error).splitlines()[0]}{must}")


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
        raise UserError(f"domain.restricted: the name '{name}' is given twice; names must differ")
    if named and one.items() <= vars(DomainConfig()).items():
        return named
    if name == MISSING:
        one["name"] = name = "restricted"
    return {name: one, **named}


def strategy_from(key: str, values: Any) -> FineTuneStrategy:
    """Make a strategy of plain data: untyped in `AttackConfig`, so that ``+attack.strategies.NAME.lr=...`` adds one."""
    if not isinstance(values, dict):
        raise UserError(f"{key}: {values} is not allowed; give a mapping, such as {{optimizer: adam, lr: 1e-3}}")
    try:
        strategy = OmegaConf.to_object(OmegaConf.merge(_schema(StrategyConfig), values))
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        below = getattr(error, "full_key", None)
        raise _misfit(f"{key}.{below}" if below else key, error) from error
    return FineTuneStrategy.of(vars(strategy), key)


METHOD_KEYS = {part.name for part in fields(MethodConfig)} - {"name", "stages"}


def method_of(method: MethodConfig, stage: str) -> MethodConfig:
    """Return the keys of a method as they are for one of its stages.

    Raises:
        UserError: the stage's entry is no mapping, or has a value for one of them that is not allowed.
    """
    key, entry = f"method.stages.{stage}", method.stages.get(stage, {})
    if not isinstance(entry, dict):
        raise UserError(f"{key}: {entry} is not allowed; give a mapping of settings, {{}} for none")
    own = {name: value for name, value in entry.items() if name in METHOD_KEYS}
    try:
        merged: Any = OmegaConf.to_object(OmegaConf.merge(_schema(MethodConfig), vars(method), own))
    except OmegaConfBaseException as error:
        raise UserError(f"{key}.{getattr(error, 'full_key', None)}: {str(error).splitlines()[0]}") from error
    check(merged, key if own else "method")
    return merged  # type: ignore[no-any-return]
