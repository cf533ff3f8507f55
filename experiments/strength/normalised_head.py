"""An attacker who normalises what its head reads: is the lock of `method=coordinates` just the size of features?

    python experiments/strength/normalised_head.py --reference runs/bench_c/seed0/pretrain \
        --weights runs/gains/1000.safetensors runs/gains/30.safetensors

A fresh linear layer behind a fresh BatchNorm takes the head's place. Printed are the training loss at the start and at
the end, and test accuracy with the statistics that training left behind, and with statistics estimated anew.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from growth import add_attack_options, restricted_domain
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sophon.attacker import FineTuneStrategy
from sophon.domains import Batch, LoadedDomain, batches
from sophon.errors import UserError
from sophon.export import read_checkpoint
from sophon.models import adapter_of, build
from sophon.optimizers import build_optimizer
from sophon.seeds import seed_all
from sophon.tasks import ClassificationTask

ATTACKS = [
    *(("adam", rate) for rate in (1e-3, 1e-4, 1e-5)),
    *(("rmsprop", rate) for rate in (1e-3, 1e-4)),
    *(("momentum", rate) for rate in (1e-2, 1e-4)),
]
STEPS, BATCH, BATCHES = 200, 32, 20


def attacked(
    model: nn.Module, task: ClassificationTask, domain: LoadedDomain, optimizer: str, lr: float, seed: int
) -> tuple[float, float, float, float]:
    """Fine-tune a copy; return the loss of the first and of the last 20 steps, and accuracy as trained and restated."""
    seed_all(seed)
    model = copy.deepcopy(model)
    width: Any = model.fc.in_features  # type: ignore[union-attr]
    model.fc = nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, len(domain.classes)))
    stepper = build_optimizer(FineTuneStrategy(optimizer=optimizer, lr=lr), list(model.parameters()))
    stream = batches(domain["attack"], BATCH, torch.Generator().manual_seed(seed))
    model.train()
    losses = []
    for _ in range(STEPS):
        loss = task.attacker_loss(model, next(stream))
        stepper.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        stepper.step()
        losses.append(loss.item())
    before = task.evaluate(model, domain["test"])
    restate(model, task, stream)
    return mean(losses[:20]), mean(losses[-20:]), before, task.evaluate(model, domain["test"])


@torch.no_grad()
def restate(model: nn.Module, task: ClassificationTask, stream: Iterator[Batch]) -> None:
    """Estimate every running statistic anew; the audit's own operation needs a head that is one layer."""
    for norm in (part for part in model.modules() if isinstance(part, _BatchNorm)):
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    for _ in range(BATCHES):
        task.logits(model, next(stream).images)


def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    reference = read_checkpoint(options.reference, "--reference")
    domain, task = restricted_domain(options.restricted, reference.spec), ClassificationTask(reference.spec)
    models = {"unprotected": reference.model}
    for path in options.weights:
        models[path.stem] = build(reference.spec)
        adapter_of(reference.spec).load_weights(models[path.stem], path, key="--weights")
    print("| weights | attack | loss, first | last 20 steps | accuracy | restated |\n|---|---|---|---|---|---|")
    for name, model in models.items():
        for optimizer, lr in ATTACKS:
            first, last, *found = attacked(model, task, domain, optimizer, lr, options.seed)
            values = " | ".join(f"{value:.1f}" for value in found)
            print(f"| {name} | {optimizer} {lr:g} | {first:.2f} | {last:.2f} | {values} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_attack_options(parser)
    parser.add_argument("--weights", type=Path, nargs="+", default=[], help="state dicts of the same architecture")
    try:
        main(parser.parse_args())
    except UserError as error:
        sys.exit(f"normalised_head: {error}")
