"""Benign attempts, the oracle, the pictures of what models generate, and the shards of an audit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sophon.auditing.runner import Frechet, with_more_data
from sophon.auditing.workers import run_jobs
from sophon.config import AttackConfig
from sophon.domains import Batch, ImageSet, LoadedDomain
from sophon.tasks import ClassificationTask
from sophon.tracking import Tracker
from tests.auditing.staging import (
    BENIGN,
    CONFIG,
    FRESH,
    KEPT,
    RESTRICTED,
    attempts_of,
    staged,
)
from tests.tiny import tiny_spec

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("buildable")]  # whole audits


# --- other domains and controls -----------------------------------------------------------------------------------


class Measuring(ClassificationTask):
    """Remembers which images it trained on and which it measured."""

    def __init__(self) -> None:
        super().__init__(tiny_spec(), dtype=torch.float64)
        self.trained: list[set[bytes]] = [set()]
        self.measured: list[str] = []
        self.first: Tensor | None = None

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
    task = Measuring()
    config = AttackConfig(
        seeds=1, eval_points=2, frechet_samples=2, strategies={"a": FRESH, "b": KEPT}, benign=["a"], roles=["protected"]
    )
    stage = staged(tmp_path, config, benign=BENIGN, task=task, frechet=Frechet("pixels", lambda images: 1.0))
    task.trained[:] = [set()]  # to see whether attacks fit, two images of each domain are looked at
    records = attempts_of(stage)
    assert [(record["attack"], record["domain"]) for record in records] == [
        *(("b", "restricted"), ("a", "restricted"), ("a", "benign"))
    ]
    assert records[2]["id"].startswith("a-benign-protected-0-")
    assert task.trained[0] | task.trained[1] <= pixels(RESTRICTED["attack"])
    assert task.trained[2] <= pixels(BENIGN["attack"])
    assert task.measured[6:] == [BENIGN.hashes["select"]] * 2 + [BENIGN.hashes["test"]]
    assert records[1]["test"] != records[2]["test"] or records[1]["curve"] != records[2]["curve"]


def test_another_benign_domain_changes_only_the_attempts_on_it(tmp_path: Path, attacked: list[Any]) -> None:
    config = replace(CONFIG, seeds=1, benign=["fresh"])
    attempts_of(staged(tmp_path, config, benign=BENIGN))
    other = LoadedDomain("other", BENIGN.classes, BENIGN.splits, {"attack": "another"})
    assert len(attacked) == 9
    attempts_of(staged(tmp_path, config, benign=other))
    assert len(attacked) == 12


def test_the_oracle_is_the_unprotected_model_with_all_data_for_as_many_epochs(tmp_path: Path) -> None:
    task = Measuring()
    strategy = replace(KEPT, batch_size=36)
    config = AttackConfig(eval_points=2, strategies={"a": strategy}, oracle="a", roles=["unprotected", "protected"])
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
    assert "data_ratio" not in unprotected


def test_an_oracle_with_few_images_has_ten_times_as_many(tmp_path: Path) -> None:
    config = AttackConfig(
        eval_points=2, strategies={"a": replace(KEPT, data_budget=9)}, oracle="a", roles=["unprotected"]
    )
    oracle, _ = attempts_of(staged(tmp_path, config))
    assert (oracle["data_ratio"], oracle["steps"], oracle["strategy"]["data_budget"]) == (10, 60, 90)


def test_more_data_adds_the_defenders_images_and_changes_nothing_else() -> None:
    more = with_more_data(RESTRICTED)
    assert len(more["attack"]) == 108
    assert pixels(more["attack"]) == pixels(*(RESTRICTED[split] for split in ("attack", "adapt", "query")))
    assert all(more[split] is RESTRICTED[split] for split in ("select", "test", "adapt", "query"))
    assert len(RESTRICTED["attack"]) == 36


# --- pictures -----------------------------------------------------------------------------------------------------


class Drawing(ClassificationTask):
    """A classifier that claims to generate: flat images as bright as its first weight."""

    def __init__(self) -> None:
        super().__init__(tiny_spec(), dtype=torch.float64)
        self.seeds: list[int] = []

    def sample(self, model: nn.Module, count: int, seed: int, *_: Any) -> Tensor:  # type: ignore[override]
        self.seeds.append(seed)
        level = int(1000 * float(model.conv1.weight.detach().abs().sum())) % 256
        return torch.full((count, 1, 6, 6), level, dtype=torch.uint8)


def test_the_first_seed_of_every_role_is_drawn_from_the_same_noise(tmp_path: Path) -> None:
    task = Drawing()
    config = AttackConfig(seeds=2, eval_points=3, samples=2, strategies={"a": KEPT})
    for record in attempts_of(staged(tmp_path, config, task=task)):
        points = [0, 3, 6] if record["seed"] == 0 else []
        assert record["samples"] == [{"step": step, "file": f"samples/{record['id']}-{step}.png"} for step in points]
        assert all((tmp_path / sample["file"]).read_bytes()[1:4] == b"PNG" for sample in record["samples"])
    assert len(task.seeds) == 9
    assert len(set(task.seeds)) == 1


@pytest.mark.parametrize(("samples", "calls"), [(0, 0), (1, 2)])
def test_what_does_not_generate_is_not_drawn(samples: int, calls: int, tmp_path: Path) -> None:
    config = AttackConfig(eval_points=2, samples=samples, roles=["protected"], strategies={"a": FRESH})
    [record] = attempts_of(staged(tmp_path, config))
    assert record["samples"] == []
    assert not (tmp_path / "samples").exists()


def test_distances_by_two_networks_are_not_the_same_attempt(tmp_path: Path) -> None:
    config = AttackConfig(samples=0, frechet_samples=3, strategies={"a": FRESH})

    def names(config: AttackConfig, frechet: Frechet | None) -> set[str]:
        return {path.name for path in staged(tmp_path, config, frechet=frechet).jobs}

    one = Frechet("one", lambda images: 0.0)
    found = [names(config, frechet) for frechet in (one, Frechet("other", one.distance), None)]
    found.append(names(replace(config, frechet_samples=4), one))
    assert len(set[str]().union(*found)) == 12
    assert names(config, one) == found[0]


# --- shards -------------------------------------------------------------------------------------------------------


def test_more_shards_than_jobs(tmp_path: Path) -> None:
    config = AttackConfig(roles=["protected"], strategies={"a": FRESH}, shards=3, shard=2)
    stage = staged(tmp_path, config)
    run_jobs(stage, lambda: stage, 4, Tracker())
    assert not (tmp_path / "attempts").exists()
