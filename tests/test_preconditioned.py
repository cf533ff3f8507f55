"""K-FAC and Muon: what sets their steps apart from those of other optimizers."""

from __future__ import annotations

import copy

import pytest
import torch

from sophon.kfac import KFAC
from sophon.muon import Muon


@pytest.mark.parametrize("tokens", [1, 3])
def test_kfac_of_a_layer_is_its_gradient_between_inverse_moments(tokens: int) -> None:
    """Written out for one step, also where a layer reads several tokens of an image."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2, bias=False, dtype=torch.float64)
    before, seen = layer.weight.detach().clone(), torch.randn(8, tokens, 3, dtype=torch.float64)
    stepper = KFAC(layer.parameters(), layer, 0.5, damping=1e-9, trust=1e9)
    answer = layer(seen)
    answer.retain_grad()
    answer.square().mean().backward()
    slopes, reads = answer.grad.flatten(0, 1) * len(seen), seen.flatten(0, 1)
    stepper.step()
    writes = slopes.T @ slopes / len(slopes)
    expected = writes.inverse() @ layer.weight.grad @ (reads.T @ reads / len(reads)).inverse()
    torch.testing.assert_close(before - layer.weight.detach(), 0.5 * expected, rtol=1e-5, atol=1e-8)


def test_kfac_keeps_within_its_trust_and_takes_layers_that_it_does_not_see_into() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3, groups=2), torch.nn.GroupNorm(2, 4), torch.nn.Flatten(), torch.nn.Linear(16, 2)
    )
    before = [weight.detach().clone() for weight in model.parameters()]
    moved = []
    for trust in (1e-4, 1e-8):
        made = copy.deepcopy(model)
        stepper = KFAC(made.parameters(), made, 0.1, trust=trust)
        made(torch.randn(5, 2, 4, 4)).square().sum().backward()
        stepper.step()
        moved.append([float((now.detach() - was).norm()) for now, was in zip(made.parameters(), before, strict=True)])
    assert all(wide > narrow > 0 for wide, narrow in zip(*moved, strict=True))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_steps_the_models_own_weights_as_torch_does(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.Flatten(), torch.nn.Linear(12, 2))
    network = network.to(memory_format=layout)
    before, images = copy.deepcopy(network), torch.randn(5, 2, 4, 4)
    stepper = Muon(network.parameters(), 0.05, adam_lr=0.005)
    network(images).square().sum().backward()
    stepper.step()
    matrix = torch.nn.Parameter(before[0].weight.detach().clone().reshape(3, 18))
    matrix.grad = network[0].weight.grad.reshape(3, 18)
    torch.optim.Muon([matrix], lr=0.05, weight_decay=0.0).step()
    torch.testing.assert_close(network[0].weight.detach().reshape(3, 18), matrix.detach())
    assert not torch.equal(network[0].weight, before[0].weight)
    # Adam's first step is its rate
    torch.testing.assert_close((network[2].bias - before[2].bias).abs(), torch.full((2,), 0.005), rtol=1e-3, atol=0)
