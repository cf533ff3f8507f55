"""The audit's suites and families compose, name every attack once and leave out nothing that an attacker may choose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cache

import hydra
import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra

from sophon import surgery
from sophon.attacker import AUGMENTATIONS, BATCH_NORMS, HEADS, LORA_LAYERS, LORA_RECIPES, OPTIMIZERS, SCHEDULES, SCOPES
from sophon.auditing import search
from sophon.auditing.knowing import MECHANISMS
from sophon.auditing.plan import strategies
from sophon.cli import conf_dir
from sophon.config import AttackConfig
from sophon.validation import from_omegaconf

pytestmark = pytest.mark.slow  # composes every suite

FOLDER = conf_dir() / "attack"
SUITES, FAMILIES, SPACES = (
    sorted(path.stem for path in (FOLDER / group).glob("*.yaml")) for group in (".", "family", "space")
)
ALONE = ("search_tpe", "search_tpe_short", "search_denoiser")  # one search by three names: a suite takes one of them


@pytest.fixture(autouse=True, scope="module")
def _initialised() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        yield


@cache
def composed(*overrides: str) -> AttackConfig:
    return from_omegaconf(hydra.compose("config", overrides=[*overrides, "verb=audit"])).attack


def runs(config: AttackConfig) -> None:
    named = strategies(config)
    assert named or config.search
    assert set(config.benign) <= set(named)
    assert set(config.knowing) <= {*named, *config.search}
    assert {name for names in config.knowing.values() for name in names} <= set(MECHANISMS)
    assert config.oracle is None or config.oracle in named
    for name, each in config.search.items():
        search.check(name, each)
    twice = [strategy for strategy, count in Counter(named.values()).items() if count > 1]
    assert not twice, "two names for one attack"


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_can_run_and_holds_no_attack_twice(suite: str) -> None:
    runs(composed(f"attack={suite}"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_can_run_by_itself(family: str) -> None:
    config = composed("attack=standard", f"attack/family=[{family}]", "attack.benign=[]", "attack.oracle=null")
    runs(config)
    assert bool(config.search) == family.startswith("search_")


@pytest.mark.parametrize("space", SPACES)
def test_a_search_can_go_over_every_space(space: str) -> None:
    config = composed("attack=smoke", "+attack/family=[search_tpe]", f"attack/space@attack.search.tpe_search={space}")
    runs(config)
    if space.startswith("classifier"):
        assert set(config.search["tpe_search"].optimizers) == set(OPTIMIZERS)


def test_full_has_every_family_and_every_choice_and_more_of_what_standard_has() -> None:
    full = composed("attack=full")
    families = yaml.safe_load((FOLDER / "full.yaml").read_text())["defaults"][0]["family"]
    assert set(families) == set(FAMILIES) - set(ALONE) | {"search_tpe"}
    named = strategies(full)
    assert strategies(composed("attack=standard")).items() <= named.items()
    named |= strategies(composed("attack=text_to_image"))  # the only ones with a text to attend to
    for part, choices in {
        "optimizer": OPTIMIZERS,
        "schedule": SCHEDULES,
        "scope": SCOPES,
        "head": HEADS,
        "augmentation": AUGMENTATIONS,
        "batch_norm": BATCH_NORMS,
        "lora_layers": LORA_LAYERS,
        "lora_recipe": LORA_RECIPES,
    }.items():
        assert {getattr(strategy, part) for strategy in named.values()} == set(choices), part
    assert {operation.name for each in named.values() for operation in each.surgery} == set(surgery.OPERATIONS)


@pytest.mark.parametrize("suite", ["quickstart_diffusion", "standard_diffusion", "paper_diffusion", "text_to_image"])
def test_a_denoiser_is_asked_for_no_new_head(suite: str) -> None:
    config = composed(f"attack={suite}")
    assert {strategy.head for strategy in strategies(config).values()} == {"kept"}
    assert all(each.choices["head"] == ["kept"] for each in config.search.values())


def test_no_two_families_share_a_name() -> None:
    """One would replace a part of the other without a word."""
    named = Counter(
        name
        for family in FAMILIES
        for name in yaml.safe_load((FOLDER / "family" / f"{family}.yaml").read_text()).get("strategies", {})
    )
    assert max(named.values()) == 1
