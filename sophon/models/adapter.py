"""The contract between a model's library and everything else: `ModelAdapter`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from sophon.config import ModelConfig
from sophon.models.frozen import FrozenParts
from sophon.models.partition import Block
from sophon.models.spec import ModelSpec
from sophon.models.weights import find_weights, load_state, read_state


class AdaptedModel(NamedTuple):
    """A model with what sophon needs to know of it."""

    model: nn.Module
    spec: ModelSpec


class ModelCard(NamedTuple):
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


class ModelAdapter(Protocol):
    """All that is particular to the models of one library; nothing outside `sophon.models` asks which library it is.

    Base class of the adapters. What is defined here suits a model without a head that takes images as they are.

    Attributes:
        library: a key of `sophon.models.LIBRARIES`.
        kind: the task that its models are made for, a key of `sophon.tasks.TASKS`.
        weights: name of the weights file in a folder of the library's own format.
        settings: name of the configuration file there.
        spec: which model of the library.
    """

    library: ClassVar[str]
    kind: ClassVar[str]
    weights: ClassVar[str]
    settings: ClassVar[str]
    spec: ModelSpec

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec

    @classmethod
    def from_config(cls, config: ModelConfig, classes: Sequence[str]) -> ModelAdapter:
        """Check a configuration and complete it.

        Args:
            config: the ``model`` group.
            classes: names of the original domain's classes, in the order of the labels.

        Raises:
            UserError: a value is out of range or contradicts another; the message names its key.
        """

    @classmethod
    def describe(cls, folder: Path, config: ModelConfig) -> ModelConfig:
        """Complete a configuration by what a folder of the library's own format says of the model in it.

        Raises:
            UserError: the folder does not describe a model of this library.
        """

    @classmethod
    def recognise(cls, module: nn.Module, **facts: Any) -> ModelSpec | None:
        """Return the spec of a model in memory; None if it is not of this library.

        Args:
            module: the model.
            facts: fields of `ModelSpec` that the model does not say of itself; they take the place of those it does.
        """

    @property
    def head(self) -> str | None:
        """The dotted name of the module that belongs to the domain rather than to the features; None without one.

        Raises:
            UserError: the architecture has no single such module.
        """
        return None

    @property
    def heads(self) -> tuple[str, ...]:
        """All such modules, ``head`` the first: a class embedding may be there once a block."""
        return () if self.head is None else (self.head,)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """The shape of one input: (C, H, W) of an image, or of the latent that a denoiser works on."""
        return self.spec.channels, self.spec.image_size, self.spec.image_size

    @property
    def frozen(self) -> FrozenParts | None:
        """What of a latent pipeline is used as it is: it leads from images to latents and back; None without it."""
        return None

    def start(self, config: ModelConfig) -> nn.Module:
        """Build the model that a configuration asks for, with the weights that it names; else with random ones."""

    def fresh(self) -> nn.Module | None:
        """Build a model with random weights, drawn from torch's global generator alone; None if that cannot be done."""

    def forward(self, model: nn.Module, inputs: Tensor, **conditions: Tensor) -> Tensor:
        """Run the model: normalised images [B, C, H, W] to logits [B, classes], or to a denoiser's prediction.

        Args:
            model: built by this adapter, or a copy with another head.
            inputs: images, or noised images x_t.
            conditions: of a denoiser ``timesteps`` [B], ``labels`` [B], which are not read without classes, and what
                `FrozenParts.embed` returns of prompts.
        """

    def blocks(self, model: nn.Module) -> list[Block]:
        """Return the blocks from input to output: every parameter and buffer outside the head is in one of them."""

    def classes_in(self, model: nn.Module) -> int | None:
        """Return how many classes a model's head has; None if it has no head."""
        return None

    def start_head(self, model: nn.Module, classes: Sequence[str]) -> None:
        """Replace the head, if any, in place by a new one for ``classes``, drawn from torch's global generator."""

    @classmethod
    def weights_in(cls, path: Path, key: str = "model.weights") -> Path:
        """Return the ``.safetensors`` file that a path is or, if it is a folder, has.

        Raises:
            UserError: it is a pickle, or a folder without that file; the message names ``key``.
        """
        return find_weights(path, cls.weights, key, cls.library)

    def load_weights(self, model: nn.Module, path: Path, *, key: str, strip_prefix: str = "") -> None:
        """Load all of a model's weights from a ``.safetensors`` file or a folder; messages name ``key``.

        Raises:
            UserError: see `sophon.models.weights.load_state`. The model is unchanged.
        """
        path = self.weights_in(path, key)
        load_state(model, read_state(path, key, strip_prefix), f"{key}: {path}")

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write weights and configuration into ``folder`` as the library loads them."""

    def card(self) -> ModelCard:
        """Return what a model card says of the model itself."""
