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
from sophon.auditing.attacks import Outcome
from sophon.auditing.runner import Frechet
from sophon.auditing.words import ROLES
from sophon.auditing.workers import run_jobs
from sophon.config import AttackConfig
from sophon.domains import Batch, ImageSet, LoadedDomain
from sophon.models import adapt
from sophon.tasks import ClassificationTask
from sophon.tracking import Tracker
from tests.auditing.staging import (
    BENIGN,
    CONFIG,
    DISTILLED,
    FRESH,
    KEPT,
    RESTRICTED,
    Drawing,
    attempts_of,
    results,
    run_all,
    scene,
    staged,
)
from tests.models.own import Tokens
from tests.tiny import tiny_model, tiny_net, tiny_spec, tiny_task


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


def test_without_a_support_all_is_held_out(tmp_path: Path) -> None:
    records = attempts_of(staged(tmp_path, replace(CONFIG, seeds=1), support=None))
    assert {(record["exposure"], tuple(record["outside"])) for record in records} == {("held_out", ())}


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


@pytest.mark.slow  # two audits
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


HEALED = replace(FRESH, surgery=(Operation("heal", (("domain", "benign"), ("steps", 2))),))
NAMED = AttackConfig(benign=["fresh"], frechet_samples=3, strategies={"fresh": FRESH, "healed": HEALED})
OTHER = LoadedDomain("other", BENIGN.classes, BENIGN.splits, {"attack": "another hash"})


def another_model(role: str) -> dict[str, Any]:
    return {"provenance": {**scene().provenance, role: "another"}}


@pytest.mark.parametrize(
    ("changes", "settings", "renamed"),
    [
        *((another_model(role), {}, lambda job, role=role: job.role == role) for role in ROLES),
        ({"benign": OTHER}, {}, lambda job: job.domain == "benign" or job.attack == "healed"),
        ({"original": OTHER}, {}, lambda job: job.attack == "healed"),
        ({"frechet": Frechet("other", lambda images: 0.0)}, {}, lambda job: True),
        ({"frechet": None}, {}, lambda job: True),
        ({}, {"frechet_samples": 4}, lambda job: True),
        ({}, {"seeds": 2}, lambda job: False),
    ],
    ids=[*ROLES, "benign domain", "original domain", "features", "no distance", "more samples", "more seeds"],
)
def test_only_what_would_come_out_differently_has_another_name(
    changes: dict[str, Any], settings: dict[str, Any], renamed: Callable[[Any], bool], tmp_path: Path
) -> None:
    """What has the same name is not run again, and is taken over from other audits."""

    def named(config: AttackConfig, **changes: Any) -> dict[str, Any]:
        usual = {"benign": BENIGN, "frechet": Frechet("pixels", lambda images: 0.0)}
        return {path.name: job for path, job in staged(tmp_path, config, **(usual | changes)).jobs.items()}

    before, after = named(NAMED), named(replace(NAMED, **settings), **changes)
    assert {name for name, job in before.items() if renamed(job)} == before.keys() - after.keys()
    assert len(after) == len(before) * settings.get("seeds", 1)


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


# --- the benign domain, the oracle, shards ------------------------------------------------------------------------


class Watching(ClassificationTask):
    """Remembers which images it trained on, attempt by attempt, and which it measured."""

    def __init__(self) -> None:
        super().__init__(tiny_spec(), dtype=torch.float64)
        self.trained: list[set[bytes]] = [set()]
        self.measured: list[str] = []
        self.first: Tensor | None = None  # weights of the first model that it measured

    def attacker_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        self.trained[-1] |= {image.numpy().tobytes() for image in batch.images}
        return super().attacker_loss(model, batch)

    def evaluate(self, model: nn.Module, images: ImageSet) -> float:
        self.measured.append(images.sha256())
        self.first = model.conv1.weight.detach().clone() if self.first is None else self.first
        return super().evaluate(model, images)

    def details(self, model: nn.Module, images: ImageSet) -> dict[str, float]:
        self.trained.append(set())  # the last that an attempt asks for
        return super().details(model, images)


def pixels(*parts: ImageSet) -> set[bytes]:
    return {image.numpy().tobytes() for part in parts for image in part.images}


def test_benign_attempts_run_on_the_benign_domain(tmp_path: Path) -> None:
    task = Watching()
    config = AttackConfig(eval_points=2, strategies={"a": FRESH, "b": KEPT}, benign=["a"], roles=["protected"])
    stage = staged(tmp_path, config, benign=BENIGN, task=task)
    task.trained[:] = [set()]  # to see whether attacks fit, two images of each domain are looked at
    records = attempts_of(stage)
    assert [(record["attack"], record["domain"]) for record in records] == [
        *(("b", "restricted"), ("a", "restricted"), ("a", "benign"))
    ]
    assert task.trained[0] | task.trained[1] <= pixels(RESTRICTED["attack"])
    assert task.trained[2] <= pixels(BENIGN["attack"])
    assert task.measured[6:] == [BENIGN.hashes["select"]] * 2 + [BENIGN.hashes["test"]]


def test_the_oracle_is_the_unprotected_model_with_all_data_for_as_many_epochs(tmp_path: Path) -> None:
    task, plan = Watching(), replace(KEPT, batch_size=36)
    config = AttackConfig(eval_points=2, strategies={"a": plan}, oracle="a", roles=["unprotected", "protected"])
    stage = staged(tmp_path, config, task=task)
    oracle, protected, unprotected = attempts_of(stage)
    assert [r["role"] for r in (oracle, protected, unprotected)] == ["oracle", "protected", "unprotected"]
    assert oracle["data_ratio"] == 3.0
    assert oracle["steps"] == oracle["strategy"]["steps"] == oracle["curve"][-1]["step"] == 18
    assert oracle["strategy"]["data_budget"] == 108
    assert task.trained[0] == pixels(*(RESTRICTED[split] for split in ("attack", "adapt", "query")))
    assert task.trained[1] == task.trained[2] == pixels(RESTRICTED["attack"])
    assert set(task.measured) == {RESTRICTED.hashes["select"], RESTRICTED.hashes["test"]}
    assert task.first is not None
    assert torch.equal(task.first, stage.scene.models["unprotected"].conv1.weight)


def test_more_shards_than_jobs(tmp_path: Path) -> None:
    config = AttackConfig(roles=["protected"], strategies={"a": FRESH}, shards=3, shard=2)
    stage = staged(tmp_path, config)
    run_jobs(stage, lambda: stage, 4, Tracker())
    assert not (tmp_path / "attempts").exists()


# --- pictures -----------------------------------------------------------------------------------------------------


def test_the_first_seed_of_every_role_is_drawn_from_the_same_noise(tmp_path: Path) -> None:
    task = Drawing()
    config = AttackConfig(seeds=2, eval_points=3, samples=2, strategies={"a": KEPT})
    for record in attempts_of(staged(tmp_path, config, task=task)):
        points = [0, 3, 6] if record["seed"] == 0 else []
        assert record["samples"] == [{"step": step, "file": f"samples/{record['id']}-{step}.png"} for step in points]
        assert all((tmp_path / sample["file"]).read_bytes()[1:4] == b"PNG" for sample in record["samples"])
    assert len(task.seeds) == 9
    assert len(set(task.seeds)) == 1


def test_what_does_not_generate_is_not_drawn(tmp_path: Path) -> None:
    config = AttackConfig(eval_points=2, samples=1, roles=["protected"], strategies={"a": FRESH})
    [record] = attempts_of(staged(tmp_path, config))
    assert record["samples"] == []
    assert not (tmp_path / "samples").exists()


def test_what_is_drawn_and_looked_at_is_the_model_that_the_attack_ended_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Distilling hands back another model than the released one."""
    outcomes: list[Outcome] = []
    genuine = module.attack
    monkeypatch.setattr(module, "attack", lambda *rest, **more: outcomes.append(genuine(*rest, **more)) or outcomes[-1])
    config = AttackConfig(eval_points=2, samples=1, frechet_samples=2, roles=["protected"], strategies={"a": DISTILLED})
    task, frechet = Drawing(), Frechet("pixels", lambda images: float(len(images)))
    [record] = attempts_of(staged(tmp_path, config, frechet=frechet, task=task))
    assert [id(model) for model in task.models] == [id(outcomes[0].model)] * 3  # two points, and for the distance
    expected = tiny_task().details(outcomes[0].model, RESTRICTED["test"])
    assert record["details"] == expected | {"Frechet distance": 2.0}
