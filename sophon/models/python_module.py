"""Image classifiers of one's own: any ``nn.Module``, built by a class or function that Python can import."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Self

from torch import nn

from sophon.arguments import function_at
from sophon.config import ModelConfig
from sophon.errors import UserError
from sophon.models.classifier import ClassifierAdapter
from sophon.models.common import misfit, outline, require
from sophon.models.spec import ModelSpec

_LOADING = """\
import torch
from safetensors.torch import load_file

from {module} import {name}

model = {name}({arguments}).eval()
model.load_state_dict(load_file("PATH/model.safetensors"))"""

# of what only its owner can build: a Sequential, a class inside a function or a script, a changed model of a library
_LOADING_UNNAMED = """\
import torch
from safetensors.torch import load_file

model = ...  # a {name} that its author built; no import builds it, so ask for that code
model.eval()
model.load_state_dict(load_file("PATH/model.safetensors"))"""


class PythonAdapter(ClassifierAdapter):
    """A classifier that is no library's: ``architecture`` is the dotted path of what builds it with ``model_args``."""

    library = "python"

    @classmethod
    def from_config(cls, config: ModelConfig, classes: Sequence[str]) -> Self:
        """Check a configuration, which has to say where the head is."""
        if not config.head:
            raise UserError("model.head: needed with library python; give its last linear layer's name, such as fc")
        if config.pretrained:
            raise UserError("model.pretrained: true is not allowed with library python; give model.weights")
        return super().from_config(config, classes)

    @classmethod
    def recognise(cls, module: nn.Module, **facts: Any) -> ModelSpec | None:
        """Return the spec of any module; its class stands for what builds it where no factory is given.

        Without ``factory`` a fresh model is a copy of which every part is initialised anew; `fresh` gives None where
        some part with parameters cannot do that.
        """
        path = f"{type(module).__module__}:{type(module).__qualname__}"
        given = facts.pop("factory", None)
        factory = given or _resetting(module)
        require(facts, "image_size", "mean", "std")
        linear = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
        if not linear:
            raise UserError("head: the model has no linear layer; only classifiers that end in one are understood")
        head = facts.get("head") or next(reversed(linear))
        part = linear.get(head)
        if part is None:
            raise UserError(f"head: '{head}' is not a linear layer of the model; give the name of its last one")
        classes = facts.get("classes") or tuple(map(str, range(part.out_features)))
        if len(classes) != part.out_features:
            raise UserError(f"classes: {len(classes)} names for {part.out_features} outputs of '{head}'; give as many")
        usual = {"architecture": path, "classes": classes, "head": head, "channels": 3}
        spec = ModelSpec(**{"library": cls.library, **usual, **facts}, factory=factory)
        if given is None:
            _check_loading(cls(spec), module)
        return spec

    def built(self, *, pretrained: bool = False) -> nn.Module:
        """Call the factory; its head must have as many outputs as there are classes.

        Raises:
            UserError: it cannot be imported or called, or it builds another number of outputs.
        """
        module = self.rebuilt() if self.spec.factory is None else self.spec.factory()
        head = module.get_submodule(self.head_of(module))
        assert isinstance(head, nn.Linear)  # head_of made sure
        if head.out_features != len(self.spec.classes):
            raise UserError(
                f"model.model_args: '{self.spec.architecture}' builds {head.out_features} outputs for the "
                f"{len(self.spec.classes)} classes of the original domain; give the argument that sets them"
            )
        return module

    def rebuilt(self) -> nn.Module:
        """Call what the dotted path names with ``model_args``."""
        build = function_at(self.spec.architecture, "model.architecture")
        try:
            module = build(**self.spec.model_args)
        except Exception as error:  # whatever the first misused argument leads to
            raise misfit(self.spec, error) from error
        if not isinstance(module, nn.Module):
            raise UserError(f"model.architecture: '{self.spec.architecture}' builds no torch.nn.Module")
        return module

    def fresh(self) -> nn.Module | None:
        """Build a model with random weights; None if it lives in memory and cannot be initialised anew."""
        return None if self.spec.factory is unbuildable else super().fresh()

    @property
    def head(self) -> str:
        """The name that the user gave."""
        assert self.spec.head is not None  # from_config and recognise made sure
        return self.spec.head

    def loading(self) -> str:
        """Return the lines that build it by its dotted path, where that builds it."""
        module, _, name = self.spec.architecture.replace(":", ".").rpartition(".")
        if module == "__main__" or not self._is_built_by_its_path():
            return _LOADING_UNNAMED.format(name=name)
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.spec.model_args.items())
        return _LOADING.format(module=module, name=name, arguments=arguments)

    def _is_built_by_its_path(self) -> bool:
        try:
            return self.spec.head in dict(outline(self.rebuilt).named_modules())
        except UserError:
            return False


def unbuildable() -> nn.Module:
    """Stand for the factory of a model that cannot be built again."""
    raise UserError("factory: this model cannot be built again; give the function that builds it")


def _resetting(module: nn.Module) -> Callable[[], nn.Module]:
    """Return what copies a module and initialises every part of it anew; `unbuildable` if some part cannot."""
    owners = [part for part in module.modules() if any(True for _ in part.parameters(recurse=False))]
    if not all(callable(getattr(part, "reset_parameters", None)) for part in owners):
        return unbuildable
    blueprint = copy.deepcopy(module).cpu()

    def fresh() -> nn.Module:
        made = copy.deepcopy(blueprint)
        for part in made.modules():
            if callable(reset := getattr(part, "reset_parameters", None)):
                reset()
        return made.train().requires_grad_(True)

    return fresh


def _check_loading(adapter: PythonAdapter, module: nn.Module) -> None:
    """Refuse arguments that build another model than this one: a release that says so could not be loaded.

    What cannot be imported or called, such as a class that lives in a function, is let pass, and so are torch's own
    containers.
    """
    if type(module).__module__.startswith("torch."):
        return
    try:
        shapes = {name: tuple(tensor.shape) for name, tensor in outline(adapter.rebuilt).state_dict().items()}
    except UserError:
        return
    for name, tensor in module.state_dict().items():
        if shapes.get(name) != tuple(tensor.shape):
            raise UserError(
                f"model_args: {adapter.spec.architecture} with {dict(adapter.spec.model_args)} builds another model "
                f"('{name}' differs); give the arguments that this one was built with, model_args={{'width': 8}}, or "
                "factory"
            )
