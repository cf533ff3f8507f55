"""The query at theta^k and the attacker's next gradient are taken at the same weights: can one pass give both?

Only where a batch's images do not see each other: where BatchNorm is absent, or frozen as here.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from cases import Bench
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from trick_pairs import Pair, Work, flat, twice

from sophon.losses import SUPPRESSION_LOSSES

Gradients = list[tuple[Tensor, ...]]  # of the query and of the attacker, each by parameter


def one_forward(bench: Bench) -> Pair:
    """Take both gradients of one forward pass over all images, with a backward pass each."""
    model, other = (each.eval() for each in twice(bench.model))
    own, images = list(other.parameters()), both_images(bench)

    def within() -> Gradients:
        logits = other(bench.task.prepare(images.flatten(0, 1))).unflatten(0, images.shape[:2])
        losses = both_losses(bench, logits)
        return [torch.autograd.grad(loss, own, retain_graph=not last) for last, loss in enumerate(losses)]

    return _pair(partial(separately, bench, model), within)


def mapped(bench: Bench) -> Pair:
    """Take both gradients at once: vmap over the two batches."""
    model, other = (each.eval() for each in twice(bench.model))
    parameters = {name: parameter.detach() for name, parameter in other.named_parameters()}
    buffers, images = dict(other.named_buffers()), both_images(bench)
    choices = torch.eye(2, device=images.device)

    def loss(weights: dict[str, Tensor], prepared: Tensor, choice: Tensor) -> Tensor:
        logits = functional_call(other, (weights, buffers), (prepared,))
        return (choice * torch.stack(both_losses(bench, [logits, logits]))).sum()

    def within() -> Gradients:
        prepared = torch.stack([bench.task.prepare(part) for part in images])
        found = vmap(grad(loss), (None, 0, 0))(parameters, prepared, choices)
        return [tuple(found[name][group] for name in parameters) for group in range(2)]

    return _pair(partial(separately, bench, model), within)


def separately(bench: Bench, model: nn.Module) -> Gradients:
    """Take both gradients of a forward and a backward pass each, as the engine does."""
    own = list(model.parameters())
    found = []
    for group, images in enumerate(both_images(bench)):
        logits = model(bench.task.prepare(images))
        found.append(torch.autograd.grad(both_losses(bench, [logits, logits])[group], own))
    return found


def both_images(bench: Bench) -> Tensor:
    """Return a query's images and an attacker's: uint8 [2, B, C, H, W]."""
    return torch.stack([bench.query[0].images, bench.adapt[0].images])


def both_losses(bench: Bench, logits: Tensor | list[Tensor]) -> list[Tensor]:
    """Return the query's loss of the first logits and the attacker's of the second; [B, classes] each."""
    query, adapt = logits
    suppression = SUPPRESSION_LOSSES["ice"]
    return [suppression(query, bench.query[0].labels), F.cross_entropy(adapt, bench.adapt[0].labels)]


def _pair(without: Work, within: Work) -> Pair:
    def found() -> tuple[Tensor, Tensor]:
        one, other = (flat(part for gradients in work() for part in gradients) for work in (without, within))
        return one, other

    return Pair(without, within, found)
