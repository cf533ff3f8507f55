"""Foreign checkpoints: those that sophon did not make, but their library or their author."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch

from sophon import models, paths
from sophon.config import ModelConfig
from sophon.errors import UserError
from sophon.export import Checkpoint
from sophon.files import sha256_file
from sophon.models import classifiers, pipeline, timm_folder
from sophon.models.weights import find_weights, refuse_pickle

_ALLOWED = "a folder of sophon, timm or diffusers, or a .safetensors state dict"


class _Found(NamedTuple):
    """A foreign checkpoint: what it is in words, what it is built from, and its weights."""

    kind: str
    config: ModelConfig
    weights: Path


def open_foreign(path: str | Path, model: ModelConfig, classes: Sequence[str], key: str = "checkpoint") -> Checkpoint:
    """Open a checkpoint that sophon did not make. Draws nothing from torch's global generator and reads no pickle.

    Args:
        path: a timm folder, whose ``config.json`` names architecture, input and number of classes; a diffusers
            pipeline, which carries its network and noise; or a ``.safetensors`` state dict, of the architecture that
            ``model`` names.
        model: the ``model`` group; what a folder says of itself takes its place.
        classes: names of the original domain's classes, in the order of the labels; a classifier or a conditional
            denoiser must have as many.
        key: the configuration key that messages name.

    Returns:
        The checkpoint. Its manifest has ``foreign`` (true), ``kind``, ``name``, ``model`` and ``weights_sha256``, and
        so neither a method nor a sampler's support.

    Raises:
        UserError: nothing is there, it is a pickle, truncated or not finite, or of another architecture or number of
            classes.
    """
    path = Path(path)
    with _named(key):
        found = _find(path, model, classes)
        config = replace(found.config, pretrained=False, weights=str(path))
        with torch.random.fork_rng(devices=[]):
            module, spec = models.create(config, classes)
        sha256 = sha256_file(found.weights)
    manifest = {
        "foreign": True,
        "kind": found.kind,
        "name": path.name,
        "model": asdict(spec),
        "weights_sha256": sha256,
    }
    return Checkpoint(module.eval(), spec, manifest, path, sha256)


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Let messages begin with the key by which the user named the checkpoint, instead of the one it is passed on by."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {str(error).removeprefix('model.weights: ')}") from error


def _find(path: Path, model: ModelConfig, classes: Sequence[str]) -> _Found:
    if not paths.exists(path):
        raise UserError(f"'{path}' does not exist; give {_ALLOWED}")
    if paths.is_file(path):
        refuse_pickle(path, "model.weights", model.library)
        if path.suffix != ".safetensors":
            raise UserError(f"'{path}' is not a checkpoint; give {_ALLOWED}")
        return _Found("state dict", model, path)
    if paths.is_file(path / pipeline.CONFIG):
        return _Found("diffusers pipeline", pipeline.describe(path, model), pipeline.within(path, pipeline.WEIGHTS))
    if not paths.is_file(path / classifiers.CONFIG):
        raise UserError(
            f"'{path}' holds neither sophon.json nor {classifiers.CONFIG} nor {pipeline.CONFIG}; give {_ALLOWED}"
        )
    weights = find_weights(path, classifiers.WEIGHTS, "model.weights", "timm")
    return _Found("timm folder", timm_folder.describe(path, model, classes), weights)
