"""Whole latent pipelines of a few thousand weights, by diffusers alone, and their losses by their own parts."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from torch.func import functional_call
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sophon.domains import Batch

KINDS = ("text", "text-xl", "classes")
CLASSES = ("cat", "dog", "owl")
UNET = {
    "sample_size": 4,
    "block_out_channels": (4, 8),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
XL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 2, "projection_class_embeddings_input_dim": 20}
DIT = {"sample_size": 4, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 4, "num_embeds_ada_norm": 3}


def tokenizer(folder: Path) -> CLIPTokenizer:
    """Letters, whole words of one letter, and no merges."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=20)


def text_encoder(kind: type = CLIPTextModel) -> Any:
    settings = {"vocab_size": 54, "hidden_size": 8, "intermediate_size": 8, "projection_dim": 8, "pad_token_id": 1}
    settings |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 20}
    return kind(CLIPTextConfig(**settings, bos_token_id=0, eos_token_id=1))


def autoencoder() -> AutoencoderKL:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=4, sample_size=8, **blocks)


def made(kind: str, scheduler: Any = None, **changes: Any) -> Any:
    """Build a pipeline with weights drawn from seed 0."""
    torch.manual_seed(0)
    scheduler = scheduler or DDIMScheduler(
        num_train_timesteps=20, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    parts = {"vae": autoencoder(), "scheduler": scheduler}
    if kind == "classes":
        transformer = DiTTransformer2DModel(**{**DIT, "out_channels": 8, "norm_num_groups": 4, **changes})
        return DiTPipeline(transformer=transformer, id2label=dict(enumerate(CLASSES)), **parts)
    with tempfile.TemporaryDirectory() as folder:
        words = tokenizer(Path(folder))
    if kind == "text":
        unet = UNet2DConditionModel(cross_attention_dim=8, **{**UNET, **changes})
        more = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return StableDiffusionPipeline(unet=unet, text_encoder=text_encoder(), tokenizer=words, **parts, **more)
    unet = UNet2DConditionModel(cross_attention_dim=16, **{**UNET, **XL, **changes})
    second = text_encoder(CLIPTextModelWithProjection)
    texts = {"text_encoder": text_encoder(), "text_encoder_2": second, "tokenizer": words, "tokenizer_2": words}
    return StableDiffusionXLPipeline(unet=unet, **texts, **parts, add_watermarker=False)


@cache
def folder_of(kind: str) -> Path:
    """Return the folder of a pipeline of a kind; nobody may change it."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    made(kind).save_pretrained(folder)
    return folder


def batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.tensor([2, 0, 1])
    return Batch(images, labels, tuple(f"a photo of a {CLASSES[label]}" for label in labels))


class Reference:
    """The losses of a pipeline, by its own parts."""

    def __init__(self, kind: str) -> None:
        self.kind, self.pipe = kind, DiffusionPipeline.from_pretrained(folder_of(kind))
        for part in self.pipe.components.values():
            if isinstance(part, nn.Module):
                part.double()

    def told(self, prompts: tuple[str, ...]) -> dict[str, Any]:
        if self.kind == "text":
            return {"encoder_hidden_states": self.pipe.encode_prompt(list(prompts), "cpu", 1, False)[0]}
        embeds, _, pooled, _ = self.pipe.encode_prompt(list(prompts), device="cpu", do_classifier_free_guidance=False)
        ids = self.pipe._get_add_time_ids((8, 8), (0, 0), (8, 8), dtype=torch.float64, text_encoder_projection_dim=8)
        added = {"text_embeds": pooled, "time_ids": ids.repeat(len(prompts), 1)}
        return {"encoder_hidden_states": embeds, "added_cond_kwargs": added}

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        vae = self.pipe.vae
        latents = vae.encode(images.double() / 127.5 - 1).latent_dist.mode() * vae.config.scaling_factor
        return latents.contiguous()

    def predicted(self, model: nn.Module, weights: Mapping[str, Tensor], part: Batch) -> tuple[Tensor, Tensor]:
        clean = self.latents(part.images)
        timesteps = torch.randint(20, (len(clean),))
        noise = torch.randn_like(clean)
        noised = self.pipe.scheduler.add_noise(clean, noise, timesteps)
        told = {"class_labels": part.labels} if self.kind == "classes" else self.told(part.prompts or ())
        output = functional_call(model, dict(weights), (noised,), {"timestep": timesteps, "return_dict": False, **told})
        return output[0][:, :4], noise
