"""A diffusers pipeline's folder, and what its parts say: the network's configuration and the noise schedule."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.schedulers import KarrasDiffusionSchedulers

from sophon.config import ModelConfig
from sophon.errors import UserError, choose
from sophon.models.common import one_line
from sophon.runs import read_json

ARCHITECTURE = "UNet2DModel"
WEIGHTS, CONFIG = "unet/diffusion_pytorch_model.safetensors", "model_index.json"
UNET, SCHEDULER = "unet/config.json", "scheduler/scheduler_config.json"
FILES = (CONFIG, *(name for path in (WEIGHTS, UNET, SCHEDULER) for name in (path, Path(path).name)))
# arguments of the network that the input and the classes decide
RESERVED = ("sample_size", "in_channels", "out_channels", "num_class_embeds", "class_embed_type")

# The settings of a noise schedule with their defaults, and those that are a choice among names.
_SETTINGS = {name: part.default for name, part in inspect.signature(DDPMScheduler).parameters.items()}
_CHOICES = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("linspace", "leading", "trailing"),
    # a learned variance would be a second output of the network
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}


def key_of(config: ModelConfig) -> str:
    """Return the configuration key that named the weights to start from."""
    return "model.pretrained" if config.pretrained else "model.weights"


def within(folder: Path, name: str) -> Path:
    """Return where a pipeline keeps a file; older ones of the Hub keep them all beside the index."""
    beside = folder / Path(name).name
    return beside if beside.exists() and not (folder / name).exists() else folder / name


def describe(folder: Path, config: ModelConfig) -> ModelConfig:
    """Complete a configuration by the pipeline's own input; its network and noise are read with its weights.

    Args:
        folder: the pipeline's.
        config: the ``model`` group.

    Returns:
        ``config`` with the pipeline's image size and channels.

    Raises:
        UserError: the folder holds no network's configuration, or one without a size in pixels.
    """
    where = f"'{folder}'"
    network = _read_settings(where, within(folder, UNET))
    size, channels = network.get("sample_size"), network.get("in_channels", 3)
    if isinstance(size, list) and len(set(size)) == 1:
        size = size[0]
    if not isinstance(size, int) or not isinstance(channels, int):
        raise UserError(f"{where} takes {channels} channels of {size} pixels; give a pipeline of square images")
    return replace(
        config,
        library="diffusers",
        architecture=ARCHITECTURE,
        model_args={},
        image_size=size,
        channels=channels,
        mean=[0.5],
        std=[0.5],
        scheduler={},
        class_conditional=False,
        pretrained=False,
        weights=str(folder),
    )


def read_pipeline(folder: Path, config: ModelConfig, classes: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what a pipeline says of its network and its noise, and hold it against what is asked for.

    Args:
        folder: the pipeline's.
        config: the ``model`` group, whose image size and channels must be the pipeline's.
        classes: how many classes the original domain has; a conditional network must have as many.

    Returns:
        The network's keyword arguments but for ``RESERVED`` ones (``num_class_embeds`` is there if it is conditional),
        and every setting of the noise schedule.

    Raises:
        UserError: the folder is no pipeline of an `ARCHITECTURE` with DDPM's noise, or not of what is asked for.
    """
    where = f"{key_of(config)}: '{folder}'"
    unet = _read_settings(where, folder / CONFIG).get("unet")
    if unet != ["diffusers", ARCHITECTURE]:
        raise UserError(f"{where} has unet {unet}; give a pipeline whose unet is diffusers' {ARCHITECTURE}")
    network = _read_settings(where, within(folder, UNET))
    size = network.get("sample_size")
    channels = network.get("in_channels", 3), network.get("out_channels", 3)
    if channels != (config.channels,) * 2 or size not in (config.image_size, [config.image_size] * 2):
        raise UserError(
            f"{where} takes {channels[0]} channels of {size} pixels and gives {channels[1]}, not model.channels="
            f"{config.channels} of model.image_size={config.image_size}; set these two to its own"
        )
    _check_classes(where, network, config, classes)
    settings = {name: value for name, value in network.items() if not name.startswith("_") and name not in RESERVED}
    if network.get("num_class_embeds"):
        settings["num_class_embeds"] = classes
    return settings, _read_schedule(where, within(folder, SCHEDULER))


def _check_classes(where: str, network: Mapping[str, Any], config: ModelConfig, classes: int) -> None:
    embedded, kind = network.get("num_class_embeds"), network.get("class_embed_type")
    if kind is not None:
        raise UserError(f"{where} has class_embed_type '{kind}'; classes are allowed by num_class_embeds only")
    if embedded and embedded != classes:
        raise UserError(
            f"{where}: class counts do not match: pipeline has {embedded} classes, original domain has {classes}"
        )
    if config.class_conditional and not embedded:
        raise UserError(f"model.class_conditional: true, but {where} has no classes; leave it out")


def _read_schedule(where: str, path: Path) -> dict[str, Any]:
    """Read the noise schedule out of a scheduler's settings: DDPM's, or those of another sampler of the same noise."""
    found = _read_settings(where, path)
    name = found.get("_class_name")
    if name not in KarrasDiffusionSchedulers.__members__:
        raise UserError(f"{where} has a scheduler {name}, whose noise is not that of DDPM; give another pipeline")
    known = {key: value for key, value in found.items() if key in _SETTINGS and value is not None}
    return complete_schedule(f"{where}: {path.name}", known)


def _read_settings(where: str, path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"{where} holds no {path.name}; give the folder of a diffusers pipeline, or a .safetensors file"
        )
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise UserError(f"{where}: {path.name} is not a JSON object; give a pipeline that diffusers saved")
    return settings


def complete_schedule(key: str, schedule: Mapping[str, Any]) -> dict[str, Any]:
    """Check a noise schedule and add the defaults to it, so that a checkpoint does not depend on them.

    Args:
        key: what messages begin with.
        schedule: keyword arguments of `DDPMScheduler`.

    Raises:
        UserError: a setting is not known or out of range, or together they do not lead from images to noise.
    """
    for name, value in schedule.items():
        _check_setting(key, name, value)
    try:
        with torch.device("cpu"):  # whatever the caller's default is
            scheduler = DDPMScheduler(**schedule)
    except Exception as error:  # whatever the first misused setting leads to
        raise UserError(f"{key}: {dict(schedule)} does not make a noise schedule: {one_line(error)}") from error
    steps, kept = scheduler.config.num_train_timesteps, scheduler.alphas_cumprod
    # where nothing of the image is kept, x_0 does not follow from the noise
    possible = kept > 0 if scheduler.config.prediction_type == "epsilon" else kept >= 0
    if steps < 1 or len(kept) != steps or not (possible & (kept < 1)).all():
        raise UserError(
            f"{key}: {dict(schedule)} is no noise schedule; its betas must be num_train_timesteps numbers between 0 "
            "and 1, and with prediction_type epsilon leave a part of the image to the end"
        )
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_") and value is not None}


def _check_setting(key: str, name: str, value: Any) -> None:
    choose(key, name, _SETTINGS)
    default = _SETTINGS[name]
    if name in _CHOICES:
        choose(f"{key}.{name}", value, _CHOICES[name])
    elif default is not None and type(value) is not type(default) and (type(default), type(value)) != (float, int):
        raise UserError(f"{key}.{name}: {value!r} is not allowed; give a {type(default).__name__} such as {default}")
