"""Attempts that are trained together: the outcomes of each by itself, who goes with whom, and how an audit does it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sophon.audit import plan
from sophon.audit.attacks import Attacker, Outcome, attack
from sophon.audit.plan import Attempt, Job, Search
from sophon.audit.runner import Frechet, Runner
from sophon.audit.stacked import attack_together, grouped, likeness
from sophon.audit.workers import run_jobs
from sophon.config import AttackConfig, Config, DomainConfig, MethodConfig, ModelConfig
from sophon.errors import UserError
from sophon.files import read_json
from sophon.run_folder import run_folder
from sophon.strategies import OPTIMIZERS, FineTuneStrategy, Operation
from sophon.tracking import Tracker
from sophon.validation import validate
from sophon.verbs import auditing
from tests.audit.staging import (
    BENIGN,
    CONFIG,
    FRESH,
    KEPT,
    RESTRICTED,
    SEARCH,
    attempts_of,
    count_attacks,
    in_worker,
    refuse,
    results,
    scene,
    staged,
)
from tests.tiny import (
    CLASSES,
    TinyNet,
    state_of,
    tiny_denoising,
    tiny_model,
    tiny_spec,
    tiny_task,
    tiny_unet,
    tiny_unet_spec,
)

pytestmark = pytest.mark.usefixtures("buildable")

PLAN = FineTuneStrategy(optimizer="adam", lr=0.02, batch_size=8, steps=4, head="kept")
LIMIT = {"rtol": 1e-9, "atol": 1e-9, "equal_nan": True}


def launch(how: Any, strategy: FineTuneStrategy, seed: int, model: nn.Module | None = None, **options: Any) -> Any:
    """Set ``how``, `attack` or `Attacker`, on a model of its own for each seed."""
    model = tiny_model(seed) if model is None else copy.deepcopy(model)
    usual: dict[str, Any] = {"spec": tiny_spec(), "seed": seed, "eval_points": 3}
    return how(model, strategy, options.pop("task", tiny_task()), RESTRICTED, **usual | options)


def together(strategies: Sequence[FineTuneStrategy], **options: Any) -> list[Outcome] | None:
    return attack_together([partial(launch, Attacker, each, seed, **options) for seed, each in enumerate(strategies)])


def assert_as_alone(strategies: Sequence[FineTuneStrategy], **options: Any) -> list[Outcome]:
    outcomes = together(strategies, **options)
    assert outcomes is not None
    for seed, (strategy, outcome) in enumerate(zip(strategies, outcomes, strict=True)):
        alone = launch(attack, strategy, seed, **options)
        assert (outcome.curve, outcome.test, outcome.finished) == (alone.curve, alone.test, alone.finished)
        assert (outcome.flops, outcome.prepared_flops) == (alone.flops, alone.prepared_flops)
        assert (outcome.stacked, alone.stacked) == (len(strategies), 1)
        torch.testing.assert_close(dict(outcome.model.state_dict()), dict(alone.model.state_dict()), **LIMIT)
    return outcomes


# --- the same as alone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer(optimizer: str) -> None:
    assert_as_alone([replace(PLAN, optimizer=optimizer, lr=lr, weight_decay=1e-3) for lr in (0.01, 0.05)])


def test_each_has_its_own_optimizer_rate_schedule_clipping_average_head_images_and_augmentation() -> None:
    outcomes = assert_as_alone(
        [
            PLAN,
            replace(PLAN, optimizer="momentum", lr=0.1, schedule="cosine", augmentation="standard", head="fresh"),
            replace(PLAN, optimizer="sgd", lr=0.5, max_norm=0.01, augmentation="strong", head="probed", probe_steps=2),
            replace(PLAN, schedule="warmup_cosine", weight_decay=0.1, ema=0.9, data_budget=9, augmentation="crop"),
        ]
    )
    assert [step for step, _ in outcomes[0].curve] == [0, 2, 4]


@pytest.mark.parametrize("batch_norm", ["trained", "frozen", "restated"])
@pytest.mark.parametrize("scope", ["all", "head", "first_blocks", "last_blocks"])
def test_scopes_and_batch_norm(scope: str, batch_norm: str) -> None:
    strategy = replace(PLAN, scope=scope, batch_norm=batch_norm, weight_decay=0.1)
    for seed, outcome in enumerate(assert_as_alone([strategy] * 2)):
        before, after = state_of(tiny_model(seed)), state_of(outcome.model)
        changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
        follows = batch_norm == "restated" or (scope != "head" and batch_norm == "trained")
        assert ("bn1.running_var" in changed, "bn2.num_batches_tracked" in changed) == (follows, follows)
        assert {"fc.weight", "fc.bias"} <= changed
        assert ("conv1.weight" in changed) == (scope in ("all", "first_blocks"))


def test_surgery() -> None:
    operations = [(Operation("noise", (("scale", scale),)), Operation("reinitialise")) for scale in (0.1, 0.5)]
    assert_as_alone([replace(PLAN, surgery=each) for each in operations], original=BENIGN, benign=BENIGN)


class Spare(TinyNet):
    """Has a layer that its output does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv3 = nn.Conv2d(4, 4, 1)


def test_what_the_loss_does_not_depend_on_is_left_alone() -> None:
    """No gradient is not a gradient of zero, which weight decay would add to."""
    model = Spare().double()
    for outcome in assert_as_alone([replace(PLAN, optimizer="sgd", weight_decay=0.5)] * 2, model=model):
        assert torch.equal(outcome.model.conv3.weight, model.conv3.weight)


def test_dropout_of_nothing_and_operations_in_place_can_be_stacked() -> None:
    model = tiny_model()
    model.fc = nn.Sequential(nn.Dropout(0.0), nn.ReLU(inplace=True), model.fc)
    assert_as_alone([PLAN] * 2, model=model)


@pytest.mark.parametrize("wild", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_one_whose_loss_diverges_ends_alone(wild: tuple[int, ...]) -> None:
    strategies = [replace(PLAN, steps=8)] * 3
    for index in wild:
        strategies[index] = replace(PLAN, steps=8, optimizer="sgd", lr=1e30, weight_decay=1e30)
    outcomes = assert_as_alone(strategies)
    assert [index for index, outcome in enumerate(outcomes) if not outcome.finished] == list(wild)
    assert all(outcomes[index].curve[-1][0] < 8 for index in wild)


def test_models_share_nothing_afterwards() -> None:
    one, other = together([PLAN] * 2) or ()
    before = state_of(other.model)
    with torch.no_grad():
        for tensor in (*one.model.parameters(), *one.model.buffers()):
            tensor.fill_(7)
    assert all(torch.equal(value, before[name]) for name, value in other.model.state_dict().items())


def test_time_is_shared_out() -> None:
    outcomes = together([PLAN] * 3)
    assert outcomes is not None
    assert len({outcome.seconds for outcome in outcomes}) == 1
    assert outcomes[0].seconds > 0


# --- what cannot be stacked ---------------------------------------------------------------------------------------


def test_dropout_is_not_stacked() -> None:
    model = tiny_model()
    model.fc = nn.Sequential(nn.Dropout(0.5), model.fc)
    assert together([PLAN] * 2, model=model) is None


def test_denoisers_are_not_stacked() -> None:
    assert together([PLAN] * 2, model=tiny_unet(), task=tiny_denoising(), spec=tiny_unet_spec()) is None


def test_models_that_are_not_built_alike_are_not_stacked() -> None:
    wider = TinyNet()
    wider.conv2, wider.bn2, wider.fc = nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(5), nn.Linear(5, len(CLASSES))
    other = tiny_model()
    other.bn1.momentum = 0.5  # the same tensors
    for model in (wider.double(), other):
        makers = [partial(launch, Attacker, PLAN, 0), partial(launch, Attacker, PLAN, 0, model=model)]
        assert attack_together(makers) is None


def test_too_much_for_the_device_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(self: Attacker, step: int) -> None:
        if step:
            raise torch.OutOfMemoryError("of 3 GiB")

    monkeypatch.setattr(Attacker, "measure", measure)
    with pytest.raises(UserError, match=r"^stack: 2 attempts do not fit in the device's memory together; give a small"):
        together([PLAN] * 2)


# --- groups -------------------------------------------------------------------------------------------------------

VARIED = st.builds(
    FineTuneStrategy,
    steps=st.sampled_from([0, 4, 6]),
    batch_size=st.sampled_from([8, 16]),
    scope=st.sampled_from(["all", "head", "lora", "last_blocks"]),
    blocks=st.sampled_from([1, 2]),
    lr=st.sampled_from([0.1, 0.2]),
    batch_norm=st.sampled_from(["trained", "frozen", "restated"]),
    surgery=st.sampled_from([(), (Operation("noise"),), (Operation("prune"),)]),
)
JOBS = st.one_of(
    st.builds(
        Attempt,
        attack=st.just("a"),
        strategy=VARIED,
        role=st.sampled_from(["protected", "scratch"]),
        seed=st.integers(0, 2),
        domain=st.sampled_from(["restricted", "benign"]),
        search=st.sampled_from([None, None, "tuned"]),
    ),
    st.just(Search("tuned", SEARCH, "protected")),
)
EQUAL = ("steps", "batch_size", "scope", "blocks", "batch_norm")


@given(jobs=st.lists(JOBS, max_size=30), most=st.integers(1, 5))
def test_every_job_is_in_one_group_with_its_like(jobs: list[Job], most: int) -> None:
    numbered = list(enumerate(jobs))
    groups = grouped(numbered, lambda item: likeness(item[1]), most)
    assert sorted(number for group in groups for number, _ in group) == list(range(len(jobs)))
    assert [group[0][0] for group in groups] == sorted(group[0][0] for group in groups)
    for group in groups:
        assert 1 <= len(group) <= most
        if len(group) > 1:
            attempts = [job for _, job in group if isinstance(job, Attempt) and job.search is None]
            assert len(attempts) == len(group)
            assert len({tuple(getattr(each.strategy, name) for name in EQUAL) for each in attempts}) == 1
            assert len({each.domain for each in attempts}) == 1
            assert attempts[0].strategy.scope != "lora"
            assert attempts[0].strategy.steps > 0
    short = [likeness(group[0][1]) for group in groups if len(group) < most]
    alike = [key for key in short if key is not None]
    assert len(alike) == len(set(alike))  # no two groups that could be one


# --- whole audits -------------------------------------------------------------------------------------------------

MIXED = replace(
    CONFIG,
    seeds=1,
    eval_points=2,
    roles=["protected", "scratch"],
    strategies={
        "a": FRESH,
        "b": replace(FRESH, optimizer="sgd", augmentation="strong"),
        "kept": KEPT,
        "lora": replace(FRESH, scope="lora", lora_rank=1),
    },
    benign=["a"],
)


def stacking(folder: Path, config: AttackConfig = MIXED, stack: int = 4, **changes: Any) -> Runner:
    return Runner(scene(benign=BENIGN, **changes), config, 0, folder, stack=stack)


def facts(record: dict[str, Any]) -> dict[str, Any]:
    own = ("id", "seconds", "stacked", "details")
    return {key: value for key, value in record.items() if key not in own}


def test_an_audit_writes_the_same_attempts_with_close_numbers(tmp_path: Path) -> None:
    alone, several = attempts_of(stacking(tmp_path / "one", stack=1)), attempts_of(stacking(tmp_path / "two"))
    assert [facts(record) for record in several] == [facts(record) for record in alone]
    for one, other in zip(alone, several, strict=True):
        assert one["stacked"] == 1
        assert other["details"] == pytest.approx(one["details"], rel=1e-9)
        assert (other["id"] == one["id"]) == (one["attack"] == "lora")
    counted = {(record["attack"], record["domain"]): record["stacked"] for record in several}
    alike = {("a", "restricted"): 4, ("b", "restricted"): 4}
    assert counted == {**alike, ("kept", "restricted"): 2, ("lora", "restricted"): 1, ("a", "benign"): 2}
    assert len(list((tmp_path / "two" / "attempts").iterdir())) == len(several) == 10


def test_it_goes_on_with_what_is_missing_in_new_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = attempts_of(stacking(tmp_path / "whole"))
    first = attempts_of(stacking(tmp_path / "parts"))
    gone = [record["id"] for record in first if record["attack"] == "b" or record["role"] == "scratch"]
    for name in gone:
        (tmp_path / "parts" / "attempts" / f"{name}.json").unlink()
    attacked = count_attacks(monkeypatch)
    second = attempts_of(stacking(tmp_path / "parts", stack=2))
    assert len(attacked) == 4  # kept, benign and lora on scratch, and one of three that are alike
    assert [facts(record) for record in second] == [facts(record) for record in whole]
    assert sorted(record["stacked"] for record in second if record["id"] in gone) == [1, 1, 1, 1, 2, 2]


def test_a_model_with_dropout_is_trained_one_by_one(tmp_path: Path) -> None:
    def dropping(seed: int) -> nn.Module:
        model = tiny_model(seed)
        model.bn2 = nn.Sequential(model.bn2, nn.Dropout(0.2))
        return model

    config = AttackConfig(seeds=2, eval_points=2, roles=["protected"], strategies={"a": FRESH})
    records = []
    for stack in (1, 2):
        models = {"protected": dropping(1), "unprotected": dropping(2)}
        records.append(attempts_of(stacking(tmp_path / str(stack), config, stack, models=models)))
    for one, other in zip(*(results(each) for each in records), strict=True):
        assert {**one, "id": ""} == {**other, "id": ""}  # to the bit


def test_nothing_is_taken_over_from_one_kind_to_the_other(tmp_path: Path) -> None:
    config = replace(MIXED, benign=[])
    attempts_of(stacking(tmp_path / "one", config, stack=1))
    attempts_of(stacking(tmp_path / "two", config, stack=2))
    for stack, other, expected in ((4, "one", 6), (4, "two", 0), (1, "two", 6), (1, "one", 0)):
        reusing = replace(config, reuse=[str(tmp_path / other)])
        assert len(stacking(tmp_path / f"{stack}{other}", reusing, stack).missing()) == expected


def test_a_run_directory_keeps_to_one_kind(tmp_path: Path) -> None:
    domain = DomainConfig("d", "bundled")
    stage: Any = SimpleNamespace(
        protected=SimpleNamespace(sha256="p"), reference=SimpleNamespace(sha256="r"), scene=scene()
    )

    def config(stack: int) -> Config:
        made = Config("audit", "x", stack=stack, model=ModelConfig(architecture="a"), method=MethodConfig("m"))
        made.domain.original, made.domain.restricted = domain, [domain]
        made.pretrain = made.attack.strategies["a"] = PLAN
        return made

    def opened(path: str, stack: int) -> None:
        with run_folder(tmp_path / path, "audit", auditing._identity(config(stack), stage)):
            pass

    for path, first, others in (("one", 1, (2,)), ("two", 2, (1,))):
        opened(path, first)
        for stack in others:
            with pytest.raises(UserError, match=r"was made with stack=.*; give another run_dir"):
                opened(path, stack)
    opened("two", 8)
    assert "stack" not in auditing._identity(config(1), stage)
    validate(config(1))
    for stack in (0, -1):
        with pytest.raises(UserError, match=f"^stack: {stack} is not allowed; it must be >= 1$"):
            validate(config(stack))


def test_how_images_are_measured_can_be_said_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without planning again, which takes long, and with the names that it would have had from the start."""
    frechet = Frechet("network", lambda images: 0.0)
    expected = staged(tmp_path, CONFIG, frechet=frechet).jobs
    stage = staged(tmp_path, CONFIG)
    before = set(stage.jobs)
    monkeypatch.setattr(plan, "unfit", None)
    stage.measure_with(frechet)
    assert list(stage.jobs) == list(expected)
    assert not before & set(stage.jobs)


# --- workers ------------------------------------------------------------------------------------------------------


class TwoAtOnce(Runner):
    """Trains two together in whatever process."""

    def __init__(self, made: Runner) -> None:
        vars(self).update(vars(made))
        self.stack = 2
        self.measure_with(None)


def stacking_worker(folder: Path) -> Runner:
    return TwoAtOnce(in_worker(folder, MIXED, refuse))


@pytest.mark.slow
def test_workers_take_groups(tmp_path: Path) -> None:
    run_jobs(stacking(tmp_path / "one", stack=2), partial(stacking_worker, tmp_path / "one"), 1, Tracker())
    run_jobs(stacking(tmp_path / "two", stack=2), partial(stacking_worker, tmp_path / "two"), 2, Tracker())
    one, two = ({path.name: read_json(path) for path in sorted((tmp_path / n).glob("*/*"))} for n in ("one", "two"))
    assert list(one) == list(two)
    assert results(list(one.values())) == results(list(two.values()))
    assert {record["stacked"] for record in two.values()} == {1, 2}


def cannot_begin(error: Exception) -> Runner:
    raise error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("checkpoint: gone"), "^checkpoint: gone$"),
        (
            MemoryError("of 3 GiB\nwhere it was"),
            r"^workers: a process could not begin \(MemoryError: of 3 GiB\); the same command goes on, and fewer "
            "workers need less$",
        ),
    ],
)
def test_a_worker_that_cannot_begin_is_one_line(
    error: Exception, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stage = staged(tmp_path)
    with pytest.raises(UserError, match=message):
        run_jobs(stage, partial(cannot_begin, error), 2, Tracker())
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())
