"""A diffusers pipeline's folder, and what its parts say: the network's configuration and the noise schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download

from sophon import paths
from sophon.config import ModelConfig
from sophon.errors import UserError, one_line
from sophon.files import read_json
from sophon.models.common import PIPELINE_INDEX, described
from sophon.models.noise import read_schedule

ARCHITECTURE = "UNet2DModel"
PIPELINES = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")
WEIGHTS, CONFIG = "unet/diffusion_pytorch_model.safetensors", PIPELINE_INDEX
UNET, SCHEDULER = "unet/config.json", "scheduler/scheduler_config.json"
FILES = (CONFIG, *(name for path in (WEIGHTS, UNET, SCHEDULER) for name in (path, Path(path).name)))
# what else whole pipelines have in folders of their own, and variants of it that are not read where there is another
WHOLE = (CONFIG, "*/*.json", "*/*.txt", "*/*.safetensors")
VARIANTS = ("*.fp16.*", "*.non_ema.*")
# arguments of the network that the input and the classes decide
RESERVED = ("sample_size", "in_channels", "out_channels", "num_class_embeds", "class_embed_type")
# Models that older diffusers saved, such as google/ddpm-cifar10-32, name the layers of attention otherwise.
_OLDER_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class Pipeline(NamedTuple):
    """What a pipeline's folder says.

    Attributes:
        network: keyword arguments of the network but for ``RESERVED`` ones; ``num_class_embeds`` is there if it has
            classes.
        schedule: every setting of the noise schedule, as `DDPMScheduler` takes them.
        files: the text of the index and of the scheduler's configuration, by their names in the folder.
    """

    network: dict[str, Any]
    schedule: dict[str, Any]
    files: dict[str, str]


def key_of(config: ModelConfig) -> str:
    """Return the configuration key that named the weights to start from."""
    return "model.pretrained" if config.pretrained else "model.weights"


def within(folder: Path, name: str) -> Path:
    """Return where a pipeline keeps a file; older ones of the Hub keep them all beside the index."""
    beside = folder / Path(name).name
    return beside if paths.exists(beside) and not paths.exists(folder / name) else folder / name


def fetch(name: str, patterns: Sequence[str]) -> Path:
    """Fetch files of a Hub id into the cache; return the folder.

    Raises:
        UserError: there is no such id, or no way to the Hub.
    """
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=list(VARIANTS)))
    except Exception as error:  # network, cache and Hub errors share no base class
        raise UserError(f"model.pretrained: no pipeline '{name}': {one_line(error)}") from error


def read_settings(where: str, folder: Path, name: str) -> dict[str, Any]:
    """Read one of a pipeline's JSON files.

    Raises:
        UserError: it is not there or no object; the message begins with ``where``.
    """
    path = within(folder, name)
    if not paths.is_file(path):
        raise UserError(f"{where} holds no {name}; give the folder of a whole diffusers pipeline")
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise UserError(f"{where}: {name} is not a JSON object; give a pipeline that diffusers saved")
    return settings


def network_of(folder: Path) -> str | None:
    """Name the class of the network that a pipeline trains, by its index."""
    index = read_json(folder / CONFIG)
    parts = [index.get(name) for name in ("unet", "transformer")] if isinstance(index, dict) else []
    return next((str(part[1]) for part in parts if isinstance(part, list) and len(part) == 2 and part[1]), None)


def current_name(name: str) -> str:
    """Return the name that a tensor of a network has in today's diffusers."""
    path, _, kind = name.rpartition(".")
    above, _, layer = path.rpartition(".")
    return f"{above}.{_OLDER_NAMES[layer]}.{kind}" if layer in _OLDER_NAMES else name


def describe(folder: Path, config: ModelConfig) -> ModelConfig:
    """Complete a configuration by the pipeline's own input; its network and noise are read with its weights.

    Returns:
        ``config`` with the pipeline's image size and channels.

    Raises:
        UserError: the folder holds no network's configuration, or one without a size in pixels.
    """
    where = f"'{folder}'"
    network = read_settings(where, folder, UNET)
    size, channels = network.get("sample_size"), network.get("in_channels", 3)
    if isinstance(size, list) and len(set(size)) == 1:
        size = size[0]
    if not isinstance(size, int) or not isinstance(channels, int):
        raise UserError(f"{where} takes {channels} channels of {size} pixels; give a pipeline of square images")
    return described_pipeline(config, folder, ARCHITECTURE, size, channels)


def described_pipeline(config: ModelConfig, folder: Path, architecture: str, size: int, channels: int) -> ModelConfig:
    """Complete a configuration by what is known of a pipeline before its network and its noise are read."""
    facts = {"architecture": architecture, "image_size": size, "channels": channels, "weights": str(folder)}
    return described(config, library="diffusers", model_args={}, mean=[0.5], std=[0.5], **facts)


def read_pipeline(folder: Path, config: ModelConfig, classes: int) -> Pipeline:
    """Read what a pipeline says of its network and its noise, and hold it against what is asked for.

    Args:
        config: the ``model`` group, whose image size and channels must be the pipeline's.
        classes: how many classes the original domain has; a conditional network must have as many.

    Raises:
        UserError: the folder is no pipeline of an `ARCHITECTURE` with DDPM's noise, or not of what is asked for.
    """
    where = f"{key_of(config)}: '{folder}'"
    index = read_settings(where, folder, CONFIG)
    _check_index(where, index)
    network = read_settings(where, folder, UNET)
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
    scheduler = read_settings(where, folder, SCHEDULER)
    schedule = read_schedule(f"{where}: {Path(SCHEDULER).name}", index["scheduler"][1], scheduler)
    return Pipeline(settings, schedule, {name: within(folder, name).read_text() for name in (CONFIG, SCHEDULER)})


def _check_index(where: str, index: Mapping[str, Any]) -> None:
    """Refuse a pipeline with other parts, such as an encoder into latents, or another one's way of sampling."""
    if index.get("unet") != ["diffusers", ARCHITECTURE]:
        raise UserError(
            f"{where} has unet {index.get('unet')}; give a pipeline whose unet is diffusers' {ARCHITECTURE}"
        )
    if index.get("_class_name") not in PIPELINES:
        raise UserError(f"{where} is a {index.get('_class_name')}, which is not known; allowed: {', '.join(PIPELINES)}")
    parts = {name: part for name, part in index.items() if isinstance(part, list) and part != [None, None]}
    if parts.keys() != {"unet", "scheduler"} or len(parts["scheduler"]) != 2:
        raise UserError(f"{where} is made of {', '.join(parts)}; give a pipeline of a unet and a scheduler alone")


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
