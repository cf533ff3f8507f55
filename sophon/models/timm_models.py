"""Image classifiers of timm, kept in its Hub format (``config.json`` and ``model.safetensors``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, Self

import timm
from huggingface_hub import hf_hub_download
from timm.models import get_model_args
from timm.models._hub import save_config_for_hf
from torch import nn

from sophon.config import ModelConfig
from sophon.errors import UserError, one_line
from sophon.files import read_json, write_json
from sophon.models.classifier import ClassifierAdapter
from sophon.models.common import constructed, outline, unknown_architecture
from sophon.models.spec import ModelSpec
from sophon.tensor_files import write_tensors

# What timm knows of the architecture's published weights; said of ours it would be false.
_OF_PUBLISHED_WEIGHTS = ("tag", "license", "origin_url", "paper_name", "paper_ids", "description", "notes")
_LOADING = """\
import timm
import torch

model = timm.create_model("local-dir:PATH", pretrained=True).eval()  # without pretrained=True: random weights"""


class TimmAdapter(ClassifierAdapter):
    """A classifier of timm."""

    library = "timm"
    reserved = (
        *("num_classes", "in_chans", "pretrained"),
        *("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"),
    )

    @classmethod
    def from_config(cls, config: ModelConfig, classes: Sequence[str]) -> Self:
        """Check a configuration; published weights bring ``mean`` and ``std`` where it has none."""
        if config.pretrained and timm.is_model_pretrained(config.architecture):
            published = timm.get_pretrained_cfg(config.architecture)
            mean, std = config.mean or list(published.mean), config.std or list(published.std)
            config = _of_grey(replace(config, mean=mean, std=std))
        return super().from_config(config, classes)

    @classmethod
    def describe(cls, folder: Path, config: ModelConfig) -> ModelConfig:
        """Complete a configuration as ``timm.create_model("local-dir:...")`` would read the folder.

        Only the tag of an architecture is taken from ``config``, which timm does not write down.
        """
        described = super().describe(folder, config)
        if config.architecture.split(".")[0] == described.architecture:
            described = replace(described, architecture=config.architecture)
        return _without_restatements(_of_grey(described))

    @classmethod
    def recognise(cls, module: nn.Module, **facts: Any) -> ModelSpec | None:
        """Return the spec of what ``timm.create_model`` made."""
        published = getattr(module, "pretrained_cfg", None)
        if not published or not type(module).__module__.startswith("timm."):
            return None
        channels, size, _ = published["input_size"]
        made_with = get_model_args(module)
        if made_with.get("img_size"):  # a vision transformer of another size than the published one
            size = made_with["img_size"] if isinstance(made_with["img_size"], int) else made_with["img_size"][0]
        arguments = {name: value for name, value in made_with.items() if name not in cls.reserved}
        config = ModelConfig(
            library=cls.library,
            architecture=published["architecture"],
            model_args=_plain(arguments),
            channels=getattr(module, "in_chans", channels),
            image_size=size,
            mean=list(published["mean"]),
            std=list(published["std"]),
        )
        classes = facts.pop("classes", None) or tuple(map(str, range(module.num_classes)))  # type: ignore[arg-type]
        return cls.from_config(replace(config, **facts), classes).spec

    def head_names(self, model: nn.Module) -> tuple[str, ...]:
        """Name the layers that timm calls the classifier; distilled transformers have two."""
        named: str | Sequence[str] | None = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")
        if not named:
            return super().head_names(model)
        return (named,) if isinstance(named, str) else tuple(named)

    def built(self, *, pretrained: bool = False) -> nn.Module:
        """Build the model in channels-last format.

        Args:
            pretrained: start from timm's published weights (downloaded or cached), with a fresh head where the class
                counts differ. Otherwise the weights are random, drawn from torch's global generator.

        Raises:
            UserError: the architecture is not known, ``model_args`` do not fit it, or there are no pretrained weights.
        """
        spec = self.spec
        names = [*timm.list_models(), *timm.list_pretrained()]
        if spec.architecture not in names:
            raise unknown_architecture(spec, names)
        arguments = {"num_classes": len(spec.classes), "in_chans": spec.channels, **spec.model_args}
        published = timm.get_pretrained_cfg(spec.architecture)
        if published is not None and published.fixed_input_size:
            arguments.setdefault("img_size", spec.image_size)
        if pretrained:
            overlay = {"file": _download(spec, published and published.hf_hub_id), "custom_load": False}
            arguments |= {"pretrained": True, "pretrained_cfg_overlay": overlay}
        return constructed(spec, timm.create_model, arguments)

    def start_head(self, model: nn.Module, classes: Sequence[str]) -> None:
        """Replace the last layer only.

        timm's ``reset_classifier`` would for some architectures (CAFormer) also throw away hidden layers of the head.
        """
        super().start_head(model, classes)
        model.num_classes = len(classes)  # type: ignore[assignment]  # timm's record, which config.json is written from

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write timm's Hub format."""
        spec, path = self.spec, folder / self.settings
        write_tensors(folder / self.weights, model.state_dict())
        preprocessing = {
            "input_size": [spec.channels, spec.image_size, spec.image_size],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "mean": list(spec.mean),
            "std": list(spec.std),
        }
        save_config_for_hf(model, path, model_config={"label_names": list(spec.classes)}, data_config=preprocessing)
        config = read_json(path)
        for key in _OF_PUBLISHED_WEIGHTS:
            config["pretrained_cfg"].pop(key, None)
        write_json(path, config)

    def loading(self) -> str:
        """Return the line that loads it in timm."""
        return _LOADING


def _download(spec: ModelSpec, repository: str | None) -> str:
    """Fetch published weights; by ourselves, because timm falls back to a pickle where there is no safetensors file."""
    if not repository:
        raise UserError(f"model.pretrained: timm publishes no weights for '{spec.architecture}'")
    try:
        return hf_hub_download(repository, "model.safetensors")
    except Exception as error:  # network, cache and Hub errors share no base class
        raise UserError(f"model.pretrained: no weights for '{spec.architecture}': {one_line(error)}") from error


def _of_grey(config: ModelConfig) -> ModelConfig:
    """Make the statistics of colours those of one channel, as timm does with a grey model's."""
    if config.channels != 1 or not (config.mean and config.std):
        return config
    return replace(config, mean=[fmean(config.mean)], std=[fmean(config.std)])


def _without_restatements(config: ModelConfig) -> ModelConfig:
    """Leave out the arguments that timm writes down although nobody chose them.

    Without them, the same architecture has the same spec, whether sophon or timm wrote its checkpoint.
    """
    restated = ("global_pool", "img_size")
    fewer = {name: value for name, value in config.model_args.items() if name not in restated}
    module = outline(TimmAdapter.from_config(replace(config, model_args=fewer), ("any",)).built)
    written = _plain(get_model_args(module))
    same = all(written.get(name) == _plain(config.model_args).get(name, written.get(name)) for name in restated)
    return replace(config, model_args=fewer) if same else config


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}
