"""CLAMP's terms (CVPR 2026): let the attacker's updates contract, so that all its progress to come is bounded.

Notation: w_t are the attacker's weights after t steps, of which there are K, u_t = w_t - w_{t-1} (a vector over the
weights that it moves), L the attacker's loss on a query batch, g its gradient, T(w) = w - lr g(w). With softplus(x) =
log(1 + e^x) and hinge(x) = max(0, x) the terms are::

    curvature  sum_t gamma_t softplus(kappa_min - kappa_t)
               kappa_t = [L(w_t + d u^) - 2 L(w_t) + L(w_t - d u^)] / d^2,   u^ = u_t / ||u_t||
    contract   softplus(c - c_max),   c = ||T(w_K + d v) - T(w_K)|| / d,   v a random unit vector
    tail       hinge(L(w_0) - L(w_K) + ||g(w_K)|| B + Lip / 2 B^2 - slack),   B = ||u_K|| / (1 - c)
    inverse    -min(L(w_0), loss of one who only guesses)

What is ours: the sum over t is weighted by gamma, so that it does not grow with K; c counts as at most ``c_limit`` in
B, which has a pole at 1; -L(w_0) is clamped, or it would run away; T is plain descent at the attacker's current rate
whatever its optimizer is; L is that of the last query's batch in every term but the curvature's; in a pool, w_0 and w_K
are where a turn begins and ends, and the inverse term is asked in an attacker's first turn alone. To first order u_K is
a constant; g and c are differentiated, by products with the Hessian.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sophon.domains import Batch
from sophon.protection.inner_loop import Objective, Query, rewinder, standing_at
from sophon.ranges import limited
from sophon.tasks import Task


@dataclass(frozen=True)
class Clamp(Objective):
    """The terms whose weight is not zero; >= 0 each.

    Passes are in the weights' own precision even under AMP: differences of losses would drown in bfloat16. Attention
    runs as plain matrix products, since flash attention has no second derivative.

    Attributes:
        curvature: weight: the attacker's loss is to curve along its last step by ``kappa_min`` at least. Three passes
            more at every query.
        contract: weight: the update map is to contract two points near the attacker's last weights by ``c_max``.
        tail: weight: what the attacker has gained, and can gain at most if its updates contract, is to stay within
            ``slack``.
        inverse: weight: the attacker's loss at its start is to be that of a guess.
        kappa_min: loss per squared length of the weights; of either sign.
        c_max: > 0; the map contracts where it is below 1.
        c_limit: in the tail bound c counts as at most this, > 0 and < 1.
        probe_width: how far the weights are displaced along a direction, in their own units, > 0 (d). In float32 much
            less than 0.01 drowns in rounding.
        slack: in the attacker's loss, >= 0.
        lipschitz: of the gradient of the attacker's loss, >= 0 (Lip).
    """

    curvature: float = limited(0.0, ge=0)
    contract: float = limited(0.0, ge=0)
    tail: float = limited(0.0, ge=0)
    inverse: float = limited(0.0, ge=0)
    kappa_min: float = 0.0
    c_max: float = limited(0.95, gt=0)
    c_limit: float = limited(0.99, gt=0, lt=1)
    probe_width: float = limited(0.05, gt=0)
    slack: float = limited(0.0, ge=0)
    lipschitz: float = limited(1.0, ge=0)
    remembers = True

    @property
    def weighs(self) -> bool:
        """Whether any term has a weight."""
        return any((self.curvature, self.contract, self.tail, self.inverse))

    def add(self, model: nn.Module, task: Task, batch: Batch, gamma: float, query: Query) -> Tensor:
        """Add the gradients of the weighted terms; return their weighted sum, each curvature without its gamma."""
        with sdpa_kernel(SDPBackend.MATH), _in_full(task):
            ending = query.last and (self.contract or self.tail)
            probe = self._drawn(query.moving) if ending else []
            ground = _Ground(model, task, batch, query.moving)
            value = torch.zeros((), device=batch.images.device)
            if self.curvature:
                value = value + self._curvature(ground, query, gamma)
            if ending:
                value = value + self._end(ground, query, probe)
            if query.last and query.begun and self.inverse:
                value = value + self._inverse(ground, query)
        return value

    def _curvature(self, ground: _Ground, query: Query, gamma: float) -> Tensor:
        width, step = self.probe_width, _update(query)
        length = _norm(step)
        # an attacker that stood still has no direction: its curvature is 0, and so is the gradient
        along = [part * (width / length.clamp(min=torch.finfo(length.dtype).tiny)) for part in step]
        kappa = torch.zeros_like(length)
        bends = [torch.zeros_like(weight) for weight in ground.parameters]
        for side, share in ((1, 1), (0, -2), (-1, 1)):
            with ground.displaced([side * part for part in along]):
                loss, slope = ground.slope(ground.parameters)
            kappa = kappa + share / width**2 * loss
            for summed, part in zip(bends, slope, strict=True):
                summed.add_(part, alpha=share / width**2)
        kappa.requires_grad_()
        value = self.curvature * F.softplus(self.kappa_min - kappa)
        (factor,) = torch.autograd.grad(value, kappa)
        for weight, part in zip(ground.parameters, bends, strict=True):
            part.mul_(gamma * factor)
            weight.grad = part if weight.grad is None else weight.grad + part
        return value.detach()

    def _drawn(self, moving: Sequence[nn.Parameter]) -> list[Tensor]:
        """Return the displacement d v."""
        probe = [torch.randn_like(weight) for weight in moving]
        return [part * (self.probe_width / _norm(probe)) for part in probe]

    def _end(self, ground: _Ground, query: Query, probe: list[Tensor]) -> Tensor:
        """Contraction and tail bound: their value as a function of four numbers, then each number's own gradient."""
        last, slope = ground.slope(query.moving)
        with torch.no_grad(), standing_at(query.moving, query.start):
            first = ground.loss()
        with ground.displaced(probe):
            _, other = ground.slope(query.moving)
        residue = [v - query.lr * (there - here) for v, there, here in zip(probe, other, slope, strict=True)]
        rate = _norm(residue) / self.probe_width
        facts = torch.stack([rate, _norm(slope), first, last]).requires_grad_()
        value = self._bound(facts, _norm(_update(query)))
        by_rate, by_norm, by_first, by_last = torch.autograd.grad(value, facts)[0].unbind()
        # d c = -lr / d (H(w + d v) r - H(w) r), r the unit residue; d ||g|| = H(w) g / ||g||
        unit = [part / _norm(residue) for part in residue]
        bent = [part * (by_rate * query.lr / self.probe_width) for part in unit]
        tiny = torch.finfo(facts.dtype).tiny
        lean = by_norm / _norm(slope).clamp(min=tiny)
        ground.push([part + lean * g for part, g in zip(bent, slope, strict=True)], by_last)
        if by_rate:
            with ground.displaced(probe):
                ground.push([-part for part in bent])
        if by_first:
            with standing_at(query.moving, query.start):
                (by_first * ground.loss()).backward()  # type: ignore[no-untyped-call]
        return value.detach()

    def _bound(self, facts: Tensor, length: Tensor) -> Tensor:
        """Return the two terms' sum as a function of c, ||g(w_K)||, L(w_0) and L(w_K), and of the length of u_K."""
        rate, norm, first, last = facts.unbind()
        reach = length / (1 - rate.clamp(max=self.c_limit))
        bound = first - last + norm * reach + self.lipschitz / 2 * reach**2
        return self.tail * F.relu(bound - self.slack) + self.contract * F.softplus(rate - self.c_max)

    def _inverse(self, ground: _Ground, query: Query) -> Tensor:
        with standing_at(query.moving, query.start):
            loss = ground.loss()
            value = -self.inverse * loss.clamp(max=ground.task.chance_loss(ground.model))
            value.backward()  # type: ignore[no-untyped-call]
        return value.detach()


class _Ground:
    """The attacker's loss on one batch, with the same random draws wherever on it one stands."""

    def __init__(self, model: nn.Module, task: Task, batch: Batch, moving: Sequence[nn.Parameter]) -> None:
        self.model, self.task, self.batch, self.moving = model, task, batch, moving
        self.parameters = list(model.parameters())
        self._rewind = rewinder(self.parameters[0].device)

    def loss(self) -> Tensor:
        self._rewind()
        return self.task.attacker_loss(self.model, self.batch)

    def slope(self, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, list[Tensor]]:
        """Return the loss and its gradient, without graphs."""
        loss = self.loss()
        return loss.detach(), list(torch.autograd.grad(loss, parameters, materialize_grads=True))

    def push(self, vector: Sequence[Tensor], weight: Tensor | float = 0.0) -> None:
        """Add to the ``.grad`` of all the Hessian's product with a vector over what moves, and a weighted gradient."""
        loss = self.loss()
        slope = torch.autograd.grad(loss, self.moving, create_graph=True, materialize_grads=True)
        along = torch.stack([(part * lean).sum() for part, lean in zip(slope, vector, strict=True)])
        (weight * loss + along.sum()).backward()  # type: ignore[no-untyped-call]

    def displaced(self, by: Sequence[Tensor]) -> AbstractContextManager[None]:
        return standing_at(self.moving, [weight.detach() + part for weight, part in zip(self.moving, by, strict=True)])


def _update(query: Query) -> list[Tensor]:
    return [now.detach() - before for now, before in zip(query.moving, query.before, strict=True)]


def _norm(parts: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.get_total_norm(parts)


@contextmanager
def _in_full(task: Task) -> Iterator[None]:
    amp, task.amp = task.amp, False
    try:
        yield
    finally:
        task.amp = amp
