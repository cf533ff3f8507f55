"""The engine that differentiates through the attacker's steps, exactly; see `sophon.protection.inner_loop`.

With x_k the attacker's trained weights and its optimizer's state after step k, one graph of all the steps would give
the gradient at once, and hold the activations of all of them. Here the steps are taken without a graph, and where the
attacker stood is noted on the way. Then, from the last segment of steps to the first, a segment is taken again with its
graph, and the gradients with respect to its end and to the points of its queries are pulled back to its start::

    a_{k-1} = (d x_k / d x_{k-1})^T (a_k + gamma_k * d suppression_k / d x_k)

A query's own pass is over before the next step: its gradient is all of it that goes through the steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sophon.attacker import FineTuneStrategy, learning_rate
from sophon.domains import Batch
from sophon.finetune import thaw
from sophon.optimizers import build_optimizer
from sophon.protection.inner_loop import Simulation, floats, frozen_statistics, recording_layers
from sophon.protection.meta_gradient.differentiable import DifferentiableAttacker
from sophon.tasks import Task

# A tensor that the objective depends on, and the objective's gradient with respect to it; None where there is none.
Pull = tuple[Tensor, Tensor | None]


def second_order(
    attacker: nn.Module,
    strategy: FineTuneStrategy,
    task: Task,
    adapt: Iterator[Batch],
    query: Iterator[Batch],
    gammas: Sequence[float],
    *,
    segment: int = 1,
) -> Simulation:
    """Compute the exact gradient of the same objective through the attacker's steps; arguments as for `first_order`.

    The attacker keeps its weights and buffers. Flash attention has no second derivative, so attention runs as plain
    matrix products. What a pass writes into buffers counts as constant.

    Args:
        segment: steps whose graphs live at once, >= 1. At most so many steps' activations are held, and K / ``segment``
            times the trained weights with the optimizer's state. The last segment is the one that is not taken twice:
            with ``segment`` >= K nothing is.
    """
    with sdpa_kernel(SDPBackend.MATH):
        sweeps = _Sweeps(attacker, strategy, task, adapt, query, gammas)
        sweeps.run(segment)
    return Simulation(
        sweeps.total, floats(list(sweeps.query_losses.values())), floats(list(sweeps.attacker_losses.values()))
    )


class _Sweeps:
    """One attacker's trajectory, forwards and back; ``total`` gathers the gradient with respect to theta^0."""

    def __init__(
        self,
        attacker: nn.Module,
        strategy: FineTuneStrategy,
        task: Task,
        adapt: Iterator[Batch],
        query: Iterator[Batch],
        gammas: Sequence[float],
    ) -> None:
        trainable = thaw(attacker, strategy, task)
        attacker.requires_grad_(True)
        parameters = dict(attacker.named_parameters())
        self.total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        self.trainable = list(trainable)
        self.resting = {name: parameter for name, parameter in parameters.items() if name not in trainable}
        self.inner = DifferentiableAttacker(attacker, build_optimizer(strategy, trainable.values()))
        self.layers = recording_layers(self.inner.model)
        self.strategy, self.task, self.adapt, self.query, self.gammas = strategy, task, adapt, query, gammas
        # by step, since a step may be taken twice
        self.attacker_losses: dict[int, Tensor] = {}
        self.query_losses: dict[int, Tensor] = {}
        self.batches: dict[tuple[str, int], Batch] = {}

    def run(self, segment: int) -> None:
        """Take all steps; add the gradient of the queries, through the steps before them."""
        # after the last query there is nothing to differentiate
        until = max((step + 1 for step, gamma in enumerate(self.gammas) if gamma), default=0)
        if until:
            last, *early = [range(max(0, stop - segment), stop) for stop in range(until, 0, -segment)]
            notes = []
            for part in reversed(early):
                notes.append(self.inner.save())
                self._walk(part)
            adjoint = self._pull_back(last, [])
            end = self.inner.save()
            for part in early:
                self.inner.load(notes.pop())
                adjoint = self._pull_back(part, adjoint)
            self.inner.load(end)
            self._add(zip(self.trainable, adjoint, strict=False))  # the optimizer's state begins as a constant
        self._walk(range(until, len(self.gammas)))

    def _walk(self, part: range) -> None:
        """Take steps without a graph."""
        for step in part:
            self._step(step, graph=False)
            if self.gammas[step]:
                with torch.no_grad():
                    self._suppression(step)

    def _pull_back(self, part: range, adjoint: list[Tensor | None]) -> list[Tensor | None]:
        """Take steps with their graph; pull the gradient at their end, and those of their queries, back to the start.

        ``adjoint`` is the gradient of all later queries by the position after these steps; empty for none.
        """
        start = self.inner.begin()
        pulls: list[Pull] = []
        for step in part:
            self._step(step, graph=True)
            if self.gammas[step]:
                pulls += self._pulls(step)
        if adjoint:
            pulls += zip(self.inner.position(), adjoint, strict=True)
        gradients = _gradients(pulls, [*start, *self.resting.values()])
        self._add(zip(self.resting, gradients[len(start) :], strict=True))
        return gradients[: len(start)]

    def _step(self, step: int, *, graph: bool) -> None:
        batch = self._batch("adapt", step)
        loss = self.task.attacker_loss(self.inner.model, batch)
        self.inner.step(loss, learning_rate(self.strategy, step), graph=graph)
        self.attacker_losses[step] = loss.detach()

    def _suppression(self, step: int) -> Tensor:
        batch = self._batch("query", step)
        with frozen_statistics(self.layers):
            loss = self.task.suppression_loss(self.inner.model, batch)
        self.query_losses[step] = loss.detach()
        return loss

    def _pulls(self, step: int) -> list[Pull]:
        """Query the weights as they are; add what concerns those that rest, return what concerns the trained ones."""
        with self.inner.apart() as leaves:
            loss = self._suppression(step)
            values = torch.autograd.grad(loss * self.gammas[step], list(leaves.values()), allow_unused=True)
        gradients = dict(zip(leaves, values, strict=True))
        self._add((name, gradients[name]) for name in self.resting)
        weights = self.inner.parameters()
        return [(weights[name], gradients[name]) for name in self.trainable]

    def _batch(self, kind: str, step: int) -> Batch:
        if (kind, step) not in self.batches:
            self.batches[kind, step] = next(self.adapt if kind == "adapt" else self.query)
        return self.batches[kind, step]

    def _add(self, gradients: Iterator[tuple[str, Tensor | None]]) -> None:
        for name, gradient in gradients:
            if gradient is not None:
                self.total[name] += gradient


def _gradients(pulls: list[Pull], sources: list[Tensor]) -> list[Tensor | None]:
    """Pull gradients back to the sources that they reach."""
    reaching = [(tensor, gradient) for tensor, gradient in pulls if gradient is not None and tensor.requires_grad]
    if not reaching:
        return [None] * len(sources)
    tensors, gradients = zip(*reaching, strict=True)
    return list(torch.autograd.grad(tensors, sources, gradients, allow_unused=True))
