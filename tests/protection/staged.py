"""Contexts and runners over the tiny network and its bands, for whatever is to be looked at."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sophon.config import GuardConfig, MethodConfig
from sophon.domains import ImageSet, LoadedDomain
from sophon.protection.context import Context
from sophon.protection.distributed import ALONE, Ranks
from sophon.protection.runner import Runner
from sophon.sampler import SamplerConfig, StrategySampler
from sophon.stages import plan_of
from sophon.tasks import ClassificationTask, Metric, Task
from sophon.tracking import Tracker
from tests.tiny import tiny_bands, tiny_model, tiny_spec, tiny_task

ORIGINAL = tiny_bands("original", ("train", "val", "test"), seed=20)
RESTRICTED = tiny_bands("restricted", ("adapt", "query"), seed=30, across=True)
METHOD = MethodConfig(
    name="test", rounds=4, ntr_steps=2, attackers=2, query_batch_size=8, ntr_batch_size=8, probe_steps=2, fts_lr=1e-2
)
GUARD = GuardConfig(every=1, tolerance=1.0, repair_steps=3, growth=1.5, max_ntr_steps=8)
SAMPLER = SamplerConfig({"adam": [1e-3, 1e-1]}, batch_sizes=[6], steps=[1, 3])


def context(
    model: nn.Module,
    task: Task | None = None,
    method: MethodConfig = METHOD,
    *,
    reference: nn.Module | None = None,
    original: LoadedDomain = ORIGINAL,
    restricted: Sequence[LoadedDomain] = (RESTRICTED,),
    sampler: SamplerConfig = SAMPLER,
    seed: int = 0,
    ranks: Ranks = ALONE,
) -> Context:
    known, reference = StrategySampler(sampler), model if reference is None else reference
    return Context(
        model,
        reference,
        reference,
        task or tiny_task(),
        original,
        restricted,
        known,
        method,
        seed,
        ranks,
        print,
        method.ntr_steps,
    )


def training(images: ImageSet) -> LoadedDomain:
    return replace(ORIGINAL, splits={**ORIGINAL.splits, "train": images})


class Momenta(nn.Module):
    """BatchNorm of every kind: a moving average, an average of all batches, none at all, 1d, and without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, bias=False)
        self.layers = nn.Sequential(
            nn.BatchNorm2d(4, momentum=0.3), nn.Tanh(),
            nn.BatchNorm2d(4, momentum=None), nn.Tanh(),
            nn.BatchNorm2d(4, track_running_stats=False), nn.Tanh(),
            nn.BatchNorm2d(4, affine=False, eps=0.1),
        )  # fmt: skip
        self.flat = nn.BatchNorm1d(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.flat(torch.tanh(self.layers(self.conv(images))).mean((2, 3))))


class Scripted(ClassificationTask):
    """Measures what it is told to: the reference first, then whatever the guard looks at."""

    def __init__(self, values: Iterable[float] = (), *, higher: bool = True, **settings: Any) -> None:
        super().__init__(tiny_spec(), **{"suppression_loss": "klu", "dtype": torch.float64} | settings)
        self.metric = Metric("score", "", higher)
        self.values = itertools.chain(values, itertools.repeat(50.0))
        self.before_loss: Callable[[], None] = lambda: None

    def evaluate(self, model: nn.Module, images: ImageSet) -> float:
        assert torch.equal(images.images, ORIGINAL["val"].images)
        return next(self.values)

    def original_loss(self, *arguments: Any, **rest: Any) -> Tensor:
        self.before_loss()
        return super().original_loss(*arguments, **rest)


class Listener(Tracker):
    """Calls back in the middle of a round's end, before anything is saved."""

    def __init__(self, told: Callable[[int], object] = lambda number: None) -> None:
        super().__init__()
        self.told = told
        self.rows: list[dict[str, float]] = []
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)

    def log(self, values: Any, step: int) -> None:
        self.rows.append(dict(values))
        self.told(step)


def runner(
    folder: Path,
    task: Task | None = None,
    told: Callable[[int], object] = lambda number: None,
    model: nn.Module | None = None,
    method: MethodConfig = METHOD,
    **rest: Any,
) -> Runner:
    """Return a runner; ``rest`` are fields of the guard's configuration, and arguments of `context`."""
    task = task or Scripted()
    limits = {name: rest.pop(name) for name in list(rest) if name in GuardConfig.__dataclass_fields__}
    guard = rest.pop("guard", replace(GUARD, **limits))
    begun = context(tiny_model() if model is None else model, task, method, **rest)
    return Runner(plan_of(method, lambda _: task), begun, guard, folder, Listener(told))


def rows(of: Runner, *names: str) -> list[tuple[Any, ...]]:
    return [tuple(row.get(name) for name in names) for row in of.at.history]
