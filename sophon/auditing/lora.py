"""Adapters of low rank (LoRA: Hu et al., 2021, arXiv 2106.09685) for an attacker that leaves the weights alone."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import nn

from sophon.attacker import LORA_LAYERS, LORA_RECIPES
from sophon.errors import UserError, choose
from sophon.models.partition import attention, feed_forward, owned

# of a layer, and whether it lies in attention and in a transformer's feed-forward part
_CHOSEN: dict[str, Callable[[nn.Module, bool, bool], bool]] = {
    "all": lambda layer, attends, feeds: True,
    "convolutions": lambda layer, attends, feeds: isinstance(layer, nn.Conv2d),
    "linears": lambda layer, attends, feeds: isinstance(layer, nn.Linear),
    "attention": lambda layer, attends, feeds: attends,
    "transformer": lambda layer, attends, feeds: attends or feeds,
}


def add_adapters(model: nn.Module, rank: int, layers: str, head: set[str], recipe: str = "peft") -> None:
    """Put an adapter beside linear layers and convolutions, in place: they add ``factor * B(A(x))`` to its output.

    A has the layer's inputs (and its kernel, stride and padding) and ``rank`` outputs, B leads from these to the
    layer's outputs; a layer gains ``rank * (inputs * kernel area + outputs)`` parameters. B starts at zero,
    so the model answers as before; A is drawn from torch's global generator. The layer itself becomes ``base_layer``
    beneath; names of other parts stay.

    Left out are the head's own layers, which are trained whole, and what an adapter does not fit: convolutions that are
    grouped, dilated or pad otherwise than with zeros, layers with a forward of their own, and the parts of
    `nn.MultiheadAttention`, which reads their weights past any adapter.

    Args:
        model: on any device, of any floating type; the adapters get both.
        rank: >= 1; a rank above a layer's inputs or outputs is kept, and says no more than the smaller of the two.
        layers: a key of `sophon.attacker.LORA_LAYERS`.
        head: names of the head's parameters.
        recipe: ``peft``: the factor is 2 and A uniform within 1 / sqrt(inputs * kernel area); ``diffusers``, as its
            example scripts: the factor is 1 and A normal with a standard deviation of 1 / ``rank``.

    Raises:
        UserError: ``layers`` is not known, or the model has no such layer.
    """
    choose("lora_layers", layers, LORA_LAYERS)
    choose("lora_recipe", recipe, LORA_RECIPES)
    names = _layers(model, layers, head)
    if not names:
        raise UserError(f"lora_layers: '{layers}' has no layer of this model that takes an adapter; choose others")
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds

    # an expression, since names in a list would also fit the ends of longer names
    target = "|".join(re.escape(name) for name in names)
    as_scripts = recipe == "diffusers"
    alpha, start = (rank, "gaussian") if as_scripts else (2 * rank, True)
    config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights=start, target_modules=target)
    inject_adapter_in_model(config, model)


def _layers(model: nn.Module, layers: str, head: set[str]) -> list[str]:
    parts = dict(model.named_modules())
    attends, feeds = (owned(parts, find(model)) for find in (attention, feed_forward))
    opaque = owned(parts, (name for name, part in parts.items() if isinstance(part, nn.MultiheadAttention)))
    excluded = opaque | {name.rpartition(".")[0] for name in head}
    return [
        name
        for name, part in parts.items()
        if name not in excluded and _fits(part) and _CHOSEN[layers](part, name in attends, name in feeds)
    ]


def _fits(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
        return plain and type(layer).forward is nn.Conv2d.forward
    return isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward
