"""Re-normalisation: the same function with other norms, and only where nothing but a normalisation layer reads."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from sophon.attacker import FineTuneStrategy
from sophon.domains import Batch
from sophon.finetune import fine_tune
from sophon.models import ModelSpec
from sophon.surgery import means as means_module
from sophon.surgery.means import Means
from sophon.surgery.renormalise import Per, norms, renormalise, scale_free
from sophon.tasks import ClassificationTask
from tests.surgery.surgical import SPARE, build_also, changed, fresh_state, means_for, outputs, resnet, unet
from tests.tiny import CLASSES, assert_same_state, state_of, tiny_model


@pytest.fixture(autouse=True)
def _fresh_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(means_module, "build", build_also)


def multiplied(model: nn.Module, pairs: list[tuple[str, str]], factor: float) -> nn.Module:
    """Return the same function in evaluation mode with other weights: a protection that is none."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for layer, norm in ((model.get_submodule(one), model.get_submodule(other)) for one, other in pairs):
            variance = norm.running_var.double().clone()
            for parameter in layer.parameters():
                parameter.mul_(factor)
            norm.running_mean.mul_(factor)
            norm.running_var.mul_(factor**2)
            ratio = (factor**2 * variance + norm.eps) / (variance + norm.eps)
            norm.weight.mul_(ratio.sqrt() / factor)
    return model


TINY_PAIRS = [("conv1", "bn1"), ("conv2", "bn2")]


def pairs_of(model: nn.Module) -> list[tuple[str, str]]:
    """Name the convolutions of timm's ResNet with the BatchNorm behind each."""
    names = [name for name, part in model.named_modules() if isinstance(part, nn.Conv2d)]
    known = {"conv1.0": "conv1.1", "conv1.3": "conv1.4", "conv1.6": "bn1"}
    return [
        (name, known.get(name) or name.replace("conv", "bn").replace("downsample.0", "downsample.1")) for name in names
    ]


@pytest.mark.parametrize("factor", [1.0, 1000.0, 1e-3])
def test_renormalise_keeps_the_function_and_gives_fresh_norms(factor: float) -> None:
    model = multiplied(tiny_model(), TINY_PAIRS, factor)
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


@pytest.mark.parametrize("factor", [1.0, 1000.0, 1e-3])
def test_renormalise_a_resnet_in_float32(factor: float) -> None:
    model, means = resnet()
    expected = outputs(model, 32)
    model = multiplied(model, pairs_of(model), factor)
    torch.testing.assert_close(outputs(model, 32), expected, rtol=1e-4, atol=1e-5)
    before = outputs(model, 32)
    torch.manual_seed(6)
    fresh = means.fresh(model)
    torch.manual_seed(6)
    renormalise(model, means)
    torch.testing.assert_close(outputs(model, 32), before, rtol=1e-5, atol=1e-5)
    for name, _ in pairs_of(model):
        wanted = fresh.get_submodule(name).weight.norm().item()
        assert model.get_submodule(name).weight.norm().item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("factor", [1000.0, 1e-3])
def test_renormalise_unmasks_a_protection_that_only_scales(factor: float) -> None:
    """Behind the scale the gradient is tiny (or huge); without it both models are one, and so is a step of SGD."""
    genuine, means = tiny_model(), means_for()
    fake = multiplied(genuine, TINY_PAIRS, factor)
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


def test_renormalise_twice_is_renormalise_once() -> None:
    model, means = tiny_model(), means_for()
    torch.manual_seed(8)
    renormalise(model, means)
    once = state_of(model)
    torch.manual_seed(8)
    renormalise(model, means)
    torch.testing.assert_close(state_of(model), once, rtol=1e-13, atol=1e-14)


class Net(nn.Module):
    """Convolutions of many fates; only ``plain`` and ``hidden`` feed a normalisation and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.skipped = nn.Conv2d(1, 4, 1)
        self.skipped_norm = nn.BatchNorm2d(4)
        self.plain = nn.Conv2d(4, 4, 1)
        self.plain_norm = nn.BatchNorm2d(4)
        self.inplace = nn.Conv2d(4, 4, 1)
        self.inplace_norm = nn.BatchNorm2d(4)
        self.twice = nn.Conv2d(4, 4, 1)
        self.twice_norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])
        self.pair = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)])
        self.pair_norm = nn.BatchNorm2d(4)
        self.computed = weight_norm(nn.Conv2d(4, 4, 1))
        self.computed_norm = nn.BatchNorm2d(4)
        self.tied = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)])
        self.tied[1].weight = self.tied[0].weight
        self.tied_norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])
        self.hidden = nn.Linear(4, 4)
        self.hidden_norm = nn.BatchNorm1d(4)
        self.fc = nn.Linear(4, len(CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        x = self.skipped(images)
        x = x + self.skipped_norm(x)
        x = torch.tanh(self.plain_norm(self.plain(x)))
        x = self.inplace_norm(F.silu(self.inplace(x), inplace=True))
        for norm in self.twice_norms:
            x = torch.tanh(norm(self.twice(x)))
        for layer in self.pair:
            x = torch.tanh(self.pair_norm(layer(x)))
        x = torch.tanh(self.computed_norm(self.computed(x)))
        for layer, norm in zip(self.tied, self.tied_norms, strict=True):
            x = torch.tanh(norm(layer(x)))
        return self.fc(torch.tanh(self.hidden_norm(self.hidden(x.mean((2, 3))))))


def other_means(monkeypatch: pytest.MonkeyPatch, make: Callable[[], nn.Module]) -> tuple[nn.Module, Means]:
    """Return a model in float64 that no library has, its statistics settled, and means that can build it afresh."""
    monkeypatch.setitem(SPARE, "other", lambda spec: make())
    torch.manual_seed(0)
    model = make().double().train()
    with torch.no_grad():
        for _ in range(4):
            model(torch.randn(8, 1, 6, 6, dtype=torch.float64))
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    spec = ModelSpec("torchvision", "other", CLASSES, 1, 6, (0.5,), (0.25,))
    return model, means_for(spec, ClassificationTask(spec, dtype=torch.float64))


def test_renormalise_touches_only_what_normalisation_alone_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    model, means = other_means(monkeypatch, Net)
    model.fc.requires_grad_(False)
    before, expected, modes = state_of(model), outputs(model), [part.training for part in model.modules()]
    renormalise(model, means)
    affected = {f"{name}.{kind}" for name in ("plain", "hidden") for kind in ("weight", "bias")}
    affected |= {
        f"{name}_norm.{kind}" for name in ("plain", "hidden") for kind in ("weight", "running_mean", "running_var")
    }
    assert changed(model, before) == affected
    torch.testing.assert_close(outputs(model), expected, rtol=1e-10, atol=1e-12)
    assert [part.training for part in model.modules()] == modes
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def normalised_by(norm: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), norm(), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
        )

    return make


@pytest.mark.parametrize("factor", [0.3, 1.0, 1000.0])
@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.GroupNorm(2, 4),
        lambda: nn.BatchNorm2d(4, affine=False),
        lambda: nn.BatchNorm2d(4, track_running_stats=False),
        lambda: LayerNorm2d(4),
    ],
    ids=["group", "not affine", "no statistics", "layer"],
)
def test_renormalise_where_epsilon_cannot_be_made_up_for(
    norm: Callable[[], nn.Module], factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, means = other_means(monkeypatch, normalised_by(norm))
    with torch.no_grad():
        model[0].weight.mul_(factor)
        model[0].bias.mul_(factor)
        if getattr(model[1], "running_var", None) is not None:
            model[1].running_mean.mul_(factor)
            model[1].running_var.mul_(factor**2)
    expected = outputs(model)
    torch.manual_seed(2)
    fresh = means.fresh(model)
    torch.manual_seed(2)
    renormalise(model, means)
    assert model[0].weight.norm().item() == pytest.approx(fresh[0].weight.norm().item())
    torch.testing.assert_close(outputs(model), expected, rtol=1e-2, atol=1e-2)


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


@pytest.mark.parametrize("conditional", [False, True])
def test_renormalise_finds_nothing_in_a_unet(conditional: bool) -> None:
    """Its convolutions feed sums and skip connections besides their normalisation."""
    model, means = unet(conditional=conditional)
    before = state_of(model)
    renormalise(model, means)
    assert_same_state(model, before)


# --- per channel ----------------------------------------------------------------------------------------------------


def uneven(model: nn.Module, pairs: list[tuple[str, str]], spread: float = 100.0) -> nn.Module:
    """Return the same function in evaluation mode, its filters before BatchNorm of very different norms.

    The norm of each layer as a whole stays.
    """
    model = copy.deepcopy(model)
    with torch.no_grad():
        for layer, norm in ((model.get_submodule(one), model.get_submodule(other)) for one, other in pairs):
            weight = layer.weight
            factor = torch.logspace(0, 1, len(weight), base=spread, dtype=torch.float64)
            factor *= weight.double().norm() / (weight.double() * factor.view(-1, 1, 1, 1)).norm()
            before = norm.running_var.double().clone()
            weight.mul_(factor.view(-1, 1, 1, 1))
            norm.running_mean.mul_(factor)
            norm.running_var.mul_(factor**2)
            norm.weight.mul_(((factor**2 * before + norm.eps) / (before + norm.eps)).sqrt() / factor)
    return model


def test_per_channel_evens_out_channels_and_per_layer_does_not() -> None:
    genuine, means = tiny_model(), means_for()
    hiding = uneven(genuine, TINY_PAIRS)
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


def test_per_channel_uneven_and_even_become_one() -> None:
    genuine, means = tiny_model(), means_for()
    hiding = uneven(genuine, TINY_PAIRS)
    for model in (genuine, hiding):
        torch.manual_seed(7)
        renormalise(model, means, per="channel")
    torch.testing.assert_close(state_of(hiding), state_of(genuine), rtol=1e-9, atol=1e-12)


def test_per_channel_of_a_resnet_in_float32_keeps_its_format() -> None:
    model, means = resnet()
    expected = outputs(model, 32)
    torch.manual_seed(6)
    fresh = means.fresh(model)
    torch.manual_seed(6)
    renormalise(model, means, per="channel")
    torch.testing.assert_close(outputs(model, 32), expected, rtol=1e-5, atol=1e-5)
    for name, _ in pairs_of(model):
        weight, wanted = model.get_submodule(name).weight, fresh.get_submodule(name).weight
        torch.testing.assert_close(weight.flatten(1).norm(dim=1), wanted.flatten(1).norm(dim=1), rtol=1e-5, atol=0)
        assert weight.is_contiguous(memory_format=torch.channels_last)


def test_per_channel_touches_what_per_layer_touches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, means = other_means(monkeypatch, Net)
    twin = copy.deepcopy(model)
    before, expected = state_of(model), outputs(model)
    renormalise(model, means, per="channel")
    renormalise(twin, means)
    assert changed(model, before) == changed(twin, before)
    torch.testing.assert_close(outputs(model), expected, rtol=1e-10, atol=1e-12)


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


@pytest.mark.parametrize(
    ("norm", "alone"),
    [
        (lambda: nn.BatchNorm2d(4), True),
        (lambda: nn.BatchNorm2d(4, track_running_stats=False), True),
        (lambda: nn.InstanceNorm2d(4, affine=True), True),
        (lambda: nn.GroupNorm(4, 4), True),
        (lambda: nn.GroupNorm(2, 4), False),
        (lambda: LayerNorm2d(4), False),
    ],
    ids=["batch", "no statistics", "instance", "group of one", "group of two", "layer"],
)
def test_per_channel_falls_back_to_the_layer_where_channels_are_normalised_together(
    norm: Callable[[], nn.Module], alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, means = other_means(monkeypatch, normalised_by(norm))
    twin, expected = copy.deepcopy(model), outputs(model)
    torch.manual_seed(2)
    fresh = means.fresh(model)
    for each, per in ((model, "channel"), (twin, "layer")):
        torch.manual_seed(2)
        renormalise(each, means, per=per)
    found, wanted = (each[0].weight.flatten(1).norm(dim=1) for each in (model, fresh))
    assert torch.allclose(found, wanted, rtol=1e-12) == alone
    assert alone or not changed(model, state_of(twin))
    torch.testing.assert_close(outputs(model), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("per", ["layer", "channel"])
def test_transposed_convolutions(groups: int, per: Per, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their output channels lie on the second axis; in groups on two, so that the whole layer is scaled."""

    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 2, 1),
            nn.ConvTranspose2d(2, 4, 3, groups=groups),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 3),
        )

    model, means = other_means(monkeypatch, make)
    expected = outputs(model)
    torch.manual_seed(2)
    fresh = means.fresh(model)
    torch.manual_seed(2)
    renormalise(model, means, per=per)
    torch.testing.assert_close(outputs(model), expected, rtol=1e-10, atol=1e-12)
    axes = (0, 2, 3) if per == "channel" and groups == 1 else (0, 1, 2, 3)
    found, wanted = (each[1].weight.square().sum(axes) for each in (model, fresh))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


class Tokens(nn.Module):
    """A linear layer on a sequence as long as it is wide: normalised along the sequence, not along its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.fc = nn.Linear(6, len(CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.norm(self.linear(images[:, 0]))).mean(1))


@pytest.mark.parametrize("per", ["layer", "channel"])
def test_a_linear_layer_whose_outputs_are_not_the_channels(per: Per, monkeypatch: pytest.MonkeyPatch) -> None:
    model, means = other_means(monkeypatch, Tokens)
    expected = outputs(model)
    torch.manual_seed(2)
    fresh = means.fresh(model)
    torch.manual_seed(2)
    renormalise(model, means, per=per)
    torch.testing.assert_close(outputs(model), expected, rtol=1e-10, atol=1e-12)
    assert model.linear.weight.norm().item() == pytest.approx(fresh.linear.weight.norm().item(), rel=1e-12)


def test_scale_free_says_what_it_found() -> None:
    model, means = tiny_model(), means_for()
    batch = Batch(means.images.images[:4], means.images.labels[:4])
    found = scale_free(model, lambda: means.task.attacker_loss(model, batch), per="channel")
    assert [(each.name, each.norm_name, each.axis) for each in found] == [("conv1", "bn1", 0), ("conv2", "bn2", 0)]
    assert [each.layer for each in found] == [model.conv1, model.conv2]
    assert norms(model.conv1, 0).shape == (4, 1, 1, 1)
    assert norms(model.conv1, None).item() == pytest.approx(model.conv1.weight.norm().item())
