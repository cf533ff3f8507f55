"""Prepare a protection and run it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sophon.api.common import (
    as_loaded,
    asked_precision,
    domains_of,
    metric_of,
    require_float32,
    task_of,
)
from sophon.api.manifests import both_splits, check_pretraining, hashes_of, information_path, manifest_of
from sophon.api.results import Protected
from sophon.checkpoint import Checkpoint
from sophon.config import Config, GuardConfig, plain
from sophon.domains import LoadedDomain
from sophon.protection.context import Context
from sophon.protection.distributed import ALONE, Ranks
from sophon.protection.resume import Position
from sophon.protection.runner import Planned, Runner
from sophon.sampler import StrategySampler
from sophon.stages import plan_of
from sophon.tasks import Task
from sophon.tracking import Tracker


@dataclass(frozen=True)
class Protection:
    """What a protection starts from, read and checked.

    Attributes:
        config: the run's.
        reference: the unprotected checkpoint.
        plan: the stages.
        context: what the first of them works with, the domains among it.
        identity: everything that decides the result, plain JSON data.
        note: a line for the user on what of the configuration is left out; None for nothing.
    """

    config: Config
    reference: Checkpoint
    plan: list[Planned]
    context: Context
    identity: dict[str, Any]
    note: str | None = None


def prepare(config: Config, reference: Checkpoint, device: torch.device, ranks: Ranks = ALONE) -> Protection:
    """Load the domains, and refuse what the model and the stages cannot do.

    Args:
        reference: the unprotected checkpoint; moved to ``device``.

    Raises:
        UserError: the domains, the method and the model do not go together.
    """
    plan = plan_of(
        config.method, lambda method: task_of(replace(config, method=method), reference.spec, device, protects=True)
    )
    original, restricted = domains_of(config, reference.spec, device)
    reference.model.to(device)
    check_pretraining(reference, (), restricted)
    note = None
    if any(planned.stage.simulates for planned in plan):
        config, note = _with_heads_that_fit(config, plan[0].task, reference.model, restricted)
    identity = {
        **plain(config, "seed", "task", "method", "sampler", "guard"),
        **asked_precision(config),
        "reference": reference.sha256,
        **hashes_of(original, restricted),
    }
    first, sampler, model = plan[0], StrategySampler(config.sampler), reference.model
    context = Context(model, model, model, first.task, original, restricted, sampler, first.method, config.seed, ranks)
    for planned in plan:
        require_float32(planned.stage.float32, planned.task)
        planned.stage.check(replace(context, task=planned.task, method=planned.method))
    return Protection(config, reference, plan, context, identity, note)


def _with_heads_that_fit(
    config: Config, task: Task, model: nn.Module, restricted: Sequence[LoadedDomain]
) -> tuple[Config, str | None]:
    """Leave ``kept`` out of the simulated heads, and say so in a line, where classes are not as many as the model's."""
    heads, outputs = config.sampler.heads, task.adapter.classes_in(model)
    others = [head for head in heads if head != "kept"]
    misfit = next((domain for domain in restricted if outputs and len(domain.classes) != outputs), None)
    if misfit is None or not others or others == heads:
        return config, None
    note = f"sampler.heads: 'kept' is left out; {misfit.name} has {len(misfit.classes)} classes, the model {outputs}"
    return replace(config, sampler=replace(config.sampler, heads=others)), note


def run(protection: Protection, folder: Path, tracker: Tracker) -> Protected | None:
    """Protect the model, or go on where ``folder`` says; None on all ranks but the first.

    Raises:
        GuardError: no round's state satisfied the guard.
        KeyboardInterrupt: on SIGINT or SIGTERM, after the round in progress was finished and saved.
    """
    runner = runner_of(protection, folder, tracker)
    model = runner.run()
    return _measured(protection, model, runner.at) if protection.context.ranks.rank == 0 else None


def last_good(protection: Protection, folder: Path) -> Protected:
    """Return what can be released of a run that is not finished.

    Raises:
        GuardError: no round's state satisfied the guard so far.
    """
    runner = runner_of(protection, folder, Tracker())
    return _measured(protection, runner.released(), runner.at)


def runner_of(protection: Protection, folder: Path, tracker: Tracker) -> Runner:
    """Return what runs a protection, where ``folder`` says that it stands."""
    config = protection.config
    return Runner(protection.plan, protection.context, config.guard, folder, tracker, config.profile)


def _measured(protection: Protection, model: nn.Module, at: Position) -> Protected:
    """Measure what the protection cost the original domain, ``test`` read once."""
    config, reference, context = protection.config, protection.reference, protection.context
    before = both_splits(context.task, reference.model, context.original, "reference")
    after = both_splits(context.task, model, context.original, "method.fts_lr")
    guard = {"tolerance": config.guard.tolerance, "relative": config.guard.relative}
    entered = _entered(protection.plan, at)
    stages = {planned.name: planned.stage for planned in entered}
    information = {
        planned.name: asdict(planned.stage.information(replace(context, method=planned.method, task=planned.task)))
        for planned in entered
    }
    general = manifest_of(
        as_loaded(config, reference.spec), "protect", reference.sha256, context.original, context.restricted
    )
    manifest = {
        **general,
        "method": asdict(config.method),
        "stages": [
            {
                "name": name,
                "mechanism": stage.mechanism,
                "summary": stage.summary,
                "limits": list(stage.limits),
                "information": information[name],
            }
            for name, stage in stages.items()
        ],
        "information": information_path(information),
        "float32": any(stage.float32 for stage in stages.values()),
        # where nobody was simulated, nobody was seen
        "sampler_support": context.sampler.support() if any(s.simulates for s in stages.values()) else None,
        "intactness": {**metric_of(context.task), "before": before, "after": after, **guard},
        "history": {"rounds": at.round, "good_round": at.good_round, "rollbacks": at.rollbacks},
    }
    return Protected(model.eval(), at.history, manifest, protection)


def _entered(plan: Sequence[Planned], at: Position) -> list[Planned]:
    """Return the stages that the released state went through: those that began before the round that it is of."""
    starts = [0, *at.ends]
    return [planned for planned, start in zip(plan, starts, strict=False) if at.good_round > start]


def lost_on_test(guard: GuardConfig, task: Task, before: float, after: float) -> str | None:
    """Return a line of warning if ``test`` lost more than the guard, which reads ``val``, lets pass."""
    loss = before - after if task.metric.higher_is_better else after - before
    if guard.relative:
        loss *= 100 / (abs(before) or 1)
    if loss <= guard.tolerance:
        return None
    unit = " %" if guard.relative else ""
    return f"test lost {loss:.3g}{unit}, more than guard.tolerance={guard.tolerance:g}{unit}, which val keeps"
