"""What every task promises, whatever kind of model it is for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from sophon.config import Config, MethodConfig, TaskConfig
from sophon.domains import Batch
from sophon.errors import UserError
from sophon.losses import DENOISING_SUPPRESSION_LOSSES, SUPPRESSION_LOSSES
from sophon.models import ModelSpec
from sophon.tasks import TASKS, Task, make_task
from tests.tiny import (
    CLASSES,
    assert_same_state,
    state_of,
    tiny_batches,
    tiny_images,
    tiny_model,
    tiny_spec,
    tiny_unet,
    tiny_unet_spec,
)

BATCH = tiny_batches(5, 1)[0]
IMAGES = tiny_images(0)


class Kind(NamedTuple):
    """A kind of model: its task's name, a spec, a model of it by seed, and a parameter of its head."""

    name: str
    spec: ModelSpec
    model: Callable[[int], nn.Module]
    head: str | None
    losses: tuple[str, ...]


KINDS = {
    "classifier": Kind("classification", tiny_spec(), tiny_model, "fc.weight", tuple(SUPPRESSION_LOSSES)),
    "denoiser": Kind(
        "denoising", tiny_unet_spec(), lambda seed: tiny_unet(seed=seed), None, tuple(DENOISING_SUPPRESSION_LOSSES)
    ),
    "conditional denoiser": Kind(
        "denoising",
        tiny_unet_spec(conditional=True),
        lambda seed: tiny_unet(conditional=True, seed=seed),
        "class_embedding.weight",
        tuple(DENOISING_SUPPRESSION_LOSSES),
    ),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
with_head = pytest.mark.parametrize(
    "kind", [kind for kind in KINDS.values() if kind.head], ids=[name for name, kind in KINDS.items() if kind.head]
)


def task_of(kind: Kind, **options: Any) -> Task:
    return TASKS[kind.name](kind.spec, **{"dtype": torch.float64, **options})


def drawn(loss: Callable[[], torch.Tensor]) -> float:
    """Return a loss with the noise of one seed."""
    torch.manual_seed(3)
    return loss().item()


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: part.training for name, part in model.named_modules()}


# ---- losses ---------------------------------------------------------------------------------------------------------


@every_kind
def test_losses_are_scalars_with_gradients_for_the_whole_network(kind: Kind) -> None:
    for name in kind.losses:
        task, model = task_of(kind, suppression_loss=name), kind.model(1)
        for loss in (task.attacker_loss, task.suppression_loss, task.original_loss):
            value = loss(model, BATCH)
            assert value.shape == ()
            assert value.isfinite()
            value.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


@every_kind
@pytest.mark.parametrize("which", ["original", "imitation"])
def test_the_reference_of_a_loss_is_spared(kind: Kind, which: str) -> None:
    task, model, reference = task_of(kind, distillation=0.7), kind.model(1), kind.model(2).train()
    before = state_of(reference)
    {"original": task.original_loss, "imitation": task.imitation_loss}[which](model, BATCH, reference).backward()
    assert_same_state(reference, before)
    assert all(part.training for part in reference.modules())
    assert all(parameter.grad is None for parameter in reference.parameters())
    assert all(parameter.grad is not None for parameter in model.parameters())


@every_kind
def test_distillation_adds_its_weight_times_a_distance(kind: Kind) -> None:
    model, reference = kind.model(1).eval(), kind.model(2).eval()
    values = [
        drawn(lambda weight=weight: task_of(kind, distillation=weight).original_loss(model, BATCH, reference))
        for weight in (0.0, 1.0, 3.0)
    ]
    assert values[1] > values[0]
    assert values[2] - values[0] == pytest.approx(3 * (values[1] - values[0]))
    # without a weight the reference is not run: this one could not be
    assert drawn(lambda: task_of(kind).original_loss(model, BATCH, nn.Identity())) == values[0]


@every_kind
def test_imitation_reads_no_labels_and_is_zero_between_equals(kind: Kind) -> None:
    task, model, reference = task_of(kind), kind.model(1).eval(), kind.model(2).eval()
    strange = BATCH._replace(labels=torch.full_like(BATCH.labels, 99))
    assert drawn(lambda: task.imitation_loss(model, strange, reference)) > 1e-3
    assert drawn(lambda: task.imitation_loss(reference, strange, reference)) == pytest.approx(0, abs=1e-12)


@every_kind
def test_amp_rounds_passes_and_returns_float32(kind: Kind) -> None:
    model = kind.model(1).float().eval()
    plain, amp = (task_of(kind, amp=amp, dtype=torch.float32) for amp in (False, True))
    values = [drawn(lambda task=task: task.attacker_loss(model, BATCH)) for task in (plain, amp)]
    assert amp.attacker_loss(model, BATCH).dtype == torch.float32
    assert values[0] != values[1]
    assert values[1] == pytest.approx(values[0], rel=0.03)


# ---- measuring ------------------------------------------------------------------------------------------------------


@every_kind
def test_measuring_repeats_itself_and_leaves_everything_as_it_was(kind: Kind) -> None:
    task, model = task_of(kind), kind.model(1).train()
    next(part for part in model.modules() if not list(part.children())).eval()
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    before, mode, generator = state_of(model), modes(model), torch.get_rng_state()

    def measured() -> tuple[Any, ...]:
        return task.evaluate(model, IMAGES), task.measure(model, IMAGES), task.details(model, IMAGES)

    first = measured()
    task.sample(model, 2, 0)
    assert torch.equal(torch.get_rng_state(), generator)
    assert_same_state(model, before)
    assert modes(model) == mode
    assert set(mode.values()) == {True, False}
    assert torch.is_grad_enabled()
    assert sum(parameter.grad is not None for parameter in model.parameters()) == 1
    torch.manual_seed(123)
    assert measured() == first
    assert first[0] == first[1].value
    again = task_of(kind)
    again.evaluation_batch_size = 7
    assert again.evaluate(copy.deepcopy(model), IMAGES) == pytest.approx(first[0], rel=1e-9)


# ---- scopes and heads -----------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("scope", ["first_blocks", "last_blocks"])
def test_blocks_are_one_unless_more_are_asked_for_and_never_more_than_there_are(kind: Kind, scope: str) -> None:
    task, model = task_of(kind), kind.model(1).eval()
    count = len(task.blocks(model))
    for blocks in (0, count + 1):
        line = rf"^blocks: {blocks} is not allowed with scope '{scope}' .* must be 1 to {count}$"
        with pytest.raises(UserError, match=line):
            task.train_mode(model, scope, blocks)
        assert not any(part.training for part in model.modules())
    trained = [set(task.train_mode(model, scope, blocks)) for blocks in range(1, count + 1)]
    assert set(task.train_mode(model, scope)) == trained[0]
    assert all(fewer < more for fewer, more in pairwise(trained))
    assert all(part.training for part in model.modules())


@every_kind
@pytest.mark.parametrize(
    ("scope", "said"), [("tail", r"is not known; allowed: all, .*"), ("lora", r"trains nothing of this model; .*")]
)
def test_a_scope_that_there_is_not_is_refused_and_changes_nothing(kind: Kind, scope: str, said: str) -> None:
    model = kind.model(1).eval()
    with pytest.raises(UserError, match=rf"^scope: '{scope}' {said}$"):
        task_of(kind).train_mode(model, scope)
    assert not any(part.training for part in model.modules())


@with_head
@pytest.mark.parametrize("head", ["fresh", "probed"])
def test_a_new_head_is_for_any_number_of_classes_and_drawn_from_the_seed(kind: Kind, head: str) -> None:
    task, models = task_of(kind), [kind.model(1) for _ in range(2)]
    before, classes = state_of(models[0]), ("x", "y", "z", "w", "v")
    for model in models:
        torch.manual_seed(3)
        task.start_head(model, head, classes)
    one, other = (model.get_parameter(kind.head) for model in models)
    assert len(one) == len(classes)
    assert one.dtype == torch.float64
    assert torch.equal(one, other)
    now, own = state_of(models[0]), task.head_names(models[0])
    assert kind.head in own
    assert all(torch.equal(now[name], before[name]) for name in before.keys() - own)
    assert task.attacker_loss(models[0].eval(), Batch(BATCH.images[:5], torch.arange(5))).isfinite()
    task.start_head(models[0], head, classes)
    assert not torch.equal(models[0].get_parameter(kind.head), other)


@every_kind
def test_a_kept_head_is_checked_and_nothing_else(kind: Kind) -> None:
    task, model = task_of(kind), kind.model(1)
    before = state_of(model)
    task.start_head(model, "kept", ("x", "y", "z"))
    if kind.head:
        with pytest.raises(UserError, match=r"^head: 'kept' .* the model has 3 and the restricted domain 2; "):
            task.start_head(model, "kept", ("x", "y"))
    else:  # no classes to be told, so any number fits, and there is no head to make anew
        assert task.head_names(model) == set()
        task.start_head(model, "kept", ("x", "y"))
        with pytest.raises(UserError, match=r"^head: 'fresh' needs a class-conditional denoiser; .* allowed: kept$"):
            task.start_head(model, "fresh", CLASSES)
    assert_same_state(model, before)


# ---- made of a configuration ----------------------------------------------------------------------------------------


def config(name: str, **method: Any) -> Config:
    return Config(task=TaskConfig(name=name), method=MethodConfig(name="test", **method))


@every_kind
def test_a_protection_gets_its_losses_and_an_audit_needs_none(kind: Kind) -> None:
    settings = config(kind.name, suppression_loss=kind.losses[0], distillation=0.5)
    task = make_task(settings, kind.spec, amp=True, protects=True)
    assert type(task) is TASKS[kind.name]
    assert (task.distillation, task.amp) == (0.5, True)
    assert task.suppression_loss(kind.model(1).float(), BATCH).isfinite()
    # a loss of the other kind is no error where nothing is protected
    others = {loss for other in KINDS.values() for loss in other.losses} - set(kind.losses)
    audited = make_task(config(kind.name, suppression_loss=min(others), distillation=0.5), kind.spec, amp=False)
    assert audited.distillation == 0


def a_number_an_image(output: Tensor, wanted: Tensor) -> Tensor:
    return output.flatten(1).mean(1)


@every_kind
def test_a_loss_that_is_no_number_is_refused(kind: Kind) -> None:
    task = task_of(kind, suppression_loss=f"{__name__}.a_number_an_image")
    with pytest.raises(
        UserError, match=r"^method\.suppression_loss: \S+\.a_number_an_image returned a tensor of shape \(\d+,\)"
    ):
        task.suppression_loss(kind.model(1), BATCH)


@every_kind
def test_losses_of_other_kinds_are_refused(kind: Kind) -> None:
    others = {loss for other in KINDS.values() for loss in other.losses} - set(kind.losses)
    for loss in ("magic", *sorted(others)):
        with pytest.raises(
            UserError, match=rf"^method.suppression_loss: '{loss}' is not known.*; allowed: .*"
        ) as caught:
            make_task(config(kind.name, suppression_loss=loss), kind.spec, amp=False, protects=True)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "spec", "message"),
    [
        ("juggling", tiny_spec(), "'juggling' is not known; allowed: classification, denoising"),
        ("denoising", tiny_spec(), "'denoising' does not fit .* python; allowed: classification"),
        ("classification", tiny_unet_spec(), "'classification' does not fit .* diffusers; allowed: denoising"),
    ],
)
def test_a_task_that_does_not_fit_is_refused(name: str, spec: ModelSpec, message: str) -> None:
    with pytest.raises(UserError, match=f"^task.name: {message}$"):
        make_task(config(name), spec, amp=False)


@pytest.mark.parametrize(("kind", "said"), [("classifier", "only denoisers"), ("denoiser", ".*second_order")])
def test_gradient_checkpointing_is_refused_where_it_has_no_place(kind: str, said: str) -> None:
    settings = config(KINDS[kind].name, engine="second_order")
    settings.task.gradient_checkpointing = True
    with pytest.raises(UserError, match=f"^task.gradient_checkpointing: {said}"):
        make_task(settings, KINDS[kind].spec, amp=False, protects=True)
