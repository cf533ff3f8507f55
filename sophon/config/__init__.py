"""Typed configuration: what every key means and which values it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from omegaconf import MISSING

from sophon.attacker import FineTuneStrategy
from sophon.config.attack import AttackConfig, GateConfig, MaskingConfig, SearchConfig
from sophon.config.domains import ComposedDomains, DomainConfig, DomainsConfig
from sophon.config.protection import GuardConfig, MethodConfig
from sophon.errors import UserError
from sophon.ranges import limited
from sophon.sampler import SamplerConfig

__all__ = [
    "AttackConfig",
    "ComposedConfig",
    "ComposedDomains",
    "Config",
    "DomainConfig",
    "DomainsConfig",
    "GateConfig",
    "GuardConfig",
    "MaskingConfig",
    "MethodConfig",
    "ModelConfig",
    "SearchConfig",
    "StrategyConfig",
    "TaskConfig",
    "TrackingConfig",
    "default_folder",
    "keyed",
    "plain",
]

if TYPE_CHECKING:
    StrategyConfig = FineTuneStrategy
else:
    # OmegaConf makes a frozen dataclass read-only, so that no configuration file could fill it in. This is the same
    # dataclass unfrozen; `sophon.validation` hands on FineTuneStrategy itself.
    _types = get_type_hints(FineTuneStrategy)
    # Its operations are lists of mappings there, and the optimizer's arguments a mapping.
    _plain = {
        "surgery": ("surgery", list[Any], field(default_factory=list)),
        "optimizer_args": ("optimizer_args", dict[str, Any], field(default_factory=dict)),
    }
    StrategyConfig = make_dataclass(
        "StrategyConfig",
        [
            _plain.get(part.name, (part.name, _types[part.name], field(default=part.default, metadata=part.metadata)))
            for part in fields(FineTuneStrategy)
        ],
    )
    StrategyConfig.__doc__ = FineTuneStrategy.__doc__


@dataclass
class TaskConfig:
    """The model kind, and how it is measured.

    Attributes:
        name: a key of `sophon.tasks.TASKS`: ``classification`` or ``denoising``.
        evaluation_images: denoising: at most so many (image, timestep, noise) triples of a split are measured.
        sample_steps: denoising: DDIM (or Euler) steps of a generated image.
        gradient_checkpointing: denoising: keep no activations inside the network's blocks but compute them again on the
            way back, by diffusers' `enable_gradient_checkpointing`: the same gradients, less memory, more time.
        frozen_dtype: of latent pipelines: what autoencoder and text encoders compute in, ``float32``, ``bfloat16`` or
            ``float16``; latents and embeddings are float32 from there on, and what is released is unchanged.
    """

    name: str = "classification"
    evaluation_images: int = limited(1000, ge=1)
    sample_steps: int = limited(25, ge=1)
    gradient_checkpointing: bool = False
    frozen_dtype: str = limited("float32", choices=("float32", "bfloat16", "float16"))


@dataclass
class ModelConfig:
    """A model.

    Attributes:
        library: ``timm``, ``torchvision``, ``transformers`` or ``python`` (any module) for classifiers; for denoisers
            ``diffusers``.
        architecture: the library's name of it; a timm hub name such as ``caformer_m36.sail_in22k_ft_in1k`` also works,
            with ``pretrained`` a denoiser's Hub id such as ``google/ddpm-cifar10-32``, and with ``python`` the dotted
            path of a class or function, ``package.module:name``.
        model_args: keyword arguments of its constructor.
        head: dotted name of the linear layer that ends a classifier, such as ``fc``. The libraries know theirs; with
            ``python`` it is needed.
        image_size: images are resized to this many pixels on each side.
        channels: channels that the model takes; 1 or 3; grey images are repeated, colour ones reduced to luminance.
        mean: normalisation per channel on a 0..1 scale; one number serves all channels. A folder of weights and timm's
            ``pretrained`` ones bring their own; beside a state dict it is needed; null for 0.5 otherwise.
        std: the same.
        pretrained: start from the library's pretrained weights (downloads them).
        weights: start from these weights: a folder of sophon, timm or diffusers, or a .safetensors state dict.
        strip_prefix: taken away from the names in the file of ``weights``, such as the ``module.`` of DataParallel.
        scheduler: a denoiser's noise schedule: arguments of diffusers' DDPMScheduler.
        class_conditional: a denoiser that is told the class.
    """

    library: str = "timm"
    architecture: str = MISSING
    model_args: dict[str, Any] = field(default_factory=dict)
    head: str | None = None
    image_size: int = limited(32, ge=1)
    channels: int = 3
    mean: list[float] | None = None
    std: list[float] | None = None
    pretrained: bool = False
    weights: str | None = limited(None, path=True)
    strip_prefix: str = ""
    scheduler: dict[str, Any] = field(default_factory=dict)
    class_conditional: bool = False


@dataclass
class TrackingConfig:
    """Where a run reports to.

    Attributes:
        wandb: ``disabled``, ``offline`` or ``online`` (needs a key and the network).
        project: wandb's project.
        progress: show progress bars (plain lines where the output is not a terminal).
    """

    wandb: str = limited("disabled", choices=("disabled", "offline", "online"))
    project: str = "sophon"
    progress: bool = True


@dataclass
class Config:
    """A whole run; one schema for every verb.

    Attributes:
        verb: what to do; the command line sets it.
        name: the experiment's name; the default folders lie under ``runs/<name>/seed<seed>``.
        seed: every random choice of a run derives from it (splits from ``split_seed``).
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        amp: where passes are autocast to bfloat16: ``cuda`` devices only, ``all`` devices, or ``none``. On a CPU with
            bfloat16 units it saves time as on a GPU; experiments/benchmarks says how much, and at which gradients.
        threads: CPU threads of torch; 0 leaves torch's choice.
        workers: processes that run an audit's attempts side by side. With ``threads=0`` each takes its share of the
            cores; with the same ``threads`` the results do not depend on the number of workers.
        run_dir: where the run writes.
        reference: the unprotected checkpoint: what protect starts from and the audit compares with.
        filtered: checkpoints of the same pre-training without the restricted classes: what an audit measures removal
            against. Of several the one counts that attackers get most out of.
        checkpoint: the checkpoint to export, audit, show or push.
        out: where export writes.
        audit: run directory of an audit, which export writes into the model card.
        repo: where ``push`` uploads to on the Hugging Face Hub: ``ORGANISATION/NAME``.
        dry_run: let ``push`` only say what it would upload.
        n: images that ``sample`` draws.
        prompts: texts that ``sample`` tells a text-to-image model, in turn.
        profile: let ``protect`` record some rounds with torch's profiler and say where their time went:
            ``run_dir/profile.txt``, and the trace ``profile.json.gz``. The results stay the same.
        runs: run directories of audits that ``report compare`` sets side by side.
        task: the model kind.
        domain: the data sets, and which part each plays.
        model: what ``pretrain`` makes, and what an ``audit`` takes weights for that sophon did not make.
        pretrain: how ``pretrain`` trains the reference on the original domain; ``steps=0`` takes ``model.weights`` as
            they are.
        method: how ``protect`` makes the model hard to fine-tune.
        sampler: the attackers that ``protect`` simulates.
        guard: how much of the original work may be lost.
        attack: what ``audit`` runs.
        gate: what an audit has to come to.
        tracking: where a run reports to.
    """

    verb: str = MISSING
    name: str = MISSING
    seed: int = 0
    device: str = "auto"
    amp: str = limited("cuda", choices=("all", "cuda", "none"))
    threads: int = limited(0, ge=0)
    workers: int = limited(1, ge=1)
    run_dir: str | None = limited(None, path=True)
    reference: str | None = limited(None, path=True)
    filtered: list[str] = limited([], path=True)
    checkpoint: str | None = limited(None, path=True)
    out: str | None = limited(None, path=True)
    audit: str | None = limited(None, path=True)
    repo: str | None = None
    dry_run: bool = True
    n: int = limited(64, ge=1)
    prompts: list[str] = field(default_factory=list)
    profile: bool = False
    runs: list[str] = limited([], path=True)
    task: TaskConfig = field(default_factory=TaskConfig)
    domain: DomainsConfig = field(default_factory=DomainsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    pretrain: StrategyConfig = field(default_factory=StrategyConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def validate(self, key: str) -> None:
        """Raise a `UserError` if a value is not allowed beside the others."""
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise UserError(f"name: '{self.name}' is not allowed; it names a folder")
        if self.pretrain.surgery or self.pretrain.scope == "lora":
            raise UserError("pretrain: surgery and scope lora are for audits")


def keyed(restricted: Mapping[str, DomainConfig]) -> dict[str, DomainConfig]:
    """Return restricted domains by the configuration keys that messages give them."""
    if len(restricted) == 1:
        [one] = restricted.values()
        return {"domain.restricted": one}
    return {f"domain.restricted.{name}": domain for name, domain in restricted.items()}


@dataclass
class ComposedConfig(Config):
    """The schema of what files and the command line may say."""

    domain: ComposedDomains = field(default_factory=ComposedDomains)


def default_folder(config: Config, verb: str) -> Path:
    """Return the folder that a verb writes to unless told otherwise."""
    return Path("runs") / config.name / f"seed{config.seed}" / verb


def plain(config: Config, *keys: str) -> dict[str, Any]:
    """Return the configuration, or only the parts named by ``keys``, as plain JSON data: that of a command line."""
    everything = asdict(config)
    if len(config.domain.restricted) == 1:
        [everything["domain"]["restricted"]] = everything["domain"]["restricted"].values()
    everything["pretrain"] = config.pretrain.plain()
    everything["attack"]["strategies"] = {name: strategy.plain() for name, strategy in config.attack.strategies.items()}
    return {key: everything[key] for key in keys or everything}
