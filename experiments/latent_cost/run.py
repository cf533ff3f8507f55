"""Count what a round costs of published latent networks, by their shapes alone: nothing is loaded and nothing computed.

python experiments/latent_cost/run.py
"""

from __future__ import annotations

from typing import Any
from unittest import mock

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


def sd3() -> tuple[nn.Module, dict[str, Any]]:
    """Return the transformer of Stable Diffusion 3 Medium for images of 1,024 pixels, and its input."""
    shape = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}
    told = {"encoder_hidden_states": torch.empty(1, 333, 4096), "pooled_projections": torch.empty(1, 2048)}
    model = diffusers.SD3Transformer2DModel(**shape)
    return model, {"hidden_states": torch.empty(1, 16, 128, 128), "timestep": torch.zeros(1), **told}


class FusedAttention(torch.autograd.Function):
    """Stands for a fused kernel, which keeps its input and its output but no matrix of tokens by tokens."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output


def kept(model: nn.Module, inputs: dict[str, Any]) -> float:
    """Return the gigabytes that a pass keeps for the way back, weights left out."""
    weights = {part.untyped_storage()._cdata for part in model.parameters()}
    storages = {}

    def keep(part: torch.Tensor) -> torch.Tensor:
        storages[part.untyped_storage()._cdata] = part  # held, so that no other storage gets its number
        return part

    fused = mock.patch.object(
        nn.functional, "scaled_dot_product_attention", lambda q, k, v, **_: FusedAttention.apply(q, k, v)
    )
    with fused, torch.autograd.graph.saved_tensors_hooks(keep, lambda part: part):
        output = model(**inputs).sample
    del output
    return sum(part.untyped_storage().nbytes() for key, part in storages.items() if key not in weights) / 1e9


def main() -> None:
    """Print a row a network."""
    columns = ("network", "parameters (millions)", "a forward pass of one image (TFLOPs)")
    columns += ("nine copies in float32 (GB)", "activations of one image (GB)", "with checkpointing (GB)")
    print(f"| {' | '.join(columns)} |")
    print(f"|{'---|' * len(columns)}")
    with torch.device("meta"):
        networks = {
            "Stable Diffusion 1.x, 512 pixels": unet(64, 768, attention_head_dim=8),
            "Stable Diffusion 2.x, 512 pixels": unet(
                64, 1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True
            ),
            "SDXL, 1,024 pixels": unet(128, 2048, **XL),
            "Stable Diffusion 3 Medium, 1,024 pixels": sd3(),
            "DiT-XL/2, 256 pixels": dit(),
        }
        for name, (model, inputs) in networks.items():
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model.eval()(**inputs)
            count = sum(part.numel() for part in model.parameters())
            flops, gigabytes = counter.get_total_flops() / 1e12, COPIES * 4 * count / 1e9
            activations = kept(model, inputs)
            model.enable_gradient_checkpointing()
            row = f"| {name} | {count / 1e6:.1f} | {flops:.2f} | {gigabytes:.0f} | {activations:.1f}"
            print(f"{row} | {kept(model, inputs):.1f} |", flush=True)


if __name__ == "__main__":
    main()
