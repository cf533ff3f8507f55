"""What a denoiser draws, which of its parts a scope trains, and its task from a configuration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sophon.config import Config, MethodConfig, TaskConfig
from sophon.errors import UserError
from sophon.tasks import DenoisingTask, make_task
from tests.tasks.denoisers import (
    PREDICTIONS,
    SIZE,
    STEPS,
    Oracle,
    Recorder,
    batch_of,
    hooked,
    images_of,
    spec,
    task_of,
    unet,
)

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


def test_samples_do_not_depend_on_the_batch_size() -> None:
    of = spec(conditional=True)
    task, model = task_of(of, sample_steps=3), unet(of)
    whole = task.sample(model, 5, 7)
    task.evaluation_batch_size = 2
    assert torch.equal(task.sample(model, 5, 7), whole)


def test_every_model_starts_from_the_same_noise() -> None:
    task, one, other = task_of(spec(), sample_steps=4), Recorder(), Recorder()
    with torch.no_grad():
        other.factor.fill_(0.5)
    for model in (one, other):
        task.sample(model, 3, 7)
    assert torch.equal(one.images[0], other.images[0])
    assert not torch.equal(one.images[-1], other.images[-1])
    assert one.images[0].std().item() == pytest.approx(1, abs=0.2)
    assert [part[0].item() for part in one.timesteps] == [15, 10, 5, 0]


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


def test_more_sample_steps_than_timesteps_are_those_that_there_are() -> None:
    of = spec()
    model, recorder = unet(of), Recorder()
    many = task_of(of, sample_steps=1000)
    many.sample(recorder, 1, 0)
    assert [int(part) for part in recorder.timesteps] == list(range(STEPS))[::-1]
    assert torch.equal(many.sample(model, 2, 0), task_of(of, sample_steps=STEPS).sample(model, 2, 0))


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


@pytest.mark.parametrize(
    ("scope", "blocks", "ends"),
    [
        ("first_blocks", 2, ("conv_in.", "time_emb", "down_blocks.")),
        ("last_blocks", 3, ("mid_block.", "up_blocks.", "conv_norm_out.", "conv_out.")),
        ("last_blocks", 5, ("",)),
    ],
)
def test_so_many_blocks_as_are_asked_for(scope: str, blocks: int, ends: tuple[str, ...]) -> None:
    model = unet(spec()).eval()
    trained = task_of(spec()).train_mode(model, scope, blocks)
    assert list(trained) == [name for name, _ in model.named_parameters() if name.startswith(ends)]
    assert all(part.training for part in model.modules())


# --- made of a configuration --------------------------------------------------------------------------------------


def config(**method: Any) -> Config:
    settings = TaskConfig(name="denoising", evaluation_images=11, sample_steps=3)
    return Config(task=settings, method=MethodConfig(name="test", **method))


def test_a_protection_gets_its_losses() -> None:
    task = make_task(config(suppression_loss="dos", distillation=0.5), spec(), amp=True, protects=True)
    assert isinstance(task, DenoisingTask)
    assert (task.distillation, task.evaluation_images, task.sample_steps, task.amp) == (0.5, 11, 3, True)
    recorder = Recorder()
    assert task.suppression_loss(recorder, batch_of()).item() == 0
    task.evaluate(recorder, images_of())
    assert len(recorder.timesteps[-1]) == 11
    task.sample(recorder, 1, 0)
    assert len(recorder.timesteps) == 2 + 3


def test_a_protection_gets_its_timesteps() -> None:
    task = make_task(config(suppression_loss="dos", suppression_timesteps=0.1), spec(), amp=False, protects=True)
    assert isinstance(task, DenoisingTask)
    recorder = Recorder()
    task.suppression_loss(recorder, batch_of(90))
    task.original_loss(recorder, batch_of(90))
    assert [int(timesteps.max()) > 1 for timesteps in recorder.timesteps] == [False, True]


def test_a_denoiser_has_no_features_and_a_guess_removes_nothing() -> None:
    task, model = task_of(spec()), unet(spec())
    assert task.features(model, batch_of().images) is None
    noise = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    assert task.chance_loss(model) == pytest.approx(noise.square().mean().item(), abs=0.05)
