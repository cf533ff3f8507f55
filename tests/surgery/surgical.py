"""Models with all that an attacker has at hand, for the tests of weight surgery."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from sophon.config import ModelConfig
from sophon.domains import ImageSet, LoadedDomain, MemoryImages
from sophon.models import ModelSpec, create
from sophon.surgery.attacker_means import Means
from sophon.tasks import ClassificationTask
from tests.tiny import (
    CLASSES,
    TinyNet,
    state_of,
    tiny_denoising,
    tiny_images,
    tiny_spec,
    tiny_task,
    tiny_unet,
    tiny_unet_spec,
)

CONF = Path(__file__).parents[2] / "conf" / "model" / "resnet_tiny.yaml"
WIDE = tuple("abcde")


def means_for(spec: ModelSpec | None = None, task: Any = None, images: ImageSet | None = None, **more: Any) -> Means:
    images = tiny_images(40) if images is None else images
    rest = {"batch_size": 8, **more}
    generator = torch.Generator().manual_seed(0)
    return Means(task or tiny_task(), spec or tiny_spec(), images.classes, images, generator, **rest)


def wide(images: ImageSet) -> ImageSet:
    """Return the same images with labels of five classes: more than the released head has."""
    return MemoryImages(images.images, torch.arange(len(images)) % len(WIDE), WIDE)


def wide_domain(*splits: str) -> LoadedDomain:
    parts = {split: wide(tiny_images(index)) for index, split in enumerate(splits)}
    return LoadedDomain("wide", WIDE, parts, {})


def fresh_state(seed: int, classes: int = len(CLASSES)) -> dict[str, Tensor]:
    """Return what a fresh tiny network has after ``seed``."""
    torch.manual_seed(seed)
    return state_of(TinyNet(classes).double())


def outputs(model: nn.Module, size: int = 6, channels: int = 1) -> Tensor:
    """Return what the model says of fixed images in evaluation mode; it is left as it is."""
    dtype = next(model.parameters()).dtype
    images = torch.randn(5, channels, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        return copy.deepcopy(model).eval()(images.to(dtype))


def resnet(seed: int = 0) -> tuple[nn.Module, Means]:
    """Return the small ResNet of the configuration, in float32, with statistics and affine weights of its own."""
    torch.manual_seed(seed)
    model, spec = create(ModelConfig(**OmegaConf.load(CONF)), CLASSES)
    model.train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for _ in range(3):
            model(torch.randn(16, 1, 32, 32))
    images = MemoryImages(torch.randint(0, 256, (24, 1, 32, 32), dtype=torch.uint8), torch.arange(24) % 3, CLASSES)
    return model, means_for(spec, ClassificationTask(spec), images)


def unet(*, conditional: bool = False) -> tuple[nn.Module, Means]:
    spec, task = tiny_unet_spec(conditional=conditional), tiny_denoising(conditional=conditional)
    return tiny_unet(conditional=conditional), means_for(spec, task)


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Name what differs from ``before``, to the bit."""
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
