"""A part of the weights replaced by fresh ones, for a stage after it to train again.

What entries of the NeurIPS 2023 unlearning challenge did before fine-tuning on what is kept: resetting the first or the
last blocks, the weights of least magnitude (pruning by L1), or those whose gradients on both domains agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sophon.domains import Batch, ImageSet, batches
from sophon.protection.context import Context
from sophon.protection.stage import Information, Row, Stage
from sophon.protection.training import fresh
from sophon.ranges import limited
from sophon.seeds import derive_seed, seed_torch
from sophon.stages.noise import chosen_blocks, restate
from sophon.surgery.operations import largest, pruned

BATCHES = 10  # that gradients are measured on


@dataclass
class ReinitialiseConfig:
    """Which weights are replaced.

    Attributes:
        which: ``first_blocks`` or ``last_blocks``, with their buffers; of each matrix and filter a ``fraction``: the
            ``smallest`` by magnitude; or the ``agreeing``, those with the largest product of the gradients of the
            original domain's loss and of the suppression loss with its sign turned.
        blocks: how many blocks, >= 1.
        fraction: of the elements, > 0 and <= 1.
    """

    which: str = limited("last_blocks", choices=("first_blocks", "last_blocks", "smallest", "agreeing"))
    blocks: int = limited(1, ge=1)
    fraction: float = limited(0.5, gt=0, le=1)


class Reinitialise(Stage):
    """A single round: fresh weights, then BatchNorm's statistics."""

    Config = ReinitialiseConfig
    damages = True
    once = True
    mechanism = "removal"
    summary = "re-initialisation: a part of its weights was made anew"

    def check(self, context: Context) -> None:
        """Raise a `UserError` if the model cannot be built anew, or has fewer blocks."""
        super().check(context)
        if self.config.which == "agreeing" and context.task.reads_labels:
            for domain in context.restricted:
                context.task.start_head(context.model, "kept", domain.classes)
        self._masks(context)
        fresh(context)

    @torch.no_grad()
    def step(self, context: Context, number: int) -> Row:
        """Replace the weights."""
        masks, state, drawn = self._masks(context), context.model.state_dict(), fresh(context).state_dict()
        for name, mask in masks.items():
            state[name].copy_(torch.where(mask, drawn[name], state[name]))
        restate(context)
        replaced, whole = sum(int(mask.sum()) for mask in masks.values()), sum(v.numel() for v in state.values())
        return {"replaced": replaced / whole}

    def information(self, context: Context) -> Information:
        """Return that the restricted domains are read where gradients are compared."""
        if self.config.which != "agreeing":
            return Information("given", ("images",), (), "none")
        labels = ("labels",) if context.task.reads_labels else ()
        return Information("given", restricted=("images", *labels), teacher="none")

    def _masks(self, context: Context) -> dict[str, Tensor]:
        """Return what is replaced: by tensor, a mask (bool) of its shape."""
        config, state = self.config, context.model.state_dict()
        if config.which.endswith("_blocks"):
            names = chosen_blocks(context, "reinitialise", config.blocks, config.which.removesuffix("_blocks"))
            return {name: torch.ones_like(state[name], dtype=torch.bool) for name in names}
        if config.which == "smallest":
            return pruned(context.model, config.fraction)
        return {name: largest(score, config.fraction) for name, score in _agreement(context).items()}


def _agreement(context: Context) -> dict[str, Tensor]:
    """Return, for each matrix and filter, the product of both domains' gradients: what trains both alike is large."""
    task, model = context.task, context.model
    original = _gradients(context, context.original["train"], lambda batch: task.original_loss(model, batch, None))
    restricted = [
        _gradients(context, domain["adapt"], lambda batch: task.suppression_loss(model, batch))
        for domain in context.restricted
    ]
    return {name: -value * sum(gradients[name] for gradients in restricted) for name, value in original.items()}


@torch.enable_grad()
def _gradients(context: Context, images: ImageSet, loss: Callable[[Batch], Tensor]) -> dict[str, Tensor]:
    """Return the mean gradient over a few batches, with the model as users run it."""
    seed = derive_seed(context.seed, "gradients")
    seed_torch(seed)
    parameters = {name: value for name, value in context.model.named_parameters() if value.dim() > 1}
    stream = batches(images, context.method.ntr_batch_size, torch.Generator().manual_seed(seed))
    context.model.eval()
    total = torch.stack([loss(next(stream)) for _ in range(BATCHES)]).mean()
    gradients = torch.autograd.grad(total, list(parameters.values()), materialize_grads=True)
    return dict(zip(parameters, gradients, strict=True))
