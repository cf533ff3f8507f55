"""What the parts of a ResNet hand on to one another, and the scales of its channels, which its function hides."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Interface(NamedTuple):
    """Where features are handed on: names of the last convolution before it, its normalisation, ReLU and readers."""

    convolution: str
    normaliser: str
    act: str
    readers: tuple[str, ...]


class Channels(NamedTuple):
    """Channels at one interface or several that are summed: names of the normalisations that write, and of the readers.

    ReLU, pooling and sums are all that lies between. So a channel that is multiplied by a positive number where it is
    written, and divided by it where it is read, leaves the function as it is.
    """

    writers: tuple[str, ...]
    readers: tuple[str, ...]


def interfaces(model: nn.Module) -> list[Interface]:
    """List the stem's interface and each block's, from input to output.

    Returns:
        Empty for all but timm's ResNets of plain basic blocks or bottlenecks.
    """
    from timm.models.resnet import BasicBlock, ResNet  # takes seconds, and only classifiers come here

    if not isinstance(model, ResNet):
        return []
    blocks = _blocks(model)
    if not blocks or not all(_is_plain(block) for block in blocks.values()):
        return []
    deep = isinstance(model.conv1, nn.Sequential)
    last = {name: 2 if isinstance(block, BasicBlock) else 3 for name, block in blocks.items()}
    ends = [
        # a deep stem's first convolution: else its features could be had by throwing away what comes behind them
        *([("conv1.0", "conv1.1", "conv1.2")] if deep else []),
        (f"conv1.{len(model.conv1) - 1}" if isinstance(model.conv1, nn.Sequential) else "conv1", "bn1", "act1"),
        *((f"{name}.conv{n}", f"{name}.bn{n}", f"{name}.act{n}") for name, n in last.items()),
    ]
    readers = [
        (f"{name}.conv1", *(f"{name}.downsample.{index}" for index in _parts(block.downsample, nn.Conv2d)))
        for name, block in blocks.items()
    ]
    before = [("conv1.3",)] if deep else []
    return [Interface(*end, read_by) for end, read_by in zip(ends, [*before, *readers, ("fc",)], strict=True)]


def channels(model: nn.Module) -> list[Channels]:
    """List the channels of the interfaces; where a block adds its input to its output, both are one entry.

    Returns:
        Empty where `interfaces` is.
    """
    merged: list[Channels] = []
    for interface in interfaces(model):
        block, _, _ = interface.normaliser.rpartition(".")
        shortcut = getattr(model.get_submodule(block), "downsample", None)
        if shortcut is None and block.startswith("layer"):
            merged[-1] = Channels(
                (*merged[-1].writers, interface.normaliser), (*merged[-1].readers, *interface.readers)
            )
        else:
            added = [f"{block}.downsample.{index}" for index in _parts(shortcut, nn.BatchNorm2d)]
            merged.append(Channels((interface.normaliser, *added), interface.readers))
    return merged


@torch.no_grad()
def scale(model: nn.Module, place: Channels, factors: Tensor) -> None:
    """Multiply channels, in place, where they are written, and divide where they are read.

    Args:
        factors: > 0, floating point, [channels].
    """
    for name in place.writers:
        for part in ("weight", "bias"):
            model.get_parameter(f"{name}.{part}").mul_(factors.to(model.get_parameter(f"{name}.{part}").dtype))
    for name in place.readers:
        weight = model.get_parameter(f"{name}.weight")
        weight.div_(factors.to(weight.dtype).view(1, -1, *[1] * (weight.dim() - 2)))


def normaliser_behind(reader: str) -> str:
    """Name the normalisation behind a convolution that reads an interface."""
    if reader.endswith("conv1"):
        return f"{reader.removesuffix('conv1')}bn1"
    parent, _, index = reader.rpartition(".")
    return f"{parent}.{int(index) + 1}"


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    stages = [name for name, _ in model.named_children() if name.startswith("layer")]
    return {f"{stage}.{name}": part for stage in stages for name, part in model.get_submodule(stage).named_children()}


def _is_plain(block: nn.Module) -> bool:
    """Say whether a block is convolutions, BatchNorm and ReLU, and nothing that reads its output besides."""
    known = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Identity, nn.AvgPool2d, nn.Sequential)
    parts = [part for part in block.modules() if part is not block]
    from timm.models.resnet import BasicBlock, Bottleneck

    return type(block) in (BasicBlock, Bottleneck) and all(isinstance(part, known) for part in parts)


def _parts(sequence: object, kind: type[nn.Module]) -> list[str]:
    """Name the parts of a sequence that are of a kind; none of what is no module."""
    parts = sequence.named_children() if isinstance(sequence, nn.Module) else []
    return [name for name, part in parts if isinstance(part, kind)]
