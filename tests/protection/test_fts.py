"""FTS steps against Adam by hand, and what they must leave alone: statistics, foreign heads, diverging attackers."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sophon.attacker import FineTuneStrategy
from sophon.config import MethodConfig
from sophon.domains import LoadedDomain
from sophon.protection.fts import ENGINES, FTS
from sophon.protection.inner_loop import Simulation
from sophon.sampler import SamplerConfig
from sophon.tasks import ClassificationTask, Task
from tests.protection.staged import context
from tests.tiny import assert_same_state, state_of, tiny_bands, tiny_model, tiny_spec

RESTRICTED = tiny_bands("restricted", ("adapt", "query"), seed=10, across=True)
METHOD = MethodConfig(name="test", fts_lr=1e-2, query_batch_size=9, probe_steps=3, gamma="linear", query_every=2)
HEAD = {"fc.weight", "fc.bias"}


SAMPLER = SamplerConfig({"momentum": [0.05, 0.05]}, batch_sizes=[8], steps=[3, 3], heads=["kept"])


def make_fts(
    model: nn.Module,
    method: MethodConfig = METHOD,
    seed: int = 0,
    task: Task | None = None,
    domains: Sequence[LoadedDomain] = (RESTRICTED,),
    **changes: Any,
) -> FTS:
    sampler = replace(SAMPLER, **changes)
    return FTS(context(model, task, method, sampler=sampler, restricted=domains, seed=seed))


def adam_by_hand(
    parameters: dict[str, Tensor], gradients: Sequence[dict[str, Tensor]], lr: float = METHOD.fts_lr
) -> dict[str, Tensor]:
    """Take one step of Adam for each dictionary of gradients."""
    moved = {name: value.clone() for name, value in parameters.items()}
    first = {name: torch.zeros_like(value) for name, value in moved.items()}
    second = copy.deepcopy(first)
    for step, found in enumerate(gradients, start=1):
        for name, gradient in found.items():
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            root = (second[name] / (1 - 0.999**step)).sqrt() + 1e-8
            moved[name] -= lr * first[name] / (1 - 0.9**step) / root
    return moved


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def assert_close(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.detach(), expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("attackers", [1, 3])
def test_steps_equal_adam_on_the_mean_gradient(
    engine: str, attackers: int, simulated: list[tuple[FineTuneStrategy, Simulation]]
) -> None:
    model = tiny_model()
    start = parameters_of(model)
    fts = make_fts(model, replace(METHOD, engine=engine, attackers=attackers))
    steps = [fts.step(0, index) for index in range(3)]
    assert len(simulated) == 3 * attackers
    means = []
    for index, step in enumerate(steps):
        runs = [run for _, run in simulated[index * attackers : (index + 1) * attackers]]
        means.append({name: sum(run.gradients[name] for run in runs) / attackers for name in start})
        queries = [loss for run in runs for loss in run.query_losses]
        assert len(queries) == 2 * attackers  # after steps 2 and 3 of three
        assert step.query_loss == pytest.approx(sum(queries) / len(queries))
        assert step.attacker_loss == pytest.approx(sum(run.attacker_losses[-1] for run in runs) / attackers)
        assert step.gradient_norm == pytest.approx(math.sqrt(sum(float((g**2).sum()) for g in means[-1].values())))
        assert step.diverged == 0
    assert_close(model, adam_by_hand(start, means))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("heads", [["kept"], ["kept", "fresh", "probed"]])
def test_released_statistics_and_modes_stay(engine: str, heads: list[str]) -> None:
    model = tiny_model().eval()
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    assert any(name.endswith("num_batches_tracked") for name in buffers)
    fts = make_fts(model, replace(METHOD, engine=engine), heads=heads)
    for index in range(4):
        fts.step(index)
    for name, value in model.named_buffers():
        assert torch.equal(value, buffers[name]), name
    assert not any(part.training for part in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def anchor_of(model: nn.Module, seed: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in model.named_parameters()}


@pytest.mark.parametrize("heads", [["kept"], ["fresh"]])
@pytest.mark.parametrize("attackers", [1, 3])
def test_anchor_is_added_with_its_weight(
    attackers: int, heads: list[str], simulated: list[tuple[FineTuneStrategy, Simulation]]
) -> None:
    """To the mean over the attackers, once; the released head follows it also where no attacker keeps that head."""
    model = tiny_model()
    start, anchors = parameters_of(model), [anchor_of(model, seed) for seed in (5, 6)]
    before = copy.deepcopy(anchors)
    fts = make_fts(model, replace(METHOD, attackers=attackers, fts_original_weight=0.7), heads=heads)
    steps = [fts.step(index, anchor=anchor) for index, anchor in enumerate(anchors)]
    sums = []
    for index, step in enumerate(steps):
        runs = [run for _, run in simulated[index * attackers : (index + 1) * attackers]]
        learned = {
            name: sum(run.gradients[name] for run in runs) / attackers if heads == ["kept"] or name not in HEAD else 0
            for name in start
        }
        sums.append({name: learned[name] + 0.7 * anchors[index][name] for name in start})
        assert step.gradient_norm == pytest.approx(math.sqrt(sum(float((g**2).sum()) for g in sums[-1].values())))
    assert_close(model, adam_by_hand(start, sums))
    for given, copied in zip(anchors, before, strict=True):
        assert all(torch.equal(given[name], value) for name, value in copied.items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("heads", "moves"), [(["kept"], True), (["fresh"], False), (["probed", "fresh"], False)])
def test_only_a_kept_heads_gradient_is_applied(engine: str, heads: list[str], moves: bool) -> None:
    model = tiny_model()
    before = parameters_of(model)
    fts = make_fts(model, replace(METHOD, engine=engine, attackers=2), heads=heads)
    for index in range(3):
        fts.step(index)
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) == (name in HEAD and not moves), name


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_all_diverged_leaves_the_weights(weight: float) -> None:
    model = tiny_model().float()
    before = state_of(model)
    task = ClassificationTask(tiny_spec(), suppression_loss="klu")
    fts = make_fts(
        model, replace(METHOD, attackers=3, fts_original_weight=weight), task=task,
        optimizers={"nesterov": [1e38, 1e38]}, steps=[8, 8],
    )  # fmt: skip
    step = fts.step(0, anchor=anchor_of(model) if weight else None)
    assert step.diverged == 3
    assert all(math.isnan(value) for value in (step.query_loss, step.attacker_loss, step.gradient_norm))
    assert_same_state(model, before)
    assert not fts.optimizer.state


def test_the_diverged_are_left_out(simulated: list[tuple[FineTuneStrategy, Simulation]]) -> None:
    model = tiny_model().float()
    start = parameters_of(model)
    mixed = {"nesterov": [1e38, 1e38], "momentum": [0.05, 0.05]}
    task = ClassificationTask(tiny_spec(), suppression_loss="klu")
    fts = make_fts(model, replace(METHOD, attackers=6), task=task, optimizers=mixed, steps=[8, 8])
    step = fts.step(0)
    tame = [run for strategy, run in simulated if strategy.lr < 1]
    assert 0 < len(tame) < 6
    assert step.diverged == 6 - len(tame)
    assert step.attacker_loss == pytest.approx(sum(run.attacker_losses[-1] for run in tame) / len(tame))
    mean = {name: sum(run.gradients[name] for run in tame) / len(tame) for name in start}
    for name, value in adam_by_hand(start, [mean]).items():
        torch.testing.assert_close(model.get_parameter(name).detach(), value, rtol=1e-4, atol=1e-6)
    assert math.isfinite(fts.step(1).query_loss)


def test_clipping_is_of_the_sum() -> None:
    model = tiny_model()
    anchor = {name: 1e3 * value for name, value in anchor_of(model).items()}
    fts = make_fts(model, replace(METHOD, fts_max_norm=1e-3, fts_original_weight=1.0))
    step = fts.step(0, anchor=anchor)
    length = math.sqrt(sum(float((value**2).sum()) for value in anchor.values()))
    assert step.gradient_norm == pytest.approx(length, rel=1e-2)
    moments = [state["exp_avg"] / 0.1 for state in fts.optimizer.state.values()]
    assert math.sqrt(sum(float((moment**2).sum()) for moment in moments)) == pytest.approx(1e-3, rel=1e-3)
    for moment, value in zip(moments, anchor.values(), strict=True):
        torch.testing.assert_close(moment * length / 1e-3, value, rtol=0.05, atol=20)
