"""What an attacker does who knows of `method=coordinates`: it takes out what an interface's channels have in common.

As surgery of an audit's strategy, with this folder on PYTHONPATH: {operation: undo.undo}. It needs the architecture and
the attacker's own images, neither the gains nor the seed.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import nn

from sophon.protect.coordinates import Measured, interfaces
from sophon.surgery import Means
from sophon.surgery.arguments import Limits


@torch.no_grad()
def undo(
    model: nn.Module, means: Means, *, level: Annotated[float, Limits("a number >= 0", lambda value: value >= 0)] = 0.0
) -> nn.Module:
    """Make the channels behind every convolution that ends in an interface sum to zero.

    Whoever reads them is blind to their sum, so that the function stays as long as no ReLU cuts: with a ``level`` of
    several deviations of the channels. Without, a part of the function is lost, which fine-tuning brings back, and
    fine-tuning is easier where channels have no large mean.
    """
    measured = Measured(means.task, means.images)
    for each in interfaces(model):
        convolution, norm = model.get_submodule(each.convolution), model.get_submodule(each.norm)
        slope = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        whole = convolution.weight.double() * slope.view(-1, 1, 1, 1)
        shift = norm.bias - norm.running_mean * slope
        convolution.weight.copy_(whole - whole.mean(0))
        mean, variance = measured.moments(model.eval(), convolution, lambda _, output: output)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.weight.copy_((variance + norm.eps).sqrt())
        norm.bias.copy_(shift - shift.mean() + mean + level * variance.max().sqrt())
    return model
