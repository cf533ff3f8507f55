"""What of a latent pipeline is used and released as it is: its autoencoder, its text encoders and their tokenizers."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sophon import paths
from sophon.errors import UserError, one_line
from sophon.files import read_json, sha256_file
from sophon.models.common import PIPELINE_INDEX, imported, quiet
from sophon.pickles import PICKLES, refuse_pickle

AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny")
_CLIP = ("CLIPTextModel", "CLIPTextModelWithProjection")
TEXT_ENCODERS = {"text_encoder": _CLIP, "text_encoder_2": _CLIP, "text_encoder_3": ("T5EncoderModel",)}
_T5_TOKENS = 256  # of a prompt, as the pipeline of Stable Diffusion 3 has it
# what a part's folder may hold of use; a half-precision variant is read where there is nothing else
_KEPT = (".safetensors", ".json", ".txt", ".model")  # the last are sentencepiece's tables
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
        return dict(read_json(self._folder / PIPELINE_INDEX))

    @property
    def _encoders(self) -> list[str]:
        return [name for name in ("", "_2", "_3") if f"text_encoder{name}" in self._hashes]

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
        encoded = vae.encode(images)
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
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
            [B, 6], with three ``pooled_projections`` [B, E]. Empty where the network is told no texts.
        """
        if not self._encoders:
            return {}
        first, *rest = (self._read_texts(name, prompts, like) for name in self._encoders)
        if not rest:
            return {"encoder_hidden_states": first[0]}
        states = torch.cat([first.hidden_states[-2], rest[0].hidden_states[-2]], -1)
        if len(rest) > 1:  # T5's tokens come after CLIP's, which are as wide
            states = F.pad(states, (0, rest[1][0].shape[-1] - states.shape[-1]))
            pooled = torch.cat([first[0], rest[0][0]], -1)
            return {"encoder_hidden_states": torch.cat([states, rest[1][0]], -2), "pooled_projections": pooled}
        sizes = [image_size, image_size, 0, 0, image_size, image_size]  # as it was, where it was cropped, as it is
        ids = torch.tensor([sizes] * len(prompts), dtype=torch.float32, device=like.device)
        return {"encoder_hidden_states": states, "text_embeds": rest[0][0], "time_ids": ids}

    def _read_texts(self, name: str, prompts: Sequence[str], like: Tensor) -> Any:
        """Return what a text encoder says of prompts, which are padded or cut off."""
        tokenizer, most = self._tokenizer(name), _T5_TOKENS if name == "_3" else math.inf
        length = int(min(most, tokenizer.model_max_length))
        settings = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        ids = tokenizer(list(prompts), **settings).input_ids.to(like.device)
        return self._module(f"text_encoder{name}", like)(ids, output_hidden_states=True)

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
