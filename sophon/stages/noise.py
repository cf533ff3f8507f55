"""UNDO's noise (arXiv 2506.06278): weights go part of the way back to random ones, for `distil` to repair.

With theta the weights, ``alpha`` how far, ``beta`` how strong and N the draw of the architecture's own initialiser:

    theta <- (1 - alpha) theta + alpha beta N        matrices and filters
    theta <- (1 - alpha) theta + alpha theta_0       vectors (biases, gains), theta_0 what the initialiser gives them

The initialiser scales N to each layer's fan, so that alpha = 1 with beta = 1 is a new network. The paper's beta for
language models is 0.1. Running statistics of BatchNorm are estimated anew on original images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sophon.domains import batches
from sophon.errors import UserError
from sophon.models.partition import at_end, owned
from sophon.protection.context import Context
from sophon.protection.stage import Information, Row, Stage
from sophon.protection.training import fresh
from sophon.ranges import limited
from sophon.seeds import derive_seed, seed_torch
from sophon.surgery.batch_norm_statistics import reestimated

STATISTICS = 20  # batches that running statistics are estimated from


@dataclass
class NoiseConfig:
    """How much noise, and where.

    Attributes:
        alpha: how far the weights go, > 0 and <= 1; 1 leaves nothing of them.
        beta: the noise's strength, >= 0.
        blocks: how many blocks get it, counted from ``end``, >= 0; 0 for all and the head.
        end: ``first`` or ``last``.
    """

    alpha: float = limited(0.6, gt=0, le=1)
    beta: float = limited(1.0, ge=0)
    blocks: int = limited(0, ge=0)
    end: str = limited("last", choices=("first", "last"))


class Noise(Stage):
    """A single round: noise, then BatchNorm's statistics."""

    Config = NoiseConfig
    damages = True
    once = True
    mechanism = "removal"
    summary = "noise: its weights went part of the way back to random ones"

    def check(self, context: Context) -> None:
        """Raise a `UserError` if the model cannot be built anew, or has fewer blocks."""
        super().check(context)
        chosen_blocks(context, "noise", self.config.blocks, self.config.end)
        fresh(context)

    @torch.no_grad()
    def step(self, context: Context, number: int) -> Row:
        """Add the noise."""
        model, config, drawn = context.model, self.config, fresh(context)
        names = chosen_blocks(context, "noise", config.blocks, config.end)
        for name, parameter in model.named_parameters():
            if name in names:
                beta = config.beta if parameter.dim() > 1 else 1.0
                parameter.mul_(1 - config.alpha).add_(drawn.get_parameter(name), alpha=config.alpha * beta)
        restate(context)
        return {"alpha": config.alpha}

    def information(self, context: Context) -> Information:
        """Return that images of the original domain gave the statistics; all weights are random if ``alpha`` is 1."""
        whole = self.config.alpha == 1 and self.config.blocks == 0
        return Information("fresh" if whole else "given", ("images",), (), "none")


def chosen_blocks(context: Context, stage: str, blocks: int, end: str) -> set[str]:
    """Name the parameters and buffers of the ``first`` or ``last`` blocks, of the whole model for 0 blocks.

    Raises:
        UserError: the model has fewer blocks.
    """
    names, parts = context.model.state_dict(), context.task.blocks(context.model)
    if blocks > len(parts):
        raise UserError(f"method.stages.{stage}.blocks: {blocks} is not allowed; the model has {len(parts)}")
    if blocks == 0:
        return set(names)
    return owned(names, at_end(parts, blocks, end))


def restate(context: Context) -> None:
    """Estimate BatchNorm's running statistics anew on original images."""
    seed = derive_seed(context.seed, "statistics")
    seed_torch(seed)
    stream = batches(context.original["train"], context.method.ntr_batch_size, torch.Generator().manual_seed(seed))

    def run() -> None:
        for _ in range(STATISTICS):
            context.task.attacker_loss(context.model, next(stream))

    reestimated(context.model, run)
