"""Ways to get the gradient of an attacker's queries with respect to the weights that it started from.

``bound`` and ``plain`` compute no such gradient: the first is the work that no way of simulating an attacker step by
step can leave out, the second is ordinary training.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import formulas
import higher
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from sophon.attacker import FineTuneStrategy, learning_rate
from sophon.domains import Batch
from sophon.optimizers import build_optimizer
from sophon.protect.first_order import first_order
from sophon.protect.inner_loop import query_weights
from sophon.protect.second_order import second_order
from sophon.tasks import Task


class Outcome(NamedTuple):
    """What a simulation ends with: the meta-gradient if there is one, and the attacker's weights, both by parameter."""

    gradients: Mapping[str, Tensor] | None
    weights: Mapping[str, Tensor]


class Work(NamedTuple):
    """The arguments of the package's engines."""

    attacker: nn.Module
    strategy: FineTuneStrategy
    task: Task
    adapt: Iterator[Batch]
    query: Iterator[Batch]
    gammas: Sequence[float]

    def optimizer(self) -> torch.optim.Optimizer:
        """Put the attacker in training mode; return its optimizer."""
        return build_optimizer(self.strategy, self.task.train_mode(self.attacker, self.strategy.scope).values())

    def own_loss(self, model: nn.Module) -> Tensor:
        """Return the attacker's loss on its next batch."""
        return self.task.attacker_loss(model, next(self.adapt))

    def query_loss(self, model: nn.Module) -> Tensor:
        """Return the suppression loss on the next query."""
        return self.task.suppression_loss(model, next(self.query))


def plain(work: Work) -> Outcome:
    """Train as anyone would, without queries."""
    optimizer = work.optimizer()
    for _ in work.gammas:
        optimizer.zero_grad()
        work.own_loss(work.attacker).backward()
        optimizer.step()
    return Outcome(None, dict(work.attacker.named_parameters()))


def bound(work: Work) -> Outcome:
    """Train, with a forward and a backward pass on a query after each step; its gradients are thrown away."""
    optimizer = work.optimizer()
    for _ in work.gammas:
        work.own_loss(work.attacker).backward()
        optimizer.step()
        optimizer.zero_grad()
        work.query_loss(work.attacker).backward()
        optimizer.zero_grad()
    return Outcome(None, dict(work.attacker.named_parameters()))


class _Fast(nn.Module):
    """A module that runs with weights and buffers of its own instead of those of the module that it wraps."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.wrapped = module
        self.fast = {name: parameter.clone() for name, parameter in module.named_parameters()}
        self.statistics = {name: buffer.clone() for name, buffer in module.named_buffers()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.wrapped, {**self.fast, **self.statistics}, args, kwargs)


def learn2learn(work: Work) -> Outcome:
    """Do what learn2learn's first-order MAML does, SGD only.

    The clone's weights stay connected to the module's; each update is out of place with a gradient taken as a constant;
    all query losses are kept, and their weighted sum goes backward once, at the end.
    """
    work.task.train_mode(work.attacker, work.strategy.scope)
    clone = _Fast(work.attacker)
    losses = []
    for step, gamma in enumerate(work.gammas):
        loss = work.own_loss(clone)
        gradients = torch.autograd.grad(loss, list(clone.fast.values()))
        lr = learning_rate(work.strategy, step)
        moved = zip(clone.fast.items(), gradients, strict=True)
        clone.fast = {name: weight - lr * gradient for (name, weight), gradient in moved}
        losses.append(gamma * work.query_loss(clone))
    parameters = dict(work.attacker.named_parameters())
    found = torch.autograd.grad(torch.stack(losses).sum(), list(parameters.values()))
    return Outcome(dict(zip(parameters, found, strict=True)), clone.fast)


def higher_first(work: Work) -> Outcome:
    """Use `higher` without tracking: updates forget where they came from; query gradients are summed as they come."""
    optimizer = work.optimizer()
    names = [name for name, _ in work.attacker.named_parameters()]
    total: list[Tensor] | None = None
    with higher.innerloop_ctx(work.attacker, optimizer, copy_initial_weights=False, track_higher_grads=False) as loop:
        model, steps = _sliceable(loop[0]), loop[1]
        for gamma in work.gammas:
            steps.step(work.own_loss(model))
            loss = gamma * work.query_loss(model)
            found = torch.autograd.grad(loss, list(model.parameters()))
            total = list(found) if total is None else [a + b for a, b in zip(total, found, strict=True)]
        weights = dict(zip(names, model.parameters(), strict=True))
    assert total is not None
    return Outcome(dict(zip(names, total, strict=True)), weights)


def higher_second(work: Work) -> Outcome:
    """Use `higher` as its README does: everything is tracked, and one backward pass goes through all steps."""
    optimizer = work.optimizer()
    parameters = dict(work.attacker.named_parameters())
    # flash attention has no second derivative
    with (
        sdpa_kernel(SDPBackend.MATH),
        higher.innerloop_ctx(work.attacker, optimizer, copy_initial_weights=False) as loop,
    ):
        model, steps = _sliceable(loop[0]), loop[1]
        losses = []
        for gamma in work.gammas:
            steps.step(work.own_loss(model))
            losses.append(gamma * work.query_loss(model))
        found = torch.autograd.grad(torch.stack(losses).sum(), list(parameters.values()))
        weights = dict(zip(parameters, model.parameters(), strict=True))
    return Outcome(dict(zip(parameters, found, strict=True)), weights)


def _sliceable(model: nn.Module) -> nn.Module:
    """Let diffusers slice the module lists of `higher`'s functional model, each of which is of a class of its own."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            type(module).__getitem__ = lambda modules, index: list(modules)[index]  # type: ignore[method-assign]
    return model


def ours_first(work: Work) -> Outcome:
    """Use the package's first-order engine."""
    return Outcome(first_order(*work).gradients, dict(work.attacker.named_parameters()))


def ours_first_fifth(work: Work) -> Outcome:
    """Query after every fifth step only (``method.query_every=5``): less work, and a sum of fewer queries.

    A denoiser's queries draw noise, so with fewer of them its attacker goes another way too.
    """
    return ours_first(work._replace(gammas=query_weights("uniform", len(work.gammas), every=5)))


def ours_first_bf16(work: Work) -> Outcome:
    """Autocast all passes to bfloat16 (``amp=all``)."""
    task = copy.copy(work.task)
    task.amp = True
    return ours_first(work._replace(task=task))


def ours_first_fifth_bf16(work: Work) -> Outcome:
    """Do both."""
    return ours_first_bf16(work._replace(gammas=query_weights("uniform", len(work.gammas), every=5)))


def ours_second(work: Work) -> Outcome:
    """Use the package's second-order engine as it comes; it does not say where the attacker's weights ended."""
    return Outcome(second_order(*work).gradients, {})


def ours_second_root(work: Work) -> Outcome:
    """Use it with segments of about the square root of K steps: fewer checkpoints, more graphs alive."""
    return Outcome(second_order(*work, segment=root(len(work.gammas))).gradients, {})


def root(steps: int) -> int:
    """Return the length of segments that makes about as many checkpoints as graphs."""
    return max(1, math.isqrt(steps))


@dataclass(frozen=True)
class Method:
    """A way, and what it is compared with.

    Attributes:
        run: does it.
        order: of its gradient; methods of one order and one optimizer must find the same.
        optimizer: the attacker's.
        baseline: the method whose time its own is divided by.
        timed: whether its time is of interest.
        weighed: whether its memory is.
        exact: whether its gradient must be that of the others; if not, it is said how far it is from theirs.
        needs: bytes that it is expected to need above the loaded model.
    """

    run: Callable[[Work], Outcome]
    order: int = 1
    optimizer: str = "sgd"
    baseline: str = "bound"
    timed: bool = True
    weighed: bool = True
    exact: bool = True
    needs: Callable[[formulas.Model, formulas.Round], float] = formulas.first_order_memory


def _root_memory(model: formulas.Model, work: formulas.Round) -> float:
    return formulas.second_order_memory(model, work, root(work.steps))


METHODS = {
    "plain": Method(plain, timed=False, needs=formulas.plain_memory),
    "bound": Method(bound, needs=formulas.bound_memory),
    "ours_first": Method(ours_first),
    "ours_first_fifth": Method(ours_first_fifth, weighed=False, exact=False),
    "ours_first_bf16": Method(ours_first_bf16, weighed=False, exact=False),
    "ours_first_fifth_bf16": Method(ours_first_fifth_bf16, weighed=False, exact=False),
    "learn2learn": Method(learn2learn, needs=formulas.kept_graphs_memory),
    "higher_first": Method(higher_first),
    "ours_second": Method(ours_second, order=2, needs=partial(formulas.second_order_memory, segment=1)),
    "ours_second_root": Method(ours_second_root, order=2, needs=_root_memory),
    "higher_second": Method(higher_second, order=2, needs=formulas.second_order_memory),
    "bound_adam": Method(bound, optimizer="adam", baseline="bound_adam", weighed=False),
    "ours_first_adam": Method(ours_first, optimizer="adam", baseline="bound_adam", weighed=False),
}
# small, so that rounding does not grow along the trajectory into a difference between methods
LEARNING_RATES = {"sgd": 1e-3, "adam": 1e-4}
