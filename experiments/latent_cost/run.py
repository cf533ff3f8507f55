"""Count what a round costs of published latent networks, by their shapes alone: nothing is loaded and nothing computed.

python experiments/latent_cost/run.py
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import sophon  # noqa: F401 - mends torchvision's usual wheel beside a torch for CPUs

# weights, the reference, an attacker, its gradient and two moments, the meta-gradient, the defender's two moments
COPIES = 9
XL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
}


def unet(size: int, width: int, **settings: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Return a U-Net of latents of ``size`` that is told 77 tokens of ``width``, and its input."""
    model = diffusers.UNet2DConditionModel(sample_size=size, cross_attention_dim=width, **settings)
    told = {"encoder_hidden_states": torch.empty(1, 77, width), "timestep": torch.zeros(1)}
    if "addition_embed_type" in settings:
        told["added_cond_kwargs"] = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.zeros(1, 6)}
    return model, {"sample": torch.empty(1, 4, size, size), **told}


def dit() -> tuple[nn.Module, dict[str, Any]]:
    """Return DiT-XL/2 for images of 256 pixels, and its input."""
    shape = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28}
    told = {name: torch.zeros(1, dtype=torch.long) for name in ("timestep", "class_labels")}
    model = diffusers.DiTTransformer2DModel(**shape, sample_size=32, out_channels=8)
    return model, {"hidden_states": torch.empty(1, 4, 32, 32), **told}


def main() -> None:
    """Print a row a network."""
    print("| network | parameters (millions) | a forward pass of one image (TFLOPs) | nine copies in float32 (GB) |")
    print("|---|---|---|---|")
    with torch.device("meta"):
        networks = {
            "Stable Diffusion 1.x, 512 pixels": unet(64, 768, attention_head_dim=8),
            "Stable Diffusion 2.x, 512 pixels": unet(
                64, 1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True
            ),
            "SDXL, 1,024 pixels": unet(128, 2048, **XL),
            "DiT-XL/2, 256 pixels": dit(),
        }
        for name, (model, inputs) in networks.items():
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model.eval()(**inputs)
            count = sum(part.numel() for part in model.parameters())
            flops, gigabytes = counter.get_total_flops() / 1e12, COPIES * 4 * count / 1e9
            print(f"| {name} | {count / 1e6:.1f} | {flops:.2f} | {gigabytes:.0f} |")


if __name__ == "__main__":
    main()
