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

What is asked at a query is an `Objective`; `first_order` takes any number of them. The identity holds for theta^k plus
any constant as well: what an objective's gradient is at weights beside the trajectory counts unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sophon.domains import Batch
from sophon.tasks import Task


class Simulation(NamedTuple):
    """The result of one simulated attacker.

    Attributes:
        gradients: d L / d theta^0 by parameter name, for every parameter of the attacker, its head included.
        query_losses: the suppression loss at each query.
        attacker_losses: the attacker's own loss at each of its steps.
        optimizer_state: after the last step; None from an engine whose attackers
            cannot go on.
    """

    gradients: dict[str, Tensor]
    query_losses: list[float]
    attacker_losses: list[float]
    optimizer_state: dict[str, Tensor] | None = None


class Past(NamedTuple):
    """The state of an attacker that goes on from an earlier turn, besides its weights.

    Attributes:
        steps: that it has taken.
        optimizer_state: of its optimizer.
    """

    steps: int
    optimizer_state: Mapping[str, Tensor]


class Query(NamedTuple):
    """A point of the attacker's trajectory at which the defender evaluates its objectives.

    Attributes:
        moving: the parameters that the attacker steps, at theta^k.
        lr: the rate of its last step.
        last: whether this is the simulation's last query, its only one of what is asked once.
        begun: whether the attacker began in this simulation, so that ``start`` is theta^0.
        start: values of ``moving`` at the start of the simulation; empty where no objective remembers.
        before: their values before the last step; the same.
    """

    moving: Sequence[nn.Parameter]
    lr: float
    last: bool
    begun: bool
    start: Sequence[Tensor] = ()
    before: Sequence[Tensor] = ()


class Objective:
    """What the defender minimises at the queries of a simulation; the base class of all.

    A subclass is a dataclass whose fields are its settings.

    Attributes:
        remembers: whether it needs ``start`` and ``before`` of a `Query`, which cost two copies of the moving weights.
    """

    remembers: ClassVar[bool] = False

    @property
    def weighs(self) -> bool:
        """Whether it has a gradient; one without is measured only."""
        return True

    def add(self, model: nn.Module, task: Task, batch: Batch, gamma: float, query: Query) -> Tensor:
        """Add its gradient by the model's parameters to their ``.grad``, and leave the weights to the bit.

        Args:
            model: the attacker's, all its parameters requiring gradients, statistics frozen.
            task: gives the losses.
            batch: the query's.
            gamma: the query's weight, of what is asked at every query.
            query: where it is.

        Returns:
            The objective's value, without ``gamma``; a scalar without a graph.
        """
        raise NotImplementedError

    def on_original(self, model: nn.Module, task: Task, batch: Batch) -> Tensor | None:
        """Return what NTR minimises besides the original domain's loss on a batch of it; None for nothing."""
        return None


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
        model: a model, or its `recording_layers`, which saves looking for them.
    """
    layers = recording_layers(model) if isinstance(model, nn.Module) else model
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


@contextmanager
def standing_at(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """Let parameters have other values for a while; afterwards they have their own again, to the bit.

    Graphs that need the values must not outlive the block.
    """
    own = [parameter.detach().clone() for parameter in parameters]
    _set(parameters, values)
    try:
        yield
    finally:
        _set(parameters, own)


@torch.no_grad()
def _set(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def rewinder(device: torch.device) -> Callable[[], None]:
    """Return what puts torch's global generators (the CPU's and the device's) back to where they are now.

    Passes that are compared must draw the same noise and the same dropout.
    """
    state = torch.get_rng_state()
    if device.type != "cuda":
        return lambda: torch.set_rng_state(state)
    on_device = torch.cuda.get_rng_state(device)

    def rewind() -> None:
        torch.set_rng_state(state)
        torch.cuda.set_rng_state(on_device, device)

    return rewind


def floats(values: list[Tensor]) -> list[float]:
    """Read scalar losses."""
    # Read once, at the end: reading each loss as it comes would make a GPU wait for every step.
    return torch.stack(values).tolist() if values else []
