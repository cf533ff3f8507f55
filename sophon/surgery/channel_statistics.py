"""Mean and variance of what a layer puts out, or of what can be made of that, by channel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def channel_statistics(
    layer: nn.Module, run: Callable[[], None], of: Callable[[Tensor, Tensor], Tensor] = lambda given, output: output
) -> tuple[Tensor, Tensor]:
    """Return mean and variance by channel, float64, over all passes and places.

    Args:
        layer: with one input.
        run: sends batches through the model around it, without gradients.
        of: makes of the layer's input and output what is to be measured, [B, channels, ...].
    """
    sums: list[Tensor] = []

    def see(layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        values = of(given[0], output).double().transpose(0, 1).flatten(1)
        sums.append(torch.stack([torch.ones_like(values).sum(1), values.sum(1), values.square().sum(1)]))

    hook = layer.register_forward_hook(see)
    try:
        run()
    finally:
        hook.remove()
    count, total, squares = torch.stack(sums).sum(0)
    mean = total / count
    return mean, squares / count - mean.square()
