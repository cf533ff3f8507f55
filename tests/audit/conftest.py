"""What tests of whole audits share."""

from __future__ import annotations

import pytest

from sophon.attacker import FineTuneStrategy
from sophon.audit import runner
from sophon.surgery import means
from tests.audit.staging import build_tiny, count_attacks, without_sync


@pytest.fixture
def buildable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let fresh models be tiny ones, and searches write without waiting for the disk."""
    for room in (runner, means):
        monkeypatch.setattr(room, "build", build_tiny)
    without_sync(monkeypatch)


@pytest.fixture
def attacked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[FineTuneStrategy, int]]:
    """The strategy and the seed of every attack that is run."""
    return count_attacks(monkeypatch)
