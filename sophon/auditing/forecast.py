"""Estimate what an audit costs before it starts: attacks are counted, time is extrapolated from a few passes."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from sophon.attacker import FineTuneStrategy
from sophon.auditing.plan import Job, Search
from sophon.auditing.runner import Runner
from sophon.auditing.scene import Scene
from sophon.auditing.words import counted, listed
from sophon.finetune import fine_tune

_STEPS = 4  # of which the first, which warms up, does not count
_BATCH = 32
_LEFT_OUT = ", masking and intactness not counted"


def forecast(runner: Runner, missing: Sequence[Path], workers: int) -> str:
    """Return a line on an audit: how many attacks against how many models, what is left of it, and how long it takes.

    The time is estimated: from a few training steps and one evaluation of the protected model. It leaves out surgery,
    pictures and probing, and takes every attack as one that trains the whole network.

    Args:
        missing: files of the jobs that have yet to run.
    """
    jobs = list(runner.jobs.values())
    searches = {job.name: job.config.trials for job in jobs if isinstance(job, Search)}
    names = {(job.attack, job.domain) for job in jobs if not isinstance(job, Search)}
    phrases = [counted(len(names), "attack")] if names else []
    if searches:
        phrases.append(f"{counted(len(searches), 'searching attacker')} of {sum(searches.values())} trials")
    models, total = len({job.role for job in jobs}), sum(job.cost for job in jobs)
    left = sum(runner.jobs[path].cost for path in missing)
    line = f"{listed(phrases)} against {counted(models, 'model')}: {counted(total, 'attempt')}"
    line += f", {left} of them to run" if left < total else ""
    if not missing:
        return line
    try:
        training, measuring = _seconds(runner.scene)
    except FloatingPointError:  # there is nothing to go by, and the attempts will say so
        return line
    seconds = sum(_images(runner.jobs[path]) * training for path in missing)
    seconds += sum(_measurements(runner, runner.jobs[path]) * measuring for path in missing)
    processes = min(workers, len(missing))
    return f"{line}; estimated {lasting(seconds / processes)} in {counted(processes, 'worker')}{_LEFT_OUT}"


def lasting(seconds: float) -> str:
    """Write a time as people say it: ``40 s``, ``50 min``, ``4.5 h``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _images(job: Job) -> int:
    """Return how many images a job trains on, repeats counted; of a search's batch sizes the mean."""
    if not isinstance(job, Search):
        return job.strategy.steps * job.strategy.batch_size
    sizes = job.config.choices.get("batch_size") or [FineTuneStrategy().batch_size]
    return int(job.cost * job.config.steps * sum(sizes) / len(sizes))


def _measurements(runner: Runner, job: Job) -> float:
    """Return how many evaluations of ``select`` a job takes; the one of ``test`` counts by its size."""
    select, test = (len(runner.scene.restricted[split]) for split in ("select", "test"))
    if isinstance(job, Search):
        return job.config.trials * job.config.eval_points + job.config.seeds * (
            runner.config.eval_points + test / select
        )
    return runner.config.eval_points + test / select


def _seconds(scene: Scene) -> tuple[float, float]:
    """Return the seconds of training on an image and of evaluating ``select``, on a copy of the protected model."""
    model, domain = copy.deepcopy(scene.models["protected"]), scene.restricted
    device = domain["attack"].batch(torch.arange(1)).images.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        head = "fresh" if scene.task.head_names(model) else "kept"
        scene.task.start_head(model, head, domain.classes)
        at = [time.perf_counter()]
        # a rate at which nothing diverges: what is learnt does not matter
        strategy = FineTuneStrategy(optimizer="adam", lr=1e-8, batch_size=_BATCH, steps=_STEPS, head=head)
        generator = torch.Generator().manual_seed(0)
        fine_tune(model, strategy, scene.task, domain["attack"], generator, lambda *_: at.append(time.perf_counter()))
        start = time.perf_counter()
        scene.task.measure(model, domain["select"])
        return (at[-1] - at[1]) / (_STEPS - 1) / _BATCH, time.perf_counter() - start
