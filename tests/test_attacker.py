"""The attacker's vocabulary, its validation, and the one question the audit asks of it: could protection draw this?"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import replace
from typing import Any

import pytest

from sophon.attacker import SCHEDULES, FineTuneStrategy, Operation, learning_rate
from sophon.errors import UserError
from sophon.held_out import fields_outside
from sophon.sampler import SamplerConfig, StrategySampler


def small(**changes: Any) -> SamplerConfig:
    return replace(SamplerConfig(optimizers={"adam": [1e-4, 1e-2]}), **changes)


# --- the dataclass ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("optimizer", "lion"),
        ("loop", "loop"),
        ("optimizer_args", [0.9]),
        ("schedule", "step"),
        ("scope", "tail"),
        ("head", "new"),
        *((name, bad) for name in ("lr", "probe_lr") for bad in (0.0, -1.0, math.nan, math.inf)),
        *((name, bad) for name in ("batch_size", "probe_steps", "blocks", "lora_rank") for bad in (0, -1)),
        ("steps", -1),
        *(("max_norm", bad) for bad in (0, -1.0, math.nan, "big")),
        ("batch_norm", "cold"),
        ("lora_layers", "embeddings"),
        ("lora_recipe", "kohya"),
        ("surgery", "noise"),
        *(("weight_decay", bad) for bad in (-1e-9, math.nan, math.inf)),
        ("data_budget", 0),
        *(("ema", bad) for bad in (1.0, 1, 1.5, -1e-9, math.nan, math.inf)),
    ],
)
def test_bad_value_is_named_on_one_line(field: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        replace(FineTuneStrategy(), **{field: value}).validate("attack.strategies.x")
    message = str(caught.value)
    assert message.startswith(f"attack.strategies.x.{field}: ")
    assert str(value) in message
    assert "allowed" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({}, "surgery[1]: {} names no operation"),
        ({"operation": 3}, "surgery[1]: {'operation': 3} names no operation"),
        ({"operation": "noise", "scale": [1]}, "surgery[1].scale: [1] is not allowed"),
    ],
)
def test_a_malformed_operation_is_named_with_its_place(entry: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        FineTuneStrategy.of({"surgery": [{"operation": "renormalise"}, entry]}, "attack.strategies.x")
    assert str(caught.value).startswith(f"attack.strategies.x.{words}")
    assert "\n" not in str(caught.value)


def test_a_strategy_survives_plain_data() -> None:
    surgery = [{"operation": "noise", "scale": 0.1}, {"operation": "renormalise"}]
    arguments = {"betas": [0.5, 0.9], "amsgrad": True}
    strategy = FineTuneStrategy.of({"lr": 0.5, "surgery": surgery, "optimizer_args": arguments})
    assert strategy.plain()["surgery"] == surgery
    assert strategy.plain()["optimizer_args"] == arguments
    assert FineTuneStrategy.of(json.loads(json.dumps(strategy.plain()))) == strategy
    assert hash(strategy) == hash(FineTuneStrategy.of(strategy.plain()))


# --- optimizers and schedules -------------------------------------------------------------------------------------

# factor at the first step, at the last one, and the peak with its first step, all for 40 steps
SHAPES = {
    "constant": (1.0, 1.0, 1.0, 0),
    "cosine": (1.0, 0.5 * (1 + math.cos(math.pi * 39 / 40)), 1.0, 0),
    "linear": (1.0, 1 / 40, 1.0, 0),
    "warmup": (0.25, 1.0, 1.0, 3),
    "warmup_cosine": (
        0.25,
        0.5 * (1 + math.cos(math.pi * 39 / 40)),
        0.5 * (1 + math.cos(math.pi * 3 / 40)),
        3,
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule: str) -> None:
    assert set(SHAPES) == set(SCHEDULES)
    first, last, peak, at = SHAPES[schedule]
    strategy = FineTuneStrategy(lr=2.0, schedule=schedule, steps=40)
    lrs = [learning_rate(strategy, step) for step in range(40)]
    assert lrs[0] == pytest.approx(2 * first)
    assert lrs[-1] == pytest.approx(2 * last)
    assert max(lrs) == pytest.approx(2 * peak)
    assert lrs.index(max(lrs)) == at


NOISE = {"operation": "noise", "scale": 0.5}

# --- seen or not --------------------------------------------------------------------------------------------------

SUPPORT = StrategySampler(
    SamplerConfig(
        optimizers={"adam": [1e-4, 1e-2], "sgd": [0.1, 1.0]},
        batch_sizes=[64, 128],
        steps=[10, 50],
        heads=["kept", "fresh"],
        weight_decays=[0.0, 0.01],
    )
).support()
SEEN = FineTuneStrategy(optimizer="adam", lr=1e-3, batch_size=64, steps=20, head="kept", weight_decay=0.01)


@pytest.mark.parametrize(
    ("changes", "outside"),
    [
        ({}, ()),
        ({"lr": 1e-4}, ()),
        ({"lr": 1e-2}, ()),
        ({"steps": 10}, ()),
        ({"steps": 50}, ()),
        ({"probe_steps": 7, "probe_lr": 1.0}, ()),
        ({"optimizer": "adamw"}, ("optimizer",)),
        ({"optimizer": "sgd"}, ("lr",)),  # adam's rate, not sgd's
        ({"lr": 9.9e-5}, ("lr",)),
        ({"lr": 1.01e-2}, ("lr",)),
        ({"steps": 51}, ("steps",)),
        ({"steps": 9}, ("steps",)),
        ({"batch_size": 96}, ("batch_size",)),
        ({"weight_decay": 0.02}, ("weight_decay",)),
        ({"schedule": "cosine"}, ("schedule",)),
        ({"scope": "head"}, ("scope",)),
        ({"head": "probed"}, ("head",)),
        ({"augmentation": "strong"}, ("augmentation",)),
        ({"data_budget": 100}, ("data_budget",)),
        ({"ema": 0.9}, ("ema",)),
        ({"ema": 0}, ()),
        ({"optimizer": "kfac"}, ("optimizer",)),
        ({"optimizer": "torch.optim.NAdam"}, ("optimizer",)),
        ({"loop": "mine.loop"}, ("loop",)),
        ({"optimizer_args": (("eps", 0.1),)}, ("optimizer_args",)),
        ({"surgery": (Operation("renormalise"),)}, ("surgery",)),
    ],
)
def test_fields_outside(changes: dict[str, Any], outside: tuple[str, ...]) -> None:
    """Whether the support comes from memory or from a manifest."""
    for support in (SUPPORT, json.loads(json.dumps(SUPPORT))):
        assert fields_outside(support, replace(SEEN, **changes)) == outside


def test_surgery_is_seen_if_it_was_sampled() -> None:
    surgeries = [[], [NOISE], [NOISE], [NOISE, {"operation": "renormalise", "per": "channel"}]]
    support = StrategySampler(small(surgeries=surgeries, steps=[1, 500])).support()
    support = json.loads(json.dumps(support))
    assert support["surgery"] == [surgeries[0], surgeries[1], surgeries[3]]
    plain = FineTuneStrategy(optimizer="adam", lr=1e-3)
    for entries in surgeries:
        assert fields_outside(support, FineTuneStrategy.of({**plain.plain(), "surgery": entries})) == ()
    for entries in ([{"operation": "noise", "scale": 0.4}], [{"operation": "renormalise"}], [NOISE, NOISE]):
        assert fields_outside(support, FineTuneStrategy.of({**plain.plain(), "surgery": entries})) == ("surgery",)


def test_every_field_decides_but_the_probing() -> None:
    """A field added to the strategy must be sampled, or named as one that does not matter."""
    decided = set(SUPPORT) | {"lr"}
    unsampled = {"probe_steps", "probe_lr"}
    # simulated attackers have the default of these
    defaults = {"max_norm", "blocks", "lora_rank", "lora_layers", "lora_recipe", "loop", "optimizer_args"}
    assert {field.name for field in dataclasses.fields(FineTuneStrategy)} - decided == unsampled | defaults
