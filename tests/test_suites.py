"""The audit's suites and families compose, name every attack once and leave out nothing that an attacker may choose."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra

from sophon import surgery
from sophon.attacker import (
    AUGMENTATIONS,
    BATCH_NORMS,
    HEADS,
    LORA_LAYERS,
    OPTIMIZERS,
    SCHEDULES,
    SCOPES,
    FineTuneStrategy,
)
from sophon.audit import search
from sophon.audit.plan import strategies
from sophon.cli import conf_dir
from sophon.config import AttackConfig
from sophon.validation import from_omegaconf

pytestmark = pytest.mark.slow  # composes every suite

FOLDER = conf_dir() / "attack"
SUITES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
FAMILIES = sorted(path.stem for path in (FOLDER / "family").glob("*.yaml"))
SEARCHES = [name for name in FAMILIES if name.startswith("search_")]
ALONE = ("search_tpe", "search_tpe_short", "search_denoiser")  # one search by three names: a suite takes one of them


@pytest.fixture(autouse=True, scope="module")
def _initialised() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        yield


@cache
def composed(*overrides: str) -> AttackConfig:
    return from_omegaconf(hydra.compose("config", overrides=[*overrides, "verb=audit"])).attack


@pytest.fixture(scope="module")
def full() -> AttackConfig:
    return composed("attack=full")


def listed(path: Path, key: str) -> dict[str, Any]:
    """Read what a file itself holds, and refuse a name that it gives twice."""

    class Once(yaml.SafeLoader):
        pass

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
        pairs = [(loader.construct_object(k, deep=True), loader.construct_object(v, deep=True)) for k, v in node.value]
        assert len(dict(pairs)) == len(pairs), f"{path}: a name is given twice"
        return dict(pairs)

    Once.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    found: dict[str, Any] = yaml.load(path.read_text(), Once).get(key, {})
    return found


def minutes(config: AttackConfig) -> float:
    """Count as the comments in the suites do: 5 s for 200 steps of 128 images, 1 s for measuring, three roles."""

    def cost(steps: float) -> float:
        return steps * 5 / 200 + 1

    seconds = sum(cost(each.steps) * 3 * config.seeds for each in strategies(config).values())
    for each in config.search.values():
        whole = (each.trials + each.startup) / 2 if each.prune else each.trials
        stopped = each.trials - whole
        seconds += 3 * ((whole + each.seeds) * cost(each.steps) + stopped * cost(each.steps / 2))
    return seconds / 60


# ---- suites ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_composes_to_strategies_that_can_run(suite: str) -> None:
    config = composed(f"attack={suite}")
    named = strategies(config)
    assert named or config.search
    assert set(config.benign) <= set(named)
    assert config.oracle is None or config.oracle in named
    for name, each in config.search.items():
        search.check(name, each)


def test_smoke_takes_less_than_a_minute_and_has_surgery() -> None:
    config = composed("attack=smoke")
    named = strategies(config)
    assert 2 <= len(named) <= 4
    assert config.seeds == 1
    assert any(strategy.surgery for strategy in named.values())
    assert minutes(config) < 1


def test_standard_takes_about_an_hour() -> None:
    config = composed("attack=standard")
    assert config.seeds == 1
    assert 40 < minutes(config) < 65
    assert [(each.sampler, each.trials, each.seeds) for each in config.search.values()] == [("tpe", 32, 2)]
    assert {strategy.steps for strategy in strategies(config).values()} == {0, 200, 5 * 200, 20 * 200}


def test_full_is_more_of_standard(full: AttackConfig) -> None:
    assert strategies(composed("attack=standard")).items() <= strategies(full).items()
    assert full.seeds == 3
    assert {(name, each.sampler, each.trials, each.seeds) for name, each in full.search.items()} == {
        ("tpe_search", "tpe", 64, 3),
        ("low_rates", "tpe", 64, 3),
        ("random_search", "random", 64, 3),
    }
    ranks = {strategy.lora_rank for strategy in strategies(full).values() if strategy.scope == "lora"}
    assert (min(ranks), max(ranks)) == (1, 64)


def test_paper_is_three_ways_by_five_by_five_by_five() -> None:
    named = strategies(composed("attack=paper"))
    ways = {"initFC-all": ("fresh", "all"), "initFC-FC": ("fresh", "head"), "direct-all": ("kept", "all")}
    assert {name.split("-adam-")[0]: (s.head, s.scope) for name, s in named.items() if "-adam-" in name} == ways
    for part in ("optimizer", "lr", "batch_size"):
        assert len({getattr(strategy, part) for strategy in named.values()}) == 5
    assert len(named) == len(set(named.values())) == 3 * 5 * 5 * 5
    images = {strategy.batch_size * strategy.steps for strategy in named.values()}
    assert max(images) - min(images) < 100, "every batch size sees as many images"


def test_the_suite_for_denoisers_asks_for_no_new_head() -> None:
    config = composed("attack=standard_diffusion")
    named = strategies(config)
    assert {strategy.head for strategy in named.values()} == {"kept"}
    assert {"all", "attention", "last_blocks", "lora"} <= {strategy.scope for strategy in named.values()}
    operations = {operation.name for strategy in named.values() for operation in strategy.surgery}
    assert {"noise", "prune", "shrink_perturb", "heal", "reinitialise"} <= operations
    assert config.search["tpe_search"].choices["head"] == ["kept"]


# ---- families -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_a_part_of_an_attack(family: str) -> None:
    first, second = (FOLDER / "family" / f"{family}.yaml").read_text().splitlines()[:2]
    package = r"attack\.search\.(tpe_search|random_search|low_rates)" if family in SEARCHES else "attack"
    assert re.fullmatch(f"# @package {package}", first)
    assert second.startswith("# "), "says what it is"


@pytest.mark.parametrize("family", [*SEARCHES, "controls", "optimizers"])
def test_a_family_composes_alone(family: str) -> None:
    config = composed("attack=standard", f"attack/family=[{family}]")
    named = strategies(config)
    assert set(named) == set(listed(FOLDER / "family" / f"{family}.yaml", "strategies"))
    assert bool(config.search) == (family in SEARCHES)
    assert set(config.benign) <= set(named)


def test_no_name_is_given_twice() -> None:
    named = [name for family in FAMILIES for name in listed(FOLDER / "family" / f"{family}.yaml", "strategies")]
    assert len(named) == len(set(named))
    for suite in SUITES:
        listed(FOLDER / f"{suite}.yaml", "strategies")
    for suite in ("smoke", "standard", "full"):
        assert not set(named) & set(listed(FOLDER / f"{suite}.yaml", "strategies"))


def test_no_two_attacks_are_the_same(full: AttackConfig) -> None:
    seen: dict[FineTuneStrategy, str] = {}
    for name, strategy in strategies(full).items():
        assert strategy not in seen, f"{name} is {seen.get(strategy)}"
        seen[strategy] = name


def test_full_has_every_family_and_every_choice(full: AttackConfig) -> None:
    families = yaml.safe_load((FOLDER / "full.yaml").read_text())["defaults"][0]["family"]
    assert set(families) == set(FAMILIES) - set(ALONE) | {"search_tpe"}
    named = strategies(full).values()
    for part, choices in {
        "optimizer": OPTIMIZERS,
        "schedule": SCHEDULES,
        "scope": SCOPES,
        "head": HEADS,
        "augmentation": AUGMENTATIONS,
        "batch_norm": BATCH_NORMS,
        "lora_layers": LORA_LAYERS,
    }.items():
        assert {getattr(strategy, part) for strategy in named} == set(choices), part
    for head in ("kept", "fresh"):
        assert {strategy.optimizer for strategy in named if strategy.head == head} == set(OPTIMIZERS)
    assert {strategy.data_budget for strategy in named} == {None, 50, 200, 500}
    assert any(strategy.max_norm for strategy in named)
    assert any(not strategy.steps for strategy in named)


def test_the_family_surgery_has_every_operation() -> None:
    named = strategies(composed("attack=standard", "attack/family=[surgery]")).values()
    assert all(strategy.surgery for strategy in named)
    assert {operation.name for strategy in named for operation in strategy.surgery} == set(surgery.OPERATIONS)
    for name, argument in (("heal", "domain"), ("reinitialise", "end")):
        found = [op.plain()[argument] for strategy in named for op in strategy.surgery if op.name == name]
        assert len(set(found)) == 2


def test_every_space_can_be_searched_by_every_search() -> None:
    spaces = sorted(path.stem for path in (FOLDER / "space").glob("*.yaml"))
    for space in spaces:
        for name, key in (("search_tpe", "tpe_search"), ("search_random", "random_search")):
            config = composed("attack=smoke", f"+attack/family=[{name}]", f"attack/space@attack.search.{key}={space}")
            search.check(key, config.search[key])
            path = FOLDER / "space" / f"{space}.yaml"
            based = [name for name in yaml.safe_load(path.read_text()).get("defaults", []) if name != "_self_"]
            values = {}
            for each in (*(path.with_stem(name) for name in based), path):
                values |= listed(each, "choices")
            assert config.search[key].choices == values
            for entries in values["surgery"]:
                operations = FineTuneStrategy.of({"surgery": entries}).surgery
                surgery.check(operations, f"{space}.surgery")
    for space in ("classifier", "classifier_low_rates"):
        assert {*listed(FOLDER / "space" / f"{space}.yaml", "optimizers")} == set(OPTIMIZERS)


def test_families_are_added_to_any_suite_and_entries_taken_away() -> None:
    config = composed("experiment=quickstart", "+attack/family=[lora,controls]", "~attack.strategies.lora_all_rank_1")
    named = strategies(config)
    assert {"momentum_1e-2_kept", "lora_all_rank_64", "no_attack_kept"} <= set(named)
    assert "lora_all_rank_1" not in named
    assert named["momentum_1e-2_kept"].steps == 40
    config = composed("attack=standard", "attack/family=[controls]", "+attack.strategies.mine={lr: 0.5}")
    assert set(strategies(config)) == {"no_attack_kept", "no_attack_fresh", "mine"}
