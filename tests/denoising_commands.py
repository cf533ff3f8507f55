"""The commands of the diffusion demonstration, at a size that takes a second."""

from __future__ import annotations

from pathlib import Path

from tests.cli_helpers import sophon

RUNS = Path("runs/quickstart_diffusion/seed0")
ROLES = ("protected", "unprotected", "scratch")
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"

# The demonstration, at a size that takes a second.
SMALL = (
    "experiment=quickstart_diffusion",
    "tracking=disabled",
    "tracking.progress=false",
    "threads=1",
    "domain.original.per_class=20",
    "domain.original.test_per_class=6",
    "domain.restricted.per_class=10",
    "domain.restricted.test_per_class=3",
    "model.image_size=8",
    "model.model_args.block_out_channels=[8,8]",
    "model.model_args.down_block_types=[DownBlock2D,AttnDownBlock2D]",
    "model.model_args.up_block_types=[AttnUpBlock2D,UpBlock2D]",
    "model.model_args.norm_num_groups=4",
    "model.scheduler.num_train_timesteps=20",
    "task.evaluation_images=20",
    "task.sample_steps=2",
)
PRETRAIN = ("pretrain", *SMALL, "pretrain.steps=2", "pretrain.batch_size=8")
PROTECT = (
    "protect",
    *SMALL,
    "method.rounds=2",
    "method.ntr_steps=1",
    "method.ntr_batch_size=8",
    "method.query_batch_size=8",
    "sampler.steps=[1,2]",
    "sampler.batch_sizes=[8]",
    "guard.every=1",
    "guard.tolerance=1000",
)
# `--config-dir` is how users bring groups of their own; `own_attack` writes this one.
AUDIT = ("audit", "--config-dir=own", *SMALL, "attack=tiny")
STRATEGY = "{optimizer: momentum, lr: 0.01, head: kept, batch_size: 8, steps: 2}"
MASKING = "masking: {heads: [kept]}"  # as it ships, it takes longer than the attack
CONDITIONAL = "model.class_conditional=true"


def own_attack(folder: Path, strategy: str = STRATEGY) -> None:
    (folder / "own" / "attack").mkdir(parents=True, exist_ok=True)
    lines = ["seeds: 1", "eval_points: 2", "samples: 4", MASKING, "strategies:", f"  mine: {strategy}", ""]
    (folder / "own" / "attack" / "tiny.yaml").write_text("\n".join(lines))


def make(folder: Path, *commands: tuple[str, ...]) -> None:
    own_attack(folder)
    for command in commands:
        result = sophon(folder, *command)
        assert result.code == 0, result
