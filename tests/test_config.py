"""Everything that conf/ ships composes, means something and runs; everything else is refused by name."""

from __future__ import annotations

import copy
import dataclasses
import operator
import re
from collections.abc import Iterator
from typing import Any

import hydra
import pytest
import torch
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sophon import config as config_module
from sophon.api.common import task_of
from sophon.attacker import SCHEDULES, FineTuneStrategy
from sophon.audit.plan import strategies
from sophon.cli.groups import conf_dir
from sophon.config import Config, TaskConfig, plain
from sophon.devices import resolve_device
from sophon.domains import SOURCES
from sophon.domains.batches import AUGMENTATIONS
from sophon.domains.bundled import BUNDLED
from sophon.domains.torchvision_sets import TORCHVISION
from sophon.errors import UserError
from sophon.losses import DENOISING_SUPPRESSION_LOSSES, SUPPRESSION_LOSSES
from sophon.models import ModelSpec, build, classifiers, diffusion
from sophon.protect.fts import ENGINES
from sophon.protect.inner_loop import GAMMAS
from sophon.sampler import StrategySampler
from sophon.tasks import TASKS, make_task
from sophon.tracking import MODES
from sophon.validation import from_omegaconf, validate

CONF = conf_dir()
MODELS = ("caformer_m36", "resnet50", "resnet34", "resnet18", "vgg13_bn")
RESTRICTED = ("cifar10", "cinic10", "stl10", "mnist", "svhn")
CLASSES = tuple("abcde")
LOSSES = {"classification": SUPPRESSION_LOSSES, "denoising": DENOISING_SUPPRESSION_LOSSES}


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml") if path.stem != "own")


GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir())


@pytest.fixture(autouse=True, scope="module")
def _initialised() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def compose(*overrides: str, verb: str = "protect") -> DictConfig:
    return hydra.compose("config", overrides=[*overrides, f"verb={verb}"])


def typed(*overrides: str) -> Config:
    return from_omegaconf(compose(*overrides))


@pytest.fixture(scope="module")
def shipped() -> DictConfig:
    return compose()


@pytest.fixture(scope="module")
def usual(shipped: DictConfig) -> Config:
    return from_omegaconf(shipped)


def changed(shipped: DictConfig, assignment: str) -> Config:
    """Do without Hydra what ``++key=value`` does: composing takes ten times as long."""
    config = copy.deepcopy(shipped)
    key, value = assignment.split("=", 1)
    OmegaConf.update(config, key, yaml.safe_load(value), force_add=True)
    return from_omegaconf(config)


def check(config: Config) -> None:
    """Make, as far as that needs no data, everything that a configuration names."""
    assert config.task.name in TASKS
    assert config.tracking.wandb in MODES
    for domain in (config.domain.original, *config.domain.restricted.values()):
        assert domain.source in SOURCES
        known = {"bundled": BUNDLED, "torchvision": TORCHVISION, "imagefolder": ("",)}[domain.source]
        assert domain.dataset in known
        assert not domain.download
        if domain.source == "bundled" and domain.classes is not None:
            assert set(domain.classes) <= set(BUNDLED[domain.dataset].classes)
    assert any(config.method.suppression_loss in losses for losses in LOSSES.values())
    assert config.method.engine in ENGINES
    assert config.method.gamma in GAMMAS
    assert config.method.ntr_augmentation in AUGMENTATIONS
    assert config.pretrain.augmentation in AUGMENTATIONS
    assert config.pretrain.head == "kept"
    sampler = StrategySampler(config.sampler)
    sampler.sample(torch.Generator().manual_seed(0)).validate("sampled")
    assert set(sampler.support()["augmentation"]) <= set(AUGMENTATIONS)
    for strategy in strategies(config.attack).values():
        assert strategy.augmentation in AUGMENTATIONS
    resolve_device(config.device)


def check_model(config: Config) -> ModelSpec:
    kind = diffusion if config.model.library in diffusion.LIBRARIES else classifiers
    spec = kind.spec_from_config(config.model, CLASSES)
    shape = (2, spec.channels, spec.image_size, spec.image_size)
    with torch.device("meta"):
        model = build(spec).eval()
        if kind is diffusion:
            assert model(torch.empty(shape), torch.zeros(2)).sample.shape == shape
        else:
            assert model(torch.empty(shape)).shape == (2, len(CLASSES))
    assert not config.model.pretrained
    return spec


# ---- what is shipped ------------------------------------------------------------------------------------------------


def test_the_groups_are_those_of_the_schema() -> None:
    fields = {field.name for field in dataclasses.fields(Config)}
    assert set(GROUPS) <= fields | {"experiment"}
    assert all(options(group) for group in GROUPS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group", "option"),
    # domains and experiments have tests of their own
    [(group, option) for group in GROUPS if group not in ("domain", "experiment") for option in options(group)],
)
def test_every_option_composes(group: str, option: str) -> None:
    config = typed(f"{group}={option}")
    check(config)
    if group == "model":
        check_model(config)


@pytest.mark.slow
@pytest.mark.parametrize("option", options("domain"))
def test_every_domain_composes_in_both_roles(option: str) -> None:
    config = typed(f"domain@domain.original={option}", f"domain@domain.restricted={option}")
    check(config)
    assert config.domain.restricted == {option: config.domain.original}
    assert config.domain.original.name == option


@pytest.mark.slow
@pytest.mark.parametrize("option", options("experiment"))
def test_every_experiment_names_itself_and_its_parts(option: str) -> None:
    config = typed(f"experiment={option}")
    check(config)
    spec = check_model(config)
    task = make_task(config, spec, amp=False, protects=True)
    assert config.guard.relative is not task.metric.higher_is_better, "errors in percent, accuracies in points"
    assert config.name.startswith(option)
    assert config.domain.original not in config.domain.restricted.values()


def test_without_an_experiment_the_defaults_are_whole() -> None:
    config = typed()
    check(config)
    check_model(config)
    assert config.name == "default"
    assert config.run_dir is config.reference is config.checkpoint is config.out is None


def test_the_composed_configuration_is_plain_data_that_composes_again() -> None:
    config = typed("experiment=quickstart")
    again = from_omegaconf(DictConfig(plain(config)))
    assert again == config


@pytest.mark.parametrize("task", options("task"))
def test_every_task_has_a_file_of_its_name(task: str) -> None:
    assert set(options("task")) == set(TASKS)
    config = typed(f"task={task}")
    assert config.task == TaskConfig(name=task)


def test_every_suppression_loss_has_a_method() -> None:
    methods = {option: yaml.safe_load((CONF / "method" / f"{option}.yaml").read_text()) for option in options("method")}
    assert all(values["name"] == option for option, values in methods.items())
    shipped_losses = [values["suppression_loss"] for values in methods.values()]
    assert set(shipped_losses) == {name for losses in LOSSES.values() for name in losses}


@pytest.mark.slow
@pytest.mark.parametrize("option", [option for option in options("model") if option.startswith("unet")])
def test_every_unet_makes_a_denoising_task(option: str) -> None:
    composed = compose("task=denoising", "method=sophon_dos", f"model={option}")
    for assignment in ("seed=0", "model.class_conditional=true", "model.scheduler.prediction_type=v_prediction"):
        config = changed(composed, assignment)
        spec = diffusion.spec_from_config(config.model, CLASSES)
        task = make_task(config, spec, amp=False, protects=True)
        assert task.metric.name == "eps-MSE"
        assert spec.scheduler["num_train_timesteps"] == 1000
        assert spec.model_args.get("num_class_embeds") == (5 if "class" in assignment else None)
        assert spec.scheduler["prediction_type"] == ("v_prediction" if "v_" in assignment else "epsilon")
        assert str(spec.image_size) in option


def test_the_unet_of_the_paper_has_36_million_parameters() -> None:
    spec = diffusion.spec_from_config(typed("model=unet32").model, CLASSES)
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in build(spec).parameters()) == 35_746_307


def test_guards_measure_in_points_or_in_percent() -> None:
    assert {option: typed(f"guard={option}").guard.relative for option in options("guard")} == {
        "annealed": True,
        "points": False,
        "relative": True,
    }


@pytest.mark.slow
def test_the_papers_matrix() -> None:
    names = {}
    for model in MODELS:
        for restricted in RESTRICTED:
            # not typed, which takes as long again: each part of it is, with every option
            config = compose("experiment=paper", f"model={model}", f"domain@domain.restricted={restricted}")
            assert config.model.architecture == model
            assert config.model.image_size == 64
            assert config.domain.original.name == "imagenette"
            assert config.domain.restricted.name == restricted
            assert {model, restricted} <= set(re.split(r"paper_|_(?=[a-z0-9]+$)", config.name))
            names[config.name] = (model, restricted)
    assert len(names) == 25


def test_the_papers_attacks_are_three_ways_with_five_optimizers() -> None:
    found = strategies(typed("experiment=paper").attack).values()
    assert {(s.head, s.scope) for s in found} == {("fresh", "all"), ("fresh", "head"), ("kept", "all")}
    assert len({s.optimizer for s in found}) == 5
    assert len(found) == 3 * 5 * 5 * 5


def test_the_simulated_attacker_of_the_paper_is_one() -> None:
    support = StrategySampler(typed("experiment=paper").sampler).support()
    assert support["optimizer"] == {"sgd": [1e-4, 1e-4]}
    assert support["head"] == ["kept"]


# ---- the schema -----------------------------------------------------------------------------------------------------


def test_a_strategy_in_the_configuration_has_exactly_the_strategys_fields() -> None:
    def described(kind: Any) -> list[tuple[str, object]]:
        return [(field.name, field.default) for field in dataclasses.fields(kind) if field.name != "surgery"]

    assert described(config_module.StrategyConfig) == described(FineTuneStrategy)
    # operations are lists of mappings in a configuration
    assert vars(config_module.StrategyConfig()) == FineTuneStrategy().plain()


def test_strategies_arrive_as_frozen_strategies() -> None:
    config = typed("pretrain.lr=0.5", "+attack.strategies.mine={lr: 0.25}")
    assert config.pretrain == dataclasses.replace(config.pretrain, lr=0.5)
    assert isinstance(config.pretrain, FineTuneStrategy)
    assert config.attack.strategies["mine"] == FineTuneStrategy(lr=0.25)


# ---- what is refused ------------------------------------------------------------------------------------------------

Refusal = (HydraException, OmegaConfBaseException, UserError)


def refusal(*overrides: str, shipped: DictConfig | None = None) -> str:
    """Return the message with which a configuration is refused, its causes included."""
    with pytest.raises(Refusal) as caught:
        typed(*overrides) if shipped is None else changed(shipped, *overrides)
    error, text = caught.value, ""
    if isinstance(error, UserError):
        assert "\n" not in str(error)
    while error is not None:
        text += f"{error}\n"
        error = error.__cause__
    return text


@pytest.mark.parametrize(
    "key", ["foo", "method.foo", "domain.original.foo", "pretrain.foo", "sampler.foo", "model.foo"]
)
@pytest.mark.parametrize("sign", ["", pytest.param("+", marks=pytest.mark.slow), "++"])
def test_an_unknown_key_is_refused_by_name(key: str, sign: str) -> None:
    assert "foo" in refusal(f"{sign}{key}=1")


def test_an_unknown_key_of_an_attack_is_refused_by_name() -> None:
    message = refusal("+attack.strategies.mine={foo: 1}")
    assert "foo" in message


@pytest.mark.parametrize("group", [group for group in GROUPS if group != "domain"])
def test_an_unknown_option_is_answered_with_those_that_exist(group: str) -> None:
    message = refusal(f"{group}=nope")
    assert all(name in message for name in ("nope", *options(group)))


@pytest.mark.parametrize("key", ["model.architecture", "method.name", "domain.original.source", "name"])
def test_a_missing_value_is_refused_by_name(key: str) -> None:
    assert key in refusal(f"{key}=???")


@pytest.mark.parametrize(
    "override",
    [
        "seed=1.5",
        "seed=null",
        "method.rounds=many",
        "method.rounds=[1]",
        "method.pool=1.5",
        "method.segment=null",
        "method.window=1.5",
        "method.chunk=null",
        "method.schedule=null",
        "method.fts_original_weight=much",
        "method.suppression_timesteps=[0.4]",
        "guard.patience=1.5",
        "method.fts_lr=fast",
        "domain.original.download=perhaps",
        "domain.original.classes=3",
        "model.mean=[dark]",
        "model=[]",
        "guard=3",
        "sampler.steps=20",
        "sampler.optimizers={sgd: fast}",
        "pretrain.steps=1.5",
        "attack.strategies=3",
        "attack.strategies.mine=3",
        "attack.strategies.mine={lr: fast}",
        "attack.grid={lr: 0.1}",
        "task=denoising",
        "task.sample_steps=many",
        "task.evaluation_images=null",
        "guard.relative=perhaps",
        "attack.samples=1.5",
        "attack.frechet_samples=null",
        "model.class_conditional=perhaps",
        "model.scheduler=3",
        "pretrain.ema=null",
        "n=all",
    ],
)
def test_a_value_of_the_wrong_type_is_refused(override: str, shipped: DictConfig) -> None:
    assert refusal(override, shipped=shipped)


CLAMP = ("curvature", "contract", "tail", "inverse")
OUT_OF_RANGE = [
    *(f"method.{name}=0" for name in ("rounds", "fts_steps", "attackers", "chunk", "query_every", "query_batch_size")),
    "method.ntr_batch_size=0",
    *(f"method.segment={value}" for value in (0, -1)),
    "method.window=-1",
    *(f"method.{name}=-1" for name in ("ntr_steps", "probe_steps", "distillation", "fts_original_weight", "pool")),
    *(
        f"method.{name}={value}"
        for name in ("fts_lr", "ntr_lr", "probe_lr", "temperature")
        for value in (0, ".nan", ".inf")
    ),
    "method.distillation=.nan",
    *(f"method.{name}=-1" for name in ("suppression_weight", "sharpness", "condition")),
    *(f"method.clamp.{name}=-1" for name in ("curvature", "contract", "tail", "inverse", "slack", "lipschitz")),
    *(f"method.clamp.{name}=0" for name in ("c_max", "probe_width", "probes")),
    *(f"method.clamp.c_limit={value}" for value in (0, 1, ".nan")),
    *(f"method.clamp.kappa_min={value}" for value in (".nan", ".inf")),
    "method.suppression_weight=0",
    "method.fixed_norms=row",
    *(f"method.gains=[{value}]" for value in (0, -1, ".nan", ".inf")),
    *(f"method.fts_original_weight={value}" for value in (".nan", ".inf")),
    *(f"method.suppression_timesteps={value}" for value in (0, -0.4, 1.01, 20, ".nan", ".inf")),
    "method.schedule=weekly",
    "method.fts_max_norm=0",
    "method.engine=third_order",
    "method.gamma=best",
    "guard.every=0",
    *(f"guard.{name}=-1" for name in ("tolerance", "repair_steps", "patience", "max_ntr_steps")),
    "guard.tolerance=.nan",
    "guard.growth=0.5",
    "attack.seeds=0",
    "attack.eval_points=1",
    *(f"task.{name}={value}" for name in ("evaluation_images", "sample_steps") for value in (0, -1)),
    *(f"attack.samples={value}" for value in (-1, -16)),
    *(f"attack.frechet_samples={value}" for value in (1, -1)),
    "attack.masking.steps=-1",
    "attack.masking.batches=0",
    *(f"n={value}" for value in (0, -1)),
    "threads=-1",
    "amp=half",
    "pretrain.optimizer=lion",
    "pretrain.schedule=weekly",
    "pretrain.scope=half",
    "pretrain.head=none",
    "pretrain.steps=-1",
    *(f"pretrain.{name}=0" for name in ("lr", "batch_size", "probe_steps", "probe_lr", "data_budget")),
    "pretrain.lr=.nan",
    "pretrain.weight_decay=-1",
    *(f"pretrain.ema={value}" for value in (1, 1.5, -0.1, ".nan")),
]


def with_value(config: Any, key: str, value: Any) -> Any:
    """Return a copy of a typed configuration with another value; typing the whole anew takes a tenth of a second."""
    part, _, below = key.partition(".")
    if isinstance(config, dict):
        return {**config, part: with_value(config[part], below, value) if below else value}
    return dataclasses.replace(config, **{part: with_value(getattr(config, part), below, value) if below else value})


@pytest.mark.parametrize("override", OUT_OF_RANGE)
def test_a_value_outside_its_range_is_refused_before_anything_runs(override: str, usual: Config) -> None:
    key, value = override.split("=")
    with pytest.raises(UserError) as caught:
        validate(with_value(usual, key, yaml.safe_load(value)))
    message = str(caught.value)
    assert key in message
    assert value.strip("[].") in message
    assert "\n" not in message


@pytest.mark.parametrize(("amp", "devices"), [("none", []), ("cuda", ["cuda"]), ("all", ["cpu", "cuda"])])
def test_amp_says_on_which_devices(amp: str, devices: list[str], shipped: DictConfig) -> None:
    config = changed(shipped, f"amp={amp}")
    spec = check_model(config)
    assert [name for name in ("cpu", "cuda") if task_of(config, spec, torch.device(name)).amp] == devices


def test_a_head_start_to_measure_masking_from_is_one_that_attackers_have(shipped: DictConfig) -> None:
    message = refusal("attack.masking.heads=[fresh,bald]", shipped=shipped)
    assert all(word in message for word in ("attack.masking.heads", "bald", "kept", "probed"))


EDGES = {
    "task.evaluation_images": [1],
    "task.sample_steps": [1],
    "attack.samples": [0, 1],
    "attack.frechet_samples": [0, 2],
    "attack.masking.heads": [[], ["probed"]],
    "attack.masking.steps": [0],
    "n": [1],
    "amp": ["all", "cuda", "none"],
    "guard.relative": [True],
    "guard.tolerance": [0],
    "guard.patience": [0],
    "method.pool": [0, 1],
    "method.chunk": [1],
    "method.segment": [1],
    "method.window": [0, 1, None],
    "method.fts_original_weight": [0],
    "method.suppression_weight": [0.5],
    "method.sharpness": [0.1],
    "method.condition": [0.1],
    "method.clamp.kappa_min": [-2],
    "method.clamp.probes": [1],
    "method.fixed_norms": ["none", "layer", "channel"],
    "method.suppression_timesteps": [1, 0.001],
    "method.schedule": list(SCHEDULES),
    "pretrain.ema": [0, 0.999],
}


@pytest.mark.parametrize("turn", range(max(map(len, EDGES.values()))))
def test_the_edges_of_ranges_belong_to_them(turn: int, shipped: DictConfig) -> None:
    """All keys at once, each at its ``turn``-th edge."""
    edges = {key: values[turn] for key, values in EDGES.items() if turn < len(values)}
    composed = copy.deepcopy(shipped)
    for key, value in edges.items():
        OmegaConf.update(composed, key, value, force_add=True)
    config = from_omegaconf(composed)
    assert {key: operator.attrgetter(key)(config) for key in edges} == edges


def test_a_pool_needs_the_engine_whose_attackers_can_go_on(shipped: DictConfig) -> None:
    exact = copy.deepcopy(shipped)
    exact.method.engine = "second_order"
    assert changed(exact, "method.pool=0").method.engine == "second_order"
    assert "method.pool: 3 is not allowed with engine second_order" in refusal("method.pool=3", shipped=exact)


@pytest.mark.parametrize(
    "assignment", ["suppression_weight=0.5", "sharpness=0.1", "condition=1", *(f"clamp.{name}=1" for name in CLAMP)]
)
def test_what_is_asked_besides_suppression_needs_the_first_order(assignment: str, usual: Config) -> None:
    key, value = assignment.split("=")
    asked = with_value(usual, f"method.{key}", yaml.safe_load(value))
    assert asked.method.engine == "first_order"
    validate(asked)
    with pytest.raises(UserError, match="needs first_order") as caught:
        validate(with_value(asked, "method.engine", "second_order"))
    assert str(caught.value).startswith(f"method.{key.split('.')[0]}: ")


def test_suppression_may_be_left_out_where_something_else_is_asked(shipped: DictConfig) -> None:
    besides = copy.deepcopy(shipped)
    besides.method.condition = 1
    assert changed(besides, "method.suppression_weight=0").method.condition == 1


@pytest.mark.parametrize("name", ["''", "a/b", "../a", ".a", "/a"])
def test_a_name_that_is_no_folder_is_refused(name: str, shipped: DictConfig) -> None:
    assert refusal(f"name={name}", shipped=shipped).startswith("name: ")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("sampler.optimizers={sgd: null, momentum: null, nesterov: null, adam: null, adamw: null, adagrad: null, "
         "adadelta: null, rmsprop: null}", "sampler.optimizers"),
        ("sampler.optimizers.lion=[0.1,0.2]", "lion"),
        ("sampler.optimizers.sgd=[0.2,0.1]", "sampler.optimizers.sgd"),
        ("sampler.optimizers.sgd=[0,0.1]", "sampler.optimizers.sgd"),
        ("sampler.optimizers.sgd=[0.1]", "sampler.optimizers.sgd"),
        ("sampler.optimizers.sgd=[.nan,0.1]", "sampler.optimizers.sgd"),
        ("sampler.optimizers.sgd=[0.1,.inf]", "sampler.optimizers.sgd"),
        ("sampler.steps=[3,2]", "sampler.steps"),
        ("sampler.steps=[0,2]", "sampler.steps"),
        ("sampler.heads=[]", "sampler.heads"),
        ("sampler.heads=[lost]", "lost"),
        ("sampler.scopes=[some]", "some"),
        ("sampler.schedules=[weekly]", "weekly"),
        ("sampler.batch_sizes=[0]", "sampler.batch_size"),
        ("sampler.weight_decays=[-1]", "sampler.weight_decay"),
    ],
)  # fmt: skip
def test_a_sampler_that_cannot_sample_is_refused(override: str, key: str, usual: Config) -> None:
    given, value = override.split("=", 1)
    with pytest.raises(UserError) as caught:
        StrategySampler(with_value(usual, given, yaml.safe_load(value)).sampler)
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("attack.grid.foo=[1]", "foo"),
        ("attack.grid.optimizer=[lion]", "lion"),
        ("attack.grid.lr=[-1]", "lr"),
        ("attack.grid.lr=[fast]", "lr"),
        ("attack.grid.steps=[1.5]", "steps"),
        ("attack.grid.head=[]", "grid"),
        ("attack.grid.way=[{head: kept}]", "has no name"),
        ("attack.grid.way=[{name: 3, head: kept}]", "has no name"),
        ("attack.grid.way=[{name: direct, neck: kept}]", "neck"),
        ("attack.grid={way: [{name: direct, head: kept}], head: [fresh]}", "'head', as does another list"),
        ("attack.strategies.mine={optimizer: lion}", "lion"),
    ],
)
def test_an_attack_that_cannot_run_is_refused(override: str, key: str, shipped: DictConfig) -> None:
    with pytest.raises(UserError) as caught:
        strategies(changed(shipped, override).attack)
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)
