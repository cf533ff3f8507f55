"""A timm folder (``config.json`` and ``model.safetensors``): what it says of the model that its weights make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from timm.models import get_model_args

from sophon.config import ModelConfig
from sophon.errors import UserError, choose
from sophon.files import read_json
from sophon.models.classifiers import CONFIG, LIBRARIES, RESERVED, build, spec_from_config


def describe(folder: Path, config: ModelConfig, classes: Sequence[str]) -> ModelConfig:
    """Complete a configuration by what the folder says, as ``timm.create_model("local-dir:...")`` would read it.

    Args:
        folder: as timm's ``save_for_hf`` writes it.
        config: the ``model`` group. Only the tag of an architecture is taken from it, which timm does not write down.
        classes: names of the original domain's classes, in the order of the labels.

    Returns:
        ``config`` with the folder's library, architecture and its arguments, image size, channels, mean and std.

    Raises:
        UserError: ``config.json`` is missing or not timm's, or the classes are not the original domain's.
    """
    settings = read_json(folder / CONFIG)
    try:
        library, architecture = settings.get("library", "timm"), str(settings["architecture"])
        published = settings.get("pretrained_cfg", settings)  # older versions of timm keep everything on one level
        channels, height, width = map(int, published["input_size"])
        mean, std = (_per_channel(published[name], channels) for name in ("mean", "std"))
        arguments = dict(settings.get("model_args") or {})
        count = int(settings.get("num_classes", published.get("num_classes", len(classes))))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"'{folder / CONFIG}' is not timm's; it must name the architecture and, in "
            "pretrained_cfg, input_size, mean and std"
        ) from error
    choose(f"'{folder / CONFIG}': library", library, LIBRARIES)
    if height != width:
        raise UserError(f"'{folder}' takes images of {height} x {width} pixels; only square ones are made here")
    if count != len(classes):
        raise UserError(
            f"'{folder}': class counts do not match: checkpoint has {count} classes, original domain has {len(classes)}"
        )
    _check_order(folder, settings.get("label_names", published.get("label_names")), classes)
    described = replace(
        config,
        library=library,
        architecture=config.architecture if config.architecture.split(".")[0] == architecture else architecture,
        model_args={name: value for name, value in arguments.items() if name not in RESERVED},
        image_size=height,
        channels=channels,
        mean=mean,
        std=std,
        scheduler={},
        class_conditional=False,
        pretrained=False,
        weights=None,
    )
    return _without_restatements(described, classes) if library == "timm" else described


def _per_channel(values: Sequence[float], channels: int) -> list[float]:
    numbers = [float(value) for value in values]
    if channels == 1:
        return [fmean(numbers)]  # as timm does with the statistics of colours
    return numbers


def _check_order(folder: Path, names: Any, classes: Sequence[str]) -> None:
    """Refuse what would otherwise be measured as damage: the right classes in another order."""
    if isinstance(names, list) and names != list(classes) and sorted(map(str, names)) == sorted(classes):
        raise UserError(
            f"'{folder}' has the original domain's classes in another order ({', '.join(names[:3])}, ...); list them "
            "like that in domain.original.classes"
        )


def _without_restatements(config: ModelConfig, classes: Sequence[str]) -> ModelConfig:
    """Leave out the arguments that timm writes down although nobody chose them.

    Without them, the same architecture has the same spec, whether sophon or timm wrote its checkpoint.
    """
    restated = ("global_pool", "img_size")
    fewer = {name: value for name, value in config.model_args.items() if name not in restated}
    with torch.device("meta"):
        module = build(spec_from_config(replace(config, model_args=fewer), classes))
    written = _plain(get_model_args(module))
    same = all(written.get(name) == _plain(config.model_args).get(name, written.get(name)) for name in restated)
    return replace(config, model_args=fewer) if same else config


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}
