"""The losses of the denoising task, held against diffusers' own schedulers and written out by hand."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from sophon.losses import DENOISING_SUPPRESSION_LOSSES
from tests.tasks.denoisers import (
    PREDICTIONS,
    SIZE,
    STEPS,
    Recorder,
    batch_of,
    hooked,
    images_of,
    spec,
    task_of,
    unet,
    written_out,
)

# --- noise --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [{}, {"beta_schedule": "squaredcos_cap_v2"}, {"beta_end": 0.5}])
def test_noising_is_that_of_diffusers(schedule: dict[str, Any]) -> None:
    of = spec(**schedule)
    scheduler = DDPMScheduler(**of.scheduler)
    clean, noise = torch.randn(2, STEPS, 1, SIZE, SIZE)
    timesteps = torch.randperm(STEPS)
    noised = task_of(of, dtype=torch.float32).schedule.add_noise(clean, timesteps, noise)
    torch.testing.assert_close(noised.images, scheduler.add_noise(clean, noise, timesteps))
    assert noised.clean is clean
    assert noised.noise is noise
    assert noised.timesteps is timesteps


def test_the_noise_of_a_loss_is_standard_normal_at_uniform_timesteps() -> None:
    task, model, batch = task_of(spec()), Recorder(), batch_of(1500)
    task.attacker_loss(model, batch)
    counts = Counter(model.timesteps[0].tolist())
    assert set(counts) == set(range(STEPS))
    assert all(abs(count - 75) < 45 for count in counts.values())  # five standard deviations of a binomial count
    noise = model.noise(task.prepare(batch.images))
    late = noise[model.timesteps[0] > 2]
    assert late.mean().item() == pytest.approx(0, abs=0.02)
    assert late.std().item() == pytest.approx(1, abs=0.02)
    assert late.abs().max() > 3.5


# --- losses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_attacker_loss_is_the_error_of_the_schedulers_target(kind: str) -> None:
    of, batch = spec(kind), batch_of()
    task, model = task_of(of), unet(of)
    seen = hooked(model)
    torch.manual_seed(5)
    loss = task.attacker_loss(model, batch)
    output, target, *_ = written_out(kind, model, seen, task.prepare(batch.images))
    assert loss.shape == ()
    torch.testing.assert_close(loss, (output - target).square().mean())
    assert loss.requires_grad

    torch.manual_seed(5)
    assert task.attacker_loss(model, batch).item() == loss.item()
    assert task.attacker_loss(model, batch).item() != loss.item()


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("name", DENOISING_SUPPRESSION_LOSSES)
def test_suppression_losses_are_those_of_the_predicted_noise(name: str, kind: str) -> None:
    of, batch = spec(kind), batch_of()
    task, model = task_of(of, suppression_loss=name), unet(of)
    seen = hooked(model)
    loss = task.suppression_loss(model, batch)
    *_, predicted, noise = written_out(kind, model, seen, task.prepare(batch.images))
    expected = {
        "dos": predicted.square().mean(),
        "negative_mse": -(predicted - noise).square().mean(),
        "shifted_mse": (predicted - noise - 1).square().mean(),
    }
    assert set(expected) == set(DENOISING_SUPPRESSION_LOSSES)
    torch.testing.assert_close(loss, expected[name])


@pytest.mark.parametrize(("part", "last"), [(1.0, 19), (0.99, 19), (0.4, 7), (0.5, 9), (0.05, 0), (1e-6, 0)])
def test_suppression_draws_the_first_timesteps_and_the_other_losses_all(part: float, last: int) -> None:
    """At least one timestep; uniform over them."""
    task = task_of(spec(), suppression_loss="dos", suppression_timesteps=part)
    model, batch = Recorder(), batch_of(900)
    losses = (task.suppression_loss, task.attacker_loss, task.original_loss)
    for loss, allowed in zip(losses, (last, STEPS - 1, STEPS - 1), strict=True):
        loss(model, batch)
        counts = Counter(model.timesteps[-1].tolist())
        assert set(counts) == set(range(allowed + 1))
        mean = 900 / (allowed + 1)
        assert all(abs(count - mean) < 5 * math.sqrt(mean) for count in counts.values())
    task.evaluate(model, images_of(20))
    assert set(model.timesteps[-1].tolist()) == set(range(STEPS))


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("which", ["original", "imitation"])
def test_the_distance_to_a_reference_is_that_of_outputs_for_the_same_noise(kind: str, which: str) -> None:
    of, batch = spec(kind), batch_of()
    task, model, reference = task_of(of, distillation=0.7), unet(of, 1), unet(of, 2).train()
    seen, asked = hooked(model), hooked(reference)
    loss = {"original": task.original_loss, "imitation": task.imitation_loss}[which](model, batch, reference)
    assert (seen.modes, asked.modes) == ([(True, True)], [(False, False)])
    assert torch.equal(asked.images[0], seen.images[0])
    assert torch.equal(asked.timesteps[0], seen.timesteps[0])
    output, target, *_ = written_out(kind, model, seen, task.prepare(batch.images))
    teacher = reference.eval()(seen.images[0], seen.timesteps[0], return_dict=False)[0]
    distance = (output - teacher).square().mean()
    expected = distance if which == "imitation" else (output - target).square().mean() + 0.7 * distance
    torch.testing.assert_close(loss, expected)


# --- class labels -------------------------------------------------------------------------------------------------


def test_labels_reach_a_conditional_model_everywhere() -> None:
    task, model, batch = task_of(spec(conditional=True), suppression_loss="dos"), Recorder(), batch_of()
    for loss in (task.attacker_loss, task.suppression_loss, task.original_loss):
        loss(model, batch)
        assert torch.equal(model.labels[-1], batch.labels)
    images = images_of(4)
    task.evaluate(model, images)
    assert torch.equal(model.labels[-1], images.labels)
