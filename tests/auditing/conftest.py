"""What tests of whole audits share."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from sophon.attacker import FineTuneStrategy
from sophon.auditing import runner
from sophon.auditing.search import Trial
from tests.auditing.searches import CONFIG, run


@pytest.fixture(scope="package", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """Leave out what SQLite does against power cuts: most of the time of searches as short as these."""
    connect = sqlite3.connect

    def connect_without_sync(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection = connect(*arguments, **options)
        connection.execute("PRAGMA synchronous=OFF")
        return connection

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite3, "connect", connect_without_sync)
        yield


@pytest.fixture
def attacked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[FineTuneStrategy, int]]:
    """The strategy and the seed of every attack that is run."""
    calls: list[tuple[FineTuneStrategy, int]] = []
    genuine = runner.attack

    def attack(model: nn.Module, strategy: FineTuneStrategy, *rest: Any, seed: int, **options: Any) -> Any:
        calls.append((strategy, seed))
        return genuine(model, strategy, *rest, seed=seed, **options)

    monkeypatch.setattr(runner, "attack", attack)
    return calls


@pytest.fixture(scope="package")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Trial]]:
    """The file and the trials of an uninterrupted search."""
    path = tmp_path_factory.mktemp("finished") / "search.db"
    return path, run(CONFIG, path)


@pytest.fixture
def path(finished: tuple[Path, list[Trial]], tmp_path: Path) -> Path:
    """A copy of the file."""
    return Path(shutil.copy(finished[0], tmp_path))


@pytest.fixture
def whole(finished: tuple[Path, list[Trial]]) -> list[Trial]:
    """The trials."""
    return finished[1]
