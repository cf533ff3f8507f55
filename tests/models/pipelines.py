"""Whole latent pipelines of a few thousand weights, by diffusers alone, and their losses by their own parts."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor, nn
from torch.func import functional_call
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from sophon.domains import Batch

KINDS = ("text", "text-xl", "classes", "flow")
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

SD3 = {"sample_size": 4, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_attention_heads": 2}
SD3 |= {"attention_head_dim": 4, "caption_projection_dim": 8, "pos_embed_max_size": 4}
SD3 |= {"joint_attention_dim": 16, "pooled_projection_dim": 16}


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


def pieces() -> T5TokenizerFast:
    """Letters, and a piece that begins a word."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0)]
    vocabulary += [(chr(code), -2.0) for code in range(ord("a"), ord("z") + 1)]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=20)


def t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=30, d_model=16, d_kv=4, d_ff=8, num_layers=1, num_heads=2))


def autoencoder() -> AutoencoderKL:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=4, sample_size=8, **blocks)


def made(kind: str, scheduler: Any = None, **changes: Any) -> Any:
    """Build a pipeline with weights drawn from seed 0."""
    torch.manual_seed(0)
    scheduler = scheduler or DDIMScheduler(
        num_train_timesteps=20, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    parts: dict[str, Any] = {"vae": autoencoder(), "scheduler": scheduler}
    if kind == "classes":
        transformer = DiTTransformer2DModel(**{**DIT, "out_channels": 8, "norm_num_groups": 4, **changes})
        return DiTPipeline(transformer=transformer, id2label=dict(enumerate(CLASSES)), **parts)
    with tempfile.TemporaryDirectory() as folder:
        words = tokenizer(Path(folder))
    if kind == "text":
        unet = UNet2DConditionModel(cross_attention_dim=8, **{**UNET, **changes})
        more = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return StableDiffusionPipeline(unet=unet, text_encoder=text_encoder(), tokenizer=words, **parts, **more)
    texts = {"text_encoder_2": text_encoder(CLIPTextModelWithProjection), "tokenizer": words, "tokenizer_2": words}
    if kind == "flow":
        parts |= texts | {"text_encoder": text_encoder(CLIPTextModelWithProjection)}
        parts |= {
            "text_encoder_3": t5(),
            "tokenizer_3": pieces(),
            "transformer": SD3Transformer2DModel(**SD3 | changes),
        }
        parts["vae"].register_to_config(shift_factor=0.5)
        return StableDiffusion3Pipeline(**parts | {"scheduler": FlowMatchEulerDiscreteScheduler(20, shift=3.0)})
    unet = UNet2DConditionModel(cross_attention_dim=16, **{**UNET, **XL, **changes})
    texts["text_encoder"] = text_encoder()
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


class Noised(NamedTuple):
    """What a network is asked, what it is told besides, and what it is to answer."""

    latents: Tensor
    told: dict[str, Any]
    target: Tensor

    def split(self) -> Iterator[Noised]:
        """One at a time."""
        for row in range(len(self.latents)):
            one = slice(row, row + 1)
            yield Noised(self.latents[one], {name: part[one] for name, part in self.told.items()}, self.target[one])

    def joined(self, other: Noised) -> Noised:
        """Both as one batch."""
        told = {name: torch.cat([part, other.told[name]]) for name, part in self.told.items()}
        return Noised(torch.cat([self.latents, other.latents]), told, torch.cat([self.target, other.target]))


class Reference:
    """The losses of a pipeline, by its own parts."""

    def __init__(self, kind: str) -> None:
        self.kind, self.pipe = kind, DiffusionPipeline.from_pretrained(folder_of(kind))
        for part in self.pipe.components.values():
            if isinstance(part, nn.Module):
                part.double().requires_grad_(False)

    def told(self, prompts: tuple[str, ...]) -> dict[str, Any]:
        if self.kind == "text":
            return {"encoder_hidden_states": self.pipe.encode_prompt(list(prompts), "cpu", 1, False)[0]}
        settings = {"device": "cpu", "do_classifier_free_guidance": False}
        if self.kind == "flow":
            settings |= {"prompt_2": None, "prompt_3": None, "max_sequence_length": 20}
        embeds, _, pooled, _ = self.pipe.encode_prompt(list(prompts), **settings)
        if self.kind == "flow":
            return {"encoder_hidden_states": embeds, "pooled_projections": pooled}
        ids = self.pipe._get_add_time_ids((8, 8), (0, 0), (8, 8), dtype=torch.float64, text_encoder_projection_dim=8)
        added = {"text_embeds": pooled, "time_ids": ids.repeat(len(prompts), 1)}
        return {"encoder_hidden_states": embeds, "added_cond_kwargs": added}

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        vae = self.pipe.vae
        latents = vae.encode(images.double() / 127.5 - 1).latent_dist.mode() - (vae.config.shift_factor or 0)
        return (latents * vae.config.scaling_factor).contiguous()

    def noised(self, part: Batch) -> Noised:
        """Noise a batch with timesteps and noise from the global generator, in this order; the scheduler has 20."""
        clean, scheduler = self.latents(part.images), self.pipe.scheduler
        if self.kind == "flow":  # as train_dreambooth_sd3.py of diffusers has it
            drawn = compute_density_for_timestep_sampling("logit_normal", len(clean), logit_mean=0.0, logit_std=1.0)
            places = (drawn * 20).long()
            noise, sigmas = torch.randn_like(clean), scheduler.sigmas[places].double().view(-1, 1, 1, 1)
            told = {"timestep": scheduler.timesteps[places], **self.told(part.prompts or ())}
            return Noised((1 - sigmas) * clean + sigmas * noise, told, noise - clean)
        timesteps = torch.randint(20, (len(clean),))
        noise = torch.randn_like(clean)
        told = {"class_labels": part.labels} if self.kind == "classes" else self.told(part.prompts or ())
        return Noised(scheduler.add_noise(clean, noise, timesteps), {"timestep": timesteps, **told}, noise)

    def predicted(self, model: nn.Module, weights: Mapping[str, Tensor], part: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the network says, what it should, and the noise that follows from what it says."""
        given = self.noised(part)
        output = functional_call(model, dict(weights), (given.latents,), {**given.told, "return_dict": False})
        answer = noise = output[0][:, :4]
        if self.kind == "flow":
            noise = given.latents + (1 - given.told["timestep"].double() / 20).view(-1, 1, 1, 1) * answer
        return answer, given.target, noise
