"""The protected checkpoint: a folder that timm, torchvision or diffusers loads without us, and that says what it is."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sophon import __version__, models, paths
from sophon.errors import UserError, choose
from sophon.files import atomic_directory, read_json, sha256_file, write_json, write_text
from sophon.model_card import model_card
from sophon.models import ModelSpec
from sophon.models.weights import require_finite
from sophon.pickles import refuse_pickle

FORMAT_VERSION = 1
_MANIFEST, _CARD = "sophon.json", "README.md"
_PACKAGES = ("torch", "torchvision", "timm", "diffusers", "safetensors", "numpy")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read back and verified.

    Attributes:
        model: the model with its weights, on the CPU, in evaluation mode.
        spec: its architecture and input.
        manifest: what ``sophon.json`` holds.
        path: the checkpoint's folder.
        sha256: of the weights file, or `ModelSpec.sha256` of it.
    """

    model: nn.Module
    spec: ModelSpec
    manifest: dict[str, Any]
    path: Path
    sha256: str


def write_checkpoint(out: str | Path, model: nn.Module, spec: ModelSpec, manifest: Mapping[str, Any]) -> None:
    """Write a checkpoint folder: whole, or not at all.

    Args:
        out: the folder; an older checkpoint in its place is replaced.
        model: what was protected or pretrained, on any device.
        manifest: the run's part of ``sophon.json``, plain JSON data: ``verb``, ``config``, ``method``,
            ``sampler_support``, ``domains``, ``seed``, ``parent_sha256``, ``intactness`` and optionally ``history``
            and ``audits`` (of `sophon.auditing.card.facts`, one for each restricted domain).

    Raises:
        UserError: ``out`` holds something else, a weight is not finite, or the file system refuses.
    """
    out = Path(out)
    if paths.is_folder(out) and paths.entries(out) and not paths.exists(out / _MANIFEST):
        raise UserError(f"out: '{out}' is not empty and holds no sophon checkpoint; give another folder")
    require_finite(model, f"cannot export to {out}")
    adapter = models.adapter_of(spec)
    with atomic_directory(out) as folder:
        adapter.save(model, folder)
        complete = {
            "format_version": FORMAT_VERSION,
            **manifest,
            "model": spec.plain(),
            "versions": package_versions(),
            "weights_sha256": sha256_file(folder / adapter.weights),
        }
        write_json(folder / _MANIFEST, complete)
        write_text(folder / _CARD, model_card(spec, complete))


def package_versions() -> dict[str, str]:
    """Return the versions of Python, sophon and the packages that a result depends on."""
    return {
        "sophon": __version__,
        "python": platform.python_version(),
        **{package: version(package) for package in _PACKAGES},
    }


def is_ours(path: str | Path) -> bool:
    """Say whether sophon exported what lies there: a checkpoint's folder, or a run directory with one."""
    return any(paths.exists(Path(path) / part / _MANIFEST) for part in ("", "checkpoint"))


def read_checkpoint(path: str | Path, key: str = "checkpoint") -> Checkpoint:
    """Read a checkpoint and verify it. Draws nothing from torch's global generator.

    Args:
        path: the checkpoint's folder, or a run directory with ``checkpoint/`` in it.

    Raises:
        UserError: something is missing, corrupt, of another format version, or the weights are not those that were
            exported.
    """
    path = Path(path)
    is_whole = paths.exists(path / _MANIFEST, key)
    if not is_whole and paths.is_folder(path / "checkpoint", key):
        return read_checkpoint(path / "checkpoint", key)
    for file in () if is_whole else paths.entries(path, key) if paths.is_folder(path, key) else (path,):
        refuse_pickle(file, key)
    if not paths.is_folder(path, key):
        raise UserError(f"{key}: '{path}' is not a folder; give a checkpoint that sophon exported")
    _require(path, _MANIFEST, key)
    manifest = read_json(path / _MANIFEST)
    spec = _spec(path, manifest, key)
    adapter = models.adapter_of(spec)
    for name in (adapter.settings, adapter.weights):
        _require(path, name, key)
    weights = path / adapter.weights
    sha256 = sha256_file(weights)
    if sha256 != manifest.get("weights_sha256"):
        raise UserError(f"{key}: '{weights}' is refused; its sha256 is not the one in {_MANIFEST}")
    with torch.random.fork_rng(devices=[]):
        model = models.build(spec)
    adapter.load_weights(model, weights, key=key)
    return Checkpoint(model.eval(), spec, manifest, path, spec.sha256(sha256))


def _require(path: Path, name: str, key: str) -> None:
    if not paths.is_file(path / name, key):
        raise UserError(f"{key}: '{path}' holds no {name}; give a checkpoint that sophon exported")


def _spec(path: Path, manifest: Any, key: str) -> ModelSpec:
    format_version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if format_version != FORMAT_VERSION:
        raise UserError(
            f"{key}: '{path}' is of format version {format_version}; this sophon reads version {FORMAT_VERSION}"
        )
    try:
        fields = dict(manifest["model"])
        sequences = {name: tuple(fields[name]) for name in ("classes", "mean", "std")}
        spec = ModelSpec(**{**fields, **sequences}, folder=str(path))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{key}: '{path / _MANIFEST}' does not describe a model; export it again") from error
    choose(f"{key}: '{path / _MANIFEST}': library", spec.library, models.LIBRARIES)
    return spec
