"""A model's blocks: every tensor in one of them, in the order in which images meet them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from sophon.models import ModelSpec, adapter_of, build
from sophon.models.partition import Block, owned, partition
from tests.models.test_libraries import spec_of
from tests.tiny import slow, tiny_spec


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)


def published(library: str, architecture: str, image_size: int = 64) -> ModelSpec:
    return ModelSpec(library, architecture, ("a", "b"), 3, image_size, (0.5,) * 3, (0.5,) * 3)


SPECS = {
    "resnet_tiny": spec_of("resnet_tiny"),
    "caformer": published("timm", "caformer_s18"),
    "vit": published("timm", "test_vit"),
    "tiny": tiny_spec(),
    **{name: published("timm", name) for name in ("resnet18", "vgg13_bn", "efficientnet_lite0")},
    **{f"{name} of torchvision": published("torchvision", name) for name in ("resnet18", "vit_b_16")},
}


ON_META = [name for name in SPECS if name not in ("tiny", "vit_b_16 of torchvision")]


def made(name: str) -> tuple[nn.Module, ModelSpec]:
    spec = SPECS[name]
    with torch.device("meta"):
        return build(spec), spec


def blocks(model: nn.Module, spec: ModelSpec) -> list[Block]:
    return adapter_of(spec).blocks(model)


@pytest.mark.parametrize("name", slow(ON_META, ("caformer", "efficientnet_lite0")))
def test_images_meet_the_blocks_in_order(name: str) -> None:
    """A later block never runs before an earlier one has begun."""
    model, spec = made(name)
    modules, met = dict(model.named_modules()), []
    for index, block in enumerate(blocks(model, spec)):
        for part in owned(modules, block):
            modules[part].register_forward_hook(lambda *_, index=index: met.append(index))
    model.eval()(torch.empty(1, spec.channels, spec.image_size, spec.image_size, device="meta"))
    assert list(dict.fromkeys(met)) == list(range(len(blocks(model, spec))))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tiny", [("conv1", "bn1"), ("conv2", "bn2")]),
        ("resnet_tiny", [("conv1", "bn1"), *((f"layer{stage}.0",) for stage in (1, 2, 3, 4))]),
        ("resnet18", [("conv1", "bn1"), *((f"layer{stage}.{at}",) for stage in (1, 2, 3, 4) for at in (0, 1))]),
        ("vit", [("cls_token", "pos_embed", "patch_embed"), *((f"blocks.{at}",) for at in range(5))]),
        ("vgg13_bn", [(f"features.{at}", f"features.{at + 1}") for at in (0, 3, 7, 10, 14, 17, 21, 24, 28, 31)]),
        ("caformer", [("stem",), *((f"stages.0.blocks.{at}",) for at in range(3)), ("stages.1.downsample",)]),
    ],
)
def test_blocks_by_name(name: str, expected: list[tuple[str, ...]]) -> None:
    assert blocks(*made(name))[: len(expected)] == expected


def test_blocks_are_found_however_deep_they_lie() -> None:
    inner = nn.Module()
    inner.encoder = nn.Module()
    inner.encoder.layers = nn.ModuleList(Residual() for _ in range(3))
    model = nn.ModuleDict({"stem": nn.Conv2d(3, 4, 1), "vit": inner, "head": nn.Linear(4, 2)})
    assert partition(model, "head") == [("stem",), *((f"vit.encoder.layers.{at}",) for at in range(3))]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: [nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)], [("0", "1")]),
        (lambda: [nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False), nn.PReLU()], [("0", "1", "2")]),
        (lambda: [nn.BatchNorm2d(3)], [("0",)]),
        (lambda: [nn.ReLU()], []),
    ],
)
def test_what_has_no_matrix_of_its_own_joins_another(
    make: Callable[[], list[nn.Module]], expected: list[tuple[str, ...]]
) -> None:
    layers = make()
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 2))
    assert partition(model, str(len(layers) + 1)) == expected
