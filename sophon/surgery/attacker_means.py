"""`Means`: what an attacker has at hand besides the model, and what using it has cost."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sophon.attacker import FineTuneStrategy
from sophon.domains import ImageSet, LoadedDomain, batches
from sophon.errors import UserError
from sophon.finetune import Loss, fine_tune, flops_per_step
from sophon.models import ModelSpec, build
from sophon.tasks import Task


@dataclass
class Means:
    """What an attacker has at hand.

    Attributes:
        task: the model kind.
        spec: of the released model; a fresh one is built from it.
        classes: of the attacked domain.
        images: the attacker's own images of it.
        generator: on the CPU; draws the attacker's batches.
        original: the domain that the model was made for; None if the attacker does not have it.
        benign: a third domain, likewise.
        relative: a public model of the same architecture, whatever its head; None if the attacker has none.
        batch_size: of what `train` does unless told otherwise.
        flops: spent so far.
    """

    task: Task
    spec: ModelSpec
    classes: tuple[str, ...]
    images: ImageSet
    generator: torch.Generator
    original: LoadedDomain | None = None
    benign: LoadedDomain | None = None
    batch_size: int = 128
    flops: float = 0.0
    relative: nn.Module | None = None

    def fresh(self, like: nn.Module) -> nn.Module:
        """Build the released architecture with random weights from torch's global generator.

        Device, type and the head's size are those of ``like``, which may have another head by now.
        """
        first = next(like.parameters())
        model = build(self.spec)
        count = self.classes_of(like)
        if count != self.classes_of(model):
            self.task.start_head(model, "fresh", [str(index) for index in range(count or 0)])
        return model.to(first.device, first.dtype)

    def classes_of(self, model: nn.Module) -> int | None:
        """Return how many classes the model's head has; None if it has no head."""
        return self.task.adapter.classes_in(model) if self.task.head_names(model) else None

    def relabelled(self, images: ImageSet, model: nn.Module) -> ImageSet:
        """Wrap labels around to those that the model's own head has, for uses where they only have to be allowed."""
        count = self.classes_of(model) or len(images.classes)
        return images.relabelled(images.labels % count, images.classes)

    def run(self, model: nn.Module, count: int) -> None:
        """Send ``count`` batches of the attacker's images through ``model``, and count what that costs."""
        stream = batches(self.relabelled(self.images, model), self.batch_size, self.generator)
        with FlopCounterMode(display=False) as counter:
            for _ in range(count):
                self.task.attacker_loss(model, next(stream))
        self.flops += counter.get_total_flops()

    def train(
        self, model: nn.Module, strategy: FineTuneStrategy, images: ImageSet | None = None, loss: Loss | None = None
    ) -> bool:
        """Fine-tune ``model`` in place and count what that costs.

        Args:
            model: its head fits the images.
            images: to train on; None for the attacker's own.
            loss: to minimise; None for the task's.

        Returns:
            False when the loss stopped being finite, at which point training ends.
        """
        images = self.images if images is None else images
        self.flops += strategy.steps * flops_per_step(model, strategy, self.task, images, loss)
        try:
            fine_tune(model, strategy, self.task, images, self.generator, loss=loss)
        except FloatingPointError:
            return False
        return True

    def domain(self, name: str, where: str) -> LoadedDomain:
        """Return the ``original`` or the ``benign`` domain.

        Raises:
            UserError: the audit has no such domain.
        """
        chosen: LoadedDomain | None = getattr(self, name)
        if chosen is None:
            raise UserError(f"{where}: the audit was given no {name} domain; set domain.{name}")
        return chosen
