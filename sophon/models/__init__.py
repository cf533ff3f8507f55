"""Models and what must travel with their weights.

Each model kind is a module with the same functions and names; here the spec's library chooses among them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torch import nn

from sophon.config import ModelConfig
from sophon.errors import choose
from sophon.models import classifiers, diffusion
from sophon.models.common import Card
from sophon.models.spec import ModelSpec

__all__ = [
    "LIBRARIES",
    "Card",
    "ModelSpec",
    "build",
    "card",
    "config_file",
    "create",
    "load_weights",
    "save",
    "weights_file",
]


class _Kind(Protocol):
    """What a model kind's module has."""

    WEIGHTS: str
    CONFIG: str

    def create(self, config: ModelConfig, classes: Sequence[str]) -> tuple[nn.Module, ModelSpec]: ...

    def build(self, spec: ModelSpec) -> nn.Module: ...

    def load_weights(self, module: nn.Module, path: str | Path, *, key: str) -> None: ...

    def save(self, folder: Path, module: nn.Module, spec: ModelSpec) -> None: ...

    def card(self, spec: ModelSpec) -> Card: ...


LIBRARIES = (*classifiers.LIBRARIES, *diffusion.LIBRARIES)
_KINDS: dict[str, _Kind] = {
    **dict.fromkeys(classifiers.LIBRARIES, classifiers),
    **dict.fromkeys(diffusion.LIBRARIES, diffusion),
}


def create(config: ModelConfig, classes: Sequence[str]) -> tuple[nn.Module, ModelSpec]:
    """Build the model that a configuration asks for, with the weights that it names; else with random ones.

    Args:
        config: the ``model`` group.
        classes: names of the original domain's classes, in the order of the labels.

    Raises:
        UserError: a value is out of range or contradicts another, or weights cannot be had or do not fit.
    """
    choose("model.library", config.library, _KINDS)
    return _KINDS[config.library].create(config, classes)


def build(spec: ModelSpec) -> nn.Module:
    """Build a model with random weights, drawn from torch's global generator.

    Raises:
        UserError: the architecture is not known or its arguments do not fit it.
    """
    choose("model.library", spec.library, _KINDS)
    return _KINDS[spec.library].build(spec)


def load_weights(module: nn.Module, spec: ModelSpec, path: str | Path, *, key: str) -> None:
    """Load a model's weights, all of them; messages name ``key``.

    Raises:
        UserError: the file is missing or corrupt, or its names or shapes are not the model's. The model is unchanged.
    """
    _KINDS[spec.library].load_weights(module, path, key=key)


def save(folder: Path, module: nn.Module, spec: ModelSpec) -> None:
    """Write weights and configuration into ``folder`` as the spec's library loads them."""
    _KINDS[spec.library].save(folder, module, spec)


def weights_file(spec: ModelSpec) -> str:
    """Return where the weights lie in a checkpoint's folder."""
    return _KINDS[spec.library].WEIGHTS


def config_file(spec: ModelSpec) -> str:
    """Return where the library's own configuration lies in a checkpoint's folder."""
    return _KINDS[spec.library].CONFIG


def card(spec: ModelSpec) -> Card:
    """Return what a model card says of the model itself."""
    return _KINDS[spec.library].card(spec)
