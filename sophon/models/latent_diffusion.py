"""Latent diffusion: the network of a diffusers pipeline whose autoencoder and text encoders stay as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, Self

from torch import Tensor, nn

from sophon import paths
from sophon.config import ModelConfig
from sophon.errors import UserError, choose, one_line
from sophon.files import write_text
from sophon.models.adapter import ModelAdapter, ModelCard
from sophon.models.common import check_input
from sophon.models.frozen import AUTOENCODERS, TEXT_ENCODERS, FrozenParts, check_part, copy_part, part_sha256
from sophon.models.noise import read_schedule
from sophon.models.partition import Block
from sophon.models.pipeline import CONFIG, SCHEDULER, described_pipeline, key_of, read_settings
from sophon.models.spec import ModelSpec
from sophon.tensor_files import write_tensors

LOADING = """\
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("PATH")
images = pipeline({prompt}, num_inference_steps={steps}).images"""


class TextToImageAdapter(ModelAdapter):
    """The `UNet2DConditionModel` of Stable Diffusion 1.x, 2.x or XL; nothing of it belongs to a domain."""

    library, kind = "diffusers", "denoising"
    settings = CONFIG
    part, network = "unet", "UNet2DConditionModel"
    weights = "unet/diffusion_pytorch_model.safetensors"
    pipelines: tuple[str, ...] = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
    encoders: tuple[int, ...] = (1, 2)
    order: tuple[str, ...] = ("down_blocks", "mid_block", "up_blocks")
    last: tuple[str, ...] = ("conv_norm_out", "conv_out")

    @classmethod
    def from_config(cls, config: ModelConfig, classes: Sequence[str]) -> Self:
        """Check a configuration, whose ``weights`` are a pipeline's folder, and complete it by what lies there."""
        mean, std = check_input(config, ())
        if config.weights is None or not paths.is_folder(config.weights, key_of(config)):
            raise UserError(
                f"model.weights: '{config.weights}' is not allowed with a {cls.network}, which works on latents; give "
                "the folder of its pipeline"
            )
        folder, where = Path(config.weights), f"{key_of(config)}: '{config.weights}'"
        index = read_settings(where, folder, CONFIG)
        cls._check_index(where, index)
        network, size, channels = cls._network(where, folder)
        asked = (config.image_size, config.channels)
        if asked != (size, channels):
            raise UserError(
                f"{where} makes images of {size} pixels and {channels} channels, not {asked[0]}, {asked[1]}"
            )
        frozen = [name for name, part in index.items() if isinstance(part, list) and part != [None, None]]
        frozen = [name for name in frozen if name not in (cls.part, "scheduler")]
        for name in frozen:
            check_part(folder / name, where)
        scheduler = read_settings(where, folder, SCHEDULER)
        schedule = cls._schedule(f"{where}: {Path(SCHEDULER).name}", index["scheduler"][1], scheduler)
        spec = ModelSpec(
            library="diffusers",
            architecture=cls.network,
            classes=tuple(classes),
            channels=channels,
            image_size=size,
            mean=mean,
            std=std,
            model_args=network,
            scheduler=schedule,
            frozen={name: part_sha256(folder / name) for name in frozen},
            files={name: (folder / name).read_text() for name in (CONFIG, SCHEDULER)},
            folder=str(folder),
        )
        adapter = cls(spec)
        adapter._check(where)
        return adapter

    @staticmethod
    def _schedule(where: str, name: str, saved: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the scheduler's saved configuration says of noise."""
        return read_schedule(where, name, saved) | {"clip_sample": False}  # latents may lie outside -1 .. 1

    @classmethod
    def _check_index(cls, where: str, index: Mapping[str, Any]) -> None:
        """Refuse pipelines whose parts are other ones than those known here."""
        choose(f"{where}: pipeline", str(index.get("_class_name")), cls.pipelines)
        if index.get(cls.part) != ["diffusers", cls.network]:
            raise UserError(f"{where} has {cls.part} {index.get(cls.part)}; allowed: diffusers' {cls.network}")
        choose(f"{where}: vae", (index.get("vae") or [None, None])[1], AUTOENCODERS)
        encoders = [name for name in TEXT_ENCODERS if index.get(name) not in (None, [None, None])]
        if len(encoders) not in cls.encoders:
            raise UserError(
                f"{where} has {len(encoders)} text encoders; allowed: {' or '.join(map(str, cls.encoders))}"
            )
        for name in encoders:
            choose(f"{where}: {name}", index[name][1], TEXT_ENCODERS[name])

    @classmethod
    def _network(cls, where: str, folder: Path) -> tuple[dict[str, Any], int, int]:
        """Return the network's arguments, and the size and the channels of the images that the pipeline makes."""
        settings, vae = (read_settings(where, folder, f"{name}/config.json") for name in (cls.part, "vae"))
        network = {name: value for name, value in settings.items() if not name.startswith("_")}
        latent, size = vae.get("latent_channels", 4), network.get("sample_size")
        if not isinstance(size, int):
            raise UserError(f"{where} has {cls.part} with sample_size {size}; give a pipeline of square images")
        if network.get("in_channels", 4) != latent:
            raise UserError(
                f"{where} takes {network.get('in_channels', 4)} channels, but the autoencoder has {latent}; pipelines "
                "for inpainting or editing are not known"
            )
        blocks = vae.get("block_out_channels") or vae["encoder_block_out_channels"]
        return network, size * 2 ** (len(blocks) - 1), vae.get("in_channels", 3)

    def _check(self, where: str) -> None:
        """Refuse a network that does not fit the other parts."""

    @classmethod
    def describe(cls, folder: Path, config: ModelConfig) -> ModelConfig:
        """Complete a configuration by the size of the pipeline's images; the rest is read with its weights."""
        _, size, channels = cls._network(f"'{folder}'", folder)
        return described_pipeline(config, folder, cls.network, size, channels)

    @classmethod
    def recognise(cls, module: nn.Module, **facts: Any) -> NoReturn:
        """Refuse a network without its pipeline."""
        raise UserError(f"a {type(module).__name__} works on latents; give the whole pipeline, or its folder")

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """The shape of a latent."""
        settings = self.spec.model_args
        return settings["in_channels"], settings["sample_size"], settings["sample_size"]

    @cached_property
    def frozen(self) -> FrozenParts:
        """The autoencoder and the text encoders."""
        assert self.spec.folder is not None  # a spec of a pipeline knows its folder
        return FrozenParts(Path(self.spec.folder), self.spec.frozen)

    def start(self, config: ModelConfig) -> nn.Module:
        """Build the network with the pipeline's weights."""
        module = self.fresh()
        self.load_weights(module, Path(str(config.weights)), key=key_of(config), strip_prefix=config.strip_prefix)
        return module

    def fresh(self) -> nn.Module:
        """Build the network with random weights."""
        import diffusers  # only here: it takes seconds

        try:
            return getattr(diffusers, self.network)(**self.spec.model_args)  # type: ignore[no-any-return]
        except Exception as error:  # constructors raise whatever their first misused argument leads to
            raise UserError(
                f"model.model_args: the settings do not make a {self.network}: {one_line(error)}"
            ) from error

    def forward(self, model: nn.Module, inputs: Tensor, **conditions: Tensor) -> Tensor:
        """Return what the network says of latents: noise or velocity, as its scheduler has it; of their shape."""
        added = {name: conditions[name] for name in ("text_embeds", "time_ids") if name in conditions}
        output: Tensor = model(
            inputs,
            conditions["timesteps"],
            encoder_hidden_states=conditions["encoder_hidden_states"],
            added_cond_kwargs=added or None,
            return_dict=False,
        )[0]
        return output

    def blocks(self, model: nn.Module) -> list[Block]:
        """Return each block from input to output; layers before them belong to the first, those after to the last."""
        parts = dict(model.named_children())
        names = []
        for name in (name for name in self.order if name in parts):
            part = parts[name]
            names += [f"{name}.{index}" for index in range(len(part))] if isinstance(part, nn.ModuleList) else [name]
        entry = [name for name in parts if name not in (*self.order, *self.last) and parts[name].state_dict()]
        first, *between, last = names
        return [(*entry, first), *((name,) for name in between), (last, *self.last)]

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the pipeline's folder; all but the network is copied."""
        assert self.spec.folder is not None  # a spec of a pipeline knows its folder
        for name, text in self.spec.files.items():
            write_text(folder / name, text)
        for name in self.spec.frozen:
            copy_part(Path(self.spec.folder) / name, folder / name)
        write_text(folder / self.part / "config.json", model.to_json_string())  # type: ignore[operator]
        write_tensors(folder / self.weights, model.state_dict())

    def card(self) -> ModelCard:
        """Return what a model card says of a pipeline."""
        steps = self.spec.scheduler["num_train_timesteps"]
        loading = LOADING.format(prompt='"a photo of a cat"', steps=min(50, steps - 1))
        return ModelCard("text-to-image", "A text-to-image latent diffusion model", self._notes(), loading)

    def _notes(self) -> tuple[str, ...]:
        spec = self.spec
        steps, predicted = spec.scheduler["num_train_timesteps"], spec.scheduler["prediction_type"]
        shapes = ((spec.channels, spec.image_size, spec.image_size), self.input_shape)
        images, latents = (" x ".join(map(str, shape)) for shape in shapes)
        frozen = ", ".join(f"`{name}`" for name in spec.frozen)
        return (
            f"Images: {images}; latents: {latents}. Noise schedule: {steps} steps; the network predicts `{predicted}`.",
            f"Only the `{self.part}` was trained; released as they were: {frozen}.",
        )
