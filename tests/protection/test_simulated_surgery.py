"""Surgery of simulated attackers: the same start as the audit's, and how it follows the released weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sophon.attacker import Operation, operations_from
from sophon.errors import UserError
from sophon.protection.simulated_surgery import check_simulated, start
from sophon.surgery import OPERATIONS, Means, operate
from tests.surgery.surgical import means_for, resnet
from tests.tiny import assert_same_state, slow, state_of, tiny_domain, tiny_model

ORIGINAL = tiny_domain("original", ("train",))
SCALE_FREE = ("conv1.weight", "conv2.weight")


def operations(*entries: Any) -> tuple[Operation, ...]:
    return operations_from("surgery", [{"operation": each} if isinstance(each, str) else each for each in entries])


def means_at_hand() -> Means:
    return means_for(original=ORIGINAL)


def started(model: nn.Module, chosen: tuple[Operation, ...]) -> tuple[nn.Module, dict[str, Any]]:
    """Operate on a copy; all that is drawn is the same every time."""
    attacker = copy.deepcopy(model)
    torch.manual_seed(5)
    return attacker, start(attacker, chosen, means_at_hand())


def tangent(weight: Tensor, index: int, per: str | None) -> Tensor:
    """Return the direction of one element, without its part along what a norm is taken of."""
    direction = torch.zeros_like(weight).flatten()
    direction[index] = 1.0
    direction = direction.view_as(weight)
    if per is None:
        return direction
    axes = tuple(range(weight.dim()))[1 if per == "channel" else 0 :]
    along = (direction * weight).sum(axes, keepdim=True) / weight.square().sum(axes, keepdim=True)
    return direction - along * weight


def assert_follows(chosen: tuple[Operation, ...], *, per: str | None = None, rtol: float = 1e-6) -> dict[str, Any]:
    """Hold the factors against central differences of the start, in some elements of every parameter."""
    model = tiny_model()
    attacker, factors = started(model, chosen)
    assert set(factors) <= {name for name, _ in model.named_parameters()}
    step = 1e-6
    for name, parameter in model.named_parameters():
        factor = torch.as_tensor(factors.get(name, 1.0), dtype=torch.float64)
        assert factor.expand(parameter.shape).shape == attacker.get_parameter(name).shape
        for index in range(0, parameter.numel(), max(1, parameter.numel() // 3)):
            direction = tangent(parameter.detach(), index, per if name in SCALE_FREE else None)
            ends = []
            for sign in (1, -1):
                moved = copy.deepcopy(model)
                with torch.no_grad():
                    moved.get_parameter(name).add_(direction, alpha=sign * step)
                ends.append(started(moved, chosen)[0].get_parameter(name).detach())
            slope = (ends[0] - ends[1]) / (2 * step)
            expected = factor * direction
            torch.testing.assert_close(slope, expected, rtol=rtol, atol=1e-8 + rtol * float(expected.abs().max()))
    return factors


# --- factors ---------------------------------------------------------------------------------------------------------

RENORMALISE = {"operation": "renormalise", "per": "channel"}
PRUNE = {"operation": "prune", "fraction": 0.5}
FIRST = {"operation": "reinitialise", "end": "first"}
EVERY = {name for name, _ in tiny_model().named_parameters()}
AFFINE = {f"bn{layer}.{kind}" for layer in (1, 2) for kind in ("weight", "bias")}
# operations, whose factors are not one, along what no norm is taken of, and how exactly differences tell them
FOLLOWS: dict[str, tuple[tuple[Any, ...], set[str], str | None, float]] = {
    "restate": (({"operation": "restate", "batches": 1},), set(), None, 1e-6),
    # of noise only what is added counts, not that it grows with the tensor's spread
    "noise": (({"operation": "noise", "scale": 1e-4},), set(), None, 1e-3),
    # to first order: what its gradients do as the weights move is of the order of its rate
    "heal": (
        ({"operation": "heal", "steps": 1, "lr": 1e-5, "optimizer": "sgd", "batch_size": 8},), set(), None, 1e-3,
    ),
    "prune": ((PRUNE,), {*SCALE_FREE, "fc.weight"}, None, 1e-6),
    "shrink_perturb": (({"operation": "shrink_perturb", "keep": 0.3},), EVERY, None, 1e-6),
    "shrink_perturb, as it comes": (("shrink_perturb",), EVERY, None, 1e-6),
    # a gradient of a scale-free layer has no part along its norm
    "renormalise": (("renormalise",), {*SCALE_FREE, "bn1.weight", "bn2.weight"}, "layer", 1e-5),
    "renormalise channels": ((RENORMALISE,), {*SCALE_FREE, "bn1.weight", "bn2.weight"}, "channel", 1e-5),
    "reset_affine": (("reset_affine",), AFFINE, None, 1e-6),
    "reinitialise": (("reinitialise",), {"conv2.weight", "bn2.weight", "bn2.bias"}, None, 1e-6),
    "reinitialise the first": ((FIRST,), {"conv1.weight", "bn1.weight", "bn1.bias"}, None, 1e-6),
    "composition": ((RENORMALISE, {"operation": "shrink_perturb", "keep": 0.4}, PRUNE, FIRST), EVERY, "channel", 1e-5),
}  # fmt: skip


# what is slow is of the kind of another, or part of the composition
SLOW = {"heal", "noise", "shrink_perturb, as it comes", "renormalise channels", "reinitialise the first"}


@pytest.mark.parametrize("name", slow(FOLLOWS, SLOW))
def test_the_start_follows_the_released_weights_by_its_factors(name: str) -> None:
    entries, moved, per, rtol = FOLLOWS[name]
    assert set(assert_follows(operations(*entries), per=per, rtol=rtol)) == moved


def test_what_is_pruned_has_the_factor_zero() -> None:
    attacker, factors = started(tiny_model(), operations(PRUNE))
    for name, factor in factors.items():
        assert torch.equal(factor, (attacker.get_parameter(name) != 0).double())
        assert int((factor == 0).sum()) == round(0.5 * factor.numel())


def test_a_student_keeps_nothing_of_the_weights() -> None:
    """It follows its teacher, but through gradients, which are constants."""
    _, factors = started(tiny_model(), operations({"operation": "distil", "steps": 1, "lr": 1e-5}))
    assert factors == dict.fromkeys(EVERY, 0.0)


def test_factors_have_the_parameters_type_and_format() -> None:
    model, means = resnet()
    factors = start(model, operations(RENORMALISE, "prune"), means)
    for name, factor in factors.items():
        parameter = model.get_parameter(name)
        assert factor.dtype == parameter.dtype
        assert (parameter * factor).shape == parameter.shape
    assert model.conv1[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert factors["layer1.0.conv1.weight"].unique().numel() > 2


# --- the start -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - {"interpolate"}))  # needs a relative, so is no simulated one
def test_the_start_is_the_audits_and_in_place(name: str) -> None:
    """Every operation that there is, or nobody has said how its start follows the released weights."""
    steps = {"steps": 2} if name in ("heal", "distil") else {}
    chosen = operations({"operation": name, **steps}, {"operation": "noise", "scale": 0.01})
    check_simulated(chosen, "sampler.surgeries[0]")
    attacker, twin = tiny_model(), tiny_model()
    owned = dict(attacker.named_parameters())
    torch.manual_seed(5)
    start(attacker, chosen, means_at_hand())
    torch.manual_seed(5)
    assert_same_state(attacker, state_of(operate(twin, chosen, means_at_hand())))
    assert all(parameter is owned[each] for each, parameter in attacker.named_parameters())


# --- the check -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        (
            "tests.surgery.test_arguments.halve",
            r"\[1\].operation: 'tests.surgery.test_arguments.halve' is not simulated; allowed: reinitialise, noise, ",
        ),
        ("nois", r"\[1\].operation: 'nois' is not simulated; allowed: "),
        ({"operation": "noise", "scale": -1}, r"\[1\].scale: -1 is not allowed"),
        (
            {"operation": "renormalise", "per": "filter"},
            r"\[1\].per: filter is not allowed; it must be layer or channel",
        ),
        ({"operation": "noise", "size": 1}, r"\[1\].size: 'noise' has no such argument"),
        (
            {"operation": "heal", "domain": "benign"},
            r"\[1\].domain: 'benign' is not simulated, since it leaves another head; allowed: original",
        ),
    ],
)
def test_what_is_not_simulated_is_refused(entry: Any, line: str) -> None:
    with pytest.raises(UserError, match=rf"^sampler.surgeries\[2\]{line}") as caught:
        check_simulated(operations("restate", entry), "sampler.surgeries[2]")
    assert "\n" not in str(caught.value)


def test_too_many_blocks() -> None:
    with pytest.raises(UserError, match="reinitialise has 9 blocks to replace; the model has only 2"):
        start(tiny_model(), operations({"operation": "reinitialise", "blocks": 9}), means_at_hand())
