"""Image classifiers of timm and torchvision: built from a `ModelSpec`, loaded from safetensors, given a fresh head."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from huggingface_hub import hf_hub_download
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from sophon.config import ModelConfig
from sophon.errors import UserError, one_line
from sophon.files import read_json, write_json
from sophon.models.common import Card, check_input
from sophon.models.partition import Block, partition
from sophon.models.spec import ModelSpec
from sophon.models.weights import find_weights, load_state, read_state
from sophon.tensor_files import write_tensors

LIBRARIES = ("timm", "torchvision")
# what the spec decides, and what would load weights behind its back
RESERVED = (
    *("num_classes", "in_chans", "pretrained", "weights", "weights_backbone"),
    *("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"),
)
_SHOWN = 3  # as many names as fit into a message of one line
WEIGHTS, CONFIG = "model.safetensors", "config.json"
# What timm knows of the architecture's published weights; said of ours it would be false.
_OF_PUBLISHED_WEIGHTS = ("tag", "license", "origin_url", "paper_name", "paper_ids", "description", "notes")


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
    mean, std = check_input(config, RESERVED)
    if config.library == "torchvision" and config.channels != 3:
        raise UserError(f"model.channels: {config.channels} is not allowed with library torchvision; allowed: 3")
    for key in ("scheduler", "class_conditional"):
        if getattr(config, key):
            raise UserError(f"model.{key}: only models of library diffusers have one; leave it out")
    return ModelSpec(
        library=config.library,
        architecture=config.architecture,
        classes=tuple(classes),
        channels=config.channels,
        image_size=config.image_size,
        mean=mean,
        std=std,
        model_args=dict(config.model_args),
    )


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
        raise UserError(f"model.pretrained: no weights for '{spec.architecture}': {one_line(error)}") from error


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
            f"model.model_args: {arguments} does not fit '{spec.architecture}': {one_line(error)}"
        ) from error


def _unknown(spec: ModelSpec, names: Iterable[str]) -> UserError:
    close = difflib.get_close_matches(spec.architecture, list(names), n=_SHOWN)
    hint = f"close to it: {', '.join(close)}" if close else "nothing is close to it"
    return UserError(f"model.architecture: '{spec.architecture}' is not known to {spec.library}; {hint}")


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


def blocks(module: nn.Module, spec: ModelSpec) -> list[Block]:
    """Return the classifier's blocks from input to output, its last layer left out; see `partition`."""
    return partition(module, head_prefix(module, spec))


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


def load_weights(
    module: nn.Module, path: str | Path, *, key: str = "model.weights", library: str = "timm", strip_prefix: str = ""
) -> None:
    """Load a state dict into a model, all of it.

    Args:
        module: the model, on any device.
        path: a ``.safetensors`` file, or a folder with ``model.safetensors``.
        key: the configuration key that messages name.
        library: whose loader a refusal of a pickle shows.
        strip_prefix: taken away from the names in the file.

    Raises:
        UserError: the file is missing, corrupt or a pickle, or its tensors are not the model's. The model is unchanged.
    """
    path = find_weights(Path(path), WEIGHTS, key, library)
    tensors = read_state(path, key, strip_prefix)
    load_state(module, tensors, f"{key}: {path}", explain=partial(_other_classes, module, tensors))


def _other_classes(module: nn.Module, found: Mapping[str, Tensor], wrong: Sequence[str]) -> str | None:
    """Say it plainly when nothing but the number of classes differs."""
    heads = tuple(f"{name}." for name in _head_names(module))
    if not heads or not all(name.startswith(heads) for name in wrong):
        return None
    counts = len(found[wrong[0]]), len(module.state_dict()[wrong[0]])
    return f": class counts do not match: checkpoint has {counts[0]} classes, original domain has {counts[1]}"


def create(config: ModelConfig, classes: Sequence[str]) -> tuple[nn.Module, ModelSpec]:
    """Build what a configuration asks for, with the weights that it names."""
    spec = spec_from_config(config, classes)
    module = build(spec, pretrained=config.pretrained)
    if config.weights is not None:
        load_weights(module, config.weights, library=config.library, strip_prefix=config.strip_prefix)
    return module, spec


def save(folder: Path, module: nn.Module, spec: ModelSpec) -> None:
    """Write weights and ``config.json``: timm's Hub format, or for torchvision the arguments of its ``get_model``."""
    write_tensors(folder / WEIGHTS, module.state_dict())
    preprocessing = {
        "input_size": [spec.channels, spec.image_size, spec.image_size],
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "mean": list(spec.mean),
        "std": list(spec.std),
    }
    path = folder / CONFIG
    if spec.library == "timm":
        save_config_for_hf(module, path, model_config={"label_names": list(spec.classes)}, data_config=preprocessing)
        config = read_json(path)
        for key in _OF_PUBLISHED_WEIGHTS:
            config["pretrained_cfg"].pop(key, None)
    else:
        config = {
            "library": spec.library,
            "architecture": spec.architecture,
            "num_classes": len(spec.classes),
            "label_names": list(spec.classes),
            "model_args": dict(spec.model_args),
            "pretrained_cfg": {key: preprocessing[key] for key in ("mean", "std", "input_size")},
        }
    write_json(path, config)


_TIMM = """\
import timm
import torch

model = timm.create_model("local-dir:PATH", pretrained=True).eval()  # without pretrained=True: random weights"""
_TORCHVISION = """\
import torch
from safetensors.torch import load_file
from torchvision.models import get_model

model = get_model({arguments}).eval()
model.load_state_dict(load_file("PATH/model.safetensors"))"""
_INPUT = """
mean = torch.tensor({mean}).view(1, -1, 1, 1)
std = torch.tensor({std}).view(1, -1, 1, 1)
logits = model((images - mean) / std)  # images: float {shape} in 0..1"""


def card(spec: ModelSpec) -> Card:
    """Return what a model card says of a classifier."""
    mean, std = (json.dumps(list(values)) for values in (spec.mean, spec.std))
    size = f"{spec.image_size}, {spec.image_size}"
    arguments = [json.dumps(spec.architecture), "weights=None", f"num_classes={len(spec.classes)}"]
    arguments += [f"{name}={value!r}" for name, value in spec.model_args.items()]
    loading = _TIMM if spec.library == "timm" else _TORCHVISION.format(arguments=", ".join(arguments))
    return Card(
        pipeline_tag="image-classification",
        kind=f"A classifier of {len(spec.classes)} classes",
        notes=(
            f"Input: {spec.channels} x {size.replace(', ', ' x ')}, scaled to 0..1, then normalised with mean `{mean}` "
            f"and std `{std}`.",
            f"Classes, in the order of the logits: {', '.join(f'`{name}`' for name in spec.classes)}.",
        ),
        loading=loading + _INPUT.format(mean=mean, std=std, shape=f"[B, {spec.channels}, {size}]"),
    )
