"""Image classifiers of torchvision, kept as a state dict with the arguments of its ``get_model``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any, Self

import torchvision
from torch import nn

from sophon.config import ModelConfig
from sophon.errors import UserError
from sophon.models.classifier import ClassifierAdapter
from sophon.models.common import constructed, outline, require, unknown_architecture
from sophon.models.spec import ModelSpec

_LOADING = """\
import torch
from safetensors.torch import load_file
from torchvision.models import get_model

model = get_model({arguments}).eval()
model.load_state_dict(load_file("PATH/model.safetensors"))"""


class TorchvisionAdapter(ClassifierAdapter):
    """A classifier of torchvision."""

    library = "torchvision"
    reserved = ("num_classes", "weights", "weights_backbone")

    @classmethod
    def from_config(cls, config: ModelConfig, classes: Sequence[str]) -> Self:
        """Check a configuration; torchvision's models take colour images and publish pickles only."""
        if config.channels != 3:
            raise UserError(f"model.channels: {config.channels} is not allowed with library torchvision; allowed: 3")
        return super().from_config(config, classes)

    @classmethod
    def recognise(cls, module: nn.Module, **facts: Any) -> ModelSpec | None:
        """Return the spec of what one of torchvision's functions made with no arguments but the number of classes.

        A model of torchvision's that was changed since, or made with other arguments, is not recognised.
        """
        if not type(module).__module__.startswith("torchvision.models."):
            return None
        require(facts, "image_size", "mean", "std")
        count = [part for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d)][-1].weight.shape[0]
        for name in _names():
            build = torchvision.models.get_model_builder(name)
            if build.__annotations__.get("return") in (type(module), type(module).__name__):
                outlined = outline(partial(build, weights=None, num_classes=count))
                if repr(outlined) == repr(module):
                    facts.setdefault("classes", tuple(map(str, range(count))))
                    return ModelSpec(**{"library": cls.library, "architecture": name, "channels": 3, **facts})
        return None

    def built(self, *, pretrained: bool = False) -> nn.Module:
        """Build the model with random weights, in channels-last format."""
        if pretrained:
            raise UserError(
                "model.pretrained: true is not allowed with library torchvision (it publishes pickles); use timm"
            )
        spec = self.spec
        if spec.architecture not in _names():
            raise unknown_architecture(spec, _names())
        arguments = {"weights": None, "num_classes": len(spec.classes), **spec.model_args}
        return constructed(spec, torchvision.models.get_model, arguments)

    def loading(self) -> str:
        """Return the lines that load it in torchvision."""
        spec = self.spec
        arguments = [json.dumps(spec.architecture), "weights=None", f"num_classes={len(spec.classes)}"]
        arguments += [f"{name}={value!r}" for name, value in spec.model_args.items()]
        return _LOADING.format(arguments=", ".join(arguments))


def _names() -> list[str]:
    # Classifiers only: the registry also lists detectors, which download a backbone unasked.
    return torchvision.models.list_models(module=torchvision.models)  # type: ignore[no-any-return]
