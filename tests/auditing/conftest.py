"""What tests of whole audits share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sophon.attacker import FineTuneStrategy
from sophon.auditing.search import Trial
from tests.auditing.searches import CONFIG, run
from tests.auditing.staging import count_attacks, without_sync


@pytest.fixture
def buildable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let searches write without waiting for the disk."""
    without_sync(monkeypatch)


@pytest.fixture
def attacked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[FineTuneStrategy, int]]:
    """The strategy and the seed of every attack that is run."""
    return count_attacks(monkeypatch)


@pytest.fixture
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what SQLite does against power cuts, most of a search that takes no training."""
    without_sync(monkeypatch)


@pytest.fixture(scope="session")
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
