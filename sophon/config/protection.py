"""How a model is protected: the method, and the guard on the original domain."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING


@dataclass
class ClampConfig:
    """CLAMP's terms; `sophon.protect.clamp` gives the formulas. A weight of 0 leaves a term out.

    Attributes:
        curvature: weight, >= 0: the attacker's loss is to curve along its last step by ``kappa_min`` at least. Three
            passes more at every query.
        contract: weight, >= 0: the update map is to contract two points near the attacker's last weights by ``c_max``.
        tail: weight, >= 0: what the attacker has gained, and can gain at most if its updates contract, is to stay
            within ``slack``.
        inverse: weight, >= 0: the attacker's loss at its start is to be that of a guess.
        kappa_min: loss per squared length of the weights; of either sign.
        c_max: > 0; the map contracts where it is below 1.
        c_limit: in the tail bound c counts as at most this, > 0 and < 1.
        probe_width: how far the weights are displaced along a direction, in their own units, > 0 (d of the curvature,
            eps of the contraction). In float32 much less than 0.01 drowns in rounding.
        probes: random directions in which the contraction is looked for, the worst of which counts, >= 1.
        slack: in the attacker's loss, >= 0.
        lipschitz: of the gradient of the attacker's loss, >= 0 (Lip).
    """

    curvature: float = 0.0
    contract: float = 0.0
    tail: float = 0.0
    inverse: float = 0.0
    kappa_min: float = 0.0
    c_max: float = 0.95
    c_limit: float = 0.99
    probe_width: float = 0.05
    probes: int = 1
    slack: float = 0.0
    lipschitz: float = 1.0

    @property
    def on(self) -> bool:
        """Whether any term has a weight."""
        return any((self.curvature, self.contract, self.tail, self.inverse))


@dataclass
class MethodConfig:
    """How the model is protected: rounds of FTS alternating with NTR.

    Attributes:
        name: what manifests and reports call the method.
        suppression_loss: a key of `sophon.losses.SUPPRESSION_LOSSES`, or for denoisers of
            `sophon.losses.DENOISING_SUPPRESSION_LOSSES`.
        suppression_weight: of the suppression loss among what is asked at a query, >= 0. As ``sharpness``, ``clamp``
            and ``condition``, other values than the default need the engine ``first_order``.
        sharpness: the suppression's gradient is taken where, within this distance of the attacker's weights, the loss
            is worst for the defender (rho of SAM), >= 0; 0 takes it at the weights themselves. Twice the passes.
        clamp: CLAMP's terms, asked besides.
        condition: weight, >= 0, of ill-conditioning the restricted domain's features where attackers begin, and of
            keeping the original domain's well-conditioned in NTR; 0 for none. For classifiers.
        fixed_norms: weights that a normalisation follows are kept at the reference's norm, since their growth
            only hides the gradient from attackers: ``none``; ``layer``, of each such weight as a whole; or ``channel``,
            of each of its output channels.
        gains: the released weights are in coordinates in which steps lead nowhere (`sophon.protect.coordinates`): how
            many times what an interface's channels share outweighs what they tell, > 0, one number for all interfaces
            or one for each; empty for ordinary coordinates. For timm's ResNets, without autocast.
        spread: with ``gains``, the largest scale of an interface's channels over the smallest, >= 1, in powers of two.
        engine: ``first_order`` or ``second_order`` (a key of `sophon.protect.fts.ENGINES`).
        segment: second order: inner steps whose graphs live at once, >= 1. Memory is the activations of so many steps,
            and K / ``segment`` times the trained weights with the optimizer's state. All but the last segment are taken
            twice: ``segment`` >= K is fastest and needs the most.
        window: second order: inner steps that a query's derivative follows back at most, >= 0, in blocks counted from
            the last step (see `sophon.protect.second_order`); null for all of them, which is exact.
        rounds: how many alternations.
        fts_steps: FTS steps a round (l_FTS of the paper); 0 simulates no attacker, and needs ``gains``.
        ntr_steps: NTR steps a round (l_NTR).
        fts_lr: Adam's rate of FTS (alpha).
        ntr_lr: Adam's rate of NTR (beta).
        schedule: a key of `sophon.attacker.SCHEDULES`: how both rates go over the rounds.
        attackers: attackers simulated for each FTS step (N).
        gamma: weights of the inner steps' query losses, a key of `sophon.protect.inner_loop.GAMMAS`; they sum to 1.
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
            that recover most at present (see `sophon.protect.curriculum`). The sampler's lists and ranges bound both.
        curriculum_share: bandit: part of the draws that stays as the sampler has them, >= 0 and <= 1.
        curriculum_memory: bandit: what a choice's running success keeps of itself whenever it is seen, >= 0 and < 1.
        suppression_timesteps: denoising: the suppression loss draws its timesteps from this first part of the noise
            schedule, > 0 and <= 1. Where nearly all is noise the domains cannot be told apart.
        probe_steps: steps by which the defender's probed head is refreshed in each FTS step in which an attacker starts
            from it.
        probe_lr: Adam's rate of those steps.
    """

    name: str = MISSING
    suppression_loss: str = "klu"
    suppression_weight: float = 1.0
    sharpness: float = 0.0
    clamp: ClampConfig = field(default_factory=ClampConfig)
    condition: float = 0.0
    fixed_norms: str = "none"
    gains: list[float] = field(default_factory=list)
    spread: float = 1.0
    engine: str = "first_order"
    segment: int = 1
    window: int | None = None
    rounds: int = 100
    fts_steps: int = 1
    ntr_steps: int = 10
    fts_lr: float = 3e-4
    ntr_lr: float = 5e-4
    schedule: str = "constant"
    attackers: int = 1
    gamma: str = "uniform"
    query_every: int = 1
    query_batch_size: int = 128
    ntr_batch_size: int = 128
    ntr_augmentation: str = "standard"
    distillation: float = 0.0
    temperature: float = 2.0
    fts_max_norm: float | None = None
    fts_original_weight: float = 0.0
    pool: int = 0
    chunk: int = 20
    curriculum: str = "uniform"
    curriculum_share: float = 0.3
    curriculum_memory: float = 0.9
    suppression_timesteps: float = 1.0
    probe_steps: int = 5
    probe_lr: float = 0.005


@dataclass
class GuardConfig:
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

    every: int = 10
    tolerance: float = 1.0
    relative: bool = False
    repair_steps: int = 50
    patience: int = 0
    growth: float = 1.5
    max_ntr_steps: int = 100
