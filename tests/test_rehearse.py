"""What a model and an input cannot do together is found before the work starts; what is not finite is no accuracy."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sophon.api.common import doubt, measured
from sophon.api.protect import lost_on_test
from sophon.attacker import FineTuneStrategy
from sophon.config import GuardConfig
from sophon.domains import ImageSet, LoadedDomain
from sophon.errors import UserError
from sophon.finetune import rehearse
from sophon.models import ModelSpec, build
from sophon.models.weights import load_state
from sophon.tasks import Task
from sophon.tasks.task import Measured
from tests.tiny import (
    CLASSES,
    SIZE,
    TinyNet,
    state_of,
    tiny_denoising,
    tiny_domain,
    tiny_images,
    tiny_model,
    tiny_task,
    tiny_unet,
)

IMAGES = tiny_images(1)


class Pooled(TinyNet):
    """Normalises what it has pooled to one value a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.bn3 = nn.BatchNorm1d(4)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.bn3(self.conv1(images).mean((2, 3))))


class Deep(TinyNet):
    """Needs images of 8 pixels."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(nn.functional.avg_pool2d(images, 8))


class Mistaken(TinyNet):
    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images)


class WithAuxiliaryHead(TinyNet):
    """Hands over, as GoogLeNet and Inception do in training mode, what another head says besides."""

    def forward(self, images: Tensor) -> Any:
        logits = super().forward(images)
        return SimpleNamespace(logits=logits, aux_logits=-logits) if self.training else logits


def strategy(**changes: Any) -> FineTuneStrategy:
    return FineTuneStrategy(**{"batch_size": 8, **changes})


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (Pooled, {"batch_size": 1}, "k.batch_size: 1 is too few for this model in training (Expected more than 1"),
        (Deep, {}, f"model.image_size: {SIZE} is too small for this model in training ("),
        (Deep, {"batch_size": 1}, f"{2 * SIZE} works"),
        (Mistaken, {}, "model.architecture: a training step on images of 1 x 6 x 6 fails (mat1 and mat2"),
        (TinyNet, {"scope": "attention"}, "scope: 'attention' is not known"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    model: Callable[[], nn.Module], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        rehearse(model().double(), strategy(**changes), tiny_task(), IMAGES, "k.batch_size")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        (TinyNet, {}),
        (TinyNet, {"batch_size": 1}),
        (Pooled, {"batch_size": 2}),
        (Pooled, {"batch_size": 1, "batch_norm": "frozen"}),
        (Pooled, {"batch_size": 1, "scope": "head"}),
        (WithAuxiliaryHead, {}),
    ],
)
def test_what_works_passes_and_draws_nothing(model: Callable[[], nn.Module], changes: dict[str, Any]) -> None:
    made = model().double()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    rehearse(made, strategy(**changes), tiny_task(), IMAGES, "k")
    assert torch.equal(torch.rand(3), expected)
    assert all(parameter.grad is None for parameter in made.parameters())


def test_a_loss_of_the_callers_is_what_is_rehearsed() -> None:
    with pytest.raises(UserError, match=r"model.architecture: .*division by zero"):
        rehearse(tiny_unet(), strategy(), tiny_denoising(), IMAGES, "k", lambda model, batch: torch.tensor(1 / 0))
    rehearse(tiny_unet(), strategy(), tiny_denoising(), IMAGES, "k")


def kinds() -> list[tuple[nn.Module, Task]]:
    return [(tiny_model(), tiny_task()), (tiny_unet(), tiny_denoising())]


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_outputs_that_are_not_finite_have_no_metric(kind: int, value: float) -> None:
    """Not even where another output would decide what is said: a logit of minus infinity is one that never wins."""
    model, task = kinds()[kind]
    last = list(model.parameters())[-1]
    with torch.no_grad():
        last[0] = value
    before = state_of(model)
    assert not math.isfinite(task.evaluate(model, IMAGES))
    assert not any(map(math.isfinite, task.details(model, IMAGES).values()))
    domain = tiny_domain("d", ("val",))
    for question in (measured, doubt):
        arguments = (task, model, domain, *(["val"] if question is measured else []), "some.key")
        with pytest.raises(UserError, match=r"some.key: the model's outputs on val of d are not finite"):
            question(*arguments)
    assert state_of(model).keys() == before.keys()


def taught(images: ImageSet) -> nn.Module:
    """Return a network that knows the bands of `tiny_images`."""
    model, task = tiny_model().train(), tiny_task()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        task.attacker_loss(model, images).backward()  # type: ignore[arg-type]
        optimizer.step()
    return model


def test_a_model_that_guesses_is_doubted_and_one_that_knows_is_not() -> None:
    domain = LoadedDomain("d", CLASSES, {"val": tiny_images(3), "test": tiny_images(4)}, {})
    model = taught(tiny_images(2))
    assert doubt(tiny_task(), model, domain, "reference") is None
    constant = copy.deepcopy(model)
    torch.nn.init.zeros_(constant.fc.weight)
    line = doubt(tiny_task(), constant, domain, "reference")
    assert line is not None
    for part in ("reference: accuracy", "36 images", "33.3 %", "guess", "model.mean", "model.std", "channels", "order"):
        assert part in line
    swapped = copy.deepcopy(model)
    with torch.no_grad():
        swapped.fc.weight.copy_(model.fc.weight.roll(1, 0))
        swapped.fc.bias.copy_(model.fc.bias.roll(1, 0))
    assert doubt(tiny_task(), swapped, domain, "reference") is not None


def test_a_model_that_remembers_val_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"val": Measured(100.0, 1.0, 80), "test": Measured(55.5, 3.5, 200)}
    monkeypatch.setattr("sophon.api.common.measured", lambda task, model, original, split, key: figures[split])
    line = doubt(tiny_task(), tiny_model(3), tiny_domain("a", ("val", "test")), "model")
    assert line is not None
    assert line.startswith(
        "model: accuracy is 100.0 % on val and 55.5 % on test: the model was trained on images of val"
    )
    figures["test"] = Measured(90.0, 3.5, 200)  # within four standard errors
    assert doubt(tiny_task(), tiny_model(3), tiny_domain("a", ("val", "test")), "model") is None


def test_a_denoiser_that_predicts_nothing_is_doubted() -> None:
    domain = tiny_domain("d", ("val", "test"))
    model, task = tiny_unet(), tiny_denoising()
    for parameter in model.conv_out.parameters():
        nn.init.zeros_(parameter)
    value, error, _ = task.chance(domain["val"])
    assert task.evaluate(model, domain["val"]) == pytest.approx(value)
    assert 0.5 < value < 1.5
    assert 0 < error < 0.1
    line = doubt(task, model, domain, "reference")
    assert line is not None
    assert "model.scheduler" in line


@pytest.mark.parametrize(
    ("relative", "before", "after", "said"),
    [
        (False, 90.0, 89.0, None),
        (False, 90.0, 88.5, "test lost 1.5, more than guard.tolerance=1, which val keeps"),
        (False, 90.0, 95.0, None),
        (True, 50.0, 49.6, None),
        (True, 50.0, 49.0, "test lost 2 %, more than guard.tolerance=1 %"),
        (True, 0.0, 0.0, None),
    ],
)
def test_a_loss_on_test_that_the_guard_did_not_see_is_said(
    relative: bool, before: float, after: float, said: str | None
) -> None:
    guard = GuardConfig(tolerance=1.0, relative=relative)
    line = lost_on_test(guard, tiny_task(), before, after)
    assert line is None if said is None else said in str(line)
    assert lost_on_test(guard, tiny_denoising(), -before, -after) == line  # an error is lost by rising


def test_a_model_that_takes_no_plain_tensors_is_refused_in_one_line() -> None:
    """Torchvision's MNASNet wants to know from the file which version wrote it; a safetensors file does not say."""
    spec = ModelSpec("torchvision", "mnasnet0_5", CLASSES, 3, 32, (0.5,) * 3, (0.25,) * 3)
    model = build(spec)
    with pytest.raises(UserError, match=r"^model.architecture: the model cannot be loaded from plain .* architecture$"):
        load_state(model, dict(model.state_dict()), "model.architecture")
