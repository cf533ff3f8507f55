"""The audit: how each attempt is recorded, what it may read, and what is run again; its plan is tested by itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sophon.attacker import FineTuneStrategy, Operation
from sophon.auditing import runner as module
from sophon.auditing.words import ROLES
from sophon.config import AttackConfig
from sophon.domains import Batch
from sophon.held_out import exposure
from sophon.models import adapt
from sophon.tasks import ClassificationTask
from tests.auditing.staging import (
    CONFIG,
    FRESH,
    KEPT,
    RESTRICTED,
    attempts_of,
    results,
    run_all,
    staged,
)
from tests.models.own import Tokens
from tests.tiny import assert_same_state, state_of, tiny_model, tiny_net, tiny_spec


class Watching(ClassificationTask):
    def __init__(self) -> None:
        super().__init__(tiny_spec(), dtype=torch.float64)
        self.trained: list[Batch] = []
        self.heads: list[Tensor] = []

    def attacker_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        self.trained.append(batch)
        self.heads.append(model.fc.weight.detach().clone())
        return super().attacker_loss(model, batch)


def test_records(tmp_path: Path) -> None:
    stage = staged(tmp_path)
    records, searches = run_all(stage)
    assert searches == []
    files = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "attempts").iterdir()}
    assert {record["id"]: record for record in records} == files
    assert [tmp_path / "attempts" / f"{record['id']}.json" for record in records] == list(stage.jobs)
    assert [(r["attack"], r["role"], r["seed"], r["domain"]) for r in records] == [
        (name, role, seed, "restricted") for name in ("kept", "fresh") for role in ROLES for seed in (0, 1)
    ]
    for record in records:
        assert record["schema_version"] == 2
        assert FineTuneStrategy.of(record["strategy"]) == {"fresh": FRESH, "kept": KEPT}[record["attack"]]
        assert record["steps"] == record["strategy"]["steps"]
        assert [point["step"] for point in record["curve"]] == [0, record["steps"] // 2, record["steps"]]
        assert record["metric"] == {"name": "accuracy", "unit": "%", "higher_is_better": True}
        assert 0 <= record["test"] <= 100
        assert record["finished"] is True
        assert record["flops"] > record["prepared_flops"] == 0
        assert record["search"] is None
        assert record["samples"] == []
        assert record["seconds"] > 0
        assert set(record["details"]) == {"cross-entropy"}
        assert "data_ratio" not in record
    assert {(r["attack"], r["exposure"], tuple(r["outside"])) for r in records} == {
        ("fresh", "seen", ()),
        ("kept", "longer", ("steps",)),
    }


@pytest.mark.parametrize(
    ("outside", "label"),
    [
        (None, "held_out"),
        ((), "seen"),
        (("steps",), "longer"),
        (("lr",), "held_out"),
        (("lr", "steps"), "held_out"),
    ],
)
def test_exposure(outside: tuple[str, ...] | None, label: str) -> None:
    assert exposure(outside) == label


def test_without_a_support_all_is_held_out(tmp_path: Path) -> None:
    records = attempts_of(staged(tmp_path, replace(CONFIG, seeds=1), support=None))
    assert {(record["exposure"], tuple(record["outside"])) for record in records} == {("held_out", ())}


def test_models_are_never_changed(tmp_path: Path) -> None:
    models: dict[str, nn.Module] = {"protected": tiny_model(1).train(), "unprotected": tiny_model(2).eval()}
    before = {role: state_of(model) for role, model in models.items()}
    config = replace(CONFIG, strategies={**CONFIG.strategies, "head": replace(FRESH, scope="head")})
    attempts_of(staged(tmp_path, config, models=models))
    for role, model in models.items():
        assert_same_state(model, before[role])
        assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert models["protected"].training
    assert not models["unprotected"].training


def test_roles_face_the_same_head_and_batches(tmp_path: Path) -> None:
    """Only the model differs; another seed changes them all."""
    task = Watching()
    plan = replace(FRESH, augmentation="strong", data_budget=24)
    runner = staged(tmp_path, AttackConfig(seeds=2, eval_points=2, strategies={"a": plan}), task=task)
    task.trained.clear()  # the plan has looked whether the attack fits
    task.heads.clear()
    attempts_of(runner)
    steps = plan.steps

    def counted(batch: Batch) -> bool:
        return len(batch.images) == plan.batch_size

    # each attempt counts its operations on one batch of its own before it trains
    assert len(task.trained) == 6 * (steps + 1)
    assert all(map(counted, task.trained))
    runs = [task.trained[at + 1 : at + steps + 1] for at in range(0, len(task.trained), steps + 1)]
    heads = task.heads[1 :: steps + 1]
    for seed in (0, 1):
        one, *others = runs[seed::2]
        for other in others:
            for mine, theirs in zip(one, other, strict=True):
                assert torch.equal(mine.images, theirs.images)
                assert torch.equal(mine.labels, theirs.labels)
        assert all(torch.equal(head, heads[seed]) for head in heads[seed::2])
    assert not torch.equal(heads[0], heads[1])
    assert not torch.equal(runs[0][0].images, runs[1][0].images)


def test_scratch_is_built_anew_from_the_attempts_seed(tmp_path: Path) -> None:
    weights: list[Tensor] = []

    def factory() -> nn.Module:
        model = tiny_net()
        weights.append(model.conv1.weight)
        return model

    spec = replace(tiny_spec(), factory=factory)
    config = AttackConfig(seeds=2, eval_points=2, strategies={"a": replace(FRESH, scope="head")})
    for name in ("one", "two"):
        attempts_of(staged(tmp_path / name, config, spec=spec))
        torch.manual_seed(99)
    assert len(weights) == 6  # of each audit the first only says that one can be built
    assert torch.equal(weights[1], weights[4])
    assert torch.equal(weights[2], weights[5])
    assert not torch.equal(weights[1], weights[2])


def test_without_anything_that_builds_the_model_scratch_is_left_out_and_said(tmp_path: Path) -> None:
    token = Tokens()
    spec = replace(adapt(token, channels=1, image_size=6, mean=[0.5], std=[0.25]).spec, classes=tiny_spec().classes)
    reborn = replace(FRESH, surgery=(Operation("reinitialise"),))
    config = AttackConfig(seeds=1, eval_points=2, strategies={"a": FRESH, "b": reborn})
    runner = staged(tmp_path, config, spec=spec)
    assert set(runner.plan.left_out) == {"b", "the scratch role"}
    assert {record["role"] for record in attempts_of(runner)} == {"protected", "unprotected"}


def test_same_seed_same_records(tmp_path: Path) -> None:
    config = replace(CONFIG, seeds=1)
    one, two, other = (
        results(attempts_of(staged(tmp_path / name, config, seed=seed)))
        for name, seed in (("one", 0), ("two", 0), ("other", 1))
    )
    assert one == two
    assert one != other


def test_goes_on_with_what_is_missing(tmp_path: Path, attacked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the middle of the third attempt, two are whole; the rest, and nothing else, is run later."""
    whole = results(attempts_of(staged(tmp_path / "whole")))
    assert len(attacked) == 12
    genuine: Callable[..., Any] = module.attack

    def stopping(*arguments: Any, **keywords: Any) -> Any:
        if len(attacked) == 14:
            raise KeyboardInterrupt
        return genuine(*arguments, **keywords)

    monkeypatch.setattr(module, "attack", stopping)
    with pytest.raises(KeyboardInterrupt):
        attempts_of(staged(tmp_path / "parts"))
    assert len(list((tmp_path / "parts" / "attempts").iterdir())) == 2
    monkeypatch.setattr(module, "attack", genuine)
    assert results(attempts_of(staged(tmp_path / "parts"))) == whole
    assert len(attacked) == 24
    assert results(attempts_of(staged(tmp_path / "parts"))) == whole
    assert len(attacked) == 24


@pytest.mark.parametrize("role", ROLES)
def test_another_model_of_a_role_is_attacked_anew_and_the_other_roles_are_not(
    role: str, tmp_path: Path, attacked: list[Any]
) -> None:
    config = replace(CONFIG, seeds=1)
    attempts_of(staged(tmp_path, config))
    given = staged(tmp_path, config).scene.provenance
    attempts_of(staged(tmp_path, config, provenance={**given, role: "another"}))
    assert len(attacked) == 6 + 2


def test_more_seeds_run_only_the_new_ones(tmp_path: Path, attacked: list[Any]) -> None:
    attempts_of(staged(tmp_path, replace(CONFIG, seeds=1)))
    first = len(attacked)
    assert len(attempts_of(staged(tmp_path, CONFIG))) == 12
    assert (first, len(attacked)) == (6, 12)


def test_seeds_differ_by_attack_and_seed_but_not_by_role(tmp_path: Path, attacked: list[Any]) -> None:
    attempts_of(staged(tmp_path))
    assert len({seed for _, seed in attacked}) == 4
    assert [seed for _, seed in attacked[0:2]] == [seed for _, seed in attacked[2:4]] == [s for _, s in attacked[4:6]]


def test_diverging_attack_is_a_record_like_any_other(tmp_path: Path) -> None:
    spec = replace(tiny_spec(), factory=lambda: tiny_net().float())
    wild = replace(FRESH, optimizer="nesterov", lr=1e38, steps=20)
    models: dict[str, nn.Module] = {"protected": tiny_model(1).float(), "unprotected": tiny_model(2).float()}
    config = AttackConfig(seeds=1, eval_points=5, strategies={"wild": wild})
    records = attempts_of(staged(tmp_path, config, task=ClassificationTask(spec), spec=spec, models=models))
    assert {record["role"] for record in records} == set(ROLES)
    for record in records:
        assert record["finished"] is False
        assert record["curve"][-1]["step"] < 20
        assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_an_attack_without_steps_is_the_released_model(tmp_path: Path) -> None:
    idle = replace(KEPT, steps=0)
    stage = staged(tmp_path, AttackConfig(seeds=1, strategies={"none": idle}))
    records = attempts_of(stage)
    assert [record["role"] for record in records] == list(ROLES)
    for record in records[:2]:
        model = stage.scene.models[record["role"]]
        assert record["test"] == stage.scene.task.evaluate(model, RESTRICTED["test"])
        select = stage.scene.task.evaluate(model, RESTRICTED["select"])
        assert record["curve"] == [{"step": 0, "select": select}]
        assert record["steps"] == record["flops"] == 0
