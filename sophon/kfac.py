"""K-FAC (Martens and Grosse, 2015) for attackers: an optimizer that no change of coordinates can mislead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class _Step(NamedTuple):
    parameters: list[nn.Parameter]
    gradient: Tensor  # float64 [outputs, all else]
    direction: Tensor


class KFAC(torch.optim.Optimizer):
    """Steps along gradients that are multiplied by inverse second moments, layer by layer.

    A layer's moments are those of its inputs and of its output's gradients (for each image), so that steps are the same
    in whatever coordinates both are. This goes for linear layers and for convolutions that are not grouped; any other
    parameter is divided by the second moment of its own gradient. Moments are exponential averages.

    Args:
        params: what is stepped.
        model: whose they are; hooks stay on it until those in ``hooks`` are removed.
        lr: rate, > 0.
        weight_decay: as an L2 term, >= 0.
        damping: what is added to the moments' diagonals before they are inverted, a part of them, > 0.
        trust: before the rate, a step is shrunk until the Fisher matrix gives it this squared norm at most, > 0.
        momentum: of the steps, >= 0 and < 1.
        memory: of the moments, >= 0 and < 1.
        every: steps between two inversions, >= 1.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        model: nn.Module,
        lr: float = 0.03,
        weight_decay: float = 0.0,
        damping: float = 0.01,
        trust: float = 1e-4,
        momentum: float = 0.9,
        memory: float = 0.95,
        every: int = 10,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self._damping, self._trust, self._momentum, self._memory = damping, trust, momentum, memory
        self._every, self._taken, self._images = every, 0, 1
        owned = set(self.param_groups[0]["params"])
        self._layers = {n: part for n, part in model.named_modules() if _is_plain(part) and part.weight in owned}
        inside = {weight for layer in self._layers.values() for weight in layer.parameters(recurse=False)}
        self._others = [weight for weight in self.param_groups[0]["params"] if weight not in inside]
        self._moments: dict[str, Tensor] = {}
        self._inverses: dict[str, Tensor] = {}
        self._momenta: dict[str, Tensor] = {}
        self.hooks: list[RemovableHandle] = [
            layer.register_forward_hook(lambda layer, given, output, name=name: self._see(name, layer, given, output))
            for name, layer in self._layers.items()
        ]

    def _see(self, name: str, layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:
            return
        self._images = len(output)
        self._follow(f"{name} reads", _read(layer, given[0].detach()))
        output.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: self._follow(f"{name} writes", _columns(layer, gradient) * len(gradient))
        )

    def _follow(self, name: str, columns: Tensor) -> None:
        columns = columns.detach().to(torch.promote_types(columns.dtype, torch.float32))
        self._average(name, (columns @ columns.T).double() / columns.shape[1])

    def _average(self, name: str, moments: Tensor) -> None:
        self._moments[name] = moments.lerp(self._moments.get(name, moments), self._memory)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step at the group's rate; ``trust`` counts at the rate that the optimizer was made with."""
        group, peak = self.param_groups[0], self.defaults["lr"]
        if self._taken % self._every == 0:
            matrices = {name: part for name, part in self._moments.items() if name.endswith((" reads", " writes"))}
            self._inverses = {name: _inverse(part, self._damping) for name, part in matrices.items()}
        self._taken += 1
        steps = dict([*self._layer_steps(), *self._diagonal_steps("other", self._others)])
        norm = sum(float((step.gradient * step.direction).sum()) for step in steps.values()) * peak**2
        shrunk = min(1.0, (self._trust / max(norm, 1e-300)) ** 0.5)
        for name, (parameters, _, direction) in steps.items():
            before = self._momenta.get(name, torch.zeros_like(direction))
            self._momenta[name] = self._momentum * before + shrunk * direction
            change = group["lr"] * self._momenta[name]
            widths = [parameter.numel() // len(change) for parameter in parameters]
            for parameter, part in zip(parameters, change.split(widths, 1), strict=True):
                parameter.sub_(part.reshape(parameter.shape).to(parameter.dtype))

    def _layer_steps(self) -> Iterator[tuple[str, _Step]]:
        for name, layer in self._layers.items():
            parameters = list(layer.parameters(recurse=False))
            if f"{name} writes" not in self._inverses:  # its weights are used without it
                yield from self._diagonal_steps(name, parameters)
                continue
            gradient = torch.cat([self._gradient(weight) for weight in parameters], 1)
            direction = self._inverses[f"{name} writes"] @ gradient @ self._inverses[f"{name} reads"]
            yield name, _Step(parameters, gradient, direction)

    def _diagonal_steps(self, name: str, parameters: Iterable[nn.Parameter]) -> Iterator[tuple[str, _Step]]:
        for place, parameter in enumerate(parameters):
            if parameter.grad is not None:
                key, gradient = f"{name}/{place}", self._gradient(parameter)
                self._average(key, gradient.square())
                yield key, _Step([parameter], gradient, gradient / (self._images * self._moments[key] + 1e-300))

    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        assert parameter.grad is not None
        gradient: Tensor = parameter.grad + self.param_groups[0]["weight_decay"] * parameter
        return gradient.double().reshape(len(parameter) if parameter.ndim else 1, -1)


def _is_plain(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return isinstance(layer, nn.Linear)


def _columns(layer: nn.Module, values: Tensor) -> Tensor:
    """Return [channels, images and places] of what a layer reads or writes."""
    return values.flatten(0, -2).T if isinstance(layer, nn.Linear) else values.transpose(0, 1).flatten(1)


def _read(layer: nn.Module, given: Tensor) -> Tensor:
    """Return what each output of a layer is a product with: [weights of an output, images and places]."""
    if isinstance(layer, nn.Conv2d):
        padding: Any = layer.padding
        given = F.unfold(given, layer.kernel_size, layer.dilation, padding, layer.stride)
    columns = _columns(layer, given)
    return torch.cat([columns, torch.ones_like(columns[:1])]) if layer.bias is not None else columns


def _inverse(moments: Tensor, damping: float) -> Tensor:
    """Invert, scaled to a diagonal of ones, to which ``damping`` is added; places without variance get no step."""
    scale = moments.diagonal().sqrt().reciprocal().nan_to_num(posinf=0.0)
    scaled = moments * scale[:, None] * scale
    unit = torch.eye(len(scaled), dtype=scaled.dtype, device=scaled.device)
    inverse: Tensor = torch.linalg.inv_ex(scaled + damping * unit + (scale == 0).diag()).inverse
    return inverse * scale[:, None] * scale
