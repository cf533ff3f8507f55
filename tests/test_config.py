"""Everything that conf/ ships composes and can be made; what is wrong is refused by its key, in one line."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import hydra
import pytest
import torch
import yaml
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from sophon.api.common import task_of
from sophon.attacker import FineTuneStrategy
from sophon.auditing.plan import strategies
from sophon.cli.groups import choices, conf_dir, groups
from sophon.config import Config, ModelConfig, StrategyConfig, plain
from sophon.domains.bundled import BUNDLED
from sophon.domains.torchvision_sets import TORCHVISION
from sophon.errors import UserError
from sophon.models import ModelSpec, create
from sophon.sampler import StrategySampler
from sophon.tasks import make_task
from sophon.validation import from_omegaconf

CLASSES = tuple("abcde")
# A group's file, and how a command chooses it; attacks: tests/test_suites.py
SHIPPED = [
    *(
        f"{group}={name}"
        for group in groups()
        if group.split("/")[0] not in ("attack", "domain")
        for name in choices(group)
    ),
    *(f"domain@domain.original={name} domain@domain.restricted={name}" for name in choices("domain")),
]


def compose(*overrides: str) -> DictConfig:
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return hydra.compose("config", overrides=["verb=protect", *overrides])


@pytest.fixture(scope="module")
def composed() -> DictConfig:
    return compose()


def changed(composed: DictConfig, assignment: str) -> Config:
    """Do without Hydra what ``++key=value`` does: composing takes ten times as long."""
    config = copy.deepcopy(composed)
    key, value = assignment.split("=", 1)
    OmegaConf.update(config, key, yaml.safe_load(value), force_add=True)
    return from_omegaconf(config)


# ---- what is shipped ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made() -> dict[str, ModelSpec]:
    """The specs of the models that were made so far, by their configuration."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("choice", SHIPPED)
def test_every_shipped_file_composes_and_can_be_made(choice: str, made: dict[str, ModelSpec]) -> None:
    own = ["model.architecture=resnet18"] if choice == "model=own" else []
    config = from_omegaconf(compose(*choice.split(), *own))
    for domain in (config.domain.original, *config.domain.restricted.values()):
        known = {"bundled": BUNDLED, "torchvision": TORCHVISION, "imagefolder": [""]}[domain.source]
        assert domain.dataset in known
        assert not domain.download
    assert not config.model.pretrained
    if repr(config.model) not in made:
        with torch.device("meta"):
            model, made[repr(config.model)] = create(config.model, CLASSES)
        assert sum(parameter.numel() for parameter in model.parameters()) > 0
    if not choice.startswith(("method=", "task=", "model=")):  # which go together with others of their kind
        task = make_task(config, made[repr(config.model)], amp=False, protects=True)
        assert choice.startswith("guard=") or config.guard.relative is not task.metric.higher_is_better
    StrategySampler(config.sampler).sample(torch.Generator().manual_seed(0))
    strategies(config.attack)
    assert from_omegaconf(OmegaConf.create(plain(config))) == config


@pytest.mark.slow
def test_the_papers_attacks_are_three_ways_with_five_optimizers() -> None:
    config = from_omegaconf(compose("experiment=paper"))
    found = strategies(config.attack).values()
    assert {(s.head, s.scope) for s in found} == {("fresh", "all"), ("fresh", "head"), ("kept", "all")}
    assert len({s.optimizer for s in found}) == 5
    assert len(found) == 3 * 5 * 5 * 5
    support = StrategySampler(config.sampler).support()
    assert (support["optimizer"], support["head"]) == ({"sgd": [1e-4, 1e-4]}, ["kept"])


# ---- the schema -----------------------------------------------------------------------------------------------------


def test_a_strategy_in_the_configuration_has_exactly_the_strategys_fields(composed: DictConfig) -> None:
    assert {part.name for part in dataclasses.fields(StrategyConfig)} == {
        part.name for part in dataclasses.fields(FineTuneStrategy)
    }
    assert vars(StrategyConfig()) == FineTuneStrategy().plain()
    config = changed(composed, "attack.strategies.mine={lr: 0.25}")
    assert config.attack.strategies["mine"] == FineTuneStrategy(lr=0.25)
    assert isinstance(config.pretrain, FineTuneStrategy)


def test_paths_may_begin_at_home(composed: DictConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert changed(composed, "run_dir=~/runs/x").run_dir == "/home/me/runs/x"
    assert changed(composed, "domain.restricted.root=~/d").domain.restricted["fashion_shoes_bags"].root == "/home/me/d"
    assert changed(composed, "attack.reuse=[~/a, b]").attack.reuse == ["/home/me/a", "b"]


@pytest.mark.parametrize(("amp", "devices"), [("none", []), ("cuda", ["cuda"]), ("all", ["cpu", "cuda"])])
def test_amp_says_on_which_devices(amp: str, devices: list[str], composed: DictConfig) -> None:
    config = changed(composed, f"amp={amp}")
    with torch.device("meta"):
        spec = create(config.model, CLASSES)[1]
    assert [name for name in ("cpu", "cuda") if task_of(config, spec, torch.device(name)).amp] == devices


# ---- what is refused ------------------------------------------------------------------------------------------------

REFUSED: list[tuple[str, list[str]]] = [
    # keys that there are not
    ("foo=1", ["foo", "no such key"]),
    ("method.round=1", ["method.round", "did you mean method.rounds?"]),
    ("domain.original.rot=x", ["domain.original.rot", "did you mean domain.original.root?"]),
    ("pretrain.foo=1", ["pretrain.foo"]),
    ("attack.strategies.mine={foo: 1}", ["attack.strategies.mine.foo"]),
    # values that are missing or of another type
    *((f"{key}=???", [key, "missing"]) for key in ("name", "model.architecture", "method.name")),
    ("domain.original.source=???", ["domain.original.source", "missing"]),
    ("seed=1.5", ["seed", "1.5"]),
    ("seed=null", ["seed"]),
    ("n=all", ["n", "all"]),
    ("method.rounds=many", ["method.rounds", "many"]),
    ("method.rounds=[1]", ["method.rounds"]),
    ("domain.original.download=perhaps", ["domain.original.download", "perhaps"]),
    ("domain.original.classes=3", ["domain.original.classes"]),
    ("domain.restricted=3", ["domain.restricted"]),
    ("model.mean=[dark]", ["model.mean", "dark"]),
    ("sampler.optimizers={sgd: fast}", ["sampler.optimizers.sgd"]),
    ("attack.strategies=3", ["attack.strategies"]),
    ("attack.strategies.mine=3", ["attack.strategies.mine"]),
    ("attack.strategies.mine={lr: fast}", ["attack.strategies.mine.lr", "fast"]),
    ("attack.grid={lr: 0.1}", ["attack.grid"]),
    # values out of range: how, tests/test_ranges.py
    ("method.rounds=0", ["method.rounds", "0", ">= 1"]),
    ("method.fts_lr=.nan", ["method.fts_lr", "nan", "> 0"]),
    ("method.suppression_timesteps=1.01", ["method.suppression_timesteps", "1.01", "<= 1"]),
    ("method.engine=third_order", ["method.engine", "third_order", "second_order"]),
    ("guard.growth=0.5", ["guard.growth", "0.5", ">= 1"]),
    ("task.sample_steps=0", ["task.sample_steps", "0"]),
    ("amp=half", ["amp", "half", "cuda"]),
    ("threads=-1", ["threads", "-1"]),
    ("pretrain.ema=1", ["pretrain.ema", "1", "< 1"]),
    ("pretrain.optimizer=lion", ["pretrain.optimizer", "lion", "adamw"]),
    ("pretrain.scope=lora", ["pretrain", "lora"]),
    ("attack.strategies.mine={optimizer: lion}", ["attack.strategies.mine.optimizer", "lion"]),
    ("attack.search.mine={trials: 0, optimizers: {sgd: [0.1, 0.2]}}", ["attack.search.mine.trials", "0"]),
    ("attack.search.mine={}", ["attack.search.mine.optimizers", "empty"]),
    ("attack.masking.heads=[bald]", ["attack.masking.heads[0]", "bald", "probed"]),
    ("attack.frechet_samples=1", ["attack.frechet_samples", "at least 2"]),
    ("attack.shard=1", ["attack.shard", "0 to 0"]),
    ("method.pool={}", ["method.pool"]),
    *((f"name={name}", ["name", "names a folder"]) for name in ("''", "a/b", "../a", ".a")),
    *((f"{key}=''", [key, "give a path"]) for key in ("run_dir", "checkpoint", "reference", "domain.original.root")),
]  # fmt: skip


@pytest.mark.parametrize(("assignment", "words"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_wrong_is_refused_by_its_key(assignment: str, words: list[str], composed: DictConfig) -> None:
    data: Any = OmegaConf.create(OmegaConf.to_container(composed))  # untyped, as a key that was added with `+`
    key, value = assignment.split("=", 1)
    OmegaConf.update(data, key, yaml.safe_load(value), force_add=True)
    with pytest.raises(UserError) as caught:
        from_omegaconf(data)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_model_that_is_named_only_has_no_arguments_of_another() -> None:
    config = from_omegaconf(compose("model=own", "model.architecture=resnet18"))
    assert config.model == ModelConfig(architecture="resnet18")
