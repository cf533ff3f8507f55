"""Re-normalisation of layers whose scale does not show in the function: surgery against protection that hides there."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from sophon.audit.means import Means
from sophon.domains import Batch
from sophon.tasks.task import evaluating

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)  # with timm's, which are subclasses
LAYERS = (_ConvNd, nn.Linear)


def renormalise(model: nn.Module, means: Means) -> nn.Module:
    """Scale each layer that only feeds a normalisation layer to the norm that it has in a fresh model.

    This undoes protection that hides in the scale of weights: normalisation takes the scale out of the function, but
    gradients shrink by it. Behind BatchNorm the function in evaluation mode stays the same but for rounding, because
    the statistics are scaled too and the affine weight makes up for epsilon. Epsilon's part cannot be made up for in
    layers without running statistics or without an affine weight: their function stays the same only as far as epsilon
    is small beside the variance. A layer of zeros, or one that is zero in a fresh model, is left as it is.
    """
    fresh = means.fresh(model)
    for name, layer, norm in _feeders(model, means):
        wanted, present = (each.get_parameter(f"{name}.weight").detach().double().norm() for each in (fresh, model))
        _scale(layer, norm, float(wanted / present))
    return model


@torch.no_grad()
def _scale(layer: nn.Module, norm: nn.Module, scale: float) -> None:
    if not 0 < scale < math.inf:  # also false for NaN
        return
    for name in ("weight", "bias"):
        if (parameter := getattr(layer, name)) is not None:
            parameter.mul_(scale)
    if isinstance(norm, _NormBase) and norm.running_mean is not None and norm.running_var is not None:
        before = norm.running_var.double() + norm.eps
        norm.running_mean.mul_(scale)
        norm.running_var.mul_(scale**2)
        if norm.weight is not None:
            norm.weight.mul_(((norm.running_var.double() + norm.eps) / before).sqrt() / scale)


def _feeders(model: nn.Module, means: Means) -> list[tuple[str, nn.Module, nn.Module]]:
    """Find convolutions and linear layers, by name, whose output goes into one normalisation layer and nowhere else.

    A batch goes through the model once. Autograd's graph tells who reads a tensor: an in-place change gives it another
    node, and additions and concatenations, which no module sees, are edges as well.
    """
    made: dict[Node | None, tuple[str, nn.Module]] = {}
    read: dict[Node | None, nn.Module] = {}
    calls: Counter[int] = Counter()  # by identity: of a layer's weight, which others may share, or of a norm
    hooks = []
    for name, part in model.named_modules():
        # under a parametrisation the weight is computed, and scaling it would be of no effect
        if isinstance(part, LAYERS) and "weight" in dict(part.named_parameters(recurse=False)):

            def after(layer: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
                calls[id(layer.weight)] += 1
                made[output.grad_fn] = name, layer

            hooks.append(part.register_forward_hook(after))
        elif isinstance(part, NORMS):

            def before(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                calls[id(norm)] += 1
                read[inputs[0].grad_fn] = norm

            hooks.append(part.register_forward_pre_hook(before))
    few = means.relabelled(means.images.take(torch.arange(min(8, len(means.images)))), model)
    with evaluating(model), torch.enable_grad():
        loss = means.task.attacker_loss(model.requires_grad_(True), Batch(few.images, few.labels))
    for hook in hooks:
        hook.remove()
    uses = _uses(loss)
    return [
        (name, layer, read[node])
        for node, (name, layer) in made.items()
        if node in read and uses[node] == calls[id(layer.weight)] == calls[id(read[node])] == 1
    ]


def _uses(loss: Tensor) -> Counter[Node | None]:
    """Count, for every node of the graph that leads to ``loss``, who reads it."""
    assert loss.grad_fn is not None  # all parameters take gradients
    uses: Counter[Node | None] = Counter()
    pending = [loss.grad_fn]
    while pending:
        for node, _ in pending.pop().next_functions:
            if node is not None:
                uses[node] += 1
                if uses[node] == 1:
                    pending.append(node)
    return uses
