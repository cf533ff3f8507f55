"""What tests of whole audits share."""

from __future__ import annotations

import pytest

from sophon.attacker import FineTuneStrategy
from tests.audit.staging import count_attacks, without_sync


@pytest.fixture
def buildable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let searches write without waiting for the disk."""
    without_sync(monkeypatch)


@pytest.fixture
def attacked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[FineTuneStrategy, int]]:
    """The strategy and the seed of every attack that is run."""
    return count_attacks(monkeypatch)
