"""Centring of channels: surgery against protection that hides in what all channels of a layer have in common."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sophon.arguments import Limits
from sophon.surgery.attacker_means import Means
from sophon.surgery.channel_statistics import channel_moments
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
    for found in scale_free(model, lambda: means.task.attacker_loss(model, batch), per="channel"):
        norm = found.norm
        if isinstance(norm, _BatchNorm) and norm.affine and norm.running_mean is not None and found.axis == 0:
            factors |= _centre(model, found, norm, means, outweighs)
    return factors


@torch.no_grad()
def _centre(
    model: nn.Module, found: ScaleFree, norm: _BatchNorm, means: Means, outweighs: float
) -> dict[str, Tensor | float]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight, bias = found.layer.get_parameter("weight"), getattr(found.layer, "bias", None)
    slope = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    by_channel = slope.view(-1, *[1] * (weight.dim() - 1))
    whole = weight.double() * by_channel
    level = norm.bias.double() + slope * ((0 if bias is None else bias.double()) - norm.running_mean.double())
    apart = whole - whole.mean(0)
    if whole.mean(0).norm() * len(slope) ** 0.5 <= outweighs * apart.norm():
        if level.mean().abs() > outweighs * (level.std() + norm.weight.abs().mean()):
            norm.bias.sub_(level.mean())
        return {}
    weight.copy_(apart)
    factors: dict[str, Tensor | float] = {
        f"{found.name}.weight": by_channel.to(weight.dtype),
        f"{found.norm_name}.weight": 0.0,
    }
    if bias is not None:
        bias.zero_()
        factors[f"{found.name}.bias"] = 0.0
    with evaluating(model):
        mean, variance = channel_moments(found.layer, lambda: means.run(model, _BATCHES))
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    norm.weight.copy_((variance + norm.eps).sqrt())
    norm.bias.copy_(level - level.mean() + mean)
    return factors
