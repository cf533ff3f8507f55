"""`ModelSpec`: everything needed to rebuild a model around its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from sophon.config import ModelConfig


@dataclass(frozen=True)
class ModelSpec:
    """An architecture with the input that it expects; with its weights, a whole model.

    Attributes:
        library: a key of `sophon.models.LIBRARIES`.
        architecture: the library's name of it; of library ``python`` the dotted path of a class or function.
        model_args: keyword arguments of the library's constructor, plain JSON data.
        classes: names of the original domain's classes, in order: those that a classifier's head tells apart.
        channels: channels of the input.
        image_size: height and width of the input in pixels.
        mean: per channel, on a 0..1 scale; subtracted from the input.
        std: per channel, on a 0..1 scale; the input is divided by it.
        scheduler: of a denoiser, the whole configuration of its noise schedule (diffusers' DDPMScheduler).
        head: dotted name of the last linear layer; None where the library knows, or the last one in order is meant.
        files: text of the library's own files that are written back as they were read, by name: which sampler a
            pipeline draws with, say. They do not decide what the weights make, so specs that differ in them are equal.
        frozen: of a latent pipeline, the sha256 of each part that is released as it is, by name.
        folder: where those parts lie.
        factory: builds a model of library ``python`` that lives in memory and cannot be built by its dotted path.
    """

    library: str
    architecture: str
    classes: tuple[str, ...]
    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    model_args: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    head: str | None = None
    files: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    frozen: Mapping[str, str] = field(default_factory=dict)

    folder: str | None = field(default=None, compare=False, repr=False)
    factory: Callable[[], nn.Module] | None = field(default=None, compare=False, repr=False)

    def plain(self) -> dict[str, Any]:
        """Return the fields as plain JSON data, but for the factory and the folder, which are of this process."""
        return {name: value for name, value in asdict(self).items() if name not in ("factory", "folder")}

    def sha256(self, weights: str) -> str:
        """Return what identifies the whole model: the sha256 of its weights, with those of frozen parts if any."""
        if not self.frozen:
            return weights
        return hashlib.sha256(repr([weights, sorted(self.frozen.items())]).encode()).hexdigest()

    def config(self) -> ModelConfig:
        """Return the ``model`` group that describes this model; it names no weights."""
        return ModelConfig(
            library=self.library,
            architecture=self.architecture,
            model_args={name: value for name, value in self.model_args.items() if name != "num_class_embeds"},
            image_size=self.image_size,
            channels=self.channels,
            mean=list(self.mean),
            std=list(self.std),
            head=self.head,
            scheduler=dict(self.scheduler),
            class_conditional=bool(self.model_args.get("num_class_embeds")),
        )
