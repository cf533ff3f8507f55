"""The denoising task, held against diffusers' own schedulers and against networks that know the answer."""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sophon.config import Config, MethodConfig, TaskConfig
from sophon.domains import Batch, ImageSet, MemoryImages
from sophon.errors import UserError
from sophon.losses import DENOISING_SUPPRESSION_LOSSES, SUPPRESSION_LOSSES
from sophon.models import ModelSpec, build
from sophon.tasks import DenoisingTask, make_task
from tests.tiny import assert_same_state, state_of, tiny_spec

CLASSES = ("a", "b", "c")
SIZE, STEPS = 8, 20
PIXELS = SIZE * SIZE
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SCHEDULE = {"num_train_timesteps": STEPS, "beta_schedule": "linear"}
NETWORK = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
BLOCKS = {
    "plain": {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2},
    "attention": {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
}


def spec(kind: str = "epsilon", *, conditional: bool = False, blocks: str = "attention", **schedule: Any) -> ModelSpec:
    network = NETWORK | BLOCKS[blocks] | ({"num_class_embeds": len(CLASSES)} if conditional else {})
    schedule = SCHEDULE | {"prediction_type": kind} | schedule
    return ModelSpec("diffusers", "UNet2DModel", CLASSES, 1, SIZE, (0.5,), (0.5,), network, schedule)


def task_of(of: ModelSpec, **options: Any) -> DenoisingTask:
    return DenoisingTask(of, **({"dtype": torch.float64} | options))


def unet(of: ModelSpec, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = build(of).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images_of(per_class: int = 10, seed: int = 0) -> ImageSet:
    """Return random images sorted by class."""
    labels = torch.arange(len(CLASSES)).repeat_interleave(per_class)
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (len(labels), 1, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    return MemoryImages(pixels, labels, CLASSES)


def batch_of(size: int = 12, seed: int = 1) -> Batch:
    images = images_of(size // len(CLASSES), seed)
    return Batch(images.images, images.labels)


def scales(timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Return sqrt(a_t) and sqrt(1 - a_t), [B, 1, 1, 1], as diffusers has them."""
    kept = DDPMScheduler(**SCHEDULE).alphas_cumprod.double()[timesteps].view(-1, 1, 1, 1)
    return kept.sqrt(), (1 - kept).sqrt()


class Recorder(nn.Module):
    """Remembers what it was asked; its answer is a multiple of x_t that a parameter sets (zero at first)."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.images: list[Tensor] = []
        self.timesteps: list[Tensor] = []
        self.labels: list[Tensor | None] = []
        self.modes: list[tuple[bool, bool]] = []

    def answer(self, images: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        return self.factor * images

    def forward(
        self, images: Tensor, timesteps: Tensor, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> tuple[Tensor]:
        assert not return_dict
        self.images.append(images.detach().clone())
        self.timesteps.append(timesteps.clone())
        self.labels.append(class_labels)
        self.modes.append((self.training, torch.is_grad_enabled()))
        return (self.answer(images, timesteps, class_labels),)

    def noise(self, clean: Tensor) -> Tensor:
        """Work out the noise of the last question from x_t and the clean images."""
        signal, spread = scales(self.timesteps[-1])
        return (self.images[-1] - signal * clean) / spread


class Oracle(Recorder):
    """Knows the clean image (of each class), and says what the prediction type asks for."""

    def __init__(self, kind: str, clean: Tensor) -> None:
        super().__init__()
        self.kind, self.clean = kind, clean

    def answer(self, images: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        clean = self.clean[labels] if labels is not None else self.clean.expand_as(images)
        signal, spread = scales(timesteps)
        noise = (images - signal * clean) / spread
        velocity = DDPMScheduler(**SCHEDULE).get_velocity(clean, noise, timesteps)
        return {"epsilon": noise, "v_prediction": velocity, "sample": clean}[self.kind]


def pixel(value: int, count: int = 1) -> Tensor:
    return torch.full((count, 1, SIZE, SIZE), value, dtype=torch.uint8)


# --- noise --------------------------------------------------------------------------------------------------------


def test_prepare_scales_to_minus_one_and_one() -> None:
    ready = task_of(spec(), dtype=torch.float32).prepare(torch.tensor([0, 51, 255], dtype=torch.uint8))
    assert ready.dtype == torch.float32
    torch.testing.assert_close(ready, torch.tensor([-1.0, -0.6, 1.0]))


@pytest.mark.parametrize("schedule", [{}, {"beta_schedule": "squaredcos_cap_v2"}, {"beta_end": 0.5}])
def test_noising_is_that_of_diffusers(schedule: dict[str, Any]) -> None:
    of = spec(**schedule)
    scheduler = DDPMScheduler(**of.scheduler)
    clean, noise = torch.randn(2, STEPS, 1, SIZE, SIZE)
    timesteps = torch.randperm(STEPS)
    noised = task_of(of, dtype=torch.float32).noised(clean, timesteps, noise)
    torch.testing.assert_close(noised.images, scheduler.add_noise(clean, noise, timesteps))
    assert noised.clean is clean
    assert noised.noise is noise
    assert noised.timesteps is timesteps


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, STEPS - 1), min_size=1, max_size=6), st.integers(0, 2**31))
def test_noising_by_the_closed_form(timesteps: list[int], seed: int) -> None:
    clean, noise = torch.randn(
        2, len(timesteps), 1, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    noised = task_of(spec()).noised(clean, torch.tensor(timesteps), noise)
    for index, t in enumerate(timesteps):
        kept = math.prod(1 - (1e-4 + (0.02 - 1e-4) * step / (STEPS - 1)) for step in range(t + 1))
        expected = math.sqrt(kept) * clean[index] + math.sqrt(1 - kept) * noise[index]
        torch.testing.assert_close(noised.images[index], expected, rtol=1e-3, atol=1e-4)  # diffusers' are float32


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


def hooked(model: nn.Module) -> Recorder:
    """Let a recorder see what ``model`` is asked."""
    seen = Recorder()
    model.register_forward_hook(
        lambda module, arguments, named, output: seen.train(module.training)(*arguments, **named) and None,
        with_kwargs=True,
    )
    return seen


def written_out(kind: str, model: nn.Module, seen: Recorder, clean: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return output and target, predicted and true noise of the last question that ``model`` was asked."""
    x, t, labels = seen.images[-1], seen.timesteps[-1], seen.labels[-1]
    signal, spread = scales(t)
    noise = seen.noise(clean)
    output = model(x, t, class_labels=labels, return_dict=False)[0]
    if kind == "epsilon":
        return output, noise, output, noise
    if kind == "sample":
        return output, clean, (x - signal * output) / spread, noise
    return output, signal * noise - spread * clean, signal * output + spread * x, noise


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


def test_suppression_at_few_timesteps_has_their_noise() -> None:
    """What is noised little shows the image: x_t and the noise belong to the timestep that the network is told."""
    task = task_of(spec(), suppression_loss="negative_mse", suppression_timesteps=0.1)
    model, batch = Recorder(), batch_of(300)
    loss = task.suppression_loss(model, batch)
    noise = model.noise(task.prepare(batch.images))
    torch.testing.assert_close(loss, -noise.square().mean())
    assert noise.std().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("loss", ["magic", *SUPPRESSION_LOSSES])
def test_unknown_suppression_loss(loss: str) -> None:
    allowed = "dos, negative_mse, shifted_mse"
    with pytest.raises(UserError, match=rf"^method.suppression_loss: '{loss}' is not known; allowed: {allowed}$"):
        task_of(spec(), suppression_loss=loss)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_distillation_adds_its_weight_and_spares_the_reference(kind: str) -> None:
    of, batch = spec(kind), batch_of()
    task, model, reference = task_of(of, distillation=0.7), unet(of, 1), unet(of, 2).train()
    seen, asked, before = hooked(model), hooked(reference), state_of(reference)
    torch.manual_seed(3)
    loss = task.original_loss(model, batch, reference)
    assert_same_state(reference, before)
    assert all(part.training for part in reference.modules())
    loss.backward()
    assert all(parameter.grad is None for parameter in reference.parameters())
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert (seen.modes, asked.modes) == ([(True, True)], [(False, False)])
    assert torch.equal(asked.images[0], seen.images[0])
    assert torch.equal(asked.timesteps[0], seen.timesteps[0])

    output, target, *_ = written_out(kind, model, seen, task.prepare(batch.images))
    teacher = reference.eval()(seen.images[0], seen.timesteps[0], return_dict=False)[0]
    plain = (output - target).square().mean()
    torch.testing.assert_close(loss, plain + 0.7 * (output - teacher).square().mean())
    torch.manual_seed(3)
    alone = task.original_loss(model, batch, None)
    torch.testing.assert_close(alone, plain)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_imitation_is_the_distance_to_the_reference(kind: str) -> None:
    of, batch = spec(kind), batch_of()
    task, model, reference = task_of(of), unet(of, 1), unet(of, 2).train()
    seen, asked, before = hooked(model), hooked(reference), state_of(reference)
    loss = task.imitation_loss(model, batch, reference)
    assert_same_state(reference, before)
    assert all(part.training for part in reference.modules())
    loss.backward()
    assert all(parameter.grad is None for parameter in reference.parameters())
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert (seen.modes, asked.modes) == ([(True, True)], [(False, False)])
    assert torch.equal(asked.images[0], seen.images[0])
    output, teacher = (net(seen.images[0], seen.timesteps[0], return_dict=False)[0] for net in (model, reference))
    torch.testing.assert_close(loss, (output - teacher).square().mean())
    assert task.imitation_loss(reference, batch, reference).item() == pytest.approx(0, abs=1e-24)
    again = [task.imitation_loss(model, batch, reference).item() for _ in range(2)]
    assert again[0] != again[1], "the noise is fresh"


def test_imitation_asks_for_the_references_classes_whatever_the_labels() -> None:
    of = spec(conditional=True)
    task, model, reference = task_of(of), unet(of, 1), unet(of, 2)
    seen, asked = hooked(model), hooked(reference)
    batch = batch_of(60)
    task.imitation_loss(model, batch._replace(labels=torch.full_like(batch.labels, 99)), reference)
    assert set(seen.labels[0].tolist()) == {0, 1, 2}
    assert torch.equal(seen.labels[0], asked.labels[0])


def test_without_weight_the_reference_is_not_run() -> None:
    of, batch = spec(), batch_of()
    task, model = task_of(of), unet(of)
    losses = []
    for loss in (lambda: task.original_loss(model, batch, nn.Identity()), lambda: task.attacker_loss(model, batch)):
        torch.manual_seed(3)
        losses.append(loss().item())
    assert losses[0] == losses[1]


def test_amp_rounds_passes_and_returns_float32() -> None:
    of, images = spec(), images_of()
    model = unet(of).float()
    plain, amp = (task_of(of, amp=amp, dtype=torch.float32) for amp in (False, True))
    assert amp.attacker_loss(model, batch_of()).dtype == torch.float32
    assert plain.evaluate(model, images) != amp.evaluate(model, images)
    assert plain.evaluate(model, images) == pytest.approx(amp.evaluate(model, images), rel=0.02)


# --- class labels -------------------------------------------------------------------------------------------------


def test_labels_reach_a_conditional_model_everywhere() -> None:
    task, model, batch = task_of(spec(conditional=True), suppression_loss="dos"), Recorder(), batch_of()
    for loss in (task.attacker_loss, task.suppression_loss, task.original_loss):
        loss(model, batch)
        assert torch.equal(model.labels[-1], batch.labels)
    images = images_of(4)
    task.evaluate(model, images)
    assert torch.equal(model.labels[-1], images.labels)


def test_labels_change_what_a_conditional_network_says() -> None:
    of, batch = spec(conditional=True), batch_of()
    task, model = task_of(of), unet(of)
    losses = []
    for labels in (batch.labels, (batch.labels + 1) % len(CLASSES)):
        torch.manual_seed(0)
        losses.append(task.attacker_loss(model, Batch(batch.images, labels)).item())
    assert losses[0] != losses[1]


def test_an_unconditional_model_is_not_told_the_class() -> None:
    task, model = task_of(spec()), Recorder()
    task.attacker_loss(model, batch_of())
    task.evaluate(model, images_of(2))
    assert model.labels == [None, None]


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


def test_evaluate_repeats_itself_whatever_the_global_generator() -> None:
    of, images = spec(), images_of()
    task, model = task_of(of), unet(of)
    first = task.evaluate(model, images)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert task.evaluate(model, images) == first
    task.details(model, images)
    task.sample(model, 2, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert task_of(of).evaluate(copy.deepcopy(model), images) == first


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


def test_measuring_leaves_the_model_as_it_was() -> None:
    of, images = spec(conditional=True), images_of(4)
    task, model = task_of(of, sample_steps=2), unet(of).train()
    model.mid_block.eval()
    model.conv_in.weight.grad = torch.ones_like(model.conv_in.weight)
    before, modes = state_of(model), {name: part.training for name, part in model.named_modules()}
    task.evaluate(model, images)
    task.details(model, images)
    task.sample(model, 2, 0)
    assert_same_state(model, before)
    assert {name: part.training for name, part in model.named_modules()} == modes
    assert set(modes.values()) == {True, False}
    assert torch.is_grad_enabled()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == ["conv_in.weight"]
    recorder = Recorder()
    task.evaluate(recorder, images)
    task.sample(recorder, 2, 0)
    assert set(recorder.modes) == {(False, False)}


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


@settings(max_examples=20, deadline=None)
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


def test_a_broken_model_measures_nan() -> None:
    of = spec()
    model = unet(of)
    with torch.no_grad():
        model.conv_out.bias.fill_(float("nan"))
    assert math.isnan(task_of(of).evaluate(model, images_of(2)))
    assert all(math.isnan(value) for value in task_of(of).details(model, images_of()).values())


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


@pytest.mark.parametrize("scope", ["first_blocks", "last_blocks"])
@pytest.mark.parametrize("blocks", [0, 6])
def test_more_blocks_than_there_are_are_refused(scope: str, blocks: int) -> None:
    model = unet(spec()).eval()
    assert len(task_of(spec()).blocks(model)) == 5
    with pytest.raises(UserError, match=rf"^blocks: {blocks} is not allowed with scope '{scope}' .* must be 1 to 5$"):
        task_of(spec()).train_mode(model, scope, blocks)
    assert not any(part.training for part in model.modules())


def test_a_denoiser_without_adapters_has_no_scope_of_them() -> None:
    with pytest.raises(UserError, match=r"^scope: 'lora' trains nothing of this model; it has no adapters"):
        task_of(spec()).train_mode(unet(spec()), "lora")
    with pytest.raises(UserError, match=r"^scope: 'tail' is not known; allowed: all, attention, first_blocks, head"):
        task_of(spec()).train_mode(unet(spec()), "tail")


@pytest.mark.parametrize("head", ["fresh", "probed"])
def test_a_fresh_class_embedding_for_any_number_of_classes(head: str) -> None:
    of = spec(conditional=True)
    task, model = task_of(of), unet(of)
    assert task.head_names(model) == {"class_embedding.weight"}
    before, width = state_of(model), model.class_embedding.weight.shape[1]
    torch.manual_seed(3)
    task.start_head(model, head, ("x", "y", "z", "w", "v"))
    assert model.class_embedding.weight.shape == (5, width)
    assert model.class_embedding.weight.dtype == torch.float64
    assert all(torch.equal(value, before[name]) for name, value in state_of(model).items() if "class" not in name)
    batch = Batch(pixel(9, 5), torch.arange(5))
    assert task.attacker_loss(model, batch).isfinite()
    again = unet(of)
    torch.manual_seed(3)
    task.start_head(again, head, ("x", "y", "z", "w", "v"))
    assert torch.equal(again.class_embedding.weight, model.class_embedding.weight)
    task.start_head(again, head, ("x", "y", "z", "w", "v"))
    assert not torch.equal(again.class_embedding.weight, model.class_embedding.weight)


def test_a_kept_class_embedding_is_checked_and_nothing_else() -> None:
    of = spec(conditional=True)
    task, model = task_of(of), unet(of)
    before = state_of(model)
    task.start_head(model, "kept", ("x", "y", "z"))
    with pytest.raises(UserError, match=r"^head: 'kept' .* the model has 3 and the restricted domain 2;") as caught:
        task.start_head(model, "kept", ("x", "y"))
    assert "\n" not in str(caught.value)
    assert_same_state(model, before)


@pytest.mark.parametrize("classes", [("x",), CLASSES, tuple("abcdefgh")])
def test_an_unconditional_model_is_kept_for_any_number_of_classes(classes: tuple[str, ...]) -> None:
    of = spec()
    task, model = task_of(of), unet(of)
    before = state_of(model)
    assert task.head_names(model) == set()
    task.start_head(model, "kept", classes)
    assert_same_state(model, before)
    for head in ("fresh", "probed"):
        with pytest.raises(UserError, match=rf"^head: '{head}' needs a class-conditional denoiser; .* allowed: kept$"):
            task.start_head(model, head, classes)
    assert_same_state(model, before)


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


def test_an_audit_needs_no_method() -> None:
    task = make_task(config(suppression_loss="klu", distillation=0.5), spec(), amp=False)
    assert isinstance(task, DenoisingTask)
    assert task.distillation == 0


def test_a_classifiers_loss_is_refused() -> None:
    with pytest.raises(UserError, match=r"^method.suppression_loss: 'klu' is not known; allowed: dos"):
        make_task(config(), spec(), amp=False, protects=True)


def test_a_classifier_is_no_denoiser() -> None:
    with pytest.raises(UserError, match=r"^task.name: 'denoising' does not fit .* python; allowed: classification$"):
        make_task(config(), tiny_spec(), amp=False)


def test_a_denoiser_has_no_features_and_a_guess_removes_nothing() -> None:
    task, model = task_of(spec()), unet(spec())
    assert task.features(model, batch_of().images) is None
    noise = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    assert task.chance_loss(model) == pytest.approx(noise.square().mean().item(), abs=0.05)
