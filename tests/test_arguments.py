"""Operations as a configuration names them: which functions and arguments are taken, and what a refusal says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
from torch import nn

from sophon import surgery
from sophon.attacker import Operation
from sophon.errors import UserError
from sophon.surgery.attacker_means import Means
from tests.surgery.surgical import means_for
from tests.tiny import tiny_model

if TYPE_CHECKING:
    from nowhere import Something


def halve(model: nn.Module, means: Means, *, factor: float = 0.5, label: str | None = None) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


def needy(model: nn.Module, means: Means, count: int, *, flag: bool = False, mode: Literal["x", 2] = "x") -> nn.Module:
    return model


def loose(model: nn.Module, means: Means, *, plain=1, **rest: Any) -> nn.Module:  # type: ignore[no-untyped-def]
    return model


def forgetful(model: nn.Module, means: Means) -> None:
    return None


def lonely(model: nn.Module, *, scale: float = 1.0) -> nn.Module:
    return model


def obscure(model: nn.Module, means: Means, *, thing: Something = None) -> nn.Module:
    return model


HERE = __name__


def test_a_users_function_by_its_dotted_path() -> None:
    operation = Operation(f"{HERE}.halve", (("factor", 0.25),))
    surgery.check([operation], "surgery")
    model, expected = surgery.operate(tiny_model(), [operation], means_for()), tiny_model()
    for name, parameter in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), 0.25 * parameter)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("halve", {}),
        ("halve", {"factor": 2, "label": "word"}),
        ("halve", {"label": None}),
        ("needy", {"count": 3, "flag": True, "mode": 2}),
        ("loose", {"plain": "anything", "other": 1.5}),
        ("forgetful", {}),
    ],
)
def test_arguments_that_a_users_function_takes(name: str, arguments: dict[str, Any]) -> None:
    surgery.check([Operation(f"{HERE}.{name}", tuple(arguments.items()))], "surgery")


# --- refusals -------------------------------------------------------------------------------------------------------

NAMES = (
    "reinitialise, noise, prune, shrink_perturb, interpolate, restate, reset_affine, renormalise, centre, equalise, "
    "heal, distil"
)
OPTIMIZERS = "sgd, momentum, nesterov, adam, adamw, adagrad, adadelta, rmsprop, kfac, muon"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("nois", {}, f"operation: 'nois' is not known; allowed: {NAMES}, or a function's dotted path"),
        ("noise", {"size": 1}, "size: 'noise' has no such argument; allowed: scale"),
        ("reset_affine", {"scale": 1}, "scale: 'reset_affine' has no such argument; allowed: none"),
        ("heal", {"step": 1}, "step: 'heal' has no such argument; allowed: batch_size, domain, lr, optimizer, steps"),
        ("noise", {"scale": -0.1}, "scale: -0.1 is not allowed; it must be a finite number >= 0"),
        ("noise", {"scale": float("nan")}, "scale: nan is not allowed; it must be a finite number >= 0"),
        ("noise", {"scale": True}, "scale: True is not allowed; it must be a finite number >= 0"),
        ("prune", {"fraction": 0}, "fraction: 0 is not allowed; it must be a number > 0 and < 1"),
        ("shrink_perturb", {"keep": 1.1}, "keep: 1.1 is not allowed; it must be a number >= 0 and <= 1"),
        ("reinitialise", {"blocks": 0}, "blocks: 0 is not allowed; it must be a whole number >= 1"),
        ("reinitialise", {"blocks": 1.0}, "blocks: 1.0 is not allowed; it must be a whole number >= 1"),
        ("reinitialise", {"end": "middle"}, "end: middle is not allowed; it must be first or last"),
        ("heal", {"optimizer": "lion"}, f"optimizer: lion is not allowed; it must be one of {OPTIMIZERS}"),
        ("heal", {"batch_size": "8"}, "batch_size: 8 is not allowed; it must be a whole number >= 1"),
        (f"{HERE}.halve", {"label": 3}, "label: 3 is not allowed; it must be a word or null"),
        (f"{HERE}.needy", {}, f"count: missing; '{HERE}.needy' needs it; it must be a whole number"),
        (f"{HERE}.needy", {"count": 1, "flag": 1}, "flag: 1 is not allowed; it must be true or false"),
        (f"{HERE}.needy", {"count": 1, "mode": "y"}, "mode: y is not allowed; it must be x or 2"),
        (f"{HERE}.loose", {"means": 1}, f"means: '{HERE}.loose' has no such argument; allowed: plain"),
        (f"{HERE}.absent", {}, f"operation: '{HERE}.absent' is not allowed; {HERE} has no function 'absent'"),
        (
            "no.such.thing",
            {},
            "operation: 'no.such.thing' cannot be imported: No module named 'no'; give its folder as PYTHONPATH",
        ),
        (
            "..a.b",
            {},
            "operation: '..a.b' cannot be imported: the 'package' argument is required to perform a relative import "
            "for '..a'",
        ),
    ],
)
def test_what_is_refused(name: str, arguments: dict[str, Any], message: str) -> None:
    operations = [Operation("reset_affine"), Operation(name, tuple(arguments.items()))]
    with pytest.raises(UserError) as caught:
        surgery.check(operations, "attack.strategies.mine.surgery")
    assert str(caught.value) == f"attack.strategies.mine.surgery[1].{message}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lonely", f"'{HERE}.lonely' is not allowed; it must be a function of (model, means, ...)"),
        ("obscure", f"the arguments of '{HERE}.obscure' cannot be read: name 'Something' is not defined"),
    ],
)
def test_functions_of_another_form(name: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        surgery.check([Operation(f"{HERE}.{name}")], "surgery")
    assert str(caught.value) == f"surgery[0]: {message}"


def test_a_module_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "failing_surgery.py").write_text("raise RuntimeError('two\\nlines')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    line = r"^surgery\[0\]\.operation: '\S+' cannot be imported: two lines \(\S+/failing_surgery\.py, line 1\)$"
    with pytest.raises(UserError, match=line):
        surgery.check([Operation("failing_surgery.cut")], "surgery")
