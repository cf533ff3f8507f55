"""What the defender asks at an attacker's queries, one file each: `Suppression`, and what may be asked besides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sophon.arguments import make
from sophon.protection.inner_loop import Objective

# Imported only when named; a dotted path names any other.
OBJECTIVES = {
    "suppression": "sophon.protection.objectives.suppression.Suppression",
    "sharpness": "sophon.protection.objectives.sharpness.Sharpness",
    "clamp": "sophon.protection.objectives.clamp.Clamp",
    "condition": "sophon.protection.objectives.condition.Condition",
}


def objectives_of(settings: Mapping[str, Any], key: str = "method.objectives") -> tuple[Objective, ...]:
    """Return the objectives that a configuration names, in its order; an entry that is null is left out.

    Args:
        settings: by name their arguments; with ``objective: package.module.Class`` among them, one of a user's own.

    Raises:
        UserError: one is not known, or does not take its arguments.
    """
    return tuple(
        make(f"{key}.{name}", name, entry, "objective", OBJECTIVES, Objective)
        for name, entry in settings.items()
        if entry is not None
    )
