"""Ordinary fine-tuning with plain torch.optim: what `pretrain` does and what every attacker of the audit does.

It shares no code with the simulation in `sophon.protect`, so that a bug there cannot certify itself here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel
from torch.utils.flop_counter import FlopCounterMode

from sophon.attacker import FineTuneStrategy, learning_rate
from sophon.domains import Batch, ImageSet, batches
from sophon.errors import UserError, one_line
from sophon.optimizers import build_optimizer
from sophon.tasks import Task

_LARGEST_TRIED = 512  # pixels a side at which it is tried whether a model wants larger images
Loss = Callable[[nn.Module, Batch], Tensor]


def fine_tune(
    model: nn.Module,
    strategy: FineTuneStrategy,
    task: Task,
    images: ImageSet,
    generator: torch.Generator,
    after_step: Callable[[int, float], None] = lambda step, loss: None,
    loss: Loss | None = None,
) -> bool:
    """Fine-tune ``model`` in place on ``images`` for ``strategy.steps`` steps.

    Args:
        model: on the images' device.
        strategy: what to do; its head start, data budget, adapters and surgery have been seen to by the caller.
        task: says what the scope trains, and gives the loss unless another is given.
        images: the training images.
        generator: on the CPU; draws the batches and the augmentation.
        after_step: called with the number of steps done and the loss, after each step.
        loss: to minimise in place of the task's.

    Returns:
        True; False when the loss stopped being finite, at which point fine-tuning ends.
    """
    objective = loss or task.attacker_loss
    descent = Descent(model, strategy, task)
    stream = batches(images, strategy.batch_size, generator, strategy.augmentation)
    for step in range(strategy.steps):
        value = objective(model, next(stream))
        if not math.isfinite(value.item()):
            return False
        value.backward()  # type: ignore[no-untyped-call]
        descent.step()
        after_step(step + 1, value.item())
    return True


class Descent:
    """The steps of a strategy's optimizer, for whoever gives the parameters their gradients.

    Args:
        model: what the strategy's scope trains takes gradients from here on, and nothing else; none has one yet.
        strategy: optimizer, learning rates, clipping and averaging.
        task: says what the scope trains.
    """

    def __init__(self, model: nn.Module, strategy: FineTuneStrategy, task: Task) -> None:
        self._model = model
        self._strategy = strategy
        self._parameters = list(thaw(model, strategy, task).values())
        self._averaged = AveragedModel(model, avg_fn=partial(_averaged, strategy.ema)) if strategy.ema else None
        self._optimizer = build_optimizer(strategy, self._parameters)
        self._optimizer.zero_grad()
        self._done = 0

    def step(self) -> None:
        """Take the next step along the gradients, and clear them."""
        strategy = self._strategy
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(strategy, self._done)
        if strategy.max_norm is not None:
            clip_grad_norm_(self._parameters, strategy.max_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._done += 1
        if self._averaged is not None:
            self._averaged.update_parameters(self._model)
            if self._done == strategy.steps:
                for mean, parameter in zip(self._averaged.module.parameters(), self._model.parameters(), strict=True):
                    parameter.data.copy_(mean)


def _averaged(decay: float, mean: Tensor, now: Tensor, updates: Tensor | int) -> Tensor:
    """Move an average towards ``now``; at first quickly, so that it forgets the weights that it began with."""
    return mean.lerp(now, 1 - min(decay, (1 + int(updates)) / (10 + int(updates))))


def flops_per_step(
    model: nn.Module, strategy: FineTuneStrategy, task: Task, images: ImageSet, loss: Loss | None = None
) -> int:
    """Count the floating-point operations of one forward and backward pass at the strategy's batch size.

    The arguments are those of `fine_tune`; what ``loss`` computes besides, such as a teacher's answers, counts too.

    Optimizer arithmetic is left out: it is small beside them and the same for every role. The model is left as it was,
    apart from its modes and which of its parameters take gradients.
    """
    few = images.take(torch.arange(strategy.batch_size) % len(images))
    parameters = thaw(model, strategy, task)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with FlopCounterMode(display=False) as counter:
        batch = next(batches(few, strategy.batch_size, torch.Generator().manual_seed(0)))
        value = (loss or task.attacker_loss)(model, batch)
        torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return int(counter.get_total_flops())


def rehearse(
    model: nn.Module, strategy: FineTuneStrategy, task: Task, images: ImageSet, key: str, loss: Loss | None = None
) -> None:
    """Take one training pass on at most two images, so that what cannot work is found before the work starts.

    Args:
        model: a copy, ready for the strategy's first step; it ends with other modes and statistics.
        strategy: its scope, ``batch_norm`` and ``batch_size`` count.
        task: says what the scope trains, and gives the loss unless another is given.
        images: the training images.
        key: the configuration key of the batch size, for messages.
        loss: to minimise in place of the task's.

    Raises:
        UserError: the pass fails; the message says whether more images at a time, or larger ones, would do.
    """
    thaw(model, strategy, task)
    objective = loss or task.attacker_loss
    few = images.batch(torch.arange(2) % len(images))

    def failure(count: int, zoom: int = 1) -> str | None:
        pixels = few.images[:count].repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
        try:
            objective(model, Batch(pixels, few.labels[:count]))
        except UserError:
            raise
        except Exception as error:  # models raise whatever their first misfit leads to
            return one_line(error)
        return None

    size = few.images.shape[-1]
    device = few.images.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        reason = failure(min(2, strategy.batch_size))
        if reason is None:
            return
        if strategy.batch_size == 1 and failure(2) is None:
            raise UserError(f"{key}: 1 is too few for this model in training ({reason}); give at least 2")
        for zoom in (2, 4, 8, 16):
            if zoom * size <= _LARGEST_TRIED and failure(2, zoom) is None:
                raise UserError(
                    f"model.image_size: {size} is too small for this model in training ({reason}); {zoom * size} works"
                )
    raise UserError(
        f"model.architecture: a training pass on images of {size} x {size} fails ({reason}); choose another"
    )


def thaw(model: nn.Module, strategy: FineTuneStrategy, task: Task) -> dict[str, nn.Parameter]:
    """Let what the strategy's scope trains take gradients, and nothing else; return it by name.

    The model gets the modes that training it so needs, too.
    """
    parameters = task.train_mode(model, strategy.scope, strategy.blocks)
    if strategy.batch_norm == "frozen":
        for layer in model.modules():
            if isinstance(layer, _BatchNorm):
                layer.eval()
    model.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return parameters
