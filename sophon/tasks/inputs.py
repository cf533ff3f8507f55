"""What a denoiser is given: images or their latents, and what it is told of each. What costs a pass is made once."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from sophon.domains import Batch
from sophon.errors import UserError
from sophon.models import ModelAdapter

_MOST = 4 * 10**9  # bytes of latents that are kept on the device


class Inputs:
    """Leads from batches to a denoiser's inputs and back.

    A latent is known by its image's bytes and an embedding by its prompt. Both are made one at a time, so that their
    bits do not depend on which images came together, and kept on the device.

    Args:
        adapter: of the denoiser.
        image_size: of the images, in pixels.
        dtype: of the inputs.
        frozen_dtype: of the autoencoder and the text encoders.
    """

    def __init__(
        self, adapter: ModelAdapter, image_size: int, dtype: torch.dtype, frozen_dtype: torch.dtype | None = None
    ) -> None:
        self._frozen, self._image_size, self._dtype = adapter.frozen, image_size, dtype
        self._frozen_dtype = frozen_dtype or dtype
        self._latents: dict[bytes, Tensor] = {}
        self._told: dict[str, dict[str, Tensor]] = {}
        self._bytes = 0

    def clean(self, images: Tensor) -> Tensor:
        """Return x_0 of uint8 images [B, C, H, W]: scaled to -1 .. 1, or the latents of that."""
        if self._frozen is None:
            return self._scaled(images)
        return torch.cat([self._latent(image[None]) for image in images])

    def _scaled(self, images: Tensor) -> Tensor:
        return images.to(self._dtype) / 127.5 - 1

    def _latent(self, image: Tensor) -> Tensor:
        assert self._frozen is not None  # `clean` asked
        key = hashlib.sha256(image.cpu().numpy().tobytes() + repr(image.shape).encode()).digest()
        latent = self._latents.get(key)
        if latent is None:
            latent = self._frozen.encode(self._scaled(image).to(self._frozen_dtype)).to(self._dtype)
            latent = latent.contiguous()  # noise is drawn in the order of memory
            if self._bytes < _MOST:
                self._latents[key] = latent
                self._bytes += latent.nbytes
        return latent.to(image.device)

    def images(self, clean: Tensor) -> Tensor:
        """Return uint8 images [B, C, H, W] on the CPU of x_0."""
        if self._frozen is not None:
            parts = [self._frozen.decode(part[None].to(self._frozen_dtype)) for part in clean]
            clean = torch.cat(parts).to(self._dtype)
        pixels = (clean.clamp(-1, 1) + 1) * 127.5
        return pixels.nan_to_num(0).round().to(torch.uint8).cpu()

    def conditions(self, batch: Batch) -> dict[str, Tensor]:
        """Return what a denoiser is told of a batch: its labels, and what its prompts mean where it reads them.

        Raises:
            UserError: it reads prompts, and the batch has none.
        """
        conditions = {"labels": batch.labels}
        if self._frozen is None or not self._frozen.reads_prompts:
            return conditions
        if batch.prompts is None:
            raise UserError(
                "domain.*.prompt: a text-to-image model needs a text with each image; give every domain a prompt such "
                "as 'a photo of a {class}', or captions"
            )
        parts = [self._embedding(prompt, batch.labels.device) for prompt in batch.prompts]
        return conditions | {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _embedding(self, prompt: str, device: torch.device) -> dict[str, Tensor]:
        assert self._frozen is not None  # `conditions` asked
        if prompt not in self._told:
            like = torch.empty(0, dtype=self._frozen_dtype, device=device)
            told = self._frozen.embed([prompt], like, self._image_size)
            self._told[prompt] = {name: part.to(self._dtype) for name, part in told.items()}
        return {name: part.to(device) for name, part in self._told[prompt].items()}
