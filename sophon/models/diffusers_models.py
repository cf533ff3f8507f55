"""Denoisers: diffusers' `UNet2DModel` with a DDPM noise schedule, kept as a pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from sophon import paths
from sophon.config import ModelConfig
from sophon.errors import UserError, choose, one_line
from sophon.files import write_text
from sophon.models import pipeline
from sophon.models.adapter import ModelAdapter, ModelCard
from sophon.models.common import check_input
from sophon.models.noise import complete_schedule, read_schedule
from sophon.models.partition import Block
from sophon.models.spec import ModelSpec
from sophon.models.weights import find_weights, load_state, read_state
from sophon.tensor_files import write_tensors

_HEAD = "class_embedding"
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


class DiffusersAdapter(ModelAdapter):
    """A denoiser of diffusers; its class embedding, if it has one, is all that belongs to a domain."""

    library, kind = "diffusers", "denoising"
    weights, settings = pipeline.WEIGHTS, pipeline.CONFIG

    def __init__(self, spec: ModelSpec, start: Path | None = None) -> None:
        super().__init__(spec)
        self._start = start  # the weights that a configuration names, fetched

    @classmethod
    def from_config(cls, config: ModelConfig, classes: Sequence[str]) -> Self:
        """Check a denoiser's configuration and complete it.

        If its weights are a pipeline's folder, that one's network and noise schedule take the place of ``model_args``
        and ``scheduler``.
        """
        mean, std = check_input(config, pipeline.RESERVED)
        if set(mean + std) != {0.5}:
            raise UserError(
                f"model.mean: {list(mean)} and std {list(std)} are not allowed with library diffusers, "
                "whose pipelines work on -1 .. 1; allowed: 0.5 and 0.5"
            )
        if config.head:
            raise UserError(f"model.head: '{config.head}' is not allowed with library diffusers; leave it out")
        start = _start(config)
        files: dict[str, str] = {}
        if start is not None and paths.is_folder(start, pipeline.key_of(config)):
            network, schedule, files = pipeline.read_pipeline(start, config, len(classes))
        else:
            choose("model.architecture", config.architecture, (pipeline.ARCHITECTURE,))
            network, schedule = dict(config.model_args), complete_schedule("model.scheduler", config.scheduler)
            if config.class_conditional:
                network["num_class_embeds"] = len(classes)
        adapter = cls(
            ModelSpec(
                library="diffusers",
                architecture=pipeline.ARCHITECTURE,
                classes=tuple(classes),
                channels=config.channels,
                image_size=config.image_size,
                mean=mean,
                std=std,
                model_args=network,
                scheduler=schedule,
                files=files,
            ),
            start,
        )
        settings = adapter._try_out()
        return cls(replace(adapter.spec, model_args=settings), start)

    def _try_out(self) -> dict[str, Any]:
        """Run the network once without numbers: what does not fit together would otherwise show in the first step.

        Returns:
            Every setting of the network, so that its spec does not depend on who wrote them down.
        """
        spec = self.spec
        # another embedding divides by the timestep, or does not know how many there are
        embedding = spec.model_args.get("time_embedding_type", "positional")
        choose("model.model_args.time_embedding_type", embedding, ("positional",))
        with torch.device("meta"):
            module = self.fresh()
            halvings = len(module.down_blocks) - 1  # type: ignore[arg-type]
            if spec.image_size % 2**halvings:
                raise UserError(
                    f"model.image_size: {spec.image_size} cannot be halved {halvings} times, as this U-Net does; give "
                    f"a multiple of {2**halvings}"
                )
            images = torch.empty(1, spec.channels, spec.image_size, spec.image_size)
            zero = torch.zeros(1, dtype=torch.int64)
            try:
                self.forward(module, images, timesteps=zero, labels=zero)
            except Exception as error:  # layers raise whatever their first misused argument leads to
                raise self._misfit(error) from error
        return _settings(module)

    def _misfit(self, error: Exception) -> UserError:
        spec, reason = self.spec, one_line(error)
        return UserError(f"model.model_args: {dict(spec.model_args)} does not make a {spec.architecture}: {reason}")

    @classmethod
    def describe(cls, folder: Path, config: ModelConfig) -> ModelConfig:
        """Complete a configuration by the pipeline's own input; its network and noise are read with its weights."""
        return pipeline.describe(folder, config)

    @classmethod
    def recognise(cls, module: nn.Module, **facts: Any) -> ModelSpec | None:
        """Return the spec of a `UNet2DModel`, whose noise ``scheduler`` says: one of diffusers', or its settings."""
        from diffusers import UNet2DModel

        if not isinstance(module, UNet2DModel):
            return None
        scheduler = facts.pop("scheduler", None)
        if scheduler is None:
            raise UserError("scheduler: needed with a U-Net; give the scheduler of its pipeline")
        if not isinstance(scheduler, dict):
            scheduler = read_schedule("scheduler", type(scheduler).__name__, dict(scheduler.config))
        settings = module.config
        count = settings["num_class_embeds"]
        classes = facts.pop("classes", None) or tuple(map(str, range(count or 1)))
        config = ModelConfig(
            library="diffusers",
            architecture=pipeline.ARCHITECTURE,
            model_args={name: value for name, value in _settings(module).items() if name != "num_class_embeds"},
            channels=settings["in_channels"],
            image_size=settings["sample_size"],
            scheduler=scheduler,
            class_conditional=bool(count),
        )
        return cls.from_config(replace(config, **facts), classes).spec

    @property
    def head(self) -> str | None:
        """The class embedding; None for a network without classes."""
        return _HEAD if self.spec.model_args.get("num_class_embeds") else None

    def start(self, config: ModelConfig) -> nn.Module:
        """Build the denoiser with the weights of a file or of a pipeline, if there are any."""
        module = self.fresh()
        if self._start is not None:
            self.load_weights(module, self._start, key=pipeline.key_of(config), strip_prefix=config.strip_prefix)
        return module

    def fresh(self) -> nn.Module:
        """Build a `UNet2DModel`: x_t [B, channels, image_size, image_size] and t [B] to a prediction of x_t's shape."""
        # only here: the network brings peft and with it transformers, which would take a third of every command's start
        from diffusers import UNet2DModel

        spec = self.spec
        own = {"sample_size": spec.image_size, "in_channels": spec.channels, "out_channels": spec.channels}
        try:
            module: nn.Module = UNet2DModel(**own, **spec.model_args)
        except Exception as error:  # constructors raise whatever their first misused argument leads to
            raise self._misfit(error) from error
        return module

    def forward(self, model: nn.Module, inputs: Tensor, **conditions: Tensor) -> Tensor:
        """Return what the network says: noise, velocity or clean images, as its scheduler has it; [B, C, H, W]."""
        told = {"class_labels": conditions["labels"]} if self.head else {}
        output: Tensor = model(inputs, conditions["timesteps"], return_dict=False, **told)[0]
        return output

    def blocks(self, model: nn.Module) -> list[Block]:
        """Return each down block, the middle and each up block.

        The layers before them belong to the first, those after to the last.
        """
        down, up = (
            [(f"{name}.{index}",) for index in range(len(model.get_submodule(name)))]  # type: ignore[arg-type]
            for name in ("down_blocks", "up_blocks")
        )
        middle = [] if model.mid_block is None else [("mid_block",)]
        first, *between, last = [*down, *middle, *up]
        return [("conv_in", "time_embedding", *first), *between, (*last, "conv_norm_out", "conv_out")]

    def classes_in(self, model: nn.Module) -> int | None:
        """Return how many classes a model's head has; None if it has no head."""
        head = dict(model.named_modules()).get(_HEAD)
        return head.num_embeddings if isinstance(head, nn.Embedding) else None

    def start_head(self, model: nn.Module, classes: Sequence[str]) -> None:
        """Replace the class embedding by a newly initialised one."""
        old = model.get_submodule(_HEAD)
        assert isinstance(old, nn.Embedding)  # the task asked whether there is a head
        new = nn.Embedding(len(classes), old.embedding_dim, device=old.weight.device, dtype=old.weight.dtype)
        model.set_submodule(_HEAD, new.train(old.training))
        model.register_to_config(num_class_embeds=len(classes))  # type: ignore[operator]

    @classmethod
    def weights_in(cls, path: Path, key: str = "model.weights") -> Path:
        """Return the safetensors file that a path is or, if it is a folder, has."""
        inside = pipeline.within(path, cls.weights) if paths.is_folder(path, key) else path
        return find_weights(path, str(inside.relative_to(path)), key, cls.library)

    def load_weights(self, model: nn.Module, path: Path, *, key: str, strip_prefix: str = "") -> None:
        """Load a denoiser's weights from a ``.safetensors`` file or a pipeline's folder."""
        path = self.weights_in(path, key)
        tensors = {pipeline.current_name(name): tensor for name, tensor in read_state(path, key, strip_prefix).items()}
        load_state(model, tensors, f"{key}: {path}")

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the pipeline's folder, as `DiffusionPipeline.from_pretrained` loads it."""
        from diffusers import DDPMPipeline  # only here, as the network

        # not by save_pretrained: it neither flushes what it writes nor explains why it could not
        scheduler = DDPMScheduler(**self.spec.scheduler)
        parts: dict[str, Any] = {
            pipeline.CONFIG: DDPMPipeline(unet=model, scheduler=scheduler),
            pipeline.UNET: model,
            pipeline.SCHEDULER: scheduler,
        }
        for name, part in parts.items():
            write_text(folder / name, self.spec.files.get(name) or part.to_json_string())
        write_tensors(folder / pipeline.WEIGHTS, model.state_dict())

    def card(self) -> ModelCard:
        """Return what a model card says of a denoiser."""
        spec = self.spec
        shape = (spec.channels, spec.image_size, spec.image_size)
        steps, predicted = spec.scheduler["num_train_timesteps"], spec.scheduler["prediction_type"]
        notes = (
            f"Images: {' x '.join(map(str, shape))}, scaled to -1..1. Noise schedule: {steps} steps; the network "
            f"predicts `{predicted}`.",
        )
        count = spec.model_args.get("num_class_embeds")
        if not count:
            loading = _UNCONDITIONAL.format(steps=steps)
            return ModelCard("unconditional-image-generation", "A denoising diffusion model", notes, loading)
        classes = f"Classes, in the order of the labels: {', '.join(f'`{name}`' for name in spec.classes)}."
        kind = f"A denoising diffusion model conditioned on {count} classes"
        # the Hub has no tag for generation by class
        return ModelCard(
            "unconditional-image-generation",
            kind,
            (*notes, classes),
            _CONDITIONAL.format(shape=(1, *shape), steps=min(50, steps)),
        )


def _settings(module: nn.Module) -> dict[str, Any]:
    """Return a network's own settings as plain data; ``num_class_embeds`` is there if it has classes."""
    config: Mapping[str, Any] = module.config  # type: ignore[assignment]
    own = {name for name in config if not name.startswith("_") and name not in pipeline.RESERVED}
    if config["num_class_embeds"]:
        own.add("num_class_embeds")
    return {name: list(value) if isinstance(value, tuple) else value for name, value in config.items() if name in own}


def _start(config: ModelConfig) -> Path | None:
    """Return the weights to start from: a file or a pipeline's folder; that of a Hub id is fetched into the cache."""
    if not config.pretrained:
        return None if config.weights is None else Path(config.weights)
    if config.architecture == pipeline.ARCHITECTURE:
        raise UserError(
            f"model.architecture: '{pipeline.ARCHITECTURE}' has no pretrained weights; with model.pretrained=true give "
            "the Hub id of a pipeline, such as google/ddpm-cifar10-32"
        )
    return pipeline.fetch(config.architecture, pipeline.FILES)
