"""Ill-conditioned coordinates: the original work stays, and the steps of fine-tuning lead nowhere.

Every optimizer measures a step in the coordinates of the weights: SGD in all of them alike, Adam in each by itself. So
a released model whose function needs some *combination* of weights to be exact, to one part in ``gain``, cannot be
moved usefully by either at the rates that people use. To build one, what the channels at an interface (behind the stem
and behind each block) have in common is made free, and then filled:

1.  `linear` takes the ReLU at each interface out, and `BlindReaders` keeps what reads an interface blind to what its
    channels have in common: those weights sum to zero over their inputs. Training on the original domain (NTR, with the
    reference's answers) makes up for both.
2.  `release` adds to all channels of an interface the same random filter of the input, ``gain`` times as strong as a
    unit of variance, and a constant that holds the ReLU open; now it may be back. No reader sees any of it, so that the
    function stays to rounding, in an ordinary model, with the norms that the reference's weights have. Max pooling
    commutes with constants alone: what comes before it gets only the constant, which readers meet at the images' edges.

The features are then a small difference between large, nearly equal channels. The gradient of whoever fine-tunes points
along what is shared; a step large enough to learn from breaks readers' blindness; new layers see what is shared alone.
An attacker who knows takes it out again (`sophon.surgery.centre`), and one who takes steps a ``gain``-th of the usual
gets far: this is a lock, not a loss of knowledge, and it is locked for every domain alike.

A gain needs the precision to carry it: 1000 asks for float32 throughout; TF32, float16 and bfloat16 drown it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from sophon.domains import ImageSet
from sophon.errors import UserError
from sophon.runs import derive_seed
from sophon.surgery.moments import channel_moments
from sophon.tasks import Task
from sophon.tasks.task import evaluating

OPEN = 5.0  # deviations of what is shared that the constant lies above zero: a ReLU then cuts next to nothing
STATISTICS = 2000  # images that what is shared, and normalisation behind a changed convolution, are measured on
_BATCH = 500


class Interface(NamedTuple):
    """Where features are handed over: names of the last convolution before it, its normalisation, ReLU and readers."""

    convolution: str
    norm: str
    act: str
    readers: tuple[str, ...]


def interfaces(model: nn.Module) -> list[Interface]:
    """List the stem's interface and each block's, from input to output.

    Raises:
        UserError: the model is none of timm's ResNets of plain basic blocks or bottlenecks.
    """
    blocks = _blocks(model) if isinstance(model, ResNet) else {}
    if not blocks or not all(_is_plain(block) for block in blocks.values()):
        raise UserError(
            "method.gains: only timm's ResNets of plain blocks have interfaces that are known; leave it empty"
        )
    assert isinstance(model, ResNet)
    deep = isinstance(model.conv1, nn.Sequential)
    last = {name: 2 if isinstance(block, BasicBlock) else 3 for name, block in blocks.items()}
    ends = [
        # a deep stem's first convolution: else its features could be had by throwing away what comes behind them
        *([("conv1.0", "conv1.1", "conv1.2")] if deep else []),
        (f"conv1.{len(model.conv1) - 1}" if isinstance(model.conv1, nn.Sequential) else "conv1", "bn1", "act1"),
        *((f"{name}.conv{n}", f"{name}.bn{n}", f"{name}.act{n}") for name, n in last.items()),
    ]
    readers = [
        (f"{name}.conv1", *(f"{name}.downsample.{index}" for index in _convolutions(block.downsample)))
        for name, block in blocks.items()
    ]
    before = [("conv1.3",)] if deep else []
    return [Interface(*end, each) for end, each in zip(ends, [*before, *readers, ("fc",)], strict=True)]


def linear(model: nn.Module) -> nn.Module:
    """Return a copy without ReLU at the interfaces; its state dict has the same names.

    Args:
        model: see `interfaces`; it stays as it is.
    """
    changed = copy.deepcopy(model)
    for each in interfaces(model):
        changed.set_submodule(each.act, nn.Identity())
    return changed


class BlindReaders:
    """What reads an interface is kept blind to what all channels have in common.

    Args:
        model: see `interfaces`; changed by `restore` alone.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights = [model.get_parameter(f"{name}.weight") for each in interfaces(model) for name in each.readers]

    @torch.no_grad()
    def restore(self) -> None:
        """Take out, in place, what the readers' weights would see of it."""
        for weight in self._weights:
            weight.sub_(weight.mean(1, keepdim=True))


def gains_for(model: nn.Module, gains: Sequence[float]) -> list[float]:
    """Return a gain for each interface of the model; a single one serves all.

    Raises:
        UserError: there are as many neither as one nor as interfaces; or see `interfaces`.
    """
    count = len(interfaces(model))
    if len(gains) not in (1, count):
        raise UserError(
            f"method.gains: {list(gains)} has {len(gains)} numbers; give 1 or {count}, one for each interface"
        )
    return [float(gain) for gain in gains] * (count if len(gains) == 1 else 1)


@torch.no_grad()
def release(
    trained: nn.Module, reference: nn.Module, task: Task, images: ImageSet, gains: Sequence[float], seed: int
) -> nn.Module:
    """Return the function of a trained linear model as an ordinary one, in its new coordinates.

    Args:
        trained: what `linear` returned, trained, its readers blind.
        reference: of the same architecture; gives the norms of what comes before a normalisation. It stays as it is.
        task: prepares images.
        images: of the original domain, on the model's device; what is shared is measured on the first of them.
        gains: one, or one for each interface; > 0.
        seed: of what is shared.

    Raises:
        UserError: see `gains_for`.
    """
    gains, found = gains_for(reference, gains), interfaces(reference)
    measured = _Measured(task, images)
    shared = [_Shared.of(trained, each, measured, seed, place) for place, each in enumerate(found)]
    if isinstance(reference.maxpool, nn.MaxPool2d):
        shared = [each.constant() if where.norm == "bn1" else each for each, where in zip(shared, found, strict=True)]
    model = copy.deepcopy(reference)
    model.load_state_dict(trained.state_dict())
    with evaluating(model):
        for each in found:
            for reader in each.readers:
                if reader != "fc":
                    norm = reader.replace("conv1", "bn1") if reader.endswith("conv1") else _next(reader)
                    wanted = _norm(reference, reader)
                    _rescale(_convolution(model, reader), _batch_norm(model, norm), wanted)
        for gain, common, each in zip(gains, shared, found, strict=True):
            _mix(model, each, gain, common, _norm(reference, each.convolution), measured)
    return model


class _Shared(NamedTuple):
    """What an interface's channels get in common: a filter, and its mean and deviation over the original domain."""

    filter: Tensor
    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, model: nn.Module, where: Interface, measured: _Measured, seed: int, place: int) -> _Shared:
        convolution = _convolution(model, where.convolution)
        drawn = _filter(convolution, seed, place)
        with evaluating(model):
            mean, variance = measured.moments(model, convolution, lambda given, _: _respond(convolution, drawn, given))
        return cls(drawn.double(), mean, variance.sqrt())

    def constant(self) -> _Shared:
        """Return what leaves the constant alone."""
        return _Shared(torch.zeros_like(self.filter), torch.zeros_like(self.mean), self.deviation)


def _mix(model: nn.Module, where: Interface, gain: float, shared: _Shared, wanted: Tensor, measured: _Measured) -> None:
    """Add ``gain`` times what is shared to what convolution and normalisation did, and say it in their terms."""
    convolution, norm = _convolution(model, where.convolution), _batch_norm(model, where.norm)
    mean, variance = _statistics(norm)
    slope = norm.weight.double() / (variance.double() + norm.eps).sqrt()
    whole = convolution.weight.double() * slope.view(-1, 1, 1, 1) + gain * shared.filter / shared.deviation
    level = norm.bias - mean * slope + gain * (OPEN - shared.mean / shared.deviation)
    scale = wanted / whole.norm()
    convolution.weight.copy_(scale * whole)
    found = measured.moments(model, convolution, lambda _, output: output)
    mean.copy_(found[0])
    variance.copy_(found[1])
    norm.weight.copy_((variance.double() + norm.eps).sqrt() / scale)
    norm.bias.copy_(level + mean.double() / scale)


def _respond(convolution: nn.Conv2d, drawn: Tensor, given: Tensor) -> Tensor:
    found: Tensor = F.conv2d(given, drawn.to(given.dtype), None, convolution.stride, convolution.padding)
    return found


def _filter(convolution: nn.Conv2d, seed: int, place: int) -> Tensor:
    """Draw what an interface is to share: [1, inputs, height, width], of the convolution's type and device."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "coordinates", place))
    drawn: Tensor = torch.randn(1, *convolution.weight.shape[1:], generator=generator)
    return drawn.div(drawn[0].numel() ** 0.5).to(convolution.weight)


class _Measured:
    """Images by which layers of a model are measured, a batch at a time."""

    def __init__(self, task: Task, images: ImageSet) -> None:
        self._task = task
        self._parts = torch.split(images.images[:STATISTICS], _BATCH)

    def moments(
        self, model: nn.Module, layer: nn.Module, of: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return mean and variance by channel, float64, of what ``of`` makes of a layer's input and output."""

        def run() -> None:
            for part in self._parts:
                self._task.features(model, part)

        return channel_moments(layer, run, of)


def _rescale(layer: nn.Conv2d, norm: nn.BatchNorm2d, wanted: Tensor) -> None:
    """Give a convolution a norm; its normalisation takes the scale out again, epsilon included."""
    scale = wanted / layer.weight.norm()
    layer.weight.mul_(scale)
    mean, variance = _statistics(norm)
    mean.mul_(scale)
    variance.copy_((variance + norm.eps) * scale.square() - norm.eps)


def _blocks(model: ResNet) -> dict[str, nn.Module]:
    stages = [name for name, _ in model.named_children() if name.startswith("layer")]
    return {f"{stage}.{name}": part for stage in stages for name, part in model.get_submodule(stage).named_children()}


def _is_plain(block: nn.Module) -> bool:
    """Say whether a block is convolutions, BatchNorm and ReLU, and nothing that reads its output besides."""
    known = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Identity, nn.AvgPool2d, nn.Sequential)
    parts = [part for part in block.modules() if part is not block]
    return type(block) in (BasicBlock, Bottleneck) and all(isinstance(part, known) for part in parts)


def _convolutions(shortcut: object) -> list[str]:
    parts = shortcut.named_children() if isinstance(shortcut, nn.Module) else []
    return [name for name, part in parts if isinstance(part, nn.Conv2d)]


def _next(name: str) -> str:
    """Name what follows in a sequence."""
    parent, _, index = name.rpartition(".")
    return f"{parent}.{int(index) + 1}"


def _convolution(model: nn.Module, name: str) -> nn.Conv2d:
    found = model.get_submodule(name)
    assert isinstance(found, nn.Conv2d)
    return found


def _batch_norm(model: nn.Module, name: str) -> nn.BatchNorm2d:
    found = model.get_submodule(name)
    assert isinstance(found, nn.BatchNorm2d)
    return found


def _statistics(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


def _norm(reference: nn.Module, name: str) -> Tensor:
    found: Tensor = reference.get_parameter(f"{name}.weight").norm()
    return found
