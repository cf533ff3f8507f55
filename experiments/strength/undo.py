"""What an attacker does who knows of `method=coordinates`: it takes out what an interface's channels have in common.

As surgery of an audit's strategy, with this folder on PYTHONPATH: {operation: undo.undo}. It needs the architecture and
the attacker's own images, neither the gains nor the seed.
"""

from __future__ import annotations

import torch
from torch import nn

from sophon.protect.coordinates import OPEN, Measured, interfaces
from sophon.surgery import Means


@torch.no_grad()
def undo(model: nn.Module, means: Means) -> nn.Module:
    """Make the channels behind every convolution that ends in an interface sum to zero, and hold their ReLU open.

    Whoever reads them is blind to their sum, so that the function stays.
    """
    measured = Measured(means.task, means.images)
    for each in interfaces(model):
        convolution, norm = model.get_submodule(each.convolution), model.get_submodule(each.norm)
        slope = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        whole = convolution.weight.double() * slope.view(-1, 1, 1, 1)
        level = norm.bias - norm.running_mean * slope
        convolution.weight.copy_(whole - whole.mean(0))
        mean, variance = measured.moments(model.eval(), convolution, lambda _, output: output)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.weight.copy_((variance + norm.eps).sqrt())
        norm.bias.copy_(level - level.mean() + mean + 4 * OPEN * variance.max().sqrt())  # room for the shortcut as well
    return model
