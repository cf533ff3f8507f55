"""Re-normalisation touches only layers whose output nothing but a normalisation reads, of whatever kind they are."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from sophon.models import adapt
from sophon.surgery.attacker_means import Means
from sophon.surgery.renormalise import Per, renormalise
from sophon.tasks import ClassificationTask
from tests.surgery.surgical import changed, means_for, outputs
from tests.tiny import CLASSES, state_of


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


def other_means(make: Callable[[], nn.Module]) -> tuple[nn.Module, Means]:
    """Return a model in float64 that no library has, its statistics settled, and means that can build it afresh."""
    torch.manual_seed(0)
    model = make().double().train()
    with torch.no_grad():
        for _ in range(4):
            model(torch.randn(8, 1, 6, 6, dtype=torch.float64))
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    spec = adapt(model, classes=CLASSES, channels=1, image_size=6, mean=[0.5], std=[0.25], factory=make).spec
    return model, means_for(spec, ClassificationTask(spec, dtype=torch.float64))


def test_renormalise_touches_only_what_normalisation_alone_reads() -> None:
    model, means = other_means(Net)
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


def normalised_by(norm: Callable[[], nn.Module], *layers: nn.Module) -> Callable[[], nn.Module]:
    """Return what builds a network of ``layers``, by default a convolution, ``norm`` and a head."""

    def make() -> nn.Module:
        first = [copy.deepcopy(layer) for layer in layers] or [nn.Conv2d(1, 4, 3, padding=1)]
        for layer in first:
            layer.reset_parameters()
        return nn.Sequential(*first, norm(), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

    return make


def transposed(groups: int) -> Callable[[], nn.Module]:
    return normalised_by(batch_norm, nn.Conv2d(1, 2, 1), nn.ConvTranspose2d(2, 4, 3, groups=groups))


def batch_norm() -> nn.Module:
    return nn.BatchNorm2d(4)


class Tokens(nn.Module):
    """A linear layer on a sequence as long as it is wide: normalised along the sequence, not along its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.fc = nn.Linear(6, len(CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.norm(self.linear(images[:, 0]))).mean(1))


WHOLE, FIRST_AXIS, SECOND_AXIS = (0, 1, 2, 3), (1, 2, 3), (0, 2, 3)
# a normalisation, and the axes of the weights of a channel that it normalises by itself
NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "batch": (batch_norm, FIRST_AXIS),
    "not affine": (lambda: nn.BatchNorm2d(4, affine=False), FIRST_AXIS),
    "no statistics": (lambda: nn.BatchNorm2d(4, track_running_stats=False), FIRST_AXIS),
    "instance": (lambda: nn.InstanceNorm2d(4, affine=True), FIRST_AXIS),
    "group of one": (lambda: nn.GroupNorm(4, 4), FIRST_AXIS),
    "group of two": (lambda: nn.GroupNorm(2, 4), WHOLE),
    "layer": (lambda: LayerNorm2d(4), WHOLE),
}
# what builds the network; its layer; the axes of a channel; how near the function stays: epsilon counts where weights
# cannot make up for it
CASES: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...], float]] = {
    **{name: (normalised_by(norm), "0", axes, 1e-2) for name, (norm, axes) in NORMS.items()},
    # output channels lie on the second axis; in groups on two, so that the whole layer is scaled
    "transposed": (transposed(1), "1", SECOND_AXIS, 1e-10),
    "transposed, in groups": (transposed(2), "1", WHOLE, 1e-10),
    "outputs that are no channels": (Tokens, "linear", (0, 1), 1e-10),
}


@pytest.mark.parametrize("per", ["layer", "channel"])
@pytest.mark.parametrize("case", CASES)
def test_norms_become_those_of_fresh_weights_and_the_function_stays(case: str, per: Per) -> None:
    """Per channel, where no other channel is normalised with it; else the whole layer."""
    make, name, axes, tolerance = CASES[case]
    model, means = other_means(make)
    expected = outputs(model)
    torch.manual_seed(2)
    fresh = means.fresh(model)
    torch.manual_seed(2)
    renormalise(model, means, per=per)
    torch.testing.assert_close(outputs(model), expected, rtol=tolerance, atol=tolerance)
    found, wanted = (each.get_submodule(name).weight for each in (model, fresh))
    axes = axes if per == "channel" else tuple(range(found.dim()))
    torch.testing.assert_close(found.square().sum(axes), wanted.square().sum(axes), rtol=1e-10, atol=0)


@pytest.mark.parametrize("factor", [0.3, 1000.0])
@pytest.mark.parametrize("name", ["not affine", "no statistics", "group of two", "layer"])
def test_a_scale_that_was_hidden_is_taken_away(name: str, factor: float) -> None:
    model, means = other_means(normalised_by(NORMS[name][0]))
    with torch.no_grad():
        for part in model[0].parameters():
            part.mul_(factor)
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
