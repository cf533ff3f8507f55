"""Searches whose choices do not all fit the models, and what a denoiser leaves of a suite."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sophon.attacker import Operation
from sophon.auditing.plan import Search
from sophon.config import AttackConfig
from sophon.errors import UserError
from tests.auditing.staging import FRESH, KEPT, SEARCH, TWO
from tests.auditing.test_plan import plan_of, shape
from tests.tiny import tiny_denoising, tiny_unet, tiny_unet_spec

HEAL_BENIGN = Operation("heal", (("domain", "benign"), ("steps", 2)))


def narrowed(choices: dict[str, Any], **changes: Any) -> tuple[dict[str, Any], dict[str, str]]:
    plan = plan_of(AttackConfig(search={"s": replace(SEARCH, choices=choices)}), **changes)
    configs = [job.config for job in plan.jobs if isinstance(job, Search)]
    assert len(configs) == 3
    assert configs[0] == configs[1] == configs[2]
    return configs[0].choices, plan.left_out


def test_choices_that_do_not_fit_are_dropped_with_a_reason() -> None:
    noise = [{"operation": "noise", "scale": 0.1}]
    choices = {
        "blocks": [1, 2, 3],
        "head": ["kept", "fresh", "probed"],
        "scope": ["all", "attention", "last_blocks", "lora"],
        "lora_layers": ["convolutions", "attention"],
        "data_budget": [None, 9, 99],
        "surgery": [[], noise, [HEAL_BENIGN.plain()]],
        "batch_size": [8, 16],
    }
    found, left_out = narrowed(choices, restricted=TWO)
    assert found == {
        "blocks": [1, 2],
        "head": ["fresh", "probed"],
        "scope": ["all", "last_blocks", "lora"],
        "lora_layers": ["convolutions"],
        "data_budget": [None, 9],
        "surgery": [[], noise],
        "batch_size": [8, 16],
    }
    assert {name: reason.split(":")[0] for name, reason in left_out.items()} == {
        "s: scope attention": "scope",
        "s: blocks 3": "blocks",
        "s: head kept": "head",
        "s: lora_layers attention": "lora_layers",
        "s: data_budget 99": "data_budget",
        f"s: surgery {[HEAL_BENIGN.plain()]}": "surgery",
    }


DENOISER = {
    "models": {"protected": tiny_unet(), "unprotected": tiny_unet(seed=1)},
    "task": tiny_denoising(),
    "spec": tiny_unet_spec(),
}


def test_a_suite_for_classifiers_keeps_for_a_denoiser_what_fits_it() -> None:
    """It has no head to replace and no BatchNorm: what asks for one is left out, and the others run."""
    named = {
        "kept": KEPT,
        "fresh": FRESH,
        "probed": replace(FRESH, head="probed"),
        "head alone": replace(KEPT, scope="head"),
        "lora": replace(KEPT, scope="lora", lora_layers="linears"),
        "kfac": replace(KEPT, optimizer="kfac"),
        "muon": replace(KEPT, optimizer="muon"),
        "reinitialised": replace(KEPT, surgery=(Operation("reinitialise", (("blocks", 1),)),)),
    }
    plan = plan_of(AttackConfig(strategies={name.replace(" ", "_"): each for name, each in named.items()}), **DENOISER)
    assert set(plan.left_out) == {"fresh", "probed", "head_alone"}
    found, left_out = narrowed({"head": ["kept", "fresh"], "batch_size": [8], "scope": ["all", "head"]}, **DENOISER)
    assert found == {"head": ["kept"], "batch_size": [8], "scope": ["all"]}
    assert list(left_out) == ["s: scope head", "s: head fresh"]


def test_a_search_of_which_nothing_fits_is_left_out_or_refused_if_it_is_all() -> None:
    search = {"s": replace(SEARCH, choices={"head": ["kept"]})}
    plan = plan_of(AttackConfig(strategies={"good": FRESH}, search=search), restricted=TWO)
    assert {name for name, *_ in shape(plan.jobs)} == {"good"}
    assert list(plan.left_out) == ["s: head kept", "s"]
    with pytest.raises(UserError, match=r"attack.search.s: none of the values of its choice head fits the model"):
        plan_of(AttackConfig(search=search), restricted=TWO)
