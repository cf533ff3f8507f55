"""The choice of the next attacker: the sampler's own draws, or rather those that recover most; nothing else ever."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sophon.attacker import HEADS, SIMULATED, FineTuneStrategy
from sophon.config import MethodConfig
from sophon.held_out import fields_outside
from sophon.protection.curriculum import MEMORY, RECENT, SHARE, TEMPERATURE, Curriculum
from sophon.sampler import SamplerConfig, StrategySampler

Found = list[tuple[FineTuneStrategy, float]]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def method(**changes: Any) -> MethodConfig:
    return MethodConfig(**{"name": "test", "curriculum": "bandit", **changes})


def small(**changes: Any) -> SamplerConfig:
    return replace(SamplerConfig(optimizers={"adam": [1e-4, 1e-1]}, heads=["kept"]), **changes)


def bandit(sampler: SamplerConfig | None = None, **changes: Any) -> Curriculum:
    return Curriculum(StrategySampler(sampler or small()), method(**changes))


rates = st.tuples(st.floats(1e-8, 10), st.sampled_from([1.0, 1.5, 1e4])).map(lambda pair: [pair[0], pair[0] * pair[1]])
samplers = st.builds(
    SamplerConfig,
    optimizers=st.dictionaries(st.sampled_from(sorted(SIMULATED)), rates, min_size=1, max_size=4),
    batch_sizes=st.lists(st.integers(1, 64), min_size=1, max_size=3),
    steps=st.tuples(st.integers(1, 50), st.integers(0, 50)).map(lambda pair: [pair[0], sum(pair)]),
    heads=st.lists(st.sampled_from(HEADS), min_size=1, max_size=4),
    scopes=st.lists(st.sampled_from(["all", "head", "last_blocks"]), min_size=1, max_size=4),
    weight_decays=st.lists(st.floats(0, 0.1), min_size=1, max_size=3),
    surgeries=st.lists(st.sampled_from([[], [{"operation": "noise", "scale": 0.1}]]), min_size=1, max_size=3),
)
everyone = StrategySampler(SamplerConfig(optimizers={name: [1e-9, 1e6] for name in SIMULATED}, scopes=["all", "head"]))
# attackers of any kind, mostly not the sampler's, with any success at all
lessons = st.lists(
    st.lists(st.tuples(st.integers(0, 10**6).map(lambda seed: everyone.sample(seeded(seed))), st.floats()), max_size=4),
    max_size=6,
)


# --- what can be drawn --------------------------------------------------------------------------------------------


@given(samplers, lessons, st.integers(0, 2**63 - 1))
def test_uniform_draws_are_those_of_the_sampler(config: SamplerConfig, taught: list[Found], seed: int) -> None:
    curriculum = Curriculum(StrategySampler(config), MethodConfig(name="test"))
    before = curriculum.record()
    for step in taught:
        curriculum.learn_all(step)
    generator, same = seeded(seed), seeded(seed)
    for _ in range(3):
        assert curriculum.draw(generator) == StrategySampler(config).sample(same)
    assert torch.equal(generator.get_state(), same.get_state())
    assert curriculum.record() == before


@given(samplers, lessons, st.integers(0, 2**63 - 1))
def test_every_draw_lies_in_the_support_whatever_was_learnt(
    config: SamplerConfig, taught: list[Found], seed: int
) -> None:
    sampler = StrategySampler(config)
    curriculum, generator = Curriculum(sampler, method()), seeded(seed)
    for step in taught:
        own = [(curriculum.draw(generator), success) for _, success in step]
        curriculum.learn_all([*step, *own])
    support = sampler.support()
    for _ in range(5):
        strategy = curriculum.draw(generator)
        strategy.validate("drawn")
        assert fields_outside(support, strategy) == ()
    for name in json.loads(json.dumps(curriculum.record(), allow_nan=False))["scores"]:
        assert math.fsum(curriculum.probabilities(name)) == pytest.approx(1, abs=1e-12)
        assert min(curriculum.probabilities(name)) > 0


# --- learning -----------------------------------------------------------------------------------------------------


def reference(taught: Sequence[Found], values: Sequence[str]) -> list[float]:
    """Follow the definition for the heads ``values``, equally likely, with every pair compared."""
    scores = [0.0] * len(values)
    for at, step in enumerate(taught):
        recent = [success for earlier in taught[max(0, at - RECENT + 1) : at + 1] for _, success in earlier]
        for place, value in enumerate(values):
            ranks = [
                sum((other < success) - (other > success) for other in recent) / len(recent)
                for strategy, success in step
                if strategy.head == value
            ]
            if ranks:
                scores[place] = MEMORY * scores[place] + (1 - MEMORY) * sum(ranks) / len(ranks)
    odds = [math.exp(score / TEMPERATURE) for score in scores]
    return [SHARE / len(values) + (1 - SHARE) * each / sum(odds) for each in odds]


def class_of(seed: int, steps: int, most: int) -> list[Found]:
    """Make up a few successes a step, some of them equal."""
    generator = seeded(seed)

    def number(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    return [
        [(FineTuneStrategy("adam", 1e-3, head=HEADS[number(3)]), float(number(9))) for _ in range(1 + number(most))]
        for _ in range(steps)
    ]


def test_probabilities_are_the_definitions() -> None:
    curriculum = bandit(small(heads=list(HEADS)))
    taught = class_of(0, RECENT + 20, 4)
    for count, step in enumerate(taught, start=1):
        curriculum.learn_all(step)
        if count in (1, 2, 10, RECENT, RECENT + 1, RECENT + 20):
            assert curriculum.probabilities("head") == pytest.approx(reference(taught[:count], HEADS), rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_ignored(bad: float) -> None:
    curriculum, same = bandit(small(heads=list(HEADS))), bandit(small(heads=list(HEADS)))
    for step in class_of(2, 5, 4):
        same.learn_all(step)
        curriculum.learn_all([(FineTuneStrategy("adam", 1e-3, head="kept"), bad), *step])
        curriculum.learn_all([(FineTuneStrategy("adam", 1e-3, head="probed"), bad)])
        curriculum.learn_all([])
    assert curriculum.record() == same.record()


# --- configuration ------------------------------------------------------------------------------------------------
