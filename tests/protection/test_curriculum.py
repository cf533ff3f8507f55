"""The choice of the next attacker: the sampler's own draws, or rather those that recover most; nothing else ever."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sophon.attacker import HEADS, SIMULATED, FineTuneStrategy
from sophon.config import Config, MethodConfig
from sophon.errors import UserError
from sophon.held_out import fields_outside
from sophon.protection.curriculum import RECENT, TEMPERATURE, Curriculum
from sophon.ranges import check
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
methods = st.builds(
    method, curriculum_share=st.sampled_from([0.0, 0.3, 1.0]), curriculum_memory=st.sampled_from([0.0, 0.9])
)


# --- what can be drawn --------------------------------------------------------------------------------------------


@given(samplers, lessons, st.integers(0, 2**63 - 1))
def test_uniform_draws_are_those_of_the_sampler(config: SamplerConfig, taught: list[Found], seed: int) -> None:
    curriculum = Curriculum(StrategySampler(config), MethodConfig(name="test"))
    before = curriculum.table()
    for step in taught:
        curriculum.learn_all(step)
    generator, same = seeded(seed), seeded(seed)
    for _ in range(3):
        assert curriculum.draw(generator) == StrategySampler(config).sample(same)
    assert torch.equal(generator.get_state(), same.get_state())
    assert curriculum.table() == before


@given(samplers, methods, lessons, st.integers(0, 2**63 - 1))
def test_every_draw_lies_in_the_support_whatever_was_learnt(
    config: SamplerConfig, chosen: MethodConfig, taught: list[Found], seed: int
) -> None:
    sampler = StrategySampler(config)
    curriculum, generator = Curriculum(sampler, chosen), seeded(seed)
    for step in taught:
        own = [(curriculum.draw(generator), success) for _, success in step]
        curriculum.learn_all([*step, *own])
    support = sampler.support()
    for _ in range(5):
        strategy = curriculum.draw(generator)
        strategy.validate("drawn")
        assert fields_outside(support, strategy) == ()
    for name, arms in json.loads(json.dumps(curriculum.table(), allow_nan=False)).items():
        assert len(arms) > 1, name
        assert math.fsum(arms.values()) == pytest.approx(1, abs=1e-12)
        assert min(arms.values()) > 0


def test_operations_are_arms_like_any_other_value() -> None:
    noise = {"operation": "noise", "scale": 0.1}
    config = small(surgeries=[[], [noise, {"operation": "renormalise"}], [{"operation": "noise"}]])
    plans = StrategySampler(config).choices()["surgery"]
    curriculum, generator = bandit(config), seeded()
    labels = ["none", "noise(scale=0.1) + renormalise", "noise"]
    assert curriculum.table()["surgery"] == pytest.approx(dict.fromkeys(labels, 1 / 3))
    assert {curriculum.draw(generator).surgery for _ in range(40)} == set(plans)
    for _ in range(20):
        curriculum.learn_all([(replace(curriculum.draw(generator), surgery=plan), len(plan)) for plan in plans])
    assert sorted(labels, key=curriculum.table()["surgery"].__getitem__) == ["none", "noise", labels[1]]


# --- before anything is learnt ------------------------------------------------------------------------------------


def test_the_first_table_is_the_samplers() -> None:
    config = small(
        optimizers={"sgd": [0.1, 0.1], "adam": [1e-4, 1e-1], "momentum": None}, scopes=["all", "all", "all", "head"]
    )
    thirds = {"adam low": 1 / 6, "adam middle": 1 / 6, "adam high": 1 / 6}
    assert bandit(config).table() == {
        "optimizer": pytest.approx({**thirds, "sgd": 1 / 2}),
        "scope": pytest.approx({"all": 0.75, "head": 0.25}),
    }


def test_draws_follow_the_table_and_rates_are_log_uniform_in_their_third() -> None:
    curriculum, generator = bandit(small(heads=["kept", "kept", "fresh"], steps=[3, 5])), seeded()
    for _ in range(4):
        curriculum.learn_all([(FineTuneStrategy("adam", lr, head="fresh"), -lr) for lr in (2e-4, 5e-2)])
    table = curriculum.table()
    draws = [curriculum.draw(generator) for _ in range(3000)]
    places = torch.tensor([math.log10(draw.lr) for draw in draws], dtype=torch.float64) + 4  # a decade to each third

    def seen(count: float, p: float) -> bool:
        return abs(count - 3000 * p) < 5 * math.sqrt(3000 * p * (1 - p))

    assert seen(sum(draw.head == "fresh" for draw in draws), table["head"]["fresh"])
    assert all(seen(sum(draw.steps == steps for draw in draws), 1 / 3) for steps in (3, 4, 5))
    counts = places.histc(bins=9, min=0, max=3).view(3, 3)
    for row, part in zip(counts, ("low", "middle", "high"), strict=True):
        assert all(seen(float(count), table["optimizer"][f"adam {part}"] / 3) for count in row)


# --- learning -----------------------------------------------------------------------------------------------------


def reference(taught: Sequence[Found], values: Sequence[str], *, share: float, memory: float) -> list[float]:
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
                scores[place] = memory * scores[place] + (1 - memory) * sum(ranks) / len(ranks)
    odds = [math.exp(score / TEMPERATURE) for score in scores]
    return [share / len(values) + (1 - share) * each / sum(odds) for each in odds]


def class_of(seed: int, steps: int, most: int) -> list[Found]:
    """Make up a few successes a step, some of them equal."""
    generator = seeded(seed)

    def number(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    return [
        [(FineTuneStrategy("adam", 1e-3, head=HEADS[number(3)]), float(number(9))) for _ in range(1 + number(most))]
        for _ in range(steps)
    ]


@pytest.mark.parametrize(("share", "memory"), [(0.3, 0.9), (0.0, 0.5), (1.0, 0.0)])
def test_the_table_is_the_definitions(share: float, memory: float) -> None:
    curriculum = bandit(small(heads=list(HEADS)), curriculum_share=share, curriculum_memory=memory)
    taught = class_of(0, RECENT + 20, 4)
    for count, step in enumerate(taught, start=1):
        curriculum.learn_all(step)
        if count in (1, 2, 10, RECENT, RECENT + 1, RECENT + 20):
            expected = reference(taught[:count], HEADS, share=share, memory=memory)
            assert [curriculum.table()["head"][name] for name in HEADS] == pytest.approx(expected, rel=1e-12)


@given(st.integers(0, 10**6), st.randoms())
def test_the_order_within_a_step_does_not_matter(seed: int, chance: Any) -> None:
    one, other = bandit(small(heads=list(HEADS))), bandit(small(heads=list(HEADS)))
    for step in class_of(seed, 5, 8):
        one.learn_all(step)
        chance.shuffle(step)
        other.learn_all(step)
    assert one.table() == other.table()
    assert one.record() == other.record()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_ignored(bad: float) -> None:
    curriculum, same = bandit(small(heads=list(HEADS))), bandit(small(heads=list(HEADS)))
    for step in class_of(2, 5, 4):
        same.learn_all(step)
        curriculum.learn_all([(FineTuneStrategy("adam", 1e-3, head="kept"), bad), *step])
        curriculum.learn_all([(FineTuneStrategy("adam", 1e-3, head="probed"), bad)])
        curriculum.learn_all([])
    assert curriculum.record() == same.record()


def test_what_was_learnt_survives_json() -> None:
    taught = class_of(3, RECENT + 5, 3)
    curriculum = bandit(small(heads=list(HEADS)))
    for step in taught[:-3]:
        curriculum.learn_all(step)
    record = json.loads(json.dumps(curriculum.record(), allow_nan=False))
    other = bandit(small(heads=list(reversed(HEADS))))
    other.learn_all(taught[0])  # overwritten
    other.restore(record)
    for step in taught[-3:]:
        curriculum.learn_all(step)
        other.learn_all(step)
    assert other.record() == curriculum.record()
    table = bandit(small(heads=list(HEADS)))
    table.restore(json.loads(json.dumps(curriculum.record())))
    assert table.table() == curriculum.table()


# --- adversaries --------------------------------------------------------------------------------------------------


def play(
    curriculum: Curriculum,
    steps: int,
    success: Callable[[FineTuneStrategy], float],
    seed: int = 0,
    noise: float = 0.2,
) -> list[Any]:
    """Let the curriculum choose its own attackers, two a step; return the table after each step."""
    generator, tables = seeded(seed), []
    for _ in range(steps):
        drawn = [curriculum.draw(generator) for _ in range(2)]
        extra = noise * torch.randn(2, generator=generator, dtype=torch.float64)
        curriculum.learn_all([(each, success(each) + more) for each, more in zip(drawn, extra.tolist(), strict=True)])
        tables.append(curriculum.table())
    return tables


@pytest.mark.parametrize("share", [0.3, 0.1])
def test_the_best_arm_takes_all_but_the_uniform_share(share: float) -> None:
    curriculum = bandit(small(heads=list(HEADS)), curriculum_share=share)
    tables = play(curriculum, 500, lambda each: each.head == "fresh", noise=0.0)
    largest = 1 - share + share / 3
    assert all(largest - 0.005 < table["head"]["fresh"] <= largest + 1e-12 for table in tables[400:])
    assert all(min(table["head"].values()) >= share / 3 for table in tables)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_curriculum_follows_a_success_that_moves(seed: int) -> None:
    curriculum = bandit(small(heads=["kept", "fresh"]))
    best = 1 - 0.3 + 0.3 / 2
    assert play(curriculum, 150, lambda each: each.head == "kept", seed)[-1]["head"]["kept"] > 0.95 * best
    # within RECENT steps: the uniform share sees the other head 0.3 times a step, and must about ten times
    after = play(curriculum, RECENT, lambda each: each.head == "fresh", seed + 10)
    assert after[-1]["head"]["fresh"] > 0.95 * best
    assert all(before["head"]["fresh"] > 0.14 for before in after)


# --- configuration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("curriculum", "greedy", "allowed: bandit, uniform"),
        *(("curriculum_share", bad, ">= 0 and <= 1") for bad in (-0.1, 1.1, math.nan)),
        *(("curriculum_memory", bad, ">= 0 and < 1") for bad in (-0.1, 1.0, math.nan)),
    ],
)
def test_a_bad_setting_is_named_on_one_line(key: str, value: Any, allowed: str) -> None:
    with pytest.raises(UserError) as caught:
        check(Config(name="test", pretrain=FineTuneStrategy(), method=method(**{key: value})))
    message = str(caught.value)
    assert message.startswith(f"method.{key}: ")
    assert str(value) in message
    assert allowed in message
    assert "\n" not in message
