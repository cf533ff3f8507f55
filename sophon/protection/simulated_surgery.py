"""Simulated attackers that change the released weights first, and the factors that first-order FTS then needs.

Surgery makes an attacker's start a function of the released weights. First-order FTS takes what the attacker adds from
there on as a constant, so that the meta-gradient is the sum of the query gradients times d start / d released weight.
Of this only the direct part is followed, elementwise: what an operation adds, and the norm that it divides by, are
constants as well. Through a norm no gradient of a scale-free layer passes anyway: it is at right angles to the weight.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from sophon.attacker import Operation
from sophon.errors import UserError
from sophon.surgery import OPERATIONS, Means, check, operate
from sophon.surgery.centre import centre_channels
from sophon.surgery.equalise import equalise_channels
from sophon.surgery.operations import affine, pruned, reinitialised
from sophon.surgery.renormalise import rescale_to_fresh

# By parameter: d start / d released weight, elementwise, of a shape that broadcasts to the parameter's; 1 if missing.
Factors = dict[str, Tensor | float]


def start(attacker: nn.Module, operations: Sequence[Operation], means: Means) -> Factors:
    """Apply operations, in place, and tell how the start that they make follows the released weights.

    Args:
        attacker: scratch copy of the released model; it ends as the attacker's start, its buffers too.
        operations: in their order; `check_simulated` has let them pass.
        means: what the attacker has at hand. What is drawn comes from torch's global generator and from that of these.

    Returns:
        By parameter name, what the gradient at the start is to be multiplied with: 0 for a weight that was replaced or
        pruned, its scale for one that was scaled, and 1, or nothing, for one that something was added to.

    Raises:
        UserError: an operation cannot be done: the model has too few blocks, or the head does not fit a domain.
    """
    total: Factors = {}
    for operation in operations:
        factors = _SIMULATED[operation.name](attacker, means, operation)
        for name, factor in factors.items():
            total[name] = total.get(name, 1.0) * factor
    return total


def check_simulated(operations: Sequence[Operation], where: str) -> None:
    """Check operations of a sampler.

    Raises:
        UserError: an operation is a user's own or not known, has arguments that it does not take, or leaves a head that
            is not the released one's size.
    """
    for index, operation in enumerate(operations):
        if operation.name not in _SIMULATED:
            allowed = ", ".join(_SIMULATED)
            raise UserError(f"{where}[{index}].operation: '{operation.name}' is not simulated; allowed: {allowed}")
    check(operations, where)
    for index, operation in enumerate(operations):
        if dict(operation.arguments).get("domain") == "benign":
            raise UserError(
                f"{where}[{index}].domain: 'benign' is not simulated, since it leaves another head; allowed: original"
            )


def _arguments(operation: Operation) -> dict[str, Any]:
    """Return the arguments that an operation is applied with, its defaults among them."""
    parameters = inspect.signature(OPERATIONS[operation.name]).parameters.values()
    defaults = {part.name: part.default for part in parameters if part.kind is inspect.Parameter.KEYWORD_ONLY}
    return defaults | dict(operation.arguments)


def _adds(attacker: nn.Module, means: Means, operation: Operation) -> Factors:
    operate(attacker, [operation], means)
    return {}


def _shrinks(attacker: nn.Module, means: Means, operation: Operation) -> Factors:
    operate(attacker, [operation], means)
    return dict.fromkeys(_names(attacker), _arguments(operation)["keep"])


def _prunes(attacker: nn.Module, means: Means, operation: Operation) -> Factors:
    masks = pruned(attacker, _arguments(operation)["fraction"])
    operate(attacker, [operation], means)
    return {name: (~mask).to(attacker.get_parameter(name).dtype) for name, mask in masks.items()}


def _replaces(
    names: Callable[[nn.Module, Means, Operation], Iterable[str]],
) -> Callable[[nn.Module, Means, Operation], Factors]:
    def replace(attacker: nn.Module, means: Means, operation: Operation) -> Factors:
        replaced = set(names(attacker, means, operation)) & set(_names(attacker))
        result = operate(attacker, [operation], means)
        if result is not attacker:
            attacker.load_state_dict(result.state_dict())
        return dict.fromkeys(replaced, 0.0)

    return replace


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


_SIMULATED: dict[str, Callable[[nn.Module, Means, Operation], Factors]] = {
    "reinitialise": _replaces(lambda model, means, operation: reinitialised(model, means, **_arguments(operation))),
    "noise": _adds,
    "prune": _prunes,
    "shrink_perturb": _shrinks,
    "restate": _adds,
    "reset_affine": _replaces(lambda model, means, operation: affine(model)),
    "renormalise": lambda model, means, operation: dict(rescale_to_fresh(model, means, **_arguments(operation))),
    "centre": lambda model, means, operation: centre_channels(model, means, **_arguments(operation)),
    "equalise": lambda model, means, operation: dict(equalise_channels(model)),
    "heal": _adds,
    "distil": _replaces(lambda model, means, operation: _names(model)),
}
