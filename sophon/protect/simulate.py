"""The inner loop: one simulated attacker fine-tunes, and is queried as it goes.

With theta^0 the released weights and theta^k an attacker's weights after k steps, the query objective is
``L = sum_k gamma_k * suppression(theta^k; query batch k)`` (SOPHON's FTS, arXiv 2404.12699). Two engines compute its
gradient with respect to theta^0 behind one signature:

* `first_order` takes the inner gradients as constants. Then d theta^k / d theta^0 = I for every optimizer, so the
  gradient of L is the sum of the query gradients along the trajectory. It is added up as the attacker runs; memory does
  not grow with K.
* `second_order` differentiates through the optimizer's steps, exactly, with `higher`.

Both run on the module that they are given and leave it changed: hand them a scratch copy. Both leave the query out of
the attacker's BatchNorm statistics, since an attacker never sees the defender's query images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sophon.domains import Batch
from sophon.strategies import FineTuneStrategy
from sophon.tasks import Task


class Simulation(NamedTuple):
    """What one simulated attacker teaches.

    Attributes:
        gradients: d L / d theta^0 by parameter name, for every parameter of the attacker, its head included.
        query_losses: the suppression loss at each query.
        attacker_losses: the attacker's own loss at each of its steps.
        moments: of the attacker's optimizer after the last step (see `sophon.protect.moments`); None from an engine
            whose attackers cannot go on.
    """

    gradients: dict[str, Tensor]
    query_losses: list[float]
    attacker_losses: list[float]
    moments: dict[str, Tensor] | None = None


class Past(NamedTuple):
    """What an attacker that goes on brings along besides its weights.

    Attributes:
        steps: that it has taken.
        moments: of its optimizer.
    """

    steps: int
    moments: Mapping[str, Tensor]


class Engine(Protocol):
    """Simulates one attacker; see `first_order`."""

    def __call__(
        self,
        attacker: nn.Module,
        strategy: FineTuneStrategy,
        task: Task,
        adapt: Iterator[Batch],
        query: Iterator[Batch],
        gammas: Sequence[float],
        /,
    ) -> Simulation:
        """Run the attacker for as many steps as there are gammas."""


# gamma_k for k = 1 .. K, before they are scaled to sum to 1
GAMMAS: dict[str, Callable[[int, int], float]] = {
    "uniform": lambda k, steps: 1.0,
    "linear": lambda k, steps: float(k),
    "last": lambda k, steps: float(k == steps),
}


def query_weights(gamma: str, steps: int, every: int) -> list[float]:
    """Return gamma_1 .. gamma_K, summing to 1, zero where there is no query (see `MethodConfig.query_every`)."""
    queried = [k % every == 0 or k == steps for k in range(1, steps + 1)]
    weights = [GAMMAS[gamma](k, steps) * here for k, here in enumerate(queried, start=1)]
    return [weight / sum(weights) for weight in weights]


def recording_layers(model: nn.Module) -> list[_BatchNorm]:
    """Return the normalisation layers that record running statistics in training."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]


@contextmanager
def frozen_statistics(model: nn.Module | Sequence[_BatchNorm]) -> Iterator[None]:
    """Let normalisation layers normalise as in training without recording: neither their statistics nor a count.

    Args:
        model: a model, or its `recording_layers`, for who comes here often.
    """
    layers = recording_layers(model) if isinstance(model, nn.Module) else model
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


def floats(values: list[Tensor]) -> list[float]:
    """Read scalar losses."""
    # Read once, at the end: reading each loss as it comes would make a GPU wait for every step.
    return torch.stack(values).tolist() if values else []
