"""The distribution that protection samples attackers from."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sophon.attacker import HEADS, SCHEDULES, SCOPES, SIMULATED, Operation
from sophon.domains import AUGMENTATIONS
from sophon.errors import UserError
from sophon.held_out import fields_outside
from sophon.sampler import SamplerConfig, StrategySampler


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some(values: Any) -> st.SearchStrategy[list[Any]]:
    return st.lists(st.sampled_from(sorted(values)), min_size=1, max_size=4)


rates = st.tuples(st.floats(1e-8, 10), st.floats(1, 1e4)).map(lambda pair: [pair[0], pair[0] * pair[1]])
configs = st.builds(
    SamplerConfig,
    optimizers=st.dictionaries(st.sampled_from(sorted(SIMULATED)), rates, min_size=1),
    batch_sizes=st.lists(st.integers(1, 512), min_size=1, max_size=4),
    steps=st.tuples(st.integers(1, 50), st.integers(0, 50)).map(lambda pair: [pair[0], sum(pair)]),
    heads=some(HEADS),
    scopes=some([scope for scope in SCOPES if scope != "lora"]),
    weight_decays=st.lists(st.floats(0, 0.1), min_size=1, max_size=3),
    schedules=some(SCHEDULES),
    augmentations=some(AUGMENTATIONS),
    batch_norms=some(["trained", "frozen"]),
    surgeries=st.lists(
        st.lists(st.sampled_from([{"operation": "renormalise"}, {"operation": "noise", "scale": 0.5}]), max_size=2),
        min_size=1,
        max_size=3,
    ),
)


def small(**changes: Any) -> SamplerConfig:
    return replace(SamplerConfig(optimizers={"adam": [1e-4, 1e-2]}), **changes)


@given(configs, st.integers(0, 2**63 - 1))
def test_draws_lie_in_the_support(config: SamplerConfig, seed: int) -> None:
    sampler = StrategySampler(config)
    support = json.loads(json.dumps(sampler.support(), allow_nan=False))
    assert support == sampler.support()
    generator = seeded(seed)
    for _ in range(3):
        strategy = sampler.sample(generator)
        strategy.validate("drawn")
        assert fields_outside(support, strategy) == ()
        low, high = config.optimizers[strategy.optimizer]
        assert low * (1 - 1e-9) <= strategy.lr <= high * (1 + 1e-9)
        assert config.steps[0] <= strategy.steps <= config.steps[1]


def test_rates_are_log_uniform() -> None:
    sampler, generator = StrategySampler(small(optimizers={"adam": [1e-5, 1e-1]})), seeded()
    exponents = torch.tensor([math.log10(sampler.sample(generator).lr) for _ in range(4000)])
    assert -5 <= exponents.min() < -4.9
    assert -1.1 < exponents.max() <= -1
    counts = exponents.histc(bins=8, min=-5, max=-1)
    assert ((counts - 500).abs() < 110).all()  # five standard deviations of a binomial count


NOISE = {"operation": "noise", "scale": 0.5}


@given(configs, st.integers(0, 2**63 - 1))
def test_what_is_drawn_last_does_not_change_the_rest_of_a_draw(config: SamplerConfig, seed: int) -> None:
    """Surgery and then BatchNorm's mode, each only where there is a choice: without them a draw is what it was."""
    whole, generator, other = StrategySampler(config).sample(seeded(seed)), seeded(seed), seeded(seed)
    plain = replace(config, surgeries=[[]], batch_norms=["trained"])
    drawn = StrategySampler(plain).sample(generator)
    assert drawn == replace(whole, surgery=(), batch_norm="trained")
    operated = StrategySampler(replace(plain, surgeries=[[NOISE]])).sample(other)
    assert operated == replace(drawn, surgery=(Operation("noise", (("scale", 0.5),)),))
    assert torch.equal(generator.get_state(), other.get_state())


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        *(("sampler.optimizers", {"optimizers": bad}) for bad in ({}, {"adam": None}, {"lion": [0.1, 0.2]})),
        *(
            ("sampler.optimizers.adam", {"optimizers": {"adam": limits}})
            for limits in ([], [0.1], [0.1, 0.2, 0.3], [0.0, 0.1], [0.2, 0.1], [math.nan, 1.0], [0.1, math.inf])
        ),
        *(("sampler.steps", {"steps": limits}) for limits in ([], [5], [0, 5], [6, 5], [1, 2, 3])),
        *(
            (f"sampler.{name}", {name: []})
            for name in (
                "batch_sizes",
                "heads",
                "scopes",
                "weight_decays",
                "schedules",
                "augmentations",
                "batch_norms",
                "surgeries",
            )
        ),
        ("sampler.surgeries[1]", {"surgeries": [[], {"operation": "noise"}]}),
        ("sampler.surgeries[0]", {"surgeries": ["noise"]}),
        ("sampler.surgeries[0][1]", {"surgeries": [[{"operation": "noise"}, {"scale": 0.1}]]}),
        ("sampler.surgeries[0][0].scale", {"surgeries": [[{"operation": "noise", "scale": [0.1]}]]}),
        ("sampler.batch_sizes", {"batch_sizes": [32, 0]}),
        ("sampler.heads", {"heads": ["kept", "new"]}),
        *(("sampler.scopes", {"scopes": [scope]}) for scope in ("tail", "lora")),
        *(("sampler.batch_norms", {"batch_norms": [choice]}) for choice in ("melted", "restated")),
        ("sampler.weight_decays", {"weight_decays": [0.0, -0.1]}),
        ("sampler.weight_decays", {"weight_decays": [math.nan]}),
        ("sampler.schedules", {"schedules": ["step"]}),
        ("sampler.augmentations", {"augmentations": ["blur"]}),
    ],
)
def test_bad_sampler_is_refused_by_the_key_in_the_file(key: str, changes: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        StrategySampler(small(**changes))
    assert str(caught.value).startswith(f"{key}: ")
    assert "\n" not in str(caught.value)
