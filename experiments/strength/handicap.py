"""A model that does the original work without learnt features in its first layers, as a yardstick for protections.

    python experiments/strength/handicap.py --reference runs/cifar10_objects/seed0/pretrain --random conv1 \
        --out runs/handicap/stem.safetensors

Everything is made anew and distilled from the reference on the original domain, but for the parameters whose names
begin with ``--random``: they stay as they were drawn. No restricted image is ever seen. What is left of a head start
then says how much a protection wins merely by making features worse. Audit the file as any foreign checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from sophon.config import DomainConfig
from sophon.domains import Batch, load_original
from sophon.errors import UserError
from sophon.export import read_checkpoint
from sophon.finetune import fine_tune
from sophon.models import build
from sophon.runs import write_tensors
from sophon.strategies import FineTuneStrategy
from sophon.tasks import ClassificationTask
from sophon.tracking import Tracker

DOMAINS = Path(__file__).parents[2] / "conf" / "domain"


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, help="the unprotected checkpoint, or its run_dir")
    parser.add_argument("--random", nargs="+", default=[], metavar="PREFIX", help="of parameters that stay random")
    parser.add_argument("--out", type=Path, required=True, help="the state dict to write, .safetensors")
    parser.add_argument("--steps", type=int, default=6000, help="of 128 images (6000)")
    parser.add_argument("--lr", type=float, default=0.1, help="Nesterov's, warmed up and along a cosine (0.1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--original", default="cifar10_folder", help="a file of conf/domain")
    parser.add_argument("--no-amp", dest="amp", action="store_false", help="float32 instead of bfloat16")
    return parser.parse_args(arguments)


def main(options: argparse.Namespace) -> None:
    """Grow the model and write it; print its accuracy beside the reference's.

    Raises:
        UserError: the reference, the images or a prefix is not there.
    """
    torch.set_num_threads(1)
    reference = read_checkpoint(options.reference, "--reference")
    spec = reference.spec
    settings: Any = OmegaConf.merge(
        OmegaConf.structured(DomainConfig), OmegaConf.load(DOMAINS / f"{options.original}.yaml")
    )
    config: Any = OmegaConf.to_object(settings)
    original = load_original(config, image_size=spec.image_size, channels=spec.channels)
    task = ClassificationTask(spec, distillation=1.0, amp=options.amp)
    torch.manual_seed(options.seed)
    model = build(spec)
    kept = held(model, options.random)
    grow(model, reference.model, task, original["train"], kept, options)
    for name, each in (("reference", reference.model), ("grown", model)):
        values = ", ".join(f"{split} {task.evaluate(each, original[split]):.1f} %" for split in ("val", "test"))
        print(f"{name}: {values}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(options.out, model.state_dict())


def held(model: nn.Module, prefixes: list[str]) -> dict[nn.Parameter, Tensor]:
    """Return the parameters that are to stay as they are, with their values."""
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name, _ in model.named_parameters()):
            raise UserError(f"--random: no parameter's name begins with '{prefix}'")
    named = model.named_parameters()
    return {each: each.detach().clone() for name, each in named if name.startswith(tuple(prefixes))}


def grow(
    model: nn.Module,
    reference: nn.Module,
    task: ClassificationTask,
    images: Any,
    kept: dict[nn.Parameter, Tensor],
    options: argparse.Namespace,
) -> None:
    """Train on labels and on the reference's answers; put what is to stay random back after each step."""
    strategy = FineTuneStrategy(
        optimizer="nesterov",
        lr=options.lr,
        weight_decay=5e-4,
        schedule="warmup_cosine",
        batch_size=128,
        steps=options.steps,
        head="kept",
        augmentation="standard",
    )

    def loss(student: nn.Module, batch: Batch) -> Tensor:
        return task.original_loss(student, batch, reference)

    tracker = Tracker(progress=True)
    with tracker.progress("grow", options.steps) as advance:

        @torch.no_grad()
        def after_step(step: int, value: float) -> None:
            for parameter, drawn in kept.items():
                parameter.copy_(drawn)
            advance(f"loss {value:.3f}")

        generator = torch.Generator().manual_seed(options.seed)
        if not fine_tune(model, strategy, task, images, generator, after_step, loss):
            raise UserError(f"--lr: the loss stopped being finite at {options.lr}; lower it")


if __name__ == "__main__":
    try:
        main(parsed(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"handicap: {error}")
