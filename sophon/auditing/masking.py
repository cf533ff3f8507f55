"""Gradient masking: protection that hides in the scale of weights, and that a rate or a re-normalisation undoes.

Where a normalisation follows, a layer's scale does not show in the function, but its gradient shrinks by it: weights
that are c times as large see a gradient 1/c as large, and move 1/c^2 as far relative to their size. So the gradient
that an attacker sees falls, and the gradient times the weights' norm does not: `measure` looks for that in the
released weights. What it is worth to an attacker who knows, `sophon.auditing.results` reads from attacks that were run.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from sophon.attacker import FineTuneStrategy
from sophon.auditing.attacks import Attacker
from sophon.auditing.words import ROLES
from sophon.config import MaskingConfig
from sophon.domains import LoadedDomain
from sophon.errors import UserError
from sophon.models import ModelSpec
from sophon.seeds import derive_seed, seed_all
from sophon.surgery import Means
from sophon.surgery.renormalise import norms as norms_of
from sophon.surgery.renormalise import scale_free
from sophon.tasks import Task

COMPARED = ROLES[:2]  # a fresh model has nothing to hide
_IMAGES = 128  # that the gradient is taken on
_FEW = 8  # images that show which layers feed a normalisation


@dataclass(frozen=True)
class Norms:
    """How much larger the protected weights are where a normalisation hides it: ratios of norms, over what is not 0.

    Attributes:
        of: ``layers``, or the ``channels`` of those whose output channels are normalised by themselves.
        count: how many.
        mean: geometric.
        least: the smallest ratio.
        most: the largest.
    """

    of: str
    count: int
    mean: float
    least: float
    most: float


@dataclass(frozen=True)
class Seen:
    """A quantity that an attacker sees of both models before its first step; ``ratio`` is NaN unless both are positive.

    Attributes:
        head: how its head started.
        quantity: ``loss``; ``gradient`` (its norm, the head left out); ``hidden_gradient`` (of the weights before
            normalisation only); or ``scale_free_gradient``, the sum over these layers of norm of weight times norm of
            gradient, which does not change with the layers' scale.
        protected: of the protected model; NaN where a loss is not finite.
        unprotected: of the other.
        ratio: protected / unprotected.
    """

    head: str
    quantity: str
    protected: float
    unprotected: float
    ratio: float


@dataclass(frozen=True)
class Masking:
    """What was measured, and the head starts that do not fit, with the reason."""

    norms: list[Norms]
    seen: list[Seen]
    left_out: dict[str, str]

    def growth(self) -> Norms | None:
        """Return the ratios of whole layers; None where no layer hides its scale."""
        return next((norms for norms in self.norms if norms.of == "layers"), None)


def measure(
    models: Mapping[str, nn.Module],
    spec: ModelSpec,
    task: Task,
    restricted: LoadedDomain,
    config: MaskingConfig,
    seed: int,
) -> Masking | None:
    """Compare what an attacker's first step sees of the protected and of the unprotected weights.

    Both roles face the same head, images and noise. Only the ``attack`` split is read.

    Args:
        models: ``protected`` and ``unprotected``, of one architecture; left as they are.
        task: the model kind, without autocast.
        seed: of everything drawn; the same seed gives the same result.

    Returns:
        None if there are no head starts.
    """
    if not config.heads:
        return None
    means = Means(task, spec, restricted.classes, restricted["attack"], torch.Generator())
    layers = _hidden_layers(copy.deepcopy(models["unprotected"]), means)
    seen: list[Seen] = []
    left_out: dict[str, str] = {}
    for head in config.heads:
        try:
            protected, unprotected = (
                _quantities(copy.deepcopy(models[role]), FineTuneStrategy(head=head), means, layers, restricted, seed)
                for role in COMPARED
            )
        except UserError as error:
            left_out[head] = str(error)
            continue
        seen += [
            Seen(head, name, value, unprotected[name], _ratio(value, unprotected[name]))
            for name, value in protected.items()
        ]
    return Masking(_norms(models, layers), seen, left_out)


def _hidden_layers(model: nn.Module, means: Means) -> dict[str, int | None]:
    """Return the layers that feed a normalisation, with the axis of the weight's channels if these have scales."""
    loss = partial(means.task.attacker_loss, model, means.relabelled(means.images, model).first(_FEW))
    return {layer.name: layer.axis for layer in scale_free(model, loss, per="channel")}


def _quantities(
    model: nn.Module,
    strategy: FineTuneStrategy,
    means: Means,
    layers: Iterable[str],
    restricted: LoadedDomain,
    seed: int,
) -> dict[str, float]:
    """Return by `Seen.quantity` what an attacker sees before its first step; ``model`` is changed."""
    task = means.task
    attacker = Attacker(model, strategy, task, restricted, spec=means.spec, seed=seed, eval_points=2, read_test=False)
    outside = task.head_names(attacker.model)
    body = {name: part for name, part in task.train_mode(attacker.model, "all").items() if name not in outside}
    for part in body.values():
        part.requires_grad_(True)
    seed_all(derive_seed(seed, "noise"))
    loss = task.attacker_loss(attacker.model, restricted["attack"].spread(_IMAGES))
    slopes = torch.autograd.grad(loss, list(body.values()), materialize_grads=True, allow_unused=True)
    sizes = {name: _norm(part) for name, part in body.items()}
    steepness = {name: _norm(slope) for name, slope in zip(body, slopes, strict=True)}
    hidden = [f"{name}.weight" for name in layers]
    return {
        "loss": float(loss.detach()),
        "gradient": math.hypot(*steepness.values()),
        "hidden_gradient": math.hypot(*(steepness[name] for name in hidden)),
        "scale_free_gradient": math.fsum(sizes[name] * steepness[name] for name in hidden),
    }


def _norm(tensor: Tensor) -> float:
    return float(tensor.detach().double().norm())


def _ratio(protected: float, unprotected: float) -> float:
    return protected / unprotected if 0 < protected < math.inf and 0 < unprotected < math.inf else math.nan


def _norms(models: Mapping[str, nn.Module], layers: Mapping[str, int | None]) -> list[Norms]:
    """Compare the released weights: whole layers, and the channels of those that have scales of their own."""
    rows = []
    apart = {name: axis for name, axis in layers.items() if axis is not None}
    for kind, axes in (("layers", dict.fromkeys(layers)), ("channels", apart)):
        sizes = [
            np.concatenate(
                [
                    norms_of(models[role].get_submodule(name), axis).flatten().cpu().numpy()
                    for name, axis in axes.items()
                ]
            )
            for role in COMPARED
            if axes
        ]
        if not sizes:
            continue
        kept = np.logical_and.reduce([(lengths > 0) & np.isfinite(lengths) for lengths in sizes])
        ratios = sizes[0][kept] / sizes[1][kept]
        if len(ratios):
            mean = float(np.exp(np.log(ratios).mean()))
            rows.append(Norms(kind, len(ratios), mean, float(ratios.min()), float(ratios.max())))
    return rows
