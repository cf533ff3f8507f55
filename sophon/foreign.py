"""Foreign checkpoints: those that sophon did not make, but their library or their author."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from sophon import models, paths
from sophon.checkpoint import Checkpoint
from sophon.config import ModelConfig
from sophon.errors import UserError
from sophon.models.weights import weights_sha256

_ALLOWED = "a folder of sophon, timm, transformers or diffusers, or a .safetensors state dict"


def described(path: str | Path, model: ModelConfig, key: str = "checkpoint") -> ModelConfig:
    """Return the ``model`` group of a checkpoint that sophon did not make, weights and all.

    Args:
        path: a folder of a library's own format, which says which model it holds; or a ``.safetensors`` state dict, of
            the architecture that ``model`` names.
        model: the ``model`` group; what a folder says of itself takes its place.

    Raises:
        UserError: nothing is there, it is a pickle, or none of these.
    """
    path = Path(path)
    if not paths.exists(path, key):
        raise UserError(f"{key}: '{path}' does not exist; give {_ALLOWED}")
    config = models.describe(replace(model, pretrained=False, weights=str(path)), key)
    if paths.is_file(path, key) and path.suffix != ".safetensors":
        raise UserError(f"{key}: '{path}' is not a checkpoint; give {_ALLOWED}")
    return config


def open_foreign(path: str | Path, model: ModelConfig, classes: Sequence[str], key: str = "checkpoint") -> Checkpoint:
    """Open a checkpoint that sophon did not make. Draws nothing from torch's global generator and reads no pickle.

    Args:
        classes: names of the original domain's classes, in the order of the labels; a classifier or a conditional
            denoiser must have as many.

    Returns:
        The checkpoint. Its manifest has ``foreign`` (true), ``name``, ``model`` and ``weights_sha256``, and so neither
        a method nor a sampler's support.

    Raises:
        UserError: see `described`; or it is truncated, not finite, or of another architecture or number of classes.
    """
    with _named(key):
        with torch.random.fork_rng(devices=[]):
            module, spec = models.create(described(path, model, key), classes)
        sha256 = weights_sha256(models.adapter_of(spec).weights_in(Path(path)))
    manifest = {"foreign": True, "name": Path(path).name, "model": spec.plain(), "weights_sha256": sha256}
    return Checkpoint(module.eval(), spec, manifest, Path(path), spec.sha256(sha256))


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Let messages begin with the key by which the user named the checkpoint, instead of the one it is passed on by."""
    try:
        yield
    except UserError as error:
        message = str(error).removeprefix("model.weights: ")
        raise UserError(message if message.startswith(f"{key}: ") else f"{key}: {message}") from error
