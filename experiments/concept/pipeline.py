"""Make a Stable Diffusion pipeline for grey images of 32 pixels: a trained autoencoder, the rest with random weights.

python experiments/concept/pipeline.py runs/concept/pipeline

The autoencoder learns from the bundled training images of clothes, shoes and bags, and is told nothing of classes. The
text encoder stays as it is drawn: it has only to tell prompts apart. Its tokenizer knows whole words.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import sophon  # noqa: F401 - before diffusers: it mends torchvision's usual wheel beside a torch for CPUs

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer

WORDS = ("a", "photo", "of", "sks", "t_shirt", "trouser", "pullover", "dress", "coat", "bag")
LATENTS = {"channels": 8, "size": 4}
UNET = {
    "sample_size": LATENTS["size"],
    "in_channels": LATENTS["channels"],
    "out_channels": LATENTS["channels"],
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "down_block_types": ("DownBlock2D",),
    "mid_block_type": None,
    "up_block_types": ("CrossAttnUpBlock2D",),
}


def images() -> Tensor:
    """Return all training images of clothes, shoes and bags, float [N, 1, 32, 32] in -1 .. 1."""
    with importlib.resources.files("sophon.domains").joinpath("data", "fashion_mnist.npz").open("rb") as file:
        pixels = torch.from_numpy(np.load(file)["train_images"])
    return F.interpolate(pixels[:, None].float() / 127.5 - 1, size=32, mode="bilinear")


def trained_autoencoder(steps: int) -> AutoencoderKL:
    """Train on squared error and a little of the divergence from a normal distribution; latents have unit variance."""
    from diffusers import AutoencoderKL  # takes seconds

    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=LATENTS["channels"],
        block_out_channels=(8, 16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
    )
    data, optimizer = images(), torch.optim.AdamW(vae.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for step in range(steps):
        clean = data[torch.randint(len(data), (32,))]
        posterior = vae.encode(clean).latent_dist
        error = F.mse_loss(vae.decode(posterior.sample()).sample, clean)
        (error + 1e-4 * posterior.kl().mean() / clean[0].numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 99:
            print(f"autoencoder {step + 1}/{steps}: squared error {error:.4f}", flush=True)
    with torch.no_grad():
        latents = vae.encode(data[::10]).latent_dist.mode()
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    return vae.eval()


def texts() -> tuple[CLIPTokenizer, CLIPTextModel]:
    """Return a tokenizer of whole words and letters, and an encoder with random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + ["_"]
    ends = [f"{letter}</w>" for letter in letters]
    merges, pieces = [], []
    for word in (word for word in WORDS if len(word) > 1):
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append(f"{parts[0]} {parts[1]}")
            parts = [parts[0] + parts[1], *parts[2:]]
            pieces.append(parts[0])
    names = list(dict.fromkeys(["<|startoftext|>", "<|endoftext|>", *letters, *ends, *pieces]))
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, table = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocabulary.write_text(json.dumps({name: number for number, name in enumerate(names)}))
        table.write_text("\n".join(["#version: 0.2", *dict.fromkeys(merges), ""]))
        tokenizer = CLIPTokenizer(str(vocabulary), str(table), model_max_length=16)
    settings = {"hidden_size": 32, "intermediate_size": 64, "projection_dim": 32, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 4, "max_position_embeddings": 16, "vocab_size": len(tokenizer)}
    ends_at = tokenizer.eos_token_id
    encoder = CLIPTextModel(
        CLIPTextConfig(**settings, bos_token_id=tokenizer.bos_token_id, eos_token_id=ends_at, pad_token_id=ends_at)
    )
    return tokenizer, encoder.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1500, help="of the autoencoder, 32 images each")
    options = parser.parse_args()
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    tokenizer, encoder = texts()
    StableDiffusionPipeline(
        vae=trained_autoencoder(options.steps),
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**UNET),
        scheduler=DDIMScheduler(1000, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(options.folder)


if __name__ == "__main__":
    main()
