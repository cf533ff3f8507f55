"""What is measured on: models with random weights, random images, and the sizes of a round."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
from formulas import Model
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sophon.config import ModelConfig
from sophon.domains import Batch
from sophon.models import ModelSpec, create
from sophon.tasks import TASKS, Task, kind_of

CONF = Path(__file__).parents[2] / "conf" / "model"
CLASSES = tuple("0123456789")
SUPPRESSION = {"classification": "ice", "denoising": "dos"}
DISTINCT = 4  # batches where memory is measured: streams repeat them, so that more steps take no more of it


@dataclass(frozen=True)
class Case:
    """Sizes of a simulation.

    Attributes:
        model: a file of conf/model.
        adapt: images of an attacker's step.
        query: images of a query.
        steps: the K to measure.
    """

    model: str
    adapt: int
    query: int
    steps: tuple[int, ...] = (1, 5, 20, 50, 200)


CASES = {
    "resnet_small": Case("resnet_small", 128, 128),
    "resnet18": Case("resnet18", 16, 16),
    "unet32_small": Case("unet32_small", 16, 16),
    "resnet18_150": Case("resnet18", 150, 150, (50,)),
    "resnet18_130_20": Case("resnet18", 130, 20, (50,)),  # SOPHON's public code cuts its batch of 150 so
}


@dataclass(frozen=True)
class Bench:
    """A case made: its model and task, and the batches that were drawn."""

    model: nn.Module
    task: Task
    adapt: list[Batch]
    query: list[Batch]

    def streams(self) -> tuple[Iterator[Batch], Iterator[Batch]]:
        """Return the attacker's and the defender's batches from the first on."""
        return cycle(self.adapt), cycle(self.query)


def make_model(name: str, device: torch.device, *, amp: bool = False) -> tuple[nn.Module, ModelSpec, Task]:
    """Build a model of conf/model with random weights (seed 0), and the task that protects it."""
    settings = OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(CONF / f"{name}.yaml"))
    config = OmegaConf.to_object(settings)
    assert isinstance(config, ModelConfig)
    torch.manual_seed(0)
    model, spec = create(config, CLASSES)
    kind = kind_of(spec)
    return model.to(device), spec, TASKS[kind](spec, suppression_loss=SUPPRESSION[kind], amp=amp)


def random_batch(spec: ModelSpec, count: int, generator: torch.Generator, device: torch.device) -> Batch:
    """Draw uint8 images and labels."""
    shape = (count, spec.channels, spec.image_size, spec.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, len(CLASSES), (count,), generator=generator)
    return Batch(images.to(device), labels.to(device))


def make(case: Case, device: torch.device, distinct: int = DISTINCT, query_seed: int = 2) -> Bench:
    """Build a case with so many different batches of either kind; the same on every call."""
    model, spec, task = make_model(case.model, device)

    def batches(count: int, seed: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(seed)
        return [random_batch(spec, count, generator, device) for _ in range(distinct)]

    return Bench(model, task, batches(case.adapt, 1), batches(case.query, query_seed))


def facts(bench: Bench) -> Model:
    """Measure a model's sizes on a few images: FLOPs, parameters, and the bytes that graphs keep of an image."""
    bench.task.train_mode(bench.model, "all")
    kept, graph = zip(*(_kept(bench, count) for count in (2, 4)), strict=True)
    return Model(
        flops=forward_flops(bench.model, bench.task, _few(bench, 2)),
        parameters=sum(parameter.numel() for parameter in bench.model.parameters()),
        # the difference, so that what does not grow with the batch is left out
        activations=(kept[1] - kept[0]) / 2,
        graph=(graph[1] - graph[0]) / 2,
    )


def forward_flops(model: nn.Module, task: Task, batch: Batch) -> float:
    """Count the FLOPs of one image's forward pass; convolutions and matrix products only.

    The backward pass is not counted but taken as twice that: torch's counter takes the weights' gradient of a grouped
    convolution for that of a dense one.
    """
    # as matrix products: the counter does not know the CPU's fused attention
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        task.attacker_loss(model, batch)
    return float(counter.get_total_flops()) / len(batch.labels)


def _few(bench: Bench, count: int) -> Batch:
    batch = bench.adapt[0]
    rows = torch.arange(count, device=batch.labels.device) % len(batch.labels)
    return Batch(batch.images[rows], batch.labels[rows])


def _kept(bench: Bench, count: int) -> tuple[int, int]:
    """Bytes that ``count`` images' forward pass keeps for backward, and that forward and backward keep for another."""
    parameters = list(bench.model.parameters())
    own = {tensor.untyped_storage().data_ptr() for tensor in [*parameters, *bench.model.buffers()]}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    def total() -> int:
        return sum(storage.nbytes() for storage in storages.values())

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = bench.task.attacker_loss(bench.model, _few(bench, count))
        forward = total()
    storages.clear()
    # flash attention has no second derivative
    with sdpa_kernel(SDPBackend.MATH), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = bench.task.attacker_loss(bench.model, _few(bench, count))
        torch.autograd.grad(loss, parameters, create_graph=True)
        return forward, total()
