"""Models: an adapter a library, and what must travel with their weights."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from sophon import paths
from sophon.config import ModelConfig
from sophon.errors import UserError, choose
from sophon.files import read_json
from sophon.models.adapter import AdaptedModel, ModelAdapter, ModelCard
from sophon.models.spec import ModelSpec
from sophon.pickles import refuse_pickle

__all__ = [
    "LIBRARIES",
    "AdaptedModel",
    "ModelAdapter",
    "ModelCard",
    "ModelSpec",
    "adapt",
    "adapter_of",
    "build",
    "create",
    "describe",
    "resize_head",
]

# Where each library's adapter is; it is imported, and with it the library, when a model asks for it.
LIBRARIES = {
    "timm": "sophon.models.timm_models:TimmAdapter",
    "torchvision": "sophon.models.torchvision_models:TorchvisionAdapter",
    "transformers": "sophon.models.transformers_models:TransformersAdapter",
    "diffusers": "sophon.models.diffusers_models:DiffusersAdapter",
    "python": "sophon.models.python_module:PythonAdapter",
}
# Networks of diffusers that work on latents, beside a pipeline's other parts, have adapters of their own.
LATENT = {
    "UNet2DConditionModel": "sophon.models.latent_diffusion:TextToImageAdapter",
    "DiTTransformer2DModel": "sophon.models.latent_transformer:ClassToImageAdapter",
    "SD3Transformer2DModel": "sophon.models.latent_transformer:FlowMatchingAdapter",
}
# what `adapt` may be told of a model
FACTS = ("channels", "classes", "factory", "head", "image_size", "mean", "model_args", "scheduler", "std")


def _adapter(library: str, architecture: str | None = None) -> type[ModelAdapter]:
    choose("model.library", library, LIBRARIES)
    latent = LATENT.get(str(architecture)) if library == "diffusers" else None
    return cast(type[ModelAdapter], pkgutil.resolve_name(latent or LIBRARIES[library]))


def adapter_of(spec: ModelSpec) -> ModelAdapter:
    """Return the adapter of a model that a spec describes.

    Raises:
        UserError: the library is not known or not installed.
    """
    return _adapter(spec.library, spec.architecture)(spec)


def create(config: ModelConfig, classes: Sequence[str]) -> AdaptedModel:
    """Build the model that a configuration asks for, with the weights that it names; else with random ones.

    Args:
        config: the ``model`` group; where its weights are a folder, completed by `describe`.
        classes: names of the original domain's classes, in the order of the labels.

    Raises:
        UserError: a value is out of range or contradicts another, or weights cannot be had or do not fit.
    """
    adapter = _adapter(config.library, config.architecture).from_config(config, classes)
    return AdaptedModel(adapter.start(config), adapter.spec)


def build(spec: ModelSpec) -> nn.Module:
    """Build a model with random weights, drawn from torch's global generator.

    Raises:
        UserError: the architecture is not known, its arguments do not fit it, or it cannot be built again.
    """
    module = adapter_of(spec).fresh()
    if module is None:
        raise UserError(f"factory: '{spec.architecture}' cannot be built again; give the function that builds it")
    return module


def resize_head(model: nn.Module, adapter: ModelAdapter, classes: Sequence[str]) -> None:
    """Give a model's head, in place, an output (a denoiser's: an embedding) for each class; the first ones stay."""
    had = adapter.classes_in(model)
    if had is None or had == len(classes):
        return
    before = {head: dict(model.get_submodule(head).named_parameters()) for head in adapter.heads}
    adapter.start_head(model, classes)
    count = min(had, len(classes))
    for head, tensors in before.items():
        for name, after in model.get_submodule(head).named_parameters():
            after.data[:count] = tensors[name].data[:count]


def describe(config: ModelConfig, key: str = "model.weights") -> ModelConfig:
    """Complete a configuration by what the folder of its weights says of the model: all but the weights themselves.

    Args:
        config: the ``model`` group; without weights, or with those of a file, it is returned as it is. A latent
            pipeline's Hub id (``pretrained``) is fetched.

    Raises:
        UserError: they are a pickle, or the folder is none of a library's own format.
    """
    if config.library == "diffusers" and config.pretrained:
        config, key = _fetched(config), "model.pretrained"
    if config.weights is None:
        return config
    refuse_pickle(Path(config.weights), key, config.library)
    if not paths.is_folder(config.weights, key):
        return config
    folder = Path(config.weights)
    if paths.is_folder(folder / "checkpoint", key):
        folder = folder / "checkpoint"
    library = _library_of(folder, key)
    network = None
    if library == "diffusers":
        from sophon.models import pipeline  # not above: classifiers need not wait for diffusers

        network = pipeline.network_of(folder)
    adapter = _adapter(library, network)
    adapter.weights_in(folder, key)
    try:
        return replace(adapter.describe(folder, config), library=library, weights=str(folder))
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


def _fetched(config: ModelConfig) -> ModelConfig:
    """Fetch a latent pipeline by its Hub id, whole; others are fetched by their adapter."""
    from sophon.models import pipeline  # not above: classifiers need not wait for diffusers

    name = config.architecture
    if "/" not in name or pipeline.network_of(pipeline.fetch(name, (pipeline.CONFIG,))) not in LATENT:
        return config
    folder = pipeline.fetch(name, pipeline.WHOLE)
    return replace(config, pretrained=False, weights=str(folder))


def _library_of(folder: Path, key: str) -> str:
    """Say by a folder's files whose format it is."""
    if paths.is_file(folder / "model_index.json", key):
        return "diffusers"
    if not paths.is_file(folder / "config.json", key):
        raise UserError(
            f"{key}: '{folder}' holds neither sophon.json nor config.json nor model_index.json; give a folder of "
            "sophon, timm, transformers or diffusers, or a .safetensors state dict"
        )
    settings = read_json(folder / "config.json")
    if not isinstance(settings, dict):
        raise UserError(f"{key}: '{folder / 'config.json'}' is not a JSON object")
    library = settings.get("library") or ("transformers" if "model_type" in settings else "timm")
    choose(f"{key}: '{folder / 'config.json'}': library", library, LIBRARIES)
    return str(library)


def adapt(
    module: nn.Module, *, architecture: str | None = None, library: str | None = None, **facts: Any
) -> AdaptedModel:
    """Say of a model in memory what sophon needs to know; timm's, torchvision's, transformers' and diffusers' say most.

    Args:
        module: images [B, C, H, W] to logits [B, classes], or a `diffusers.UNet2DModel`.
        architecture: of any other module, the dotted path of what builds it, ``package.module:name``, where it is
            to be exported so that others can load it; by default that of its class.
        library: a key of `LIBRARIES`, where a model is not to be taken for what its class says.
        facts: ``head`` (dotted name of the last linear layer; by default the last one in order), ``classes`` (names in
            the order of the logits), ``image_size`` (pixels), ``channels``, ``mean`` and ``std`` (one number a channel
            on a 0..1 scale), ``model_args`` (arguments of ``architecture``), ``factory`` (called without arguments it
            builds the model with random weights), and for a U-Net ``scheduler`` (its pipeline's).

    Returns:
        The model itself, and its spec.

    Raises:
        UserError: what is not known is missing, or what is given does not fit the model.
    """
    for name in facts:
        if name not in FACTS:
            raise UserError(f"{name}: not known; allowed: {', '.join(FACTS)}")
    given = {name: value for name, value in facts.items() if value is not None}
    if architecture is not None:
        given["architecture"] = architecture
    home = type(module).__module__.partition(".")[0]
    for name in (library,) if library else (home if home in LIBRARIES and home != "python" else "python", "python"):
        spec = _adapter(name, type(module).__name__).recognise(module, **given)
        if spec is not None:
            return AdaptedModel(module, _complete(spec))
    raise UserError(f"library: the model is not one of {library}'s; leave it out")


def _complete(spec: ModelSpec) -> ModelSpec:
    """Check the input of a model in memory; mean and std become one number a channel."""
    from sophon.models.common import check_input

    mean, std = check_input(spec.config(), ())
    return replace(spec, mean=mean, std=std, classes=tuple(spec.classes))
