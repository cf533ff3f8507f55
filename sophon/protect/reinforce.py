"""NTR, normal training reinforcement: ordinary training on the original domain between two bouts of suppression."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sophon.config import MethodConfig
from sophon.domains import Batch, ImageSet, batches
from sophon.errors import UserError
from sophon.runs import derive_seed
from sophon.tasks import Task


class Reinforcer:
    """Takes NTR steps on the released model.

    Args:
        model: the released model, trained in place, BatchNorm statistics included.
        reference: the unprotected model, distilled from where the task does so.
        task: gives the original domain's loss.
        images: the original domain's training images.
        config: batch size, rate (beta), augmentation.
        seed: the run's.
    """

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module,
        task: Task,
        images: ImageSet,
        config: MethodConfig,
        seed: int,
    ) -> None:
        self.model = model
        self.reference = reference
        self.task = task
        self.images = images
        self.config = config
        self.seed = seed
        self.optimizer = torch.optim.Adam(model.parameters(), lr=config.ntr_lr)

    def run(self, steps: int, *key: object, factor: float = 1.0, anneal: bool = False) -> float:
        """Take ``steps`` steps on batches drawn from the run's seed and ``key``; return the mean loss.

        Args:
            steps: how many.
            key: what the batches depend on besides the seed.
            factor: on the rate.
            anneal: let the rate fall along a half cosine, so that the last steps settle instead of wandering.

        Raises:
            UserError: the loss is not finite.
        """
        stream, parameters = self._begin(key)
        total = 0.0
        for step in range(steps):
            annealed = 0.5 * (1 + math.cos(math.pi * step / steps)) if anneal else 1.0
            self.optimizer.param_groups[0]["lr"] = self.config.ntr_lr * factor * annealed
            loss, gradients = self._gradients(next(stream), parameters)
            for name, parameter in parameters.items():
                parameter.grad = gradients[name]
            self.optimizer.step()
            total += loss
        return total / max(1, steps)

    def gradient(self, *key: object) -> dict[str, Tensor]:
        """Return the gradient of the original domain's loss by parameter, on one batch drawn as by `run`.

        It is a training pass: normalisation layers record the batch in their running statistics.

        Raises:
            UserError: the loss is not finite.
        """
        stream, parameters = self._begin(key)
        return self._gradients(next(stream), parameters)[1]

    def _begin(self, key: tuple[object, ...]) -> tuple[Iterator[Batch], dict[str, nn.Parameter]]:
        torch.manual_seed(derive_seed(self.seed, "ntr", "noise and dropout", *key))
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "ntr", *key))
        stream = batches(self.images, self.config.ntr_batch_size, generator, self.config.ntr_augmentation)
        return stream, self.task.train_mode(self.model, "all")

    def _gradients(self, batch: Batch, parameters: dict[str, nn.Parameter]) -> tuple[float, dict[str, Tensor]]:
        loss = self.task.original_loss(self.model, batch, self.reference)
        if not math.isfinite(loss.item()):
            raise UserError(
                f"method.ntr_lr: the loss on the original domain became {loss.item()} at ntr_lr="
                f"{self.config.ntr_lr}, fts_lr={self.config.fts_lr}; lower them, in a new run_dir "
                "(the last good state is kept)"
            )
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        return loss.item(), dict(zip(parameters, gradients, strict=True))
