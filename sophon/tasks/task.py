"""What the loops need to know of a model kind. No other room asks whether a model classifies or denoises."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from sophon.domains import Batch, ImageSet


@dataclass(frozen=True)
class Metric:
    """A task's primary metric: its name, its unit, and whether more of it is better for the attacker."""

    name: str
    unit: str
    higher_is_better: bool


class Task(Protocol):
    """A model kind, as the loops see it. Losses are scalars to minimise for whoever calls them.

    What a loss draws at random (noise, dropout) comes from torch's global generator, which the loops seed.
    """

    metric: Metric

    def attacker_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return what an attacker minimises while it fine-tunes."""

    def suppression_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return what the defender minimises on an attacker's fine-tuned model."""

    def original_loss(self, model: nn.Module, batch: Batch, reference: nn.Module | None) -> Tensor:
        """Return what the defender minimises on the original domain; ``reference`` is distilled from if asked for."""

    def evaluate(self, model: nn.Module, images: ImageSet) -> float:
        """Return the primary metric; leaves the model, its modes and the global generator as they were."""

    def details(self, model: nn.Module, images: ImageSet) -> dict[str, float]:
        """Return further measurements by name, of the same images, under the same promises as `evaluate`."""

    def sample(self, model: nn.Module, count: int, seed: int) -> Tensor | None:
        """Return images that the model generates, uint8 [count, C, H, W] on the CPU; None if its kind does not."""

    def train_mode(self, model: nn.Module, scope: str) -> dict[str, nn.Parameter]:
        """Put the model in the mode that training ``scope`` needs; return the parameters of that scope by name."""

    def head_names(self, model: nn.Module) -> set[str]:
        """Name the parameters that belong to the domain rather than to the features."""

    def start_head(self, model: nn.Module, head: str, classes: Sequence[str]) -> None:
        """Make the model's head ready for ``classes``: checked when ``kept``, newly initialised otherwise."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in evaluation mode without gradients, and give every module its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
