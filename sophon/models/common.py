"""What the model kinds share: checks of their configuration, and their part of the model card."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from sophon.config import ModelConfig
from sophon.errors import UserError


class Card(NamedTuple):
    """What a model card says of the model itself.

    Attributes:
        pipeline_tag: the Hub's name of what it does.
        kind: what it is, a noun phrase that begins a sentence.
        notes: sentences on its input and its output.
        loading: Python code that loads it from ``PATH`` without sophon.
    """

    pipeline_tag: str
    kind: str
    notes: tuple[str, ...]
    loading: str


def check_input(config: ModelConfig, reserved: Sequence[str]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Check what every model kind takes; return mean and std with one number a channel.

    Raises:
        UserError: a value is out of range or contradicts another, or ``model_args`` has a ``reserved`` key.
    """
    for key in ("image_size", "channels"):
        if getattr(config, key) <= 0:
            raise UserError(f"model.{key}: {getattr(config, key)} is not allowed; give a whole number above 0")
    if config.pretrained and config.weights is not None:
        raise UserError(f"model.weights: '{config.weights}' contradicts model.pretrained=true; give one of the two")
    for key in reserved:
        if key in config.model_args:
            raise UserError(f"model.model_args.{key}: set by sophon; not allowed here")
    return (
        _per_channel("mean", config.mean, config.channels),
        _per_channel("std", config.std, config.channels),
    )


def _per_channel(key: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    if len(values) not in (1, channels):
        raise UserError(f"model.{key}: {list(values)} has {len(values)} numbers; give 1 or {channels} (model.channels)")
    if not all(math.isfinite(value) and (key == "mean" or value > 0) for value in values):
        allowed = "finite numbers" if key == "mean" else "finite numbers above 0"
        raise UserError(f"model.{key}: {list(values)} is not allowed; give {allowed}")
    return tuple(float(value) for value in values) * (channels if len(values) == 1 else 1)
