"""Weight surgery without training: what each operation does to the bit, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import BatchNormAct2d, GroupNorm1, LayerNorm2d
from torch import nn

from sophon.surgery import operations as surgery
from tests.surgery.surgical import changed, fresh_state, means_for, resnet, unet
from tests.tiny import assert_same_state, state_of, tiny_model

# --- reinitialise ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "end", "layers"), [(1, "last", "2"), (1, "first", "1"), (2, "last", "12"), (2, "first", "12")]
)
def test_reinitialise_takes_weights_and_buffers_of_a_fresh_model(blocks: int, end: Any, layers: str) -> None:
    model = tiny_model()
    before, fresh = state_of(model), fresh_state(3)
    torch.manual_seed(3)
    assert surgery.reinitialise(model, means_for(), blocks=blocks, end=end) is model
    prefixes = tuple(f"{kind}{layer}." for kind in ("conv", "bn") for layer in layers)
    assert_same_state(model, {name: fresh[name] if name.startswith(prefixes) else before[name] for name in before})


def test_reinitialise_a_denoisers_first_block() -> None:
    model, means = unet()
    before = state_of(model)
    surgery.reinitialise(model, means, end="first")
    found = changed(model, before)
    assert found <= {name for name in before if name.startswith(("conv_in.", "time_embedding.", "down_blocks.0."))}
    assert {"conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"} <= found


# --- noise ----------------------------------------------------------------------------------------------------------


def test_noise_has_a_part_of_each_tensors_deviation() -> None:
    model = nn.Sequential(nn.Linear(200, 100), nn.BatchNorm1d(100)).double()
    with torch.no_grad():
        model[0].weight.mul_(7).add_(5)  # the mean is no part of it
        model[1].weight.fill_(-3)
        model[1].bias.zero_()
    before = state_of(model)
    torch.manual_seed(5)
    draws = [torch.randn_like(parameter) for parameter in model.parameters()]
    torch.manual_seed(5)
    assert surgery.noise(model, means_for(), scale=0.2) is model
    spreads = [before["0.weight"].std(correction=0), before["0.bias"].std(correction=0), torch.tensor(3.0), 0.0]
    for name, draw, spread in zip(dict(model.named_parameters()), draws, spreads, strict=True):
        torch.testing.assert_close(model.get_parameter(name).data, before[name] + 0.2 * spread * draw)
    added = model[0].weight.detach() - before["0.weight"]
    assert float(added.std()) == pytest.approx(0.2 * 7 / 200**0.5 / 3**0.5, rel=0.03)
    assert changed(model, before) == {"0.weight", "0.bias", "1.weight"}


# --- prune ----------------------------------------------------------------------------------------------------------


@given(fraction=st.floats(0, 1, exclude_min=True, exclude_max=True), seed=st.integers(0, 9))
def test_prune_zeroes_the_smallest_of_every_layer(fraction: float, seed: int) -> None:
    model = tiny_model(seed)
    torch.nn.init.ones_(model.fc.weight)  # where all are equal as many go
    before = state_of(model)
    surgery.prune(model, means_for(), fraction=fraction)
    for name, now in model.state_dict().items():
        if not name.endswith("weight") or now.dim() < 2:
            assert torch.equal(now, before[name])
            continue
        gone = now == 0
        assert int(gone.sum()) == round(fraction * now.numel())
        assert torch.equal(now[~gone], before[name][~gone])
        if gone.any() and not gone.all():
            assert before[name][gone].abs().max() <= before[name][~gone].abs().min()


def test_prune_in_channels_last_format() -> None:
    model, means = resnet()
    before = state_of(model)
    surgery.prune(model, means, fraction=0.3)
    weight, was = model.layer2[0].conv1.weight, before["layer2.0.conv1.weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert int((weight == 0).sum()) == round(0.3 * weight.numel())
    assert was[weight == 0].abs().max() <= was[weight != 0].abs().min()


# --- shrink and perturb ---------------------------------------------------------------------------------------------


@given(keep=st.floats(0, 1))
def test_shrink_perturb_goes_towards_a_fresh_model(keep: float) -> None:
    model = tiny_model()
    before, fresh = state_of(model), fresh_state(4)
    torch.manual_seed(4)
    assert surgery.shrink_perturb(model, means_for(), keep=keep) is model
    parameters = dict(model.named_parameters())
    for name, now in model.state_dict().items():
        expected = keep * before[name] + (1 - keep) * fresh[name] if name in parameters else before[name]
        torch.testing.assert_close(now, expected, rtol=1e-14, atol=1e-15)


def test_shrink_perturb_at_its_ends() -> None:
    model, fresh = tiny_model(), fresh_state(4)
    before = state_of(model)
    surgery.shrink_perturb(model, means_for(), keep=1)
    assert_same_state(model, before)
    torch.manual_seed(4)
    surgery.shrink_perturb(model, means_for(), keep=0)
    assert all(torch.equal(parameter, fresh[name]) for name, parameter in model.named_parameters())


# --- reset_affine ---------------------------------------------------------------------------------------------------


def test_reset_affine_resets_every_normalisation_layer_and_nothing_else() -> None:
    model, means = resnet()
    before = state_of(model)
    norms = [name for name, part in model.named_modules() if isinstance(part, nn.BatchNorm2d)]
    assert surgery.reset_affine(model, means) is model
    affine = {f"{name}.{kind}" for name in norms for kind in ("weight", "bias")}
    assert changed(model, before) == affine
    assert all((model.state_dict()[name] == name.endswith("weight")).all() for name in affine)


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(4),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm2d(4, affine=True),
        nn.GroupNorm(2, 4),
        nn.LayerNorm(4),
        nn.LayerNorm(4, bias=False),
        nn.RMSNorm(4),
        BatchNormAct2d(4),
        GroupNorm1(4),
        LayerNorm2d(4),
        nn.BatchNorm2d(4, affine=False),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_reset_affine_of_each_kind(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 4), norm)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.3)
    surgery.reset_affine(model, means_for())
    values = {name: parameter.flatten()[0].item() for name, parameter in norm.named_parameters()}
    assert values == {name: float(name == "weight") for name in values}
    assert (model[0].weight == 0.3).all()
