"""Attempts of small audits, as the runner would have written them, and audits of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sophon.attacker import FineTuneStrategy
from sophon.auditing.scores import Difference
from sophon.auditing.summary import AuditReport, Context, Intactness
from sophon.auditing.table import tabulate
from sophon.tasks import Metric

Record = dict[str, Any]
ACCURACY = Metric("accuracy", "%", higher_is_better=True)
MSE = Metric("eps-MSE", "", higher_is_better=False)
CONTEXT = Context(
    date="2026-01-02",
    checkpoint={"path": "out/protected", "sha256": "ab" * 32, "method": "sophon", "name": "tiny <b>"},
    reference={"path": "out/reference", "sha256": "cd" * 32},
    domains={"original": "cats", "restricted": "dogs", "benign": None},
    hashes={"test": "12" * 32},
    support={"optimizer": {"momentum": [0.001, 0.1]}, "steps": [20, 20]},
    intactness=Intactness(ACCURACY, 73.7, 73.0, Difference(0.7, -1.0, 2.4), 500),
    config={
        **{"name": "tiny", "seed": 0, "attack": {"seeds": 2, "eval_points": 4}, "note": "</script>"},
        "model": {"architecture": "resnet_tiny", "image_size": 28, "channels": 1},
    },
    packages={"torch": "9.9.9"},
)
PLAN = FineTuneStrategy(optimizer="adam", lr=0.1, steps=100)


def attempt(
    attack: str,
    role: str,
    test: float | None,
    *,
    seed: int = 0,
    select: float | None = None,
    metric: Metric = ACCURACY,
    strategy: Record | None = None,
    error: float | None = 0.0,
    **more: Any,
) -> Record:
    """Return an attempt without sampling error, whose curve is a line from 10 to ``select``, by default ``test``."""
    end = test if select is None else select
    return {
        "schema_version": 2,
        "id": f"{more.get('domain', '')}{attack}-{role}-{seed}",
        "attack": attack,
        "role": role,
        "domain": "restricted",
        "seed": seed,
        "strategy": PLAN.plain() | (strategy or {}),
        "exposure": "seen",
        "outside": [],
        "metric": vars(metric),
        "curve": [{"step": 0, "select": 10.0}, {"step": 100, "select": end}],
        "test": test,
        "standard_error": error,
        "test_images": 1000,
        "details": {},
        "samples": [],
        "search": None,
        "finished": True,
        "seconds": 1.5,
        "flops": 1e6,
        "prepared_flops": 0.0,
        "steps": 100,
    } | more


def trio(attack: str, protected: float, unprotected: float, scratch: float, **more: Any) -> list[Record]:
    values = {"protected": protected, "unprotected": unprotected, "scratch": scratch}
    return [attempt(attack, role, value, **more) for role, value in values.items()]


def duo(attack: str, protected: float, unprotected: float, **more: Any) -> list[Record]:
    """Return benign fine-tuning."""
    return trio(attack, protected, unprotected, 0.0, domain="benign", **more)[:2]


def searched(attack: str, *values: float, trials: int = 64, **more: Any) -> list[Record]:
    """Return the winners of a search."""
    return trio(attack, *values, search={"name": attack, "trials": trials, "sampler": "tpe"}, **more)


def idle(*values: float) -> list[Record]:
    """Return models that were not fine-tuned."""
    return trio("none", *values, strategy={"steps": 0}, curve=[{"step": 0, "select": 1.0}])


def oracle(test: float, seed: int = 0, attack: str = "a") -> Record:
    return attempt(attack, "oracle", test, seed=seed, strategy={"steps": 1000}, data_ratio=8.5)


def audit(attempts: list[Record], **context: Any) -> AuditReport:
    return AuditReport.of(tabulate(attempts), replace(CONTEXT, **context))
