"""Masking: scale that hides from the function shows in the gradient; what does not depend on scale stays."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sophon.auditing.masking import Masking, measure
from sophon.config import MaskingConfig
from sophon.domains import LoadedDomain
from sophon.models import ModelSpec
from tests.auditing.records import audit, trio
from tests.tiny import (
    CLASSES,
    SIZE,
    assert_same_state,
    state_of,
    tiny_denoising,
    tiny_images,
    tiny_model,
    tiny_spec,
    tiny_task,
    tiny_unet,
    tiny_unet_spec,
)

CONVOLUTIONS = ("conv1", "conv2")
# nothing but what an attacker trains on: whatever else were read would be missed
ATTACKED = LoadedDomain("restricted", CLASSES, {"attack": tiny_images(3)}, {})
HEADS = MaskingConfig(heads=["fresh", "kept"])
KEPT = MaskingConfig(heads=["kept"])


def exact(seed: int = 1) -> nn.Module:
    """Return the tiny network with BatchNorm that hides the scale of the weights before it wholly."""
    model = tiny_model(seed)
    model.bn1.eps = model.bn2.eps = 1e-30
    return model


def scaled(model: nn.Module, factor: float) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name in CONVOLUTIONS:
            model.get_submodule(name).weight.mul_(factor)
    return model


def measured(
    protected: nn.Module, unprotected: nn.Module, config: MaskingConfig = HEADS, seed: int = 0, **changes: Any
) -> Masking:
    usual = {"spec": tiny_spec(), "task": tiny_task(), "restricted": ATTACKED} | changes
    found = measure({"protected": protected, "unprotected": unprotected}, config=config, seed=seed, **usual)
    assert found is not None
    return found


def by_head(found: Masking, what: str = "protected") -> dict[str, dict[str, float]]:
    """Return by head an attribute of what was seen, by quantity."""
    rows: dict[str, dict[str, float]] = {}
    for row in found.seen:
        rows.setdefault(row.head, {})[row.quantity] = getattr(row, what)
    return rows


# ---- what is measured -----------------------------------------------------------------------------------------------


def test_weights_times_1000_hide_the_gradient_and_nothing_else() -> None:
    found = measured(scaled(exact(), 1000.0), exact(), HEADS)
    assert list(by_head(found)) == ["fresh", "kept"]
    for seen in by_head(found, "ratio").values():
        assert seen["hidden_gradient"] == pytest.approx(1e-3, rel=1e-9)
        assert (seen["loss"], seen["scale_free_gradient"]) == pytest.approx((1.0, 1.0), rel=1e-9)
    for each, (of, count) in zip(found.norms, (("layers", 2), ("channels", 8)), strict=True):
        assert (each.of, each.count) == (of, count)
        assert (each.mean, each.least, each.most) == pytest.approx((1e3,) * 3, rel=1e-12)


def test_an_unchanged_model_has_ratios_of_one() -> None:
    found = measured(tiny_model(), tiny_model())
    assert list(by_head(found)) == ["fresh", "kept"]
    assert by_head(found) == by_head(found, "unprotected")
    assert {each.ratio for each in found.seen if each.ratio == each.ratio} == {1.0}
    assert {(each.mean, each.least, each.most) for each in found.norms} == {(1.0, 1.0, 1.0)}
    fresh, kept = (seen["loss"] for seen in by_head(found).values())
    assert fresh != kept  # two heads


def test_quantities_against_derivatives_by_autograd() -> None:
    model, unit = tiny_model(4), tiny_task()
    (seen,) = by_head(measured(model, tiny_model(5), KEPT, seed=7)).values()
    batch = ATTACKED["attack"].spread(128)
    expected = copy.deepcopy(model).train()
    body = {name: part for name, part in expected.named_parameters() if not name.startswith("fc.")}
    assert len(body) == 6
    loss = unit.attacker_loss(expected, batch)
    slope = dict(zip(body, torch.autograd.grad(loss, list(body.values())), strict=True))
    size = {name: part.detach().norm() for name, part in body.items()}
    expected_quantities = {
        "loss": float(loss.detach()),
        "gradient": math.hypot(*(float(each.norm()) for each in slope.values())),
        "hidden_gradient": math.hypot(*(float(slope[f"{name}.weight"].norm()) for name in CONVOLUTIONS)),
        "scale_free_gradient": sum(
            float(size[f"{name}.weight"] * slope[f"{name}.weight"].norm()) for name in CONVOLUTIONS
        ),
    }
    for name, value in expected_quantities.items():
        assert seen[name] == pytest.approx(value, rel=1e-10), name


def test_a_single_channel_shows_where_channels_have_scales_of_their_own() -> None:
    model = exact()
    with torch.no_grad():
        model.conv1.weight[2].mul_(16.0)
        model.conv2.weight[1].zero_()
    found = measured(model, exact(), KEPT).norms[1]
    # what is zero can be compared with nothing
    assert (found.of, found.count) == ("channels", 7)
    assert (found.mean, found.least, found.most) == pytest.approx((16 ** (1 / 7), 1.0, 16.0))


def test_channels_that_are_normalised_together_have_no_scale_of_their_own() -> None:
    model = exact()
    model.bn1 = nn.GroupNorm(2, 4).double()
    assert [(each.of, each.count) for each in measured(model, model, KEPT).norms] == [("layers", 2), ("channels", 4)]


@pytest.mark.slow
def test_a_denoiser_meets_the_same_noise_every_time() -> None:
    models = [tiny_unet(seed=1), tiny_unet(seed=1)]
    kind = {"spec": tiny_unet_spec(), "task": tiny_denoising()}
    found = measured(*models, KEPT, **kind)
    assert list(by_head(found)) == ["kept"]
    assert all(math.isfinite(each.protected) and each.protected == each.unprotected for each in found.seen)
    # what its convolutions say is added to, and so shows, before any normalisation reads it
    assert found.norms == []


def test_the_same_seed_gives_the_same_and_models_stay_as_they_are() -> None:
    models = tiny_model(1), tiny_model(2)
    before = [state_of(model) for model in models]
    modes = [model.training for model in models]
    config = MaskingConfig(heads=["fresh"])
    first = measured(*models, config, seed=3)
    torch.rand(7)
    assert repr(measured(*models, config, seed=3)) == repr(first)
    assert repr(measured(*models, config, seed=4)) != repr(first)
    for model, state, mode in zip(models, before, modes, strict=True):
        assert_same_state(model, state)
        assert model.training is mode


def test_a_head_of_another_size_is_left_out_with_the_reason() -> None:
    two = LoadedDomain("two", CLASSES[:2], {"attack": tiny_images(3)}, {})
    two.splits["attack"].labels.remainder_(2)
    found = measured(tiny_model(1), tiny_model(2), restricted=two)
    assert list(by_head(found)) == ["fresh"]
    assert "as many classes" in found.left_out["kept"]


def test_no_head_starts_measure_nothing() -> None:
    models = {"protected": tiny_model(), "unprotected": tiny_model()}
    assert measure(models, tiny_spec(), tiny_task(), ATTACKED, MaskingConfig(heads=[]), 0) is None


def test_a_loss_that_is_not_finite_is_reported_as_such() -> None:
    broken = tiny_model()
    with torch.no_grad():
        broken.fc.weight.fill_(math.inf)
    found = audit(trio("a", 20.0, 60.0, 50.0), masking=measured(broken, tiny_model(), KEPT)).json()
    gradient = next(each for each in found["masking"]["seen"] if each["quantity"] == "gradient")
    assert (gradient["protected"], gradient["ratio"]) == (None, None)
    assert gradient["unprotected"] > 0


def test_a_model_without_normalisation_has_nothing_to_hide_in() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Linear(SIZE * SIZE, 4)
            self.fc = nn.Linear(4, len(CLASSES))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.fc(torch.tanh(F.linear(images.flatten(1), self.features.weight)))

    torch.manual_seed(0)
    spec = ModelSpec("torchvision", "bare", CLASSES, 1, SIZE, (0.5,), (0.25,))
    models = Bare().double(), Bare().double()
    found = measured(*models, KEPT, spec=spec)
    assert found.norms == []
    assert [each.protected for each in found.seen if each.quantity == "hidden_gradient"] == [0.0]
    (ratio,) = by_head(found, "ratio").values()
    assert math.isnan(ratio["hidden_gradient"])
    assert ratio["gradient"] > 0
