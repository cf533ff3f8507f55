"""An attacker who preconditions: does an optimizer that no change of coordinates can mislead get through?

    python experiments/strength/preconditioned.py --reference runs/bench_c/seed0/pretrain --optimizer kfac \
        --checkpoints runs/strength/coordinates/seed0/protect runs/strength/coordinates/seed1/protect

`kfac` (Martens and Grosse, 2015): a layer's gradient is multiplied by the inverse second moments of its inputs and of
its output's gradients, so that steps are the same in whatever coordinates a layer's inputs and outputs are. All
damping is relative to the moments' diagonals. `muon` (torch's own): a layer's momentum is made orthogonal, so that it
goes as far in every direction of the matrix; that does depend on coordinates. Neither knows of the protection. The
released head is kept, rates fall to zero, batches are of 64, and BatchNorm's statistics are estimated anew at the end.
Printed are accuracies on the attacker's `select` split, for choosing a setting, and on `test`.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from growth import add_attack_options, restricted_domain
from normalised_head import restate
from torch import Tensor, nn

from sophon.domains import Batch, LoadedDomain, batches
from sophon.errors import UserError
from sophon.export import read_checkpoint
from sophon.seeds import seed_all
from sophon.tasks import ClassificationTask

STEPS, BATCH = 200, 64
SETTINGS = {
    # rate, relative damping, and bound of the squared norm that the Fisher matrix gives a step
    "kfac": [(0.1, 0.01, 1e-4), (0.1, 0.01, 1e-5), (0.03, 0.1, 1e-4), (0.03, 0.1, 1e-5)],
    # rate, and that of Adam for what is no matrix
    "muon": [(lr, other) for lr in (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.03, 0.1) for other in (0.0, 1e-3)],
}
MEMORY, MOMENTUM, EVERY = 0.95, 0.9, 10  # of the moments, of the steps, and steps between inversions


class KFAC:
    """Steps of a model's parameters by K-FAC; normalisation's own parameters by their squared gradients.

    Args:
        model: of ungrouped convolutions, linear layers and normalisation; hooks stay on it.
        lr: rate.
        damping: what is added to the moments' diagonals, a part of them, > 0.
        trust: a step is shrunk to this squared norm at most, before the rate.
    """

    def __init__(self, model: nn.Module, lr: float, damping: float, trust: float) -> None:
        self._model, self._lr, self._damping, self._trust = model, lr, damping, trust
        self._layers = {n: part for n, part in model.named_modules() if isinstance(part, nn.Conv2d | nn.Linear)}
        self._moments: dict[str, Tensor] = {}
        self._inverses: dict[str, Tensor] = {}
        self._momenta: dict[str, Tensor] = {}
        self._taken = 0
        for name, layer in self._layers.items():
            layer.register_forward_hook(lambda layer, given, output, name=name: self._see(name, layer, given, output))

    def _see(self, name: str, layer: nn.Module, given: tuple[Tensor], output: Tensor) -> None:
        if output.requires_grad:
            self._follow(f"{name} reads", _read(layer, given[0].detach()))
            output.register_hook(lambda gradient: self._follow(f"{name} writes", _columns(gradient) * len(gradient)))

    def _follow(self, name: str, columns: Tensor) -> None:
        found = columns.double() @ columns.double().T / columns.shape[1]
        self._moments[name] = found.lerp(self._moments.get(name, found), MEMORY)

    @torch.no_grad()
    def step(self, share: float) -> None:
        """Take a step with ``share`` of the rate."""
        if self._taken % EVERY == 0:
            self._inverses = {name: _inverse(found, self._damping) for name, found in self._moments.items()}
        self._taken += 1
        steps = [*(self._layer_step(name, layer) for name, layer in self._layers.items()), *self._other_steps()]
        norm = sum(float((gradient * step).sum()) for _, _, gradient, step in steps) * self._lr**2
        shrunk = min(1.0, (self._trust / max(norm, 1e-300)) ** 0.5)
        for name, parameters, _, step in steps:
            self._momenta[name] = MOMENTUM * self._momenta.get(name, torch.zeros_like(step)) + shrunk * step
            change, start = share * self._lr * self._momenta[name], 0
            for parameter in parameters:
                width = parameter[0].numel()
                parameter.sub_(change[:, start : start + width].reshape(parameter.shape).to(parameter.dtype))
                start += width

    def _layer_step(self, name: str, layer: nn.Module) -> tuple[str, list[nn.Parameter], Tensor, Tensor]:
        parameters = [each for each in (layer.weight, layer.bias) if isinstance(each, nn.Parameter)]
        gradient = torch.cat([_gradient(each) for each in parameters], 1)
        step = self._inverses[f"{name} writes"] @ gradient @ self._inverses[f"{name} reads"]
        return name, parameters, gradient, step

    def _other_steps(self) -> Iterator[tuple[str, list[nn.Parameter], Tensor, Tensor]]:
        mine = {id(each) for layer in self._layers.values() for each in layer.parameters()}
        for name, parameter in self._model.named_parameters():
            if id(parameter) not in mine:
                gradient = _gradient(parameter)
                found = gradient.square()
                self._moments[name] = found.lerp(self._moments.get(name, found), MEMORY)
                yield name, [parameter], gradient, gradient / (BATCH * self._moments[name] + 1e-300)


class Muon:
    """Steps of a model's parameters: torch's Muon for the weights of its layers, Adam for all else.

    Args:
        model: of convolutions, whose filters are rows of a matrix, linear layers and normalisation.
        lr: Muon's rate.
        other: Adam's.
    """

    def __init__(self, model: nn.Module, lr: float, other: float) -> None:
        weights = [part.weight for part in model.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
        # copies, for filters may lie in memory as channels_last, where a matrix of them is no view
        self._matrices = [(weight, nn.Parameter(weight.detach().flatten(1).clone())) for weight in weights]
        mine = {id(weight) for weight in weights}
        rest = [each for each in model.parameters() if id(each) not in mine]
        self._optimizers: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.Muon([matrix for _, matrix in self._matrices], weight_decay=0.0), lr),
            (torch.optim.Adam(rest), other),
        ]

    def step(self, share: float) -> None:
        """Take a step with ``share`` of the rates."""
        for weight, matrix in self._matrices:
            assert weight.grad is not None
            matrix.grad = weight.grad.flatten(1)
        for optimizer, lr in self._optimizers:
            optimizer.param_groups[0]["lr"] = share * lr
            optimizer.step()
        with torch.no_grad():
            for weight, matrix in self._matrices:
                weight.copy_(matrix.view(weight.shape))


OPTIMIZERS: dict[str, type[KFAC] | type[Muon]] = {"kfac": KFAC, "muon": Muon}


def _gradient(parameter: nn.Parameter) -> Tensor:
    """Return it as float64, [outputs, all else]."""
    assert parameter.grad is not None
    return parameter.grad.double().reshape(len(parameter), -1)


def _columns(values: Tensor) -> Tensor:
    """Return [channels, images and places] of [images, channels, ...]."""
    return values.transpose(0, 1).flatten(1)


def _read(layer: nn.Module, given: Tensor) -> Tensor:
    """Return what each output of a layer is a product with: [weights of an output, images and places]."""
    if isinstance(layer, nn.Conv2d):
        padding: Any = layer.padding
        given = F.unfold(given, layer.kernel_size, layer.dilation, padding, layer.stride)
    found = _columns(given)
    return torch.cat([found, torch.ones_like(found[:1])]) if layer.bias is not None else found


def _inverse(moments: Tensor, damping: float) -> Tensor:
    """Invert, scaled to a diagonal of ones, to which ``damping`` is added; places without variance get no step."""
    scale = moments.diagonal().sqrt().reciprocal().nan_to_num(posinf=0.0)
    scaled = moments * scale[:, None] * scale
    unit = torch.eye(len(scaled), dtype=scaled.dtype)
    return torch.linalg.inv(scaled + damping * unit + (scale == 0).diag()) * scale[:, None] * scale


def attacked(
    model: nn.Module,
    task: ClassificationTask,
    domain: LoadedDomain,
    optimizer: str,
    setting: tuple[float, ...],
    seed: int,
) -> tuple[float, float]:
    """Fine-tune a copy with one of `OPTIMIZERS`, made with ``setting``; return accuracy on select and on test."""
    seed_all(seed)
    model = copy.deepcopy(model)
    task.start_head(model, "kept", domain.classes)
    stream: Iterator[Batch] = batches(domain["attack"], BATCH, torch.Generator().manual_seed(seed))
    stepper = OPTIMIZERS[optimizer](model, *setting)
    model.train()
    for step in range(STEPS):
        loss = task.attacker_loss(model, next(stream))
        if not loss.isfinite():
            break
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        stepper.step(1 - step / STEPS)
    restate(model, task, stream)
    return task.evaluate(model, domain["select"]), task.evaluate(model, domain["test"])


def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    reference = read_checkpoint(options.reference, "--reference")
    domain, task = restricted_domain(options.restricted, reference.spec), ClassificationTask(reference.spec)
    models = {"unprotected": reference.model}
    models |= {str(path): read_checkpoint(path, "--checkpoints").model for path in options.checkpoints}
    names = " | ".join(list(inspect.signature(OPTIMIZERS[options.optimizer]).parameters)[1:])
    print(f"| weights | {names} | select | test |\n|{'---|' * (names.count('|') + 4)}")
    for name, model in models.items():
        for setting in SETTINGS[options.optimizer]:
            select, test = attacked(model, task, domain, options.optimizer, setting, options.seed)
            print(f"| {name} | {' | '.join(f'{each:g}' for each in setting)} | {select:.1f} | {test:.1f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_attack_options(parser)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="kfac")
    parser.add_argument("--checkpoints", type=Path, nargs="+", default=[], help="protected ones, or their run_dirs")
    try:
        main(parser.parse_args())
    except UserError as error:
        sys.exit(f"preconditioned: {error}")
