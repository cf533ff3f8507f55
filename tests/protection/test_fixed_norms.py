"""Fixed norms: training may not hide in the scale of weights, and giving norms back changes no answer."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from sophon.models import ModelSpec, build
from sophon.protection.fixed_norms import FixedNorms
from sophon.surgery.renormalise import Per
from sophon.tasks import ClassificationTask, DenoisingTask
from tests.surgery.surgical import changed, outputs
from tests.tiny import (
    CLASSES,
    SIZE,
    assert_same_state,
    state_of,
    tiny_batches,
    tiny_denoising,
    tiny_model,
    tiny_task,
    tiny_unet_spec,
)
from tests.tiny import tiny_unet as make_unet

BATCH = tiny_batches(0, 1)[0]
CONVOLUTIONS = ("conv1", "conv2")


def filters(model: nn.Module, name: str) -> Tensor:
    return model.get_submodule(name).weight.detach().double().flatten(1).norm(dim=1)


def disturb(model: nn.Module, seed: int = 1) -> None:
    """Move every parameter, and scale the filters unevenly, as training might; the statistics follow."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * parameter.abs().mean() * torch.randn_like(parameter))
            if parameter.dim() == 4:
                parameter.mul_(torch.rand(len(parameter), 1, 1, 1, dtype=parameter.dtype) * 5 + 0.2)


@pytest.mark.parametrize("per", ["layer", "channel"])
def test_norms_come_back_and_the_function_stays(per: Per) -> None:
    model = tiny_model()
    fixed, before = FixedNorms(model, tiny_task(), BATCH, per), copy.deepcopy(model)
    pointers = {name: value.data_ptr() for name, value in model.state_dict().items()}
    disturb(model)
    expected, moved = outputs(model), state_of(model)
    fixed.project()
    torch.testing.assert_close(outputs(model), expected, rtol=1e-12, atol=1e-13)
    for name in CONVOLUTIONS:
        norms, wanted = filters(model, name), filters(before, name)
        assert norms.norm().item() == pytest.approx(wanted.norm().item(), rel=1e-12)
        assert torch.allclose(norms, wanted, rtol=1e-12) == (per == "channel")
        if per == "layer":  # the direction is training's
            ratio = model.get_submodule(name).weight / moved[f"{name}.weight"]
            torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-12, atol=0)
    kinds = ("weight", "running_mean", "running_var")
    assert changed(model, moved) == {f"conv{i}.weight" for i in (1, 2)} | {f"bn{i}.{k}" for i in (1, 2) for k in kinds}
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == pointers
    again = state_of(model)
    fixed.project()
    torch.testing.assert_close(state_of(model), again, rtol=1e-14, atol=1e-15)


def unnormalised() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    spec = ModelSpec("torchvision", "other", CLASSES, 1, SIZE, (0.5,), (0.25,))
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return model.double(), ClassificationTask(spec, dtype=torch.float64)


@pytest.mark.parametrize("per", ["layer", "channel"])
@pytest.mark.parametrize(
    "make",
    [
        unnormalised,
        lambda: (make_unet(), tiny_denoising()),
        lambda: (make_unet(conditional=True), tiny_denoising(conditional=True)),
    ],
    ids=["plain", "unet", "conditional unet"],
)
def test_a_model_without_such_layers_is_left_alone(make: Any, per: Per) -> None:
    """In the U-Net every convolution feeds a sum or a skip connection besides its normalisation."""
    model, task = make()
    fixed = FixedNorms(model, task, BATCH, per)
    assert fixed.names == []
    disturb(model)
    before = state_of(model)
    fixed.project()
    assert_same_state(model, before)


@pytest.mark.parametrize("per", ["layer", "channel"])
def test_a_unet_whose_embedding_comes_after_the_normalisation_has_norms_to_fix(per: Per) -> None:
    spec = tiny_unet_spec()
    spec = replace(spec, model_args={**spec.model_args, "resnet_time_scale_shift": "scale_shift"})
    torch.manual_seed(0)
    model, task = build(spec).double(), DenoisingTask(spec, suppression_loss="dos", dtype=torch.float64)
    fixed = FixedNorms(model, task, BATCH, per)
    blocks = [name for name, part in model.named_modules() if isinstance(part, ResnetBlock2D)]
    assert {f"{name}.conv1" for name in blocks} <= set(fixed.names)
    wanted = {name: filters(model, name).norm() for name in fixed.names}
    disturb(model)
    fixed.project()
    for name, norm in wanted.items():
        assert filters(model, name).norm().item() == pytest.approx(norm.item(), rel=1e-12)


@pytest.mark.parametrize("make", [lambda: (tiny_model(), tiny_task()), lambda: (make_unet(), tiny_denoising())])
def test_looking_changes_nothing(make: Any) -> None:
    model, task = make()
    model.train()
    next(model.children()).eval()
    before, modes, state = state_of(model), [part.training for part in model.modules()], torch.get_rng_state()
    FixedNorms(model, task, BATCH)
    assert_same_state(model, before)
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
