"""Image classification, as the loops see it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sophon import losses
from sophon.attacker import SCOPES
from sophon.config import MethodConfig, TaskConfig
from sophon.domains import Batch, ImageSet, evaluation_batches
from sophon.errors import choose
from sophon.models import ModelSpec
from sophon.tasks.task import ATTENTION, Measured, Metric, Task, evaluating, within_scope


class ClassificationTask(Task):
    """Image classification; the primary metric is accuracy in percent.

    Args:
        temperature: of the distillation, > 0.
        dtype: of the normalised images; float64 serves gradient checks.
    """

    kind = "classification"
    suppression_losses = losses.SUPPRESSION_LOSSES
    metric = Metric("accuracy", "%", higher_is_better=True)
    evaluation_batch_size = 500
    suspects = "model.mean, model.std, model.image_size, the order of the classes and of the colour channels"

    def __init__(
        self,
        spec: ModelSpec,
        *,
        suppression_loss: str | None = None,
        distillation: float = 0.0,
        temperature: float = 2.0,
        amp: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(spec, suppression_loss, distillation, amp)
        self.temperature = temperature
        self.reads_labels = self._suppression is not None and losses.reads_labels(self._suppression)
        self._mean = torch.tensor(spec.mean, dtype=dtype).view(1, -1, 1, 1)
        self._std = torch.tensor(spec.std, dtype=dtype).view(1, -1, 1, 1)

    @classmethod
    def from_config(cls, spec: ModelSpec, settings: TaskConfig, method: MethodConfig | None, *, amp: bool) -> Self:
        """Make the task of a run; ``method`` is None where nothing is protected."""
        if method is None:
            return cls(spec, amp=amp)
        return cls(
            spec,
            suppression_loss=method.suppression_loss,
            distillation=method.distillation,
            temperature=method.temperature,
            amp=amp,
        )

    def prepare(self, images: Tensor) -> Tensor:
        """Normalise uint8 [B, C, H, W] to float [B, C, H, W] with the statistics of the model."""
        mean, std = self._mean.to(images.device), self._std.to(images.device)
        # channels_last: convolutions run about 1.5 times as fast in it, on the CPU as on a GPU
        return ((images.to(mean.dtype) / 255 - mean) / std).contiguous(memory_format=torch.channels_last)

    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return the model's logits, float [B, classes], for uint8 images [B, C, H, W]."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp):
            logits = self.adapter.forward(model, self.prepare(images))
        return logits.float() if self.amp else logits

    def attacker_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the cross-entropy."""
        return F.cross_entropy(self.logits(model, batch.images), batch.labels)

    def suppression_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the configured suppression loss."""
        return self._suppress(self.logits(model, batch.images), batch.labels)

    def original_loss(
        self, model: nn.Module, batch: Batch, reference: nn.Module | None = None, labels: float = 1.0
    ) -> Tensor:
        """Return the cross-entropy times ``labels``, plus the weighted distillation where a reference is given."""
        logits = self.logits(model, batch.images)
        loss = labels * F.cross_entropy(logits, batch.labels)
        if reference is None or self.distillation == 0:
            return loss
        return loss + self.distillation * self._distance(logits, batch, reference)

    def imitation_loss(self, model: nn.Module, batch: Batch, reference: nn.Module) -> Tensor:
        """Return the distillation of the reference's logits at the task's temperature; labels are not read."""
        return self._distance(self.logits(model, batch.images), batch, reference)

    def _distance(self, logits: Tensor, batch: Batch, reference: nn.Module) -> Tensor:
        with evaluating(reference):
            teacher = self.logits(reference, batch.images)
        return losses.distillation(logits, teacher, self.temperature)

    def chance_loss(self, model: nn.Module) -> float:
        """Return log C, the cross-entropy of a uniform guess over the model's C outputs."""
        return math.log(model.get_parameter(f"{self.adapter.head}.weight").shape[0])

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[list[Tensor]]:
        """Collect the input of the last layer, float [B, D], of every pass inside."""
        seen: list[Tensor] = []
        head = model.get_submodule(str(self.adapter.head))

        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            features = inputs[0].flatten(1)
            seen.append(features.float() if self.amp else features)

        hook = head.register_forward_pre_hook(keep)
        try:
            yield seen
        finally:
            hook.remove()

    def features(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return the input of the last layer, float [B, D]; in training mode it is a training pass."""
        with self.watching(model) as seen:
            self.logits(model, images)
        return seen[0]

    def evaluate(self, model: nn.Module, images: ImageSet) -> float:
        """Return the accuracy in percent, 0 .. 100; NaN if a logit is not finite."""
        return 100 * self._sum(model, images, lambda logits, labels: (logits.argmax(1) == labels).sum()) / len(images)

    def chance(self, images: ImageSet) -> Measured:
        """Return the accuracy in percent of always naming the commonest class, with its binomial error."""
        count = len(images)
        part = float(images.labels.bincount().max()) / count
        return Measured(100 * part, 100 * math.sqrt(part * (1 - part) / count), count)

    def measure(self, model: nn.Module, images: ImageSet) -> Measured:
        """Return the accuracy in percent with Agresti and Coull's binomial error, which is not 0 at 0 or 100 %."""
        value, count = self.evaluate(model, images), len(images)
        part = (value / 100 * count + 2) / (count + 4)
        return Measured(value, 100 * math.sqrt(part * (1 - part) / (count + 4)), count)

    def details(self, model: nn.Module, images: ImageSet) -> dict[str, float]:
        """Return the mean cross-entropy; NaN if a logit is not finite."""
        total = self._sum(model, images, partial(F.cross_entropy, reduction="sum"))
        return {"cross-entropy": total / len(images)}

    def _sum(self, model: nn.Module, images: ImageSet, score: Callable[[Tensor, Tensor], Tensor]) -> float:
        """Add up the score of each batch's logits and labels, in evaluation mode; NaN if a logit is not finite."""
        total = 0.0
        with evaluating(model):
            for batch in evaluation_batches(images, self.evaluation_batch_size):
                logits = self.logits(model, batch.images)
                if not logits.isfinite().all():
                    return math.nan
                total += float(score(logits, batch.labels))
        return total

    def train_mode(self, model: nn.Module, scope: str, blocks: int = 1) -> dict[str, nn.Parameter]:
        """Put what ``scope`` trains in training mode; return its parameters, the head's among them, by name.

        Only with ``head`` does the rest stay in evaluation mode: BatchNorm layers then use the statistics they were
        released with, which is what a linear probe means.

        Raises:
            UserError: ``scope`` is one that the model does not have, or it has fewer ``blocks``.
        """
        known = scope not in ATTENTION or ATTENTION[scope](model)
        choose("scope", scope, SCOPES if known else [name for name in SCOPES if name != scope])
        names = within_scope(self, model, scope, blocks) | self.head_names(model)
        model.train(scope != "head")
        if scope == "head":
            model.get_submodule(str(self.adapter.head)).train()
        return {name: parameter for name, parameter in model.named_parameters() if name in names}

    def head_names(self, model: nn.Module) -> set[str]:
        """Name the parameters of the last layer."""
        prefix = f"{self.adapter.head}."
        return {name for name, _ in model.named_parameters() if name.startswith(prefix)}

    def start_head(self, model: nn.Module, head: str, classes: Sequence[str]) -> None:
        """Replace the last layer unless it is ``kept``.

        Raises:
            UserError: the head is to be kept, but the model and ``classes`` differ in number.
        """
        if head != "kept":
            self.adapter.start_head(model, classes)
        else:
            self._require_classes(model.get_parameter(f"{self.adapter.head}.weight").shape[0], classes)
