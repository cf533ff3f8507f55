"""Both engines of the inner loop against independent references, in float64, on a network with BatchNorm."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from sophon.attacker import SIMULATED, FineTuneStrategy, learning_rate
from sophon.optimizers import build_optimizer
from sophon.protection.fts import ENGINES
from sophon.protection.inner_loop import GAMMAS, query_weights
from sophon.protection.meta_gradient.first_order import first_order
from sophon.protection.meta_gradient.second_order import second_order
from tests.tiny import tiny_batches, tiny_model, tiny_task

STEPS = 4
RATES = {"adadelta": 1.0, "sgd": 0.1, "momentum": 0.05, "nesterov": 0.05, "adagrad": 0.02, "rmsprop": 0.005}
ADAPT = tiny_batches(1, STEPS)
QUERY = tiny_batches(2, STEPS)
GAMMA = query_weights("linear", STEPS, 1)


def strategy(optimizer: str, **changes: object) -> FineTuneStrategy:
    base = FineTuneStrategy(optimizer=optimizer, lr=RATES.get(optimizer, 0.01), steps=STEPS, schedule="cosine")
    return replace(base, weight_decay=0.01, **changes)  # type: ignore[arg-type]


def run_attacker(model: nn.Module, plan: FineTuneStrategy, losses: str = "klu") -> list[nn.Module]:
    """Fine-tune a copy with plain torch.optim; return a snapshot after every step."""
    task = tiny_task(losses)
    attacker = copy.deepcopy(model)
    parameters = task.train_mode(attacker, plan.scope)
    optimizer = build_optimizer(plan, parameters.values())
    snapshots = []
    for step, batch in enumerate(ADAPT):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(plan, step)
        optimizer.zero_grad()
        task.attacker_loss(attacker, batch).backward()
        optimizer.step()
        snapshots.append(copy.deepcopy(attacker))
    return snapshots


def objective(model: nn.Module, plan: FineTuneStrategy) -> float:
    task = tiny_task()
    queries = (task.suppression_loss(at, batch) for at, batch in zip(run_attacker(model, plan), QUERY, strict=True))
    return sum(gamma * loss.item() for gamma, loss in zip(GAMMA, queries, strict=True))


@pytest.mark.parametrize("scope", ["all", "head"])
@pytest.mark.parametrize("optimizer", SIMULATED)
def test_first_order_equals_brute_force(optimizer: str, scope: str) -> None:
    """The streamed sum equals the sum of gradients taken on full snapshots of the trajectory."""
    model, plan, task = tiny_model(), strategy(optimizer, scope=scope), tiny_task("ice")
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for gamma, snapshot, batch in zip(GAMMA, run_attacker(model, plan), QUERY, strict=True):
        snapshot.zero_grad()
        task.suppression_loss(snapshot, batch).backward()
        for name, parameter in snapshot.named_parameters():
            expected[name] += gamma * parameter.grad
    found = first_order(copy.deepcopy(model), plan, task, iter(ADAPT), iter(QUERY), GAMMA)
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-4
    for name, gradient in found.gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("optimizer", SIMULATED)
def test_second_order_equals_finite_differences(optimizer: str) -> None:
    """Central differences of attackers run with torch.optim, along random directions."""
    model, plan = tiny_model(), strategy(optimizer)
    found = second_order(copy.deepcopy(model), plan, tiny_task(), iter(ADAPT), iter(QUERY), GAMMA).gradients
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        direction = {n: torch.randn(p.shape, generator=generator).double() for n, p in model.named_parameters()}
        epsilon = 1e-6
        ends = []
        for sign in (1, -1):
            moved = copy.deepcopy(model)
            with torch.no_grad():
                for name, parameter in moved.named_parameters():
                    parameter.add_(sign * epsilon * direction[name])
            ends.append(objective(moved, plan))
        slope = (ends[0] - ends[1]) / (2 * epsilon)
        exact = sum(float((found[name] * direction[name]).sum()) for name in found)
        assert exact == pytest.approx(slope, rel=2e-5, abs=1e-8)


@pytest.mark.parametrize("optimizer", SIMULATED)
def test_second_order_equals_functional_call(optimizer: str) -> None:
    """The optimizers written out from their definitions and differentiated by autograd, without higher."""
    model, plan, task = tiny_model(), strategy(optimizer), tiny_task("ice")
    start = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    parameters: dict[str, Tensor] = dict(start)
    state: dict[str, dict[str, Tensor]] = {name: {} for name in start}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    total = torch.zeros((), dtype=torch.float64)
    model.train()
    for step in range(STEPS):
        logits = functional_call(model, {**parameters, **buffers}, (task.prepare(ADAPT[step].images),))
        loss = nn.functional.cross_entropy(logits, ADAPT[step].labels)
        gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        for (name, value), gradient in zip(list(parameters.items()), gradients, strict=True):
            lr = learning_rate(plan, step)
            parameters[name] = written_out(optimizer, value, gradient, state[name], lr, plan.weight_decay, step + 1)
        logits = functional_call(model, {**parameters, **buffers}, (task.prepare(QUERY[step].images),))
        chosen = logits.softmax(1).gather(1, QUERY[step].labels[:, None])
        total = total + GAMMA[step] * -(1 - chosen).log().mean()
    expected = dict(zip(start, torch.autograd.grad(total, list(start.values())), strict=True))
    found = second_order(copy.deepcopy(model), plan, task, iter(ADAPT), iter(QUERY), GAMMA).gradients
    for name, gradient in found.items():
        # g / sqrt(g^2) of a first step cancels in both, each with its own rounding
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-8)


def written_out(
    name: str, p: Tensor, g: Tensor, state: dict[str, Tensor], lr: float, decay: float, step: int
) -> Tensor:
    """One step of an optimizer as torch's documentation defines it."""
    zero = torch.zeros_like(p)
    if name == "adamw":
        p = p - lr * decay * p
    else:
        g = g + decay * p
    if name == "sgd":
        return p - lr * g
    if name in ("momentum", "nesterov"):
        state["b"] = g if step == 1 else 0.9 * state["b"] + g
        return p - lr * (g + 0.9 * state["b"] if name == "nesterov" else state["b"])
    if name in ("adam", "adamw"):
        state["m"] = 0.9 * state.get("m", zero) + 0.1 * g
        state["v"] = 0.999 * state.get("v", zero) + 0.001 * g**2
        root = (state["v"] / (1 - 0.999**step)).sqrt()
        return p - lr * state["m"] / (1 - 0.9**step) / (root + 1e-8)
    if name == "adagrad":
        state["s"] = state.get("s", zero) + g**2
        return p - lr * g / (state["s"].sqrt() + 1e-10)
    if name == "rmsprop":
        state["s"] = 0.99 * state.get("s", zero) + 0.01 * g**2
        return p - lr * g / (state["s"].sqrt() + 1e-8)
    assert name == "adadelta"
    state["s"] = 0.9 * state.get("s", zero) + 0.1 * g**2
    change = (state.get("u", zero) + 1e-6).sqrt() / (state["s"] + 1e-6).sqrt() * g
    state["u"] = 0.9 * state.get("u", zero) + 0.1 * change**2
    return p - lr * change


@pytest.mark.parametrize("engine", ENGINES)
def test_attacker_ends_where_torch_optim_does(engine: str) -> None:
    """Queries leave no trace: weights follow torch.optim, and so do first-order BatchNorm statistics."""
    model, plan = tiny_model(), strategy("adam")
    attacker = copy.deepcopy(model)
    run = ENGINES[engine](attacker, plan, tiny_task(), iter(ADAPT), iter(QUERY), GAMMA)
    plain = run_attacker(model, plan)
    task = tiny_task()
    expected = [task.suppression_loss(at, batch).item() for at, batch in zip(plain, QUERY, strict=True)]
    assert run.query_losses == pytest.approx(expected, rel=1e-9)
    assert len(run.attacker_losses) == STEPS
    if engine == "first_order":
        for name, value in attacker.state_dict().items():
            torch.testing.assert_close(value, run_attacker(model, plan)[-1].state_dict()[name])


def test_weight_without_gradient_stays_finite() -> None:
    """A weight that never gets a gradient has a second moment of zero, where the square root has no derivative."""
    model = tiny_model()
    with torch.no_grad():
        model.fc.weight[:, 0] = 0.0
        model.bn2.weight[0] = 0.0
        model.bn2.bias[0] = 0.0
    for optimizer in ("adam", "adamw", "adagrad", "rmsprop"):
        plan = replace(strategy(optimizer), weight_decay=0.0)
        run = second_order(copy.deepcopy(model), plan, tiny_task(), iter(ADAPT), iter(QUERY), GAMMA)
        assert all(bool(gradient.isfinite().all()) for gradient in run.gradients.values())


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize(("steps", "every"), [(1, 1), (5, 2), (6, 3), (4, 9)])
def test_query_weights_sum_to_one_and_include_the_last_step(gamma: str, steps: int, every: int) -> None:
    weights = query_weights(gamma, steps, every)
    assert len(weights) == steps
    assert sum(weights) == pytest.approx(1)
    assert weights[-1] > 0
    assert all(weight == 0 or k % every == 0 or k == steps for k, weight in enumerate(weights, start=1))
