"""Image classifiers of transformers (ViT, DeiT, ConvNeXt, Swin, ...), kept as its ``save_pretrained`` writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from sophon import paths
from sophon.config import ModelConfig
from sophon.errors import UserError
from sophon.files import read_json, write_text
from sophon.models.classifier import ClassifierAdapter, square
from sophon.models.common import described, imported, misfit, quiet, require
from sophon.models.spec import ModelSpec
from sophon.models.weights import check_values, load_state, read_state

PROCESSOR = "preprocessor_config.json"
_KIND = "ForImageClassification"
_LOADING = """\
import torch
from transformers import AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("PATH").eval()  # and AutoImageProcessor to prepare images"""


class TransformersAdapter(ClassifierAdapter):
    """An image classifier of transformers; ``model_args`` are its configuration, ``model_type`` among them."""

    library = "transformers"
    reserved = (
        *("num_labels", "id2label", "label2id", "num_channels", "image_size"),
        *("architectures", "dtype", "torch_dtype", "transformers_version", "quantization_config"),
    )
    call = "model((images - mean) / std).logits"

    @classmethod
    def from_config(cls, config: ModelConfig, classes: Sequence[str]) -> Self:
        """Check a configuration: ``architecture`` is a class such as ``ViTForImageClassification``."""
        transformers = imported()
        if not config.architecture.endswith(_KIND) or not hasattr(transformers, config.architecture):
            raise UserError(
                f"model.architecture: '{config.architecture}' is not an image classifier of transformers; give a class "
                f"such as ViT{_KIND}"
            )
        if config.pretrained:
            raise UserError("model.pretrained: not allowed with library transformers; give a folder as model.weights")
        adapter = super().from_config(config, classes)
        every = adapter.settings_of().to_diff_dict()  # so that a spec does not depend on who wrote the settings down
        arguments = {name: value for name, value in every.items() if name not in cls.reserved}
        files = {}
        if config.weights is not None and paths.is_file(processor := Path(config.weights) / PROCESSOR):
            files = {PROCESSOR: processor.read_text()}
        return cls(replace(adapter.spec, model_args=arguments, files=files))

    @classmethod
    def describe(cls, folder: Path, config: ModelConfig) -> ModelConfig:
        """Complete a configuration by ``config.json`` and ``preprocessor_config.json``."""
        settings = read_json(folder / cls.settings)
        named = settings.get("architectures") or [None]
        if not str(named[0]).endswith(_KIND):
            raise UserError(f"'{folder}' holds a {named[0]}; give an image classifier, such as a ViT{_KIND}")
        facts = _preprocessing(folder) | {"channels": settings.get("num_channels", 3)}
        facts.setdefault("image_size", settings.get("image_size"))
        size = facts["image_size"]
        if isinstance(size, list | tuple) and len(size) == 2:
            size = square(folder, *size)
        if not isinstance(size, int):
            raise UserError(f"'{folder}' does not say how large its images are; add size to its {PROCESSOR}")
        arguments = {name: value for name, value in settings.items() if name not in cls.reserved}
        facts |= {"architecture": named[0], "model_args": arguments, "image_size": size}
        return described(config, library=cls.library, head=None, **facts)

    @classmethod
    def recognise(cls, module: nn.Module, **facts: Any) -> ModelSpec | None:
        """Return the spec of an image classifier of transformers; it does not know its images' mean and std."""
        name, settings = type(module).__name__, getattr(module, "config", None)
        if not type(module).__module__.startswith("transformers.") or not name.endswith(_KIND):
            return None
        require(facts, "mean", "std")
        written = settings.to_diff_dict()  # type: ignore[union-attr]
        config = ModelConfig(
            library=cls.library,
            architecture=name,
            model_args={key: value for key, value in written.items() if key not in cls.reserved},
            channels=getattr(settings, "num_channels", 3),
            image_size=getattr(settings, "image_size", 224),
        )
        classes = facts.pop("classes", None) or tuple(_labels(settings.id2label))  # type: ignore[union-attr]
        return cls.from_config(replace(config, **facts), classes).spec

    @classmethod
    def class_names(cls, folder: Path) -> Any:
        """Return the labels that a folder lists, unless they are only numbered."""
        names = _labels(read_json(folder / cls.settings).get("id2label") or {})
        return None if all(name.startswith("LABEL_") for name in names) else names

    def settings_of(self) -> Any:
        """Return the configuration object of the model."""
        spec, transformers = self.spec, imported()
        kinds = dict(spec.model_args)
        try:
            settings = transformers.AutoConfig.for_model(kinds.pop("model_type", ""), **kinds)
        except Exception as error:  # whatever the first misused setting leads to
            raise misfit(spec, error) from error
        settings.id2label = dict(enumerate(spec.classes))
        settings.label2id = {name: index for index, name in enumerate(spec.classes)}
        settings.architectures = [spec.architecture]
        settings.num_channels = spec.channels
        if hasattr(settings, "image_size"):
            settings.image_size = spec.image_size
        return settings

    def built(self, *, pretrained: bool = False) -> nn.Module:
        """Build the model with random weights.

        Raises:
            UserError: ``model_args`` are not a configuration of the architecture.
        """
        settings = self.settings_of()
        try:
            return getattr(imported(), self.spec.architecture)(settings)  # type: ignore[no-any-return]
        except Exception as error:  # constructors raise whatever their first misused argument leads to
            raise misfit(self.spec, error) from error

    def forward(self, model: nn.Module, inputs: Tensor, **conditions: Tensor) -> Tensor:
        """Return logits [B, classes]."""
        return model(pixel_values=inputs, return_dict=True).logits  # type: ignore[no-any-return]

    def start_head(self, model: nn.Module, classes: Sequence[str]) -> None:
        """Replace the last layer, and the labels in the model's own configuration."""
        super().start_head(model, classes)
        model.config.id2label = dict(enumerate(classes))  # type: ignore[union-attr]
        model.config.label2id = {name: index for index, name in enumerate(classes)}  # type: ignore[union-attr]

    def load_weights(self, model: nn.Module, path: Path, *, key: str, strip_prefix: str = "") -> None:
        """Load a state dict under the names of the file format or of the model, which differ since transformers 5."""
        path = self.weights_in(path, key)
        tensors = read_state(path, key, strip_prefix)
        check_values(tensors, f"{key}: {path}")
        renamed = self._renamed(tensors)
        load_state(
            model, renamed, f"{key}: {path}", model=self.name, explain=partial(self._other_classes, model, renamed)
        )

    def _renamed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Let transformers give the tensors their names in the model; what it cannot place stays as it is."""
        build = getattr(imported(), self.spec.architecture)
        with torch.random.fork_rng(devices=[]), quiet():
            loaded, report = build.from_pretrained(
                None,
                config=self.settings_of(),
                state_dict=dict(tensors),
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                dtype=torch.float32,
            )
        state = {name: part for name, part in loaded.state_dict().items() if name not in report["missing_keys"]}
        state |= {name: torch.empty(shape, device="meta") for name, shape, _ in report["mismatched_keys"]}
        return state | {name: tensors.get(name, torch.empty(0)) for name in report["unexpected_keys"]}

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write what ``from_pretrained`` reads, and what prepares its images."""
        with quiet():
            model.save_pretrained(folder, max_shard_size="1TB")  # type: ignore[operator]
        write_text(folder / PROCESSOR, self.spec.files.get(PROCESSOR) or json.dumps(self._processor(), indent=2) + "\n")

    def _processor(self) -> dict[str, Any]:
        spec = self.spec
        return {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": spec.image_size, "width": spec.image_size},
            "resample": 2,  # bilinear
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(spec.mean),
            "image_std": list(spec.std),
        }

    def loading(self) -> str:
        """Return the lines that load it in transformers."""
        return _LOADING


def _labels(names: Mapping[Any, str]) -> list[str]:
    return [names[key] for key in sorted(names, key=int)]


def _preprocessing(folder: Path) -> dict[str, Any]:
    """Return what a folder's processor says of size, mean and std; nothing where there is none."""
    path = folder / PROCESSOR
    if not paths.is_file(path):
        raise UserError(
            f"'{folder}' holds no {PROCESSOR}, so that mean and std of its images are not known; add it, or give its "
            "model.safetensors with model.library=transformers, model.architecture, model_args, mean and std"
        )
    processor = read_json(path)
    if not processor.get("do_rescale", True) or abs(processor.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3:
        raise UserError(f"'{path}' does not scale images to 0..1; only processors that do are understood")
    facts: dict[str, Any] = {"mean": [0.0], "std": [1.0]}
    if processor.get("do_normalize", True):
        facts = {"mean": list(processor.get("image_mean") or [0.5]), "std": list(processor.get("image_std") or [0.5])}
    size = (processor.get("crop_size") if processor.get("do_center_crop") else None) or processor.get("size")
    if isinstance(size, Mapping):
        sides = {name: size[name] for name in ("height", "width", "shortest_edge") if name in size}
        size = sides.get("shortest_edge") or square(folder, sides.get("height", 0), sides.get("width", 0))
    return facts | ({"image_size": size} if isinstance(size, int) and size else {})
