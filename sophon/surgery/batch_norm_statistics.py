"""BatchNorm's running statistics: estimated anew, or held."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sophon.tasks.task import evaluating


def reestimated(model: nn.Module, run: Callable[[], object]) -> None:
    """Estimate the statistics of BatchNorm layers anew, in place, as the mean over the batches of ``run``.

    All else stays in evaluation mode. A model without such layers is left as it is, and ``run`` is not called.
    """
    layers = [part for part in model.modules() if isinstance(part, _BatchNorm) and part.running_mean is not None]
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    with evaluating(model):
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # a cumulative mean
            layer.training = True
        run()
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum


@contextmanager
def held(model: nn.Module) -> Iterator[None]:
    """Let BatchNorm normalise with its running statistics for a while, and leave them as they are."""
    layers = [part for part in model.modules() if isinstance(part, _BatchNorm) and part.training]
    for layer in layers:
        layer.training = False
    try:
        yield
    finally:
        for layer in layers:
            layer.training = True
