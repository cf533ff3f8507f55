"""Fine-tuning against a loop written out by hand, and the count of its floating-point operations."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import Tensor, nn

from sophon.attacker import FineTuneStrategy, learning_rate
from sophon.domains import Batch, batches
from sophon.finetune import fine_tune, flops_per_step
from sophon.tasks import ClassificationTask
from tests.tiny import CLASSES, assert_same_state, state_of, tiny_images, tiny_model, tiny_task

IMAGES = tiny_images(4)
PLAN = FineTuneStrategy(
    optimizer="momentum", lr=0.05, weight_decay=0.01, schedule="warmup_cosine", batch_size=8, steps=12
)
TORCH = {
    "momentum": lambda weights: torch.optim.SGD(weights, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=0.05, weight_decay=0.01),
}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


@pytest.mark.parametrize("scope", ["all", "head"])
@pytest.mark.parametrize("optimizer", TORCH)
def test_equals_a_loop_written_out(optimizer: str, scope: str) -> None:
    plan = replace(PLAN, optimizer=optimizer, scope=scope, augmentation="crop")
    expected, losses = tiny_model(), []
    expected.train(scope == "all")
    weights = [*expected.parameters()] if scope == "all" else [expected.fc.weight, expected.fc.bias]
    stepper = TORCH[optimizer](weights)
    for step, (images, labels, _) in enumerate(islice(batches(IMAGES, 8, generator(), "crop"), 12)):
        stepper.param_groups[0]["lr"] = learning_rate(plan, step)
        loss = nn.functional.cross_entropy(expected((images.double() / 255 - 0.5) / 0.25), labels)
        stepper.zero_grad()
        loss.backward()
        stepper.step()
        losses.append((step + 1, loss.item()))

    model, told = tiny_model(), []
    fine_tune(model, plan, tiny_task(), IMAGES, generator(), lambda step, loss: told.append((step, loss)))
    assert [step for step, _ in told] == list(range(1, 13))
    assert [loss for _, loss in told] == pytest.approx([loss for _, loss in losses], rel=1e-12)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-12, atol=1e-14)


class Failing(ClassificationTask):
    """Its loss stops being finite at a given step."""

    def __init__(self, at: int, value: float) -> None:
        super().__init__(tiny_task().spec, dtype=torch.float64)
        self.left, self.value = at, value

    def attacker_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        self.left -= 1
        return super().attacker_loss(model, batch) * (self.value if self.left == 0 else 1.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_stops_where_the_loss_is_not_finite(value: float) -> None:
    model, steps = tiny_model(), []
    with pytest.raises(FloatingPointError, match=f"the loss is {value} at step 4"):
        fine_tune(model, PLAN, Failing(4, value), IMAGES, generator(), lambda step, loss: steps.append(step))
    assert steps == [1, 2, 3]
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    expected = tiny_model()
    # the same schedule, cut after three steps: the step that failed moved nothing
    with pytest.raises(StopIteration):
        fine_tune(expected, PLAN, tiny_task(), IMAGES, generator(), stop_after(3))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name))


def stop_after(steps: int):
    def told(step: int, loss: float) -> None:
        if step == steps:
            raise StopIteration

    return told


# --- the moving average of the weights ----------------------------------------------------------------------------


def averaged_by_hand(model: nn.Module, plan: FineTuneStrategy, decay: float) -> dict[str, Tensor]:
    """Fine-tune ``model``; return the average of its weights, which starts from those after the first step."""
    means: dict[str, Tensor] = {}

    def after_step(step: int, loss: float) -> None:
        kept = min(decay, step / (9 + step))  # (1 + n) / (10 + n) with n = step - 1 updates before this one
        for name, parameter in model.named_parameters():
            now = parameter.detach().clone()
            means[name] = kept * means[name] + (1 - kept) * now if name in means else now

    fine_tune(model, plan, tiny_task(), IMAGES, generator(), after_step)
    return means


@pytest.mark.parametrize("scope", ["all", "head"])
@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_ema_equals_an_average_written_out(decay: float, scope: str) -> None:
    """Below its cap a decay of 0.999 is never reached in 12 steps; one of 0.3 is from the fourth on."""
    plan, raw, model = replace(PLAN, scope=scope), tiny_model(), tiny_model()
    means = averaged_by_hand(raw, plan, decay)
    told: list[float] = []
    fine_tune(model, replace(plan, ema=decay), tiny_task(), IMAGES, generator(), lambda step, loss: told.append(loss))
    assert len(told) == plan.steps
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), means[name], rtol=1e-12, atol=1e-14)
    trained = {"fc.weight", "fc.bias"} if scope == "head" else set(means)
    moved = {name for name, value in raw.named_parameters() if not torch.equal(value, model.get_parameter(name))}
    assert moved == trained, "what does not move has an average that is itself, to the bit"


@pytest.mark.parametrize("at", [1, 5])
def test_ema_of_a_training_that_fails_is_not_taken(at: int) -> None:
    model, raw = tiny_model(), tiny_model()
    for each, ema in ((model, 0.9), (raw, 0.0)):
        with pytest.raises(FloatingPointError):
            fine_tune(each, replace(PLAN, ema=ema), Failing(at, float("nan")), IMAGES, generator())
    assert_same_state(model, state_of(raw))


# --- scopes, clipping, statistics and losses of the attacker's choice -------------------------------------------------


@pytest.mark.parametrize(
    ("scope", "blocks", "still"),
    [("first_blocks", 1, ("conv2", "bn2")), ("last_blocks", 1, ("conv1", "bn1")), ("last_blocks", 2, ())],
)
def test_blocks_outside_the_scope_stay(scope: str, blocks: int, still: tuple[str, ...]) -> None:
    model = tiny_model()
    before = state_of(model)
    fine_tune(model, replace(PLAN, scope=scope, blocks=blocks), tiny_task(), IMAGES, generator())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith(still or ("none",)), name


@pytest.mark.parametrize("scope", ["all", "last_blocks"])
def test_clipping_equals_a_loop_written_out(scope: str) -> None:
    """What is clipped is the norm over all that moves, in every step."""
    plan = replace(PLAN, optimizer="sgd", schedule="constant", weight_decay=0.0, max_norm=0.01, scope=scope)
    expected = tiny_model().train()
    weights = [
        p for name, p in expected.named_parameters() if scope == "all" or name[:5] not in ("conv1", "bn1.w", "bn1.b")
    ]
    for images, labels, _ in islice(batches(IMAGES, 8, generator(), "none"), 12):
        loss = nn.functional.cross_entropy(expected((images.double() / 255 - 0.5) / 0.25), labels)
        found = torch.autograd.grad(loss, weights)
        norm = torch.cat([part.flatten() for part in found]).norm()
        assert norm > plan.max_norm
        with torch.no_grad():
            for weight, part in zip(weights, found, strict=True):
                weight -= plan.lr * plan.max_norm / norm * part
    model = tiny_model()
    fine_tune(model, plan, tiny_task(), IMAGES, generator())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("scope", ["all", "last_blocks"])
def test_frozen_statistics_are_used_and_kept_while_the_scale_still_moves(scope: str) -> None:
    model, modes = tiny_model(), set()
    before = state_of(model)

    def after_step(step: int, loss: float) -> None:
        modes.add((model.bn1.training, model.bn2.training, model.conv1.training, model.fc.training))
        tiny_task().evaluate(model, IMAGES)

    fine_tune(model, replace(PLAN, scope=scope, batch_norm="frozen"), tiny_task(), IMAGES, generator(), after_step)
    assert modes == {(False, False, True, True)}
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert not torch.equal(model.bn2.weight, before["bn2.weight"])
    assert torch.equal(model.bn1.weight, before["bn1.weight"]) == (scope == "last_blocks")
    fine_tune(model, replace(PLAN, scope=scope, steps=1), tiny_task(), IMAGES, generator())
    assert model.bn1.training
    assert not torch.equal(model.bn1.running_mean, before["bn1.running_mean"])


def test_a_loss_of_the_callers_is_minimised_instead() -> None:
    model, told = tiny_model(), []

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        assert net is model
        assert batch.images.dtype == torch.uint8
        return (net.fc.weight - 3).square().mean()

    plan = replace(PLAN, optimizer="sgd", lr=1.0, schedule="constant", weight_decay=0.0, steps=60)
    before = state_of(model)
    fine_tune(
        model, plan, Failing(1, float("nan")), IMAGES, generator(), lambda step, value: told.append(value), loss=loss
    )
    assert told[0] > 1 > 1e-3 > told[-1]
    assert torch.equal(model.conv1.weight, before["conv1.weight"])
    with pytest.raises(FloatingPointError):
        fine_tune(model, plan, tiny_task(), IMAGES, generator(), loss=lambda net, batch: loss(net, batch) / 0)


# --- floating-point operations ------------------------------------------------------------------------------------


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(36, len(CLASSES), dtype=torch.float64)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.flatten(1))


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 5, 3, padding=1, bias=False, dtype=torch.float64)
        self.fc = nn.Linear(5, len(CLASSES), dtype=torch.float64)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.conv(images).mean((2, 3)))


def count(model: nn.Module, batch_size: int = 8, scope: str = "all") -> int:
    return flops_per_step(model, replace(PLAN, batch_size=batch_size, scope=scope), tiny_task(), IMAGES)


LINEAR, CONV, HEAD = 2 * 36 * 3, 2 * 36 * 9 * 5, 2 * 5 * 3  # operations of one forward pass of one image


def test_flops_by_hand() -> None:
    """A layer's backward pass costs its forward pass again for the weights and, unless it is the first, the inputs."""
    assert count(Linear()) == 8 * 2 * LINEAR
    assert count(Convolution()) == 8 * (2 * CONV + 3 * HEAD)
    # a probe goes forward through everything and back through the head alone
    assert count(Convolution(), scope="head") == 8 * (CONV + 2 * HEAD)


def test_flops_of_imitation_have_the_teachers_answer() -> None:
    task, teacher, student = tiny_task(), Convolution(), Convolution()
    plan = replace(PLAN, batch_size=8)
    found = flops_per_step(student, plan, task, IMAGES, lambda net, batch: task.imitation_loss(net, batch, teacher))
    assert found == count(student) + 8 * (CONV + HEAD)
