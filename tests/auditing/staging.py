"""A small scene to audit, the same in every process that makes it."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from sophon.attacker import FineTuneStrategy, Operation
from sophon.auditing import runner as module
from sophon.auditing.runner import Runner
from sophon.auditing.scene import Scene
from sophon.auditing.workers import run_jobs
from sophon.config import AttackConfig, SearchConfig
from sophon.domains import LoadedDomain
from sophon.sampler import SamplerConfig, StrategySampler
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


def count_attacks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[FineTuneStrategy, int]]:
    """Note the strategy and the seed of every attack that is run."""
    calls: list[tuple[FineTuneStrategy, int]] = []
    genuine = module.attack

    def attack(model: nn.Module, strategy: FineTuneStrategy, *rest: Any, seed: int, **options: Any) -> Any:
        calls.append((strategy, seed))
        return genuine(model, strategy, *rest, seed=seed, **options)

    monkeypatch.setattr(module, "attack", attack)
    return calls


def without_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare searches what SQLite does against power cuts: most of the time of one as short as these."""
    connect = sqlite3.connect

    def connect_without_sync(path: Path) -> sqlite3.Connection:
        connection = connect(path)
        connection.execute("PRAGMA synchronous=OFF")
        return connection

    monkeypatch.setattr(sqlite3, "connect", connect_without_sync)
