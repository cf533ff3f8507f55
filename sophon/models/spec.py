"""`ModelSpec`: everything needed to rebuild a model around its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sophon.config import ModelConfig


@dataclass(frozen=True)
class ModelSpec:
    """An architecture with the input that it expects; with its weights, a whole model.

    Attributes:
        library: ``timm``, ``torchvision`` or ``diffusers``.
        architecture: the library's name of it.
        model_args: keyword arguments of the library's constructor, plain JSON data.
        classes: names of the original domain's classes, in order: those that a classifier's head tells apart.
        channels: channels of the input.
        image_size: height and width of the input in pixels.
        mean: per channel, on a 0..1 scale; subtracted from the input.
        std: per channel, on a 0..1 scale; the input is divided by it.
        scheduler: of a denoiser, the whole configuration of its noise schedule (diffusers' DDPMScheduler).
        files: text of the library's own files that are written back as they were read, by name: which sampler a
            pipeline draws with, say. They do not decide what the weights make, so specs that differ in them are equal.
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
    files: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def config(self) -> ModelConfig:
        """Return the ``model`` group that describes this model; it names no weights."""
        return ModelConfig(
            library=self.library,
            architecture=self.architecture,
            model_args=dict(self.model_args),
            image_size=self.image_size,
            channels=self.channels,
            mean=list(self.mean),
            std=list(self.std),
            scheduler=dict(self.scheduler),
            class_conditional=bool(self.model_args.get("num_class_embeds")),
        )
