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

import torch
from growth import add_options, compare, grow, original_domain
from torch import Tensor, nn

from sophon.errors import UserError
from sophon.export import read_checkpoint
from sophon.models import build
from sophon.tasks import ClassificationTask
from sophon.tensor_files import write_tensors


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, steps=6000, lr=0.1)
    parser.add_argument("--random", nargs="+", default=[], metavar="PREFIX", help="of parameters that stay random")
    parser.add_argument("--out", type=Path, required=True, help="the state dict to write, .safetensors")
    return parser.parse_args(arguments)


def main(options: argparse.Namespace) -> None:
    """Grow the model and write it; print its accuracy beside the reference's.

    Raises:
        UserError: the reference, the images or a prefix is not there.
    """
    torch.set_num_threads(1)
    reference = read_checkpoint(options.reference, "--reference")
    original = original_domain(options.original, reference.spec)
    task = ClassificationTask(reference.spec, distillation=1.0, amp=options.amp)
    torch.manual_seed(options.seed)
    model = build(reference.spec)
    kept = held(model, options.random)
    grow(model, reference.model, task, original["train"], options, lambda: put_back(kept))
    compare(task, original, {"reference": reference.model, "grown": model})
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(options.out, model.state_dict())


def held(model: nn.Module, prefixes: list[str]) -> dict[nn.Parameter, Tensor]:
    """Return the parameters that are to stay as they are, with their values."""
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name, _ in model.named_parameters()):
            raise UserError(f"--random: no parameter's name begins with '{prefix}'")
    named = model.named_parameters()
    return {each: each.detach().clone() for name, each in named if name.startswith(tuple(prefixes))}


@torch.no_grad()
def put_back(kept: dict[nn.Parameter, Tensor]) -> None:
    """Give parameters back the values that `held` remembered."""
    for parameter, drawn in kept.items():
        parameter.copy_(drawn)


if __name__ == "__main__":
    try:
        main(parsed(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"handicap: {error}")
