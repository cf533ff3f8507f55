"""A stage that puts the first weights of the reference back: does a student that shares them learn more?"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sophon.models import build
from sophon.protection.context import Context
from sophon.protection.stage import Information, Row, Stage
from sophon.seeds import derive_seed, seed_torch


@dataclass
class OwnConfig:
    """Whose first weights: those of a `sophon pretrain` with this seed."""

    seed: int = 0


class Own(Stage):
    """A single round: all weights become those that pre-training began with, the head's aside where it was cut."""

    Config = OwnConfig
    damages = True
    once = True
    mechanism = "removal"
    summary = "the first weights of its pre-training"

    @torch.no_grad()
    def step(self, context: Context, number: int) -> Row:
        with torch.random.fork_rng(devices=[]):
            seed_torch(derive_seed(self.config.seed, "pretrain"))
            first = build(context.task.spec)
        context.model.load_state_dict(first.state_dict())
        return {"seed": self.config.seed}

    def information(self, context: Context) -> Information:
        return Information("fresh", (), (), "none")
