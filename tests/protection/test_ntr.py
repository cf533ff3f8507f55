"""NTR against a loop written out by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import nn

from sophon.config import MethodConfig
from sophon.domains import batches
from sophon.errors import UserError
from sophon.losses import distillation, well_conditioning
from sophon.protection.descent import Descent, Term
from sophon.protection.inner_loop import Objective
from sophon.protection.ntr import NTR
from sophon.protection.objectives.condition import Condition
from sophon.protection.optimizer_state import defenders_adam, set_gradient
from sophon.seeds import derive_seed
from sophon.tasks import ClassificationTask, Task
from tests.protection.staged import ORIGINAL, context, training
from tests.tiny import (
    assert_same_state,
    state_of,
    tiny_denoising,
    tiny_images,
    tiny_model,
    tiny_spec,
    tiny_task,
    tiny_unet,
)

IMAGES = tiny_images(3)
METHOD = MethodConfig(name="test", ntr_lr=0.01, ntr_batch_size=10, ntr_augmentation="crop")


def make_ntr(
    model: nn.Module, reference: nn.Module, task: Task, seed: int, objectives: Sequence[Objective] = ()
) -> NTR:
    found = context(model, task, METHOD, reference=reference, original=training(IMAGES), seed=seed)
    return NTR(found, objectives)


def distilling(weight: float) -> ClassificationTask:
    return ClassificationTask(tiny_spec(), distillation=weight, temperature=2.0, dtype=torch.float64)


@pytest.mark.parametrize(("weight", "factor", "anneal"), [(0.0, 1.0, False), (0.8, 1.0, True), (0.8, 0.25, False)])
def test_equals_a_loop_written_out(weight: float, factor: float, anneal: bool) -> None:
    reference = tiny_model(1)
    expected, total = copy.deepcopy(reference).train(), 0.0
    with torch.no_grad():
        expected.fc.weight.add_(0.3)  # so that there is something to distil
    model = copy.deepcopy(expected)
    adam = torch.optim.Adam(expected.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(derive_seed(5, "ntr", 2, "repair"))
    for step, (images, labels, _) in enumerate(islice(batches(IMAGES, 10, generator, "crop"), 6)):
        adam.param_groups[0]["lr"] = 0.01 * factor * (0.5 * (1 + math.cos(math.pi * step / 6)) if anneal else 1)
        inputs = (images.double() / 255 - 0.5) / 0.25
        logits = expected(inputs)
        loss = nn.functional.cross_entropy(logits, labels)
        loss = loss + weight * distillation(logits, reference.eval()(inputs), 2.0)
        adam.zero_grad()
        loss.backward()
        adam.step()
        total += loss.item()

    shown: list[str] = []
    ntr = make_ntr(model, reference, distilling(weight), 5)
    ntr.context = replace(ntr.context, show=shown.append)
    assert ntr.run(6, 2, "repair", factor=factor, anneal=anneal) == pytest.approx(total / 6, rel=1e-12)
    assert shown == [f"repairing: NTR step {step} of 6" for step in range(1, 7)]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-12, atol=1e-14)


def test_each_group_of_parameters_keeps_its_own_rate() -> None:
    at = context(tiny_model(1))
    first, *others = at.model.parameters()
    adam = torch.optim.Adam([{"params": [first], "lr": 1e-4}, {"params": others}], lr=1e-3)
    term = Term(ORIGINAL["train"], 4, "method.ntr_batch_size", at.task.original_loss)
    Descent(at, "mine", [term], adam).descend(2, lambda step: 0.5)
    assert [group["lr"] for group in adam.param_groups] == [0.5e-4, 0.5e-3]


@pytest.mark.parametrize("weight", [0.0, 0.8])
def test_gradient_is_autograds_on_the_batch_of_its_key(weight: float) -> None:
    """Of the loss that `run` would step by first; nothing moves but BatchNorm's statistics, by that one batch."""
    reference, model = tiny_model(1), tiny_model(2)
    reference_before, expected = state_of(reference), copy.deepcopy(model).train()
    generator = torch.Generator().manual_seed(derive_seed(5, "ntr", 2, 1, "anchor"))
    images, labels, _ = next(batches(IMAGES, 10, generator, "crop"))
    inputs = (images.double() / 255 - 0.5) / 0.25
    logits = expected(inputs)
    loss = nn.functional.cross_entropy(logits, labels)
    loss = loss + weight * distillation(logits, reference.eval()(inputs), 2.0)
    loss.backward()

    ntr = make_ntr(model, reference, distilling(weight), 5)
    found = ntr.gradient(2, 1, "anchor")
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-10, atol=1e-13)
        assert not found[name].requires_grad
    assert max(float(gradient.abs().max()) for gradient in found.values()) > 1e-2
    assert_same_state(model, state_of(expected))
    assert_same_state(reference, reference_before)
    assert all(parameter.grad is None for parameter in (*model.parameters(), *reference.parameters()))
    assert not ntr.optimizer.state


def test_loss_that_is_not_finite() -> None:
    model = tiny_model(1)
    with torch.no_grad():
        model.fc.bias[0] = torch.inf
    before = state_of(model)
    ntr = make_ntr(model, tiny_model(1), tiny_task(), 0)
    for ask in (lambda: ntr.run(3, 0), lambda: ntr.gradient(0)):
        with pytest.raises(UserError, match=r"method.ntr_lr: .* nan at ntr_lr=0.01, fts_lr=.*lower") as caught:
            ask()
        assert "\n" not in str(caught.value)
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name])


def test_condition_keeps_the_originals_features_well_conditioned() -> None:
    """One step's gradient is that of the sum; the batch is recorded in statistics once."""
    model = tiny_model(1).train()
    expected, recorded = copy.deepcopy(model), copy.deepcopy(model)
    found = make_ntr(model, tiny_model(1), tiny_task(), 5, [Condition(0.7)]).gradient(3)
    make_ntr(recorded, tiny_model(1), tiny_task(), 5).gradient(3)
    for name, value in model.named_buffers():
        assert torch.equal(value, recorded.get_buffer(name))

    generator = torch.Generator().manual_seed(derive_seed(5, "ntr", 3))
    images, labels, _ = next(batches(IMAGES, 10, generator, "crop"))
    seen: list[torch.Tensor] = []
    expected.fc.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    loss = nn.functional.cross_entropy(expected((images.double() / 255 - 0.5) / 0.25), labels)
    loss = loss + 0.7 * well_conditioning(seen[0])
    gradients = torch.autograd.grad(loss, list(expected.parameters()))
    for name, gradient in zip(dict(expected.named_parameters()), gradients, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-13)


def test_condition_needs_features() -> None:
    ntr = make_ntr(tiny_unet(), tiny_unet(), tiny_denoising(), 5, [Condition(0.7)])
    with pytest.raises(UserError, match=r"^method\.objectives\.condition: "):
        ntr.run(1, 0)


def test_a_gradient_of_another_layout_steps_the_weights_that_it_is_of() -> None:
    """The fused kernel would pair them by their places in memory."""
    values, gradient = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    plain = nn.Parameter(values.clone())
    fused = nn.Parameter(values.clone().contiguous(memory_format=torch.channels_last))
    plain.grad = gradient
    set_gradient(fused, gradient)
    torch.optim.Adam([plain], lr=0.1).step()
    defenders_adam([fused], 0.1).step()
    torch.testing.assert_close(fused.detach(), plain.detach())


def test_zero_steps_do_nothing() -> None:
    model = tiny_model(1)
    before = state_of(model)
    assert make_ntr(model, tiny_model(1), tiny_task(), 0).run(0, 0) == 0
    assert_same_state(model, before)
