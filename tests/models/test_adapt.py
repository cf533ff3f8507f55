"""Models in memory are adapted, models of one's own are built, and what is no model is refused in one line."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

from sophon.errors import UserError
from sophon.models import adapt, adapter_of
from tests.models.own import GroupNormNet, Tokens
from tests.models.test_adapter_contract import CLASSES
from tests.tiny import assert_same_state, state_of

INPUT: dict[str, Any] = {"image_size": 16, "channels": 1, "mean": [0.5], "std": [0.25]}


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"image_size": None}, "image_size: not known of this model; give it"),
        ({"mean": None, "std": None}, "mean, std: not known of this model; give them"),
        ({"std": [0.0]}, "std: .* give finite numbers above 0"),
        ({"classes": ("a", "b")}, "classes: 2 names for 3 outputs of 'fc'"),
        ({"size": 3}, "size: not known; allowed: channels, classes, factory, head, image_size, mean, model_args, sch"),
        ({"library": "timm"}, "library: the model is not one of timm's; leave it out"),
    ],
)
def test_what_is_not_known_of_a_model_is_asked_for(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        adapt(GroupNormNet(), **{**INPUT, **facts})


# ---- any module of one's own -----------------------------------------------------------------------------------------


def test_a_module_without_a_factory_is_initialised_anew_part_by_part() -> None:
    model, of = adapt(GroupNormNet(), **INPUT, classes=CLASSES)
    before = state_of(model)
    torch.manual_seed(5)
    first = adapter_of(of).fresh()
    torch.manual_seed(5)
    second = adapter_of(of).fresh()
    assert first is not None
    assert second is not None
    assert_same_state(second, state_of(first))
    assert not torch.equal(first.fc.weight, model.fc.weight)
    assert first.features[0].norm.weight.eq(1).all()
    assert_same_state(model, before)


def test_a_module_that_cannot_be_initialised_anew_has_no_fresh_model_unless_a_factory_is_given() -> None:
    module = Tokens()
    unknown = adapt(module, **INPUT).spec
    assert adapter_of(unknown).fresh() is None
    given = adapt(module, **INPUT, factory=Tokens)
    assert isinstance(adapter_of(given.spec).fresh(), Tokens)
    assert given.spec.plain() == unknown.plain()


def test_a_head_is_the_last_linear_layer_unless_it_is_named() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 3))
    assert adapt(module, **INPUT).spec.head == "3"
    with pytest.raises(UserError, match=r"^head: '0' is not a linear layer of the model"):
        adapt(module, **INPUT, head="0")
    with pytest.raises(UserError, match=r"^head: the model has no linear layer"):
        adapt(nn.Conv2d(1, 3, 1), **INPUT)


def test_a_vision_transformer_of_another_size_is_taken_at_it() -> None:
    assert adapt(timm.create_model("test_vit", img_size=32, num_classes=3)).spec.image_size == 32


def test_a_class_that_builds_another_model_is_refused_without_its_arguments() -> None:
    with pytest.raises(UserError, match=r"^model_args: .*GroupNormNet with {} builds another model \('.*' differs\)"):
        adapt(GroupNormNet(width=6), **INPUT)
    assert adapt(GroupNormNet(width=6), **INPUT, model_args={"width": 6}).spec.model_args == {"width": 6}


def test_a_changed_model_of_torchvision_is_a_module_like_any_other() -> None:
    model = torchvision.models.shufflenet_v2_x0_5(num_classes=3)
    model.fc = nn.Sequential(nn.Dropout(0.2), nn.Linear(1024, 3))
    of = adapt(model, image_size=32, mean=[0.5], std=[0.5]).spec
    assert (of.library, of.head, of.channels, of.mean) == ("python", "fc.1", 3, (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("module", "line"),
    [
        (GroupNormNet(), "model = GroupNormNet().eval()"),
        (nn.Sequential(nn.Flatten(), nn.Linear(256, 3)), "model = ...  # a Sequential that its author built"),
    ],
)
def test_the_card_says_how_to_build_it_or_that_only_its_author_can(module: nn.Module, line: str) -> None:
    assert line in adapter_of(adapt(module, **INPUT).spec).card().loading
