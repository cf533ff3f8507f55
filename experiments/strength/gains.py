"""What gains and a spread are worth, and what they ask of the arithmetic: releases that differ in nothing else.

    python experiments/strength/gains.py --run runs/strength/coordinates/seed0/protect \
        --reference runs/bench_c/seed0/pretrain --gains 1 30 1000 --spreads 1 1e4 --untrained 1e4 --out runs/gains

Each of `--gains` is a release of one protected run with that gain at all interfaces, `<gain>.safetensors`, and with
each of `--spreads` above 1, `<gain>-spread<spread>.safetensors`; `--only` are releases with that gain at one interface
and 1 at all others, `<gain>-<place>.safetensors`. `--untrained` are spreads of the reference itself, no training at
all, `untrained-spread<spread>.safetensors`. Audit a file as any foreign checkpoint. Printed
are accuracies on the original domain, also with what convolutions and linear layers multiply rounded to the 10 bits of
TF32 and float16, and to the 7 of bfloat16. Rounding is to nearest, sums stay in float32, and float16's range is not
looked at.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from growth import original_domain
from torch import Tensor, nn

from sophon.errors import UserError
from sophon.export import read_checkpoint
from sophon.files import read_json
from sophon.protect import coordinates
from sophon.protect.state import last_good
from sophon.tasks import ClassificationTask
from sophon.tensor_files import write_tensors

MANTISSA = 23  # bits of float32
PRECISIONS = {"float32": MANTISSA, "TF32, float16": 10, "bfloat16": 7}


def rounded(values: Tensor, bits: int) -> Tensor:
    """Round float32 to a mantissa of ``bits`` bits, to nearest, halves away from zero."""
    below = MANTISSA - bits
    if not below:
        return values
    whole = values.contiguous().view(torch.int32) + (1 << (below - 1))
    return (whole & -(1 << below)).view(torch.float32)


@contextmanager
def precision(model: nn.Module, bits: int) -> Iterator[None]:
    """Round what convolutions and linear layers multiply, within the block."""
    layers = [part for part in model.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    kept = [layer.weight.detach().clone() for layer in layers]
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0], bits),)) for layer in layers]
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(rounded(layer.weight, bits))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            for layer, weight in zip(layers, kept, strict=True):
                layer.weight.copy_(weight)


def choices(options: argparse.Namespace, count: int) -> dict[str, tuple[list[float], float]]:
    """Return gains for each of ``count`` interfaces, and a spread, by the name of their file."""
    everywhere = {
        f"{gain:g}" + (f"-spread{spread:g}" if spread > 1 else ""): ([gain] * count, spread)
        for spread in options.spreads
        for gain in options.gains
    }
    alone = {
        f"{gain:g}-{place}": ([gain if index == place else 1.0 for index in range(count)], 1.0)
        for gain in options.only
        for place in range(count)
    }
    return everywhere | alone


def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    reference = read_checkpoint(options.reference, "--reference")
    weights, _ = last_good(options.run)
    identity = read_json(options.run / "run.json")["identity"]
    if not identity["method"].get("gains"):
        raise UserError(f"--run: '{options.run}' has no gains; give a run of method=coordinates")
    original = original_domain(options.original, reference.spec)
    task = ClassificationTask(reference.spec)
    trained = coordinates.linear(reference.model)
    trained.load_state_dict(weights)
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"| gains | {' | '.join(PRECISIONS)} |\n|---{'|---' * len(PRECISIONS)}|")
    chosen = choices(options, len(coordinates.known(reference.model)))
    untrained = {f"untrained-spread{spread:g}": spread for spread in options.untrained}
    for name in (*chosen, *untrained):
        if name in chosen:
            gains, spread = chosen[name]
            images = original["train"]
            made = coordinates.release(trained, reference.model, task, images, gains, spread, identity["seed"])
        else:
            made = copy.deepcopy(reference.model)
            coordinates.spread_channels(made, untrained[name], identity["seed"])
        found = []
        for bits in PRECISIONS.values():
            with precision(made, bits):
                found.append(f"{task.evaluate(made, original['test']):.1f}")
        print(f"| {name} | {' | '.join(found)} |", flush=True)
        write_tensors(options.out / f"{name}.safetensors", made.state_dict())


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run_dir of a protection with gains")
    parser.add_argument("--reference", type=Path, required=True, help="what it started from")
    parser.add_argument("--gains", type=float, nargs="*", default=[], help="for all interfaces alike")
    parser.add_argument("--spreads", type=float, nargs="*", default=[1.0], help="of channels, with each of these gains")
    parser.add_argument("--untrained", type=float, nargs="*", default=[], help="spreads of the reference itself")
    parser.add_argument("--only", type=float, nargs="*", default=[], help="for one interface after the other")
    parser.add_argument("--original", default="cifar10_folder", help="a file of conf/domain")
    parser.add_argument("--out", type=Path, required=True, help="folder of the state dicts to write")
    options = parser.parse_args(arguments)
    if not all(0 < gain < float("inf") for gain in (*options.gains, *options.only)):
        parser.error("a gain is not allowed; each must be > 0 and finite")
    if not all(1 <= spread < float("inf") for spread in (*options.spreads, *options.untrained)):
        parser.error("a spread is not allowed; each must be >= 1 and finite")
    return options


if __name__ == "__main__":
    try:
        main(parsed(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"gains: {error}")
