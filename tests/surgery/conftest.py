"""Fresh models of architectures that only the tests have."""

from __future__ import annotations

import pytest

from sophon.surgery import means
from tests.surgery.surgical import build_also


@pytest.fixture(autouse=True)
def _fresh_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(means, "build", build_also)
