"""Denoisers: diffusers' `UNet2DModel` with a DDPM noise schedule, built from a `ModelSpec`, kept as a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from huggingface_hub import snapshot_download
from torch import nn

from sophon import paths
from sophon.config import ModelConfig
from sophon.errors import UserError, choose, one_line
from sophon.files import write_text
from sophon.models.common import Card, check_input
from sophon.models.noise import complete_schedule
from sophon.models.partition import Block
from sophon.models.pipeline import (
    ARCHITECTURE,
    CONFIG,
    FILES,
    RESERVED,
    SCHEDULER,
    UNET,
    WEIGHTS,
    key_of,
    read_pipeline,
    within,
)
from sophon.models.spec import ModelSpec
from sophon.models.weights import find_weights, load_state, read_state
from sophon.tensor_files import write_tensors

__all__ = [
    "CONFIG",
    "LIBRARIES",
    "WEIGHTS",
    "blocks",
    "build",
    "card",
    "class_count",
    "create",
    "load_weights",
    "save",
    "spec_from_config",
    "with_fresh_classes",
]

LIBRARIES = ("diffusers",)

# Models that older diffusers saved, such as google/ddpm-cifar10-32, name the layers of attention otherwise.
_OLDER_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def spec_from_config(config: ModelConfig, classes: Sequence[str], start: Path | None = None) -> ModelSpec:
    """Check a denoiser's configuration and complete it.

    Args:
        config: the ``model`` group.
        classes: names of the original domain's classes, in the order of the labels.
        start: the weights to start from. If it is a pipeline's folder, its own network and noise schedule take the
            place of ``model_args`` and ``scheduler``.

    Returns:
        The spec, with every setting of the noise schedule.

    Raises:
        UserError: a value is out of range or contradicts another; the message names its key.
    """
    mean, std = check_input(config, RESERVED)
    if set(mean + std) != {0.5}:
        raise UserError(
            f"model.mean: {list(config.mean)} and std {list(config.std)} are not allowed with library diffusers, whose "
            "pipelines work on -1 .. 1; allowed: 0.5 and 0.5"
        )
    if start is not None and paths.is_folder(start, key_of(config)):
        network, schedule, files = read_pipeline(start, config, len(classes))
    else:
        choose("model.architecture", config.architecture, (ARCHITECTURE,))
        network, files = dict(config.model_args), {}
        schedule = complete_schedule("model.scheduler", config.scheduler)
        if config.class_conditional:
            network["num_class_embeds"] = len(classes)
    spec = ModelSpec(
        library="diffusers",
        architecture=ARCHITECTURE,
        classes=tuple(classes),
        channels=config.channels,
        image_size=config.image_size,
        mean=mean,
        std=std,
        model_args=network,
        scheduler=schedule,
        files=files,
    )
    _try_out(spec)
    return spec


def _try_out(spec: ModelSpec) -> None:
    """Run the network once without numbers: what does not fit together would otherwise show in the first step."""
    # another embedding divides by the timestep, or does not know how many there are
    embedding = spec.model_args.get("time_embedding_type", "positional")
    choose("model.model_args.time_embedding_type", embedding, ("positional",))
    with torch.device("meta"):
        module = build(spec)
        halvings = len(module.down_blocks) - 1  # type: ignore[arg-type]
        if spec.image_size % 2**halvings:
            raise UserError(
                f"model.image_size: {spec.image_size} cannot be halved {halvings} times, as this U-Net does; give a "
                f"multiple of {2**halvings}"
            )
        shape = (1, spec.channels, spec.image_size, spec.image_size)
        label = torch.zeros(1, dtype=torch.int64) if class_count(module) else None
        try:
            module(torch.empty(shape), 0, class_labels=label)
        except Exception as error:  # layers raise whatever their first misused argument leads to
            raise _misfit(spec, error) from error


def _misfit(spec: ModelSpec, error: Exception) -> UserError:
    return UserError(f"model.model_args: {dict(spec.model_args)} does not make a {ARCHITECTURE}: {one_line(error)}")


def _start(config: ModelConfig) -> Path | None:
    """Return the weights to start from: a file or a pipeline's folder; that of a Hub id is fetched into the cache."""
    if not config.pretrained:
        return None if config.weights is None else Path(config.weights)
    if config.architecture == ARCHITECTURE:
        raise UserError(
            f"model.architecture: '{ARCHITECTURE}' has no pretrained weights; with model.pretrained=true give the Hub "
            "id of a pipeline, such as google/ddpm-cifar10-32"
        )
    try:
        return Path(snapshot_download(config.architecture, allow_patterns=list(FILES)))
    except Exception as error:  # network, cache and Hub errors share no base class
        raise UserError(f"model.pretrained: no pipeline '{config.architecture}': {one_line(error)}") from error


def build(spec: ModelSpec) -> nn.Module:
    """Build a denoiser with random weights from torch's global generator.

    Returns:
        A `UNet2DModel`: x_t [B, channels, image_size, image_size] and t [B] to a prediction of x_t's shape.

    Raises:
        UserError: ``model_args`` do not fit the architecture.
    """
    # only here: the network brings peft and with it transformers, which would take a third of every command's start
    from diffusers import UNet2DModel

    own = {"sample_size": spec.image_size, "in_channels": spec.channels, "out_channels": spec.channels}
    try:
        module: nn.Module = UNet2DModel(**own, **spec.model_args)
    except Exception as error:  # constructors raise whatever their first misused argument leads to
        raise _misfit(spec, error) from error
    return module


def create(config: ModelConfig, classes: Sequence[str]) -> tuple[nn.Module, ModelSpec]:
    """Build what a configuration asks for, with the weights that it names."""
    start = _start(config)
    spec = spec_from_config(config, classes, start)
    module = build(spec)
    if start is not None:
        load_weights(module, start, key=key_of(config), strip_prefix=config.strip_prefix)
    return module, spec


def load_weights(module: nn.Module, path: str | Path, *, key: str = "model.weights", strip_prefix: str = "") -> None:
    """Load a denoiser's weights, all of them.

    Args:
        module: the model, on any device.
        path: a ``.safetensors`` file, or a pipeline's folder.
        key: the configuration key that messages name.
        strip_prefix: taken away from the names in the file.

    Raises:
        UserError: the file is missing, corrupt or a pickle, or its tensors are not the model's. The model is unchanged.
    """
    path = Path(path)
    name = str(within(path, WEIGHTS).relative_to(path)) if paths.is_folder(path, key) else WEIGHTS
    path = find_weights(path, name, key, "diffusers")
    tensors = {_current_name(name): tensor for name, tensor in read_state(path, key, strip_prefix).items()}
    load_state(module, tensors, f"{key}: {path}")


def _current_name(name: str) -> str:
    path, _, kind = name.rpartition(".")
    above, _, layer = path.rpartition(".")
    return f"{above}.{_OLDER_NAMES[layer]}.{kind}" if layer in _OLDER_NAMES else name


def save(folder: Path, module: nn.Module, spec: ModelSpec) -> None:
    """Write the pipeline's folder, as `DiffusionPipeline.from_pretrained` loads it."""
    from diffusers import DDPMPipeline  # only here, as the network

    # not by save_pretrained: it neither flushes what it writes nor explains why it could not
    scheduler = DDPMScheduler(**spec.scheduler)
    parts: dict[str, Any] = {
        CONFIG: DDPMPipeline(unet=module, scheduler=scheduler),
        UNET: module,
        SCHEDULER: scheduler,
    }
    for name, part in parts.items():
        write_text(folder / name, spec.files.get(name) or part.to_json_string())
    write_tensors(folder / WEIGHTS, module.state_dict())


def class_count(module: nn.Module) -> int:
    """Return how many classes a denoiser is conditioned on; 0 for an unconditional one."""
    embedding = getattr(module, "class_embedding", None)
    return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else 0


def with_fresh_classes(module: nn.Module, classes: Sequence[str]) -> None:
    """Replace, in place, the class embedding by a newly initialised one, drawn from torch's global generator."""
    old = module.get_submodule("class_embedding")
    assert isinstance(old, nn.Embedding)  # the caller asked class_count
    new = nn.Embedding(len(classes), old.embedding_dim, device=old.weight.device, dtype=old.weight.dtype)
    module.set_submodule("class_embedding", new.train(old.training))
    module.register_to_config(num_class_embeds=len(classes))  # type: ignore[operator]


def blocks(module: nn.Module) -> list[Block]:
    """Return the denoiser's blocks from input to output, its class embedding left out.

    Each down block, the middle and each up block; the layers before them belong to the first, those after to the last.
    """
    down, up = (
        [(f"{name}.{index}",) for index in range(len(module.get_submodule(name)))]  # type: ignore[arg-type]
        for name in ("down_blocks", "up_blocks")
    )
    middle = [] if module.mid_block is None else [("mid_block",)]
    first, *between, last = [*down, *middle, *up]
    return [("conv_in", "time_embedding", *first), *between, (*last, "conv_norm_out", "conv_out")]


_UNCONDITIONAL = """\
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("PATH")
images = pipeline(batch_size=4, num_inference_steps={steps}).images"""
_CONDITIONAL = """\
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("PATH")  # it takes no classes itself: call the network
unet, scheduler = pipeline.unet, pipeline.scheduler
scheduler.set_timesteps({steps})
x, label = torch.randn({shape}) * scheduler.init_noise_sigma, torch.tensor([0])
for t in scheduler.timesteps:
    with torch.no_grad():
        predicted = unet(scheduler.scale_model_input(x, t), t, class_labels=label).sample
    x = scheduler.step(predicted, t, x).prev_sample
images = (x.clamp(-1, 1) + 1) / 2"""


def card(spec: ModelSpec) -> Card:
    """Return what a model card says of a denoiser."""
    shape = (spec.channels, spec.image_size, spec.image_size)
    steps, predicted = spec.scheduler["num_train_timesteps"], spec.scheduler["prediction_type"]
    notes = (
        f"Images: {' x '.join(map(str, shape))}, scaled to -1..1. Noise schedule: {steps} steps; the network predicts "
        f"`{predicted}`.",
    )
    count = spec.model_args.get("num_class_embeds")
    if not count:
        loading = _UNCONDITIONAL.format(steps=steps)
        return Card("unconditional-image-generation", "A denoising diffusion model", notes, loading)
    classes = f"Classes, in the order of the labels: {', '.join(f'`{name}`' for name in spec.classes)}."
    kind = f"A denoising diffusion model conditioned on {count} classes"
    # the Hub has no tag for generation by class
    return Card(
        "unconditional-image-generation",
        kind,
        (*notes, classes),
        _CONDITIONAL.format(shape=(1, *shape), steps=min(50, steps)),
    )
