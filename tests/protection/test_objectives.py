"""What is asked at a query, against references that take the steps, keep the weights and differentiate there alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sophon.attacker import FineTuneStrategy
from sophon.config import MethodConfig
from sophon.domains import Batch
from sophon.errors import UserError
from sophon.losses import ill_conditioning
from sophon.protection.fts import engine_of
from sophon.protection.inner_loop import Objective, Past, Simulation, frozen_statistics
from sophon.protection.meta_gradient.first_order import PLAIN, first_order
from sophon.protection.objectives import objectives_of
from sophon.protection.objectives.clamp import Clamp
from sophon.protection.objectives.condition import Condition
from sophon.protection.objectives.sharpness import Sharpness
from sophon.protection.objectives.suppression import Suppression
from sophon.stages.alternate import Alternate
from sophon.tasks import ClassificationTask, DenoisingTask
from tests.protection.staged import context
from tests.protection.way import (
    ADAPT,
    GAMMA,
    PLAN,
    QUERY,
    SCOPES,
    SHARP,
    STEPS,
    Way,
    added,
    assert_gradients,
    run_with,
)
from tests.tiny import assert_same_state, state_of, tiny_denoising, tiny_model, tiny_task, tiny_unet

# ---- suppression ----------------------------------------------------------------------------------------------------


def test_suppression_is_asked_with_its_weight_and_measured_without() -> None:
    asked, part, measured = (run_with((Suppression(weight),))[0] for weight in (1.0, 0.25, 0.0))
    assert_gradients(part.gradients, added((0.25, asked.gradients)))
    assert measured.query_losses == part.query_losses == asked.query_losses
    assert not any(value.any() for value in measured.gradients.values())


@SCOPES
def test_sharp_suppression_looks_where_it_is_worst(scope: str) -> None:
    plan = replace(PLAN, scope=scope)
    way, parts, losses = Way(plan), [], []
    for k, batch in way.batches.items():
        here = way.at(k)
        loss = way.loss(here, batch, "suppression_loss")
        losses.append(loss.item())
        up = way.flat(way.grad(loss, here))
        there = {name: w.detach().requires_grad_() for name, w in way.moved(here, SHARP * up / up.norm()).items()}
        worse = way.loss(there, batch, "suppression_loss")
        assert worse > loss
        parts.append((0.5 * GAMMA[k - 1], way.grad(worse, there)))
    run, attacker = run_with((Sharpness(SHARP, 0.5),), plan)
    assert run.query_losses == pytest.approx(losses, rel=1e-10)  # comparable with those of plain suppression
    assert_gradients(run.gradients, added(*parts))
    assert_same_state(attacker, state_of(run_with(PLAIN, plan)[1]))


class Flat(ClassificationTask):
    """Whose suppression loss depends on no weight that moves."""

    def suppression_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return 0.0 * sum(weight.sum() for weight in model.parameters())  # type: ignore[return-value]


def test_where_the_loss_is_flat_there_is_nowhere_to_go() -> None:
    attacker = tiny_model()
    task = Flat(tiny_task().spec, suppression_loss="klu", dtype=torch.float64)
    run = first_order(attacker, PLAN, task, iter(ADAPT), iter(QUERY), GAMMA, objectives=(Sharpness(1.0),))
    assert not any(value.any() for value in run.gradients.values())


# ---- denoisers ------------------------------------------------------------------------------------------------------


def denoise(objectives: Sequence[Objective], seed: int = 3) -> tuple[Simulation, DenoisingTask, nn.Module]:
    model, task = tiny_unet(), tiny_denoising()
    torch.manual_seed(seed)
    plan = replace(PLAN, optimizer="sgd", lr=1e-3, steps=1, schedule="constant")
    run = first_order(model, plan, task, iter(ADAPT), iter(QUERY), [1.0], objectives=objectives)
    return run, task, model


def test_passes_that_are_compared_draw_the_same_noise() -> None:
    """Else a curvature would be that of the noise: its square over the width's."""
    config = Clamp(curvature=1.0, contract=1.0, tail=1.0, inverse=1.0, probe_width=1e-3)
    run, *_ = denoise((Suppression(0.0), config))
    norm = float(torch.nn.utils.get_total_norm(list(run.gradients.values())))
    assert 0 < norm < 1e3


def test_a_denoiser_has_no_features_to_condition() -> None:
    with pytest.raises(UserError, match=r"^method\.objectives\.condition: .*eps-MSE"):
        denoise((Suppression(), Condition(1.0)))


# ---- condition ------------------------------------------------------------------------------------------------------


@SCOPES
def test_condition_is_asked_where_the_attacker_begins(scope: str) -> None:
    plan = replace(PLAN, scope=scope)
    way, task = Way(plan), tiny_task()
    task.train_mode(way.model, scope)
    with torch.no_grad():
        for name, weight in way.weights[0].items():
            way.model.get_parameter(name).copy_(weight)
    for parameter in way.model.parameters():
        parameter.requires_grad_(True)
    inputs: list[Tensor] = []
    way.model.fc.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with frozen_statistics(way.model):
        way.model(task.prepare(way.batches[STEPS].images))
    found = torch.autograd.grad(ill_conditioning(inputs[0]), list(way.model.parameters()), materialize_grads=True)
    expected = dict(zip(dict(way.model.named_parameters()), found, strict=True))
    run, attacker = run_with((Suppression(0.0), Condition(0.3)), plan)
    assert_gradients(run.gradients, added((0.3, expected)))
    assert not run.gradients["fc.weight"].any()
    assert_same_state(attacker, state_of(run_with(PLAIN, plan)[1]))


def past_of(plan: FineTuneStrategy) -> Past:
    """Return what an attacker has become after `STEPS` steps; the run that goes on steps these very moments."""
    return Past(STEPS, run_with(PLAIN, plan)[0].optimizer_state or {})


def test_who_goes_on_does_not_begin() -> None:
    """In a pool what is asked at theta^0 is asked in the turn that begins there."""
    plan = replace(PLAN, steps=8, schedule="constant")
    for objective in (Condition(1.0), Clamp(inverse=1.0)):
        run, _ = run_with((Suppression(0.0), objective), plan, past_of(plan))
        assert not any(value.any() for value in run.gradients.values())


# ---- what a configuration asks ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mine(Objective):
    """A user's own: half of the attacker's loss, negated."""

    share: float = 0.5

    def add(self, model: nn.Module, task: Any, batch: Batch, gamma: float, query: Any) -> Tensor:
        loss = task.attacker_loss(model, batch)
        (-gamma * self.share * loss).backward()
        return loss.detach()


MINE = {"objective": "tests.protection.test_objectives.Mine", "share": 0.25}


def test_objectives_of_a_configuration() -> None:
    asked = {"suppression": {"weight": 0.5}, "sharpness": None, "clamp": {"tail": 1.0}, "mine": MINE}
    assert objectives_of(asked) == (Suppression(0.5), Clamp(tail=1.0), Mine(0.25))
    way, parts = Way(), []
    for k, batch in way.batches.items():
        weights = way.at(k)
        parts.append((-0.25 * GAMMA[k - 1], way.grad(way.loss(weights, batch), weights)))
    assert_gradients(run_with(objectives_of({"mine": MINE}))[0].gradients, added(*parts))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"clamps": {}}, r"^method\.objectives\.clamps: 'clamps' is not known.*clamp.*condition"),
        ({"clamp": {"tails": 1.0}}, r"^method\.objectives\.clamp\.tails: 'clamp' has no such argument"),
        ({"clamp": {"tail": -1.0}}, r"^method\.objectives\.clamp\.tail: -1\.0 is not allowed; .* >= 0"),
        ({"suppression": 0.5}, r"^method\.objectives\.suppression: 0\.5 is not allowed; give a mapping"),
        ({"mine": {"objective": "json.dumps"}}, r"^method\.objectives\.mine\.objective: .*must be a subclass of"),
        ({"mine": {"objective": "no.such"}}, r"^method\.objectives\.mine\.objective: 'no\.such' cannot be imported"),
        ({"suppression": {"weight": 0.0}}, r"^method\.objectives: none has a weight"),
        ({"clamp": {}, "suppression": None}, r"^method\.objectives: none has a weight"),
    ],
)
def test_objectives_that_are_refused(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        Alternate(None).check(context(tiny_model(), method=MethodConfig("x", objectives=asked)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [None, torch.ones(3)])
def test_an_objective_that_returns_no_number_is_refused(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mine, "add", lambda *_: value)
    with pytest.raises(
        UserError, match=r"^method\.objectives: add of tests\.\S+\.Mine returned .*; it must return its value"
    ):
        run_with(objectives_of({"mine": MINE}))


@pytest.mark.parametrize("asked", [{"suppression": {"weight": 0.5}}, {"suppression": {}, "condition": {}}])
def test_the_second_order_asks_plain_suppression_alone(asked: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^method\.engine: second_order asks plain suppression alone"):
        engine_of(MethodConfig("x", engine="second_order"), objectives_of(asked))
