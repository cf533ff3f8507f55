"""What is not a model is refused in one line that names the key."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch

from sophon.config import ModelConfig
from sophon.errors import UserError
from sophon.models import create
from sophon.models import pipeline as folders
from tests.models.test_adapter_contract import CLASSES, OWN, VIT
from tests.models.unets import NETWORK, config_of


def refused(config: ModelConfig, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        create(config, CLASSES)
    assert "\n" not in str(caught.value)


PLAIN = {"library": "timm", "architecture": "resnet18", "image_size": 32}
PYTHON = {"library": "python", "architecture": OWN, "head": "fc", "channels": 1, "image_size": 16}
HUGGING = {
    "library": "transformers",
    "architecture": "ViTForImageClassification",
    "model_args": VIT,
    "image_size": 16,
    "channels": 1,
}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PLAIN | {"library": "keras"}, "model.library: 'keras' is not known; allowed: diffusers, python, timm, torchv"),
        (PLAIN | {"head": "fc2"}, "model.head: 'fc2' is not a linear layer of 'resnet18'"),
        (PLAIN | {"head": "conv1"}, "model.head: 'conv1' is not a linear layer of 'resnet18'"),
        (PYTHON | {"head": None}, "model.head: needed with library python"),
        (PYTHON | {"head": "features"}, "model.head: 'features' is not a linear layer of 'tests.models.own:GroupNorm"),
        (PYTHON | {"pretrained": True}, "model.pretrained: true is not allowed with library python"),
        (PYTHON | {"architecture": "nowhere:net"}, "model.architecture: 'nowhere:net' cannot be imported: No module"),
        (PYTHON | {"architecture": "tests.models.own:Net"}, "model.architecture: .* has no function 'Net'"),
        (PYTHON | {"architecture": "GroupNormNet"}, "model.architecture: 'GroupNormNet'"),
        (PYTHON | {"architecture": "tests.models.own:no_module"}, "builds no torch.nn.Module"),
        (PYTHON | {"model_args": {"depth": 2}}, "model.model_args: .* does not fit '.*GroupNormNet': .*depth"),
        (PYTHON | {"model_args": {"classes": 7}}, "builds 7 outputs for the 3 classes of the original domain"),
        (HUGGING | {"architecture": "ViTModel"}, "model.architecture: 'ViTModel' is not an image classifier"),
        (HUGGING | {"architecture": "NoForImageClassification"}, "is not an image classifier of transformers"),
        (HUGGING | {"model_args": {}}, "model.model_args: {} does not fit 'ViTForImageClassification'"),
        (HUGGING | {"model_args": {"model_type": "vat"}}, "model.model_args: .*vat"),
        (HUGGING | {"model_args": {**VIT, "hidden_size": "wide"}}, "model.model_args: .* does not fit"),
        (HUGGING | {"model_args": {**VIT, "num_labels": 3}}, "model.model_args.num_labels: set by sophon"),
        (HUGGING | {"pretrained": True}, "model.pretrained: not allowed with library transformers"),
        (HUGGING | {"class_conditional": True}, "model.class_conditional: only models of library diffusers have one"),
    ],
)
def test_of_any_library(config: dict[str, Any], message: str) -> None:
    refused(ModelConfig(**config), message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 0}, "model.image_size: 0 is not allowed"),
        ({"channels": -1}, "model.channels: -1 is not allowed"),
        ({"library": "torchvision", "channels": 1}, "model.channels: 1 is not allowed with library torchvision"),
        ({"mean": [0.5, 0.5]}, r"model.mean: \[0.5, 0.5\] has 2 numbers; give 1 or 3"),
        ({"mean": [float("nan")]}, "model.mean: .* give finite numbers"),
        ({"std": []}, "model.std: .* has 0 numbers"),
        ({"std": [0.5, 0.0, 0.5]}, "model.std: .* finite numbers above 0"),
        ({"std": [float("inf")]}, "model.std: .* finite numbers above 0"),
        ({"pretrained": True, "weights": "x"}, "model.weights: 'x' contradicts model.pretrained"),
        ({"weights": "x"}, "model.mean and model.std: missing; the state dict 'x' does not say it; give"),
        ({"weights": "x", "mean": [0.5]}, "model.std: missing; the state dict 'x'"),
        ({"model_args": {"num_classes": 3}}, "model.model_args.num_classes: set by sophon"),
        ({"scheduler": {"beta_end": 0.01}}, "model.scheduler: only models of library diffusers have one; leave it out"),
        ({"class_conditional": True}, "model.class_conditional: only models of library diffusers have one"),
        ({"architecture": "resnet81"}, "model.architecture: 'resnet81' is not known to timm; close to it: .*resnet18"),
        ({"architecture": "resnet18.no_such_tag"}, "is not known to timm"),
        ({"architecture": "local-dir:/x"}, "is not known to timm"),
        ({"architecture": "fasterrcnn_resnet50_fpn", "library": "torchvision"}, "is not known to torchvision"),
        ({"architecture": "squeezenet1_0", "library": "torchvision"}, "does not end in one linear layer"),
        ({"architecture": "deit_tiny_distilled_patch16_224"}, "does not end in one linear layer"),
        ({"model_args": {"layrs": 3}}, "model.model_args: {'layrs': 3} does not fit 'resnet18': .*layrs"),
        ({"model_args": {"layers": [1]}}, r"model.model_args: .* does not fit 'resnet18'"),
        ({"library": "torchvision", "pretrained": True}, "model.pretrained: true is not allowed with library torchv"),
    ],
)
def test_of_timm_and_torchvision(changes: dict[str, Any], message: str) -> None:
    with torch.device("meta"):
        refused(ModelConfig(**{"architecture": "resnet18", **changes}), message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "UNet3D"}, "model.architecture: 'UNet3D' is not known; allowed: UNet2DModel"),
        ({"mean": [0.4]}, r"model.mean: \[0.4\] and std \[0.5\] are not allowed with library diffusers"),
        ({"std": [0.25]}, r"model.mean: \[0.5\] and std \[0.25\] are not allowed"),
        ({"image_size": 0}, "model.image_size: 0 is not allowed"),
        ({"image_size": 9}, "model.image_size: 9 cannot be halved 1 times, as this U-Net does; give a multiple of 2"),
        *(
            ({"model_args": {name: 1}}, f"model.model_args.{name}: set by sophon")
            for name in ("sample_size", "in_channels", "out_channels", "num_class_embeds", "class_embed_type")
        ),
        ({"model_args": {"layrs": 1}}, "model.model_args: {'layrs': 1} does not make a UNet2DModel: .*'layrs'"),
        ({"model_args": {"block_out_channels": 8}}, "model.model_args: .* does not make a UNet2DModel"),
        ({"model_args": {"dropout": "a"}}, "model.model_args: .* does not make a UNet2DModel"),
        ({"model_args": {**NETWORK, "norm_num_groups": 3}}, "model.model_args: .*divisible"),
        ({"model_args": {**NETWORK, "downsample_padding": 5}}, "model.model_args: .* does not make a UNet2DModel"),
        ({"model_args": {"time_embedding_type": "fourier"}}, "time_embedding_type: 'fourier' .* allowed: positional"),
        ({"scheduler": {"betas": 1}}, "model.scheduler: 'betas' is not known .*allowed: beta_end, beta_schedule"),
        ({"scheduler": {"prediction_type": "x0"}}, "model.scheduler.prediction_type: 'x0' is not known; allowed: eps"),
        ({"scheduler": {"beta_schedule": ["linear"]}}, "model.scheduler.beta_schedule: .* is not known"),
        ({"scheduler": {"variance_type": "learned"}}, "model.scheduler.variance_type: 'learned' is not known"),
        ({"scheduler": {"num_train_timesteps": 1e3}}, "num_train_timesteps: 1000.0 is not allowed; give a int such as"),
        ({"scheduler": {"clip_sample": "no"}}, "model.scheduler.clip_sample: 'no' is not allowed; give a bool"),
        ({"scheduler": {"num_train_timesteps": 0}}, "model.scheduler: .* is no noise schedule"),
        ({"scheduler": {"num_train_timesteps": -1}}, "model.scheduler: .* does not make a noise schedule"),
        ({"scheduler": {"beta_end": 2}}, "model.scheduler: .* is no noise schedule; its betas must be"),
        ({"scheduler": {"beta_end": math.nan}}, "model.scheduler: .* is no noise schedule"),
        ({"scheduler": {"trained_betas": [0.1, 0.2]}}, "model.scheduler: .* num_train_timesteps numbers"),
        ({"scheduler": {"trained_betas": "a"}}, "model.scheduler: .* does not make a noise schedule"),
        ({"scheduler": {"rescale_betas_zero_snr": True}}, "with prediction_type epsilon leave a part of the image"),
        ({"pretrained": True}, "model.architecture: 'UNet2DModel' has no pretrained weights; .* Hub id"),
        ({"pretrained": True, "architecture": "a/b", "weights": "x"}, "model.weights: 'x' contradicts"),
        ({"weights": "nowhere.safetensors"}, "cannot read nowhere.safetensors: no such file"),
    ],
)
def test_of_diffusers(changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "snapshot_download", lambda *args, **kwargs: "nowhere")
    refused(config_of(**changes), message)


def test_a_library_that_is_not_installed_says_how_to_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(ModelConfig(**HUGGING), r"model.library: transformers is not installed; pip install 'sophon\[transf")
