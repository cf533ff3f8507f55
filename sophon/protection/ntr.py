"""NTR, normal training reinforcement: ordinary training on the original domain between two bouts of suppression."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from sophon.domains import Batch, batches
from sophon.errors import UserError
from sophon.protection.context import Context
from sophon.protection.inner_loop import Objective
from sophon.protection.optimizer_state import defenders_adam, set_gradient
from sophon.seeds import derive_seed, seed_torch


class NTR:
    """Takes NTR steps on the context's model, BatchNorm statistics included.

    Every batch is spread over the ranks, BatchNorm still sees it whole, and every rank takes the same Adam step. So the
    result is the serial one to rounding, for a loss that is a mean over the images and draws nothing; what it does
    draw (noise, timesteps, dropout), each rank draws for its own slice, and each objective sees a slice by itself.

    Args:
        context: the model, what it is distilled from, the original domain; the method's rate (beta) and batches.
        objectives: what they ask of the original domain comes on top of its loss.
    """

    def __init__(self, context: Context, objectives: Sequence[Objective] = ()) -> None:
        self.context = context
        self.model = context.model
        self.objectives = objectives
        self.optimizer = defenders_adam(self.model.parameters(), context.method.ntr_lr)

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
            self.optimizer.param_groups[0]["lr"] = self.context.method.ntr_lr * factor * annealed
            loss, gradients = self._gradients(stream, parameters)
            for name, parameter in parameters.items():
                set_gradient(parameter, gradients[name])
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
        seed, rank, method = self.context.seed, self.context.ranks.rank, self.context.method
        seed_torch(derive_seed(seed, "ntr", "noise and dropout", *key, *(("rank", rank) if rank else ())))
        generator = torch.Generator().manual_seed(derive_seed(seed, "ntr", *key))
        stream = batches(self.context.original["train"], method.ntr_batch_size, generator, method.ntr_augmentation)
        return stream, self.context.task.train_mode(self.model, "all")

    def _loss(self, part: Batch) -> Tensor:
        task = self.context.task
        loss = task.original_loss(self.model, part, self.context.reference)
        for objective in self.objectives:
            asked = objective.on_original(self.model, task, part)
            loss = loss if asked is None else loss + asked
        return loss

    def _gradients(
        self, stream: Iterator[Batch], parameters: dict[str, nn.Parameter]
    ) -> tuple[float, dict[str, Tensor]]:
        batch, ranks = next(stream), self.context.ranks
        part = ranks.share(batch)
        with ranks.whole_batch():
            # weighted before it is differentiated: through BatchNorm a slice's loss reaches the other slices' images
            loss = self._loss(part) * (len(part.labels) / len(batch.labels))
            found = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
        *gradients, loss = ranks.sum([*found, loss.detach()])
        value, method = loss.item(), self.context.method
        if not math.isfinite(value):
            raise UserError(
                f"method.ntr_lr: the loss on the original domain became {value} at ntr_lr="
                f"{method.ntr_lr}, fts_lr={method.fts_lr}; lower them, in a new run_dir (the last good state is kept)"
            )
        return value, dict(zip(parameters, gradients, strict=True))
