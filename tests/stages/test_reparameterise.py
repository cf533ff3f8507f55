"""Ill-conditioned coordinates: the function and the norms stay, readers are blind, and fine-tuning leads nowhere."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sophon.errors import UserError
from sophon.models import build
from sophon.models.channels import channels, interfaces
from sophon.stages import reparameterise as coordinates
from sophon.surgery import Means
from sophon.surgery.centre import centre
from sophon.surgery.equalise import equalise
from sophon.tasks import ClassificationTask
from tests.stages.small_resnet import image_set, settle, small_resnet
from tests.tiny import tiny_model


def trained(model: nn.Module, task: ClassificationTask) -> nn.Module:
    """Return a linear model with blind readers, whose statistics are its own."""
    found = coordinates.linear(model)
    coordinates.BlindReaders(found).project()
    settle(found, task)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "stem", "count"), [("resnet18", "deep", 6), ("resnet18", "", 5), ("resnet50", "deep", 6)]
)
def test_the_function_and_the_norms_stay(architecture: str, stem: str, count: int) -> None:
    model, task = small_resnet(architecture=architecture, stem=stem)
    linear, images = trained(model, task), image_set()
    assert len(interfaces(model)) == count  # a deep stem's beginning, the stem and four blocks
    assert linear.state_dict().keys() == model.state_dict().keys()
    wanted = task.logits(linear, images.images)
    assert not torch.allclose(wanted, task.logits(model, images.images), atol=0.1)
    for gains in ([1e6], [1e7, 1e6, 1e6, 1e7, 1e6, 1e5][-count:]):
        made = coordinates.release(linear, model, task, images, gains, 1.0, seed=0)
        assert torch.allclose(task.logits(made, images.images), wanted, rtol=1e-3, atol=1e-3)
        for each in interfaces(model):
            for name in (each.convolution, *(reader for reader in each.readers if reader != "fc")):
                assert torch.allclose(*(part.get_parameter(f"{name}.weight").norm() for part in (made, model))), name
        # hardly anything but what is shared is left in the features, and readers are blind to it
        features = made.forward_features(task.prepare(images.images)).flatten(2)  # type: ignore[operator]
        spread = (features - features.mean(1, keepdim=True)).std() / features.mean(1).std()
        assert spread < 1e-4
        assert made.get_parameter("fc.weight").sum(1).abs().max() < 1e-12
        assert all(type(part).__module__.startswith(("torch.", "timm.")) for part in made.modules())


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "stem"), [("resnet18", ""), ("resnet50", "deep")])
def test_channels_spread_and_neither_the_function_nor_the_norms_show_it(architecture: str, stem: str) -> None:
    model, task = small_resnet(architecture=architecture, stem=stem)
    linear, images = trained(model, task), image_set()
    even, uneven = (coordinates.release(linear, model, task, images, [1e3], each, seed=0) for each in (1.0, 1e6))
    assert torch.allclose(task.logits(uneven, images.images), task.logits(even, images.images), rtol=1e-4, atol=1e-4)
    for each in channels(model):
        last = f"{each.writers[0]}.weight"
        ratio = (uneven.get_parameter(last) / even.get_parameter(last)).log2()
        assert torch.allclose(ratio, ratio.round(), atol=1e-6)  # a power of two is exact in floating point
        assert (ratio.round().min(), ratio.round().max()) == (0, 20)  # 2 ** 20 is 1e6, nearly
        for name in each.readers[:-1]:
            assert torch.allclose(*(part.get_parameter(f"{name}.weight").norm() for part in (uneven, model))), name
    assert uneven.get_parameter("fc.weight").norm() < even.get_parameter("fc.weight").norm()


@pytest.mark.slow
def test_one_step_of_any_optimizer_breaks_the_function_and_a_higher_gain_more() -> None:
    model, task = small_resnet()
    linear, images = trained(model, task), image_set()

    def moved(gain: float, optimizer: type[torch.optim.Optimizer], lr: float) -> float:
        made = coordinates.release(linear, model, task, images, [gain], 1.0, seed=0)
        before = task.logits(made, images.images).detach()
        stepped = copy.deepcopy(made).train()
        F.cross_entropy(task.logits(stepped, images.images), images.labels).backward()
        optimizer(stepped.parameters(), lr=lr).step()  # type: ignore[call-arg]
        return float((task.logits(stepped.eval(), images.images).detach() - before).norm() / before.norm())

    for optimizer, lr in ((torch.optim.Adam, 1e-4), (torch.optim.SGD, 1e-4)):
        low, high = moved(1.0, optimizer, lr), moved(1e3, optimizer, lr)
        assert high > 10 * low


@pytest.mark.slow
def test_equalising_and_centring_take_it_out_again_and_leave_ordinary_models_alone() -> None:
    model, task = small_resnet()
    linear, images = trained(model, task), image_set()
    wanted = task.logits(linear, images.images)
    made = coordinates.release(linear, model, task, images, [1e3], 1e4, seed=0)
    means = Means(task, task.spec, ("a", "b", "c"), images, torch.Generator().manual_seed(0))
    centred = centre(equalise(made, means), means)
    assert means.flops > 0
    features = centred.forward_features(task.prepare(images.images)).flatten(2)  # type: ignore[operator]
    assert (features - features.mean(1, keepdim=True)).std() > 0.1 * features.mean(1).std()
    for each in interfaces(centred):
        centred.set_submodule(each.act, nn.Identity())  # what held them open is gone
    assert torch.allclose(task.logits(centred, images.images), wanted, rtol=1e-3, atol=1e-3)
    before = copy.deepcopy(model.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in centre(model, means).state_dict().items())


def test_other_models_and_other_numbers_of_gains_are_refused() -> None:
    with pytest.raises(UserError, match=r"method=coordinates.: knows timm's ResNets"):
        coordinates.known(tiny_model(0))
    spec = small_resnet()[1].spec
    squeezed = replace(spec, model_args={**spec.model_args, "block_args": {"attn_layer": "se"}})
    with pytest.raises(UserError, match=r"method=coordinates.: knows timm's ResNets"):
        coordinates.known(build(squeezed))
    with pytest.raises(UserError, match=r"method.stages.reparameterise.gains: \[1.0, 2.0\] has 2 numbers; give 1 or 6"):
        coordinates.gains_for(small_resnet()[0], [1.0, 2.0])
