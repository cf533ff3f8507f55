"""Both engines of the inner loop against independent references, in float64.

A denoiser's losses draw timesteps and noise as they go, so whatever is compared starts from the same seed and draws
in the same order: the attacker's step, then the query.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import nn

from sophon.attacker import SIMULATED, FineTuneStrategy, learning_rate
from sophon.domains import Batch
from sophon.optimizers import build_optimizer
from sophon.protection.fts import ENGINES
from sophon.protection.inner_loop import GAMMAS, Simulation, query_weights
from sophon.protection.meta_gradient import differentiable
from sophon.protection.meta_gradient.second_order import second_order
from sophon.tasks import Task
from tests.tiny import state_of, tiny_batches, tiny_denoising, tiny_model, tiny_task, tiny_unet

STEPS, SEED = 3, 7
RATES = {"adadelta": 1.0, "sgd": 0.1, "momentum": 0.05, "nesterov": 0.05, "adagrad": 0.02, "rmsprop": 0.005}
GAMMA = query_weights("linear", STEPS, 1)


class Network(NamedTuple):
    """A network, its task, the batches of attacker and query, and a step that finite differences may take."""

    model: Callable[[], nn.Module]
    task: Callable[[], Task]
    adapt: list[Batch]
    query: list[Batch]
    step: float


def network(model: Callable[[], nn.Module], task: Callable[[], Task], size: int, step: float) -> Network:
    return Network(model, task, tiny_batches(1, STEPS, size), tiny_batches(2, STEPS, size), step)


NETWORKS = {
    "classifier": network(tiny_model, tiny_task, 8, 1e-6),
    # the layout that released classifiers have; a fused kernel would step the wrong weights if it were mixed up
    "channels last": network(lambda: tiny_model().to(memory_format=torch.channels_last), tiny_task, 8, 1e-6),
    # Adam's first step is nearly g / |g|: the differences must not reach where an element changes sign
    "U-Net": network(tiny_unet, tiny_denoising, 4, 1e-9),
    "conditional U-Net": network(
        partial(tiny_unet, conditional=True), partial(tiny_denoising, conditional=True), 4, 1e-9
    ),
}
slow = pytest.mark.slow
CLASSIFIERS = [("classifier", optimizer, "all") for optimizer in SIMULATED]
UNETS = [
    ("conditional U-Net", "adam", "all"),
    pytest.param("U-Net", "adamw", "all", marks=slow),
    pytest.param("U-Net", "sgd", "attention", marks=slow),
    pytest.param("U-Net", "adam", "last_blocks", marks=slow),
    pytest.param("conditional U-Net", "adam", "head", marks=slow),
]


def strategy(optimizer: str, scope: str = "all") -> FineTuneStrategy:
    rate = RATES.get(optimizer, 0.01)
    return FineTuneStrategy(optimizer, rate, 0.01, schedule="cosine", steps=STEPS, scope=scope, head="kept")


def simulated(engine: str, of: Network, attacker: nn.Module, plan: FineTuneStrategy) -> Simulation:
    torch.manual_seed(SEED)
    return ENGINES[engine](attacker, plan, of.task(), iter(of.adapt), iter(of.query), GAMMA)


def snapshots(of: Network, model: nn.Module, plan: FineTuneStrategy) -> Iterator[nn.Module]:
    """Fine-tune a copy with plain torch.optim; give a copy after every step, before the next one draws."""
    task, attacker = of.task(), copy.deepcopy(model)
    optimizer = build_optimizer(plan, task.train_mode(attacker, plan.scope).values())
    torch.manual_seed(SEED)
    for step, batch in enumerate(of.adapt):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(plan, step)
        attacker.zero_grad()
        task.attacker_loss(attacker, batch).backward()
        optimizer.step()
        yield copy.deepcopy(attacker)


def objective(of: Network, model: nn.Module, plan: FineTuneStrategy) -> float:
    task = of.task()
    losses = [task.suppression_loss(*pair).item() for pair in zip(snapshots(of, model, plan), of.query, strict=True)]
    return sum(gamma * loss for gamma, loss in zip(GAMMA, losses, strict=True))


@pytest.mark.parametrize(
    ("name", "optimizer", "scope"),
    [*CLASSIFIERS, ("classifier", "adam", "head"), *(("channels last", each, "all") for each in SIMULATED), *UNETS],
)
def test_first_order_equals_brute_force(name: str, optimizer: str, scope: str) -> None:
    """The streamed sum is that of gradients taken on full snapshots, and queries leave no trace in the attacker."""
    of, plan = NETWORKS[name], strategy(optimizer, scope)
    model, task = of.model(), of.task()
    expected, losses = {name: torch.zeros_like(part) for name, part in model.named_parameters()}, []
    for gamma, snapshot, batch in zip(GAMMA, snapshots(of, model, plan), of.query, strict=True):
        end = state_of(snapshot)
        snapshot.zero_grad()
        loss = task.suppression_loss(snapshot, batch)
        loss.backward()
        losses.append(loss.item())
        for key, parameter in snapshot.named_parameters():
            expected[key] += gamma * parameter.grad
    attacker = copy.deepcopy(model)
    run = simulated("first_order", of, attacker, plan)
    assert run.query_losses == pytest.approx(losses, rel=1e-9)
    assert len(run.attacker_losses) == STEPS
    assert set(run.gradients) == set(expected)
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-4
    for key, gradient in run.gradients.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-9, atol=1e-13)
    for key, value in attacker.state_dict().items():
        torch.testing.assert_close(value, end[key], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(
    ("name", "optimizer", "scope"),
    [*CLASSIFIERS, pytest.param("conditional U-Net", "adam", "all", marks=slow), *UNETS[1:]],
)
def test_second_order_equals_finite_differences(name: str, optimizer: str, scope: str) -> None:
    """Central differences of attackers run with torch.optim, along random directions."""
    of, plan = NETWORKS[name], strategy(optimizer, scope)
    model = of.model()
    found = simulated("second_order", of, copy.deepcopy(model), plan).gradients
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        direction = {n: torch.randn(p.shape, generator=generator).double() for n, p in model.named_parameters()}
        ends = []
        for sign in (1, -1):
            moved = copy.deepcopy(model)
            with torch.no_grad():
                for key, parameter in moved.named_parameters():
                    parameter.add_(sign * of.step * direction[key])
            ends.append(objective(of, moved, plan))
        slope = (ends[0] - ends[1]) / (2 * of.step)
        exact = sum(float((found[key] * direction[key]).sum()) for key in found)
        assert exact == pytest.approx(slope, rel=5e-5, abs=1e-8)


def test_weight_without_gradient_stays_finite() -> None:
    """A weight that never gets a gradient has a second moment of zero, where the square root has no derivative."""
    of, model = NETWORKS["classifier"], tiny_model()
    with torch.no_grad():
        model.fc.weight[:, 0] = 0.0
        model.bn2.weight[0] = 0.0
        model.bn2.bias[0] = 0.0
    for optimizer in ("adam", "adamw", "adagrad", "rmsprop"):
        plan = replace(strategy(optimizer), weight_decay=0.0)
        run = second_order(copy.deepcopy(model), plan, tiny_task(), iter(of.adapt), iter(of.query), GAMMA)
        assert all(bool(gradient.isfinite().all()) for gradient in run.gradients.values())


@pytest.mark.parametrize("engine", ENGINES)
def test_parameter_beyond_the_loss_is_left_alone(engine: str) -> None:
    """As torch.optim, neither engine decays a weight that no gradient reaches, and its own gradient is zero."""
    of, plan, model = NETWORKS["U-Net"], strategy("adamw"), tiny_unet()
    model.register_parameter("spare", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    attacker = copy.deepcopy(model)
    found = simulated(engine, of, attacker, plan)
    assert torch.equal(found.gradients["spare"], torch.zeros(2, dtype=torch.float64))
    assert torch.equal(attacker.get_parameter("spare"), model.get_parameter("spare"))
    measured = sum(gamma * loss for gamma, loss in zip(GAMMA, found.query_losses, strict=True))
    assert measured == pytest.approx(objective(of, model, plan), rel=1e-9)


def test_functional_unet_is_used_like_the_plain_one() -> None:
    """Inside the inner loop diffusers' attributes, keywords and slices work; outside, nothing has changed."""
    model, slicing = tiny_unet(conditional=True), nn.ModuleList.__getitem__
    images, timesteps, labels = torch.randn(3, 1, 6, 6).double(), torch.tensor([0, 7, 19]), torch.tensor([2, 0, 1])
    expected = model(images, timesteps, class_labels=labels).sample
    with differentiable.innerloop(model, torch.optim.SGD(model.parameters(), lr=0.1)) as (functional, _):
        assert functional.config == model.config
        torch.testing.assert_close(functional(images, timesteps, labels, return_dict=False)[0], expected)
        resnets = functional.mid_block.resnets
        assert [*resnets[:1], resnets[-1]] == list(resnets)
        with pytest.raises(IndexError):
            resnets[2]
    assert nn.ModuleList.__getitem__ is slicing


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize(("steps", "every"), [(1, 1), (5, 2), (6, 3), (4, 9)])
def test_query_weights_sum_to_one_and_include_the_last_step(gamma: str, steps: int, every: int) -> None:
    weights = query_weights(gamma, steps, every)
    assert len(weights) == steps
    assert sum(weights) == pytest.approx(1)
    assert weights[-1] > 0
    assert all(weight == 0 or k % every == 0 or k == steps for k, weight in enumerate(weights, start=1))
