"""What a denoiser is measured by, on fixed triples; what it draws; which of its parts a scope trains."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sophon.domains import Batch, ImageSet, MemoryImages
from sophon.errors import UserError
from tests.tasks.denoisers import (
    CLASSES,
    PIXELS,
    PREDICTIONS,
    SIZE,
    STEPS,
    Oracle,
    Recorder,
    batch_of,
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


def triples(images: ImageSet, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return x_t, t and the labels of everything that is measured."""
    recorder = Recorder()
    task_of(spec(conditional=True), **options).evaluate(recorder, images)
    return torch.cat(recorder.images), torch.cat(recorder.timesteps), torch.cat(recorder.labels)


@given(st.integers(1, 20), st.integers(1, 80))
def test_at_most_so_many_images_spread_over_the_whole_set(per_class: int, limit: int) -> None:
    _, timesteps, labels = triples(images_of(per_class), evaluation_images=limit)
    count = min(limit, 3 * per_class)
    assert len(timesteps) == count
    per_step = Counter(timesteps.tolist())
    assert max(per_step.values()) - min(per_step.get(t, 0) for t in range(STEPS)) <= 1
    per_label = Counter(labels.tolist())
    assert max(per_label.values()) - min(per_label.get(label, 0) for label in range(3)) <= 1


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


# --- samples ------------------------------------------------------------------------------------------------------


def test_samples_are_pictures_that_depend_on_the_seed_alone() -> None:
    of = spec()
    task, model = task_of(of, sample_steps=3), unet(of)
    first = task.sample(model, 5, 7)
    assert first.shape == (5, 1, SIZE, SIZE)
    assert first.dtype == torch.uint8
    assert first.device.type == "cpu"
    assert first.unique().numel() > 5
    torch.manual_seed(99)
    assert torch.equal(task.sample(model, 5, 7), first)
    assert not torch.equal(task.sample(model, 5, 8), first)


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 5, STEPS])
def test_who_knows_the_clean_image_generates_it(kind: str, steps: int) -> None:
    task = task_of(spec(kind), sample_steps=steps)
    generator = torch.Generator().manual_seed(2)
    picture = torch.randint(0, 256, (1, 1, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    found = task.sample(Oracle(kind, task.prepare(picture)), 3, 0)
    assert torch.equal(found, picture.expand(3, -1, -1, -1))


def test_a_conditional_model_is_asked_for_its_classes_in_turn() -> None:
    of = spec(conditional=True)
    model = unet(of)
    seen = hooked(model)
    task_of(of, sample_steps=1).sample(model, 7, 0)
    assert seen.labels[0].tolist() == [0, 1, 2, 0, 1, 2, 0]
    task_of(of).start_head(model, "fresh", ("x", "y"))
    task_of(of, sample_steps=1).sample(model, 3, 0)
    assert seen.labels[-1].tolist() == [0, 1, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_a_broken_model_gives_pictures_all_the_same(value: float) -> None:
    of = spec(clip_sample=False)
    model = unet(of)
    with torch.no_grad():
        model.conv_out.bias.fill_(value)
    found = task_of(of, sample_steps=2).sample(model, 2, 0)
    assert found.shape == (2, 1, SIZE, SIZE)
    assert found.dtype == torch.uint8


# --- scopes and heads ---------------------------------------------------------------------------------------------

SCOPES = {
    "all": lambda name: True,
    "head": lambda name: name == "class_embedding.weight",
    "last_blocks": lambda name: name.startswith(("up_blocks.1.", "conv_norm_out.", "conv_out.")),
    "attention": lambda name: ".attentions." in name,
    "first_blocks": lambda name: name.startswith(("conv_in.", "time_emb", "down_blocks.0.", "class_embedding.")),
}


@pytest.mark.parametrize("scope", SCOPES)
def test_scopes(scope: str) -> None:
    of = spec(conditional=True)
    model = unet(of).eval()
    trained = task_of(of).train_mode(model, scope)
    parameters = dict(model.named_parameters())
    assert set(trained) == {name for name in parameters if SCOPES[scope](name)}
    assert trained
    assert all(trained[name] is parameters[name] for name in trained)
    assert all(part.training for name, part in model.named_modules() if any(n.startswith(name) for n in trained))


@pytest.mark.parametrize(("scope", "blocks"), [("head", "attention"), ("attention", "plain")])
def test_a_scope_that_the_model_does_not_have_is_refused(scope: str, blocks: str) -> None:
    # diffusers puts attention between the two halves unless it is told not to
    of = spec(blocks=blocks)
    of = replace(of, model_args={**of.model_args, "add_attention": blocks == "attention"})
    model = unet(of)
    with pytest.raises(UserError, match=rf"^scope: '{scope}' .* use all or last_blocks$") as caught:
        task_of(of).train_mode(model, scope)
    assert "\n" not in str(caught.value)


def test_a_denoiser_has_no_features_and_a_guess_removes_nothing() -> None:
    task, model = task_of(spec()), unet(spec())
    assert task.features(model, batch_of().images) is None
    noise = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    assert task.chance_loss(model) == pytest.approx(noise.square().mean().item(), abs=0.05)
