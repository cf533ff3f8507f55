"""Gradient descent on losses of batches, spread over the ranks and resumable: what the loops of the stages share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sophon.domains import Batch, ImageSet, batches
from sophon.errors import UserError
from sophon.finetune import Loss
from sophon.protection.context import Context
from sophon.protection.optimizer_state import set_gradient
from sophon.seeds import derive_seed, seed_torch


class Term(NamedTuple):
    """One summand of what is minimised.

    Attributes:
        images: which batches are drawn from.
        batch_size: images a step, all ranks together.
        key: the configuration key of ``batch_size``, for messages.
        loss: of the model and a batch, a mean over its images; to minimise.
    """

    images: ImageSet
    batch_size: int
    key: str
    loss: Loss


class Descent:
    """Takes steps on the sum of several terms, BatchNorm statistics included.

    Every batch is spread over the ranks, BatchNorm still sees it whole, and every rank takes the same step. So the
    result is the serial one to rounding, for losses that are means over the images and draw nothing; what they do
    draw (noise, timesteps, dropout), each rank draws for its own slice.

    Args:
        context: the model, the seed, the ranks and the augmentation.
        name: of what is done, from which the seeds of its batches derive.
        terms: what is minimised, one or more.
    """

    def __init__(self, context: Context, name: str, terms: Sequence[Term], optimizer: torch.optim.Optimizer) -> None:
        self.context = context
        self.model = context.model
        self.name = self.label = name
        self.terms = terms
        self.optimizer = optimizer
        self._rates = [group["lr"] for group in optimizer.param_groups]

    def descend(self, steps: int, factor: Callable[[int], float], *key: object) -> float:
        """Take ``steps`` steps on batches drawn from the run's seed and ``key``; return the mean loss.

        Args:
            factor: on the learning rate of each of the optimizer's parameter groups, at step 0 .. steps - 1.
            key: what the batches depend on besides the seed.

        Raises:
            UserError: the loss is not finite.
        """
        streams, parameters = self._begin(key)
        total = 0.0
        for step in range(steps):
            self.context.show(f"{self.label} step {step + 1} of {steps}")
            for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * factor(step)
            loss, gradients = self._gradients(streams, parameters)
            for name, parameter in parameters.items():
                set_gradient(parameter, gradients[name])
            self.optimizer.step()
            total += loss
        return total / max(1, steps)

    def gradient(self, *key: object) -> dict[str, Tensor]:
        """Return the gradient by parameter, on one batch of each term drawn as by `descend`.

        It is a training pass: normalisation layers record the batch in their running statistics.

        Raises:
            UserError: the loss is not finite.
        """
        streams, parameters = self._begin(key)
        return self._gradients(streams, parameters)[1]

    def _begin(self, key: tuple[object, ...]) -> tuple[list[Iterator[Batch]], dict[str, nn.Parameter]]:
        seed, rank, augmentation = self.context.seed, self.context.ranks.rank, self.context.method.ntr_augmentation
        seed_torch(derive_seed(seed, self.name, "noise and dropout", *key, *(("rank", rank) if rank else ())))
        streams = []
        for index, term in enumerate(self.terms):
            drawn = derive_seed(seed, self.name, *key, *(("term", index) if index else ()))
            generator = torch.Generator().manual_seed(drawn)
            streams.append(batches(term.images, term.batch_size, generator, augmentation))
        return streams, self.context.task.train_mode(self.model, "all")

    def _gradients(
        self, streams: Sequence[Iterator[Batch]], parameters: dict[str, nn.Parameter]
    ) -> tuple[float, dict[str, Tensor]]:
        ranks = self.context.ranks
        with ranks.whole_batch():
            losses = []
            for term, stream in zip(self.terms, streams, strict=True):
                part = ranks.share(batch := next(stream))
                # weighted before it is differentiated: through BatchNorm a slice's loss reaches other slices' images
                losses.append(term.loss(self.model, part) * (len(part.labels) / len(batch.labels)))
            loss = torch.stack(losses).sum() if len(losses) > 1 else losses[0]
            own = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
        *gradients, loss = ranks.sum([*own, loss.detach()])
        value, method = loss.item(), self.context.method
        if not math.isfinite(value):
            raise UserError(
                f"method.ntr_lr: the loss of {self.name} became {value} at ntr_lr={method.ntr_lr}, "
                f"fts_lr={method.fts_lr}; lower them, in a new run_dir (the last good state is kept)"
            )
        return value, dict(zip(parameters, gradients, strict=True))
