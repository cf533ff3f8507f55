"""What the loops need to know of a model kind. No other room asks whether a model classifies or denoises."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sophon import losses
from sophon.domains import Batch, ImageSet, evaluation_batches
from sophon.errors import UserError, choose
from sophon.models import ModelSpec, head_prefix, with_fresh_head


@dataclass(frozen=True)
class Metric:
    """A task's primary metric: its name, its unit, and whether more of it is better for the attacker."""

    name: str
    unit: str
    higher_is_better: bool


class Task(Protocol):
    """A model kind, as the loops see it. Losses are scalars to minimise for whoever calls them."""

    metric: Metric

    def attacker_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return what an attacker minimises while it fine-tunes."""

    def suppression_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return what the defender minimises on an attacker's fine-tuned model."""

    def original_loss(self, model: nn.Module, batch: Batch, reference: nn.Module | None) -> Tensor:
        """Return what the defender minimises on the original domain; ``reference`` is distilled from if asked for."""

    def evaluate(self, model: nn.Module, images: ImageSet) -> float:
        """Return the primary metric; leaves the model's modes and buffers as they were."""

    def train_mode(self, model: nn.Module, scope: str) -> dict[str, nn.Parameter]:
        """Put what ``scope`` trains in training mode and all else in evaluation mode; return its parameters by name."""

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


class ClassificationTask:
    """Image classification; the primary metric is accuracy in percent.

    Args:
        spec: the model's input: images are normalised with its mean and std.
        suppression_loss: a key of `sophon.losses.SUPPRESSION_LOSSES`.
        distillation: weight of the reference's distillation in `original_loss`, >= 0.
        temperature: of the distillation, > 0.
        amp: autocast to bfloat16 where the images lie on a CUDA device.
        dtype: of the normalised images; float64 serves gradient checks.

    Raises:
        UserError: the suppression loss is not known.
    """

    metric = Metric("accuracy", "%", higher_is_better=True)
    evaluation_batch_size = 500

    def __init__(
        self,
        spec: ModelSpec,
        *,
        suppression_loss: str = "klu",
        distillation: float = 0.0,
        temperature: float = 2.0,
        amp: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        choose("method.suppression_loss", suppression_loss, losses.SUPPRESSION_LOSSES)
        self.spec = spec
        self.distillation = distillation
        self.temperature = temperature
        self.amp = amp
        self._suppression: Callable[[Tensor, Tensor], Tensor] = losses.SUPPRESSION_LOSSES[suppression_loss]
        self._mean = torch.tensor(spec.mean, dtype=dtype).view(1, -1, 1, 1)
        self._std = torch.tensor(spec.std, dtype=dtype).view(1, -1, 1, 1)

    def prepare(self, images: Tensor) -> Tensor:
        """Normalise uint8 [B, C, H, W] to float [B, C, H, W] with the statistics of the model."""
        mean, std = self._mean.to(images.device), self._std.to(images.device)
        # channels_last: convolutions run about 1.5 times as fast in it, on the CPU as on a GPU
        return ((images.to(mean.dtype) / 255 - mean) / std).contiguous(memory_format=torch.channels_last)

    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return the model's logits, float [B, classes], for uint8 images [B, C, H, W]."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp and images.is_cuda):
            logits: Tensor = model(self.prepare(images))
        return logits.float() if self.amp else logits

    def attacker_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the cross-entropy."""
        return F.cross_entropy(self.logits(model, batch.images), batch.labels)

    def suppression_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the configured suppression loss."""
        return self._suppression(self.logits(model, batch.images), batch.labels)

    def original_loss(self, model: nn.Module, batch: Batch, reference: nn.Module | None = None) -> Tensor:
        """Return the cross-entropy, plus the weighted distillation when there is a reference to distil from."""
        logits = self.logits(model, batch.images)
        loss = F.cross_entropy(logits, batch.labels)
        if reference is None or self.distillation == 0:
            return loss
        with evaluating(reference):
            teacher = self.logits(reference, batch.images)
        return loss + self.distillation * losses.distillation(logits, teacher, self.temperature)

    def evaluate(self, model: nn.Module, images: ImageSet) -> float:
        """Return the accuracy in percent, 0 .. 100."""
        correct = 0
        with evaluating(model):
            for batch in evaluation_batches(images, self.evaluation_batch_size):
                correct += int((self.logits(model, batch.images).argmax(1) == batch.labels).sum())
        return 100 * correct / len(images)

    def train_mode(self, model: nn.Module, scope: str) -> dict[str, nn.Parameter]:
        """Put what ``scope`` (``all`` or ``head``) trains in training mode; return its parameters by name.

        A frozen backbone stays in evaluation mode: its BatchNorm layers then use the statistics they were released
        with, which is what a linear probe means.
        """
        model.train(scope == "all")
        if scope == "head":
            model.get_submodule(head_prefix(model, self.spec)).train()
        names = self.head_names(model) if scope == "head" else None
        return {name: p for name, p in model.named_parameters() if names is None or name in names}

    def head_names(self, model: nn.Module) -> set[str]:
        """Name the parameters of the last layer."""
        prefix = head_prefix(model, self.spec) + "."
        return {name for name, _ in model.named_parameters() if name.startswith(prefix)}

    def start_head(self, model: nn.Module, head: str, classes: Sequence[str]) -> None:
        """Replace the last layer unless it is ``kept``.

        Raises:
            UserError: the head is to be kept, but the model and ``classes`` differ in number.
        """
        if head != "kept":
            with_fresh_head(model, self.spec, classes)
            return
        outputs = model.get_parameter(head_prefix(model, self.spec) + ".weight").shape[0]
        if outputs != len(classes):
            raise UserError(
                f"head: 'kept' needs as many classes as the model has, but the model has {outputs} and the restricted "
                f"domain {len(classes)}; use head fresh or probed, or choose {outputs} of its classes"
            )


TASKS: dict[str, type[ClassificationTask]] = {"classification": ClassificationTask}
