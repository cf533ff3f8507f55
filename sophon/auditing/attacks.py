"""One attempt: an attacker takes a model, prepares it, fine-tunes it on its own split and measures what it got."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from sophon.attacker import FineTuneStrategy
from sophon.auditing.lora import add_adapters
from sophon.domains import LoadedDomain, few_shot
from sophon.finetune import flops_per_step, loop_of
from sophon.models import ModelSpec
from sophon.seeds import derive_seed, seed_all
from sophon.surgery import operate, restate
from sophon.surgery.attacker_means import Means
from sophon.tasks import Measured, Task


@dataclass(frozen=True)
class Outcome:
    """What an attempt brought.

    Attributes:
        model: what the attacker has in the end; not the model handed in if surgery put another in its place.
        curve: (steps done, metric on the attacker's ``select`` split), the start included.
        test: the metric on ``test`` with its sampling error, read once, after the last step; NaN of no images where it
            was not to be read.
        finished: whether the loss and all that was measured stayed finite to the end.
        seconds: wall time of the whole attempt.
        flops: of all its training (forward and backward).
        prepared_flops: the part of them before the first step: surgery and probing.
    """

    model: nn.Module
    curve: list[tuple[int, float]]
    test: Measured
    finished: bool
    seconds: float
    flops: float
    prepared_flops: float


class Attacker:
    """An attacker that has prepared its model (in place) as ``strategy`` says, and is ready for the first step.

    Args:
        model: the model under attack; hand in a copy.
        restricted: domain with ``attack``, which is fine-tuned on, ``select`` and ``test``.
        seed: of the attacker's surgery, head, data, batches and augmentation; the same seed against two models gives
            both the same of each.
        eval_points: points of the curve, >= 2.
        original: for surgery that trains on it.
        benign: the same.
        relative: a public model of the same architecture, for surgery that goes towards it.
        read_test: whether to read the ``test`` split: a search does not.
        at_point: called with the model, the number of steps done and the value at every point of the curve; it must
            leave the model as it is, and may raise to give the attempt up.

    Attributes:
        model: what is fine-tuned; not the model handed in if surgery put another in its place.
        images: to fine-tune on.
        generator: on the CPU; draws the batches and the augmentation.
    """

    def __init__(
        self,
        model: nn.Module,
        strategy: FineTuneStrategy,
        task: Task,
        restricted: LoadedDomain,
        *,
        spec: ModelSpec,
        seed: int,
        eval_points: int,
        original: LoadedDomain | None = None,
        benign: LoadedDomain | None = None,
        relative: nn.Module | None = None,
        read_test: bool = True,
        at_point: Callable[[nn.Module, int, float], None] = lambda model, step, value: None,
    ) -> None:
        self._start = time.perf_counter()
        self.strategy = strategy
        self.task = task
        self._restricted = restricted
        self._read_test = read_test
        self._at_point = at_point
        seed_all(derive_seed(seed, "head"))
        self.generator = torch.Generator().manual_seed(derive_seed(seed, "data"))
        self.images = few_shot(restricted["attack"], strategy.data_budget, self.generator)
        means = Means(
            task, spec, restricted.classes, self.images, self.generator, original, benign, strategy.batch_size
        )
        means.relative = relative
        self.model = _prepare(model, strategy, means, seed)
        self._means, self._seed = means, seed
        self._prepared = means.flops
        self._flops = means.flops + strategy.steps * flops_per_step(self.model, strategy, task, self.images)
        self._points = {round(strategy.steps * i / (eval_points - 1)) for i in range(1, eval_points)}
        self._curve: list[tuple[int, float]] = []

    def fine_tune(self) -> bool:
        """Run the strategy's loop, and measure where the curve has a point; return whether the loss stayed finite."""
        self._measure(0)
        try:
            trained = loop_of(self.strategy)(
                self.model, self.strategy, self.task, self.images, self.generator, self._on_step
            )
        except FloatingPointError:
            return False
        another, self.model = trained is not self.model, trained
        if another or self._curve[-1][0] < self.strategy.steps:
            self._measure(self.strategy.steps)
        return True

    def _measure(self, step: int) -> None:
        """Put into the curve how the model does now, after ``step`` steps."""
        model = self._measured()
        value = self.task.evaluate(model, self._restricted["select"])
        self._curve = [point for point in self._curve if point[0] < step] + [(step, value)]
        self._at_point(model, step, value)

    def _on_step(self, step: int, loss: float) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {step}")
        if step in self._points:
            self._measure(step)

    def outcome(self, finished: bool) -> Outcome:
        """Return what came of it, with ``test`` if that is to be read; ``finished``: the loss stayed finite."""
        model = self._measured()
        test = (
            self.task.measure(model, self._restricted["test"]) if self._read_test else Measured(math.nan, math.nan, 0)
        )
        seconds = time.perf_counter() - self._start
        measured = [value for _, value in self._curve] + [test.value] * self._read_test
        finished = finished and all(map(math.isfinite, measured))
        return Outcome(model, self._curve, test, finished, seconds, self._flops, self._prepared)

    def _measured(self) -> nn.Module:
        """Return what is to be measured; training goes on with the statistics and the draws that it has."""
        if self.strategy.batch_norm != "restated":
            return self.model
        generator = torch.Generator().manual_seed(derive_seed(self._seed, "restate"))
        return restate(copy.deepcopy(self.model), replace(self._means, generator=generator))


def attack(
    model: nn.Module, strategy: FineTuneStrategy, task: Task, restricted: LoadedDomain, **options: Any
) -> Outcome:
    """Fine-tune ``model`` (in place) on the restricted domain's ``attack`` split as ``strategy`` says.

    The arguments are those of `Attacker`.
    """
    attacker = Attacker(model, strategy, task, restricted, **options)
    return attacker.outcome(attacker.fine_tune())


def _prepare(model: nn.Module, strategy: FineTuneStrategy, means: Means, seed: int) -> nn.Module:
    """Do all that comes before the first step: surgery, the head's start, probing, adapters."""
    if strategy.surgery:
        seed_all(derive_seed(seed, "surgery"))
        model = operate(model, strategy.surgery, means)
        seed_all(derive_seed(seed, "head"))
    means.task.start_head(model, strategy.head, means.classes)
    if strategy.head == "probed":
        means.train(model, linear_probe(strategy))
    if strategy.scope == "lora":
        head = means.task.head_names(model)
        add_adapters(model, strategy.lora_rank, strategy.lora_layers, head, strategy.lora_recipe)
    return model


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
