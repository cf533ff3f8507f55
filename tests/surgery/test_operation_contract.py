"""What every operation of surgery promises, whatever it does, on each kind of model."""

from __future__ import annotations

import copy
import inspect
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sophon.attacker import Operation
from sophon.domains import LoadedDomain
from sophon.errors import UserError
from sophon.surgery import operations as surgery
from sophon.surgery.attacker_means import Means
from tests.surgery.surgical import WIDE, changed, means_for, resnet, unet, wide, wide_domain
from tests.tiny import CLASSES, assert_same_state, slow, state_of, tiny_domain, tiny_images, tiny_model

SETTINGS: dict[str, list[dict[str, Any]]] = {
    "reinitialise": [{}, {"end": "first"}],
    "noise": [{"scale": 0.1}],
    "prune": [{"fraction": 0.3}],
    "shrink_perturb": [{"keep": 0.7}],
    "interpolate": [{"keep": 0.7}],
    "restate": [{"batches": 2}],
    "reset_affine": [{}],
    "renormalise": [{}, {"per": "channel"}],
    "centre": [{}],
    "equalise": [{}],
    "heal": [{"steps": 2, "batch_size": 4}, {"steps": 2, "batch_size": 4, "domain": "benign"}],
    "distil": [{"steps": 2}],
}
OPERATIONS = [Operation(name, tuple(sorted(each.items()))) for name, each_of in SETTINGS.items() for each in each_of]
BENIGN = Operation("heal", (("batch_size", 4), ("domain", "benign"), ("steps", 2)))
DRAWING = {
    each for each in OPERATIONS if each.name in ("reinitialise", "noise", "shrink_perturb", "renormalise", "distil")
} | {BENIGN}
SAME_FUNCTION = ("renormalise", "equalise")
RUNNING = ("restate", "heal", "distil")  # the network, so that they cost something


def with_relative(model: nn.Module, means: Means) -> tuple[nn.Module, Means]:
    """Give the attacker a model of the same form, whose weights are half as large."""
    means.relative = copy.deepcopy(model)
    for parameter in means.relative.parameters():
        parameter.data.mul_(0.5)
    return model, means


def classifier() -> tuple[nn.Module, Means]:
    domains = {"original": tiny_domain("original", ("train",)), "benign": wide_domain("attack")}
    return with_relative(tiny_model(), means_for(**domains))


def small_resnet() -> tuple[nn.Module, Means]:
    model, means = resnet()
    means.original = LoadedDomain("original", CLASSES, {"train": means.images}, {})
    means.benign = LoadedDomain("benign", WIDE, {"attack": wide(means.images)}, {})
    return with_relative(model, means)


def denoiser(*, conditional: bool = False) -> tuple[nn.Module, Means]:
    model, means = unet(conditional=conditional)
    means.original, means.benign = tiny_domain("original", ("train",)), wide_domain("attack")
    return with_relative(model, means)


MODELS = {
    "classifier": classifier,
    "resnet": small_resnet,
    "denoiser": denoiser,
    "conditional denoiser": lambda: denoiser(conditional=True),
}
everywhere = pytest.mark.parametrize("kind", slow(MODELS, ("resnet", "conditional denoiser")))
every_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda each: f"{each.name}{each.arguments}")


def operated(operations: list[Operation], kind: str = "classifier", seed: int = 0) -> nn.Module:
    model, means = MODELS[kind]()
    torch.manual_seed(seed)
    return surgery.operate(model, operations, means)


def test_every_operation_is_in_the_table_and_its_defaults_are_allowed() -> None:
    assert set(SETTINGS) == set(surgery.OPERATIONS)
    for name, function in surgery.OPERATIONS.items():
        arguments = list(inspect.signature(function).parameters.values())[2:]
        assert all(argument.kind is inspect.Parameter.KEYWORD_ONLY for argument in arguments)
        surgery.check([Operation(name, tuple((each.name, each.default) for each in arguments))], "surgery")


@everywhere
@every_operation
def test_the_network_keeps_its_form_the_bits_repeat_and_nothing_else_changes(operation: Operation, kind: str) -> None:
    """Neither what the attacker has at hand, nor generators that are not its own, nor torch's settings."""
    model, means = MODELS[kind]()
    held = [means.images, means.original["train"], means.benign["attack"]]

    def around() -> tuple[Any, ...]:
        generators = random.getstate(), np.random.get_state()[1].tolist()
        return *generators, torch.is_grad_enabled(), torch.get_default_dtype(), [each.sha256() for each in held]

    before, released, head = around(), state_of(model), set(means.task.head_names(model))
    torch.manual_seed(0)
    result = surgery.operate(model, [operation], means)
    assert around() == before
    state = state_of(result)
    assert state.keys() == released.keys()
    for name in state.keys() - (head if operation == BENIGN else set()):
        assert (state[name].shape, state[name].dtype) == (released[name].shape, released[name].dtype), name
    assert all(value.isfinite().all() for value in state.values())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in result.modules())
    # what comes next trains it
    images = means.relabelled(means.images, result)
    means.task.attacker_loss(result.requires_grad_(True).train(), images.first(4)).backward()
    assert_same_state(operated([operation], kind), state)
    if kind == "classifier":
        assert bool(changed(operated([operation], kind, seed=1), state)) == (operation in DRAWING)


def test_interpolating_goes_towards_the_relative_but_for_the_head() -> None:
    model, means = classifier()
    released, head = state_of(model), means.task.head_names(model)
    result = surgery.operate(model, [Operation("interpolate", (("keep", 0.2),))], means)
    for name, parameter in result.named_parameters():  # 0.2 + 0.8 * 0.5
        torch.testing.assert_close(parameter.data, released[name] * (1 if name in head else 0.6))
    means.relative = None
    with pytest.raises(UserError, match=r"interpolate needs a public relative; set attack\.relative"):
        surgery.operate(model, [Operation("interpolate")], means)


@everywhere
@pytest.mark.parametrize("operation", [each for each in OPERATIONS if each.name in SAME_FUNCTION], ids=str)
def test_the_function_stays(operation: Operation, kind: str) -> None:
    model, means = MODELS[kind]()
    released, batch = copy.deepcopy(model).eval(), means.images.first(8)
    result = surgery.operate(model, [operation], means).eval()
    torch.manual_seed(1)
    apart = means.task.imitation_loss(result, batch, released).detach()
    assert float(apart) == pytest.approx(0.0, abs=1e-8 if kind == "resnet" else 1e-12)


@every_operation
def test_the_bill_is_that_of_what_runs_the_network(operation: Operation) -> None:
    model, means = classifier()
    surgery.operate(model, [operation], means)
    once = means.flops
    assert bool(once) == (operation.name in RUNNING)
    surgery.operate(tiny_model(), [operation], means)
    assert means.flops == 2 * once


@every_operation
def test_labels_and_heads_may_be_of_other_classes(operation: Operation) -> None:
    """A head of a benign domain, and more classes of the restricted one than the head has."""
    if operation.name != "heal" or operation == BENIGN:
        assert operated([BENIGN, operation]).fc.out_features == len(WIDE)
    model, means = classifier()
    means.images = wide(tiny_images(40))
    result = surgery.operate(model, [operation], means)
    assert result.fc.out_features == (len(WIDE) if operation == BENIGN else len(CLASSES))


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (Operation("heal"), r"^surgery: heal: the audit was given no original domain; set domain\.original$"),
        (
            Operation("heal", (("domain", "benign"),)),
            r"^surgery: heal: the audit was given no benign domain; set domain\.benign$",
        ),
        (
            Operation("distil", (("images", "original"),)),
            r"^surgery: distil: the audit was given no original domain; set domain\.original$",
        ),
        (
            Operation("reinitialise", (("blocks", 3),)),
            r"^surgery: reinitialise has 3 blocks to replace; the model has only 2$",
        ),
        (Operation("melt"), r"^surgery: 'melt' is not known; allowed: .*distil.*, or a function's dotted path"),
        (Operation("builtins.print"), r"^surgery: builtins\.print returned NoneType; it must return the model$"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_refusal_is_one_line(operation: Operation, message: str) -> None:
    with pytest.raises(UserError, match=message):
        surgery.operate(tiny_model(), [operation], means_for())


def test_operations_compose_in_their_order() -> None:
    prune, noise = Operation("prune", (("fraction", 0.5),)), Operation("noise")
    assert int((operated([noise, prune]).conv2.weight == 0).sum()) == 72
    assert int((operated([prune, noise]).conv2.weight == 0).sum()) == 0
    assert_same_state(operated([]), state_of(tiny_model()))
