"""What `higher` lacks, and what has moved on since its last release, made good.

higher 0.2.1 has no AdamW, and its Adam adds epsilon before the bias correction, as torch did then; today's torch.optim
corrects first. One class serves both, so that the second-order engine takes the very steps of torch.optim. Its
functional modules cannot be sliced, which diffusers' U-Net blocks do. And its inner loop only goes forward:
`DifferentiableAttacker` can be put back to where it was.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import higher
import torch
from torch import Tensor, nn


class DifferentiableAdam(higher.optim.DifferentiableOptimizer):  # type: ignore[misc]
    """Adam and AdamW as torch.optim computes them (no AMSGrad), out of place.

    A second moment of exactly zero (a weight that never received a gradient) makes the square root's derivative
    infinite; there the step is zero whatever the gradient, so its derivative is set to zero.
    """

    def _update(self, grouped_grads: list[list[Tensor | None]], **kwargs: Any) -> None:
        for index, (group, grads) in enumerate(zip(self.param_groups, grouped_grads, strict=True)):
            for position, (parameter, grad) in enumerate(zip(group["params"], grads, strict=True)):
                if grad is not None:
                    state = self.state[index][position]
                    group["params"][position] = _adam_step(parameter, grad, state, group)


def _adam_step(parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    beta1, beta2 = group["betas"]
    lr, decay = group["lr"], group["weight_decay"]
    if decay and group.get("decoupled_weight_decay", False):
        parameter = parameter * (1 - lr * decay)
    elif decay:
        grad = grad + decay * parameter
    step = state["step"] = state.get("step", 0) + 1
    first = state["exp_avg"] = state.get("exp_avg", torch.zeros_like(grad)) * beta1 + (1 - beta1) * grad
    second = state["exp_avg_sq"] = state.get("exp_avg_sq", torch.zeros_like(grad)) * beta2 + (1 - beta2) * grad * grad
    untouched = second == 0
    root = torch.where(untouched, 1.0, second).sqrt()
    root = torch.where(untouched, 0.0, root)
    corrected = root / (1 - beta2**step) ** 0.5 + group["eps"]
    moved: Tensor = parameter - (lr / (1 - beta1**step)) * first / corrected
    return moved


class Snapshot(NamedTuple):
    """Where an attacker stands between two steps: all that the next ones depend on besides their batches.

    Attributes:
        weights: the trained ones.
        state: what the optimizer remembers of each of them, by its index.
        buffers: the model's.
        generators: the states of torch's global ones, the CPU's and that of the GPU which the model is on.
    """

    weights: list[Tensor]
    state: dict[int, dict[str, Any]]
    buffers: list[Tensor]
    generators: list[Tensor]


class DifferentiableAttacker:
    """An attacker in `innerloop` that takes steps with a graph or without, and can be put back to where it was.

    Its *position* is a list of tensors: the trained weights, then what the optimizer remembers of them. The weights
    that it does not train are the attacker's own parameters throughout.

    Args:
        attacker: all its parameters require gradients; nothing of it is changed.
        optimizer: of one group, over parameters of ``attacker``.
    """

    def __init__(self, attacker: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model: Any
        with innerloop(attacker, optimizer) as (self.model, self._optimizer):
            self.model.track_higher_grads = False  # only the latest weights are asked for
        self._own = dict(attacker.named_parameters())
        places = {parameter: place for place, parameter in enumerate(self._own.values())}
        self._places = [places[parameter] for parameter in optimizer.param_groups[0]["params"]]
        self._device = next(iter(places)).device
        self.begin()

    def parameters(self) -> dict[str, Tensor]:
        """Return all weights by name, as they are: with their graph if they have one."""
        return dict(zip(self._own, self.model.parameters(), strict=True))

    def step(self, loss: Tensor, lr: float, *, graph: bool) -> None:
        """Take one step down ``loss``, which the model has just given; with ``graph``, one to differentiate through."""
        group, weights = self._optimizer.param_groups[0], self._weights()
        # one that the loss does not reach gets None, and is left alone, as by torch.optim
        gradients = torch.autograd.grad(loss, weights, create_graph=graph, allow_unused=True)
        group.update(lr=lr, params=weights)
        with torch.set_grad_enabled(graph):
            self._optimizer._update([gradients])
        moved = group.pop("params")
        self._place(moved if graph else [weight.detach().requires_grad_() for weight in moved])

    @contextmanager
    def apart(self) -> Iterator[dict[str, Tensor]]:
        """Within it, a pass does not reach the steps that led to the weights: it sees leaves, yielded by name."""
        weights = self._weights()
        self._place([weight.detach().requires_grad_() for weight in weights])
        yield self.parameters()
        self._place(weights)

    def position(self) -> list[Tensor]:
        """Return the position's tensors, as they are: with their graph if they have one."""
        values = (value for state in self._optimizer.state[0].values() for value in state.values())
        return [*self._weights(), *(value for value in values if isinstance(value, Tensor))]

    def begin(self) -> list[Tensor]:
        """Let the graph begin here: make the position's tensors leaves that require gradients, and return them."""
        self._place([weight.detach().requires_grad_() for weight in self._weights()])
        self._optimizer.state[0] = _detached(self._optimizer.state[0], requires_grad=True)
        return self.position()

    def save(self) -> Snapshot:
        """Return where the attacker stands, without a graph."""
        # steps are taken out of place: nothing but the buffers needs to be copied
        return Snapshot(
            [weight.detach() for weight in self._weights()],
            _detached(self._optimizer.state[0]),
            [buffer.detach().clone() for buffer in self.model.buffers()],
            [torch.get_rng_state(), *([torch.cuda.get_rng_state(self._device)] if self._device.type == "cuda" else [])],
        )

    def load(self, snapshot: Snapshot) -> None:
        """Put the attacker, and torch's global generators, back to where they were."""
        self._place([weight.detach().requires_grad_() for weight in snapshot.weights])
        self._optimizer.state[0] = _detached(snapshot.state)
        with torch.no_grad():
            for buffer, value in zip(self.model.buffers(), snapshot.buffers, strict=True):
                buffer.copy_(value)
        torch.set_rng_state(snapshot.generators[0])
        for state in snapshot.generators[1:]:
            torch.cuda.set_rng_state(state, self._device)

    def _weights(self) -> list[Tensor]:
        weights = list(self.model.parameters())
        return [weights[place] for place in self._places]

    def _place(self, weights: Sequence[Tensor]) -> None:
        parameters: list[Tensor] = list(self._own.values())
        for place, weight in zip(self._places, weights, strict=True):
            parameters[place] = weight
        self.model.update_params(parameters)


def _detached(state: dict[int, dict[str, Any]], *, requires_grad: bool = False) -> dict[int, dict[str, Any]]:
    copied: dict[int, dict[str, Any]] = defaultdict(dict)
    for index, values in state.items():
        for name, value in values.items():
            copied[index][name] = value.detach().requires_grad_(requires_grad) if isinstance(value, Tensor) else value
    return copied


@contextmanager
def innerloop(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[nn.Module, Any]]:
    """Open `higher`'s inner loop on ``model`` itself, so that gradients reach its own parameters.

    Yields:
        The functional model, and the differentiable optimizer whose ``step(loss)`` updates it. The model's own
        parameters and buffers stay as they are.
    """
    for kind in (torch.optim.Adam, torch.optim.AdamW):
        higher.optim._opt_mapping[kind] = DifferentiableAdam
    with warnings.catch_warnings():
        # higher doubts its RMSprop; the tests hold it against finite differences, as they do every optimizer
        warnings.filterwarnings("ignore", message="Differentiable RMSprop")
        with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as loop:
            _allow_slices(loop[0])
            _count_in_numbers(loop[1])
            yield loop


def _count_in_numbers(optimizer: Any) -> None:
    """Make step counts that torch.optim keeps as tensors numbers.

    They are float32 whatever the weights are, and would round the learning rate to it; and they count in place.
    """
    for group in optimizer.state:
        for state in group.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].item()


def _allow_slices(functional: nn.Module) -> None:
    """Let the module lists of `higher`'s functional model be sliced; a slice is a plain list of its modules.

    nn.ModuleList makes a slice by calling its own class, but the class of a functional module is built with other
    arguments. higher makes each functional module a class of its own, so setting a method there changes nothing else.
    """
    for module in functional.modules():
        if isinstance(module, nn.ModuleList):
            type(module).__getitem__ = _item  # type: ignore[method-assign, assignment]


def _item(modules: nn.ModuleList, index: int | slice) -> nn.Module | list[nn.Module]:
    return list(modules)[index]
