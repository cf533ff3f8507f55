"""A small scene to audit, the same in every process that makes it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sophon.attacker import FineTuneStrategy, Operation
from sophon.auditing.runner import Runner
from sophon.auditing.scene import Scene
from sophon.auditing.workers import run_jobs
from sophon.config import AttackConfig, SearchConfig
from sophon.domains import LoadedDomain
from sophon.sampler import SamplerConfig, StrategySampler
from sophon.tasks import ClassificationTask
from sophon.tracking import Tracker
from tests.tiny import tiny_bands, tiny_model, tiny_spec, tiny_task

RESTRICTED = tiny_bands("restricted", ("attack", "select", "test", "adapt", "query"), seed=40, across=True)
BENIGN = tiny_bands("benign", ("attack", "select", "test"), seed=60)
ORIGINAL = tiny_bands("original", ("train", "val", "test"), seed=80)
TWO = LoadedDomain("two", ("a", "b"), RESTRICTED.splits, {})

FRESH = FineTuneStrategy(optimizer="adam", lr=0.01, batch_size=8, steps=4, head="fresh")
KEPT = replace(FRESH, head="kept", steps=6)
DISTILLED = replace(FRESH, surgery=(Operation("distil", (("steps", 2),)),))
SUPPORT = StrategySampler(SamplerConfig({"adam": [0.001, 0.1]}, [8], [1, 4], ["kept", "fresh"])).support()
CONFIG = AttackConfig(seeds=2, eval_points=3, strategies={"fresh": FRESH, "kept": KEPT})
SEARCH = SearchConfig(
    trials=4,
    steps=3,
    seeds=2,
    startup=2,
    eval_points=3,
    optimizers={"adam": [0.001, 0.1]},
    choices={"batch_size": [8], "head": ["kept", "fresh"]},
)
SEARCHING = AttackConfig(eval_points=2, roles=["protected"], search={"tuned": SEARCH})


def scene(**changes: Any) -> Scene:
    """Return the scene; its models are made anew each time."""
    models = {"protected": tiny_model(1), "unprotected": tiny_model(2)}
    provenance = {role: f"{role} model" for role in ("protected", "unprotected", "scratch")}
    usual = {"provenance": provenance, "support": SUPPORT, "original": ORIGINAL}
    return Scene(
        **{"models": models, "spec": tiny_spec(), "task": tiny_task(), "restricted": RESTRICTED} | usual | changes
    )


def staged(folder: Path, config: AttackConfig = CONFIG, seed: int = 0, frechet: Any = None, **changes: Any) -> Runner:
    return Runner(scene(**changes), config, seed, folder, frechet)


class Drawing(ClassificationTask):
    """A classifier that claims to generate: flat images as bright as its first weights."""

    def __init__(self) -> None:
        super().__init__(tiny_spec(), dtype=torch.float64)
        self.models: list[nn.Module] = []
        self.seeds: list[int] = []

    def sample(self, model: nn.Module, count: int, seed: int, *_: Any) -> Tensor:  # type: ignore[override]
        self.models.append(model)
        self.seeds.append(seed)
        level = int(1000 * float(model.conv1.weight.detach().abs().sum())) % 256
        return torch.full((count, 1, 6, 6), level, dtype=torch.uint8)


def run_all(runner: Runner) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Run all jobs in this process; return the records."""
    run_jobs(runner, lambda: runner, 1, Tracker())
    return runner.records()


def attempts_of(runner: Runner) -> list[dict[str, Any]]:
    """Run all jobs in this process; return the attempts."""
    return run_all(runner)[0]


def results(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out how fast the machine was."""
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]
