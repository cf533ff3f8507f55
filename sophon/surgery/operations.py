"""Weight surgery: what an attacker does to the released weights before it fine-tunes them.

An operation is a function ``(model, means, *, arguments) -> model``. It may change the model in place, and returns the
one to go on with. It comes before the attacker starts its head, so the model still has the one that was released. What
it draws at random comes from torch's global generator, which the caller seeds, and its batches from the generator of
its `Means`. Which parameters take gradients afterwards is not promised: fine-tuning sets that itself.

A user's own operation is a function of the same form, named by its dotted path. What its arguments may be is read from
their annotations: see `sophon.arguments`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from sophon.arguments import Limits, check_arguments, function_at
from sophon.attacker import OPTIMIZERS, FineTuneStrategy, Operation
from sophon.domains import Batch
from sophon.errors import UserError
from sophon.models.partition import at_end, owned
from sophon.surgery.attacker_means import Means
from sophon.surgery.batch_norm_statistics import reestimated
from sophon.surgery.centre import centre
from sophon.surgery.equalise import equalise
from sophon.surgery.renormalise import NORMALISATIONS, renormalise

Count = Annotated[int, Limits("a whole number >= 1", lambda value: value >= 1)]
Rate = Annotated[float, Limits("a finite number > 0", lambda value: value > 0)]
Fraction = Annotated[float, Limits("a number >= 0 and <= 1", lambda value: 0 <= value <= 1)]
OptimizerName = Annotated[str, Limits(f"one of {', '.join(OPTIMIZERS)}", lambda value: value in OPTIMIZERS)]


def reinitialise(
    model: nn.Module, means: Means, *, blocks: Count = 1, end: Literal["first", "last"] = "last"
) -> nn.Module:
    """Give the ``first`` or the ``last`` blocks the weights and buffers of a fresh model.

    Raises:
        UserError: the model has fewer blocks.
    """
    names = reinitialised(model, means, blocks=blocks, end=end)
    state, fresh = model.state_dict(), means.fresh(model).state_dict()
    for name in names:
        state[name].copy_(fresh[name])
    return model


def reinitialised(model: nn.Module, means: Means, *, blocks: int, end: str) -> set[str]:
    """Name the parameters and buffers that `reinitialise` replaces.

    Raises:
        UserError: the model has fewer blocks.
    """
    parts = means.task.blocks(model)
    if blocks > len(parts):
        raise UserError(f"surgery: reinitialise has {blocks} blocks to replace; the model has only {len(parts)}")
    return owned(model.state_dict(), at_end(parts, blocks, end))


@torch.no_grad()
def noise(
    model: nn.Module,
    means: Means,
    *,
    scale: Annotated[float, Limits("a finite number >= 0", lambda value: value >= 0)] = 0.1,
) -> nn.Module:
    """Add Gaussian noise to every parameter, its deviation ``scale`` times the tensor's own; buffers stay.

    A tensor whose elements are all equal has none; its root mean square serves instead.
    """
    for parameter in model.parameters():
        constant = bool(parameter.min() == parameter.max())
        spread = parameter.square().mean().sqrt() if constant else parameter.std(correction=0)
        parameter.add_(scale * spread * torch.randn_like(parameter))
    return model


@torch.no_grad()
def prune(
    model: nn.Module,
    means: Means,
    *,
    fraction: Annotated[float, Limits("a number > 0 and < 1", lambda value: 0 < value < 1)] = 0.5,
) -> nn.Module:
    """Set the smallest weights to zero: ``fraction`` of the elements of each parameter of two or more dimensions.

    Their number is rounded to a whole one. Fine-tuning may move them again.
    """
    for name, mask in pruned(model, fraction).items():
        model.get_parameter(name).masked_fill_(mask, 0)
    return model


def pruned(model: nn.Module, fraction: float) -> dict[str, Tensor]:
    """Return what `prune` sets to zero: by parameter, a mask (bool) of its shape."""
    weights = {name: value.detach() for name, value in model.named_parameters() if value.dim() > 1}
    return {name: largest(-weight.abs(), fraction) for name, weight in weights.items()}


def largest(scores: Tensor, fraction: float) -> Tensor:
    """Return a mask of the largest elements, their number rounded to a whole one."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[scores.flatten().argsort(descending=True, stable=True)[: round(fraction * scores.numel())]] = True
    return mask.view(scores.shape)


@torch.no_grad()
def shrink_perturb(model: nn.Module, means: Means, *, keep: Fraction = 0.5) -> nn.Module:
    """Go towards a fresh model (Ash & Adams, 2020): each parameter becomes keep * itself + (1 - keep) * fresh.

    Buffers stay, so running statistics no longer fit; put `restate` behind it where evaluation comes before training.
    """
    fresh = means.fresh(model)
    for name, parameter in model.named_parameters():
        parameter.mul_(keep).add_(fresh.get_parameter(name), alpha=1 - keep)
    return model


@torch.no_grad()
def interpolate(model: nn.Module, means: Means, *, keep: Fraction = 0.5) -> nn.Module:
    """Go towards a public relative: a parameter outside the head becomes keep * itself + (1 - keep) * the relative's.

    Buffers stay, so running statistics no longer fit; put `restate` behind it where evaluation comes before training.

    Raises:
        UserError: the attacker has no relative.
    """
    if means.relative is None:
        raise UserError("surgery: interpolate needs a public relative; set attack.relative")
    head = means.task.head_names(model)
    others = dict(means.relative.named_parameters())
    for name, parameter in model.named_parameters():
        if name not in head:
            parameter.mul_(keep).add_(others[name], alpha=1 - keep)
    return model


def restate(model: nn.Module, means: Means, *, batches: Count = 20) -> nn.Module:
    """Estimate the statistics of BatchNorm layers anew, as the mean over batches of the attacker's images.

    All else stays in evaluation mode. A model without such layers is left as it is. The forward passes count as cost.
    """
    reestimated(model, lambda: means.run(model, batches))
    return model


@torch.no_grad()
def reset_affine(model: nn.Module, means: Means) -> nn.Module:
    """Set the weight of every normalisation layer to one and its bias to zero, where it has them."""
    for name in affine(model):
        model.get_parameter(name).fill_(1.0 if name.rpartition(".")[2] == "weight" else 0.0)
    return model


def affine(model: nn.Module) -> list[str]:
    """Name the weights and biases of the normalisation layers: what `reset_affine` replaces."""
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, NORMALISATIONS)]
    return [
        f"{name}.{part}" if name else part
        for name, layer in layers
        for part, _ in layer.named_parameters(recurse=False)
    ]


def heal(
    model: nn.Module,
    means: Means,
    *,
    domain: Literal["original", "benign"] = "original",
    steps: Count = 100,
    lr: Rate = 1e-3,
    optimizer: OptimizerName = "adam",
    batch_size: Count = 128,
) -> nn.Module:
    """Fine-tune on another domain first: on the ``original`` one's ``train`` split or the ``benign`` one's ``attack``.

    For the original domain the model keeps its head. For the benign one it gets a fresh head, if it has any, with which
    it stays: an attacker that then ``kept`` its head would have to have as many classes.

    Raises:
        UserError: the audit has no such domain, or the head does not fit the original one.
    """
    data = means.domain(domain, "surgery: heal")
    fresh = domain == "benign" and means.classes_of(model) is not None
    means.task.start_head(model, "fresh" if fresh else "kept", data.classes)
    strategy = FineTuneStrategy(optimizer=optimizer, lr=lr, batch_size=batch_size, steps=steps)
    means.train(model, strategy, data["train" if domain == "original" else "attack"])
    return model


def distil(
    model: nn.Module,
    means: Means,
    *,
    steps: Count = 500,
    lr: Rate = 1e-3,
    optimizer: OptimizerName = "adam",
    images: Literal["attack", "original"] = "attack",
) -> nn.Module:
    """Teach a fresh network the released one's outputs, and go on with it.

    The images are the attacker's own, or the original domain's ``train`` split. The cost counts the teacher too.

    Raises:
        UserError: the audit has no original domain.
    """
    taught = means.images if images == "attack" else means.domain("original", "surgery: distil")["train"]
    student = means.fresh(model)
    strategy = FineTuneStrategy(optimizer=optimizer, lr=lr, batch_size=means.batch_size, steps=steps)

    def imitation(student: nn.Module, batch: Batch) -> Tensor:
        return means.task.imitation_loss(student, batch, model)

    means.train(student, strategy, means.relabelled(taught, model), imitation)
    return student


NEED_FRESH = ("reinitialise", "shrink_perturb", "renormalise", "distil")  # those that take a model with random weights
OPERATIONS: dict[str, Callable[..., nn.Module]] = {
    "reinitialise": reinitialise,
    "noise": noise,
    "prune": prune,
    "shrink_perturb": shrink_perturb,
    "interpolate": interpolate,
    "restate": restate,
    "reset_affine": reset_affine,
    "renormalise": renormalise,
    "centre": centre,
    "equalise": equalise,
    "heal": heal,
    "distil": distil,
}


def operate(model: nn.Module, operations: Sequence[Operation], means: Means) -> nn.Module:
    """Apply operations in their order; return the model to go on with.

    Raises:
        UserError: an operation is not known, cannot be done, or does not return a model.
    """
    for operation in operations:
        result = _function(operation.name, "surgery")(model, means, **dict(operation.arguments))
        if not isinstance(result, nn.Module):
            raise UserError(f"surgery: {operation.name} returned {type(result).__name__}; it must return the model")
        model = result
    return model


def check(operations: Sequence[Operation], where: str) -> None:
    """Raise a `UserError` that names ``where``, unless each operation is known and has arguments that it takes."""
    for index, operation in enumerate(operations):
        key = f"{where}[{index}]"
        function = _function(operation.name, f"{key}.operation")
        check_arguments(key, operation.name, function, ("model", "means"), dict(operation.arguments))


def _function(name: str, key: str) -> Callable[..., Any]:
    if "." in name:
        return function_at(name, key)
    if name not in OPERATIONS:
        raise UserError(f"{key}: '{name}' is not known; allowed: {', '.join(OPERATIONS)}, or a function's dotted path")
    return OPERATIONS[name]
