"""NTR, normal training reinforcement: ordinary training on the original domain between two bouts of suppression."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sophon.config import MethodConfig
from sophon.domains import Batch, ImageSet, batches
from sophon.errors import UserError
from sophon.losses import well_conditioning
from sophon.protect.distributed import ALONE, Ranks
from sophon.protect.inner_loop import frozen_statistics
from sophon.protect.objectives import features_of
from sophon.seeds import derive_seed
from sophon.tasks import Task


class NTR:
    """Takes NTR steps on the released model.

    Every batch is spread over the ranks, BatchNorm still sees it whole, and every rank takes the same Adam step. So the
    result is the serial one to rounding, for a loss that is a mean over the images and draws nothing; what it does
    draw (noise, timesteps, dropout), each rank draws for its own slice; and ``config.condition`` keeps the features of
    each slice well-conditioned.

    Args:
        model: the released model, trained in place, BatchNorm statistics included.
        reference: the unprotected model, distilled from where the task does so.
        task: gives the original domain's loss.
        images: the original domain's training images.
        config: batch size, rate (beta), augmentation.
        seed: the run's.
        ranks: who trains on which slice of a batch.
    """

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module,
        task: Task,
        images: ImageSet,
        config: MethodConfig,
        seed: int,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model = model
        self.reference = reference
        self.task = task
        self.images = images
        self.config = config
        self.seed = seed
        self.ranks = ranks
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
            loss, gradients = self._gradients(stream, parameters)
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
        return self._gradients(stream, parameters)[1]

    def _begin(self, key: tuple[object, ...]) -> tuple[Iterator[Batch], dict[str, nn.Parameter]]:
        own = ("rank", self.ranks.rank) if self.ranks.rank else ()
        torch.manual_seed(derive_seed(self.seed, "ntr", "noise and dropout", *key, *own))
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "ntr", *key))
        stream = batches(self.images, self.config.ntr_batch_size, generator, self.config.ntr_augmentation)
        return stream, self.task.train_mode(self.model, "all")

    def _loss(self, part: Batch) -> Tensor:
        loss = self.task.original_loss(self.model, part, self.reference)
        if not self.config.condition:
            return loss
        with frozen_statistics(self.model):  # the pass before has recorded this batch
            features = features_of(self.task, self.model, part.images)
        return loss + self.config.condition * well_conditioning(features)

    def _gradients(
        self, stream: Iterator[Batch], parameters: dict[str, nn.Parameter]
    ) -> tuple[float, dict[str, Tensor]]:
        batch = next(stream)
        part = self.ranks.share(batch)
        with self.ranks.whole_batch():
            # weighted before it is differentiated: through BatchNorm a slice's loss reaches the other slices' images
            loss = self._loss(part) * (len(part.labels) / len(batch.labels))
            found = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
        *gradients, loss = self.ranks.sum([*found, loss.detach()])
        value = loss.item()
        if not math.isfinite(value):
            raise UserError(
                f"method.ntr_lr: the loss on the original domain became {value} at ntr_lr="
                f"{self.config.ntr_lr}, fts_lr={self.config.fts_lr}; lower them, in a new run_dir "
                "(the last good state is kept)"
            )
        return value, dict(zip(parameters, gradients, strict=True))
