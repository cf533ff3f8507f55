"""What image classifiers of all libraries have in common: one linear head, mean and std, logits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from sophon.config import ModelConfig
from sophon.errors import UserError
from sophon.files import read_json, write_json
from sophon.models.adapter import ModelAdapter, ModelCard
from sophon.models.common import check_input, described, outline
from sophon.models.partition import Block, partition
from sophon.models.spec import ModelSpec
from sophon.models.weights import load_state, read_state
from sophon.tensor_files import write_tensors

PREPROCESSING = """
mean = torch.tensor({mean}).view(1, -1, 1, 1)
std = torch.tensor({std}).view(1, -1, 1, 1)
logits = {call}  # images: float {shape} in 0..1"""


class ClassifierAdapter(ModelAdapter):
    """An image classifier that ends in one linear layer. A library's own adapter says how it is built.

    A folder of it holds ``model.safetensors`` and ``config.json``; the latter names library, architecture, arguments,
    classes, input size, mean and std.
    """

    kind = "classification"
    weights, settings = "model.safetensors", "config.json"
    reserved: ClassVar[tuple[str, ...]] = ()  # arguments that the spec decides, or that load weights unasked
    call: ClassVar[str] = "model((images - mean) / std)"

    @property
    def name(self) -> str:
        """What messages call the model."""
        return f"{self.library}'s {self.spec.architecture} (model.library, model.architecture)"

    @classmethod
    def from_config(cls, config: ModelConfig, classes: Sequence[str]) -> Self:
        """Check a classifier's configuration; ``mean`` and ``std`` become one number a channel."""
        mean, std = check_input(config, cls.reserved)
        for key in ("scheduler", "class_conditional"):
            if getattr(config, key):
                raise UserError(f"model.{key}: only models of library diffusers have one; leave it out")
        return cls(
            ModelSpec(
                library=cls.library,
                architecture=config.architecture,
                classes=tuple(classes),
                channels=config.channels,
                image_size=config.image_size,
                mean=mean,
                std=std,
                model_args=dict(config.model_args),
                head=config.head,
            )
        )

    @classmethod
    def describe(cls, folder: Path, config: ModelConfig) -> ModelConfig:
        """Complete a configuration by a folder's ``config.json``."""
        path = folder / cls.settings
        settings = read_json(path)
        try:
            published = settings.get("pretrained_cfg", settings)  # older versions of timm keep everything on one level
            channels, height, width = map(int, published["input_size"])
            mean, std = ([float(value) for value in published[name]] for name in ("mean", "std"))
            arguments = dict(settings.get("model_args") or {})
            architecture = str(settings["architecture"])
            if not (mean and std):
                raise ValueError
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"'{path}' is not {cls.library}'s; it must name the architecture and, in "
                "pretrained_cfg, input_size, mean and std"
            ) from error
        return described(
            config,
            library=cls.library,
            architecture=architecture,
            model_args={name: value for name, value in arguments.items() if name not in cls.reserved},
            image_size=square(folder, height, width),
            channels=channels,
            mean=mean,
            std=std,
            head=settings.get("head"),
        )

    @classmethod
    def class_names(cls, folder: Path) -> Any:
        """Return the names of the classes that a folder of this library lists; None if it lists none."""
        settings = read_json(folder / cls.settings)
        return settings.get("label_names", (settings.get("pretrained_cfg") or {}).get("label_names"))

    @cached_property
    def head(self) -> str:
        """The dotted name of the last linear layer, such as ``fc`` or ``head.fc.fc2``."""
        return self.head_of(outline(self.built))

    def head_of(self, model: nn.Module) -> str:
        """Return the name of a model's head, and make sure that it is one linear layer."""
        names = (self.spec.head,) if self.spec.head else self.head_names(model)
        modules = dict(model.named_modules())
        if len(names) != 1 or not isinstance(modules.get(names[0]), nn.Linear):
            name = self.spec.architecture
            if self.spec.head:
                raise UserError(f"model.head: '{self.spec.head}' is not a linear layer of '{name}'; give its last one")
            raise UserError(f"model.architecture: '{name}' does not end in one linear layer; choose another")
        return names[0]

    def head_names(self, model: nn.Module) -> tuple[str, ...]:
        """Name the layers that tell classes apart: the last linear layer, unless the library says otherwise."""
        return tuple(name for name, part in model.named_modules() if isinstance(part, nn.Linear))[-1:]

    def built(self, *, pretrained: bool = False) -> nn.Module:
        """Build the model; each library's own way."""
        raise NotImplementedError

    def start(self, config: ModelConfig) -> nn.Module:
        """Build the model that a configuration asks for, with the weights that it names."""
        module = self.built(pretrained=config.pretrained)
        self.head_of(module)
        if config.weights is not None:
            path = Path(config.weights)
            self._check_order(path)
            self.load_weights(module, path, key="model.weights", strip_prefix=config.strip_prefix)
        return module

    def fresh(self) -> nn.Module | None:
        """Build a classifier [B, channels, image_size, image_size] -> logits [B, len(classes)]."""
        module = self.built()
        self.head_of(module)
        return module

    def forward(self, model: nn.Module, inputs: Tensor, **conditions: Tensor) -> Tensor:
        """Return logits [B, classes]; of an output with several parts, its logits."""
        output = model(inputs)
        # in training mode GoogLeNet and Inception hand over the logits of auxiliary heads besides
        return output if isinstance(output, Tensor) else output.logits

    def blocks(self, model: nn.Module) -> list[Block]:
        """Return the blocks from input to output, the last layer left out; see `partition`."""
        return partition(model, self.head)

    def classes_in(self, model: nn.Module) -> int:
        """Return how many classes a model's head has."""
        return len(model.get_parameter(f"{self.head}.weight"))

    def start_head(self, model: nn.Module, classes: Sequence[str]) -> None:
        """Replace the last layer by a newly initialised one, as ``nn.Linear`` initialises itself."""
        old = model.get_submodule(self.head)
        assert isinstance(old, nn.Linear)  # head_of made sure
        place = {"device": old.weight.device, "dtype": old.weight.dtype}
        new = nn.Linear(old.in_features, len(classes), bias=old.bias is not None, **place)
        model.set_submodule(self.head, new.train(old.training))

    def load_weights(self, model: nn.Module, path: Path, *, key: str, strip_prefix: str = "") -> None:
        """Load a state dict, all of it."""
        path = self.weights_in(path, key)
        tensors = read_state(path, key, strip_prefix)
        load_state(
            model, tensors, f"{key}: {path}", model=self.name, explain=partial(self._other_classes, model, tensors)
        )

    def _other_classes(self, model: nn.Module, tensors: Mapping[str, Tensor], wrong: Sequence[str]) -> str | None:
        """Say it plainly when nothing but the number of classes differs."""
        heads = tuple(f"{name}." for name in self.head_names(model))
        if not heads or not all(name.startswith(heads) for name in wrong):
            return None
        counts = len(tensors[wrong[0]]), len(model.state_dict()[wrong[0]])
        return f": class counts do not match: checkpoint has {counts[0]} classes, original domain has {counts[1]}"

    def _check_order(self, path: Path) -> None:
        """Refuse what would otherwise be measured as damage: the right classes in another order."""
        names = self.class_names(path) if (path / self.settings).is_file() else None
        classes = list(self.spec.classes)
        if isinstance(names, list) and names != classes and sorted(map(str, names)) == sorted(classes):
            raise UserError(
                f"model.weights: '{path}' has the original domain's classes in another order ({', '.join(names[:3])}, "
                "...); list them like that in domain.original.classes"
            )

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write weights and ``config.json``."""
        write_tensors(folder / self.weights, model.state_dict())
        write_json(folder / self.settings, self.configuration(model))

    def configuration(self, model: nn.Module) -> dict[str, Any]:
        """Return what ``config.json`` holds."""
        spec = self.spec
        return {
            "library": spec.library,
            "architecture": spec.architecture,
            **({"head": spec.head} if spec.head else {}),
            "num_classes": len(spec.classes),
            "label_names": list(spec.classes),
            "model_args": dict(spec.model_args),
            "pretrained_cfg": {
                "mean": list(spec.mean),
                "std": list(spec.std),
                "input_size": [spec.channels, spec.image_size, spec.image_size],
            },
        }

    def loading(self) -> str:
        """Return Python code that makes ``model`` of a folder at ``PATH``."""
        raise NotImplementedError

    def card(self) -> ModelCard:
        """Return what a model card says of a classifier."""
        spec = self.spec
        mean, std = (json.dumps(list(values)) for values in (spec.mean, spec.std))
        size = f"{spec.image_size}, {spec.image_size}"
        shape = f"[B, {spec.channels}, {size}]"
        return ModelCard(
            pipeline_tag="image-classification",
            kind=f"A classifier of {len(spec.classes)} classes",
            notes=(
                f"Input: {spec.channels} x {size.replace(', ', ' x ')}, scaled to 0..1, then normalised with mean "
                f"`{mean}` and std `{std}`.",
                f"Classes, in the order of the logits: {', '.join(f'`{name}`' for name in spec.classes)}.",
            ),
            loading=self.loading() + PREPROCESSING.format(mean=mean, std=std, shape=shape, call=self.call),
        )


def square(folder: Path, height: int, width: int) -> int:
    """Return the size of square images; refuse others."""
    if height != width:
        raise UserError(f"'{folder}' takes images of {height} x {width} pixels; only square ones are made here")
    return height
