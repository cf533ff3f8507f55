"""A reference for objectives: it takes an attacker's steps, keeps the weights and differentiates there alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from sophon.attacker import FineTuneStrategy, learning_rate
from sophon.domains import Batch
from sophon.optimizers import build_optimizer
from sophon.protection.inner_loop import Objective, Past, Simulation, frozen_statistics, query_weights
from sophon.protection.meta_gradient.first_order import first_order
from tests.tiny import tiny_batches, tiny_model, tiny_task

STEPS, EVERY = 4, 2
ADAPT = tiny_batches(1, STEPS)
QUERY = tiny_batches(2, STEPS)
GAMMA = query_weights("linear", STEPS, EVERY)
PLAN = FineTuneStrategy(optimizer="adam", lr=0.02, steps=STEPS, schedule="cosine")
SHARP = 0.3
WIDTH = 0.01
SEED = 5

Weights = dict[str, Tensor]


def run_with(
    objectives: Sequence[Objective], plan: FineTuneStrategy = PLAN, past: Past | None = None
) -> tuple[Simulation, nn.Module]:
    attacker = tiny_model()
    torch.manual_seed(SEED)
    run = first_order(attacker, plan, tiny_task(), iter(ADAPT), iter(QUERY), GAMMA, past, objectives=objectives)
    return run, attacker


class Way:
    """One attacker's way, taken with torch.optim's default optimizer; weights by step, 0 the start."""

    def __init__(self, plan: FineTuneStrategy = PLAN) -> None:
        task, self.model = tiny_task(), tiny_model()
        self.moving = list(task.train_mode(self.model, plan.scope))
        optimizer = build_optimizer(plan, [self.model.get_parameter(name) for name in self.moving])
        self.weights = [self._copied()]
        self.buffers: list[Weights] = [{}]
        for step, batch in enumerate(ADAPT):
            optimizer.param_groups[0]["lr"] = learning_rate(plan, step)
            self.model.zero_grad()
            task.attacker_loss(self.model, batch).backward()
            optimizer.step()
            self.weights.append(self._copied())
        self.batches = dict(zip([k for k in range(1, STEPS + 1) if GAMMA[k - 1]], QUERY, strict=False))
        self.lr = learning_rate(plan, STEPS - 1)

    def _copied(self) -> Weights:
        return {name: weight.detach().clone() for name, weight in self.model.named_parameters()}

    def loss(self, weights: Weights, batch: Batch, kind: str = "attacker_loss") -> Tensor:
        """Return a loss of the task as a function of the weights."""
        task = tiny_task()

        def called(images: Tensor) -> Tensor:
            found: Tensor = functional_call(self.model, weights, (images,))
            return found

        with frozen_statistics(self.model):
            return getattr(task, kind)(called, batch)  # type: ignore[no-any-return]

    def at(self, k: int) -> Weights:
        return {name: weight.clone().requires_grad_() for name, weight in self.weights[k].items()}

    def grad(self, value: Tensor, weights: Weights) -> Weights:
        found = torch.autograd.grad(value, list(weights.values()), retain_graph=True, materialize_grads=True)
        return dict(zip(weights, found, strict=True))

    def flat(self, weights: Weights) -> Tensor:
        return torch.cat([weights[name].flatten() for name in self.moving])

    def moved(self, weights: Weights, by: Tensor) -> Weights:
        """Add a flat vector over what moves."""
        sizes = [weights[name].numel() for name in self.moving]
        parts = dict(zip(self.moving, by.split(sizes), strict=True))
        return {name: w + parts[name].view_as(w) if name in parts else w for name, w in weights.items()}

    def slope(self, weights: Weights, batch: Batch) -> Tensor:
        """Return the gradient of the attacker's loss over what moves, flat, with its graph."""
        found = torch.autograd.grad(
            self.loss(weights, batch), [weights[name] for name in self.moving], create_graph=True
        )
        return torch.cat([part.flatten() for part in found])


def added(*parts: tuple[float, Weights]) -> Weights:
    return {name: sum(weight * part[name] for weight, part in parts) for name in parts[0][1]}  # type: ignore[misc]


def assert_gradients(found: Weights, expected: Weights, rtol: float = 1e-8, atol: float = 1e-12) -> None:
    assert any(value.abs().max() > 1e-6 for value in expected.values()), "the reference must say something"
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


SCOPES = pytest.mark.parametrize("scope", ["all", "head"])
