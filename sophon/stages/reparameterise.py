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
3.  The channels of each interface are multiplied by powers of two, up to ``spread``, and divided by them where they
    are read (`sophon.models.channels`), so that a step that suits one channel is far too large for some and far too
    small for the others: what is left to small steps alone.

The features are then a small difference between large, nearly equal channels. The gradient of whoever fine-tunes points
along what is shared; a step large enough to learn from breaks readers' blindness; new layers see what is shared alone.
An attacker who knows takes both out again (`sophon.surgery`: `equalise`, `centre`, `renormalise`), and K-FAC, whose
steps do not depend on coordinates, gets far: this is a lock, not a loss of knowledge, and it is locked for every domain
alike. Without a spread one who takes steps a ``gain``-th of the usual gets far as well.

A gain needs the precision to carry it: 1000 asks for float32, 30 is the most that TF32 and float16 carry, and bfloat16
drowns that. A spread costs no precision.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sophon.domains import ImageSet, evaluation_batches
from sophon.errors import GuardError, UserError
from sophon.models.channels import Interface, channels, interfaces
from sophon.protection.context import Context
from sophon.protection.stage import Constraint, Information, Row, Stage
from sophon.ranges import limited
from sophon.seeds import derive_seed
from sophon.surgery.channel_statistics import channel_statistics
from sophon.surgery.equalise import reader, scale_channels
from sophon.surgery.renormalise import norms, rescale
from sophon.tasks import Task
from sophon.tasks.task import evaluating

OPEN = 5.0  # deviations of what is shared that the constant lies above zero: a ReLU then cuts next to nothing
STATISTICS = 2000  # images that what is shared, and normalisation behind a changed convolution, are measured on
ROUNDING = 1.0  # points on val that a model may differ by from itself in other coordinates
_BATCH = 500


@dataclass
class ReparameteriseConfig:
    """How far the coordinates are from the usual ones.

    Attributes:
        gains: how many times what an interface's channels share outweighs what they tell, > 0; one for all or each.
        spread: the largest scale of an interface's channels over the smallest, >= 1, in powers of two.
    """

    gains: list[float] = limited([30.0], gt=0)
    spread: float = limited(1.0e4, ge=1)


class Reparameterise(Stage):
    """Trains the original work, by NTR alone, into coordinates in which the steps of fine-tuning lead nowhere."""

    Config = ReparameteriseConfig
    float32 = True
    mechanism = "reparameterisation"
    summary = (
        "ill-conditioned coordinates: its function depends on small differences between large weights, which the steps "
        "of fine-tuning drown"
    )
    limits = (
        "**Compute in float32.** Lower precision rounds away the small differences that the function depends on: "
        "bfloat16 in any case, TF32 and float16 where a gain is above 30.",
        "It is a lock, not a loss of knowledge: who knows of it takes it out again (sophon's surgeries `equalise`, "
        "`centre` and `renormalise`), and is then held up little more than by the unprotected model. It hinders "
        "fine-tuning for every domain alike.",
        "It belongs to a published class, reparameterisations that keep the function "
        "([SpecDef](https://arxiv.org/abs/2602.18868)), whose authors show that whoever knows of one restores ordinary "
        "convergence at a cost that grows only linearly with the model.",
    )

    def check(self, context: Context) -> None:
        """Raise a `UserError` if the model's interfaces are not known, or not as many as the gains."""
        super().check(context)
        gains_for(context.model, self.config.gains)

    def prepare(self, context: Context) -> None:
        """Work on a copy without ReLU at the interfaces."""
        context.model = linear(context.model)
        super().prepare(context)
        self._readers = BlindReaders(context.model)

    def step(self, context: Context, number: int) -> Row:
        """Train on the original domain."""
        return {"ntr_loss": self.ntr.run(context.ntr_steps, number, factor=context.rate(number))}

    def information(self, context: Context) -> Information:
        """Return that the restricted domains were not read."""
        return Information(restricted=(), teacher="reference" if context.method.distillation else "none")

    def constraints(self) -> Sequence[Constraint]:
        """Return the blindness of readers."""
        return [self._readers]

    def release(self, context: Context) -> nn.Module:
        """Return the same function as an ordinary model in the new coordinates.

        Raises:
            GuardError: it loses what the model without ReLU had kept, for the gains are more than float32 can carry.
        """
        images, gains = context.original["train"], self.config.gains
        made = release(context.model, context.reference, context.task, images, gains, self.config.spread, context.seed)
        before, after = (context.task.evaluate(model, context.original["val"]) for model in (context.model, made))
        if not abs(after - before) <= ROUNDING:
            raise GuardError(
                f"method.stages.reparameterise.gains: {list(gains)} drowns the original work in rounding: "
                f"{context.task.metric.name} on val {after:.4g} instead of {before:.4g}; lower them"
            )
        return made


def known(model: nn.Module) -> list[Interface]:
    """Return the interfaces of one of timm's ResNets of plain basic blocks or bottlenecks.

    Raises:
        UserError: the model is another.
    """
    if not (places := interfaces(model)):
        raise UserError(
            "method.stages.reparameterise (method=coordinates): knows timm's ResNets of plain blocks, such as "
            "resnet18, and not this model; use method=sophon_klu, which takes any"
        )
    return places


def linear(model: nn.Module) -> nn.Module:
    """Return a copy without ReLU at the interfaces; its state dict has the same names."""
    changed = copy.deepcopy(model)
    for interface in known(model):
        changed.set_submodule(interface.act, nn.Identity())
    return changed


class BlindReaders:
    """A constraint: what reads an interface of the model is blind to what all channels have in common."""

    def __init__(self, model: nn.Module) -> None:
        self._weights = [model.get_parameter(f"{name}.weight") for place in known(model) for name in place.readers]

    @torch.no_grad()
    def project(self) -> None:
        """Take out, in place, what the readers' weights would see of it."""
        for weight in self._weights:
            weight.sub_(weight.mean(1, keepdim=True))


def gains_for(model: nn.Module, gains: Sequence[float]) -> list[float]:
    """Return a gain for each interface of the model; a single one serves all.

    Raises:
        UserError: there are as many neither as one nor as interfaces; or see `known`.
    """
    count = len(known(model))
    if len(gains) not in (1, count):
        raise UserError(
            f"method.stages.reparameterise.gains: {list(gains)} has {len(gains)} numbers; give 1 or {count}, one for "
            "each interface"
        )
    return [float(gain) for gain in gains] * (count if len(gains) == 1 else 1)


@torch.no_grad()
def release(
    trained: nn.Module,
    reference: nn.Module,
    task: Task,
    images: ImageSet,
    gains: Sequence[float],
    spread: float,
    seed: int,
) -> nn.Module:
    """Return the function of a trained linear model as an ordinary one, in its new coordinates.

    Args:
        trained: what `linear` returned, trained, its readers blind.
        reference: of the same architecture; gives the norms of what comes before a normalisation. It stays as it is.
        task: prepares images.
        images: of the original domain; what is shared is measured on the first of them.
        gains: one, or one for each interface; > 0.
        spread: the largest scale of an interface's channels over the smallest, to a factor of two; >= 1.
        seed: of what is shared, and of which channel has which scale.

    Raises:
        UserError: see `gains_for`.
    """
    gains, places = gains_for(reference, gains), known(reference)
    few = images.take(torch.arange(min(STATISTICS, len(images)))).in_memory()
    shared = [_Shared.of(trained, place, task, few, seed, index) for index, place in enumerate(places)]
    if isinstance(reference.maxpool, nn.MaxPool2d):
        shared = [
            part.constant() if place.normaliser == "bn1" else part for part, place in zip(shared, places, strict=True)
        ]
    model = copy.deepcopy(reference)
    model.load_state_dict(trained.state_dict())
    with evaluating(model):
        for name in (name for place in places for name in place.readers if name != "fc"):
            rescale(reader(model, name), norms(reference.get_submodule(name), None))
        for gain, common, place in zip(gains, shared, places, strict=True):
            wanted = reference.get_parameter(f"{place.convolution}.weight").norm()
            _mix(model, place, gain, common, wanted, task, few)
    spread_channels(model, spread, seed)
    return model


@torch.no_grad()
def spread_channels(model: nn.Module, spread: float, seed: int) -> None:
    """Give the channels of each interface scales of their own, in place: powers of two from 1 to ``spread``.

    The function stays, and so do the norms of what reads them, the head's aside.

    Args:
        model: see `known`; it need not be one that was trained for this.
        spread: >= 1.
        seed: of which channel has which scale.
    """
    for index, place in enumerate(channels(model)):
        like = model.get_parameter(f"{place.writers[0]}.weight")
        generator = torch.Generator().manual_seed(derive_seed(seed, "spread", index))
        ranks = torch.randperm(len(like), generator=generator) / max(1, len(like) - 1)
        scale_channels(model, place, torch.exp2((ranks * math.log2(spread)).round()).to(like))


class _Shared(NamedTuple):
    """What an interface's channels get in common: a filter [1, inputs, height, width], and mean and deviation of its
    responses over the original domain."""

    filter: Tensor
    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, model: nn.Module, place: Interface, task: Task, images: ImageSet, seed: int, index: int) -> _Shared:
        convolution = cast(nn.Conv2d, model.get_submodule(place.convolution))
        generator = torch.Generator().manual_seed(derive_seed(seed, "coordinates", index))
        drawn = torch.randn(1, *convolution.weight.shape[1:], generator=generator)
        drawn = drawn.div(drawn[0].numel() ** 0.5).to(convolution.weight)

        def response(given: Tensor, _: Tensor) -> Tensor:
            return F.conv2d(given, drawn.to(given.dtype), None, convolution.stride, convolution.padding)

        with evaluating(model):
            mean, variance = _statistics(model, convolution, task, images, response)
        return cls(drawn.double(), mean, variance.sqrt())

    def constant(self) -> _Shared:
        """Return what leaves the constant alone."""
        return _Shared(torch.zeros_like(self.filter), torch.zeros_like(self.mean), self.deviation)


def _mix(
    model: nn.Module, place: Interface, gain: float, shared: _Shared, wanted: Tensor, task: Task, images: ImageSet
) -> None:
    """Add ``gain`` times what is shared to what convolution and normalisation did, and say it in their terms."""
    convolution = cast(nn.Conv2d, model.get_submodule(place.convolution))
    bn = cast(nn.BatchNorm2d, model.get_submodule(place.normaliser))
    mean, variance = cast(Tensor, bn.running_mean), cast(Tensor, bn.running_var)
    slope = bn.weight.double() / (variance.double() + bn.eps).sqrt()
    whole = convolution.weight.double() * slope.view(-1, 1, 1, 1) + gain * shared.filter / shared.deviation
    level = bn.bias - mean * slope + gain * (OPEN - shared.mean / shared.deviation)
    scale = wanted / whole.norm()
    convolution.weight.copy_(scale * whole)
    statistics = _statistics(model, convolution, task, images, lambda _, output: output)
    mean.copy_(statistics[0])
    variance.copy_(statistics[1])
    bn.weight.copy_((variance.double() + bn.eps).sqrt() / scale)
    bn.bias.copy_(level + mean.double() / scale)


def _statistics(
    model: nn.Module, layer: nn.Module, task: Task, images: ImageSet, of: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return mean and variance by channel, float64, of what ``of`` makes of a layer's input and output."""

    def run() -> None:
        for batch in evaluation_batches(images, _BATCH):
            task.features(model, batch.images)

    return channel_statistics(layer, run, of)
