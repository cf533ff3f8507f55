"""Fixed norms: protection cannot hide in the scale of weights that a normalisation layer takes out of the function."""

from __future__ import annotations

import torch
from torch import nn

from sophon.domains import Batch
from sophon.surgery.renormalise import norms, rescale, scale_free
from sophon.tasks import Task


class FixedNorms:
    """Remembers the norms of the layers whose scale does not show in the model's function, to give them back.

    Gradients behind a normalisation layer shrink by the scale of its input: weights that only grow look protected to
    an attacker of one rate, and are not to one with a larger rate. See `sophon.surgery.renormalise`.

    Args:
        model: its present norms are remembered; a model without such layers is left alone.
        task: sends the batch through the model.
        batch: a few images with labels that the model's head has; nothing is learnt from them.
        per: whether a ``layer`` has one norm, or each ``channel`` of its output, as far as normalisation allows it.

    All parameters of the model take gradients afterwards; else it is left as it is.
    """

    def __init__(self, model: nn.Module, task: Task, batch: Batch, per: str = "layer") -> None:
        device = next(model.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # a denoiser's loss draws noise
            self._layers = scale_free(model, lambda: task.attacker_loss(model, batch), per=per)
        self._norms = [norms(layer.layer, layer.axis) for layer in self._layers]

    @property
    def names(self) -> list[str]:
        """The layers that keep their norms."""
        return [layer.name for layer in self._layers]

    def project(self) -> None:
        """Scale each layer back to its norm, in place.

        The function in evaluation mode stays the same but for rounding behind BatchNorm, and as far as epsilon is small
        beside the variance behind other normalisation layers.
        """
        for layer, norm in zip(self._layers, self._norms, strict=True):
            rescale(layer, norm)
