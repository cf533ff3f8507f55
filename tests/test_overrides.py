"""Overrides arrive as they were typed, or one line says how to write them."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from sophon.cli.groups import groups
from sophon.cli.overrides import as_typed, text
from tests.cli_helpers import Result, refusal, sophon

GROUPS = groups()


def read(override: str, sweeps: bool = False) -> Any:
    """Return the value that Hydra reads from an override that we have put for it."""
    parsed = OverridesParser.create().parse_override(as_typed(override, GROUPS, sweeps))
    return [*map(str, parsed.sweep_string_iterator())] if parsed.is_sweep_override() else parsed.value()


TEXT = [
    *("1e5", "2026_11", "007", "1_000", "0x1F", "-3", ".5", "inf", "nan", "true", "no", "Null", "[]", "{}", "a:b"),
    *("~/runs", "a b", " a", "a=b", "a,b", "[a]", "a]b", "{a: b}", "choice(a,b)", "range(3)", "str(1)", "$HOME", "$"),
    *("käse/猫", "it's", 'say "hi"', "'a' and 'b'", "a\\b", "a\\", "\\'", "C:\\new", "%d", "#1", "*", "a|b", "@x", "!"),
]


@pytest.mark.parametrize("value", TEXT)
def test_text_arrives_as_typed(value: str) -> None:
    assert read(f"run_dir={value}") == value
    assert read(f"domain.original.root={value}") == value
    assert read(f"+model.weights={value}") == value


# what the command line cannot carry, or what OmegaConf would read as an interpolation
letters = st.characters(exclude_categories=("Cs", "Cc"))
words = st.text(letters).filter(lambda value: "${" not in value)


@settings(max_examples=100)
@given(words)
def test_any_text_arrives_as_typed(value: str) -> None:
    if not (len(value) > 1 and value[0] == value[-1] and value[0] in "'\""):  # quoted already
        assert read(f"run_dir={value}") == (None if value == "null" else value)
    assert read(f"run_dir={text(value)}") == value


@given(st.lists(words.map(str.strip).filter(bool), min_size=1))
def test_any_list_of_quoted_text_arrives_as_typed(values: list[str]) -> None:
    assert read(f"runs=[{', '.join(map(text, values))}]") == values


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("run_dir=null", None),
        ("name=null", "null"),
        ("run_dir='é'", "é"),
        ('run_dir="a,b"', "a,b"),
        ("run_dir=", ""),
        ("out=x/${name}_${seed}", "x/${name}_${seed}"),
        ("domain.original.classes=[007,1e5, cat,'a,b']", ["007", "1e5", "cat", "a,b"]),
        ("domain.original.classes=[it's,b]", ["it's", "b"]),
        ("domain.original.classes=null", None),
        ("domain.restricted.people.classes=[1]", ["1"]),
        ("attack.reuse=[1e5,~/x]", ["1e5", "~/x"]),
        ("domain.original={name: 007, root: 1e5, per_class: 5}", {"name": "007", "root": "1e5", "per_class": 5}),
        ("attack.strategies.a={optimizer: sgd, lr: 1e-2}", {"optimizer": "sgd", "lr": 0.01}),
        ("model.model_args={depth: 1e1, act: 'relu'}", {"depth": 10.0, "act": "relu"}),
        ("domain@domain.original=007", "007"),
        ("+attack/family=[lora,surgery]", ["lora", "surgery"]),
        ("seed=1e2", 100.0),
        ("method.rounds=1_000", 1000),
        ("hydra.job.name=1e5", 1e5),
        ("nothing.known=1e5", 1e5),
    ],
)
def test_what_is_text_and_what_is_not(override: str, value: object) -> None:
    assert read(override) == value


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("run_dir=1e5,2e5", ["'1e5'", "'2e5'"]),
        ("run_dir=choice(1e5,2e5)", ["'1e5'", "'2e5'"]),
        ("run_dir='a,b',c", ["'a,b'", "'c'"]),
        ("model=resnet18,resnet34", ["'resnet18'", "'resnet34'"]),
        ("seed=0,1", ["0", "1"]),
        ("seed=range(2)", ["0", "1"]),
        ("domain.original.classes=[1,2],[3]", ["['1','2']", "['3']"]),
    ],
)
def test_a_sweeps_values_are_text_each(override: str, values: list[str]) -> None:
    assert [f"{override.partition('=')[0]}={each}" for each in values] == [
        f"{override.partition('=')[0]}={each}" for each in read(override, sweeps=True)
    ]


# ---- through the command line ---------------------------------------------------------------------------------------


def composed(*arguments: str, verb: str = "protect") -> Any:
    """Return what a command would run."""
    result: Result = sophon(None, verb, *arguments, "--cfg", "job")
    assert result.code == 0, result
    return yaml.safe_load(result.out)


def test_odd_values_arrive_in_what_would_run() -> None:
    odd = "a b=c,[d] (e) 'f' käse"
    config = composed("run_dir=1e5", f"checkpoint={odd}", "name=2026_11", "domain.original.classes=[007,1e5]")
    assert (config["run_dir"], config["checkpoint"], config["name"]) == ("1e5", odd, "2026_11")
    assert config["domain"]["original"]["classes"] == ["007", "1e5"]


def test_a_mapping_replaces_and_later_overrides_add_to_it() -> None:
    config = composed(
        "experiment=quickstart",
        "model.model_args={depth: 4}",
        "sampler.optimizers={sgd: [0.1, 0.2]}",
        "+sampler.optimizers.adam=[0.1,0.1]",
        "method.objectives.suppression.weight=2.0",
        "attack.strategies={one: {lr: 0.1}}",
        "+attack.search.mine={trials: 3, optimizers: {sgd: [0.1, 1.0]}}",
        "attack.search.mine.seeds=1",
        "attack.masking={heads: [kept]}",
    )
    attack, search = config["attack"], config["attack"]["search"]["mine"]
    assert config["model"]["model_args"] == {"depth": 4}
    assert config["sampler"]["optimizers"] == {"sgd": [0.1, 0.2], "adam": [0.1, 0.1]}
    assert config["method"]["objectives"]["suppression"] == {"weight": 2.0}
    assert attack["strategies"] == {"one": {"lr": 0.1}}
    assert (search["trials"], search["seeds"], search["optimizers"]) == (3, 1, {"sgd": [0.1, 1.0]})
    # of declared keys the others are at their defaults
    assert (search["sampler"], search["steps"], attack["masking"]) == ("tpe", 200, {"heads": ["kept"]})


@pytest.mark.slow
@pytest.mark.parametrize("override", ["model.architecture=vit_tiny_patch16_224", "model.library=torchvision"])
def test_another_architecture_starts_without_the_demos_arguments(override: str) -> None:
    model = composed("experiment=quickstart", "model.architecture=x", override, "model.mean=[0.3]")["model"]
    assert (model["model_args"], model["channels"], model["mean"], model["std"]) == ({}, 3, [0.3], None)
    chosen = composed("model=resnet18", override)["model"]
    assert chosen["image_size"] == 64, "what the command chooses by name stays"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["protec"], ["'protec' is not a verb", "did you mean protect?", "pretrain"]),
        (["protect", "method.round=1"], ["method.round: no such key", "did you mean method.rounds?"]),
        (["protect", "+method.round=1"], ["method", "round"]),
        (["protect", "modle=resnet18"], ["modle: no such key", "did you mean model?"]),
        (["protect", "domain@domain.orignal=mnist"], ["did you mean domain@domain.original?"]),
        (["protect", "model=resnet8"], ["model: 'resnet8'", "did you mean resnet18?", "vgg13_bn"]),
        (["audit", "+attack/family=[lorra]"], ["attack/family: 'lorra'", "did you mean lora?", "surgery"]),
        (["audit", "experiment=quickstrat"], ["experiment: 'quickstrat'", "did you mean quickstart?"]),
        (["protect", "method.engine=first"], ["method.engine: 'first'", "did you mean first_order?"]),
        (["pretrain", "pretrain.optimizer=adm"], ["pretrain.optimizer: 'adm'", "did you mean adam"]),
        (["protect", "--help", "metod"], ["'metod'", "did you mean method?", "strategy"]),
        (["protect", "experiment=null"], ["experiment: 'null'", "quickstart"]),
        (["protect", "seed=abc"], ["seed: abc is not allowed; it must be int"]),
        (["audit", "+attack.search.mine={sampler: tpe, budget: 4}"], ["attack.search.mine.budget: no such key"]),
        (
            ["audit", "+attack.search.mine={sampler: tpe, trials: x}"],
            ["attack.search.mine.trials: {", "it must be int"],
        ),
        (["protect", "method.rounds=1,2"], ["method.rounds=1,2", "--multirun"]),
        (["protect", "name=${nowhere}"], ["name: ", "nowhere"]),
        (["protect", "--bogus"], ["--bogus"]),
        (["protect", "seed"], ["seed"]),
        (["pretrain", "model.model_args={depth:", "4}"], ["model.model_args: ", "'model.model_args={depth: 4}'"]),
        (["pretrain", "model.model_args={depth"], ["model.model_args: '{depth' ends without '}'"]),
        (["protect", "=3"], ["'=3' names no key", "key=value"]),
        (["protect", "+@domain=svhn"], ["'+@domain=svhn' names no key"]),
    ],
)
def test_what_was_likely_meant(arguments: list[str], words: list[str]) -> None:
    message = refusal(sophon(None, *arguments))
    for word in words:
        assert word in message
