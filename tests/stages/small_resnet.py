"""A ResNet of timm that is small enough for float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sophon.domains import ImageSet, LoadedDomain, MemoryImages
from sophon.models import ModelSpec, build
from sophon.tasks import ClassificationTask

SMALL = {"layers": [1, 2, 1, 0], "channels": [8, 8, 12, 12], "stem_type": "deep", "stem_width": 8}


def small_resnet(
    kind: type[ClassificationTask] = ClassificationTask,
    architecture: str = "resnet18",
    stem: str = "deep",
    **settings: Any,
) -> tuple[nn.Module, Any]:
    """Return the network in float64, with BatchNorm statistics that are not those of fresh layers, and its task."""
    colour = (0.5,) * 3
    spec = ModelSpec("timm", architecture, ("a", "b", "c"), 3, 32, colour, colour, SMALL | {"stem_type": stem})
    torch.manual_seed(0)
    model, task = build(spec).double(), kind(spec, dtype=torch.float64, **settings)
    for name, parameter in model.named_parameters():
        if ".bn" in name:  # a block's last one begins with zeros
            nn.init.uniform_(parameter, 0.5, 1.5)
    settle(model, task)
    return model, task


def settle(model: nn.Module, task: ClassificationTask) -> None:
    """Let normalisation layers estimate their statistics."""
    with torch.no_grad():
        for _ in range(40):
            task.logits(model.train(), noise_images(16))
    model.eval()


def noise_images(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)


def image_set(count: int = 64) -> ImageSet:
    return MemoryImages(noise_images(count), torch.arange(count) % 3, ("a", "b", "c"))


def colours(domain: LoadedDomain) -> LoadedDomain:
    """Return a domain of grey images in colour."""
    splits = {name: replace(part, images=part.images.repeat(1, 3, 1, 1)) for name, part in domain.splits.items()}
    return replace(domain, splits=splits)
