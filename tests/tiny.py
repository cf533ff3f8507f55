"""A network with BatchNorm and a domain, both small enough for exact gradient checks in float64."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from sophon.domains import Batch, ImageSet, LoadedDomain, MemoryImages
from sophon.models import ModelSpec, build
from sophon.tasks import ClassificationTask, DenoisingTask

CLASSES = ("a", "b", "c")
SIZE = 6


class TinyNet(nn.Module):
    """Two convolutions with BatchNorm and a linear head; tanh, so that finite differences see a smooth function."""

    def __init__(self, classes: int = len(CLASSES)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = torch.tanh(self.bn1(self.conv1(images)))
        features = torch.tanh(self.bn2(self.conv2(features)))
        return self.fc(features.mean((2, 3)))


def tiny_net(classes: int = len(CLASSES)) -> nn.Module:
    return TinyNet(classes).double()


def tiny_spec(classes: tuple[str, ...] = CLASSES) -> ModelSpec:
    """Return the spec of the network in float64, as anybody's own module has it."""
    arguments = {"classes": len(classes)}
    return ModelSpec("python", "tests.tiny:tiny_net", classes, 1, SIZE, (0.5,), (0.25,), arguments, head="fc")


def tiny_model(seed: int = 0) -> nn.Module:
    """Return the network in float64 with BatchNorm statistics that are not their initial ones."""
    torch.manual_seed(seed)
    model = tiny_net()
    model.train()
    with torch.no_grad():
        model(torch.randn(16, 1, SIZE, SIZE, dtype=torch.float64))
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tiny_task(suppression_loss: str = "klu") -> ClassificationTask:
    return ClassificationTask(tiny_spec(), suppression_loss=suppression_loss, dtype=torch.float64)


def tiny_unet_spec(*, conditional: bool = False) -> ModelSpec:
    """Return the spec of a U-Net of two levels, with attention at the lower one, and a schedule of 20 timesteps."""
    network = {
        "block_out_channels": [4, 8],
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "attention_head_dim": 4,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        **({"num_class_embeds": len(CLASSES)} if conditional else {}),
    }
    schedule = {"num_train_timesteps": 20, "prediction_type": "epsilon"}
    return ModelSpec("diffusers", "UNet2DModel", CLASSES, 1, SIZE, (0.5,), (0.5,), network, schedule)


def tiny_unet(*, conditional: bool = False, seed: int = 0) -> nn.Module:
    """Return that U-Net in float64, no weight at zero or one; it takes `tiny_batches`."""
    torch.manual_seed(seed)
    model = build(tiny_unet_spec(conditional=conditional)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tiny_denoising(suppression_loss: str = "dos", *, conditional: bool = False) -> DenoisingTask:
    return DenoisingTask(
        tiny_unet_spec(conditional=conditional), suppression_loss=suppression_loss, dtype=torch.float64
    )


def tiny_batches(seed: int, count: int, size: int = 8) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Batch(
            torch.randint(0, 256, (size, 1, SIZE, SIZE), generator=generator, dtype=torch.uint8),
            torch.randint(0, len(CLASSES), (size,), generator=generator),
        )
        for _ in range(count)
    ]


def tiny_images(seed: int, per_class: int = 12, noise: int = 60) -> ImageSet:
    """Return images that can be told apart: each class is a bright band at its own height."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(CLASSES)).repeat(per_class)
    images = torch.randint(0, noise, (len(labels), 1, SIZE, SIZE), generator=generator)
    for index, label in enumerate(labels.tolist()):
        images[index, 0, 2 * label : 2 * label + 2] += 120
    return MemoryImages(images.to(torch.uint8), labels, CLASSES)


def tiny_domain(name: str, splits: Iterator[str] | tuple[str, ...], seed: int = 0) -> LoadedDomain:
    images = {split: tiny_images(seed + index) for index, split in enumerate(splits)}
    return LoadedDomain(name, CLASSES, images, {split: part.sha256() for split, part in images.items()})


def tiny_bands(
    name: str, splits: tuple[str, ...], seed: int = 0, *, across: bool = False, per_class: int = 12
) -> LoadedDomain:
    """Return a domain like `tiny_domain`; ``across`` turns its bands upright, which makes it another task."""
    images = {}
    for index, split in enumerate(splits):
        part = tiny_images(seed + index, per_class)
        pixels = part.images.transpose(2, 3).contiguous() if across else part.images
        images[split] = MemoryImages(pixels, part.labels, part.classes)
    return LoadedDomain(name, CLASSES, images, {split: part.sha256() for split, part in images.items()})


def slow(names: Iterable[str], which: Collection[str]) -> list[Any]:
    """Return the cases of a parametrised test, ``which`` of them marked slow."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in which else name for name in names]


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copy everything that a model remembers."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same_state(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    """Compare to the bit."""
    now = model.state_dict()
    assert set(now) == set(before)
    changed = [name for name, value in before.items() if not torch.equal(now[name], value)]
    assert not changed
