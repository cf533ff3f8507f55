"""The engine that takes the inner gradients as constants: it streams; see `sophon.protect.simulate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from sophon.domains import Batch
from sophon.protect import regions
from sophon.protect.moments import moments_of, restore_moments
from sophon.protect.simulate import Past, Simulation, floats, frozen_statistics, recording_layers
from sophon.strategies import FineTuneStrategy, build_optimizer, learning_rate
from sophon.tasks import Task


def first_order(
    attacker: nn.Module,
    strategy: FineTuneStrategy,
    task: Task,
    adapt: Iterator[Batch],
    query: Iterator[Batch],
    gammas: Sequence[float],
    past: Past | None = None,
) -> Simulation:
    """Run the attacker in place; add up ``gamma_k`` times the query gradients at theta^1 .. theta^K.

    What it needs besides the attacker is its optimizer's state and one set of gradients, its total: the attacker's own
    gradients live from their pass to their step.

    Args:
        attacker: scratch copy of the released model with the attacker's head; it ends as the fine-tuned model.
        strategy: how it fine-tunes.
        task: gives both losses.
        adapt: the attacker's batches; one is taken for each step.
        query: the defender's batches; one is taken for each gamma that is not zero.
        gammas: K weights, one for each step.
        past: of an attacker that has begun before and goes on.
    """
    trainable = list(task.train_mode(attacker, strategy.scope).values())
    optimizer = build_optimizer(strategy, trainable, fused=True)
    done = 0
    if past is not None:
        done = past.steps
        restore_moments(optimizer, past.moments)
        _lay_out(optimizer)
    total = _Total(attacker, trainable)
    query_losses, attacker_losses = [], []
    for step, gamma in enumerate(gammas):
        attacker_losses.append(_attack(attacker, task, _drawn(adapt)))
        with record_function(regions.ATTACKER_STEP):
            _set_learning_rate(optimizer, strategy, done + step)
            optimizer.step()
            optimizer.zero_grad()
        if gamma:
            query_losses.append(total.add(task, _drawn(query), gamma))
    attacker.requires_grad_(True)
    return Simulation(total.gradients(), floats(query_losses), floats(attacker_losses), moments_of(optimizer))


class _Total:
    """The sum of the query gradients, by parameter, added up where it lies.

    Between queries only what the attacker steps requires gradients: its passes keep no activations for the rest.

    Args:
        model: the attacker's; gradients left on it by an earlier run are forgotten.
        trainable: the parameters that it steps.
    """

    def __init__(self, model: nn.Module, trainable: Sequence[nn.Parameter]) -> None:
        self.model = model
        self.parameters = dict(model.named_parameters())
        self.sums: list[Tensor | None] = [None] * len(self.parameters)
        self.layers = recording_layers(model)
        steps = set(trainable)
        self.rest = [parameter for parameter in self.parameters.values() if parameter not in steps]
        model.zero_grad()
        model.requires_grad_(True)
        self._attend(False)

    def add(self, task: Task, batch: Batch, gamma: float) -> Tensor:
        """Add gamma times the gradient of the suppression loss, which is returned."""
        with record_function(regions.QUERY_PASS):
            self._attend(True)
            for parameter, summed in zip(self.parameters.values(), self.sums, strict=True):
                parameter.grad = summed
            with frozen_statistics(self.layers):
                loss = task.suppression_loss(self.model, batch)
            # into .grad, so that autograd adds each gradient as it comes: there never is a second set of them
            (gamma * loss).backward()  # type: ignore[no-untyped-call]
            self.sums = [parameter.grad for parameter in self.parameters.values()]
            self.model.zero_grad()
            self._attend(False)
            return loss.detach()

    def gradients(self) -> dict[str, Tensor]:
        """Return the sums by parameter; zeros where no query's loss reached."""
        found = zip(self.parameters.items(), self.sums, strict=True)
        return {name: torch.zeros_like(p) if summed is None else summed for (name, p), summed in found}

    def _attend(self, queried: bool) -> None:
        for parameter in self.rest:
            parameter.requires_grad = queried


def _drawn(batches: Iterator[Batch]) -> Batch:
    with record_function(regions.BATCH):
        return next(batches)


def _attack(model: nn.Module, task: Task, batch: Batch) -> Tensor:
    """Leave the gradient of the attacker's loss, which is returned, on the parameters that require one."""
    with record_function(regions.ATTACKER_PASS):
        loss = task.attacker_loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()


def _lay_out(optimizer: torch.optim.Optimizer) -> None:
    """Let moments lie in memory as their parameters do; from a file they come contiguous."""
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if isinstance(value, Tensor) and value.stride() != parameter.stride() and value.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter).copy_(value)


def _set_learning_rate(optimizer: torch.optim.Optimizer, strategy: FineTuneStrategy, step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(strategy, step)
