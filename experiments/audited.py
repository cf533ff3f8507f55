"""What the scripts that gather an experiment's audits share; a script of a folder appends this one to ``sys.path``."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import sophon  # noqa: F401 - declares torchvision's operators where its compiled part cannot load
from sophon.audit.scores import ci95


def machine() -> dict[str, str]:
    """Say what figures were taken with."""
    return {"processor": platform.machine(), "torch": torch.__version__, "python": platform.python_version()}


def today() -> str:
    """Return the date in universal time."""
    return datetime.now(UTC).date().isoformat()


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write results with the date and the machine on top."""
    path.write_text(json.dumps({"date": today(), "machine": machine(), **results}, indent=1) + "\n")


def brief(group: dict[str, Any]) -> dict[str, Any]:
    """Return of a worst case or family: how many attacks, each role's best one with its test values, the gap closed."""
    roles = {
        role: {key: values[key] for key in ("attack", "mean", "values")} for role, values in group["roles"].items()
    }
    return {"attacks": group["attacks"], "roles": roles, "gap_closed": group["gap_closed"]}


def tested(audit: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return by attack: its exposure, the gap closed, and every test value by role."""
    return {
        row["attack"]: {
            "exposure": row["exposure"],
            "gap_closed": row["gap_closed"]["value"],
            "test": {role: values["values"] for role, values in row["roles"].items()},
        }
        for row in audit["attacks"]
    }


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Write values: their mean with the half width of its 95 % Student interval; of two or fewer, themselves.

    An interval of two values says nothing that they do not say.
    """
    half = ci95(values)
    if len(values) <= 2 or half is None:
        return ", ".join(f"{value:.{digits}f}" for value in values)
    return f"{statistics.mean(values):.{digits}f} ± {half:.{digits}f}"
