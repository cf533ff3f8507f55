"""The alternation: its guard, its resumption to the bit, its interruptions, and that it protects at all."""

from __future__ import annotations

import copy
import itertools
import json
import math
import signal
import struct
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sophon.attacker import SCHEDULES, FineTuneStrategy
from sophon.config import GuardConfig, MethodConfig
from sophon.domains import ImageSet, LoadedDomain
from sophon.errors import GuardError, UserError
from sophon.finetune import fine_tune
from sophon.protect.fts import FTSStep
from sophon.protect.state import STATE_FILE, last_good
from sophon.protect.trainer import Trainer
from sophon.sampler import SamplerConfig, StrategySampler
from sophon.tasks import ClassificationTask, DenoisingTask, Metric
from sophon.tensor_files import read_tensors, write_tensors
from sophon.tracking import Tracker
from tests.tiny import (
    TinyNet,
    assert_same_state,
    state_of,
    tiny_bands,
    tiny_model,
    tiny_spec,
    tiny_unet,
    tiny_unet_spec,
)

ORIGINAL = tiny_bands("original", ("train", "val", "test"), seed=20)
RESTRICTED = tiny_bands("restricted", ("adapt", "query"), seed=30, across=True)
METHOD = MethodConfig(
    name="test", rounds=4, ntr_steps=2, attackers=2, query_batch_size=8, ntr_batch_size=8, probe_steps=2, fts_lr=1e-2
)
GUARD = GuardConfig(every=1, tolerance=1.0, repair_steps=3, growth=1.5, max_ntr_steps=8)
SAMPLER = SamplerConfig({"adam": [1e-3, 1e-1]}, batch_sizes=[6], steps=[1, 3])


class Scripted(ClassificationTask):
    """Measures what it is told to: the reference first, then whatever the guard looks at."""

    def __init__(self, values: Iterable[float] = (), *, higher: bool = True) -> None:
        super().__init__(tiny_spec(), suppression_loss="klu", dtype=torch.float64)
        self.metric = Metric("score", "", higher)
        self.values = itertools.chain(values, itertools.repeat(50.0))
        self.before_loss: Callable[[], None] = lambda: None

    def evaluate(self, model: nn.Module, images: ImageSet) -> float:
        assert torch.equal(images.images, ORIGINAL["val"].images)
        return next(self.values)

    def original_loss(self, *arguments: Any) -> Tensor:
        self.before_loss()
        return super().original_loss(*arguments)


class Listener(Tracker):
    """Calls back in the middle of a round's end, before anything is saved."""

    def __init__(self, told: Callable[[int], None] = lambda number: None) -> None:
        super().__init__()
        self.told = told
        self.rows: list[dict[str, float]] = []
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)

    def log(self, values: Any, step: int) -> None:
        self.rows.append(dict(values))
        self.told(step)


def trainer(
    folder: Path,
    task: ClassificationTask,
    told: Callable[[int], None] = lambda number: None,
    model: nn.Module | None = None,
    method: MethodConfig = METHOD,
    sampler: SamplerConfig = SAMPLER,
    **guard: Any,
) -> Trainer:
    model = tiny_model() if model is None else model
    limits, tracker, attackers = replace(GUARD, **guard), Listener(told), StrategySampler(sampler)
    released = copy.deepcopy(model)
    return Trainer(released, model, task, ORIGINAL, [RESTRICTED], attackers, method, limits, 0, folder, tracker)


def rows(of: Trainer, *names: str) -> list[tuple[Any, ...]]:
    return [tuple(row.get(name) for name in names) for row in of.at.history]


# --- the guard ----------------------------------------------------------------------------------------------------


def test_within_tolerance_all_is_accepted(tmp_path: Path) -> None:
    run = trainer(tmp_path, Scripted([50, 49.0, 51, 49.5, 49]))
    position = run.run()
    assert (position.round, position.good_round, position.rollbacks, position.ntr_steps) == (4, 4, 0, 2)
    assert (position.before, position.good) == (50, 49)
    assert rows(run, "round", "val", "val_loss", "repaired", "accepted") == [
        (1, 49.0, 1.0, False, True),
        (2, 51, -1, False, True),
        (3, 49.5, 0.5, False, True),
        (4, 49, 1, False, True),
    ]
    assert all(math.isfinite(value) for row in rows(run, "query_loss", "ntr_loss", "gradient_norm") for value in row)
    assert [row["val"] for row in run.tracker.rows] == [49.0, 51, 49.5, 49]


def test_looks_every_so_often_and_after_the_last_round(tmp_path: Path) -> None:
    run = trainer(tmp_path, Scripted(), every=3)
    run.run()
    assert [row["round"] for row in run.at.history if "val" in row] == [3, 4]


def test_breach_is_repaired_by_more_training(tmp_path: Path) -> None:
    task, calls = Scripted([50, 40, 49.5]), []
    task.before_loss = lambda: calls.append(1)
    run = trainer(tmp_path, task, method=replace(METHOD, rounds=1))
    position = run.run()
    assert rows(run, "val", "repaired", "accepted") == [(49.5, True, True)]
    assert (position.good_round, position.rollbacks) == (1, 0)
    assert len(calls) == METHOD.ntr_steps + GUARD.repair_steps


def test_without_repair_steps_none_is_tried(tmp_path: Path) -> None:
    run = trainer(tmp_path, Scripted([50, 40]), repair_steps=0)
    run.run()
    assert rows(run, "val", "repaired", "accepted")[0] == (40, False, False)


def test_broken_beyond_repair_goes_back(tmp_path: Path) -> None:
    """To the weights and statistics of the last good round, to the bit, without the moments that led away."""
    states: dict[int, dict[str, Tensor]] = {}
    moments: dict[int, int] = {}

    def told(number: int) -> None:
        states[number] = state_of(run.model)
        moments[number] = len(run.fts.optimizer.state) + len(run.ntr.optimizer.state)

    run = trainer(tmp_path, Scripted([50, 50, 40, 41, 49.2]), told, method=replace(METHOD, rounds=3))
    position = run.run()
    assert rows(run, "val", "repaired", "accepted") == [(50, False, True), (41, True, False), (49.2, False, True)]
    assert all(torch.equal(states[2][name], value) for name, value in states[1].items())
    assert moments[1] == moments[3] == 2 * len(list(run.model.parameters()))
    assert moments[2] == 0
    assert (position.good_round, position.rollbacks) == (3, 1)
    assert_same_state(run.model, states[3])


def test_first_breach_goes_back_to_the_reference(tmp_path: Path) -> None:
    states = []
    run = trainer(tmp_path, Scripted([50, 40, 40]), lambda number: states.append(state_of(run.model)))
    run.run()
    assert all(torch.equal(states[0][name], value) for name, value in tiny_model().state_dict().items())


@pytest.mark.parametrize(
    ("start", "growth", "cap", "grown"),
    [(2, 1.5, 8, [3, 5, 8, 8]), (2, 1.0, 8, [2, 2, 2, 2]), (1, 1.1, 3, [2, 3, 3, 3]), (6, 2.0, 4, [6, 6, 6, 6])],
)
def test_rollbacks_give_training_more_weight(
    start: int, growth: float, cap: int, grown: list[int], tmp_path: Path
) -> None:
    seen = []
    run = trainer(
        tmp_path,
        Scripted([50, 10, 10, 10, 10]),
        lambda number: seen.append(run.at.ntr_steps),
        method=replace(METHOD, ntr_steps=start),
        repair_steps=0,
        growth=growth,
        max_ntr_steps=cap,
    )
    with pytest.raises(GuardError):
        run.run()
    assert seen == grown
    assert run.at.rollbacks == 4


def test_more_weight_means_more_steps(tmp_path: Path) -> None:
    task, calls, each = Scripted([50, 10, 50]), [], []
    task.before_loss = lambda: calls.append(1)
    run = trainer(tmp_path, task, lambda number: each.append(len(calls)), repair_steps=0)
    run.run()
    assert each == [2, 2 + 3, 2 + 3 + 3, 2 + 3 + 3 + 3]


def test_nothing_acceptable(tmp_path: Path) -> None:
    run = trainer(tmp_path, Scripted([50, *[10] * 20]))
    with pytest.raises(GuardError, match=r"guard.tolerance: no round kept score on val within 1.0 of 50;") as caught:
        run.run()
    assert "\n" not in str(caught.value)
    with pytest.raises(GuardError, match="no state that satisfied the guard"):
        last_good(tmp_path)


def test_ends_in_the_last_accepted_state(tmp_path: Path) -> None:
    states = {}

    def told(number: int) -> None:
        states[number] = state_of(run.model)

    run = trainer(tmp_path, Scripted([50, 50, 50, 10, 10, 10, 10]), told)
    position = run.run()
    assert (position.good_round, position.round, position.rollbacks) == (2, 4, 2)
    assert_same_state(run.model, states[2])
    weights, stored = last_good(tmp_path)
    assert_same_state(run.model, weights)
    assert asdict(stored) == asdict(position)


def test_lower_is_better(tmp_path: Path) -> None:
    """An error of 0.5 may grow to 0.6 at a tolerance of 0.1, and shrink as it likes."""
    run = trainer(tmp_path, Scripted([0.5, 0.59, 0.1, 0.61, 0.61, 0.59], higher=False), tolerance=0.1)
    position = run.run()
    assert rows(run, "val", "repaired", "accepted") == [
        (0.59, False, True),
        (0.1, False, True),
        (0.61, True, False),
        (0.59, False, True),
    ]
    assert [row["val_loss"] for row in run.at.history] == pytest.approx([0.09, -0.4, 0.11, 0.09])
    assert position.good == 0.59


def test_relative_tolerance_is_in_percent_of_the_reference(tmp_path: Path) -> None:
    """Of an error of 0.5, five percent are 0.025, whichever way it goes."""
    values = [0.5, 0.52, 0.53, 0.53, 0.1, 0.526, 0.524]
    run = trainer(tmp_path, Scripted(values, higher=False), tolerance=5.0, relative=True)
    position = run.run()
    assert rows(run, "val", "repaired", "accepted") == [
        (0.52, False, True),
        (0.53, True, False),
        (0.1, False, True),
        (0.524, True, True),
    ]
    assert [row["val_loss"] for row in run.at.history] == pytest.approx([4, 6, -80, 4.8])
    assert (position.before, position.good, position.rollbacks) == (0.5, 0.524, 1)


@pytest.mark.parametrize("higher", [False, True])
@pytest.mark.parametrize(("percent", "accepted"), [(6.24, True), (6.25, True), (6.26, False)])
def test_relative_tolerance_at_its_edge(higher: bool, percent: float, accepted: bool, tmp_path: Path) -> None:
    """A sixteenth of 64 is exact; an accuracy falls where an error grows."""
    value = 64 * (1 - percent / 100) if higher else 64 * (1 + percent / 100)
    run = trainer(
        tmp_path, Scripted([64, value, 64], higher=higher), method=replace(METHOD, rounds=2), tolerance=6.25,
        relative=True, repair_steps=0,
    )  # fmt: skip
    assert run.run().rollbacks == (not accepted)
    assert rows(run, "accepted") == [(accepted,), (True,)]
    assert run.at.history[0]["val_loss"] == pytest.approx(percent)


def test_relative_tolerance_of_a_negative_metric(tmp_path: Path) -> None:
    """Percent of its size: worse stays worse."""
    run = trainer(
        tmp_path, Scripted([-10, -9.6, -9, -10, -10], higher=False), tolerance=5.0, relative=True, repair_steps=0
    )
    run.run()
    assert [row["val_loss"] for row in run.at.history][:2] == pytest.approx([4, 10])
    assert rows(run, "accepted")[:2] == [(True,), (False,)]


def test_nothing_within_percent(tmp_path: Path) -> None:
    values = [0.5, *[0.6] * 20]
    run = trainer(tmp_path, Scripted(values, higher=False), tolerance=5.0, relative=True)
    with pytest.raises(
        GuardError, match=r"^guard.tolerance: no round kept score on val within 5.0 % of 0.5; raise it"
    ) as caught:
        run.run()
    assert "\n" not in str(caught.value)
    assert run.at.rollbacks == METHOD.rounds


def test_a_metric_that_is_not_a_number_is_a_breach(tmp_path: Path) -> None:
    """Of a broken model an error is NaN; that is repaired or rolled back like any other, and can be saved."""
    run = trainer(tmp_path, Scripted([0.5, 0.5, math.nan, math.nan, 0.5, 0.5], higher=False))
    position = run.run()
    assert rows(run, "repaired", "accepted") == [(False, True), (True, False), (False, True), (False, True)]
    assert position.rollbacks == 1
    assert last_good(tmp_path)[1] == position


def test_patience_lets_breaches_pass(tmp_path: Path) -> None:
    """Two in a row go on from the weights as they are; an acceptance starts the count again, the third goes back."""
    states, seen, moments = {}, [], []

    def told(number: int) -> None:
        states[number] = state_of(run.model)
        seen.append((run.at.breaches, run.at.rollbacks, run.at.ntr_steps, run.at.good_round))
        moments.append(len(run.fts.optimizer.state) > 0 and len(run.ntr.optimizer.state) > 0)

    values = [50, 50, 10, 11, 50, 12, 13, 14, 50]
    run = trainer(tmp_path, Scripted(values), told, method=replace(METHOD, rounds=8), patience=2, repair_steps=0)
    position = run.run()
    assert seen == [
        (0, 0, 2, 1),
        (1, 0, 2, 1),
        (2, 0, 2, 1),
        (0, 0, 2, 4),
        (1, 0, 2, 4),
        (2, 0, 2, 4),
        (0, 1, 3, 4),
        (0, 1, 3, 8),
    ]
    assert [row["accepted"] for row in run.at.history] == [True, False, False, True, False, False, False, True]
    assert moments == [True] * 6 + [False, True]
    weights = [states[number]["conv1.weight"] for number in range(1, 7)]
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(weights, 2))
    assert all(torch.equal(states[7][name], value) for name, value in states[4].items())
    assert position.good_round == 8


def test_without_patience_the_first_breach_goes_back(tmp_path: Path) -> None:
    run = trainer(tmp_path, Scripted([50, 50, 10, 50, 10]), repair_steps=0, patience=0)
    assert run.run().rollbacks == 2


def test_patience_tries_to_repair_all_the_same(tmp_path: Path) -> None:
    task, calls = Scripted([50, 10, 10, 10, 50]), []
    task.before_loss = lambda: calls.append(1)
    run = trainer(tmp_path, task, method=replace(METHOD, rounds=2), patience=5)
    assert run.run().good_round == 2
    assert rows(run, "val", "repaired", "accepted") == [(10, True, False), (50, True, True)]
    assert len(calls) == 2 * (METHOD.ntr_steps + GUARD.repair_steps)


@pytest.mark.parametrize(("first", "good"), [(10, 0), (50, 1)])
def test_patience_is_no_acceptance(first: int, good: int, tmp_path: Path) -> None:
    """What patience let pass is never handed out: the last accepted state is, or none."""
    states = {}

    def told(number: int) -> None:
        states[number] = state_of(run.model)

    run = trainer(tmp_path, Scripted([50, first, 10, 10, 10]), told, patience=100, repair_steps=0)
    if good == 0:
        with pytest.raises(GuardError, match="no round kept score on val"):
            run.run()
        with pytest.raises(GuardError, match="no state that satisfied the guard"):
            last_good(tmp_path)
        assert (run.at.breaches, run.at.rollbacks, run.at.round) == (4, 0, 4)
        return
    run.run()
    assert (run.at.breaches, run.at.rollbacks, run.at.good_round) == (3, 0, 1)
    assert_same_state(run.model, states[1])
    weights, position = last_good(tmp_path)
    assert_same_state(run.model, weights)
    assert position == run.at


def test_patience_goes_on_counting_after_an_interruption(tmp_path: Path) -> None:
    run = trainer(
        tmp_path,
        Scripted([50, 50, 10]),
        lambda number: number == 2 and signal.raise_signal(signal.SIGINT),
        patience=1,
        repair_steps=0,
    )
    with pytest.raises(KeyboardInterrupt):
        run.run()
    again = trainer(tmp_path, Scripted([10, 50]), patience=1, repair_steps=0)
    assert again.at.breaches == 1
    again.run()
    assert rows(again, "accepted") == [(True,), (False,), (False,), (True,)]
    assert again.at.rollbacks == 1


POOLED = replace(METHOD, pool=2, chunk=2, attackers=2)
LIVES = replace(SAMPLER, steps=[50, 50])


def test_a_rollback_empties_the_pool_and_patience_does_not(tmp_path: Path) -> None:
    """Attackers are displaced from weights that a roll-back takes away."""
    ages, started = [], []

    def told(number: int) -> None:
        ages.append(sum(member.taken for member in run.fts.pool.members.values()))
        started.append(len(run.fts.pool.members))

    run = trainer(
        tmp_path, Scripted([50, 50, 10, 10, 50]), told, method=POOLED, sampler=LIVES, patience=1, repair_steps=0
    )
    run.run()
    assert ages == [4, 8, 0, 4]  # two turns of two steps a round
    assert started[2] == 0


# --- the schedule and the original domain's gradient --------------------------------------------------------------


@pytest.mark.parametrize("weight", [pytest.param(0.0, marks=pytest.mark.slow), 0.5])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_both_rates_follow_the_schedule_over_the_rounds(schedule: str, weight: float, tmp_path: Path) -> None:
    """Of the rounds, not of the steps in them; with the original domain's gradient and without."""
    method = replace(
        METHOD, rounds=12, schedule=schedule, fts_steps=2, attackers=1, fts_lr=0.01, ntr_lr=0.02,
        fts_original_weight=weight,
    )  # fmt: skip
    run = trainer(tmp_path, Scripted(), method=method, every=12)
    fts, ntr = [], []
    for optimizer, used in ((run.fts.optimizer, fts), (run.ntr.optimizer, ntr)):
        optimizer.register_step_pre_hook(lambda of, *_, used=used: used.append(of.param_groups[0]["lr"]))
    run.run()
    cosine = [(1 + math.cos(math.pi * number / 12)) / 2 for number in range(12)]
    warmup = [1.0] * 12  # a tenth of twelve rounds is one
    factors = {"constant": [1.0] * 12, "cosine": cosine, "warmup": warmup, "warmup_cosine": cosine}[schedule]
    assert fts == pytest.approx([0.01 * factor for factor in factors for _ in range(2)], rel=1e-12)
    assert ntr == pytest.approx([0.02 * factor for factor in factors for _ in range(METHOD.ntr_steps)], rel=1e-12)


def test_rates_rise_over_the_first_tenth_of_the_rounds(tmp_path: Path) -> None:
    method = replace(METHOD, rounds=20, schedule="warmup", attackers=1, ntr_steps=1, fts_lr=0.01)
    run = trainer(tmp_path, Scripted(), method=method, every=20)
    used: list[float] = []
    run.fts.optimizer.register_step_pre_hook(lambda of, *_: used.append(of.param_groups[0]["lr"]))
    run.run()
    assert used == pytest.approx([0.005] + [0.01] * 19)


def test_a_scheduled_run_goes_on_where_the_schedule_was(tmp_path: Path) -> None:
    method = replace(METHOD, schedule="cosine")
    run = trainer(tmp_path, Scripted(), lambda n: n == 2 and signal.raise_signal(signal.SIGINT), method=method)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    again, used = trainer(tmp_path, Scripted(), method=method), []
    again.fts.optimizer.register_step_pre_hook(lambda of, *_: used.append(of.param_groups[0]["lr"]))
    again.run()
    assert used == pytest.approx([0.5e-2, 1e-2 * (1 - math.sqrt(0.5)) / 2])


@pytest.mark.parametrize(("weight", "batches"), [(0.0, 2), (0.5, 2 + 3)])
def test_every_suppression_step_sees_original_images_of_its_own(weight: float, batches: int, tmp_path: Path) -> None:
    """One batch an FTS step, none of them NTR's; without a weight none at all."""
    seen: list[Tensor] = []

    class Recording(Scripted):
        def original_loss(self, model: nn.Module, batch: Any, reference: nn.Module | None = None) -> Tensor:
            seen.append(batch.images)
            return super().original_loss(model, batch, reference)

    method = replace(METHOD, rounds=2, fts_steps=3, fts_original_weight=weight, ntr_augmentation="none")
    trainer(tmp_path, Recording(), method=method).run()
    assert len(seen) == 2 * batches
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(seen, 2))


def test_the_original_gradient_is_that_of_the_weights_as_they_are(tmp_path: Path) -> None:
    """What an FTS step takes along is what the ntr says of the very weights that it steps."""
    run = trainer(tmp_path, Scripted(), method=replace(METHOD, fts_steps=2, fts_original_weight=0.7))
    step, gradient = run.fts.step, run.ntr.gradient
    given: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    taken: list[dict[str, Tensor]] = []

    def asked(*key: object) -> dict[str, Tensor]:
        given.append((gradient(*key), state_of(run.model)))
        return given[-1][0]

    def stepped(*key: object, anchor: dict[str, Tensor], **options: Any) -> FTSStep:
        assert anchor is given[-1][0]
        assert_same_state(run.model, given[-1][1])
        taken.append(anchor)
        return step(*key, anchor=anchor, **options)

    run.ntr.gradient, run.fts.step = asked, stepped  # type: ignore[method-assign, assignment]
    run.run()
    assert len(taken) == 2 * METHOD.rounds
    assert all(anchor.keys() == dict(run.model.named_parameters()).keys() for anchor in taken)


def test_reference_is_never_changed(tmp_path: Path) -> None:
    reference = tiny_model()
    before = state_of(reference)
    trainer(tmp_path, Scripted(), model=reference).run()
    assert_same_state(reference, before)


def test_rounds_without_a_finite_attacker(tmp_path: Path) -> None:
    run = trainer(tmp_path, Scripted(), method=replace(METHOD, rounds=2, fts_steps=2))
    nothing = FTSStep(math.nan, math.nan, math.nan, 2)
    steps = iter([nothing, nothing, nothing, FTSStep(3.0, 2.0, 1.0, 1)])
    run.fts.step = lambda *key, **options: next(steps)  # type: ignore[method-assign]
    run.run()
    assert rows(run, "query_loss", "attacker_loss", "gradient_norm", "diverged") == [
        (None, None, None, 4),
        (3, 2, 1, 3),
    ]
    assert "query_loss" not in run.tracker.rows[0]
    assert last_good(tmp_path)[1].history == run.at.history


def test_loss_that_is_not_finite_keeps_the_last_check(tmp_path: Path) -> None:
    def spoil(number: int) -> None:
        if number == 2:
            with torch.no_grad():
                run.model.fc.bias[0] = math.nan

    run = trainer(tmp_path, Scripted(), spoil)
    with pytest.raises(UserError, match=r"method.ntr_lr"):
        run.run()
    weights, position = last_good(tmp_path)
    assert position.round == 2
    assert all(value.isfinite().all() for value in weights.values())


# --- the state ----------------------------------------------------------------------------------------------------


class Sensitive(ClassificationTask):
    """Accepted, repaired and rolled back in turns, by how many batches BatchNorm saw; the weights leave their trace."""

    def evaluate(self, model: nn.Module, images: ImageSet) -> float:
        seen = int(model.bn1.num_batches_tracked)
        weights = sum(float(parameter.detach().double().sum()) for parameter in model.parameters())
        return (10.0 if -seen % 12 >= 5 else 0.0) + 1e-3 * math.tanh(weights)


LONG = replace(METHOD, rounds=9, fts_steps=2, attackers=1, fts_max_norm=1.0)


def long_run(folder: Path, told: Callable[[int], None] = lambda number: None, kind: str = "float64") -> Trainer:
    """Guard checks after every second round; heads and optimizers of every kind."""
    dtype = torch.float64 if kind == "float64" else torch.float32
    model = tiny_model().to(dtype)
    if kind == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    task = Sensitive(tiny_spec(), suppression_loss="klu", dtype=dtype, distillation=0.5)
    return trainer(folder, task, told, model, LONG, every=2, tolerance=4.0)


def everything(run: Trainer) -> dict[str, Any]:
    optimizers = (run.fts.optimizer, run.ntr.optimizer)
    return {
        "model": state_of(run.model),
        "good": dict(run.good),
        "probe": dict(run.fts.attackers.probed[0]) if run.fts.attackers.probed else {},
        "moments": [
            {
                f"{index}.{name}": value
                for index, state in o.state_dict()["state"].items()
                for name, value in state.items()
            }
            for o in optimizers
        ],
        "pool": (run.fts.pool.tensors(), run.fts.pool.record()),
        "position": asdict(run.at),
    }


def assert_equal(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert set(found) == set(expected)
        for key, value in expected.items():
            assert_equal(found[key], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    else:
        assert found == expected


@pytest.fixture(scope="module", params=["float64", pytest.param("channels_last", marks=pytest.mark.slow)])
def uninterrupted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Any]]:
    torch.set_num_threads(1)
    run = long_run(tmp_path_factory.mktemp("whole"), kind=request.param)
    run.run()
    checks = [(row["repaired"], row["accepted"]) for row in run.at.history if "accepted" in row]
    assert checks == [(False, True), (True, False), (True, True), (True, False), (False, True)]
    assert run.fts.optimizer.state
    return request.param, everything(run)


class KilledError(Exception):
    pass


# a state is written after every other round, so the fast set has one of each kind
ANY_ROUND = [at if at in (3, 4) else pytest.param(at, marks=pytest.mark.slow) for at in range(1, 9)]


@pytest.mark.parametrize("how", ["killed", "stopped"])
@pytest.mark.parametrize("at", ANY_ROUND)
def test_going_on_equals_never_having_stopped(
    at: int, how: str, uninterrupted: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    """Killed before a round is saved, or asked to stop after it; a fresh process then repeats the very numbers."""
    kind, expected = uninterrupted

    def told(number: int) -> None:
        if number == at and how == "killed":
            raise KilledError
        if number == at:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KilledError if how == "killed" else KeyboardInterrupt):
        long_run(tmp_path, told, kind).run()
    torch.manual_seed(at)
    run = long_run(tmp_path, kind=kind)
    saved = 2 * ((at - 1) // 2) if how == "killed" else at
    assert run.at.round == saved
    assert len(run.at.history) == saved
    run.run()
    assert_equal(everything(run), expected)


def test_stopped_after_every_round(uninterrupted: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    kind, expected = uninterrupted
    for _ in range(8):
        with pytest.raises(KeyboardInterrupt):
            long_run(tmp_path, lambda number: signal.raise_signal(signal.SIGTERM), kind).run()
    run = long_run(tmp_path, kind=kind)
    run.run()
    assert_equal(everything(run), expected)
    again = long_run(tmp_path, lambda number: pytest.fail("a finished run has no rounds left"), kind)
    again.run()
    assert_equal(state_of(again.model), expected["model"])


ATTACKERS = SamplerConfig({"adam": [1e-3, 1e-1], "momentum": [1e-3, 1e-1]}, [6], [1, 9], scopes=["all", "head"])
PERSISTENT = replace(LONG, pool=3, chunk=2, fts_original_weight=0.5, schedule="cosine", query_every=2)


def pooled_run(folder: Path, told: Callable[[int], None] = lambda number: None) -> Trainer:
    """Persistent attackers of every kind, the original domain's gradient, falling rates and some patience."""
    task = Sensitive(tiny_spec(), suppression_loss="klu", dtype=torch.float32, distillation=0.5)
    model = tiny_model().float()
    return trainer(folder, task, told, model, PERSISTENT, ATTACKERS, every=2, tolerance=4.0, patience=1)


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    torch.set_num_threads(1)
    sizes: list[int] = []
    run = pooled_run(tmp_path_factory.mktemp("pooled"), lambda _: sizes.append(len(run.fts.pool.members)))
    run.run()
    checks = [row["accepted"] for row in run.at.history if "accepted" in row]
    assert (checks, run.at.rollbacks) == ([False, False, True, True, False], 1)
    assert sizes[3] == 0  # rolled back
    assert min(sizes[:3] + sizes[4:]) > 0
    return everything(run)


@pytest.mark.parametrize("how", ["killed", "stopped"])
@pytest.mark.parametrize("at", ANY_ROUND)
def test_a_pool_goes_on_to_the_bit(at: int, how: str, pooled: dict[str, Any], tmp_path: Path) -> None:
    def told(number: int) -> None:
        if number == at and how == "killed":
            raise KilledError
        if number == at:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KilledError if how == "killed" else KeyboardInterrupt):
        pooled_run(tmp_path, told).run()
    torch.manual_seed(at)
    run = pooled_run(tmp_path)
    assert run.at.round == (2 * ((at - 1) // 2) if how == "killed" else at)
    run.run()
    assert_equal(everything(run), pooled)


OPERATING = replace(ATTACKERS, surgeries=[[], [{"operation": "reset_affine"}], [{"operation": "prune"}]])
HARDENED = replace(PERSISTENT, fixed_norms="channel", curriculum="bandit", attackers=2)
INVERTED = LoadedDomain(
    "inverted",
    RESTRICTED.classes,
    {name: replace(part, images=255 - part.images) for name, part in RESTRICTED.splits.items()},
    {},
)


def hardened_run(folder: Path, told: Callable[[int], None] = lambda number: None) -> Trainer:
    """Two domains, attackers who operate, a curriculum, norms held fixed."""
    task = ClassificationTask(tiny_spec(), suppression_loss="klu", dtype=torch.float64, distillation=0.5)
    model, limits = tiny_model(), replace(GUARD, every=2, tolerance=100.0)
    domains, attackers = [RESTRICTED, INVERTED], StrategySampler(OPERATING)
    released = copy.deepcopy(model)
    return Trainer(released, model, task, ORIGINAL, domains, attackers, HARDENED, limits, 0, folder, Listener(told))


def hardened_end(run: Trainer) -> dict[str, Any]:
    heads = [dict(head) for head in run.fts.attackers.probed]
    return everything(run) | {"probe": heads, "curriculum": run.fts.curriculum.record()}


def test_a_hardened_protection_goes_on_to_the_bit(tmp_path: Path) -> None:
    whole = hardened_run(tmp_path / "whole")
    (tmp_path / "whole").mkdir()
    whole.run()
    assert {member.domain for member in whole.fts.pool.members.values()} == {0, 1}
    (tmp_path / "parts").mkdir()
    for _ in range(HARDENED.rounds - 1):
        with pytest.raises(KeyboardInterrupt):
            hardened_run(tmp_path / "parts", lambda number: signal.raise_signal(signal.SIGINT)).run()
    run = hardened_run(tmp_path / "parts")
    run.run()
    assert_equal(hardened_end(run), hardened_end(whole))


def test_norms_stay_the_references(tmp_path: Path) -> None:
    run = hardened_run(tmp_path)
    run.run()
    for name in ("conv1.weight", "conv2.weight"):
        found, expected = (each.get_parameter(name).flatten(1).norm(dim=1) for each in (run.model, tiny_model()))
        torch.testing.assert_close(found, expected)
        assert not torch.equal(run.model.get_parameter(name), tiny_model().get_parameter(name))
    free = trainer(tmp_path / "free", Scripted(), method=replace(HARDENED, fixed_norms="none"), sampler=OPERATING)
    (tmp_path / "free").mkdir()
    free.run()
    weight = free.model.get_parameter("conv1.weight").flatten(1).norm(dim=1)
    assert not torch.allclose(weight, tiny_model().get_parameter("conv1.weight").flatten(1).norm(dim=1))


def test_norms_that_hold_nothing_are_said(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).double()
    for model, said in ((plain, True), (tiny_model(), False)):
        run = trainer(tmp_path, Scripted(), model=model, method=replace(METHOD, fixed_norms="layer"))
        assert isinstance(run.tracker, Listener)
        assert any("method.fixed_norms: no layer" in line for line in run.tracker.said) == said


def test_last_good_of_a_run_with_a_pool(tmp_path: Path) -> None:
    run = trainer(tmp_path, Scripted([50, 50, 50, 10, 10]), method=POOLED, sampler=LIVES, patience=5, repair_steps=0)
    run.run()
    tensors, metadata = read_tensors(tmp_path / STATE_FILE)
    assert any(name.startswith("pool/") for name in tensors)
    assert metadata["pool"]
    weights, position = last_good(tmp_path)
    assert_same_state(run.model, weights)
    assert (position, position.good_round) == (run.at, 2)


def test_a_state_of_an_older_version_goes_on(uninterrupted: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    """One that knows of no pool and has counted no breaches."""
    kind, expected = uninterrupted
    with pytest.raises(KeyboardInterrupt):
        long_run(tmp_path, lambda number: number == 5 and signal.raise_signal(signal.SIGINT), kind).run()
    path = tmp_path / STATE_FILE
    tensors, metadata = read_tensors(path)
    assert (metadata.pop("pool"), metadata.pop("breaches")) == ({}, 0)
    write_tensors(path, tensors, metadata)
    assert last_good(tmp_path)[1].breaches == 0
    run = long_run(tmp_path, kind=kind)
    assert run.at.round == 5
    run.run()
    assert_equal(everything(run), expected)


DENOISERS_METHOD = replace(METHOD, rounds=4, fts_steps=1, attackers=2, distillation=0.5, probe_steps=1)


DENOISERS_POOL = replace(
    DENOISERS_METHOD, pool=2, chunk=1, fts_original_weight=0.5, schedule="cosine", suppression_timesteps=0.4
)


def denoisers_run(folder: Path, kind: str, told: Callable[[int], None] = lambda number: None) -> Trainer:
    """Checked after every second round; the head starts of a conditional model are of every kind."""
    conditional = kind != "unconditional"
    method = DENOISERS_POOL if kind == "pooled" else DENOISERS_METHOD
    spec = tiny_unet_spec(conditional=conditional)
    task = DenoisingTask(
        spec,
        suppression_loss="dos",
        suppression_timesteps=method.suppression_timesteps,
        distillation=method.distillation,
        dtype=torch.float64,
    )
    model = tiny_unet(conditional=conditional)
    heads = ["kept", "fresh", "probed"] if conditional else ["kept"]
    return Trainer(
        copy.deepcopy(model),
        model,
        task,
        ORIGINAL,
        [RESTRICTED],
        StrategySampler(replace(SAMPLER, steps=[2, 3] if kind == "pooled" else [1, 2], heads=heads)),
        method,
        GuardConfig(every=2, tolerance=1e6, relative=True, repair_steps=1),
        0,
        folder,
        Listener(told),
    )


@pytest.fixture(scope="module", params=["unconditional", "conditional", "pooled"])
def denoiser(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    run = denoisers_run(tmp_path_factory.mktemp("denoiser"), request.param)
    run.run()
    assert run.at.good_round == DENOISERS_METHOD.rounds
    heads = set() if request.param == "unconditional" else {"class_embedding.weight"}
    assert {name for head in run.fts.attackers.probed for name in head} == heads
    assert bool(run.fts.pool.members) == (request.param == "pooled")
    return request.param, everything(run)


@pytest.mark.slow
@pytest.mark.parametrize(("at", "how"), [(1, "stopped"), (3, "killed")])
def test_a_denoisers_protection_goes_on_to_the_bit(
    at: int, how: str, denoiser: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    """Its losses draw noise and timesteps from torch's global generator, which another process finds elsewhere."""
    kind, expected = denoiser

    def told(number: int) -> None:
        torch.rand(number)  # whatever a tracker may draw
        if number == at and how == "killed":
            raise KilledError
        if number == at:
            signal.raise_signal(signal.SIGINT)

    torch.manual_seed(at)
    with pytest.raises(KilledError if how == "killed" else KeyboardInterrupt):
        denoisers_run(tmp_path, kind, told).run()
    torch.manual_seed(1000 + at)
    torch.rand(at)
    run = denoisers_run(tmp_path, kind)
    assert run.at.round == (2 * ((at - 1) // 2) if how == "killed" else at)
    run.run()
    assert_equal(everything(run), expected)


def test_a_denoisers_protection_moves_all_of_it(denoiser: tuple[str, dict[str, Any]]) -> None:
    kind, found = denoiser
    before = state_of(tiny_unet(conditional=kind != "unconditional"))
    assert all(value.isfinite().all() and not torch.equal(value, before[name]) for name, value in found["good"].items())


def test_state_is_one_safetensors_file(tmp_path: Path) -> None:
    """Eight bytes of length, JSON, and raw numbers that fill the rest exactly: no room for anything executable."""
    trainer(tmp_path, Scripted()).run()
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]
    data = (tmp_path / STATE_FILE).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__")
    ends = sorted(entry["data_offsets"] for entry in header.values())
    assert all(one[1] == other[0] for one, other in itertools.pairwise(ends))
    assert (ends[0][0], ends[-1][1]) == (0, len(data) - 8 - length)
    assert {entry["dtype"] for entry in header.values()} <= {"F64", "F32", "I64"}
    assert {name.split("/")[0] for name in header} == {"model", "good", "probe", "fts", "ntr"}


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_truncated_state(kept: float, tmp_path: Path) -> None:
    trainer(tmp_path, Scripted(), method=replace(METHOD, rounds=1)).run()
    path = tmp_path / STATE_FILE
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    for read in (lambda: trainer(tmp_path, Scripted()), lambda: last_good(tmp_path)):
        with pytest.raises(UserError, match=f"{STATE_FILE}: it is truncated") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_no_state(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        last_good(tmp_path)


def test_last_good_of_an_unfinished_run(tmp_path: Path) -> None:
    def told(number: int) -> None:
        if number == 2:
            states.append(state_of(run.model))
        if number == 3:
            signal.raise_signal(signal.SIGINT)

    states: list[dict[str, Tensor]] = []
    run = trainer(tmp_path, Scripted([50, 50, 50, 10, 10]), told)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    weights, position = last_good(tmp_path)
    assert (position.round, position.good_round) == (3, 2)
    assert_equal(weights, states[0])


# --- interruptions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_finishes_the_round_and_saves(number: signal.Signals, tmp_path: Path) -> None:
    """Sent in the middle of the second round's training; no guard check is due then."""
    task, calls = Scripted(), itertools.count(1)

    def before_loss() -> None:
        if next(calls) == METHOD.ntr_steps + 1:
            signal.raise_signal(number)

    task.before_loss = before_loss
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run = trainer(tmp_path, task, every=4)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert [row["round"] for row in run.at.history] == [1, 2]
    assert next(calls) == 2 * METHOD.ntr_steps + 1
    assert trainer(tmp_path, Scripted(), every=4).at == run.at


def test_second_signal_interrupts_at_once(tmp_path: Path) -> None:
    task = Scripted()
    task.before_loss = lambda: signal.raise_signal(signal.SIGINT)
    run = trainer(tmp_path, task)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert run.at.round == 0
    assert not (tmp_path / STATE_FILE).exists()


def test_signal_in_the_last_round_just_ends_the_run(tmp_path: Path) -> None:
    run = trainer(tmp_path, Scripted(), lambda number: number == 4 and signal.raise_signal(signal.SIGINT))
    assert run.run().good_round == 4


def test_runs_outside_the_main_thread(tmp_path: Path) -> None:
    run, ended = trainer(tmp_path, Scripted()), []
    thread = threading.Thread(target=lambda: ended.append(run.run().round))
    thread.start()
    thread.join()
    assert ended == [4]


# --- that it protects ---------------------------------------------------------------------------------------------

ATTACKER = FineTuneStrategy(optimizer="momentum", lr=0.05, batch_size=12, steps=10)


def attackers_accuracy(model: nn.Module, task: ClassificationTask, images: dict[str, ImageSet]) -> float:
    """Mean accuracy in percent of attackers with the simulated strategy, on images protection never saw."""
    reached = []
    for head, seed in itertools.product(("kept", "fresh"), range(6)):
        victim = copy.deepcopy(model)
        torch.manual_seed(seed)
        task.start_head(victim, head, task.spec.classes)
        fine_tune(victim, ATTACKER, task, images["attack"], torch.Generator().manual_seed(seed))
        reached.append(task.evaluate(victim, images["test"]))
    return sum(reached) / len(reached)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_protection_costs_the_attacker_and_not_the_original_domain(seed: int, tmp_path: Path) -> None:
    """Bands across the image are the original domain, upright ones the restricted."""
    original = tiny_bands("original", ("train", "val", "test"), 100 * seed, per_class=20)
    splits = ("adapt", "query", "test", "attack")
    restricted = tiny_bands("restricted", splits, 100 * seed + 50, across=True, per_class=20)
    task = ClassificationTask(tiny_spec(), suppression_loss="klu")
    torch.manual_seed(seed)
    reference = TinyNet()
    pretraining = FineTuneStrategy(optimizer="adam", lr=0.02, batch_size=20, steps=80)
    fine_tune(reference, pretraining, task, original["train"], torch.Generator().manual_seed(seed))
    method = MethodConfig(
        name="test", rounds=60, ntr_steps=5, fts_lr=0.02, ntr_lr=5e-3, attackers=2, query_every=2, query_batch_size=20,
        ntr_batch_size=20, ntr_augmentation="none",
    )  # fmt: skip
    guard = GuardConfig(every=10, tolerance=2.0, repair_steps=30, max_ntr_steps=40)
    lr, steps = ATTACKER.lr, ATTACKER.steps
    sampler = StrategySampler(SamplerConfig({"momentum": [lr, lr]}, [12], [steps, steps], ["kept", "fresh"]))
    model = copy.deepcopy(reference)
    run = Trainer(model, reference, task, original, [restricted], sampler, method, guard, seed, tmp_path, Tracker())
    position = run.run()

    assert task.evaluate(reference, original["test"]) > 95
    assert position.good >= position.before - 2
    assert task.evaluate(model, original["test"]) > 95
    unprotected, protected = (attackers_accuracy(net, task, restricted.splits) for net in (reference, model))
    assert unprotected > 60
    assert protected < unprotected - 10
