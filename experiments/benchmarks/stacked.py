"""What `stack` of an audit brings: training M attempts one after another against training them as one stacked model.

    python experiments/benchmarks/stacked.py [--device cuda] [--out FOLDER] ...

Both ways do the same steps in one process, in turns; a case's ratio is the median over the repeats of
seconds one after another / seconds stacked, so above 1 stacking pays. Preparing and measuring the models, which `stack`
leaves as they are, are not part of it. Writes stacked.json and stacked.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from records import described, machine
from torch import nn

from sophon.audit.attacks import Attacker
from sophon.audit.stacked import fine_tune_together
from sophon.domains import Domain, ImageSet
from sophon.files import write_json, write_text
from sophon.finetune import fine_tune
from sophon.models import ModelSpec, build
from sophon.strategies import FineTuneStrategy
from sophon.tasks import ClassificationTask

CLASSES = tuple("abcdefghij")
# as conf/model/resnet_small.yaml and resnet_tiny.yaml
SMALL = {"layers": [1, 1, 1, 1], "channels": [32, 64, 128, 128], "stem_type": "deep", "stem_width": 16}
TINY = {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 64], "stem_type": "deep", "stem_width": 8}
MODELS = {
    "resnet_small": ModelSpec("timm", "resnet18", CLASSES, 3, 32, (0.5,), (0.5,), SMALL),
    "resnet_tiny": ModelSpec("timm", "resnet18", CLASSES, 1, 32, (0.5,), (0.5,), TINY),
    "mlp": ModelSpec("torchvision", "mlp", CLASSES, 3, 32, (0.5,), (0.5,)),
}


def made(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    if name != "mlp":
        return build(MODELS[name])
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 256), nn.ReLU(), nn.Linear(256, len(CLASSES)))


def domain(spec: ModelSpec, device: torch.device) -> Domain:
    images = torch.randint(0, 256, (2000, spec.channels, spec.image_size, spec.image_size), dtype=torch.uint8)
    labels = torch.arange(len(images)) % len(CLASSES)
    return Domain("noise", CLASSES, {"attack": ImageSet(images, labels, CLASSES)}, {}).to(device)


def attackers(name: str, count: int, strategy: FineTuneStrategy, data: Domain, amp: bool) -> list[Attacker]:
    """Make attackers that differ as those of an audit do: in weights, batches and learning rates."""
    spec, device = MODELS[name], data["attack"].images.device
    task = ClassificationTask(spec, amp=amp)
    return [
        Attacker(
            made(name, seed).to(device),
            replace(strategy, lr=strategy.lr * (1 + seed / count)),
            task,
            data,
            spec=spec,
            seed=seed,
            eval_points=2,
        )
        for seed in range(count)
    ]


def one_after_another(ready: Sequence[Attacker]) -> None:
    for each in ready:
        fine_tune(each.model, each.strategy, each.task, each.images, each.generator)


def stacked(ready: Sequence[Attacker]) -> None:
    for each in ready:
        each.after_step = lambda step, loss: None  # type: ignore[method-assign]  # nothing is measured
    fine_tune_together(ready)


def seconds(train: Callable[[Sequence[Attacker]], None], ready: Sequence[Attacker], device: torch.device) -> float:
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    train(ready)
    wait()
    return time.perf_counter() - start


def measure(name: str, count: int, options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device)
    data = domain(MODELS[name], device)
    strategy = FineTuneStrategy(
        optimizer=options.optimizer, lr=0.01, steps=options.steps, batch_size=options.batch_size, head="kept"
    )
    times: dict[str, list[float]] = {"one_after_another": [], "stacked": []}
    for repeat in range(options.repeats + 1):
        for way in (one_after_another, stacked) if repeat % 2 else (stacked, one_after_another):
            taken = seconds(way, attackers(name, count, strategy, data, options.amp), device)
            if repeat:  # the first is not clocked: kernels are chosen and memory is claimed
                times[way.__name__].append(taken / options.steps / count)
    ratios = sorted(one / many for one, many in zip(*times.values(), strict=True))
    return {
        "model": name,
        "attempts": count,
        **{f"{way}_ms": 1000 * statistics.median(each) for way, each in times.items()},
        "ratio": statistics.median(ratios),
        "ratio_range": [ratios[0], ratios[-1]],
    }


def table(result: dict[str, Any]) -> str:
    lines = [f"{described(result['machine'])}; batch {result['batch_size']}, {result['optimizer']}", ""]
    lines += ["| model | attempts | one after another, ms | stacked, ms | ratio |", "|---|---|---|---|---|"]
    for case in result["cases"]:
        low, high = case["ratio_range"]
        times = f"{case['one_after_another_ms']:.2f} | {case['stacked_ms']:.2f}"
        lines.append(f"| {case['model']} | {case['attempts']} | {times} | {case['ratio']:.2f} ({low:.2f}-{high:.2f}) |")
    return "\n".join([*lines, "", "Milliseconds of a step of one attempt; medians, the ratio's range in brackets.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--attempts", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    for name, default in (("steps", 20), ("batch_size", 128), ("repeats", 5)):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--optimizer", default="momentum")
    parser.add_argument("--amp", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--out", type=Path, default=Path())
    options = parser.parse_args()
    cases = [measure(name, count, options) for name in options.models for count in options.attempts]
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "models", "attempts")}
    result = {"machine": machine(torch.device(options.device)), **settings, "cases": cases}
    write_json(options.out / "stacked.json", result)
    write_text(options.out / "stacked.md", table(result))
    print(table(result))


if __name__ == "__main__":
    main()
