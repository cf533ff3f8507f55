"""Attackers of an FTS step: their probes, surgery, domains, and what the curriculum hears of them."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from sophon.attacker import FineTuneStrategy
from sophon.domains import LoadedDomain, MemoryImages
from sophon.errors import UserError
from sophon.protection.inner_loop import Simulation
from sophon.sampler import StrategySampler
from tests.protection.test_fts import HEAD, METHOD, RESTRICTED, SAMPLER, make_fts, parameters_of
from tests.tiny import state_of, tiny_model


@pytest.mark.parametrize("index", range(3))
def test_probed_once_a_step(
    index: int, simulated: list[tuple[FineTuneStrategy, Simulation]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before all attackers, if any of them starts from the probed head; they then all start from the same."""
    model = tiny_model()
    fts = make_fts(model, replace(METHOD, attackers=3), heads=["kept", "fresh", "probed"], steps=[1, 1])
    before, starts = copy.deepcopy(fts.attackers.probed[0]), []
    begin = fts.attackers.begin

    def watched(strategy: FineTuneStrategy, *rest: Any) -> Any:
        started, factors = begin(strategy, *rest)
        starts.append((strategy, state_of(started)))
        return started, factors

    monkeypatch.setattr(fts.attackers, "begin", watched)
    fts.step(index)
    plans = [plan for plan, _ in simulated]
    probes = [plan for plan in plans if plan.scope == "head"]
    assert probes == plans[: len(probes)]
    assert len(plans) - len(probes) == 3
    assert len(probes) == any(plan.head == "probed" for plan in plans[len(probes) :])
    for plan, state in starts[len(probes) :]:
        if plan.head == "probed":
            assert all(torch.equal(state[name], value) for name, value in fts.attackers.probed[0].items())
    moved = any(not torch.equal(fts.attackers.probed[0][name], before[name]) for name in HEAD)
    assert moved == bool(probes)


def test_gradients_come_back_through_surgery(simulated: list[tuple[FineTuneStrategy, Simulation]]) -> None:
    """What is replaced learns nothing from the attacker, what is scaled its share."""
    model = tiny_model()
    start = parameters_of(model)
    surgeries = [[{"operation": "reset_affine"}, {"operation": "prune", "fraction": 0.5}]]
    make_fts(model, heads=["fresh"], surgeries=surgeries).step(0)
    ((_, run),) = simulated
    attackers = make_fts(tiny_model(), heads=["fresh"], surgeries=surgeries).attackers
    torch.manual_seed(0)
    plan = StrategySampler(replace(SAMPLER, heads=["fresh"], surgeries=surgeries)).sample(torch.Generator())
    _, factors = attackers.begin(plan, 0, torch.Generator())
    assert {name for name, factor in factors.items() if isinstance(factor, float) and factor == 0} == {
        "bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias", *HEAD
    }  # fmt: skip
    # Adam's first step moves every weight that has a gradient
    for name, value in model.named_parameters():
        kept = torch.as_tensor(factors.get(name, 1.0)).bool().expand_as(value)
        assert torch.equal(value.detach() != start[name], kept), name
        assert run.gradients[name].any()
    assert factors["conv1.weight"].mean() == 0.5


@pytest.mark.parametrize("pool", [0, 3])
def test_attackers_of_several_domains(pool: int) -> None:
    """Each fine-tunes on the images of its own domain, from a head of its own domain."""
    other = LoadedDomain("other", ("v", "w"), {
        split: MemoryImages(255 - part.images, torch.arange(len(part)) % 2, ("v", "w"))
        for split, part in RESTRICTED.splits.items()
    }, {})  # fmt: skip
    method = replace(METHOD, pool=pool, chunk=2)
    fts = make_fts(tiny_model(), method, domains=[RESTRICTED, other], heads=["fresh", "probed"])
    begun, seen = fts.attackers.begin, []

    def watched(strategy: FineTuneStrategy, domain: int, generator: torch.Generator) -> Any:
        attacker, factors = begun(strategy, domain, generator)
        seen.append((domain, attacker.fc.weight.shape[0]))
        return attacker, factors

    fts.attackers.begin = watched  # type: ignore[method-assign]
    for index in range(16):
        assert math.isfinite(fts.step(index).query_loss)
    assert set(seen) == {(0, 3), (1, 2)}
    assert [head["fc.weight"].shape[0] for head in fts.attackers.probed] == [3, 2]
    members = fts.pool.members.values()
    assert all(member.displacement["fc.weight"].shape[0] == (3, 2)[member.domain] for member in members)
    with pytest.raises(UserError, match="the model has 3 and the restricted domain 2"):
        make_fts(tiny_model(), domains=[RESTRICTED, other])


def test_the_curriculum_hears_of_every_attacker() -> None:
    """An optimizer that does nothing never recovers: it is drawn less."""
    optimizers = {"momentum": [0.1, 0.1], "sgd": [1e-9, 1e-9]}
    method = replace(METHOD, attackers=3, curriculum="bandit", fts_lr=1e-9)
    fts = make_fts(tiny_model(), method, optimizers=optimizers, steps=[12, 12])
    for index in range(8):
        fts.step(index)
    _, lazy = fts.curriculum.probabilities("optimizer")
    assert lazy < 0.35
