"""The tricks of `tricks.py`: for each the work without it and the work with it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from cases import Bench
from methods import Work as Simulated
from methods import bound
from torch import Tensor, nn
from torch.profiler import record_function

from sophon.protect.first_order import first_order
from sophon.protect.inner_loop import frozen_statistics, query_weights, recording_layers
from sophon.strategies import OPTIMIZERS, FineTuneStrategy, build_optimizer

Work = Callable[[], Any]
STEPS = 4  # of a round


class Pair(NamedTuple):
    """The same work twice.

    Attributes:
        without: the trick.
        within: it is done.
        found: what both have found, once each has run as often as the other; None if that is nothing to compare.
    """

    without: Work
    within: Work
    found: Callable[[], tuple[Tensor, Tensor]] | None = None


def engine(bench: Bench, kind: str) -> Pair:
    """Compare the engine with the least that any simulation does."""
    attackers = twice(bench.model)
    runs: tuple[Callable[[Simulated], object], ...] = (bound, lambda work: first_order(*work))
    works = [partial(_run, run, bench, attacker, kind) for run, attacker in zip(runs, attackers, strict=True)]
    return Pair(*works, lambda: (flat(attackers[0].parameters()), flat(attackers[1].parameters())))


def _run(run: Callable[[Simulated], object], bench: Bench, attacker: nn.Module, kind: str, every: int = 1) -> None:
    plan = FineTuneStrategy(optimizer=kind, lr=1e-4, steps=STEPS)
    torch.manual_seed(0)  # a denoiser's noise
    run(Simulated(attacker, plan, bench.task, *bench.streams(), query_weights("uniform", STEPS, every)))


def query_every(bench: Bench) -> Pair:
    """Query at the last step of four only: 5 passes instead of 8."""
    works = [
        partial(_run, lambda work: first_order(*work), bench, attacker, "sgd", every)
        for attacker, every in zip(twice(bench.model), (1, STEPS), strict=True)
    ]
    return Pair(*works)


def layers_once(bench: Bench) -> Pair:
    """Freeze and release the running statistics."""

    def enter(model: nn.Module | Sequence[nn.modules.batchnorm._BatchNorm]) -> None:
        with frozen_statistics(model):
            pass

    return Pair(partial(enter, bench.model), partial(enter, recording_layers(bench.model)))


def added_by_autograd(bench: Bench) -> Pair:
    """Add the gradients of a pass to a total."""
    one, other = twice(bench.model)
    totals = [torch.zeros_like(parameter) for parameter in one.parameters()]
    for parameter in other.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def without() -> None:
        found = torch.autograd.grad(loss_of(bench, one), list(one.parameters()))
        for total, gradient in zip(totals, found, strict=True):
            total.add_(gradient, alpha=0.02)

    def within() -> None:
        (0.02 * loss_of(bench, other)).backward()

    return Pair(without, within, lambda: (flat(totals), gradients(other)))


def first_is_total(bench: Bench) -> Pair:
    """Add up two passes' gradients."""
    one, other = twice(bench.model)

    def without() -> None:
        for parameter in one.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for _ in range(2):
            loss_of(bench, one).backward()

    def within() -> None:
        other.zero_grad()
        for _ in range(2):
            loss_of(bench, other).backward()

    return Pair(without, within, lambda: (gradients(one), gradients(other)))


def gradients_reused(bench: Bench) -> Pair:
    """Take a gradient into new tensors, or into the last one's, zeroed."""
    one, other = twice(bench.model)

    def work(model: nn.Module, anew: bool) -> None:
        model.zero_grad(set_to_none=anew)
        loss_of(bench, model).backward()

    return Pair(partial(work, one, True), partial(work, other, False), lambda: (gradients(one), gradients(other)))


def no_graph_of_the_rest(bench: Bench) -> Pair:
    """Take the pass of an attacker who trains the head."""
    one, other = twice(bench.model)
    heads = [list(bench.task.train_mode(model, "head").values()) for model in (one, other)]
    other.requires_grad_(False)
    for parameter in heads[1]:
        parameter.requires_grad_(True)

    def work(model: nn.Module, head: list[nn.Parameter]) -> None:
        model.zero_grad()
        loss_of(bench, model).backward(inputs=head)

    return Pair(
        partial(work, one, heads[0]), partial(work, other, heads[1]), lambda: (gradients(one), gradients(other))
    )


def stepper(bench: Bench, kind: str, **settings: bool) -> Pair:
    """Step all weights along the same gradient, by torch's default and as the settings say."""
    optimizer, own = OPTIMIZERS[kind]
    models, works = twice(bench.model), []
    for model, chosen in zip(models, ({}, settings), strict=True):
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.grad = 0.01 * torch.randn_like(parameter)
        works.append(getattr(torch.optim, optimizer)(model.parameters(), lr=1e-4, **own, **chosen).step)
    return Pair(*works, lambda: (moved(bench.model, models[0]), moved(bench.model, models[1])))


def optimizer_reused(bench: Bench) -> Pair:
    """Step four times with a new Adam, or with the last round's, its moments zeroed."""
    one, other = twice(bench.model)
    for parameter in [*one.parameters(), *other.parameters()]:
        parameter.grad = torch.full_like(parameter, 0.01)
    plan = FineTuneStrategy(optimizer="adam", lr=1e-4)
    kept = build_optimizer(plan, other.parameters(), fused=True)

    def without() -> None:
        steps(build_optimizer(plan, one.parameters(), fused=True))

    def within() -> None:
        torch._foreach_zero_([value for state in kept.state.values() for value in state.values()])
        steps(kept)

    def steps(optimizer: torch.optim.Optimizer) -> None:
        for _ in range(STEPS):
            optimizer.step()

    kept.step()
    other.load_state_dict(one.state_dict())
    return Pair(without, within, lambda: (moved(bench.model, one), moved(bench.model, other)))


def layout(bench: Bench) -> Pair:
    """Take a pass; images are in channels_last either way."""
    one, other = (
        copy.deepcopy(bench.model).to(memory_format=chosen)  # type: ignore[call-overload]
        for chosen in (torch.contiguous_format, torch.channels_last)
    )
    return passes(bench, one, other)


def compiled(bench: Bench) -> Pair:
    """Take a pass, eagerly or as inductor compiles it in its default mode."""
    one, other = twice(bench.model)
    other.compile()
    return passes(bench, one, other)


def half(bench: Bench) -> Pair:
    """Take a pass in float32, or under autocast to bfloat16."""
    models, batch = twice(bench.model), bench.adapt[0]

    def work(model: nn.Module, enabled: bool) -> None:
        model.zero_grad()
        with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=enabled):
            logits = model(bench.task.prepare(batch.images))
        F.cross_entropy(logits.float(), batch.labels).backward()

    works = [partial(work, model, enabled) for model, enabled in zip(models, (False, True), strict=True)]
    return Pair(*works, lambda: (gradients(models[0]), gradients(models[1])))


def marked(bench: Bench) -> Pair:
    """Take two passes with as many marks as a step has."""
    one, other = twice(bench.model)
    plain = passes(bench, one, other)

    def without() -> None:
        for _ in range(2):
            plain.without()

    def within() -> None:
        for _ in range(2):
            plain.within()
        for _ in range(5):
            with record_function("mark"):
                pass

    return Pair(without, within)


def passes(bench: Bench, one: nn.Module, other: nn.Module) -> Pair:
    """Take a forward and a backward pass with each of two models."""

    def work(model: nn.Module) -> None:
        model.zero_grad()
        loss_of(bench, model).backward()

    return Pair(partial(work, one), partial(work, other), lambda: (gradients(one), gradients(other)))


def loss_of(bench: Bench, model: nn.Module) -> Tensor:
    torch.manual_seed(0)  # a denoiser's noise
    return bench.task.attacker_loss(model, bench.adapt[0])


def twice(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    return copy.deepcopy(model).train(), copy.deepcopy(model).train()


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def gradients(model: nn.Module) -> Tensor:
    return flat(parameter.grad for parameter in model.parameters() if parameter.grad is not None)


def moved(start: nn.Module, model: nn.Module) -> Tensor:
    return flat(now - before for now, before in zip(model.parameters(), start.parameters(), strict=True))
