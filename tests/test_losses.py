"""Every loss against numbers worked out by hand, its stated gradient, and inputs at the edge of floating point."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sophon import losses
from sophon.losses import DENOISING_SUPPRESSION_LOSSES, SUPPRESSION_LOSSES, distillation

# softmax of the first row is (1/2, 1/4, 1/4), of the second (1/8, 3/8, 1/2)
LOGITS = torch.tensor([[math.log(2), 0.0, 0.0], [0.0, math.log(3), math.log(4)]], dtype=torch.float64)
LABELS = torch.tensor([0, 1])
CLASSES = 3
BY_HAND = {
    "ice": (-math.log(1 / 2) - math.log(5 / 8)) / 2,
    "klu": -(math.log(3 / 2) + 2 * math.log(3 / 4) + math.log(3 / 8) + math.log(9 / 8) + math.log(3 / 2)) / 6,
    "negative_ce": (math.log(1 / 2) + math.log(3 / 8)) / 2,
    "mlac": (math.log(1 / 2) + math.log(3 / 8)) / 2,
    "negative_entropy": (
        (math.log(1 / 2) / 2 + math.log(1 / 4) / 2)
        + (math.log(1 / 8) / 8 + 3 * math.log(3 / 8) / 8 + math.log(1 / 2) / 2)
    )
    / 2,
    # softmax(-z) is (1/5, 2/5, 2/5) and (12, 4, 3) / 19
    "ce_on_negated_logits": (-math.log(1 / 5) - math.log(4 / 19)) / 2,
}

numbers = st.floats(-30, 30)
rows = st.integers(2, 5).flatmap(lambda count: st.lists(st.lists(numbers, min_size=count, max_size=count), min_size=1))


def gradient(name: str, logits: Tensor, labels: Tensor) -> Tensor:
    leaf = logits.detach().clone().requires_grad_()
    return torch.autograd.grad(SUPPRESSION_LOSSES[name](leaf, labels), leaf)[0]


@pytest.mark.parametrize("name", SUPPRESSION_LOSSES)
def test_values_by_hand(name: str) -> None:
    assert set(BY_HAND) == set(SUPPRESSION_LOSSES)
    loss = SUPPRESSION_LOSSES[name](LOGITS, LABELS)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(BY_HAND[name], rel=1e-12)


def test_stated_gradients() -> None:
    p = LOGITS.softmax(1)
    batch = torch.arange(len(LABELS))
    chosen = p[batch, LABELS]
    onehot = torch.nn.functional.one_hot(LABELS, CLASSES).double()

    ice = gradient("ice", LOGITS, LABELS)
    torch.testing.assert_close(ice[batch, LABELS], chosen / 2)
    others = p - (1 - onehot) * p / (1 - chosen)[:, None]  # p_j - p_j / (1 - p_y)
    torch.testing.assert_close(ice, others / 2)
    torch.testing.assert_close(gradient("klu", LOGITS, LABELS), (p - 1 / CLASSES) / 2)
    torch.testing.assert_close(gradient("negative_ce", LOGITS, LABELS), (onehot - p) / 2)
    entropy = -(p * p.log()).sum(1, keepdim=True)
    torch.testing.assert_close(gradient("negative_entropy", LOGITS, LABELS), p * (p.log() + entropy) / 2)
    negated = gradient("ce_on_negated_logits", LOGITS, LABELS)
    torch.testing.assert_close(negated, (onehot - (-LOGITS).softmax(1)) / 2)


EXTREMES = {
    "confident and right": [[1e4, -1e4, -1e4]],
    "confident and wrong": [[-1e4, 1e4, -1e4]],
    "all large": [[1e4, 1e4, 1e4]],
    "all small": [[-1e4, -1e4, -1e4]],
    "all equal": [[0.0, 0.0, 0.0]],
    "one-hot": [[1.0, 0.0, 0.0]],
    "two far below": [[0.0, -1e4, -1e4]],
    "a tie": [[1e4, 1e4, -1e4]],
}


@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("name", SUPPRESSION_LOSSES)
def test_extremes_stay_finite(name: str, extreme: str) -> None:
    logits, labels = torch.tensor(EXTREMES[extreme]), torch.tensor([0])
    loss = SUPPRESSION_LOSSES[name](logits, labels)
    assert loss.isfinite()
    assert loss.item() <= 2e4 + 1
    found = gradient(name, logits, labels)
    assert found.isfinite().all()
    # Logits are equivalent up to a shift, so a gradient never moves them all one way; 1e4 + log 2 in float32 has
    # three digits behind the point.
    assert found.sum().item() == pytest.approx(0, abs=2e-3)


@pytest.mark.parametrize("name", SUPPRESSION_LOSSES)
@given(values=rows, shift=st.floats(-1e3, 1e3), label=st.integers(0, 1))
def test_constant_shift_changes_nothing(name: str, values: list[list[float]], shift: float, label: int) -> None:
    logits = torch.tensor(values, dtype=torch.float64)
    labels = torch.full((len(values),), label)
    moved = SUPPRESSION_LOSSES[name](logits + shift, labels)
    torch.testing.assert_close(moved, SUPPRESSION_LOSSES[name](logits, labels), rtol=1e-9, atol=1e-9)


def test_mlac_gives_nothing_for_worse_than_a_guess() -> None:
    """Image by image: the one that is already worse has no gradient, the other the whole of -CE's."""
    logits = torch.tensor([[0.0, 5.0, 0.0], [2.0, 0.0, 0.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0])
    kept = torch.nn.functional.cross_entropy(logits[1:], labels[1:])
    loss = losses.clamped_negative_cross_entropy(logits, labels)
    assert loss.item() == pytest.approx(-(math.log(3) + kept.item()) / 2)
    found = gradient("mlac", logits, labels)
    assert found[0].count_nonzero() == 0
    torch.testing.assert_close(found[1], gradient("negative_ce", logits, labels)[1])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_distillation_by_hand(temperature: float) -> None:
    teacher = LOGITS.flip(1)
    assert distillation(LOGITS, LOGITS, temperature).item() == pytest.approx(0, abs=1e-15)
    p, q = (teacher / temperature).softmax(1), (LOGITS / temperature).softmax(1)
    expected = temperature**2 * sum(
        p[i, j].item() * math.log(p[i, j].item() / q[i, j].item()) for i in range(2) for j in range(CLASSES)
    )
    assert distillation(LOGITS, teacher, temperature).item() == pytest.approx(expected / 2, rel=1e-12)


def test_distillation_takes_the_teacher_as_constant() -> None:
    student, teacher = LOGITS.clone().requires_grad_(), LOGITS.flip(1).requires_grad_()
    distillation(student, teacher, 2.0).backward()
    assert teacher.grad is None
    # T^2 KL has the gradient T (q - p) / B
    expected = 2.0 * ((LOGITS / 2).softmax(1) - (LOGITS.flip(1) / 2).softmax(1)) / 2
    torch.testing.assert_close(student.grad, expected)


# --- denoising ----------------------------------------------------------------------------------------------------

# two images of one channel and 1 x 2 pixels
PREDICTED = torch.tensor([[[[1.0, -2.0]]], [[[0.5, 3.0]]]], dtype=torch.float64)
NOISE = torch.tensor([[[[0.0, 1.0]]], [[[0.5, -1.0]]]], dtype=torch.float64)
DENOISING_BY_HAND = {
    "dos": (1 + 4 + 0.25 + 9) / 4,
    "negative_mse": -(1 + 9 + 0 + 16) / 4,
    "shifted_mse": (0 + 16 + 1 + 9) / 4,
}
DENOISING_GRADIENTS = {
    "dos": PREDICTED / 2,  # 2 e / N
    "negative_mse": -(PREDICTED - NOISE) / 2,
    "shifted_mse": (PREDICTED - NOISE - 1) / 2,
}


def denoising_gradient(name: str, predicted: Tensor, noise: Tensor) -> Tensor:
    leaf = predicted.detach().clone().requires_grad_()
    return torch.autograd.grad(DENOISING_SUPPRESSION_LOSSES[name](leaf, noise), leaf)[0]


@pytest.mark.parametrize("name", DENOISING_SUPPRESSION_LOSSES)
def test_denoising_values_and_gradients_by_hand(name: str) -> None:
    assert set(DENOISING_BY_HAND) == set(DENOISING_GRADIENTS) == set(DENOISING_SUPPRESSION_LOSSES)
    loss = DENOISING_SUPPRESSION_LOSSES[name](PREDICTED, NOISE)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(DENOISING_BY_HAND[name], rel=1e-12)
    torch.testing.assert_close(denoising_gradient(name, PREDICTED, NOISE), DENOISING_GRADIENTS[name])


@pytest.mark.parametrize("name", DENOISING_SUPPRESSION_LOSSES)
@pytest.mark.parametrize("predicted", [0.0, 1e-30, 1e18, -1e18])
def test_denoising_extremes_stay_finite(name: str, predicted: float) -> None:
    """In float32, squares included, up to 1e18."""
    guess, noise = torch.full((2, 3, 4, 4), predicted), torch.zeros(2, 3, 4, 4)
    assert DENOISING_SUPPRESSION_LOSSES[name](guess, noise).isfinite()
    assert denoising_gradient(name, guess, noise).isfinite().all()


@pytest.mark.parametrize(("name", "minimum"), [("dos", torch.zeros_like(NOISE)), ("shifted_mse", NOISE + 1)])
def test_where_the_gradient_dies_out(name: str, minimum: Tensor) -> None:
    """At a value of 0, from where neither loss asks for anything worse."""
    assert DENOISING_SUPPRESSION_LOSSES[name](minimum, NOISE) == 0
    assert denoising_gradient(name, minimum, NOISE).count_nonzero() == 0


# --- features -----------------------------------------------------------------------------------------------------

# X^T X is diagonal: the second moment's eigenvalues are as 4, 1 and 0.25 over their sum
FEATURES = torch.diag(torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64))
MOMENT = torch.tensor([4.0, 1.0, 0.25], dtype=torch.float64) / 5.25
RESTING = {"ill": losses.ill_conditioning, "well": losses.well_conditioning}


def by_hand(spectrum: Tensor) -> dict[str, float]:
    """The paper's two formulas of eigenvalues that sum to 1; ours divides R_ill by their number."""
    k = len(spectrum)
    ill = 1 / (spectrum.square().sum() / (2 * k) - spectrum.min() ** 2 / 2)
    well = spectrum.max() ** 2 / 2 - spectrum.square().sum() / (2 * k)
    return {"ill": ill.item() / k, "well": well.item()}


@pytest.mark.parametrize("kind", RESTING)
def test_conditioning_by_hand(kind: str) -> None:
    assert RESTING[kind](FEATURES).item() == pytest.approx(by_hand(MOMENT)[kind], rel=1e-12)


@pytest.mark.parametrize("kind", RESTING)
@pytest.mark.parametrize("shape", [(12, 4), (4, 12), (5, 5)])
def test_conditioning_of_any_features(kind: str, shape: tuple[int, int]) -> None:
    """More images than features or fewer; whatever their scale and their basis; and its gradient is right."""
    torch.manual_seed(2)
    features = torch.randn(shape, dtype=torch.float64)
    values = torch.linalg.svdvals(features).square()
    found = RESTING[kind](features)
    assert found.item() == pytest.approx(by_hand(values / values.sum())[kind], rel=1e-9)
    turned = 100 * features @ torch.linalg.qr(torch.randn(shape[1], shape[1], dtype=torch.float64))[0]
    torch.testing.assert_close(RESTING[kind](turned), found)
    assert torch.autograd.gradcheck(RESTING[kind], (features.requires_grad_(),))


def test_conditioning_at_its_ends() -> None:
    """Rank one is as ill-conditioned as it gets, a multiple of the identity as well; gradients stay finite at both."""
    line, round_ = torch.ones(6, 4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    assert losses.ill_conditioning(line).item() == pytest.approx(2)
    assert losses.well_conditioning(line).item() == pytest.approx(1 / 2 - 1 / 8)
    assert losses.ill_conditioning(round_).item() == pytest.approx(4e6 * 4)
    assert losses.well_conditioning(round_).item() == pytest.approx(0, abs=1e-12)
    for features in (line, round_, torch.zeros(6, 4), torch.ones(1, 4)):
        for loss in RESTING.values():
            leaf = features.clone().requires_grad_()
            assert torch.autograd.grad(loss(leaf), leaf)[0].isfinite().all()
