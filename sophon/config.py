"""Typed configuration: what every key means and which values it takes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, make_dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

from omegaconf import MISSING

from sophon.strategies import FineTuneStrategy, SamplerConfig

if TYPE_CHECKING:
    StrategyConfig = FineTuneStrategy
else:
    # OmegaConf makes a frozen dataclass read-only, so that no configuration file could fill it in. This is the same
    # dataclass unfrozen; `sophon.validation` hands on FineTuneStrategy itself.
    _types = get_type_hints(FineTuneStrategy)
    # Its operations are lists of mappings there.
    StrategyConfig = make_dataclass(
        "StrategyConfig",
        [
            ("surgery", list[Any], field(default_factory=list))
            if part.name == "surgery"
            else (part.name, _types[part.name], part.default)
            for part in fields(FineTuneStrategy)
        ],
    )


@dataclass
class DomainConfig:
    """A data set, or a part of one.

    Attributes:
        name: what reports call it.
        source: a key of `sophon.domains.SOURCES`: ``bundled``, ``torchvision`` or ``imagefolder``.
        dataset: which of the source's data sets; empty for ``imagefolder``.
        root: folder that torchvision's files, or the ``train/`` and ``test/`` of an image folder, lie in.
        download: fetch the data if it is not there. Nothing is ever fetched otherwise.
        classes: names of the classes to keep, in this order; null keeps all.
        per_class: at most this many training images of each class (drawn with ``split_seed``); null for all.
        test_per_class: the same for test images.
        split_seed: seeds the limits and the splits; not the run's seed, so that runs share their splits.
        val_fraction: part of an original domain's training images kept for ``val``.
        fractions: parts of a restricted domain's training images: ``adapt`` and ``query`` (the defender's), ``attack``
            and ``select`` (the attacker's). They sum to at most 1.
        labels: ``given``, or for a restricted domain of which the defender has images only ``none``: classes then
            serve to choose and to split images as with ``given``, simulated attackers learn clusters, and an image
            folder may hold its images in ``train/`` and ``test/`` themselves.
        clusters: without labels, how many clusters of the reference's features become classes, >= 2.
    """

    name: str = MISSING
    source: str = MISSING
    dataset: str = ""
    root: str = "data"
    download: bool = False
    classes: list[str] | None = None
    per_class: int | None = None
    test_per_class: int | None = None
    split_seed: int = 0
    val_fraction: float = 0.1
    fractions: dict[str, float] = field(
        default_factory=lambda: {"adapt": 0.4, "query": 0.1, "attack": 0.4, "select": 0.1}
    )
    labels: str = "given"
    clusters: int = 10


@dataclass
class DomainsConfig:
    """The domains of a run.

    Attributes:
        original: what the model was made for.
        restricted: what it must not be fine-tuned for, one domain or more. In files and on the command line it is the
            keys of one; for several see `ComposedDomains`.
        benign: what it may be fine-tuned for, for the audit to see that this is not harmed; null for none. Split as a
            restricted domain.
    """

    original: DomainConfig = field(default_factory=DomainConfig)
    restricted: list[DomainConfig] = field(default_factory=lambda: [DomainConfig()])
    benign: DomainConfig | None = None


@dataclass
class ComposedDomains(DomainsConfig):
    """The domains as files and the command line give them; `sophon.validation` makes a `DomainsConfig` of them.

    ``domain.restricted=[a, b]`` on the command line fills in ``several`` and ``chosen``; in a file's defaults list
    ``/domain@domain.several.a: a`` does.

    Attributes:
        restricted: the restricted domain, where there is one.
        several: restricted domains, each under a key of its own, which take the place of ``restricted``.
        chosen: keys of those that count, in this order; null for all of them.
    """

    restricted: DomainConfig = field(default_factory=DomainConfig)  # type: ignore[assignment]
    several: dict[str, DomainConfig] = field(default_factory=dict)
    chosen: list[str] | None = None


@dataclass
class TaskConfig:
    """The model kind, and how it is measured.

    Attributes:
        name: a key of `sophon.tasks.TASKS`: ``classification`` or ``denoising``.
        evaluation_images: denoising: at most so many (image, timestep, noise) triples of a split are measured.
        sample_steps: denoising: DDIM steps of a generated image.
    """

    name: str = "classification"
    evaluation_images: int = 1000
    sample_steps: int = 25


@dataclass
class ModelConfig:
    """A model.

    Attributes:
        library: ``timm`` or ``torchvision`` for classifiers, ``diffusers`` for denoisers.
        architecture: the library's name of it; a timm hub name such as ``caformer_m36.sail_in22k_ft_in1k`` also works,
            and with ``pretrained`` a denoiser's Hub id such as ``google/ddpm-cifar10-32``.
        model_args: keyword arguments of its constructor.
        image_size: images are resized to this many pixels on each side.
        channels: channels that the model takes; 1 or 3; grey images are repeated, colour ones reduced to luminance.
        mean: normalisation per channel on a 0..1 scale; one number serves all channels.
        std: the same.
        pretrained: start from the library's pretrained weights (downloads them).
        weights: start from these weights: a folder of sophon, timm or diffusers, or a .safetensors state dict.
        scheduler: a denoiser's noise schedule: arguments of diffusers' DDPMScheduler.
        class_conditional: a denoiser that is told the class.
    """

    library: str = "timm"
    architecture: str = MISSING
    model_args: dict[str, Any] = field(default_factory=dict)
    image_size: int = 32
    channels: int = 3
    mean: list[float] = field(default_factory=lambda: [0.5])
    std: list[float] = field(default_factory=lambda: [0.5])
    pretrained: bool = False
    weights: str | None = None
    scheduler: dict[str, Any] = field(default_factory=dict)
    class_conditional: bool = False


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
        engine: ``first_order`` or ``second_order`` (a key of `sophon.protect.suppress.ENGINES`).
        segment: second order: inner steps whose graphs live at once, >= 1. Memory is the activations of so many steps,
            and K / ``segment`` times the trained weights with the optimizer's state. All but the last segment are taken
            twice: ``segment`` >= K is fastest and needs the most.
        window: second order: inner steps that a query's derivative follows back at most, >= 0, in blocks counted from
            the last step (see `sophon.protect.second_order`); null for all of them, which is exact.
        rounds: how many alternations.
        fts_steps: FTS steps a round (l_FTS of the paper).
        ntr_steps: NTR steps a round (l_NTR).
        fts_lr: Adam's rate of FTS (alpha).
        ntr_lr: Adam's rate of NTR (beta).
        schedule: a key of `sophon.strategies.SCHEDULES`: how both rates go over the rounds.
        attackers: attackers simulated for each FTS step (N).
        gamma: weights of the inner steps' query losses, a key of `sophon.protect.simulate.GAMMAS`; they sum to 1.
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


@dataclass
class SearchConfig:
    """An attacker who searches: the same search, with the same budget, against every role.

    Every trial is an attempt of ``steps`` steps, judged on the attacker's ``select`` split; the best one is run again
    on ``seeds`` seeds and only then measured on ``test``.

    Attributes:
        sampler: how optuna proposes trials: ``tpe`` or ``random``.
        trials: how many, pruned ones included, >= 1.
        steps: fine-tuning steps of each, >= 1.
        seeds: attempts of the winner, >= 1.
        startup: random trials before ``tpe`` begins to model, and before anything is pruned.
        prune: stop a trial that at a point of its curve is worse than the median of the trials before it.
        eval_points: points of a trial's curve, the start and the end included, >= 2.
        optimizers: learning-rate range [low, high] of each optimizer; drawn as by the sampler of protection.
        choices: further fields of `FineTuneStrategy`, each with the values to choose from; others keep their defaults.
    """

    sampler: str = "tpe"
    trials: int = 64
    steps: int = 200
    seeds: int = 3
    startup: int = 10
    prune: bool = True
    eval_points: int = 5
    optimizers: dict[str, list[float] | None] = field(default_factory=dict)
    choices: dict[str, list[Any]] = field(default_factory=dict)


@dataclass
class MaskingConfig:
    """How an audit looks for gradient masking once the attacks have run (see `sophon.audit.masking`).

    It only looks, so that changing this does not make other attacks of an audit, which may go on in its run directory.

    Attributes:
        heads: head starts from which the attacker's gradient is measured: ``fresh``, ``kept``, ``probed``. One that
            does not fit the model is left out; an empty list leaves the whole measurement out.
        steps: after so many steps of a mild attacker (momentum, rate 0.01) it is measured again, >= 0; 0 measures the
            released weights only.
        batches: batches of 128 of the attacker's images that each measurement averages over, >= 1.
    """

    heads: list[str] = field(default_factory=lambda: ["fresh", "kept"])
    steps: int = 10
    batches: int = 2


@dataclass
class AttackConfig:
    """What the audit runs.

    Attributes:
        seeds: attempts of each strategy against each role, >= 1.
        roles: which models are attacked: ``protected``, ``unprotected``, ``scratch``. Comparisons need all three.
        eval_points: points of each curve on the ``select`` split, the start and the end included, >= 2.
        samples: images that a generating model draws at each of these points, for the report's grids; 0 for none.
        frechet_samples: images drawn at the end for the Frechet distance to the test split; 0 for none.
        strategies: the attacks by name, each with the fields of `FineTuneStrategy`.
        grid: further attacks: every combination of these lists: of values of the `FineTuneStrategy` field that is the
            list's key; or, under any key, of mappings with a ``name`` and several fields that go together.
        search: attackers who search, by name; the winner's attempts are recorded under that name.
        benign: names of the strategies that are also run on ``domain.benign``, if there is one.
        masking: how gradient masking is looked for.
        oracle: name of a strategy that the unprotected model also suffers with ten times the data (as far as there
            are so many) for as many epochs, as the ceiling of what an attacker could have; null for none.
        reuse: run directories of other audits; what they hold of the same attempts is copied instead of run again.
        shard: run only every ``shards``-th part of the attempts, counted from 0, for several machines that share a
            run directory; the audit without shards then finds them done and writes the result.
        shards: see ``shard``, >= 1.
    """

    seeds: int = 1
    roles: list[str] = field(default_factory=lambda: ["protected", "unprotected", "scratch"])
    eval_points: int = 6
    samples: int = 16
    frechet_samples: int = 0
    strategies: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    search: dict[str, SearchConfig] = field(default_factory=dict)
    benign: list[str] = field(default_factory=list)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    oracle: str | None = None
    reuse: list[str] = field(default_factory=list)
    shard: int = 0
    shards: int = 1


@dataclass
class TrackingConfig:
    """Where a run reports to.

    Attributes:
        wandb: ``disabled``, ``offline`` or ``online`` (needs a key and the network).
        project: wandb's project.
        entity: wandb's entity; null for the default one.
        progress: show progress bars (plain lines where the output is not a terminal).
    """

    wandb: str = "offline"
    project: str = "sophon"
    entity: str | None = None
    progress: bool = True


@dataclass
class Config:
    """A whole run; one schema for every verb.

    Attributes:
        verb: what to do; the command line sets it.
        name: the experiment's name; the default folders lie under ``runs/<name>/seed<seed>``.
        seed: every random choice of a run derives from it (splits from ``split_seed``).
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        amp: autocast to bfloat16 on a CUDA device.
        threads: CPU threads of torch; 0 leaves torch's choice.
        workers: processes that run an audit's attempts side by side. With ``threads=0`` each takes its share of the
            cores; with the same ``threads`` the results do not depend on the number of workers.
        stack: attempts of an audit that are trained together at most, as one stacked model, >= 1: those of the same
            steps, batch size, scope and kinds of surgery. 1 trains each by itself. More is for a GPU that one small
            model cannot fill; on a CPU it takes longer, and ``workers`` is what helps. The results are then those of 1
            to rounding, not to the bit, since batched kernels add in another order: so a run directory keeps to one or
            to more, and ``attack.reuse`` takes no attempt over from one to the other. Searches, adapters and models
            whose loss draws random numbers (dropout, denoisers) are trained one by one. What is killed loses up to
            ``stack`` attempts.
        run_dir: where the run writes.
        reference: the unprotected checkpoint: what protect starts from and the audit compares with.
        checkpoint: the checkpoint to export or audit.
        out: where export writes.
        n: images that ``sample`` draws.
        profile: let ``protect`` record some rounds with torch's profiler and say where their time went:
            ``run_dir/profile.txt``, and the trace ``profile.json.gz``. The results stay the same.
        runs: run directories of audits that ``report compare`` sets side by side.
        task: the model kind.
        pretrain: how ``pretrain`` trains the reference on the original domain; ``steps=0`` takes ``model.weights`` as
            they are.
    """

    verb: str = MISSING
    name: str = MISSING
    seed: int = 0
    device: str = "auto"
    amp: bool = True
    threads: int = 0
    workers: int = 1
    stack: int = 1
    run_dir: str | None = None
    reference: str | None = None
    checkpoint: str | None = None
    out: str | None = None
    n: int = 64
    profile: bool = False
    runs: list[str] = field(default_factory=list)
    task: TaskConfig = field(default_factory=TaskConfig)
    domain: DomainsConfig = field(default_factory=DomainsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    pretrain: StrategyConfig = field(default_factory=StrategyConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def keyed(restricted: list[DomainConfig]) -> dict[str, DomainConfig]:
    """Return restricted domains by the configuration keys that messages give them."""
    if len(restricted) == 1:
        return {"domain.restricted": restricted[0]}
    return {f"domain.several.{each.name}": each for each in restricted}


@dataclass
class ComposedConfig(Config):
    """The schema of what files and the command line may say."""

    domain: ComposedDomains = field(default_factory=ComposedDomains)


def plain(config: Config, *keys: str) -> dict[str, Any]:
    """Return the configuration, or only the parts named by ``keys``, as plain JSON data; one domain is no list."""
    everything = asdict(config)
    if len(config.domain.restricted) == 1:
        everything["domain"]["restricted"] = everything["domain"]["restricted"][0]
    everything["pretrain"] = config.pretrain.plain()
    everything["attack"]["strategies"] = {name: each.plain() for name, each in config.attack.strategies.items()}
    return {key: everything[key] for key in keys or everything}
