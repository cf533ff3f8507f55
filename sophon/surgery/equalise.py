"""Equalising of channels: surgery against protection that hides in how unevenly channels are scaled."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sophon.models.channels import Channels, channels, normaliser_behind, scale
from sophon.surgery.attacker_means import Means
from sophon.surgery.renormalise import ScaleFree, norms, rescale


def equalise(model: nn.Module, means: Means) -> nn.Module:
    """Give the channels that blocks of a ResNet hand on a scale of one; the function in evaluation mode stays.

    A channel that is twice as large where it is written may be read with half the weight: the function does not show
    it, but the steps of all optimizers do, and where channels differ by orders of magnitude no rate suits all. This
    undoes ``spread`` of ``method=coordinates``; `centre`, this once more and `renormalise` undo the rest of it. A
    channel's scale is the root of the summed squares of the weights and biases that BatchNorm writes it with; it
    becomes one to a factor of the root of two, by powers of two, which round nothing. What reads channels keeps its
    norm where a normalisation follows. The idea is that of cross-layer equalisation (Nagel et al., 2019).

    Models other than timm's ResNets of plain blocks are left as they are.
    """
    equalise_channels(model)
    return model


@torch.no_grad()
def equalise_channels(model: nn.Module) -> dict[str, Tensor]:
    """Do what `equalise` does; return what was multiplied, as `scale_channels` does."""
    total: dict[str, Tensor] = {}
    for place in channels(model):
        written: list[Tensor] = [
            model.get_parameter(f"{name}.{part}") for name in place.writers for part in ("weight", "bias")
        ]
        sizes = torch.stack(written).double().square().sum(0).sqrt()
        if bool((sizes > 0).all() and sizes.isfinite().all()):
            for name, factor in scale_channels(model, place, (1 / sizes).log2().round().exp2()).items():
                total[name] = total[name] * factor if name in total else factor
    return total


def scale_channels(model: nn.Module, place: Channels, by: Tensor) -> dict[str, Tensor]:
    """Scale channels as `sophon.models.channels.scale` does, and keep the norms of what reads them.

    Returns:
        By parameter name, what was multiplied with: of a shape that broadcasts to the parameter's.
    """
    layers = {name: model.get_submodule(name) for name in place.readers}
    wanted = {name: norms(layer, None) for name, layer in layers.items()}
    scale(model, place, by)
    factors = {f"{name}.{part}": by for name in place.writers for part in ("weight", "bias")}
    for name, layer in layers.items():
        factors[f"{name}.weight"] = (1 / by).view(1, -1, *[1] * (layer.get_parameter("weight").dim() - 2))
        if isinstance(layer, nn.Conv2d):
            for part, factor in rescale(reader(model, name), wanted[name]).items():
                factors[part] = factors[part] * factor if part in factors else factor
    return {name: factor.to(model.get_parameter(name).dtype) for name, factor in factors.items()}


def reader(model: nn.Module, name: str) -> ScaleFree:
    """Return a convolution that reads an interface, with the normalisation behind it, as `rescale` takes it."""
    behind = normaliser_behind(name)
    return ScaleFree(name, model.get_submodule(name), behind, model.get_submodule(behind), None)
