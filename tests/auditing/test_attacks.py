"""One attempt: what it reads and when, what it does before its first step, what it reports, and what it costs."""

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

from sophon.attacker import FineTuneStrategy, Operation
from sophon.auditing.attacks import Outcome, attack, linear_probe
from sophon.domains import Batch, ImageSet, LoadedDomain
from sophon.finetune import flops_per_step
from sophon.tasks import ClassificationTask
from tests.auditing.staging import BENIGN, DISTILLED, ORIGINAL, RESTRICTED
from tests.tiny import CLASSES, state_of, tiny_model, tiny_spec, tiny_task

PLAN = FineTuneStrategy(optimizer="adam", lr=0.02, batch_size=8, steps=10, head="kept")
FRESH = replace(PLAN, head="fresh")
NOISY = Operation("noise", (("scale", 0.5),))
HEALED = Operation("heal", (("batch_size", 8), ("domain", "benign"), ("steps", 3)))


class Reading(LoadedDomain):
    """Remembers which splits were asked for."""

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
    restricted: LoadedDomain = RESTRICTED,
    **options: Any,
) -> Outcome:
    model = tiny_model() if model is None else model
    rest = {"spec": tiny_spec(), "seed": seed, "eval_points": points, "original": ORIGINAL, "benign": BENIGN}
    return attack(model, strategy, task or tiny_task(), restricted, **rest, **options)


# --- what it reads and reports ------------------------------------------------------------------------------------


@pytest.mark.parametrize("read_test", [True, False])
@pytest.mark.parametrize(("head", "steps"), [("kept", 10), ("fresh", 10), ("probed", 10), ("kept", 0)])
def test_reads_the_attackers_splits_only_and_test_once_at_the_end(head: str, steps: int, read_test: bool) -> None:
    """A trial of a search does not read ``test`` at all."""
    reads.clear()
    domain = Reading("restricted", CLASSES, RESTRICTED.splits, RESTRICTED.hashes)
    task, plan = Watching(), replace(PLAN, head=head, probe_steps=3, steps=steps)
    outcome = run(plan, task, restricted=domain, read_test=read_test)
    assert set(reads) == {"attack", "select"} | ({"test"} if read_test else set())
    assert not read_test or (reads[-1], reads.count("test")) == ("test", 1)
    read = [RESTRICTED["select"]] * len(outcome.curve) + [RESTRICTED["test"]] * read_test
    assert [id(images) for images in task.measured] == [id(images) for images in read]
    owned = {image.numpy().tobytes() for image in RESTRICTED["attack"].images}
    assert all(image in owned for batch in task.trained for image in pixels_of(batch))
    assert math.isnan(outcome.test.value) != read_test
    assert outcome.curve == run(plan).curve


@pytest.mark.parametrize(
    ("steps", "points", "expected"),
    [
        (10, 2, [0, 10]),
        (10, 6, [0, 2, 4, 6, 8, 10]),
        (7, 4, [0, 2, 5, 7]),
        (2, 9, [0, 1, 2]),
        (0, 6, [0]),
    ],
)
def test_points_of_the_curve(steps: int, points: int, expected: list[int]) -> None:
    outcome = run(replace(PLAN, steps=steps), points=points)
    assert [step for step, _ in outcome.curve] == expected
    assert outcome.finished


def test_each_point_and_the_end_are_of_the_model_as_it_is_then() -> None:
    model, task, told = tiny_model(), tiny_task(), []
    start = task.evaluate(model, RESTRICTED["select"])

    def at_point(now: nn.Module, step: int, value: float) -> None:
        assert now is model
        assert value == task.evaluate(now, RESTRICTED["select"])
        told.append((step, value))

    outcome = run(replace(PLAN, steps=60), model=model, at_point=at_point)
    assert told == outcome.curve
    assert told[0] == (0, start)
    assert outcome.test == task.measure(model, RESTRICTED["test"])
    assert outcome.test.value > start + 20
    assert outcome.curve == run(replace(PLAN, steps=60)).curve


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


@pytest.mark.parametrize("split", ["select", "test"])
def test_an_attempt_whose_outputs_are_not_finite_has_not_finished(split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task, genuine = tiny_task(), ClassificationTask.evaluate

    def evaluate(self: ClassificationTask, model: nn.Module, images: ImageSet) -> float:
        return math.nan if images is RESTRICTED[split] else genuine(self, model, images)

    monkeypatch.setattr(ClassificationTask, "evaluate", evaluate)
    assert not run(PLAN, task).finished


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


# --- before its first step ----------------------------------------------------------------------------------------


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


def pixels_of(batch: Batch) -> list[bytes]:
    return [image.numpy().tobytes() for image in batch.images]


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


@pytest.mark.parametrize(
    "other",
    [
        {"model": tiny_model(1)},
        {"strategy": {"surgery": (NOISY, Operation("shrink_perturb"))}},
    ],
    ids=["model", "surgery"],
)
@pytest.mark.parametrize("head", ["fresh", "probed"])
def test_two_models_and_two_surgeries_face_the_same_head_and_batches(head: str, other: dict[str, Any]) -> None:
    plan = replace(PLAN, head=head, augmentation="strong", data_budget=24, probe_steps=2, steps=4)
    one, another = Watching(), Watching()
    run(plan, one)
    run(replace(plan, **other.get("strategy", {})), another, model=copy.deepcopy(other.get("model")))
    assert torch.equal(one.heads[0], another.heads[0])
    for mine, theirs in zip(one.trained, another.trained, strict=True):
        assert torch.equal(mine.images, theirs.images)
        assert torch.equal(mine.labels, theirs.labels)


def test_surgery_draws_its_own_numbers_and_the_same_ones_for_every_model() -> None:
    kept = replace(PLAN, surgery=(NOISY,), steps=0)

    def noise_of(seed: int, model_seed: int) -> Tensor:
        model = tiny_model(model_seed)
        before = model.conv1.weight.detach().clone()
        spread = before.std(correction=0)
        return (run(kept, model=model, seed=seed).model.conv1.weight.detach() - before) / spread

    assert torch.allclose(noise_of(0, 0), noise_of(0, 1))
    assert not torch.allclose(noise_of(0, 0), noise_of(1, 0))


# --- what it costs ------------------------------------------------------------------------------------------------


def cost(plan: FineTuneStrategy) -> int:
    """Return the operations of one step on the released model."""
    return flops_per_step(tiny_model(), plan, tiny_task(), RESTRICTED["attack"])


@pytest.mark.parametrize(
    ("plan", "least", "most"),
    [
        (PLAN, 0, 0),
        (replace(PLAN, steps=20), 0, 0),
        (replace(PLAN, surgery=(NOISY,)), 0, 0),
        (replace(PLAN, scope="lora", lora_rank=2), 0, 0),
        (replace(FRESH, surgery=(HEALED,)), 3 * cost(FRESH), 3 * cost(FRESH)),
        (replace(PLAN, head="probed", probe_steps=7), 7 * cost(linear_probe(PLAN)), 7 * cost(linear_probe(PLAN))),
        # a student's passes and its teacher's
        (replace(DISTILLED, batch_size=8), 2 * cost(FRESH) + 1, math.inf),
    ],
    ids=["plain", "longer", "noise", "lora", "heal", "probed", "distil"],
)
def test_operations_of_the_preparation_and_of_the_steps_are_counted(
    plan: FineTuneStrategy, least: int, most: float
) -> None:
    outcome = run(plan)
    assert least <= outcome.prepared_flops <= most
    steps = plan.steps * flops_per_step(outcome.model, plan, tiny_task(), RESTRICTED["attack"])
    assert outcome.flops == outcome.prepared_flops + steps
