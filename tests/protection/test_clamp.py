"""CLAMP's terms against their formulas, differentiated by autograd."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sophon.attacker import FineTuneStrategy
from sophon.domains import Batch
from sophon.protection.inner_loop import Simulation
from sophon.protection.meta_gradient.first_order import PLAIN, first_order
from sophon.protection.objectives.clamp import Clamp
from sophon.protection.objectives.suppression import Suppression
from sophon.tasks import ClassificationTask
from tests.protection.way import (
    ADAPT,
    GAMMA,
    PLAN,
    QUERY,
    SCOPES,
    SEED,
    STEPS,
    WIDTH,
    Way,
    Weights,
    added,
    assert_gradients,
    run_with,
)
from tests.tiny import assert_same_state, state_of, tiny_model, tiny_task


def direction_of(way: Way) -> Tensor:
    """Draw what the clamp draws: the generator is seeded by who simulates."""
    torch.manual_seed(SEED)
    drawn = torch.cat([torch.randn_like(way.weights[0][name]).flatten() for name in way.moving])
    return drawn / drawn.norm()


def curvature(way: Way, config: Clamp) -> Weights:
    parts = []
    for k, batch in way.batches.items():
        weights = way.at(k)
        step = way.flat(way.weights[k]) - way.flat(way.weights[k - 1])
        along = WIDTH * step / step.norm()
        up, here, down = (way.loss(way.moved(weights, side * along), batch) for side in (1, 0, -1))
        kappa = (up - 2 * here + down) / WIDTH**2
        assert abs(kappa.item()) > 1e-6
        parts.append((config.curvature * GAMMA[k - 1], way.grad(F.softplus(config.kappa_min - kappa), weights)))
    return added(*parts)


def end(way: Way, config: Clamp) -> tuple[Weights, float, float]:
    """Return the gradient of contraction and tail, their value, and the rate c."""
    last, first = way.at(STEPS), way.at(0)
    batch = way.batches[STEPS]

    def update_map(weights: Weights) -> Tensor:
        return way.flat(weights) - way.lr * way.slope(weights, batch)

    c = (update_map(way.moved(last, WIDTH * direction_of(way))) - update_map(last)).norm() / WIDTH
    length = (way.flat(way.weights[STEPS]) - way.flat(way.weights[STEPS - 1])).norm()
    reach = length / (1 - c.clamp(max=config.c_limit))
    drop = way.loss(first, batch) - way.loss(last, batch)
    bound = drop + way.slope(last, batch).norm() * reach + config.lipschitz / 2 * reach**2
    value = config.contract * F.softplus(c - config.c_max) + config.tail * F.relu(bound - config.slack)
    # theta^k = theta^0 + constant: both points move with the released weights
    return added((1, way.grad(value, last)), (1, way.grad(value, first))), value.item(), c.item()


def clamped(plan: FineTuneStrategy, **values: Any) -> tuple[Simulation, Clamp]:
    config = Clamp(probe_width=WIDTH, **values)
    run, attacker = run_with((Suppression(0.0), config), plan)
    assert_same_state(attacker, state_of(run_with(PLAIN, plan)[1]))
    return run, config


@SCOPES
@pytest.mark.parametrize("kappa_min", [0.0, 2.5])
def test_curvature(kappa_min: float, scope: str) -> None:
    plan = replace(PLAN, scope=scope, schedule="constant")
    run, config = clamped(plan, curvature=0.7, kappa_min=kappa_min)
    assert_gradients(run.gradients, curvature(Way(plan), config), rtol=1e-6, atol=1e-9)


CASES: dict[str, dict[str, Any]] = {
    "contraction": {"contract": 0.8, "c_max": 0.9, "c_limit": 0.9999},
    "tail": {"tail": 0.6, "c_limit": 0.999},
    "tail, c at its limit": {"tail": 0.6, "c_limit": 0.5, "lipschitz": 3.0},
    "both": {"tail": 0.6, "contract": 0.8, "c_limit": 0.999, "slack": 0.01, "lipschitz": 0.5},
}


@SCOPES
@pytest.mark.parametrize("case", CASES)
def test_contraction_and_tail(case: str, scope: str) -> None:
    plan = replace(PLAN, optimizer="sgd", lr=0.5, scope=scope, schedule="constant")
    run, config = clamped(plan, **CASES[case])
    way = Way(plan)
    expected, value, c = end(way, config)
    assert value > 0
    assert (c < config.c_limit) is ("limit" not in case)
    assert_gradients(run.gradients, expected, rtol=1e-6, atol=1e-9)


class Guessing(ClassificationTask):
    """Where a guess is as bad, or as good, as said."""

    chance = 0.0

    def chance_loss(self, model: nn.Module) -> float:
        return self.chance


@SCOPES
@pytest.mark.parametrize(("chance", "asked"), [(1e-6, False), (1e6, True)])
def test_inverse_has_no_reward_for_worse_than_a_guess(chance: float, asked: bool, scope: str) -> None:
    plan = replace(PLAN, scope=scope)
    task, way = Guessing(tiny_task().spec, suppression_loss="klu", dtype=torch.float64), Way(plan)
    task.chance = chance
    objectives = (Suppression(0.0), Clamp(inverse=0.4))
    run = first_order(tiny_model(), plan, task, iter(ADAPT), iter(QUERY), GAMMA, objectives=objectives)
    weights = way.at(0)
    if asked:
        expected = way.grad(way.loss(weights, way.batches[STEPS]), weights)
        assert_gradients(run.gradients, added((-0.4, expected)))
    else:
        assert not any(value.any() for value in run.gradients.values())


class Watched(ClassificationTask):
    """Notes whether passes were autocast."""

    def attacker_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        seen.append(self.amp)
        return super().attacker_loss(model, batch)


seen: list[bool] = []


def test_differences_are_not_taken_in_half_precision() -> None:
    seen.clear()
    task = Watched(tiny_task().spec, suppression_loss="klu", amp=True, dtype=torch.float64)
    model = tiny_model()
    objectives = (*PLAIN, Clamp(curvature=1.0))
    first_order(model, replace(PLAN, steps=1), task, iter(ADAPT), iter(QUERY), [1.0], objectives=objectives)
    assert seen == [True, False, False, False]
    assert task.amp
