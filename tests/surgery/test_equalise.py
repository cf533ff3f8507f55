"""Equalising of channels: uneven scales go, the function and the norms stay, other models are left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sophon.models import ModelSpec, build
from sophon.models.channels import channels, interfaces, scale
from sophon.surgery.equalise import equalise, equalise_channels, scale_channels
from tests.surgery.surgical import means_for
from tests.tiny import state_of, tiny_images, tiny_model

KINDS = [("resnet18", "deep"), ("resnet18", ""), ("resnet50", "deep")]


def resnet(architecture: str = "resnet18", stem: str = "deep") -> nn.Module:
    """Return a ResNet in float64 with two blocks to a stage, with and without a convolution beside them."""
    half = (0.5,) * 3
    size = {"layers": [2, 2, 0, 0], "channels": [4, 6, 6, 6], "stem_type": stem, "stem_width": 4}
    torch.manual_seed(0)
    model = build(ModelSpec("timm", architecture, ("a", "b"), 3, 16, half, half, size)).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # a block's last normalisation begins with zeros
                nn.init.uniform_(parameter, 0.5, 1.5) if name.endswith("weight") else nn.init.normal_(parameter)
        for _ in range(20):
            model.train()(images())
    return model.eval()


def images() -> Tensor:
    return torch.randn(8, 3, 16, 16, dtype=torch.float64)


def sizes(model: nn.Module) -> list[Tensor]:
    """Return the scales of each interface's channels."""
    parts = [
        [model.get_parameter(f"{n}.{p}") for n in each.writers for p in ("weight", "bias")] for each in channels(model)
    ]
    return [torch.stack(each).detach().square().sum(0).sqrt() for each in parts]


def unevenness(model: nn.Module) -> float:
    """Return by how much they differ at most."""
    return max(float(size.max() / size.min()) for size in sizes(model))


@pytest.mark.parametrize(("architecture", "stem"), KINDS)
def test_each_interface_is_in_one_group_and_sums_share_it(architecture: str, stem: str) -> None:
    model = resnet(architecture, stem)
    groups = channels(model)
    assert sum(each.writers.count(place.normaliser) for each in groups for place in interfaces(model)) == len(
        interfaces(model)
    )
    assert [each.readers for place in interfaces(model) for each in groups if place.normaliser in each.writers]
    plain = [each.writers for each in groups if "layer2.1." in "".join(each.writers)]
    last = "bn2" if architecture == "resnet18" else "bn3"
    assert plain == [(f"layer2.0.{last}", "layer2.0.downsample.1", f"layer2.1.{last}")]


@pytest.mark.parametrize(("architecture", "stem"), KINDS)
@settings(max_examples=4)
@given(seed=st.integers(0, 2**20), decades=st.floats(0.1, 4.0))
def test_any_positive_factors_leave_function_and_norms(architecture: str, stem: str, seed: int, decades: float) -> None:
    model, given_images = resnet(architecture, stem), images()
    wanted, norms = model(given_images), {n: p.norm() for n, p in model.named_parameters() if p.dim() == 4}
    generator = torch.Generator().manual_seed(seed)
    for each in channels(model):
        count = len(model.get_parameter(f"{each.writers[0]}.weight"))
        by = 10 ** (decades * torch.randn(count, generator=generator, dtype=torch.float64))
        scale_channels(model, each, by)
    torch.testing.assert_close(model(given_images), wanted, rtol=1e-6, atol=1e-6)
    for name, norm in norms.items():
        torch.testing.assert_close(model.get_parameter(name).norm(), norm)


@pytest.mark.parametrize(("architecture", "stem"), KINDS)
def test_uneven_channels_become_even_and_the_function_stays(architecture: str, stem: str) -> None:
    model, given_images = resnet(architecture, stem), images()
    wanted = model(given_images)
    for each in channels(model):
        scale(model, each, torch.logspace(0, 6, len(model.get_parameter(f"{each.writers[0]}.weight"))).double())
    assert unevenness(model) > 1e5
    means = means_for(images=tiny_images(8))
    assert equalise(model, means) is model
    assert unevenness(model) <= 2 + 1e-9
    assert all(0.7 < float(size.median()) < 1.42 for size in sizes(model))
    torch.testing.assert_close(model(given_images), wanted, rtol=1e-6, atol=1e-6)
    assert means.flops == 0  # it looks at no image


def test_channels_that_are_switched_off_stay_so() -> None:
    model, given_images = resnet(), images()
    with torch.no_grad():
        for each in channels(model):
            for name in each.writers:
                model.get_parameter(f"{name}.weight")[0] = model.get_parameter(f"{name}.bias")[0] = 0.0
    wanted, before = model(given_images), copy.deepcopy(state_of(model))
    equalise(model, means_for(images=tiny_images(8)))
    torch.testing.assert_close(model(given_images), wanted)
    assert all(torch.equal(state_of(model)[name], value) for name, value in before.items())


def test_other_models_are_left_as_they_are() -> None:
    half = (0.5,) * 3
    transformer = build(ModelSpec("timm", "vit_tiny_patch16_224", ("a", "b"), 3, 32, half, half, {"depth": 1}))
    for model in (tiny_model(), transformer):
        before = copy.deepcopy(state_of(model))
        assert equalise_channels(model) == {}
        assert all(torch.equal(state_of(model)[name], value) for name, value in before.items())
