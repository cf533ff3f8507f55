"""Ordinary fine-tuning with plain torch.optim: what `pretrain` does and what every attacker of the audit does.

It shares no code with the simulation in `sophon.protection`, so that a bug there cannot certify itself here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel
from torch.utils.flop_counter import FlopCounterMode

from sophon.arguments import check_arguments, function_at
from sophon.attacker import LOOPS, OPTIMIZERS, SCHEDULES, FineTuneStrategy
from sophon.domains import Batch, ImageSet, MemoryImages, batches
from sophon.errors import UserError, one_line
from sophon.optimizers import build_optimizer, check_optimizer
from sophon.tasks import Task

_LARGEST_TRIED = 512  # pixels a side at which it is tried whether a model wants larger images
Loss = Callable[[nn.Module, Batch], Tensor]
OnStep = Callable[[int, float], None]
Loop = Callable[[nn.Module, FineTuneStrategy, Task, ImageSet, torch.Generator, OnStep], nn.Module]
_LOOP = ("model", "strategy", "task", "images", "generator", "on_step")


def fine_tune(
    model: nn.Module,
    strategy: FineTuneStrategy,
    task: Task,
    images: ImageSet,
    generator: torch.Generator,
    on_step: OnStep = lambda step, loss: None,
    *,
    loss: Loss | None = None,
) -> nn.Module:
    """Fine-tune ``model`` in place on ``images`` for ``strategy.steps`` steps: the plainest `Loop`.

    Args:
        model: on the images' device.
        strategy: what to do; its head start, data budget, adapters and surgery have been seen to by the caller.
        task: says what the scope trains, and gives the loss unless another is given.
        generator: on the CPU; draws the batches and the augmentation.
        on_step: called with the number of steps done and the loss, after each step; it may raise.
        loss: to minimise in place of the task's.

    Returns:
        ``model``.

    Raises:
        FloatingPointError: the loss is not finite; ``model`` is as the step before left it.
    """
    objective = loss or task.attacker_loss
    parameters = list(thaw(model, strategy, task).values())
    averaged = AveragedModel(model, avg_fn=partial(_averaged, strategy.ema)) if strategy.ema else None
    optimizer = build_optimizer(strategy, parameters, model=model)
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.zero_grad()
    stream = batches(images, strategy.batch_size, generator, strategy.augmentation)
    try:
        for step in range(strategy.steps):
            value = objective(model, next(stream))
            if not math.isfinite(value.item()):
                raise FloatingPointError(f"the loss is {value.item()} at step {step + 1}")
            value.backward()  # type: ignore[no-untyped-call]
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * SCHEDULES[strategy.schedule](step, strategy.steps)
            if strategy.max_norm is not None:
                clip_grad_norm_(parameters, strategy.max_norm)
            optimizer.step()
            optimizer.zero_grad()
            if averaged is not None:
                averaged.update_parameters(model)
                if step + 1 == strategy.steps:
                    for mean, parameter in zip(averaged.module.parameters(), model.parameters(), strict=True):
                        parameter.data.copy_(mean)
            on_step(step + 1, value.item())
    finally:
        for hook in getattr(optimizer, "hooks", ()):
            hook.remove()
    return model


def loop_of(strategy: FineTuneStrategy) -> Loop:
    """Return the training loop that a strategy names.

    A loop trains ``model`` in place, takes its batches and all else that it draws from ``generator``, calls ``on_step``
    after each step, and returns the model that it ends with, which may be another.
    """
    loop = function_at(LOOPS.get(strategy.loop, strategy.loop), "loop")

    def checked(*arguments: Any) -> nn.Module:
        model = loop(*arguments)
        if not isinstance(model, nn.Module):
            raise UserError(f"loop: '{strategy.loop}' returned {model!r:.50}; it must return the model that it trained")
        return model

    return checked


def check(strategy: FineTuneStrategy, where: str) -> None:
    """Raise a `UserError` that names a key below ``where`` unless its optimizer and its loop can be called."""
    check_optimizer(strategy, where)
    key = f"{where}.loop"
    check_arguments(key, strategy.loop, function_at(LOOPS.get(strategy.loop, strategy.loop), key), _LOOP, {})


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
    batch = next(batches(few, strategy.batch_size, torch.Generator().manual_seed(0)))
    task.warm(batch)
    with FlopCounterMode(display=False) as counter:
        value = (loss or task.attacker_loss)(model, batch)
        torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return int(counter.get_total_flops())


def rehearse(
    model: nn.Module, strategy: FineTuneStrategy, task: Task, images: ImageSet, key: str, loss: Loss | None = None
) -> None:
    """Take one training step on at most two images, so that what cannot work is found before the work starts.

    Args:
        model: a copy, ready for the strategy's first step; it ends with other weights, modes and statistics.
        strategy: all but its steps and its augmentation counts.
        task: says what the scope trains, and gives the loss unless another is given.

    Raises:
        UserError: the step fails; the message says whether more images at a time, or larger ones, would do.
    """
    loop = partial(fine_tune, loss=loss) if loss else loop_of(strategy)
    few = images.batch(torch.arange(2) % len(images))
    device, size = few.images.device, few.images.shape[-1]

    def failure(count: int, zoom: int = 1) -> str | None:
        pixels = few.images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
        step = replace(strategy, steps=1, batch_size=count, augmentation="none")
        larger = MemoryImages(pixels, few.labels, images.classes, few.prompts)
        try:
            loop(model, step, task, larger, torch.Generator().manual_seed(0), lambda step, loss: None)
        except UserError:
            raise
        except FloatingPointError:  # an attacker who diverges is one that can be tried
            return None
        except Exception as error:  # models, loops and optimizers raise whatever their first misfit leads to
            return one_line(error)
        return None

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
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
    key, way_out = "model.architecture", "choose another, or other model.channels or model.image_size"
    if strategy.loop not in LOOPS or strategy.optimizer not in OPTIMIZERS:
        key, way_out = "loop" if strategy.loop not in LOOPS else "optimizer", "choose another"
    shape = f"{few.images.shape[1]} x {size} x {size}"
    raise UserError(f"{key}: a training step on images of {shape} fails ({reason}); {way_out}")


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
