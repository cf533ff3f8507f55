"""What an attacker has at hand: a fresh model, its own images, other domains, and the bill."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sophon.domains import Batch, ImageSet
from sophon.errors import UserError
from sophon.finetune import flops_per_step
from sophon.models import adapter_of
from sophon.surgery.attacker_means import Means
from tests.auditing.staging import BENIGN, FRESH, ORIGINAL, RESTRICTED
from tests.tiny import (
    CLASSES,
    assert_same_state,
    state_of,
    tiny_denoising,
    tiny_model,
    tiny_spec,
    tiny_task,
    tiny_unet,
    tiny_unet_spec,
)


def means_of(**changes: Any) -> Means:
    usual: dict[str, Any] = {
        "task": tiny_task(),
        "spec": tiny_spec(),
        "classes": CLASSES,
        "images": RESTRICTED["attack"],
        "generator": torch.Generator().manual_seed(0),
    }
    return Means(**{**usual, **changes})


# --- a fresh model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fresh_model_has_random_weights_and_the_others_type(dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    before = state_of(model)
    torch.manual_seed(3)
    fresh = means_of().fresh(model)
    assert {parameter.dtype for parameter in fresh.parameters()} == {dtype}
    assert {name: value.shape for name, value in fresh.state_dict().items()} == {
        name: value.shape for name, value in before.items()
    }
    assert not torch.equal(fresh.conv1.weight, model.conv1.weight)
    assert_same_state(model, before)
    torch.manual_seed(3)
    assert_same_state(means_of().fresh(model), state_of(fresh))
    assert not torch.equal(means_of().fresh(model).conv1.weight, fresh.conv1.weight)


@pytest.mark.parametrize("classes", [2, 5])
def test_a_fresh_model_has_as_many_classes_as_the_other_has_now(classes: int) -> None:
    model = tiny_model()
    adapter_of(tiny_spec()).start_head(model, [str(index) for index in range(classes)])
    means = means_of()
    assert means.classes_of(model) == classes
    assert means.classes_of(means.fresh(model)) == classes


@pytest.mark.parametrize(("conditional", "classes"), [(False, None), (True, len(CLASSES))])
def test_denoisers(conditional: bool, classes: int | None) -> None:
    spec, task = tiny_unet_spec(conditional=conditional), tiny_denoising(conditional=conditional)
    means = means_of(spec=spec, task=task)
    model = tiny_unet(conditional=conditional)
    assert means.classes_of(model) == classes
    fresh = means.fresh(model)
    assert means.classes_of(fresh) == classes
    assert {parameter.dtype for parameter in fresh.parameters()} == {torch.float64}
    assert fresh.state_dict().keys() == model.state_dict().keys()


# --- images -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 2, 3, 5])
def test_relabelled_images_have_labels_that_the_head_allows(classes: int) -> None:
    model = tiny_model()
    adapter_of(tiny_spec()).start_head(model, [str(index) for index in range(classes)])
    images = RESTRICTED["attack"]
    found = means_of().relabelled(images, model)
    assert found.images is images.images
    assert torch.equal(found.labels, images.labels % classes)
    assert int(found.labels.max()) < classes


def test_without_a_head_labels_stay() -> None:
    means = means_of(spec=tiny_unet_spec(), task=tiny_denoising())
    found = means.relabelled(RESTRICTED["attack"], tiny_unet())
    assert torch.equal(found.labels, RESTRICTED["attack"].labels)


@pytest.mark.parametrize(("name", "domain"), [("original", ORIGINAL), ("benign", BENIGN)])
def test_other_domains_or_one_line_that_says_how_to_give_them(name: str, domain: Any) -> None:
    assert means_of(**{name: domain}).domain(name, "surgery: heal") is domain
    with pytest.raises(UserError, match=f"^surgery: heal: the audit was given no {name} domain; set domain.{name}$"):
        means_of().domain(name, "surgery: heal")


# --- training and the bill ----------------------------------------------------------------------------------------


def test_training_is_on_the_attackers_images_unless_told_otherwise() -> None:
    seen: list[Tensor] = []

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        seen.append(batch.images)
        return tiny_task().attacker_loss(model, batch)

    def owned(images: ImageSet) -> bool:
        own = {image.numpy().tobytes() for image in images.images}
        return all(image.numpy().tobytes() in own for batch in seen for image in batch)

    means_of().train(tiny_model(), FRESH, loss=loss)
    assert owned(RESTRICTED["attack"])
    seen.clear()
    means_of().train(tiny_model(), FRESH, BENIGN["attack"], loss)
    assert owned(BENIGN["attack"])
    assert len(seen) == FRESH.steps + 1  # one to count by


def test_training_changes_the_model_in_place_and_repeats_from_the_generator() -> None:
    one, two, three = tiny_model(), tiny_model(), tiny_model()
    assert means_of().train(one, FRESH)
    assert means_of().train(two, FRESH)
    assert_same_state(two, state_of(one))
    assert means_of(generator=torch.Generator().manual_seed(1)).train(three, FRESH)
    assert not torch.equal(three.conv1.weight, one.conv1.weight)
    assert not torch.equal(one.conv1.weight, tiny_model().conv1.weight)


def test_the_bill_adds_up() -> None:
    means, task, images = means_of(), tiny_task(), RESTRICTED["attack"]
    assert means.flops == 0
    one = flops_per_step(tiny_model(), FRESH, task, images)
    means.train(tiny_model(), FRESH)
    assert means.flops == FRESH.steps * one > 0
    means.train(tiny_model(), replace(FRESH, steps=3), BENIGN["attack"])
    assert means.flops == (FRESH.steps + 3) * one
    teacher = tiny_model(1)
    means.train(tiny_model(), FRESH, loss=lambda model, batch: task.imitation_loss(model, batch, teacher))
    assert means.flops > (2 * FRESH.steps + 3) * one  # the teacher's answers cost too
    means.train(tiny_model(), replace(FRESH, steps=0))
    assert means_of().flops == 0


def test_what_diverges_says_so() -> None:
    model = tiny_model().float()
    wild = replace(FRESH, optimizer="nesterov", lr=1e38, steps=20)
    assert not means_of(task=type(tiny_task())(tiny_spec())).train(model, wild)
