"""The error of the predicted noise, measured on fixed triples, and its bands."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sophon.domains import Batch, ImageSet, MemoryImages
from tests.tasks.denoisers import (
    CLASSES,
    PIXELS,
    PREDICTIONS,
    SIZE,
    STEPS,
    Oracle,
    Recorder,
    hooked,
    images_of,
    pixel,
    spec,
    task_of,
    unet,
    written_out,
)

# --- the metric ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("conditional", [False, True])
def test_who_knows_the_clean_image_makes_no_error(kind: str, conditional: bool) -> None:
    """Whatever the prediction type: the noise that its answer implies is the true one."""
    levels = (40, 200, 90) if conditional else (77, 77, 77)
    clean = torch.cat([pixel(level) for level in levels])
    images = MemoryImages(clean.repeat_interleave(10, 0), torch.arange(3).repeat_interleave(10), CLASSES)
    task = task_of(spec(kind, conditional=conditional))
    oracle = Oracle(kind, task.prepare(clean if conditional else clean[:1]))
    assert task.evaluate(oracle, images) == pytest.approx(0, abs=1e-8)
    assert list(task.details(oracle, images).values()) == pytest.approx([0] * 4, abs=1e-8)
    torch.manual_seed(0)
    batch = Batch(images.images, images.labels)
    assert task.attacker_loss(oracle, batch).item() == pytest.approx(0, abs=1e-8)


def test_who_says_nothing_errs_by_the_noises_own_power() -> None:
    task = task_of(spec())
    images = images_of(200)
    assert task.evaluate(Recorder(), images) == pytest.approx(1, abs=5 * (2 / (600 * PIXELS)) ** 0.5)
    assert list(task.details(Recorder(), images).values()) == pytest.approx([1] * 4, abs=0.1)
    assert (task.metric.name, task.metric.unit, task.metric.higher_is_better) == ("eps-MSE", "", False)


def test_sampling_error_leaves_out_what_the_timesteps_explain(monkeypatch: pytest.MonkeyPatch) -> None:
    task, timesteps = task_of(spec()), torch.arange(1000).flip(0)
    scatter = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    monkeypatch.setattr(task, "_errors", lambda model, images: (timesteps, 1000 / (1 + timesteps) + scatter))
    found = task.measure(Recorder(), images_of(4))
    assert found.images == 1000
    assert found.standard_error < 0.6 * float((1000 / (1 + timesteps.double())).std()) / 1000**0.5
    monkeypatch.setattr(task, "_errors", lambda model, images: (timesteps, scatter))
    assert task.measure(Recorder(), images_of(4)).standard_error == pytest.approx(1000**-0.5, rel=0.1)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_evaluate_by_hand(kind: str) -> None:
    of, images = spec(kind), images_of(6)
    task, model = task_of(of), unet(of)
    seen = hooked(model)
    found = task.evaluate(model, images)
    with torch.no_grad():
        *_, predicted, noise = written_out(kind, model.eval(), seen, task.prepare(images.images))
    assert found == pytest.approx((predicted - noise).square().mean().item(), rel=1e-9)


@pytest.mark.parametrize("size", [1, 7, 30, 1000])
def test_evaluate_does_not_depend_on_the_batch_size(size: int) -> None:
    of, images = spec(), images_of()
    task, model = task_of(of), unet(of)
    expected = task.evaluate(model, images)
    task.evaluation_batch_size = size
    recorder = Recorder()
    task.evaluate(recorder, images)
    assert [len(part) for part in recorder.timesteps] == [size] * (30 // size) + [30 % size] * (30 % size > 0)
    assert task.evaluate(model, images) == pytest.approx(expected, rel=1e-9)


def triples(images: ImageSet, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return x_t, t and the labels of everything that is measured."""
    recorder = Recorder()
    task_of(spec(conditional=True), **options).evaluate(recorder, images)
    return torch.cat(recorder.images), torch.cat(recorder.timesteps), torch.cat(recorder.labels)


@pytest.mark.parametrize("per_class", [20, 40])
def test_every_timestep_is_measured_equally_often_in_every_part_of_a_sorted_set(per_class: int) -> None:
    _, timesteps, labels = triples(images_of(per_class))
    assert set(Counter(timesteps.tolist()).values()) == {3 * per_class // STEPS}
    for label in range(len(CLASSES)):
        own = timesteps[labels == label].double()
        assert len(own) == per_class
        assert own.min() < STEPS / 5
        assert own.max() > 4 * STEPS / 5 - 1
        assert own.mean().item() == pytest.approx((STEPS - 1) / 2, abs=4.5)


@given(st.integers(1, 20), st.integers(1, 80))
def test_at_most_so_many_images_spread_over_the_whole_set(per_class: int, limit: int) -> None:
    _, timesteps, labels = triples(images_of(per_class), evaluation_images=limit)
    count = min(limit, 3 * per_class)
    assert len(timesteps) == count
    per_step = Counter(timesteps.tolist())
    assert max(per_step.values()) - min(per_step.get(t, 0) for t in range(STEPS)) <= 1
    per_label = Counter(labels.tolist())
    assert max(per_label.values()) - min(per_label.get(label, 0) for label in range(3)) <= 1


def test_no_image_is_measured_twice() -> None:
    levels = torch.arange(30, dtype=torch.uint8)
    images = MemoryImages(levels.view(-1, 1, 1, 1).expand(30, 1, SIZE, SIZE).contiguous(), levels.long() // 10, CLASSES)
    recorder, task = Recorder(), task_of(spec("sample"), evaluation_images=10)
    answers: list[Tensor] = []
    task.prepare = lambda pixels: answers.append(pixels[:, 0, 0, 0]) or pixels.double()  # type: ignore[method-assign]
    task.evaluate(recorder, images)
    assert torch.cat(answers).tolist() == [0, 3, 6, 9, 12, 15, 18, 21, 24, 27]


@pytest.mark.parametrize("steps", [20, 50, 1000])
def test_bands_tile_the_timesteps_and_average_to_the_metric(steps: int) -> None:
    of, images = spec(num_train_timesteps=steps), images_of(11)
    task, model = task_of(of), unet(of)
    details = task.details(model, images)
    edges = [[int(edge) for edge in re.findall(r"\d+", name)] for name in details]
    assert all(name.startswith("eps-MSE t ") for name in details)
    assert [low for low, _ in edges] == [0, *[high + 1 for _, high in edges[:-1]]]
    assert edges[-1][1] == steps - 1
    recorder = Recorder()
    task.evaluate(recorder, images)
    timesteps = torch.cat(recorder.timesteps)
    counts = [int(((timesteps >= low) & (timesteps <= high)).sum()) for low, high in edges]
    weighted = sum(count * value for count, value in zip(counts, details.values(), strict=True)) / sum(counts)
    assert sum(counts) == 33
    assert weighted == pytest.approx(task.evaluate(model, images), rel=1e-12)
    assert details.keys() == task.details(model, images).keys()


def test_a_band_tells_where_the_error_lies() -> None:
    class Late(Oracle):
        def answer(self, images: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
            return super().answer(images, timesteps, labels) + 2.0 * (timesteps >= 15).view(-1, 1, 1, 1)

    images = MemoryImages(pixel(100, 40), torch.zeros(40, dtype=torch.int64), CLASSES)
    task = task_of(spec())
    found = task.details(Late("epsilon", task.prepare(pixel(100))), images)
    assert list(found) == ["eps-MSE t 0-4", "eps-MSE t 5-9", "eps-MSE t 10-14", "eps-MSE t 15-19"]
    assert list(found.values()) == pytest.approx([0, 0, 0, 4], abs=1e-6)
