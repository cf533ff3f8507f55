"""Re-normalisation: the same function with other norms, and only where nothing but a normalisation layer reads."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sophon.attacker import FineTuneStrategy
from sophon.domains import Batch
from sophon.finetune import fine_tune
from sophon.surgery.renormalise import renormalise
from tests.surgery.surgical import changed, fresh_state, means_for, outputs
from tests.tiny import state_of, tiny_model

TINY_PAIRS = [("conv1", "bn1"), ("conv2", "bn2")]
UNEVEN = torch.logspace(-1, 1, 4, dtype=torch.float64)  # a factor for each channel


def multiplied(model: nn.Module, factor: float | Tensor) -> nn.Module:
    """Return the same function in evaluation mode with other filters: a protection that is none."""
    model, factor = copy.deepcopy(model), torch.as_tensor(factor, dtype=torch.float64).expand(4)
    with torch.no_grad():
        for layer, norm in ((model.get_submodule(one), model.get_submodule(other)) for one, other in TINY_PAIRS):
            variance = norm.running_var.clone()
            layer.weight.mul_(factor.view(-1, 1, 1, 1))
            norm.running_mean.mul_(factor)
            norm.running_var.mul_(factor**2)
            norm.weight.mul_(((factor**2 * variance + norm.eps) / (variance + norm.eps)).sqrt() / factor)
    return model


@pytest.mark.parametrize("factor", [1.0, 1000.0, 1e-3])
def test_renormalise_keeps_the_function_and_gives_fresh_norms(factor: float) -> None:
    model = multiplied(tiny_model(), factor)
    before, expected, fresh = state_of(model), outputs(model), fresh_state(6)
    torch.manual_seed(6)
    assert renormalise(model, means_for()) is model
    torch.testing.assert_close(outputs(model), expected, rtol=1e-10, atol=1e-12)
    for layer, norm in TINY_PAIRS:
        name = f"{layer}.weight"
        assert model.get_parameter(name).norm().item() == pytest.approx(fresh[name].norm().item(), rel=1e-12)
        assert not torch.equal(model.get_parameter(name), before[name])
        assert torch.equal(model.get_parameter(f"{norm}.bias"), before[f"{norm}.bias"])
    assert torch.equal(model.fc.weight, before["fc.weight"])


@pytest.mark.parametrize("factor", [1000.0, 1e-3])
def test_renormalise_unmasks_a_protection_that_only_scales(factor: float) -> None:
    """Behind the scale the gradient is tiny (or huge); without it both models are one, and so is a step of SGD."""
    genuine, means = tiny_model(), means_for()
    fake = multiplied(genuine, factor)
    torch.testing.assert_close(outputs(fake), outputs(genuine), rtol=1e-9, atol=1e-12)
    batch = Batch(means.images.images[:8], means.images.labels[:8])

    def gradient(model: nn.Module) -> Tensor:
        model = copy.deepcopy(model).eval().requires_grad_(True)
        return torch.autograd.grad(means.task.attacker_loss(model, batch), model.conv1.weight)[0]

    ratio = float(gradient(genuine).norm() / gradient(fake).norm())
    assert ratio == pytest.approx(factor, rel=1e-6)
    for model in (genuine, fake):
        torch.manual_seed(7)
        renormalise(model, means)
    one, other = state_of(genuine), state_of(fake)
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient(fake), gradient(genuine), rtol=1e-8, atol=1e-12)
    step = FineTuneStrategy("sgd", lr=0.5, batch_size=8, steps=1, head="kept")
    for model in (genuine, fake):
        assert fine_tune(model, step, means.task, means.images, torch.Generator().manual_seed(0))
    assert changed(genuine, one) == set(one)
    torch.testing.assert_close(state_of(fake), state_of(genuine), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_renormalise_leaves_a_layer_that_has_no_scale(value: float) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.conv1.weight.fill_(value)
    before = {name: state for name, state in state_of(model).items() if name.startswith("bn1")}
    renormalise(model, means_for())
    now = model.state_dict()
    assert all(torch.equal(now[name], state) for name, state in before.items())
    assert torch.equal(now["conv1.weight"].nan_to_num(7), torch.full((4, 1, 3, 3), value).double().nan_to_num(7))


# --- per channel ----------------------------------------------------------------------------------------------------


def test_per_channel_evens_out_channels_and_per_layer_does_not() -> None:
    genuine, means = tiny_model(), means_for()
    hiding = multiplied(genuine, UNEVEN)
    torch.testing.assert_close(outputs(hiding), outputs(genuine), rtol=1e-9, atol=1e-12)
    fresh = fresh_state(6)
    for per in ("channel", "layer"):
        model = copy.deepcopy(hiding)
        torch.manual_seed(6)
        assert renormalise(model, means, per=per) is model
        torch.testing.assert_close(outputs(model), outputs(genuine), rtol=1e-9, atol=1e-12)
        for layer, norm in TINY_PAIRS:
            wanted = fresh[f"{layer}.weight"].flatten(1).norm(dim=1)
            found = model.get_submodule(layer).weight.flatten(1).norm(dim=1)
            even = torch.allclose(found, wanted, rtol=1e-12)
            assert even == (per == "channel")
            assert found.norm().item() == pytest.approx(wanted.norm().item(), rel=1e-12)
            assert torch.equal(model.get_submodule(norm).bias, genuine.get_submodule(norm).bias)


def test_a_channel_that_has_no_scale_is_left_and_the_others_are_not() -> None:
    model, fresh = tiny_model(), fresh_state(6)
    with torch.no_grad():
        model.conv1.weight[1] = 0
    before = state_of(model)
    torch.manual_seed(6)
    renormalise(model, means_for(), per="channel")
    found, wanted = (weight.flatten(1).norm(dim=1) for weight in (model.conv1.weight, fresh["conv1.weight"]))
    assert found[1] == 0
    others = [0, 2, 3]
    torch.testing.assert_close(found[others], wanted[others], rtol=1e-12, atol=0)
    for name in ("weight", "running_mean", "running_var"):
        now, was = model.state_dict()[f"bn1.{name}"], before[f"bn1.{name}"]
        assert (now == was).tolist() == [False, True, False, False]
