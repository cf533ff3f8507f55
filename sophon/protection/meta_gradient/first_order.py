"""The engine that takes the inner gradients as constants: it streams; see `sophon.protection.inner_loop`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from sophon.attacker import FineTuneStrategy, learning_rate
from sophon.domains import Batch
from sophon.errors import UserError
from sophon.finetune import thaw
from sophon.optimizers import build_optimizer
from sophon.protection.inner_loop import Objective, Past, Query, Simulation, floats, frozen_statistics, recording_layers
from sophon.protection.objectives.suppression import Suppression
from sophon.protection.optimizer_state import optimizer_state, restore_optimizer
from sophon.tasks import Task

PLAIN: Sequence[Objective] = (Suppression(),)


def first_order(
    attacker: nn.Module,
    strategy: FineTuneStrategy,
    task: Task,
    adapt: Iterator[Batch],
    query: Iterator[Batch],
    gammas: Sequence[float],
    past: Past | None = None,
    *,
    objectives: Sequence[Objective] = PLAIN,
) -> Simulation:
    """Run the attacker in place; add up ``gamma_k`` times the query gradients at theta^1 .. theta^K.

    What it needs besides the attacker is its optimizer's state and one set of gradients, its total: the attacker's own
    gradients live from their pass to their step. Objectives other than plain suppression may need more for themselves.

    Args:
        attacker: scratch copy of the released model with the attacker's head; it ends as the fine-tuned model.
        adapt: the attacker's batches; one is taken for each step.
        query: the defender's batches; one is taken for each gamma that is not zero.
        gammas: K weights, one for each step.
        past: of an attacker that has begun before and goes on.
        objectives: what is asked at each query, one or more; the losses returned are those of the first.
    """
    trainable = list(thaw(attacker, strategy, task).values())
    optimizer = build_optimizer(strategy, trainable, fused=True)
    done = 0
    if past is not None:
        done = past.steps
        restore_optimizer(optimizer, past.optimizer_state)
    total = _Total(attacker, trainable, objectives)
    remembers = any(objective.remembers for objective in objectives)
    final = max((step for step, gamma in enumerate(gammas) if gamma), default=-1)
    start = before = _copied(trainable) if remembers else []
    query_losses, attacker_losses = [], []
    for step, gamma in enumerate(gammas):
        with record_function("sophon: attacker's step"):
            loss = task.attacker_loss(attacker, next(adapt))
            loss.backward()  # type: ignore[no-untyped-call]
            attacker_losses.append(loss.detach())
            lr = _set_learning_rate(optimizer, strategy, done + step)
            if remembers and gamma:
                before = _copied(trainable)
            optimizer.step()
            optimizer.zero_grad()
        if gamma:
            asked = Query(trainable, lr, step == final, past is None, start, before)
            query_losses.append(total.add(task, next(query), gamma, asked))
    attacker.requires_grad_(True)
    return Simulation(total.gradients(), floats(query_losses), floats(attacker_losses), optimizer_state(optimizer))


def _value(objective: Objective, value: object) -> Tensor:
    """Refuse what an objective of the user's own returns unless it is one number."""
    if isinstance(value, Tensor) and value.ndim == 0:
        return value
    kind = type(objective)
    raise UserError(
        f"method.objectives: add of {kind.__module__}.{kind.__qualname__} returned {value!r:.50}; it must return its "
        "value, a tensor of one number"
    )


class _Total:
    """The sum of the query gradients, by parameter, added up where it lies.

    Between queries only what the attacker steps requires gradients: its passes keep no activations for the rest.

    Args:
        model: the attacker's; gradients left on it by an earlier run are forgotten.
        trainable: the parameters that it steps.
        objectives: what is asked, at least one.
    """

    def __init__(self, model: nn.Module, trainable: Sequence[nn.Parameter], objectives: Sequence[Objective]) -> None:
        self.model = model
        self.objectives = objectives
        self.parameters = dict(model.named_parameters())
        self.sums: list[Tensor | None] = [None] * len(self.parameters)
        self.layers = recording_layers(model)
        steps = set(trainable)
        self.rest = [parameter for parameter in self.parameters.values() if parameter not in steps]
        model.zero_grad()
        model.requires_grad_(True)
        self._attend(False)

    def add(self, task: Task, batch: Batch, gamma: float, query: Query) -> Tensor:
        """Add the objectives' gradients; return the value of the first."""
        with record_function("sophon: query"):
            self._attend(True)
            for parameter, summed in zip(self.parameters.values(), self.sums, strict=True):
                parameter.grad = summed
            with frozen_statistics(self.layers):
                losses = [
                    _value(objective, objective.add(self.model, task, batch, gamma, query))
                    for objective in self.objectives
                ]
            self.sums = [parameter.grad for parameter in self.parameters.values()]
            self.model.zero_grad()
            self._attend(False)
            return losses[0]

    def gradients(self) -> dict[str, Tensor]:
        """Return the sums by parameter; zeros where no query's loss reached."""
        sums = zip(self.parameters.items(), self.sums, strict=True)
        return {name: torch.zeros_like(p) if summed is None else summed for (name, p), summed in sums}

    def _attend(self, queried: bool) -> None:
        for parameter in self.rest:
            parameter.requires_grad = queried


def _set_learning_rate(optimizer: torch.optim.Optimizer, strategy: FineTuneStrategy, step: int) -> float:
    lr = learning_rate(strategy, step)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def _copied(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]
