"""Attempts and context of small audits, as the runner would have written them."""

import numpy as np

ACCURACY = {"name": "accuracy", "unit": "%", "higher_is_better": True}
MSE = {"name": "eps-MSE", "unit": "", "higher_is_better": False}
CONTEXT = {
    "checkpoint": {"path": "protected", "sha256": "ab", "method": "sophon", "name": "tiny"},
    "reference": {"path": "reference", "sha256": "cd"},
    "intactness": {
        "metric": "accuracy", "unit": "%", "higher_is_better": True, "before": {"test": 73.7}, "after": {"test": 73.0},
    },
    "support": {"optimizer": {"momentum": [0.001, 0.1]}, "steps": [20, 20]},
    "domains": {"original": "a", "restricted": "b"},
    "config": {"seeds": 1},
    "packages": {"torch": "2"},
}  # fmt: skip


def attempt(attack, role, test, *, seed=0, select=None, exposure="seen", outside=(), metric=ACCURACY, **more):
    end = test if select is None else select
    return {
        "schema_version": 1, "id": f"{attack}-{role}-{seed}", "attack": attack, "role": role, "seed": seed,
        "strategy": {"optimizer": "adam", "lr": 0.1}, "exposure": exposure, "outside": list(outside), "metric": metric,
        "curve": [{"step": 0, "select": 10.0}, {"step": 100, "select": end}], "test": test, "seconds": 1.5,
        "flops": 1e6, "steps": 100,
    } | more  # fmt: skip


def trio(attack, protected, unprotected, scratch, **more):
    values = {"protected": protected, "unprotected": unprotected, "scratch": scratch}
    return [attempt(attack, role, value, **more) for role, value in values.items()]


def curve(*pairs):
    return np.array([step for step, _ in pairs], float), np.array([value for _, value in pairs], float)


def idle(*values):
    """A trio that was not fine-tuned."""
    attempts = trio("none", *values, strategy={"optimizer": "adam", "lr": 0.1, "steps": 0}, steps=0)
    return [one | {"curve": one["curve"][:1]} for one in attempts]


def oracle(test, seed=0, **more):
    return attempt("a", "oracle", test, seed=seed, **({"strategy": {"steps": 1000}, "data_ratio": 8.5} | more))


def benign(attack, protected, unprotected, **more):
    values = {"protected": protected, "unprotected": unprotected}
    return [
        attempt(attack, role, value, **more) | {"domain": "benign", "id": f"benign-{attack}-{role}"}
        for role, value in values.items()
    ]


def search(name, found, **more):
    facts = {"name": name, "trials": 64, "sampler": "tpe"}
    return [
        attempt(name, role, test, strategy={"optimizer": "adam", "lr": lr}, search=facts, **more)
        for role, (test, lr) in found.items()
    ]


def lasting(name, steps, *values, exposure="seen", **changes):
    """A trio whose strategy is known to last so many steps."""
    strategy = {"optimizer": "adam", "lr": 0.1, "steps": steps, "surgery": []} | changes
    return trio(name, *values, strategy=strategy, steps=steps, exposure=exposure)
