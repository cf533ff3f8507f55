"""Diffusion transformers on latents: the networks of diffusers' `DiTPipeline` and `StableDiffusion3Pipeline`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

from torch import Tensor, nn

from sophon.errors import UserError
from sophon.models.adapter import ModelCard
from sophon.models.latent_diffusion import LOADING, TextToImageAdapter
from sophon.models.noise import read_flow
from sophon.models.partition import Block, owned


class ClassToImageAdapter(TextToImageAdapter):
    """The `DiTTransformer2DModel` of a `DiTPipeline` (Peebles and Xie, 2023); its class embeddings are its head.

    Each block has an embedding of its own, with one more row than classes: the null class of classifier-free guidance,
    which takes a label's place in a tenth of the training.
    """

    part, network = "transformer", "DiTTransformer2DModel"
    weights = "transformer/diffusion_pytorch_model.safetensors"
    pipelines = ("DiTPipeline",)
    encoders = (0,)
    order = ("transformer_blocks",)
    last = ("norm_out", "proj_out_1", "proj_out_2")
    _NULL = 1  # rows of an embedding beside those of the classes

    def _check(self, where: str) -> None:
        count, own = self.spec.model_args.get("num_embeds_ada_norm", 1000), len(self.spec.classes)
        if count != own:
            raise UserError(
                f"{where}: class counts do not match: pipeline has {count} classes, original domain has {own}"
            )

    @property
    def head(self) -> str | None:
        """The class embedding of the first block."""
        return self.heads[0]

    @property
    def heads(self) -> tuple[str, ...]:
        """The class embedding of each block."""
        count = self.spec.model_args.get("num_layers", 28)
        return tuple(f"transformer_blocks.{index}.norm1.emb.class_embedder.embedding_table" for index in range(count))

    def forward(self, model: nn.Module, inputs: Tensor, **conditions: Tensor) -> Tensor:
        """Return the noise that the network predicts of latents; the variance that it may predict too is left out."""
        told = {"timestep": conditions["timesteps"], "class_labels": conditions["labels"]}
        output: Tensor = model(inputs, **told, return_dict=False)[0]
        return output[:, : inputs.shape[1]]

    def blocks(self, model: nn.Module) -> list[Block]:
        """Return each transformer block; the patches' embedding belongs to the first, the projections to the last."""
        heads = tuple(f"{name}." for name in self.heads)
        tensors = chain(model.named_parameters(), model.named_buffers())
        state = [name for name, _ in tensors if not name.startswith(heads)]
        return [tuple(name for name in state if owned([name], block)) for block in super().blocks(model)]

    def classes_in(self, model: nn.Module) -> int | None:
        """Return how many classes a model's head has, the null class left out."""
        return len(model.get_parameter(f"{self.head}.weight")) - self._NULL

    def start_head(self, model: nn.Module, classes: Sequence[str]) -> None:
        """Replace every block's class embedding by a newly initialised one; the null class stays."""
        for name in self.heads:
            embedder: Any = model.get_submodule(name.rpartition(".")[0])
            old = embedder.embedding_table
            place = {"device": old.weight.device, "dtype": old.weight.dtype}
            new = nn.Embedding(len(classes) + self._NULL, old.embedding_dim, **place).train(old.training)
            new.weight.data[-1] = old.weight.data[-1]
            embedder.embedding_table = new
            embedder.num_classes = len(classes)
        model.register_to_config(num_embeds_ada_norm=len(classes))  # type: ignore[operator]

    def card(self) -> ModelCard:
        """Return what a model card says of a pipeline."""
        steps = self.spec.scheduler["num_train_timesteps"]
        classes = f"Classes, in the order of the labels: {', '.join(f'`{name}`' for name in self.spec.classes)}."
        # diffusers takes 1000 for the number of the null class
        asked = "class_labels=[0]" if len(self.spec.classes) == 1000 else "class_labels=[0], guidance_scale=1.0"
        loading = LOADING.format(prompt=asked, steps=min(50, steps - 1))
        kind = f"A latent diffusion transformer conditioned on {len(self.spec.classes)} classes"
        return ModelCard("unconditional-image-generation", kind, (*self._notes(), classes), loading)


class FlowMatchingAdapter(TextToImageAdapter):
    """The `SD3Transformer2DModel` of Stable Diffusion 3 and 3.5 (Esser et al., 2024); it predicts a velocity."""

    part, network = "transformer", "SD3Transformer2DModel"
    weights = "transformer/diffusion_pytorch_model.safetensors"
    pipelines = ("StableDiffusion3Pipeline",)
    encoders = (3,)
    order = ("transformer_blocks",)
    last = ("norm_out", "proj_out")
    _schedule = staticmethod(read_flow)

    def forward(self, model: nn.Module, inputs: Tensor, **conditions: Tensor) -> Tensor:
        """Return the velocity that the network predicts of latents, from latents to noise; of their shape."""
        told = {name: conditions[name] for name in ("encoder_hidden_states", "pooled_projections")}
        output: Tensor = model(inputs, timestep=conditions["timesteps"], **told, return_dict=False)[0]
        return output
