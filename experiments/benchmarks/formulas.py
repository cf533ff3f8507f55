"""What a round costs, as pure functions of the model, the round and the device: README.md, "Cost model".

Every figure is for one rank. Bytes and FLOPs are plain numbers (one multiply-add is two FLOPs), time is in seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FORWARD_BACKWARD = 3  # in forward passes: the backward one forms two products for each of the forward one's
DIFFERENTIATED = 9  # forward 1, backward 2, and back through both of them 2 + 4

# floats of state that an optimizer keeps for each parameter
STATE = {"sgd": 0, "momentum": 1, "nesterov": 1, "adam": 2, "adamw": 2, "adagrad": 1, "adadelta": 2, "rmsprop": 1}


@dataclass(frozen=True)
class Model:
    """A model's sizes.

    Attributes:
        flops: of one image's forward pass.
        parameters: how many numbers.
        activations: bytes that the forward pass of one image keeps for the backward pass.
        graph: bytes of one image that forward and backward pass keep together, to be differentiated once more.
        width: bytes of a parameter, of a gradient and of an optimizer's number.
    """

    flops: float
    parameters: float
    activations: float
    graph: float = 0.0
    width: int = 4

    @property
    def bytes(self) -> float:
        """Bytes of the parameters."""
        return self.parameters * self.width


@dataclass(frozen=True)
class Round:
    """One round of protection.

    Attributes:
        steps: K, of an attacker.
        adapt: B, images of an attacker's step.
        query: Q, images of a query.
        every: m, a query after every m-th step and after the last.
        attackers: N, of a round.
        ranks: R, processes that share them.
        ntr_steps: of the original domain.
        ntr_batch: images of such a step, shared by the ranks.
        optimizer: the attacker's, a key of `STATE`.
    """

    steps: int
    adapt: int
    query: int
    every: int = 1
    attackers: int = 1
    ranks: int = 1
    ntr_steps: int = 0
    ntr_batch: int = 0
    optimizer: str = "sgd"

    @property
    def queries(self) -> int:
        """How often an attacker is queried."""
        return math.ceil(self.steps / self.every)

    @property
    def turns(self) -> int:
        """How many attackers the busiest rank simulates."""
        return math.ceil(self.attackers / self.ranks)


@dataclass(frozen=True)
class Device:
    """What does the work.

    Attributes:
        flops: FLOP/s that the model's passes achieve, not the device's peak.
        bandwidth: bytes/s of passes over parameters.
        link: bytes/s between ranks.
    """

    flops: float
    bandwidth: float
    link: float = math.inf


def simulation_flops(model: Model, work: Round) -> float:
    """FLOPs of one first-order attacker: forward and backward passes; what optimizers add is left out."""
    return FORWARD_BACKWARD * model.flops * (work.steps * work.adapt + work.queries * work.query)


def second_order_flops(model: Model, work: Round, segment: int | None = None) -> float:
    """FLOPs of one attacker that is differentiated through.

    Args:
        model: its size.
        work: what is simulated.
        segment: steps between checkpoints; all steps but those of the last segment are taken once more, without a
            graph, and of their queries the forward pass. None keeps the graph of all steps: nothing is taken twice.
    """
    once = min(segment or work.steps, work.steps)
    twice = work.steps - once
    graph = DIFFERENTIATED * work.steps * work.adapt + FORWARD_BACKWARD * work.queries * work.query
    walk = FORWARD_BACKWARD * twice * work.adapt + twice // work.every * work.query
    return model.flops * (graph + walk)


def update_bytes(model: Model, optimizer: str) -> float:
    """Bytes that one optimizer step moves: reads weights, gradients and state, writes weights and state."""
    return (3 + 2 * STATE[optimizer]) * model.bytes


def bound_bytes(model: Model, work: Round) -> float:
    """Bytes of parameter size that the passes and the attacker's updates move.

    Going forward a pass reads the weights; going back it reads them and reads and writes a gradient. The traffic of
    activations grows as the FLOPs do, and is in `Device.flops`.
    """
    return 4 * (work.steps + work.queries) * model.bytes + work.steps * update_bytes(model, work.optimizer)


def simulation_bytes(model: Model, work: Round) -> float:
    """Bytes of parameter size of one attacker: `bound_bytes`, and each query's gradient added to the sum."""
    return bound_bytes(model, work) + 3 * work.queries * model.bytes


def simulation_seconds(model: Model, work: Round, device: Device) -> float:
    """Seconds of one first-order attacker."""
    return simulation_flops(model, work) / device.flops + simulation_bytes(model, work) / device.bandwidth


def second_order_seconds(model: Model, work: Round, device: Device, segment: int | None = None) -> float:
    """Seconds of one attacker that is differentiated through; its bytes count as three times the first-order one's."""
    moved = DIFFERENTIATED / FORWARD_BACKWARD * simulation_bytes(model, work)
    return second_order_flops(model, work, segment) / device.flops + moved / device.bandwidth


def achieved(model: Model, work: Round, seconds: float, bandwidth: float) -> Device:
    """Return the device on which the bare lower bound takes ``seconds``, its bandwidth known."""
    left = seconds - bound_bytes(model, work) / bandwidth
    # where passes over parameters explain it all, their traffic must have been in a cache
    return Device(simulation_flops(model, work) / (left if left > 0 else seconds), bandwidth if left > 0 else math.inf)


def communicated(model: Model, work: Round) -> float:
    """Bytes that a rank sends in a round: a ring's all-reduce of one gradient for FTS and for each NTR step."""
    return 2 * (work.ranks - 1) / work.ranks * model.bytes * (1 + work.ntr_steps)


def round_flops(model: Model, work: Round) -> float:
    """FLOPs of a round on the busiest rank."""
    ntr = FORWARD_BACKWARD * model.flops * work.ntr_steps * work.ntr_batch / work.ranks
    return work.turns * simulation_flops(model, work) + ntr


def round_seconds(model: Model, work: Round, device: Device) -> float:
    """Seconds of a round: attackers one after another on each rank, Adam's two steps, NTR, and the reductions."""
    attackers = work.turns * simulation_bytes(model, work)
    outer = (1 + work.ntr_steps) * update_bytes(model, "adam") + 4 * work.ntr_steps * model.bytes
    moved = (attackers + outer) / device.bandwidth
    return round_flops(model, work) / device.flops + moved + communicated(model, work) / device.link


def first_order_memory(model: Model, work: Round) -> float:
    """Peak bytes of a streaming simulation above the loaded attacker: the larger pass, its gradient, the sum, state."""
    return max(work.adapt, work.query) * model.activations + (2 + STATE[work.optimizer]) * model.bytes


def plain_memory(model: Model, work: Round) -> float:
    """Peak bytes of ordinary training above the loaded model: one pass, its gradient, the optimizer's state."""
    return work.adapt * model.activations + (1 + STATE[work.optimizer]) * model.bytes


def bound_memory(model: Model, work: Round) -> float:
    """Peak bytes of the bare lower bound: as `plain_memory` of the larger of its two passes."""
    return max(work.adapt, work.query) * model.activations + (1 + STATE[work.optimizer]) * model.bytes


def kept_graphs_memory(model: Model, work: Round) -> float:
    """Peak bytes where each query's graph is kept to the end: its activations, and the weights of its step."""
    kept = work.queries * work.query * model.activations + work.steps * model.bytes
    return kept + model.bytes


def second_order_memory(model: Model, work: Round, segment: int | None = None) -> float:
    """Peak bytes of the exact gradient above the loaded attacker.

    Args:
        model: with its ``graph``.
        work: what is simulated.
        segment: steps between checkpoints of weights and state, whose graphs live at once, with one query. None keeps
            the graph of all steps and queries, as `higher` does.
    """
    position = (1 + STATE[work.optimizer]) * model.bytes
    if segment is None:
        graph = work.steps * (work.adapt * model.graph + position) + work.queries * work.query * model.activations
        return graph + 2 * model.bytes
    alive = min(segment, work.steps)
    graph = alive * (work.adapt * model.graph + position) + work.query * model.activations
    return graph + math.ceil(work.steps / segment) * position + 2 * model.bytes


def protection_memory(model: Model, work: Round, micro: int) -> float:
    """Bytes on one rank of a whole protection, first-order, with ``micro`` images in a pass.

    The released model, the reference, the attacker and its optimizer's state, its gradient, the sum over the queries,
    and the two Adams of FTS and NTR with two numbers each.
    """
    return (9 + STATE[work.optimizer]) * model.bytes + micro * model.activations
