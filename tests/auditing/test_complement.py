"""The attack loop that leaves the directions of the first gradients alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sophon.attacker import FineTuneStrategy
from sophon.auditing.complement import DIRECTIONS, complement
from sophon.domains import batches
from tests.auditing.staging import RESTRICTED
from tests.tiny import state_of, tiny_model, tiny_task

PATH = "sophon.auditing.complement.complement"


def test_what_moves_is_orthogonal_to_the_first_gradients_but_for_the_head() -> None:
    task, model, images = tiny_task(), tiny_model(), RESTRICTED["attack"]
    plan = FineTuneStrategy(optimizer="sgd", lr=0.1, batch_size=8, steps=3, head="kept", loop=PATH)
    before, twin = state_of(model), tiny_model().train()
    steps: list[int] = []
    ended = complement(
        model, plan, task, images, torch.Generator().manual_seed(0), lambda step, loss: steps.append(step)
    )
    assert ended is model
    assert steps == [1, 2, 3]
    stream = batches(images, 8, torch.Generator().manual_seed(0))
    gradients: dict[str, list[Any]] = {name: [] for name, _ in twin.named_parameters()}
    for _ in range(DIRECTIONS):
        found = torch.autograd.grad(task.attacker_loss(twin, next(stream)), list(twin.parameters()))
        for name, gradient in zip(gradients, found, strict=True):
            gradients[name].append(gradient.flatten())
    moved = {name: (part.data - before[name]).flatten() for name, part in model.named_parameters()}
    for name in ("conv1.weight", "conv2.weight"):
        first = torch.stack(gradients[name])
        assert moved[name].norm() > 0
        assert (first @ moved[name]).abs().max() == pytest.approx(0, abs=1e-9)
    assert (torch.stack(gradients["fc.weight"]) @ moved["fc.weight"]).abs().max() > 1e-6
    assert not any(part._backward_hooks for part in model.parameters())
