"""A search over a smooth objective, which takes no training."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from sophon.attacker import FineTuneStrategy
from sophon.auditing.search import Report, Trial, run_search
from sophon.config import SearchConfig

NOISE = {"operation": "noise", "scale": 0.1}
CONFIG = SearchConfig(
    trials=14,
    steps=100,
    startup=4,
    optimizers={"adam": [1e-6, 1.0], "momentum": [1e-6, 10.0], "sgd": None},
    choices={
        "scope": ["all", "last_blocks", "lora"],
        "blocks": [1, 2],
        "surgery": [[], [NOISE]],
        "batch_size": [8, 64],
    },
)


def accuracy(strategy: FineTuneStrategy) -> float:
    """A smooth objective whose best is 100, at Adam's rate 1e-3 in batches of 64 on all layers."""
    good = {"adam": -3, "momentum": -1}[strategy.optimizer]
    penalty = 5 * (strategy.optimizer != "adam") + 5 * (strategy.scope != "all") + 5 * (strategy.batch_size != 64)
    return 100 - 15 * (math.log10(strategy.lr) - good) ** 2 - penalty


def evaluate(strategy: FineTuneStrategy, report: Report) -> float | None:
    """Climb to `accuracy` in three points; rates above 0.5 diverge after the first."""
    report(0, 10.0)
    report(50, accuracy(strategy) / 2)
    if strategy.lr > 0.5:
        return None
    report(100, accuracy(strategy))
    return accuracy(strategy)


def changed(**values: Any) -> SearchConfig:
    return dataclasses.replace(CONFIG, **values)


def run(config: SearchConfig, path: Path, evaluate=evaluate, seed: int = 0, higher: bool = True, **rest) -> list[Trial]:
    return run_search(config, storage=path, seed=seed, higher_is_better=higher, evaluate=evaluate, **rest)
