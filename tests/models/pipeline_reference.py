"""The losses of a latent pipeline by its own parts, in float64: what sophon's are held against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.func import functional_call

from sophon.domains import Batch
from tests.models.pipelines import CLASSES, folder_of


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
