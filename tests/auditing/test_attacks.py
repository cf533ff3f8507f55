"""One attempt: which splits it reads and when, what it reports, and that the same seed repeats it."""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import optuna
import pytest
import torch
from torch import Tensor, nn

from sophon.attacker import FineTuneStrategy
from sophon.auditing.attacks import Outcome, attack, linear_probe
from sophon.domains import Batch, ImageSet, LoadedDomain
from sophon.finetune import flops_per_step
from sophon.tasks import ClassificationTask
from tests.tiny import CLASSES, assert_same_state, state_of, tiny_bands, tiny_model, tiny_spec, tiny_task

SPLITS = ("attack", "select", "test")
RESTRICTED = tiny_bands("restricted", SPLITS, seed=40, across=True)
PLAN = FineTuneStrategy(optimizer="adam", lr=0.02, batch_size=8, steps=10, head="kept")


class Reading(LoadedDomain):
    """Remembers which splits were asked for; it has the attacker's only."""

    def __getitem__(self, split: str) -> ImageSet:
        reads.append(split)
        return super().__getitem__(split)


reads: list[str] = []


class Watching(ClassificationTask):
    """Remembers what it trained on and what it measured."""

    def __init__(self) -> None:
        super().__init__(tiny_spec(), dtype=torch.float64)
        self.trained: list[Batch] = []
        self.measured: list[ImageSet] = []
        self.heads: list[Tensor] = []

    def attacker_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        self.trained.append(batch)
        self.heads.append(model.fc.weight.detach().clone())
        return super().attacker_loss(model, batch)

    def evaluate(self, model: nn.Module, images: ImageSet) -> float:
        self.measured.append(images)
        return super().evaluate(model, images)


def run(
    strategy: FineTuneStrategy = PLAN,
    task: Any = None,
    seed: int = 0,
    points: int = 3,
    model: Any = None,
    **options: Any,
) -> Outcome:
    model = tiny_model() if model is None else model
    return attack(
        model, strategy, task or tiny_task(), RESTRICTED, spec=tiny_spec(), seed=seed, eval_points=points, **options
    )


def facts(outcome: Outcome) -> tuple[Any, ...]:
    return outcome.curve, outcome.test, outcome.finished, outcome.flops


def pixels(images: Tensor) -> Counter[bytes]:
    return Counter(image.numpy().tobytes() for image in images)


@pytest.mark.parametrize("head", ["kept", "fresh", "probed"])
def test_reads_the_attackers_splits_only_and_test_once_at_the_end(head: str) -> None:
    reads.clear()
    domain = Reading("restricted", CLASSES, RESTRICTED.splits, RESTRICTED.hashes)
    task = Watching()
    outcome = attack(
        tiny_model(), replace(PLAN, head=head, probe_steps=3), task, domain, spec=tiny_spec(), seed=0, eval_points=3
    )
    assert set(reads) == set(SPLITS)
    assert reads[-1] == "test"
    assert reads.count("test") == 1
    assert [images is RESTRICTED["test"] for images in task.measured] == [False, False, False, True]
    assert all(images is RESTRICTED["select"] for images in task.measured[:-1])
    owned = pixels(RESTRICTED["attack"].images)
    assert all(set(pixels(batch.images)) <= set(owned) for batch in task.trained)
    assert 0 <= outcome.test.value <= 100
    assert outcome.seconds > 0


@pytest.mark.parametrize(
    ("steps", "points", "expected"),
    [
        (10, 2, [0, 10]),
        (10, 3, [0, 5, 10]),
        (10, 6, [0, 2, 4, 6, 8, 10]),
        (7, 4, [0, 2, 5, 7]),
        (2, 9, [0, 1, 2]),
        (1, 2, [0, 1]),
        (0, 2, [0]),
        (0, 6, [0]),
    ],
)
def test_points_of_the_curve(steps: int, points: int, expected: list[int]) -> None:
    outcome = run(replace(PLAN, steps=steps), points=points)
    assert [step for step, _ in outcome.curve] == expected
    assert all(0 <= value <= 100 for _, value in outcome.curve)
    assert outcome.finished


def test_curve_and_test_measure_the_model_as_it_is_then() -> None:
    """The start is the untouched model, the end is the fine-tuned one."""
    model, task = tiny_model(), tiny_task()
    start = task.evaluate(model, RESTRICTED["select"])
    outcome = run(replace(PLAN, steps=60), model=model)
    assert outcome.curve[0] == (0, start)
    assert outcome.curve[-1] == (60, task.evaluate(model, RESTRICTED["select"]))
    assert outcome.test == task.measure(model, RESTRICTED["test"])
    assert outcome.test.value > start + 20


def test_restated_statistics_are_those_of_the_weights_as_they_are_then() -> None:
    """A rate so high that running statistics lag behind; training itself must not notice that it was measured."""
    plan = replace(PLAN, steps=12, lr=0.1)
    lagging, restated = run(plan), run(replace(plan, batch_norm="restated"))
    for (name, one), (_, other) in zip(
        lagging.model.named_parameters(), restated.model.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    model, task = copy.deepcopy(lagging.model), tiny_task()
    norm = model.get_submodule("bn1")
    assert not torch.allclose(norm.running_mean, restated.model.get_submodule("bn1").running_mean, rtol=0.01)
    norm.reset_running_stats()
    norm.momentum = None
    norm.train()
    task.logits(model, RESTRICTED["attack"].images)  # the attacker's images, once: a mean over many batches is near it
    found = restated.model.get_submodule("bn1")
    assert torch.allclose(norm.running_mean, found.running_mean, rtol=0.05, atol=0.05 * found.running_mean.abs().max())
    assert restated.test == task.measure(restated.model, RESTRICTED["test"])
    assert restated.curve[-1] == (12, task.evaluate(restated.model, RESTRICTED["select"]))


@pytest.mark.parametrize("steps", [0, 4])
def test_a_search_does_not_read_test(steps: int) -> None:
    reads.clear()
    domain = Reading("restricted", CLASSES, RESTRICTED.splits, RESTRICTED.hashes)
    task, plan = Watching(), replace(PLAN, steps=steps)
    outcome = attack(tiny_model(), plan, task, domain, spec=tiny_spec(), seed=0, eval_points=3, read_test=False)
    assert math.isnan(outcome.test.value)
    assert set(reads) == {"attack", "select"}
    assert all(images is RESTRICTED["select"] for images in task.measured)
    assert outcome.curve == run(plan).curve


def test_each_point_is_told_with_the_model_as_it_is_then() -> None:
    model, told = tiny_model(), []

    def at_point(now: nn.Module, step: int, value: float) -> None:
        assert now is model
        assert value == tiny_task().evaluate(now, RESTRICTED["select"])
        told.append((step, value))

    outcome = run(points=6, model=model, at_point=at_point)
    assert told == outcome.curve
    assert facts(outcome) == facts(run(points=6))


@pytest.mark.parametrize("stop", [0, 5, 10])
def test_it_can_be_given_up_at_any_point(stop: int) -> None:
    task = Watching()

    def at_point(model: nn.Module, step: int, value: float) -> None:
        if step == stop:
            raise optuna.TrialPruned

    with pytest.raises(optuna.TrialPruned):
        run(task=task, at_point=at_point)
    assert len(task.trained) == 1 + stop  # the first is counted, not trained
    assert not any(images is RESTRICTED["test"] for images in task.measured)


def test_head_starts() -> None:
    released = tiny_model().fc.weight.detach()

    def first_heads(head: str, seed: int = 0) -> list[Tensor]:
        task = Watching()
        run(replace(PLAN, head=head, probe_steps=4, probe_lr=0.05, steps=2), task, seed)
        return task.heads

    kept, fresh, probed = (first_heads(head) for head in ("kept", "fresh", "probed"))
    assert torch.equal(kept[0], released)
    assert not torch.equal(fresh[0], released)
    # before it trains, each fine-tuning counts its operations on one batch
    assert (len(kept), len(fresh), len(probed)) == (1 + 2, 1 + 2, 1 + 4 + 1 + 2)
    assert torch.equal(probed[1], fresh[1])  # probing begins with a fresh head
    assert not torch.equal(probed[6], probed[1])
    assert not torch.equal(first_heads("fresh", seed=1)[0], fresh[0])


def test_probing_moves_the_head_alone() -> None:
    """As its docstring says: alone, with Adam, at probe_lr, on the attacker's own batches."""
    plan = replace(PLAN, head="probed", probe_steps=5, probe_lr=0.03, augmentation="crop", weight_decay=0.1)
    assert linear_probe(plan) == FineTuneStrategy("adam", 0.03, 0.0, "constant", 8, 5, "head", augmentation="crop")
    before, probed, tuned = (
        state_of(model) for model in (tiny_model(), run(replace(plan, steps=0)).model, run(plan).model)
    )
    assert {name for name in before if not torch.equal(before[name], probed[name])} == {"fc.weight", "fc.bias"}
    assert all(not torch.equal(probed[name], tuned[name]) for name in before)


def test_flops_count_the_steps_and_the_probe() -> None:
    images, task = RESTRICTED["attack"], tiny_task()
    one = flops_per_step(tiny_model(), PLAN, task, images)
    assert run(PLAN).flops == 10 * one
    assert run(replace(PLAN, steps=20)).flops == 20 * one
    probed = replace(PLAN, head="probed", probe_steps=7)
    outcome = run(probed)
    assert outcome.prepared_flops == 7 * flops_per_step(tiny_model(), linear_probe(probed), task, images) > 0
    assert outcome.flops == 10 * one + outcome.prepared_flops
    assert run(PLAN).prepared_flops == 0
    assert run(replace(PLAN, scope="head")).flops < 10 * one


@pytest.mark.parametrize("budget", [3, 9])
def test_data_budget(budget: int) -> None:
    task = Watching()
    run(replace(PLAN, data_budget=budget, steps=12), task)
    seen = {
        image: label
        for batch in task.trained
        for image, label in zip(pixels_of(batch), batch.labels.tolist(), strict=True)
    }
    assert len(seen) == budget
    assert Counter(seen.values()) == dict.fromkeys(range(3), budget // 3)


def pixels_of(batch: Batch) -> list[bytes]:
    return [image.numpy().tobytes() for image in batch.images]


@pytest.mark.parametrize("head", ["fresh", "probed"])
def test_two_models_face_the_same_head_and_batches(head: str) -> None:
    plan = replace(PLAN, head=head, augmentation="strong", data_budget=24, probe_steps=2, steps=4)
    one, other = Watching(), Watching()
    run(plan, one, model=tiny_model(0))
    run(plan, other, model=tiny_model(1))
    assert torch.equal(one.heads[0], other.heads[0])
    assert len(one.trained) == len(other.trained)
    for mine, theirs in zip(one.trained, other.trained, strict=True):
        assert torch.equal(mine.images, theirs.images)
        assert torch.equal(mine.labels, theirs.labels)


def test_divergence_is_reported_and_measured() -> None:
    model = tiny_model().float()
    plan = replace(PLAN, optimizer="nesterov", lr=1e38, steps=20)
    outcome = run(plan, ClassificationTask(tiny_spec()), points=5, model=model)
    assert not outcome.finished
    assert outcome.curve[0][0] == 0
    assert outcome.curve[-1][0] < 20
    assert all(math.isfinite(value) for _, value in outcome.curve)
    assert math.isnan(outcome.test.value)  # so are the weights: no accuracy


@pytest.mark.parametrize("split", ["select", "test"])
def test_an_attempt_whose_outputs_are_not_finite_has_not_finished(split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task, genuine = tiny_task(), ClassificationTask.evaluate

    def evaluate(self: ClassificationTask, model: nn.Module, images: ImageSet) -> float:
        return math.nan if images is RESTRICTED[split] else genuine(self, model, images)

    monkeypatch.setattr(ClassificationTask, "evaluate", evaluate)
    assert not run(PLAN, task).finished


def test_domain_is_never_changed() -> None:
    before = {split: images.sha256() for split, images in RESTRICTED.splits.items()}
    model = tiny_model()
    spare = copy.deepcopy(model)
    run(replace(PLAN, augmentation="strong", data_budget=9), model=spare)
    assert {split: images.sha256() for split, images in RESTRICTED.splits.items()} == before
    assert_same_state(model, state_of(tiny_model()))
