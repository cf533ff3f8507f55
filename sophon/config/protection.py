"""How a model is protected: the method, and the guard on the original domain."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from sophon.attacker import AUGMENTATIONS, SCHEDULES
from sophon.errors import UserError
from sophon.ranges import Arguments, limited


@dataclass
class MethodConfig:
    """How the model is protected: what `sophon.stages.alternate` does, unless ``stages`` says otherwise.

    Attributes:
        name: what manifests and reports call the method.
        stages: the stages of the protection in their order, by name; empty for ``alternate`` alone. An entry holds the
            stage's own settings, keys of the method that are others for this stage (``rounds``, say), and, where its
            name does not say it, which ``stage`` it is: one of `sophon.stages.STAGES`, or a dotted path. null leaves
            one out.
        objectives: what is asked at an attacker's queries, by name with settings: `sophon.protection.objectives`, or
            ``objective`` with a dotted path. The first one's loss is recorded; null leaves one out. All but plain
            ``suppression`` need the engine ``first_order``.
        suppression_loss: a key of `sophon.losses.SUPPRESSION_LOSSES`, or for denoisers of
            `sophon.losses.DENOISING_SUPPRESSION_LOSSES`; or the dotted path of a function like those.
        fixed_norms: weights that a normalisation follows are kept at the reference's norm, since their growth
            only hides the gradient from attackers: ``none``; ``layer``, of each such weight as a whole; or ``channel``,
            of each of its output channels.
        engine: ``first_order`` or ``second_order`` (`sophon.protection.inner_loop`).
        segment: second order: inner steps whose graphs live at once, >= 1. Memory is the activations of so many steps,
            and K / ``segment`` times the trained weights with the optimizer's state. All but the last segment are taken
            twice: ``segment`` >= K is fastest and needs the most.
        rounds: how many alternations.
        fts_steps: FTS steps a round (l_FTS of the paper), >= 1.
        ntr_steps: NTR steps a round (l_NTR).
        fts_lr: Adam's rate of FTS (alpha).
        ntr_lr: Adam's rate of NTR (beta).
        schedule: a key of `sophon.attacker.SCHEDULES`: how both rates go over the rounds.
        attackers: attackers simulated for each FTS step (N).
        gamma: weights of the inner steps' query losses, a key of `sophon.protection.inner_loop.GAMMAS`; they sum to 1.
            With a pool they weigh the steps of one turn.
        query_every: a query after every so many inner steps (and after the last).
        query_batch_size: images of a query.
        ntr_batch_size: images of an NTR step.
        ntr_augmentation: a key of `sophon.domains.AUGMENTATIONS`.
        distillation: weight of distilling the reference's outputs into NTR, 0 for none.
        temperature: of the distillation.
        fts_max_norm: the FTS gradient's norm is clipped to this; null for no clipping.
        fts_original_weight: weight (mu) of the original domain's loss inside an FTS step, 0 for none. With it the step
            follows the sum of both gradients, and spends nothing on what NTR would undo.
        pool: attackers that stay alive across rounds, each going on for ``chunk`` steps in its turn; 0 simulates a new
            one from its first to its last step each time. At least as many as ``attackers``. Needs the engine
            ``first_order``.
        chunk: steps of a turn.
        curriculum: who is simulated next: ``uniform``, any strategy of the sampler alike; or ``bandit``, rather those
            that recover most at present (see `sophon.protection.curriculum`). The sampler's lists and ranges bound
            both.
        suppression_timesteps: denoising: the suppression loss draws its timesteps from this first part of the noise
            schedule, > 0 and <= 1. Where nearly all is noise the domains cannot be told apart.
        probe_steps: steps by which the defender's probed head is refreshed in each FTS step in which an attacker starts
            from it.
        probe_lr: Adam's rate of those steps.
    """

    name: str = MISSING
    stages: dict[str, Any] = field(default_factory=dict)
    objectives: dict[str, Any] = field(default_factory=lambda: {"suppression": {}})
    suppression_loss: str = "klu"
    fixed_norms: str = limited("none", choices=("none", "layer", "channel"))
    engine: str = limited("first_order", choices=("first_order", "second_order"))
    segment: int = limited(1, ge=1)
    rounds: int = limited(100, ge=1)
    fts_steps: int = limited(1, ge=1)
    ntr_steps: int = limited(10, ge=0)
    fts_lr: float = limited(3e-4, gt=0)
    ntr_lr: float = limited(5e-4, gt=0)
    schedule: str = limited("constant", choices=SCHEDULES)
    attackers: int = limited(1, ge=1)
    gamma: str = limited("uniform", choices=("uniform", "linear", "last"))
    query_every: int = limited(1, ge=1)
    query_batch_size: int = limited(128, ge=1)
    ntr_batch_size: int = limited(128, ge=1)
    ntr_augmentation: str = limited("standard", choices=AUGMENTATIONS)
    distillation: float = limited(0.0, ge=0)
    temperature: float = limited(2.0, gt=0)
    fts_max_norm: float | None = limited(None, gt=0)
    fts_original_weight: float = limited(0.0, ge=0)
    pool: int = limited(0, ge=0)
    chunk: int = limited(20, ge=1)
    curriculum: str = limited("uniform", choices=("uniform", "bandit"))
    suppression_timesteps: float = limited(1.0, gt=0, le=1)
    probe_steps: int = limited(5, ge=0)
    probe_lr: float = limited(0.005, gt=0)

    def validate(self, key: str) -> None:
        """Raise a `UserError` that names ``key`` if a value is not allowed beside the others."""
        if self.pool and self.engine != "first_order":
            raise UserError(f"{key}.pool: not allowed with engine {self.engine}; it needs first_order")
        if 0 < self.pool < self.attackers:
            raise UserError(
                f"{key}.pool: {self.pool} is not allowed with {self.attackers} attackers; give 0, or at least as many"
            )


@dataclass
class GuardConfig(Arguments):
    """The constraint that keeps the original domain's work.

    Attributes:
        every: rounds between two looks at the ``val`` split; the last round is always followed by one.
        tolerance: largest loss of the task's primary metric on ``val`` against the reference: in its own unit (points
            for accuracy), or in percent of the reference's value.
        relative: whether ``tolerance`` is in percent of the reference's value.
        repair_steps: annealed NTR steps tried on a breach before the trainer rolls back; 0 for none.
        patience: breaches in a row that are let pass, unaccepted, before the trainer rolls back: for methods whose
            rates fall towards the end, where the original work comes back by itself.
        growth: NTR steps of a round are multiplied by this after a roll-back.
        max_ntr_steps: but never grow beyond this.
    """

    every: int = limited(10, ge=1)
    tolerance: float = limited(1.0, ge=0)
    relative: bool = False
    repair_steps: int = limited(50, ge=0)
    patience: int = limited(0, ge=0)
    growth: float = limited(1.5, ge=1)
    max_ntr_steps: int = limited(100, ge=0)
