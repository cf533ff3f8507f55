"""What the model kinds share: checks of their configuration, loading of a state dict, and their part of the card."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from sophon.config import ModelConfig
from sophon.errors import UserError

_SHOWN = 3  # as many keys as fit into a message of one line


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


def one_line(error: Exception) -> str:
    """Return an error's message on one line, of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def load_state(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    where: str,
    *,
    explain: Callable[[Sequence[str]], str | None] = lambda wrong: None,
) -> None:
    """Load a state dict into a model, all of it.

    Args:
        module: the model, on any device.
        tensors: the state dict.
        where: what it was read from; messages begin with it.
        explain: given the names whose shapes differ, may say why in better words than a list of shapes.

    Raises:
        UserError: the names or the shapes are not the model's. The model is unchanged.
    """
    state = module.state_dict()
    _check_names(where, tensors, state)
    wrong = [name for name in state if tensors[name].shape != state[name].shape]
    if wrong:
        shapes = [f"{name} {tuple(tensors[name].shape)}, not {tuple(state[name].shape)}" for name in wrong]
        raise UserError(f"{where}{explain(wrong) or f' does not fit the model: {_few(shapes)}'}")
    module.load_state_dict(tensors)


def _check_names(where: str, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    parts = []
    if missing := [name for name in state if name not in tensors]:
        parts.append(f"it lacks {_few(missing)}")
    if unexpected := [name for name in tensors if name not in state]:
        parts.append(f"the model has no {_few(unexpected)}")
    if parts:
        raise UserError(f"{where} does not fit the model: {'; '.join(parts)}")


def _few(names: Sequence[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
