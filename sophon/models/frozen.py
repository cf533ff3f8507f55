"""What of a latent pipeline is used and released as it is: its autoencoder, its text encoders and their tokenizers."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sophon import paths
from sophon.errors import UserError, one_line
from sophon.files import read_json, sha256_file
from sophon.models.common import imported, quiet
from sophon.models.pipeline import CONFIG
from sophon.models.weights import PICKLES, refuse_pickle

AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny")
TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")
# what a part's folder may hold of use; a half-precision variant is read where there is nothing else
_KEPT = (".safetensors", ".json", ".txt")
_VARIANT = ".fp16.safetensors"


class FrozenParts:
    """The autoencoder and the text encoders of a pipeline's folder, read when they are first asked for.

    They move to the device and the floating type of what they are given, and take no gradients.

    Args:
        folder: the pipeline's.
        hashes: what `part_sha256` was of each part when the model was described.
    """

    def __init__(self, folder: Path, hashes: Mapping[str, str]) -> None:
        self._folder, self._hashes = folder, hashes
        self._loaded: dict[str, Any] = {}

    @cached_property
    def _index(self) -> dict[str, Any]:
        return dict(read_json(self._folder / CONFIG))

    @property
    def _encoders(self) -> list[str]:
        return [name for name in ("", "_2") if f"text_encoder{name}" in self._hashes]

    @property
    def reads_prompts(self) -> bool:
        """Whether the network is told texts."""
        return bool(self._encoders)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return latents: the mean of the autoencoder's posterior, scaled as the network takes it.

        Args:
            images: float [B, C, H, W] in -1 .. 1.

        Returns:
            float [B, c, h, w].
        """
        vae = self._module("vae", images)
        found = vae.encode(images)
        latents = found.latents if hasattr(found, "latents") else found.latent_dist.mode()
        shift, scale = self._scales(vae)
        return (latents - shift) * scale  # type: ignore[no-any-return]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return images, float [B, C, H, W] about -1 .. 1, of latents as `encode` returns them."""
        vae = self._module("vae", latents)
        shift, scale = self._scales(vae)
        return vae.decode(latents / scale + shift).sample  # type: ignore[no-any-return]

    def _scales(self, vae: Any) -> tuple[float, float]:
        return getattr(vae.config, "shift_factor", None) or 0.0, vae.config.scaling_factor

    @torch.no_grad()
    def embed(self, prompts: Sequence[str], like: Tensor, image_size: int) -> dict[str, Tensor]:
        """Return what the network is told of prompts.

        Args:
            prompts: texts; what is longer than the tokenizer's length is cut off.
            like: a tensor of the device and the floating type wanted.
            image_size: of the images in pixels, which SDXL is told.

        Returns:
            ``encoder_hidden_states`` [B, tokens, D]; with two encoders also ``text_embeds`` [B, E] and ``time_ids``
            [B, 6]. Empty where the network is told no texts.
        """
        states, pooled, several = [], like, len(self._encoders) > 1
        for name in self._encoders:
            tokenizer, encoder = self._tokenizer(name), self._module(f"text_encoder{name}", like)
            ids = self.tokens(tokenizer, prompts).to(like.device)
            found = encoder(ids, output_hidden_states=several)
            states.append(found.hidden_states[-2] if several else found[0])
            pooled = found[0]
        if not states:
            return {}
        told = {"encoder_hidden_states": torch.cat(states, -1)}
        if several:
            told["text_embeds"] = pooled
            sizes = [image_size, image_size, 0, 0, image_size, image_size]  # as it was, where it was cropped, as it is
            told["time_ids"] = torch.tensor([sizes] * len(prompts), dtype=like.dtype, device=like.device)
        return told

    @staticmethod
    def tokens(tokenizer: Any, prompts: Sequence[str]) -> Tensor:
        """Return the token numbers of prompts, int64 [B, the tokenizer's length], padded or cut off."""
        settings = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
        ids: Tensor = tokenizer(list(prompts), return_tensors="pt", **settings).input_ids
        return ids

    def text_encoder(self, like: Tensor) -> tuple[Any, nn.Module]:
        """Return the tokenizer and the text encoder of a pipeline that has one.

        Raises:
            UserError: it has none, or two.
        """
        if len(self._encoders) != 1:
            raise UserError(f"the pipeline has {len(self._encoders)} text encoders; only one with a single is allowed")
        return self._tokenizer(""), self._module("text_encoder", like)

    def _tokenizer(self, name: str) -> Any:
        return self._part(f"tokenizer{name}")

    def _module(self, name: str, like: Tensor) -> Any:
        """Return a part as a module on the device and of the type of a tensor."""
        return nn.Module.to(self._part(name), like.device, like.dtype)  # diffusers' own warns of half precision

    def _part(self, name: str) -> Any:
        if name not in self._loaded:
            with torch.random.fork_rng(devices=[]):
                self._loaded[name] = self._read(name)
        return self._loaded[name]

    def _read(self, name: str) -> Any:
        folder = self._folder / name
        if part_sha256(folder) != self._hashes[name]:
            raise UserError(f"'{folder}' is not what the model was described with; give its own, or describe it again")
        library, kind = self._index[name]
        options: dict[str, Any] = {}
        if not name.startswith("tokenizer"):
            variant = "fp16" if _variant_only(folder) else None
            options = {"use_safetensors": True, "variant": variant}
            options["torch_dtype" if library == "diffusers" else "dtype"] = torch.float32
        try:
            with quiet() if library == "transformers" else nullcontext():
                part = getattr(_library(library), kind).from_pretrained(folder, local_files_only=True, **options)
        except Exception as error:  # libraries raise whatever their first misfit leads to
            raise UserError(f"'{folder}' cannot be read: {one_line(error)}") from error
        return part.eval().requires_grad_(False) if isinstance(part, nn.Module) else part


def part_sha256(folder: Path) -> str:
    """Hash the names and the contents of a part's files."""
    digest = hashlib.sha256()
    for name, file in sorted(_files(folder).items()):
        digest.update(f"{name} {sha256_file(file)}\n".encode())
    return digest.hexdigest()


def copy_part(folder: Path, target: Path) -> None:
    """Copy a part's files, without pickles; the only variant of its weights becomes the plain one."""
    for name, file in _files(folder).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / name)


def check_part(folder: Path, where: str) -> None:
    """Raise a `UserError` that begins with ``where`` if a part is not there, or only as a pickle."""
    if not paths.is_folder(folder):
        raise UserError(f"{where} holds no folder {folder.name}; give a whole pipeline")
    if not _files(folder):
        for file in paths.entries(folder):
            if file.suffix.lower() in PICKLES:
                refuse_pickle(file, where, "diffusers")
        raise UserError(f"{where}: {folder.name} is empty; give a whole pipeline")
    if not folder.name.startswith("tokenizer") and not any(folder.glob("*.safetensors")):
        for file in paths.entries(folder):
            refuse_pickle(file, where, "diffusers")


def _files(folder: Path) -> dict[str, Path]:
    """Return a part's files by the names that they have in an exported pipeline."""
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in _KEPT and path.is_file()]
    alone = _variant_only(folder)
    kept = files if alone else [path for path in files if not path.name.endswith(_VARIANT)]
    names = (str(path.relative_to(folder)) for path in kept)
    return {
        name.replace(_VARIANT, ".safetensors") if alone else name: path for name, path in zip(names, kept, strict=True)
    }


def _variant_only(folder: Path) -> bool:
    weights = [path.name for path in folder.glob("*.safetensors")]
    return bool(weights) and all(name.endswith(_VARIANT) for name in weights)


def _library(name: str) -> Any:
    if name == "transformers":
        return imported()
    import diffusers  # only here: it takes seconds

    return diffusers
