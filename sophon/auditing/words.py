"""The words of an audit: roles, exposures, how values are written and attackers described."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sophon.attacker import FineTuneStrategy

if TYPE_CHECKING:
    from sophon.tasks import Metric

Record = Mapping[str, Any]

ROLES = ("protected", "unprotected", "scratch")
# Models of the same pre-training without the restricted classes, where they are given: this one, `filtered_2`, ...
FILTERED = "filtered"
# A control beside them: the unprotected model, fine-tuned with ten times the data.
ORACLE = "oracle"


def filtered_roles(count: int) -> list[str]:
    """Return the roles of so many filtered models."""
    return [FILTERED, *(f"{FILTERED}_{number}" for number in range(2, count + 1))][:count]


def in_order(roles: Iterable[str]) -> list[str]:
    """Return roles from the protected model to what is left to an attacker without it; the oracle is none of them."""
    present = set(roles)
    filtered = sorted((role for role in present if role.startswith(FILTERED)), key=lambda role: (len(role), role))
    return [role for role in (*ROLES[:2], *filtered, *ROLES[2:]) if role in present]


def printable(text: str) -> str:
    """Return ``text`` with everything replaced that XML, a terminal or a table row cannot show."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def format_value(value: float | None, metric: Metric) -> str:
    """Write a metric's value for people: ``41.0 %``, or four digits and the unit; ``-`` for None and NaN."""
    return format_number(value, metric) + (f" {metric.unit}" if metric.unit and known(value) else "")


def format_number(value: float | None, metric: Metric) -> str:
    """Write the same without the unit, for a table whose head has it."""
    if not known(value):
        return "-"
    return f"{value:.1f}" if metric.unit == "%" else f"{value:.4g}"


def format_difference(value: float | None, metric: Metric) -> str:
    """Write a difference of two values of a metric: percentages differ by points."""
    return format_value(value, metric).replace(" %", " points")


def known(value: float | None) -> bool:
    """Return whether ``value`` is a number: neither None nor NaN."""
    return value is not None and not math.isnan(value)


_DEFAULTS = FineTuneStrategy().plain()
_SCOPES: dict[str, Callable[[Record], str]] = {
    "all": lambda s: "all parameters",
    "head": lambda s: "the head only",
    "first_blocks": lambda s: f"{_blocks('first', s)} and the head only",
    "last_blocks": lambda s: f"{_blocks('last', s)} and the head only",
    "attention": lambda s: "attention only",
    "cross_attention": lambda s: "cross-attention only",
    "lora": lambda s: f"LoRA of rank {s['lora_rank']}" + (f" on {s['lora_layers']}" * (s["lora_layers"] != "all")),
}
# How a field is said that is not as usual, in this order. One that came after these words is said by its name.
_WORDS: dict[str, Callable[[Record], str]] = {
    "scope": lambda s: _SCOPES[s["scope"]](s) if s["scope"] in _SCOPES else f"scope {s['scope']}",
    "head": lambda s: f"{s['head']} head",
    "probe_steps": lambda s: f"{s['probe_steps']} probing steps" * (s["head"] == "probed"),
    "probe_lr": lambda s: f"probing at {s['probe_lr']:.3g}" * (s["head"] == "probed"),
    "steps": lambda s: f"{s['steps']} steps",
    "schedule": lambda s: f"{s['schedule'].replace('_', ' and ')} schedule",
    "batch_size": lambda s: f"batches of {s['batch_size']}",
    "weight_decay": lambda s: f"weight decay {s['weight_decay']:.3g}",
    "augmentation": lambda s: f"{s['augmentation']} augmentation",
    "data_budget": lambda s: f"{s['data_budget']} images",
    "ema": lambda s: f"weights averaged at {s['ema']:g}",
    "max_norm": lambda s: f"gradients clipped to {s['max_norm']:g}",
    "lora_recipe": lambda s: f"adapters as {s['lora_recipe']} starts them" * (s["scope"] == "lora"),
    "batch_norm": lambda s: f"{s['batch_norm']} BatchNorm statistics",
    "optimizer_args": lambda s: ", ".join(f"{name} {value}" for name, value in s["optimizer_args"].items()),
    "loop": lambda s: f"trained by {s['loop'].rpartition('.')[2].replace('_', ' ')}",
}
# Operations of `sophon.surgery`; any other is said by its function's name.
_OPERATIONS = {
    "reinitialise": "re-initialising",
    "noise": "adding noise",
    "prune": "pruning",
    "shrink_perturb": "shrinking and perturbing",
    "interpolate": "interpolating towards a public relative",
    "restate": "re-estimating BatchNorm statistics",
    "reset_affine": "resetting affine parameters",
    "renormalise": "re-normalising the weights",
    "centre": "centring channels",
    "equalise": "equalising channels",
    "heal": "healing",
    "distil": "distilling",
}
# Said together with another field.
_TOLD_ELSEWHERE = ("optimizer", "lr", "blocks", "lora_rank", "lora_layers", "surgery")


def _blocks(which: str, strategy: Record) -> str:
    count = strategy["blocks"]
    return f"the {which} block" if count == 1 else f"the {which} {count} blocks"


def listed(words: Sequence[str]) -> str:
    """Return words as people list them: ``a, b and c``."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def counted(number: int, what: str) -> str:
    """Say how many there are: ``1 seed``, ``3 seeds``."""
    return f"{number} {what}" + "s" * (number != 1)


def operation_in_words(operation: Record) -> str:
    """Say what surgery does to the weights, with its arguments."""
    name = _OPERATIONS.get(operation["operation"]) or operation["operation"].rpartition(".")[2].replace("_", " ")
    rest = [f"{key} {value}" for key, value in operation.items() if key != "operation"]
    return f"{name} with {listed(rest)}" if rest else name


def describe(strategy: Record) -> str:
    """Say in a few words how an attacker fine-tunes: optimizer and rate, then only what differs from the defaults.

    Args:
        strategy: a `FineTuneStrategy` as plain data; missing fields have their defaults.

    Returns:
        Such as ``adam at 0.005, LoRA of rank 16, kept head, 4000 steps, after adding noise with scale 0.1``.
    """
    full = {**_DEFAULTS, **strategy}
    new = [name for name in full if name not in _WORDS and name not in _TOLD_ELSEWHERE]
    unusual = [name for name in (*_WORDS, *new) if name not in _DEFAULTS or full[name] != _DEFAULTS[name]]
    words = [f"{full['optimizer']} at {full['lr']:.3g}"]
    words += [_WORDS[name](full) if name in _WORDS else f"{name.replace('_', ' ')} {full[name]}" for name in unusual]
    if full["surgery"]:
        words.append(f"after {listed([operation_in_words(operation) for operation in full['surgery']])}")
    return ", ".join(word for word in words if word)
