"""The stages that a protection is made of, one file each; a user's own is named by its dotted path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sophon.arguments import filled, named
from sophon.config import MethodConfig
from sophon.protection.runner import Planned
from sophon.protection.stage import Stage
from sophon.tasks import Task
from sophon.validation import METHOD_KEYS, method_of

# Imported only when named.
STAGES = {
    "alternate": "sophon.stages.alternate.Alternate",
    "distance": "sophon.stages.distance.Distance",
    "distil": "sophon.stages.distil.Distil",
    "noise": "sophon.stages.noise.Noise",
    "reinitialise": "sophon.stages.reinitialise.Reinitialise",
    "reparameterise": "sophon.stages.reparameterise.Reparameterise",
    "unlearn": "sophon.stages.unlearn.Unlearn",
}


def plan_of(method: MethodConfig, make_task: Callable[[MethodConfig], Task]) -> list[Planned]:
    """Return the stages of a method in their order.

    Args:
        method: ``stages`` says which; empty for ``alternate`` alone.
        make_task: makes the task with the losses of a stage's method.

    Raises:
        UserError: a stage is not known, or does not take its settings.
    """
    plan = []
    stages = {name: entry for name, entry in method.stages.items() if entry is not None}
    for name, entry in (stages or {"alternate": {}}).items():
        key, own = f"method.stages.{name}", method_of(method, name)
        settings = {word: value for word, value in entry.items() if word not in METHOD_KEYS and word != "stage"}
        stage = _stage(key, str(entry.get("stage", name)), settings)
        own = replace(own, rounds=1) if stage.once else own
        plan.append(Planned(name, stage, own, make_task(own)))
    return plan


def _stage(key: str, path: str, settings: dict[str, Any]) -> Stage:
    kind = named(key, path, STAGES, Stage)
    made: Stage = kind(filled(key, path, kind.Config, settings))
    return made
