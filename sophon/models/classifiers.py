"""Image classifiers of timm and torchvision: built from a `ModelSpec`, loaded from safetensors, given a fresh head."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from huggingface_hub import hf_hub_download
from torch import Tensor, nn

from sophon.config import ModelConfig
from sophon.errors import UserError, choose
from sophon.models.spec import ModelSpec
from sophon.runs import read_tensors

LIBRARIES = ("timm", "torchvision")
_RESERVED = ("num_classes", "in_chans", "pretrained", "weights", "weights_backbone")
_SHOWN = 3  # as many keys as fit into a message of one line


def spec_from_config(config: ModelConfig, classes: Sequence[str]) -> ModelSpec:
    """Check a model's configuration and complete it.

    Args:
        config: the ``model`` group.
        classes: names of the original domain's classes, in the order of the labels.

    Returns:
        The spec, with ``mean`` and ``std`` of one number a channel.

    Raises:
        UserError: a value is out of range or contradicts another; the message names its key.
    """
    choose("model.library", config.library, LIBRARIES)
    for key in ("image_size", "channels"):
        if getattr(config, key) <= 0:
            raise UserError(f"model.{key}: {getattr(config, key)} is not allowed; give a whole number above 0")
    if config.library == "torchvision" and config.channels != 3:
        raise UserError(f"model.channels: {config.channels} is not allowed with library torchvision; allowed: 3")
    if config.pretrained and config.weights is not None:
        raise UserError(f"model.weights: '{config.weights}' contradicts model.pretrained=true; give one of the two")
    for key in _RESERVED:
        if key in config.model_args:
            raise UserError(f"model.model_args.{key}: set by sophon; not allowed here")
    return ModelSpec(
        library=config.library,
        architecture=config.architecture,
        classes=tuple(classes),
        channels=config.channels,
        image_size=config.image_size,
        mean=_per_channel("mean", config.mean, config.channels),
        std=_per_channel("std", config.std, config.channels),
        model_args=dict(config.model_args),
    )


def _per_channel(key: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    if len(values) not in (1, channels):
        raise UserError(f"model.{key}: {list(values)} has {len(values)} numbers; give 1 or {channels} (model.channels)")
    if not all(math.isfinite(value) and (key == "mean" or value > 0) for value in values):
        allowed = "finite numbers" if key == "mean" else "finite numbers above 0"
        raise UserError(f"model.{key}: {list(values)} is not allowed; give {allowed}")
    return tuple(float(value) for value in values) * (channels if len(values) == 1 else 1)


def build(spec: ModelSpec, *, pretrained: bool = False) -> nn.Module:
    """Build a classifier [B, channels, image_size, image_size] -> logits [B, len(classes)], in channels-last format.

    Args:
        spec: what to build.
        pretrained: start from timm's published weights (downloaded or cached), with a fresh head where the class
            counts differ. Otherwise the weights are random, drawn from torch's global generator.

    Raises:
        UserError: the architecture is unknown or has no single linear classifier, ``model_args`` do not fit it, or
            pretrained weights cannot be had.
    """
    if spec.library == "timm":
        module = _build_timm(spec, pretrained)
    elif pretrained:
        raise UserError(
            "model.pretrained: true is not allowed with library torchvision (it publishes pickles); use timm"
        )
    else:
        module = _build_torchvision(spec)
    head_prefix(module, spec)
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _build_timm(spec: ModelSpec, pretrained: bool) -> nn.Module:
    names = [*timm.list_models(), *timm.list_pretrained()]
    if spec.architecture not in names:
        raise _unknown(spec, names)
    kwargs = {"num_classes": len(spec.classes), "in_chans": spec.channels, **spec.model_args}
    published = timm.get_pretrained_cfg(spec.architecture)
    if published is not None and published.fixed_input_size:
        kwargs.setdefault("img_size", spec.image_size)
    if pretrained:
        overlay = {"file": _download(spec, published and published.hf_hub_id), "custom_load": False}
        kwargs |= {"pretrained": True, "pretrained_cfg_overlay": overlay}
    return _construct(spec, timm.create_model, kwargs)


def _download(spec: ModelSpec, repository: str | None) -> str:
    """Fetch published weights; by ourselves, because timm falls back to a pickle where there is no safetensors file."""
    if not repository:
        raise UserError(f"model.pretrained: timm publishes no weights for '{spec.architecture}'")
    try:
        return hf_hub_download(repository, "model.safetensors")
    except Exception as error:  # network, cache and Hub errors share no base class
        raise UserError(f"model.pretrained: no weights for '{spec.architecture}': {_one_line(error)}") from error


def _build_torchvision(spec: ModelSpec) -> nn.Module:
    # Classifiers only: the registry also lists detectors, which download a backbone unasked.
    names = torchvision.models.list_models(module=torchvision.models)
    if spec.architecture not in names:
        raise _unknown(spec, names)
    kwargs = {"weights": None, "num_classes": len(spec.classes), **spec.model_args}
    return _construct(spec, torchvision.models.get_model, kwargs)


def _construct(spec: ModelSpec, create: Any, kwargs: Mapping[str, Any]) -> nn.Module:
    try:
        return create(spec.architecture, **kwargs)  # type: ignore[no-any-return]
    except Exception as error:  # constructors raise whatever their first misused argument leads to
        arguments = dict(spec.model_args)
        raise UserError(
            f"model.model_args: {arguments} does not fit '{spec.architecture}': {_one_line(error)}"
        ) from error


def _unknown(spec: ModelSpec, names: Iterable[str]) -> UserError:
    close = difflib.get_close_matches(spec.architecture, list(names), n=_SHOWN)
    hint = f"close to it: {', '.join(close)}" if close else "nothing is close to it"
    return UserError(f"model.architecture: '{spec.architecture}' is not known to {spec.library}; {hint}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def head_prefix(module: nn.Module, spec: ModelSpec) -> str:
    """Return the dotted name of the classifier's last layer, such as ``fc`` or ``head.fc.fc2``.

    Raises:
        UserError: the architecture does not end in exactly one linear layer.
    """
    names = _head_names(module)
    if len(names) != 1 or not isinstance(module.get_submodule(names[0]), nn.Linear):
        raise UserError(f"model.architecture: '{spec.architecture}' does not end in one linear layer; choose another")
    return names[0]


def _head_names(module: nn.Module) -> tuple[str, ...]:
    named: str | Sequence[str] | None = (getattr(module, "pretrained_cfg", None) or {}).get("classifier")
    if named:  # timm says which layer it is; distilled transformers have two
        return (named,) if isinstance(named, str) else tuple(named)
    linear = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    return tuple(linear[-1:])


def with_fresh_head(module: nn.Module, spec: ModelSpec, classes: Sequence[str]) -> ModelSpec:
    """Replace, in place, a classifier's last layer by a newly initialised one.

    Only the last layer: timm's ``reset_classifier`` would for some architectures (CAFormer) also throw away hidden
    layers of the head. The initialisation is the one that ``reset_classifier`` gives, ``nn.Linear``'s own, drawn from
    torch's global generator.

    Args:
        module: the model, on any device.
        spec: its spec.
        classes: the new head's classes.

    Returns:
        The spec of the changed model.
    """
    name = head_prefix(module, spec)
    old = module.get_submodule(name)
    assert isinstance(old, nn.Linear)  # head_prefix made sure
    place = {"device": old.weight.device, "dtype": old.weight.dtype}
    new = nn.Linear(old.in_features, len(classes), bias=old.bias is not None, **place)
    module.set_submodule(name, new.train(old.training))
    if hasattr(module, "num_classes"):  # timm's record of it, which config.json is written from
        module.num_classes = len(classes)  # type: ignore[assignment]
    return dataclasses.replace(spec, classes=tuple(classes))


def load_weights(module: nn.Module, path: str | Path, *, key: str = "model.weights") -> None:
    """Load a state dict into a model, all of it.

    Args:
        module: the model, on any device.
        path: a ``.safetensors`` file, or a folder with ``model.safetensors``.
        key: the configuration key that messages name.

    Raises:
        UserError: the file is missing or corrupt, or its names or shapes are not the model's. The model is unchanged.
    """
    path = Path(path)
    path = path / "model.safetensors" if path.is_dir() else path
    tensors, _ = read_tensors(path)
    state = module.state_dict()
    _check_names(f"{key}: {path}", tensors, state)
    wrong = [name for name in state if tensors[name].shape != state[name].shape]
    heads = tuple(f"{name}." for name in _head_names(module))
    if wrong and heads and all(name.startswith(heads) for name in wrong):
        counts = len(tensors[wrong[0]]), len(state[wrong[0]])
        raise UserError(
            f"{key}: {path}: class counts do not match: "
            f"checkpoint has {counts[0]} classes, original domain has {counts[1]}"
        )
    if wrong:
        shapes = [f"{name} {tuple(tensors[name].shape)}, not {tuple(state[name].shape)}" for name in wrong]
        raise UserError(f"{key}: {path} does not fit the model: {_few(shapes)}")
    module.load_state_dict(tensors)


def _check_names(where: str, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    parts = []
    if missing := [name for name in state if name not in tensors]:
        parts.append(f"it lacks {_few(missing)}")
    if unexpected := [name for name in tensors if name not in state]:
        parts.append(f"the model has no {_few(unexpected)}")
    if parts:
        raise UserError(f"{where} does not fit the model: {'; '.join(parts)}")


def _few(names: Sequence[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
