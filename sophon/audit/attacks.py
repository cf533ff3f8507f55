"""One attempt: an attacker takes a model, prepares it, fine-tunes it on its own split and measures what it got."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from sophon.domains import Domain, few_shot
from sophon.finetune import fine_tune, flops_per_step
from sophon.runs import derive_seed, seed_all
from sophon.strategies import FineTuneStrategy
from sophon.tasks import Task


@dataclass(frozen=True)
class Outcome:
    """What an attempt brought.

    Attributes:
        curve: (steps done, metric on the attacker's ``select`` split), the start included.
        test: the metric on ``test``, read once, after the last step.
        finished: whether the loss stayed finite to the end.
        seconds: wall time of fine-tuning and evaluation.
        flops: of the fine-tuning steps taken (forward and backward), probing included.
    """

    curve: list[tuple[int, float]]
    test: float
    finished: bool
    seconds: float
    flops: float


def attack(
    model: nn.Module,
    strategy: FineTuneStrategy,
    task: Task,
    restricted: Domain,
    *,
    seed: int,
    eval_points: int,
    at_point: Callable[[int], None] = lambda step: None,
) -> Outcome:
    """Fine-tune ``model`` (in place) on the restricted domain's ``attack`` split as ``strategy`` says.

    Args:
        model: the model under attack; hand in a copy.
        strategy: the attacker.
        task: the model kind.
        restricted: domain with ``attack``, ``select`` and ``test``.
        seed: of the attacker's head, data, batches and augmentation; the same seed against two models gives both the
            same of each.
        eval_points: points of the curve, >= 2.
        at_point: called with the number of steps done at every point of the curve; it must leave the model as it is.
    """
    start = time.perf_counter()
    seed_all(derive_seed(seed, "head"))
    generator = torch.Generator().manual_seed(derive_seed(seed, "data"))
    images = few_shot(restricted["attack"], strategy.data_budget, generator)
    task.start_head(model, strategy.head, restricted.classes)
    flops = 0.0
    if strategy.head == "probed":
        probe = linear_probe(strategy)
        flops += probe.steps * flops_per_step(model, probe, task, images)
        fine_tune(model, probe, task, images, generator)
    flops += strategy.steps * flops_per_step(model, strategy, task, images)

    last = strategy.steps
    points = {round(last * i / (eval_points - 1)) for i in range(1, eval_points)}
    curve: list[tuple[int, float]] = []

    def measure(step: int) -> None:
        curve.append((step, task.evaluate(model, restricted["select"])))
        at_point(step)

    def after_step(step: int, loss: float) -> None:
        if step in points:
            measure(step)

    measure(0)
    finished = fine_tune(model, strategy, task, images, generator, after_step)
    return Outcome(curve, task.evaluate(model, restricted["test"]), finished, time.perf_counter() - start, flops)


def linear_probe(strategy: FineTuneStrategy) -> FineTuneStrategy:
    """Return the probing that a ``probed`` attacker does before it fine-tunes."""
    return FineTuneStrategy(
        optimizer="adam",
        lr=strategy.probe_lr,
        steps=strategy.probe_steps,
        scope="head",
        batch_size=strategy.batch_size,
        augmentation=strategy.augmentation,
    )
