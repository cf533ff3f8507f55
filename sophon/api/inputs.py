"""Convert what a caller from Python hands over into a configuration, domains and checkpoints."""

from __future__ import annotations

import atexit
import copy
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import nn

from sophon import models
from sophon.checkpoint import Checkpoint, is_ours, read_checkpoint
from sophon.config import Config, DomainConfig, ModelConfig
from sophon.config.shipped import STANDARD, USUAL, chosen
from sophon.domains import Domain
from sophon.domains.sources import class_names
from sophon.errors import UserError, one_line
from sophon.files import sha256_file
from sophon.foreign import open_foreign
from sophon.models import AdaptedModel, ModelSpec
from sophon.models.weights import load_state
from sophon.paths import exists
from sophon.validation import from_omegaconf

Data = Any  # a folder, a torch Dataset, arrays, a Hugging Face Dataset, or a `Domain` of one of these
# a module, what describes one, a folder, or a diffusers pipeline
Model = nn.Module | AdaptedModel | Checkpoint | str | PathLike[str] | Any
Choice = str | Mapping[str, Any] | Any  # the name of a shipped file, the path of one's own, or its content


# The keys that a call does not take in another way.
_COMMON = ("task", "amp", "threads", "domain.memory_gb")
_SETTINGS = {"protect": ("method", "sampler", "guard", *_COMMON), "audit": ("attack", "workers", *_COMMON)}


_ARGUMENTS = {"attack": "attacks", "sampler": "attackers"}  # what the calls name a group of the configuration


def domain_of(data: Data, name: str) -> DomainConfig:
    """Return data as a domain, called after its folder if it is one, else ``name``."""
    if isinstance(data, DomainConfig):
        return data
    return Domain(data, name=Path(data).name or name if isinstance(data, str | PathLike) else name)


def domains_by_name(data: Data, name: str) -> dict[str, DomainConfig]:
    """Return one domain, or a list of `Domain`, by name."""
    several = isinstance(data, list) and data and all(isinstance(member, DomainConfig) for member in data)
    domains = [domain_of(member, name) for member in (data if several else [data])]
    if len({domain.name for domain in domains}) < len(domains):
        raise UserError(f"{name}: several domains have the same name; give Domain(..., name=) of each another one")
    return {domain.name: domain for domain in domains}


def checkpoint_of(model: Model, original: DomainConfig, key: str) -> Checkpoint:
    """Return a model as a checkpoint: a copy on the CPU of one in memory, or what lies in a folder.

    Args:
        original: whose classes it tells apart.

    Raises:
        UserError: it is none that sophon understands.
    """
    if isinstance(model, Checkpoint):
        return Checkpoint(copy.deepcopy(model.model), model.spec, model.manifest, model.path, model.sha256)
    if hasattr(model, "save_pretrained") and not isinstance(model, nn.Module):
        model = _written(model, key)
    if isinstance(model, str | PathLike):
        path = Path(model).expanduser()
        if not exists(path, key):
            raise UserError(f"{key}: '{path}' does not exist; give a model, or the folder of a checkpoint")
        if is_ours(path):
            return read_checkpoint(path, key)
        return open_foreign(path, ModelConfig(), class_names(original, "original"), key)
    names = class_names(original, "original")
    if not isinstance(model, AdaptedModel):
        if not isinstance(model, nn.Module):
            raise UserError(f"{key}: a {type(model).__name__} is not allowed; give a torch.nn.Module or a folder")
        model = models.adapt(model, classes=names)
    spec = model.spec
    numbers = range(len(spec.classes))
    unnamed = spec.classes in [tuple(f"{prefix}{number}" for number in numbers) for prefix in ("", "LABEL_")]
    if unnamed and (len(names) == len(numbers) or models.adapter_of(spec).head is None):
        spec = replace(spec, classes=names)
    return in_memory(model.model, spec, {"name": spec.architecture}, key)


def _written(pipeline: Any, key: str) -> str:
    """Write a pipeline into a folder that is there until the process ends; return it."""
    folder = tempfile.mkdtemp(prefix="sophon-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        pipeline.save_pretrained(folder)
    except Exception as error:  # what is none of diffusers' raises what it likes
        raise UserError(f"{key}: a {type(pipeline).__name__} cannot be saved: {one_line(error)}") from error
    return folder


def in_memory(model: nn.Module, spec: ModelSpec, manifest: Mapping[str, Any], key: str) -> Checkpoint:
    """Return a model in memory as a checkpoint that holds a copy of it; its hash is that of the file that it would be.

    Raises:
        UserError: a weight is not finite, or the model takes no plain tensors; the message names ``key``.
    """
    module = copy.deepcopy(model).cpu().eval().requires_grad_(True)  # what its owner froze is trained and attacked, too
    load_state(module, dict(module.state_dict()), key)
    with tempfile.TemporaryDirectory() as folder:
        adapter = models.adapter_of(spec)
        adapter.save(module, Path(folder))
        sha256 = sha256_file(Path(folder) / adapter.weights)
    return Checkpoint(module, spec, dict(manifest), Path(key), spec.sha256(sha256))


def config_of(
    verb: str,
    spec: ModelSpec,
    kind: str,
    original: DomainConfig,
    restricted: Mapping[str, DomainConfig],
    *,
    benign: DomainConfig | None = None,
    choices: Mapping[str, Choice | None],
    settings: Mapping[str, Any] | None,
    facts: Mapping[str, Any],
) -> Config:
    """Compose a run's configuration, as the command line does.

    Args:
        kind: what it is, a key of `sophon.config.shipped.USUAL`, which decides what is not chosen.
        choices: of groups; None for what is usual.
        settings: values by dotted key, which take the place of what was chosen.
        facts: further keys: ``name``, ``seed``, ``device``.

    Raises:
        UserError: a choice, a key or a value is not known or not allowed.
    """
    usual = USUAL[kind] | ({"attack": STANDARD[kind]} if verb == "audit" else {})
    given = {group: usual[group] if choices.get(group) is None else choices[group] for group in usual}
    groups = {group: chosen(group, _plain(choice), _ARGUMENTS.get(group, group)) for group, choice in given.items()}
    domain = {"original": asdict(original), "restricted": {name: asdict(domain) for name, domain in restricted.items()}}
    if benign is not None:
        domain["benign"] = asdict(benign)
    tracking = {"wandb": "disabled", "progress": False}
    composed = OmegaConf.create(
        {"verb": verb, "model": asdict(spec.config()), "domain": domain, "tracking": tracking, **groups, **facts}
    )
    for key, value in (settings or {}).items():
        if not key.startswith(_SETTINGS[verb]):
            raise UserError(f"settings: '{key}' is not allowed; {verb} takes {', '.join(_SETTINGS[verb])}")
        OmegaConf.update(composed, key, _plain(value), merge=False)
    config = from_omegaconf(composed)
    if config.attack.shards > 1:
        raise UserError("attack.shards: a call runs the whole audit; `sophon audit` takes shards")
    config.domain.original, config.domain.restricted, config.domain.benign = original, dict(restricted), benign
    return config


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
