"""Centring of channels: what they have in common goes where it outweighs the rest, and all else stays to the bit."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from sophon.surgery.centre import centre, centre_channels
from tests.surgery.surgical import means_for
from tests.tiny import SIZE, TinyNet, state_of, tiny_images, tiny_model


def drowned(gain: float, *, bias: bool = False) -> TinyNet:
    """Return the tiny network in float64 with one filter added to all channels of conv2, and a head blind to it."""
    model = tiny_model()
    assert isinstance(model, TinyNet)
    if bias:
        plain, model.conv2 = model.conv2, nn.Conv2d(4, 4, 3, padding=1, dtype=torch.float64)
        model.conv2.weight.data.copy_(plain.weight)
    with torch.no_grad():
        slope = model.bn2.weight / (model.bn2.running_var + model.bn2.eps).sqrt()
        model.conv2.weight.add_(gain * torch.randn(1, 4, 3, 3, dtype=torch.float64) / slope.view(-1, 1, 1, 1))
    return model.eval()


def spread(model: TinyNet) -> Tensor:
    """Return what the channels behind bn2 tell apart, [B, 4, H, W]: their differences from the mean over them."""
    images = torch.randn(5, 1, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    outputs = model.bn2(model.conv2(torch.tanh(model.bn1(model.conv1(images)))))
    return (outputs - outputs.mean(1, keepdim=True)).detach()


def test_what_channels_share_goes_and_what_they_tell_apart_stays() -> None:
    for bias in (False, True):
        model = drowned(100.0, bias=bias)
        before, others = spread(model), {n: v for n, v in state_of(model).items() if "2" not in n}
        means = means_for(images=tiny_images(40))
        assert centre(model, means) is model
        assert means.flops > 0
        torch.testing.assert_close(spread(model), before, rtol=1e-6, atol=1e-6)
        outputs = model.bn2.weight / (model.bn2.running_var + model.bn2.eps).sqrt()
        assert (model.conv2.weight * outputs.view(-1, 1, 1, 1)).mean(0).abs().max() < 1e-6
        assert all(torch.equal(state_of(model)[name], value) for name, value in others.items())


def test_a_constant_that_channels_share_goes_by_itself() -> None:
    model = tiny_model()
    assert isinstance(model, TinyNet)
    model.eval()
    before = copy.deepcopy(state_of(model))
    with torch.no_grad():
        model.bn2.bias.add_(1000.0)
    wanted = spread(model)
    assert centre_channels(model, means_for(images=tiny_images(40))) == {}
    torch.testing.assert_close(spread(model), wanted)
    assert model.bn2.bias.abs().max() < 10
    assert all(torch.equal(state_of(model)[name], value) for name, value in before.items() if name != "bn2.bias")


def test_an_ordinary_model_is_left_as_it_is() -> None:
    for model in (tiny_model(), drowned(0.1)):
        before = copy.deepcopy(state_of(model))
        assert centre_channels(model, means_for(images=tiny_images(40))) == {}
        assert all(torch.equal(state_of(model)[name], value) for name, value in before.items())


def test_a_start_follows_the_released_weights_by_the_slope() -> None:
    model = drowned(100.0, bias=True)
    slope = (model.bn2.weight / (model.bn2.running_var + model.bn2.eps).sqrt()).detach()
    factors = centre_channels(model, means_for(images=tiny_images(40)))
    assert set(factors) == {"conv2.weight", "conv2.bias", "bn2.weight"}
    assert torch.equal(torch.as_tensor(factors["conv2.weight"]).flatten(), slope)
    assert factors["bn2.weight"] == factors["conv2.bias"] == 0
    assert not model.conv2.bias.any()
