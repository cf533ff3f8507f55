"""What the paper's diffusion run would cost: a training step of its U-Net, timed here, times the steps of a run.

Usage: python cost.py > cost.json   (from the repository's root, in the environment that `make demo` makes)
"""

from __future__ import annotations

import json
import platform
import time

import torch
from hydra import compose, initialize_config_dir
from torch.utils.flop_counter import FlopCounterMode

from sophon.cli import conf_dir
from sophon.domains import Batch
from sophon.models import create
from sophon.tasks import DenoisingTask
from sophon.validation import from_omegaconf

BATCHES = (4, 8)
REPEATS = 3


def main() -> None:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = from_omegaconf(compose("config", ["verb=protect", "experiment=paper_diffusion"]))
    classes = tuple(map(str, range(100)))
    torch.manual_seed(0)
    model, spec = create(config.model, classes)
    task = DenoisingTask(spec)
    seconds, flops = {}, {}
    for size in BATCHES:
        images = torch.randint(0, 256, (size, spec.channels, spec.image_size, spec.image_size), dtype=torch.uint8)
        batch = Batch(images, torch.zeros(size, dtype=torch.int64))
        with FlopCounterMode(display=False) as counter:
            task.attacker_loss(model, batch).backward()
        flops[size] = counter.get_total_flops()
        seconds[size] = min(timed(model, task, batch) for _ in range(REPEATS))
    largest = BATCHES[-1]
    per_image = seconds[largest] / largest
    images = images_of_a_run(config)
    result = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds_per_step": seconds,
        "gflop_per_image": flops[largest] / largest / 1e9,
        "gflop_per_second": flops[largest] / seconds[largest] / 1e9,
        "images_of_a_run": images,
        "pflop_of_a_run": images * flops[largest] / largest / 1e15,
        "projected_hours": images * per_image / 3600,
    }
    print(json.dumps(result, indent=2))


def timed(model: torch.nn.Module, task: DenoisingTask, batch: Batch) -> float:
    start = time.perf_counter()
    task.attacker_loss(model, batch).backward()
    return time.perf_counter() - start


def images_of_a_run(config) -> int:
    """Images that pass forward and backward in a whole protection: attackers' steps, queries and NTR."""
    method, sampler = config.method, config.sampler
    steps = sampler.steps[1]
    fts = method.attackers * (steps * max(sampler.batch_sizes) + steps // method.query_every * method.query_batch_size)
    return method.rounds * (method.fts_steps * fts + method.ntr_steps * method.ntr_batch_size)


if __name__ == "__main__":
    main()
