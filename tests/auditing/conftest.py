"""What tests of whole audits share."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from sophon.attacker import FineTuneStrategy
from sophon.auditing import runner
from sophon.auditing.search import Trial
from tests.auditing.searches import CONFIG, run


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
    path = tmp_path_factory.mktemp("finished") / "search.json"
    return path, run(CONFIG, path)


@pytest.fixture
def path(finished: tuple[Path, list[Trial]], tmp_path: Path) -> Path:
    """A copy of the file."""
    return Path(shutil.copy(finished[0], tmp_path))


@pytest.fixture
def whole(finished: tuple[Path, list[Trial]]) -> list[Trial]:
    """The trials."""
    return finished[1]
