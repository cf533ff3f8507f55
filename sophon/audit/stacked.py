"""Attempts trained together: models of one architecture stacked into one, whose kernels do the work of all at once."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.overrides import TorchFunctionMode

from sophon.audit.attacks import Attacker, Outcome
from sophon.audit.plan import Attempt, Job
from sophon.domains import Batch, batches
from sophon.errors import UserError
from sophon.finetune import Descent, thaw
from sophon.tasks import Task

_T = TypeVar("_T")


def likeness(job: Job) -> Hashable | None:
    """Return what attempts share that can be trained together; None for a job that is run by itself.

    By themselves go searches and their winners, adapters, and attempts without steps.
    """
    if not isinstance(job, Attempt) or job.search is not None:
        return None
    strategy = job.strategy
    if strategy.scope == "lora" or not strategy.steps:
        return None
    operations = tuple(operation.name for operation in strategy.surgery)
    return (
        job.domain,
        strategy.steps,
        strategy.batch_size,
        strategy.scope,
        strategy.blocks,
        strategy.batch_norm,
        operations,
    )


def grouped(items: Iterable[_T], alike: Callable[[_T], Hashable | None], most: int) -> list[list[_T]]:
    """Put items that are alike into groups.

    Args:
        items: in any order; that of the groups is the order of their first items.
        alike: equal for items that may share a group; None for one that stays alone.
        most: items of a group, >= 1.
    """
    groups: list[list[_T]] = []
    latest: dict[Hashable, list[_T]] = {}
    for item in items:
        key = alike(item)
        group = None if key is None else latest.get(key)
        if group is None or len(group) == most:
            group = []
            groups.append(group)
            if key is not None:
                latest[key] = group
        group.append(item)
    return groups


def attack_together(makers: Sequence[Callable[[], Attacker]]) -> list[Outcome] | None:
    """Run attempts that are alike (see `likeness`) with their models stacked while they train.

    Everything but the training is done for each by itself, as `sophon.audit.attacks.attack` does it; what each draws
    is the same too, so the outcomes agree with that function's to rounding.

    Args:
        makers: each makes an attacker, which draws from the global generators; called once at most.

    Returns:
        The outcomes in the order of ``makers``, each with an equal share of the time; None if the models cannot be
        stacked: their loss draws random numbers or does what `torch.func.vmap` cannot, or they are not built alike.

    Raises:
        UserError: the models do not fit in the device's memory together; or as an attacker's.
    """
    start = time.perf_counter()
    first = makers[0]()
    if not _stackable(first):
        return None
    attackers = [first, *(make() for make in makers[1:])]
    if len({_form(attacker.model) for attacker in attackers}) > 1:
        return None
    for attacker in attackers:
        attacker.measure(0)
    try:
        finished = fine_tune_together(attackers)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"stack: {len(attackers)} attempts do not fit in the device's memory together; give a smaller number"
        ) from error
    outcomes = [attacker.outcome(each) for attacker, each in zip(attackers, finished, strict=True)]
    seconds = (time.perf_counter() - start) / len(outcomes)
    return [replace(outcome, seconds=seconds, stacked=len(outcomes)) for outcome in outcomes]


def _stackable(attacker: Attacker) -> bool:
    """Try one step of two copies of the attacker's model; the attacker stays as it is."""
    model = copy.deepcopy(attacker.model)
    thaw(model, attacker.strategy, attacker.task)
    few = attacker.images.take(torch.arange(2) % len(attacker.images))
    try:
        stack = _Stack([model, copy.deepcopy(model)], attacker.task)
        stack.backward(stack.losses([Batch(few.images, few.labels)] * 2))
    except RuntimeError:  # also what vmap raises on drawing random numbers
        return False
    return True


def _form(model: nn.Module) -> Hashable:
    """Return what two models have in common whose tensors alone tell them apart."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return str(model), tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items())


def fine_tune_together(attackers: Sequence[Attacker]) -> list[bool]:
    """Fine-tune as `sophon.finetune.fine_tune` would each, one step of all at a time.

    Returns:
        For each, whether its loss stayed finite; if not, its fine-tuning ended there and the others' went on.
    """
    descents = [Descent(attacker.model, attacker.strategy, attacker.task) for attacker in attackers]
    streams = [
        batches(each.images, each.strategy.batch_size, each.generator, each.strategy.augmentation) for each in attackers
    ]
    running = list(range(len(attackers)))
    stack = _Stack([attacker.model for attacker in attackers], attackers[0].task)
    for step in range(attackers[0].strategy.steps):
        losses = stack.losses([next(streams[index]) for index in running])
        values = dict(zip(running, losses.tolist(), strict=True))
        stack.backward(losses)
        going = [index for index in running if math.isfinite(values[index])]
        for index in going:
            descents[index].step()
            attackers[index].after_step(step + 1, values[index])
        if not going:
            return [False] * len(attackers)
        if going != running:
            # whoever ended keeps the slices it has, in which nothing moves any more
            stack = _Stack([attackers[index].model for index in going], attackers[0].task)
            running = going
    return [index in running for index in range(len(attackers))]


class _Loss(nn.Module):
    """A model with its loss as its forward: the task sees the model itself, whatever tensors it is run with."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model = model
        self.task = task

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.task.attacker_loss(self.model, Batch(images, labels))


class _Stack:
    """Models whose parameters and buffers are, from here on, slices of stacked tensors.

    So each stays a model like any other, always up to date, while one forward and backward pass serves all of them.

    Args:
        models: of one form, with the same of their parameters taking gradients and the same modes.
        task: gives the loss.
    """

    def __init__(self, models: Sequence[nn.Module], task: Task) -> None:
        wrapped = [_Loss(model, task) for model in models]
        self._template = wrapped[0]
        self._own = [{**dict(each.named_parameters()), **dict(each.named_buffers())} for each in wrapped]
        self._stacked: dict[str, Tensor] = {}
        for name, tensor in self._own[0].items():
            together = torch.stack([own[name].detach() for own in self._own])
            for own, part in zip(self._own, together.unbind(), strict=True):
                own[name].data = part
            self._stacked[name] = together.requires_grad_(tensor.requires_grad)

    def losses(self, drawn: Sequence[Batch]) -> Tensor:
        """Return each model's loss on its own batch, float [models]; buffers such as running statistics change."""
        images = torch.stack([batch.images for batch in drawn])
        labels = torch.stack([batch.labels for batch in drawn])
        with _AnyLayout():
            losses: Tensor = vmap(self._loss, randomness="error")(self._stacked, images, labels)
        return losses

    def _loss(self, state: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = functional_call(self._template, state, (images, labels))
        return loss

    def backward(self, losses: Tensor) -> None:
        """Give every model's parameters the gradients of its loss; those that it does not depend on get none."""
        losses.sum().backward()  # type: ignore[no-untyped-call]
        for name, together in self._stacked.items():
            if together.grad is None:
                continue
            for own, part in zip(self._own, together.grad.unbind(), strict=True):
                own[name].grad = part
            together.grad = None


class _AnyLayout(TorchFunctionMode):
    """Lets models and tasks ask for channels_last, which vmap refuses; where numbers lie does not change them."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.contiguous:
            return args[0].contiguous()
        return func(*args, **(kwargs or {}))
