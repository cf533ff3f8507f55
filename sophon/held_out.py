"""Seen or held out: whether protection could have sampled an attacker, read from the sampler's support."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sophon.attacker import OF_SCOPE, FineTuneStrategy

# Within the support that protection sampled attackers from; outside it only in the number of steps; anything else.
EXPOSURE_WORDS = {"seen": "seen", "longer": "another length", "held_out": "held out"}
EXPOSURES = tuple(EXPOSURE_WORDS)

# How long an attacker probes before it fine-tunes has no counterpart in the simulation, whose probed head is the
# defender's own: it does not decide whether an attack was seen.
_NOT_SAMPLED = ("probe_steps", "probe_lr")


def fields_outside(support: Mapping[str, Any], strategy: FineTuneStrategy) -> tuple[str, ...]:
    """Name the fields in which ``strategy`` lies outside ``support`` (see `StrategySampler.support`).

    An empty tuple means that the strategy was seen: protection could have drawn it. ``("steps",)`` means the seen kind
    of attacker, only longer (or shorter) than any that was simulated.
    """
    outside = []
    given, usual = strategy.plain(), FineTuneStrategy().plain()
    ranges = support["optimizer"]
    if strategy.optimizer not in ranges:
        outside.append("optimizer")
    elif not ranges[strategy.optimizer][0] * (1 - 1e-9) <= strategy.lr <= ranges[strategy.optimizer][1] * (1 + 1e-9):
        outside.append("lr")
    if not support["steps"][0] <= strategy.steps <= support["steps"][1]:
        outside.append("steps")
    for part in dataclasses.fields(strategy):
        if part.name in ("optimizer", "lr", "steps", *_NOT_SAMPLED):
            continue
        if strategy.scope not in OF_SCOPE.get(part.name, (strategy.scope,)):
            continue
        # an older checkpoint does not name a field that came later: its attackers all had the default
        if given[part.name] not in support.get(part.name, (usual[part.name],)):
            outside.append(part.name)
    return tuple(outside)


def exposure(outside: tuple[str, ...] | None) -> str:
    """Say whether protection could have drawn an attack: ``seen``, ``longer`` (but for its length) or ``held_out``."""
    if outside is None:
        return "held_out"
    return "seen" if not outside else "longer" if outside == ("steps",) else "held_out"
