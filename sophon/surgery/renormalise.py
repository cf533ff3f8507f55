"""Re-normalisation of layers whose scale does not show in the function: surgery against protection that hides there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from sophon.surgery.attacker_means import Means
from sophon.tasks.task import evaluating

NORMALISATIONS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)  # with timm's, which are subclasses
LAYERS = (_ConvNd, nn.Linear)

Per = Literal["layer", "channel"]


class ScaleFree(NamedTuple):
    """A layer whose scale does not show in the model's function, for only a normalisation layer reads its output.

    Attributes:
        name: of the layer.
        layer: a convolution or a linear layer.
        normaliser_name: of the normalisation layer.
        normaliser: the normalisation layer.
        axis: of the layer's weight, along which each entry may have a scale of its own; None if only the whole may.
    """

    name: str
    layer: nn.Module
    normaliser_name: str
    normaliser: nn.Module
    axis: int | None


def renormalise(model: nn.Module, means: Means, *, per: Per = "layer") -> nn.Module:
    """Scale each layer that only feeds a normalisation layer to the norm that it has in a fresh model.

    This undoes protection that hides in the scale of weights: normalisation takes the scale out of the function, but
    gradients shrink by it. Behind BatchNorm the function in evaluation mode stays the same but for rounding, because
    the statistics are scaled too and the affine weight makes up for epsilon. Epsilon's part cannot be made up for in
    layers without running statistics or without an affine weight: their function stays the same only as far as epsilon
    is small beside the variance. A layer of zeros, or one that is zero in a fresh model, is left as it is.

    Per ``channel`` it does so for each output channel by itself, where normalisation does: uneven channels are a place
    to hide as well. Where several are normalised together (GroupNorm, LayerNorm), their ratio shows in the function,
    and the layer as a whole is scaled.
    """
    rescale_to_fresh(model, means, per=per)
    return model


def rescale_to_fresh(model: nn.Module, means: Means, *, per: Per = "layer") -> dict[str, Tensor]:
    """Do what `renormalise` does; return what was multiplied, as `rescale` does, of all layers."""
    fresh = means.fresh(model)
    batch = means.relabelled(means.images, model).first(8)
    factors: dict[str, Tensor] = {}
    for layer in scale_free(model, lambda: means.task.attacker_loss(model, batch), per=per):
        factors |= rescale(layer, norms(fresh.get_submodule(layer.name), layer.axis))
    return factors


def norms(layer: nn.Module, axis: int | None) -> Tensor:
    """Return the norm of the layer's weight, or of each entry along an axis.

    Returns:
        float64, of the weight's dimensions, each of size 1 but for ``axis``.
    """
    weight = layer.get_parameter("weight").detach()
    others = [dimension for dimension in range(weight.dim()) if dimension != axis]
    lengths: Tensor = torch.linalg.vector_norm(weight, dim=others, keepdim=True, dtype=torch.float64)
    return lengths


@torch.no_grad()
def rescale(place: ScaleFree, wanted: Tensor) -> dict[str, Tensor]:
    """Scale a layer, in place, to other norms; the function in evaluation mode stays, as `renormalise` tells.

    Args:
        wanted: its norms to be, as `norms` returns them. Where one is zero or not finite, or the present one is,
            nothing changes.

    Returns:
        By parameter name, what was multiplied with: of a shape that broadcasts to the parameter's.
    """
    layer, normaliser = place.layer, place.normaliser
    ratio = wanted / norms(layer, place.axis)
    scale = torch.where((ratio > 0) & ratio.isfinite(), ratio, 1.0)
    factors = {}
    for name, factor in (("weight", scale), ("bias", scale.flatten())):
        if (parameter := getattr(layer, name)) is not None:
            factors[f"{place.name}.{name}"] = factor.to(parameter.dtype)
            parameter.mul_(factors[f"{place.name}.{name}"])
    if isinstance(normaliser, _NormBase) and normaliser.running_mean is not None and normaliser.running_var is not None:
        scale, before = scale.flatten(), normaliser.running_var.double() + normaliser.eps
        normaliser.running_mean.mul_(scale.to(normaliser.running_mean.dtype))
        normaliser.running_var.mul_(scale.square().to(normaliser.running_var.dtype))
        if normaliser.weight is not None:
            made_up = ((normaliser.running_var.double() + normaliser.eps) / before).sqrt() / scale
            normaliser.weight.mul_(made_up)
            factors[f"{place.normaliser_name}.weight"] = made_up.to(normaliser.weight.dtype)
    return factors


def scale_free(model: nn.Module, loss: Callable[[], Tensor], *, per: str = "layer") -> list[ScaleFree]:
    """Find convolutions and linear layers whose output goes into one normalisation layer and nowhere else.

    Autograd's graph tells who reads a tensor: an in-place change gives it another node, and additions and
    concatenations, which no module sees, are edges as well.

    Args:
        model: all its parameters take gradients afterwards; else it is left as it is.
        loss: sends a batch through the model, once, which is then in evaluation mode.
        per: ``layer`` to scale each as a whole, or ``channel`` to scale its outputs, where each is normalised alone.
    """
    made: dict[Node | None, tuple[str, nn.Module, int]] = {}
    read: dict[Node | None, tuple[str, nn.Module]] = {}
    calls: Counter[int] = Counter()  # by identity: of a layer's weight, which others may share, or of a normaliser
    hooks = []
    for name, part in model.named_modules():
        # under a parametrisation the weight is computed, and scaling it would be of no effect
        if isinstance(part, LAYERS) and "weight" in dict(part.named_parameters(recurse=False)):

            def after(layer: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
                calls[id(layer.weight)] += 1
                made[output.grad_fn] = name, layer, output.dim()

            hooks.append(part.register_forward_hook(after))
        elif isinstance(part, NORMALISATIONS):

            def before(normaliser: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                calls[id(normaliser)] += 1
                read[inputs[0].grad_fn] = name, normaliser

            hooks.append(part.register_forward_pre_hook(before))
    model.requires_grad_(True)
    with evaluating(model), torch.enable_grad():
        uses = _uses(loss())
    for hook in hooks:
        hook.remove()
    return [
        ScaleFree(name, layer, *read[node], _axis(layer, read[node][1], dimensions) if per == "channel" else None)
        for node, (name, layer, dimensions) in made.items()
        if node in read and uses[node] == calls[id(layer.weight)] == calls[id(read[node][1])] == 1
    ]


def _axis(layer: nn.Module, normaliser: nn.Module, dimensions: int) -> int | None:
    """Return the axis of a weight's output channels if each is normalised by itself; ``dimensions``: of the output."""
    alone = isinstance(normaliser, _NormBase) or (
        isinstance(normaliser, nn.GroupNorm) and normaliser.num_groups == normaliser.num_channels
    )
    if not alone:
        return None
    if isinstance(layer, _ConvNd):
        # a transposed one in groups has its channels on two axes
        return 0 if not layer.transposed else 1 if layer.groups == 1 else None
    # a linear layer's channels come last, but are normalised on axis 1, or on axis 0 of an image without a batch
    return 0 if dimensions == 2 and not isinstance(normaliser, _InstanceNorm) else None


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
