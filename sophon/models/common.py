"""What adapters share: checks of their configuration, and refusals of what cannot be built."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sophon.config import ModelConfig
from sophon.errors import UserError, one_line
from sophon.models.spec import ModelSpec

PIPELINE_INDEX = "model_index.json"  # of a folder of diffusers
_SHOWN = 3  # as many names as fit into a message of one line


def check_input(config: ModelConfig, reserved: Sequence[str]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Check what every model takes; return mean and std with one number a channel.

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
    unsaid = [f"model.{key}" for key in ("mean", "std") if getattr(config, key) is None]
    if unsaid and config.weights is not None and config.library != "diffusers":
        raise UserError(
            f"{' and '.join(unsaid)}: missing; the state dict '{config.weights}' does not say it; give what its images "
            "were normalised with, as model.mean=[0.485,0.456,0.406] model.std=[0.229,0.224,0.225] for ImageNet's"
        )
    return (
        _per_channel("mean", config.mean, config.channels),
        _per_channel("std", config.std, config.channels),
    )


def _per_channel(key: str, given: Sequence[float] | None, channels: int) -> tuple[float, ...]:
    values = [0.5] if given is None else given
    if len(values) not in (1, channels):
        raise UserError(f"model.{key}: {list(values)} has {len(values)} numbers; give 1 or {channels} (model.channels)")
    if not all(math.isfinite(value) and (key == "mean" or value > 0) for value in values):
        allowed = "finite numbers" if key == "mean" else "finite numbers above 0"
        raise UserError(f"model.{key}: {list(values)} is not allowed; give {allowed}")
    return tuple(float(value) for value in values) * (channels if len(values) == 1 else 1)


def described(config: ModelConfig, **facts: Any) -> ModelConfig:
    """Return a configuration with what a folder says of its model, and with nothing that the folder leaves out."""
    return replace(config, **{"scheduler": {}, "class_conditional": False, "pretrained": False, **facts})


def constructed(spec: ModelSpec, create: Callable[..., nn.Module], arguments: Mapping[str, Any]) -> nn.Module:
    """Call a library's constructor with the architecture's name; the model comes in channels-last format.

    Raises:
        UserError: the constructor fails, whatever its first misused argument leads to.
    """
    try:
        module = create(spec.architecture, **arguments)
    except Exception as error:
        raise misfit(spec, error) from error
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def outline(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model for its structure alone: without memory for weights, where its constructor allows that.

    Some constructors compute with tensors, as RegNet's does with its widths: those are built whole. Torch's global
    generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return build()
        except (UserError, NotImplementedError, RuntimeError):
            return build()


def misfit(spec: ModelSpec, error: Exception) -> UserError:
    """Say in one line that ``model_args`` do not make the architecture."""
    return UserError(f"model.model_args: {dict(spec.model_args)} does not fit '{spec.architecture}': {one_line(error)}")


def unknown_architecture(spec: ModelSpec, names: Iterable[str]) -> UserError:
    """Say which architectures are close to one that the library does not know."""
    close = difflib.get_close_matches(spec.architecture, list(names), n=_SHOWN)
    hint = f"close to it: {', '.join(close)}" if close else "nothing is close to it"
    return UserError(f"model.architecture: '{spec.architecture}' is not known to {spec.library}; {hint}")


def require(facts: Mapping[str, Any], *names: str) -> None:
    """Raise a `UserError` unless ``facts`` of a model in memory have what it does not say itself."""
    if missing := [name for name in names if name not in facts]:
        it = "it" if len(missing) == 1 else "them"
        raise UserError(f"{', '.join(missing)}: not known of this model; give {it}")


def imported() -> Any:
    """Import transformers.

    Raises:
        UserError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError("model.library: transformers is not installed; pip install 'sophon[transformers]'") from error
    return transformers


@contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars and reports of transformers from the terminal, and give back its settings."""
    logging = imported().utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
