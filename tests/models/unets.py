"""A small U-Net, asked of sophon or saved by diffusers."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import nn

from sophon.config import ModelConfig
from sophon.models import ModelSpec, create

CLASSES = ("cat", "dog", "owl")
NETWORK = {
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
PLAIN = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2, "add_attention": False}
INPUT = {"sample_size": 8, "in_channels": 1, "out_channels": 1}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def config_of(**changes: object) -> ModelConfig:
    base = {
        "library": "diffusers",
        "architecture": "UNet2DModel",
        "model_args": NETWORK,
        "image_size": 8,
        "channels": 1,
    }
    return ModelConfig(**{**base, **changes})


def small(seed: int = 0, **changes: object) -> tuple[nn.Module, ModelSpec]:
    torch.manual_seed(seed)
    return create(config_of(**changes), CLASSES)


def pipeline(folder: Path, scheduler: object | None = None, **changes: object) -> nn.Module:
    """Let diffusers alone write a pipeline; return its network."""
    torch.manual_seed(1)
    unet = UNet2DModel(**{**NETWORK, **INPUT, **changes})
    scheduler = scheduler or DDPMScheduler(num_train_timesteps=7, beta_schedule="squaredcos_cap_v2")
    DDPMPipeline(unet, scheduler).save_pretrained(folder)
    return unet


def predict(module: nn.Module, label: int | None = None) -> torch.Tensor:
    images = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = None if label is None else torch.tensor([label, label])
    with torch.no_grad():
        return module.eval()(images, torch.tensor([0, 5]), class_labels=labels).sample
