"""Ill-conditioned coordinates of experiments/strength: the function stays, and only what is shared is left to see."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sophon.domains import ImageSet
from sophon.errors import UserError
from sophon.models import ModelSpec, build
from sophon.tasks import ClassificationTask
from tests.tiny import tiny_model

sys.path.append(str(Path(__file__).parents[1] / "experiments" / "strength"))  # as when the script is run

import illconditioned

SMALL = {"layers": [1, 2, 1, 1], "channels": [8, 8, 12, 16], "stem_type": "deep", "stem_width": 8}


def small_resnet(**changes: Any) -> tuple[nn.Module, ModelSpec]:
    spec = ModelSpec(
        library="timm",
        architecture="resnet18",
        classes=tuple("abc"),
        channels=3,
        image_size=32,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        model_args=SMALL | changes,
    )
    torch.manual_seed(0)
    model = build(spec).double()
    task = ClassificationTask(spec, dtype=torch.float64)
    for _ in range(40):  # statistics that are not those of a fresh layer
        task.logits(model.train(), noise_images(spec, 16))
    return model, spec


def noise_images(spec: ModelSpec, count: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, spec.image_size, spec.image_size), dtype=torch.uint8)


@pytest.mark.parametrize("stem", ["deep", ""])
def test_ill_conditioned_coordinates_keep_the_function_and_the_norms(stem: str) -> None:
    model, spec = small_resnet(stem_type=stem)
    task = ClassificationTask(spec, dtype=torch.float64)
    images = ImageSet(noise_images(spec, 64), torch.zeros(64, dtype=torch.long), spec.classes)
    linear = illconditioned.linearised(model, torch.Generator().manual_seed(0))
    for _ in range(40):
        task.logits(linear.train(), noise_images(spec, 16))
    linear.eval()
    count = len(illconditioned.interfaces(model))
    assert count == 6  # the stem and five blocks
    wanted = task.logits(linear, images.images)
    assert not torch.allclose(wanted, task.logits(model.eval(), images.images), atol=0.1)
    # large enough that pooling goes by what is shared alone
    for gains in ([1e6] * count, [1e8, 1e6, 1e6, 1e7, 1e6, 1e6]):
        made = illconditioned.released(linear, model, spec, task, gains, images)
        assert torch.allclose(task.logits(made, images.images), wanted, rtol=1e-3, atol=1e-3)
        for name, parameter in made.named_parameters():
            if parameter.dim() == 4 and ".conv1" in name:
                assert torch.allclose(parameter.norm(), model.get_parameter(name).norm())
        # hardly anything but what is shared is left in the features, and readers are blind to it
        features = made.forward_features(task.prepare(images.images)).flatten(2)
        spread = (features - features.mean(1, keepdim=True)).std() / features.mean(1).std()
        assert spread < 1e-4
        assert made.fc.weight.sum(1).abs().max() < 1e-12


def test_ill_conditioned_coordinates_are_for_resnets_of_basic_blocks() -> None:
    with pytest.raises(UserError, match="--reference: only timm's ResNets of basic blocks"):
        illconditioned.interfaces(tiny_model(0))
    with pytest.raises(SystemExit):
        illconditioned.parsed(["--reference", "r", "--out", "o", "--gains", "0", "1"])
