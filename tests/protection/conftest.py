"""What tests of several parts of a protection look through."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from sophon.attacker import FineTuneStrategy
from sophon.protection import fts as fts_module
from sophon.protection import simulated_attackers as making
from sophon.protection.fts import ENGINES
from sophon.protection.inner_loop import Simulation


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[FineTuneStrategy, Simulation]]:
    """Every simulation that a fts runs, probing included."""
    runs: list[tuple[FineTuneStrategy, Simulation]] = []

    def recorded(engine: Any) -> Any:
        def run(attacker: nn.Module, strategy: FineTuneStrategy, *rest: Any, **settings: Any) -> Simulation:
            simulation = engine(attacker, strategy, *rest, **settings)
            runs.append((strategy, simulation))
            return simulation

        return run

    monkeypatch.setattr(fts_module, "ENGINES", {name: recorded(engine) for name, engine in ENGINES.items()})
    monkeypatch.setattr(making, "first_order", recorded(ENGINES["first_order"]))  # which probes
    return runs
