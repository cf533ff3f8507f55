"""The exact engine against one graph of all the steps, kept by plain `higher`, in float64.

What is compared starts from the same seed and draws in the same order: the attacker's step, then the query.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sophon.attacker import SIMULATED, FineTuneStrategy, learning_rate
from sophon.optimizers import build_optimizer
from sophon.protection.inner_loop import Simulation, frozen_statistics, query_weights
from sophon.protection.meta_gradient.differentiable import innerloop
from sophon.protection.meta_gradient.first_order import first_order
from sophon.protection.meta_gradient.second_order import second_order
from sophon.tasks import Task
from tests.tiny import TinyNet, assert_same_state, state_of, tiny_batches, tiny_model, tiny_task

STEPS = 5
SEED = 11
RATES = {"adadelta": 1.0, "sgd": 0.1, "momentum": 0.05, "nesterov": 0.05, "adagrad": 0.02, "rmsprop": 0.005}
ADAPT = tiny_batches(1, 16, 6)
QUERY = tiny_batches(2, 16, 6)
GAMMA = query_weights("linear", STEPS, 1)


class Remembering(TinyNet):
    """Draws a dropout mask, and scales its answer by a number of passes that it counts itself."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.3)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.passes.add_(1)
        features = self.dropout(torch.tanh(self.bn1(self.conv1(images))))
        features = torch.tanh(self.bn2(self.conv2(features)))
        return self.fc(features.mean((2, 3))) * (1 + 0.1 * self.passes)


def remembering() -> nn.Module:
    torch.manual_seed(0)
    return Remembering().double()


def strategy(optimizer: str, scope: str = "all", **changes: Any) -> FineTuneStrategy:
    base = FineTuneStrategy(optimizer, RATES.get(optimizer, 0.01), 0.01, "cosine", steps=STEPS, scope=scope)
    return replace(base, **changes)


def simulated(
    engine: Callable[..., Any],
    model: nn.Module,
    plan: FineTuneStrategy,
    task: Task | None = None,
    gammas: Sequence[float] = GAMMA,
    **options: Any,
) -> Any:
    torch.manual_seed(SEED)
    return engine(copy.deepcopy(model), plan, task or tiny_task(), iter(ADAPT), iter(QUERY), gammas, **options)


def one_graph(
    attacker: nn.Module,
    plan: FineTuneStrategy,
    task: Task,
    adapt: Any,
    query: Any,
    gammas: Sequence[float],
) -> dict[str, Tensor]:
    """Keep the graph of all steps, and differentiate it once."""
    trainable = task.train_mode(attacker, plan.scope)
    attacker.requires_grad_(True)
    optimizer = build_optimizer(plan, trainable.values())
    total = torch.zeros((), dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH), innerloop(attacker, optimizer) as (model, steps):
        for step, gamma in enumerate(gammas):
            loss = task.attacker_loss(model, next(adapt))
            steps.step(loss, override={"lr": [learning_rate(plan, step)]})
            if gamma:
                with frozen_statistics(model):
                    total = total + gamma * task.suppression_loss(model, next(query))
    parameters = dict(attacker.named_parameters())
    found = torch.autograd.grad(total, list(parameters.values()), materialize_grads=True)
    return dict(zip(parameters, found, strict=True))


def assert_same_gradients(run: Simulation, expected: dict[str, Tensor]) -> None:
    assert set(run.gradients) == set(expected)
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-4
    for name, gradient in run.gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-10)


# ---- exact ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=20)
@given(
    segment=st.integers(1, 7),
    gammas=st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=6).filter(any),
    optimizer=st.sampled_from(SIMULATED),
    scope=st.sampled_from(["all", "head"]),
)
def test_every_segment_gives_the_gradient_of_one_graph(
    segment: int, gammas: list[float], optimizer: str, scope: str
) -> None:
    """Whatever steps are queried: with no query after it, a step is taken, but there is nothing to differentiate."""
    model, plan = tiny_model(), strategy(optimizer, scope, steps=len(gammas))
    run = simulated(second_order, model, plan, gammas=gammas, segment=segment)
    assert_same_gradients(run, simulated(one_graph, model, plan, gammas=gammas))
    assert (len(run.attacker_losses), len(run.query_losses)) == (len(gammas), sum(map(bool, gammas)))


@pytest.mark.parametrize("segment", [1, 2])
def test_a_step_taken_again_draws_and_remembers_the_same(segment: int) -> None:
    """Dropout masks are the same, buffers as they were then; the global generator ends as if each step were one."""
    model, plan = remembering(), strategy("adam")
    expected = simulated(one_graph, model, plan)
    drawn = torch.rand(3)
    assert_same_gradients(simulated(second_order, model, plan, segment=segment), expected)
    assert torch.equal(torch.rand(3), drawn)


def test_the_attacker_is_left_as_it_was() -> None:
    model = tiny_model()
    before = state_of(model)
    second_order(model, strategy("adam"), tiny_task(), iter(ADAPT), iter(QUERY), GAMMA, segment=2)
    assert_same_state(model, before)
    assert all(parameter.grad is None for parameter in model.parameters())


# ---- memory ---------------------------------------------------------------------------------------------------------


class Held:
    """Bytes that graphs hold for their backward passes, and the most that they have held at once."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> Any:
        held, size = self, tensor.numel() * tensor.element_size()

        class Saved:
            def __init__(self) -> None:
                self.tensor = tensor.detach()
                held.now += size
                held.most = max(held.most, held.now)

            def __del__(self) -> None:
                held.now -= size

        return Saved()


def most_held(steps: int, optimizer: str, engine: Callable[..., Any] = second_order, **options: Any) -> int:
    held, model = Held(), tiny_model()
    plan, gammas = strategy(optimizer, steps=steps), query_weights("uniform", steps, 1)
    with torch.autograd.graph.saved_tensors_hooks(held.pack, lambda saved: saved.tensor):
        simulated(engine, model, plan, gammas=gammas, **options)
    return held.most


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_what_graphs_hold_grows_with_the_segment_and_not_with_the_steps(optimizer: str) -> None:
    few, many = most_held(3, optimizer), most_held(12, optimizer)
    assert 0 < many < 1.02 * few
    assert most_held(12, optimizer, segment=3) < 4 * many
    assert most_held(12, optimizer, segment=12) > 6 * many
    assert 0 < most_held(12, optimizer, first_order) < 1.02 * most_held(3, optimizer, first_order)
