"""Centring of channels: surgery against protection that hides in what all channels of a layer have in common."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sophon.arguments import Limits
from sophon.surgery.attacker_means import Means
from sophon.surgery.channel_statistics import channel_statistics
from sophon.surgery.renormalise import ScaleFree, scale_free
from sophon.tasks.task import evaluating

_BATCHES = 20  # of the attacker's images, by which the outputs of a changed layer are measured


def centre(
    model: nn.Module,
    means: Means,
    *,
    outweighs: Annotated[float, Limits("a finite number > 0", lambda value: value > 0)] = 3.0,
) -> nn.Module:
    """Take out what a layer's channels have in common, where that is ``outweighs`` times as large as what differs.

    What a convolution or linear layer and the BatchNorm behind it do together is a filter and a constant for each
    channel. A mean over the channels that dwarfs their differences is of no use to an ordinary network, whose layers
    are left as they are; it drowns gradients, and whoever reads the channels and is to ignore it breaks at the first
    step. This undoes ``method=coordinates``. The function stays where the readers are blind to the mean, and nothing
    after it (a ReLU that it held open) bends; what bends is for fine-tuning to mend.
    """
    centre_channels(model, means, outweighs=outweighs)
    return model


def centre_channels(model: nn.Module, means: Means, *, outweighs: float = 3.0) -> dict[str, Tensor | float]:
    """Do what `centre` does; return what parameters were multiplied with at first, 0 for those replaced."""
    batch = means.relabelled(means.images, model).first(8)
    factors: dict[str, Tensor | float] = {}
    for layer in scale_free(model, lambda: means.task.attacker_loss(model, batch), per="channel"):
        bn = layer.normaliser
        if isinstance(bn, _BatchNorm) and bn.affine and bn.running_mean is not None and layer.axis == 0:
            factors |= _centre(model, layer, bn, means, outweighs)
    return factors


@torch.no_grad()
def _centre(
    model: nn.Module, place: ScaleFree, bn: _BatchNorm, means: Means, outweighs: float
) -> dict[str, Tensor | float]:
    assert bn.running_mean is not None
    assert bn.running_var is not None
    weight, bias = place.layer.get_parameter("weight"), getattr(place.layer, "bias", None)
    slope = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
    by_channel = slope.view(-1, *[1] * (weight.dim() - 1))
    whole = weight.double() * by_channel
    level = bn.bias.double() + slope * ((0 if bias is None else bias.double()) - bn.running_mean.double())
    apart = whole - whole.mean(0)
    if whole.mean(0).norm() * len(slope) ** 0.5 <= outweighs * apart.norm():
        if level.mean().abs() > outweighs * (level.std() + bn.weight.abs().mean()):
            bn.bias.sub_(level.mean())
        return {}
    weight.copy_(apart)
    factors: dict[str, Tensor | float] = {
        f"{place.name}.weight": by_channel.to(weight.dtype),
        f"{place.normaliser_name}.weight": 0.0,
    }
    if bias is not None:
        bias.zero_()
        factors[f"{place.name}.bias"] = 0.0
    with evaluating(model):
        mean, variance = channel_statistics(place.layer, lambda: means.run(model, _BATCHES))
    bn.running_mean.copy_(mean)
    bn.running_var.copy_(variance)
    bn.weight.copy_((variance + bn.eps).sqrt())
    bn.bias.copy_(level - level.mean() + mean)
    return factors
