import dataclasses
import math

import pytest

from sophon.attacker import FineTuneStrategy, Operation
from sophon.auditing.words import describe, format_difference, format_value, printable
from tests.auditing.records import ACCURACY, MSE


@pytest.mark.parametrize(
    ("value", "metric", "said", "difference"),
    [
        (41.04, ACCURACY, "41.0 %", "41.0 points"),
        (0.0123456, MSE, "0.01235", "0.01235"),
        (None, MSE, "-", "-"),
        (math.nan, ACCURACY, "-", "-"),
    ],
)
def test_values_in_words(value, metric, said, difference):
    assert (format_value(value, metric), format_difference(value, metric)) == (said, difference)


def test_what_cannot_be_shown_is_replaced():
    assert printable("a\ud800b\x00") == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        (
            {"head": "kept", "steps": 4000, "schedule": "warmup_cosine"},
            "kept head, 4000 steps, warmup and cosine schedule",
        ),
        ({"scope": "lora", "lora_rank": 16}, "LoRA of rank 16"),
        ({"scope": "lora", "lora_layers": "attention"}, "LoRA of rank 8 on attention"),
        ({"scope": "lora", "lora_recipe": "diffusers"}, "LoRA of rank 8, adapters as diffusers starts them"),
        ({"scope": "last_blocks", "blocks": 2}, "the last 2 blocks and the head only"),
        ({"scope": "first_blocks"}, "the first block and the head only"),
        ({"scope": "head"}, "the head only"),
        ({"scope": "attention"}, "attention only"),
        ({"blocks": 3, "lora_rank": 2, "lora_layers": "linears", "probe_steps": 7, "probe_lr": 0.1}, ""),
        ({"head": "probed", "probe_steps": 7, "probe_lr": 0.1}, "probed head, 7 probing steps, probing at 0.1"),
        ({"data_budget": 500, "augmentation": "strong"}, "strong augmentation, 500 images"),
        ({"batch_size": 32, "weight_decay": 0.0005}, "batches of 32, weight decay 0.0005"),
        ({"ema": 0.99, "max_norm": 1.0}, "weights averaged at 0.99, gradients clipped to 1"),
        ({"batch_norm": "frozen"}, "frozen BatchNorm statistics"),
        ({"optimizer_args": (("betas", (0.9, 0.99)), ("eps", 1e-3))}, "betas [0.9, 0.99], eps 0.001"),
        ({"loop": "mine.my_loop"}, "trained by my loop"),
        ({"batch_norm": "restated"}, "restated BatchNorm statistics"),
        ({"surgery": (Operation("renormalise"),)}, "after re-normalising the weights"),
        ({"surgery": (Operation("centre"),)}, "after centring channels"),
        ({"surgery": (Operation("equalise"),)}, "after equalising channels"),
        (
            {"surgery": (Operation("noise", (("scale", 0.1),)), Operation("a.module.my_cut"))},
            "after adding noise with scale 0.1 and my cut",
        ),
        (
            {"surgery": (Operation("heal", (("domain", "benign"), ("lr", 0.01), ("steps", 9))),)},
            "after healing with domain benign, lr 0.01 and steps 9",
        ),
    ],
)
def test_describe_says_what_differs_from_the_usual(changes, words):
    strategy = FineTuneStrategy(optimizer="adam", lr=0.0012345, **changes).plain()
    assert describe(strategy) == "adam at 0.00123" + (f", {words}" if words else "")


def test_describe_leaves_out_nothing_that_matters():
    usual = {"scope": "lora", "head": "probed"}
    odd = dict.fromkeys(("lr", "weight_decay", "probe_lr", "ema", "max_norm"), 0.5)
    odd |= dict.fromkeys(("batch_size", "steps", "probe_steps", "data_budget", "blocks", "lora_rank"), 3)
    odd |= {"optimizer": "sgd", "schedule": "cosine", "scope": "all", "head": "kept", "augmentation": "strong"}
    odd |= {
        "batch_norm": "frozen",
        "lora_layers": "linears",
        "lora_recipe": "diffusers",
        "surgery": [{"operation": "heal"}],
    }
    odd |= {"optimizer_args": {"eps": 1.0}, "loop": "mine.loop"}
    for part in dataclasses.fields(FineTuneStrategy):
        before = usual | {"scope": "last_blocks"} if part.name == "blocks" else usual
        assert describe(before | {part.name: odd[part.name]}) != describe(before), part.name


def test_describe_bears_fields_missing_and_unknown():
    assert describe({}) == "momentum at 0.01"
    assert describe({"new_field": 3}) == "momentum at 0.01, new field 3"
    assert describe({"scope": "new"}) == "momentum at 0.01, scope new"
