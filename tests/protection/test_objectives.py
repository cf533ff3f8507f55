"""What is asked at a query, against references that take the steps, keep the weights and differentiate there alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from sophon.attacker import FineTuneStrategy, learning_rate
from sophon.config import MethodConfig
from sophon.domains import Batch
from sophon.errors import UserError
from sophon.losses import ill_conditioning
from sophon.optimizers import build_optimizer
from sophon.protection.first_order import PLAIN, first_order
from sophon.protection.fts import engine_of
from sophon.protection.inner_loop import (
    Objective,
    Past,
    Simulation,
    frozen_statistics,
    query_weights,
    rewinder,
    standing_at,
)
from sophon.protection.objectives import objectives_of
from sophon.protection.objectives.clamp import Clamp
from sophon.protection.objectives.condition import Condition
from sophon.protection.objectives.sharpness import Sharpness
from sophon.protection.objectives.suppression import Suppression
from sophon.stages.alternate import Alternate
from sophon.tasks import ClassificationTask, DenoisingTask
from tests.protection.staged import context
from tests.tiny import assert_same_state, state_of, tiny_batches, tiny_denoising, tiny_model, tiny_task, tiny_unet

STEPS, EVERY = 4, 2
ADAPT = tiny_batches(1, STEPS)
QUERY = tiny_batches(2, STEPS)
GAMMA = query_weights("linear", STEPS, EVERY)
PLAN = FineTuneStrategy(optimizer="adam", lr=0.02, steps=STEPS, schedule="cosine")
SHARP = 0.3
WIDTH = 0.01
SEED = 5

Weights = dict[str, Tensor]
Ask = Callable[[Weights], Tensor]


def run_with(
    objectives: Sequence[Objective], plan: FineTuneStrategy = PLAN, past: Past | None = None
) -> tuple[Simulation, nn.Module]:
    attacker = tiny_model()
    torch.manual_seed(SEED)
    run = first_order(attacker, plan, tiny_task(), iter(ADAPT), iter(QUERY), GAMMA, past, objectives=objectives)
    return run, attacker


class Way:
    """One attacker's way, taken with torch.optim's default optimizer; weights by step, 0 the start."""

    def __init__(self, plan: FineTuneStrategy = PLAN) -> None:
        task, self.model = tiny_task(), tiny_model()
        self.moving = list(task.train_mode(self.model, plan.scope))
        optimizer = build_optimizer(plan, [self.model.get_parameter(name) for name in self.moving])
        self.weights = [self._copied()]
        self.buffers: list[Weights] = [{}]
        for step, batch in enumerate(ADAPT):
            optimizer.param_groups[0]["lr"] = learning_rate(plan, step)
            self.model.zero_grad()
            task.attacker_loss(self.model, batch).backward()
            optimizer.step()
            self.weights.append(self._copied())
        self.batches = dict(zip([k for k in range(1, STEPS + 1) if GAMMA[k - 1]], QUERY, strict=False))
        self.lr = learning_rate(plan, STEPS - 1)

    def _copied(self) -> Weights:
        return {name: weight.detach().clone() for name, weight in self.model.named_parameters()}

    def loss(self, weights: Weights, batch: Batch, kind: str = "attacker_loss") -> Tensor:
        """Return a loss of the task as a function of the weights."""
        task = tiny_task()

        def called(images: Tensor) -> Tensor:
            found: Tensor = functional_call(self.model, weights, (images,))
            return found

        with frozen_statistics(self.model):
            return getattr(task, kind)(called, batch)  # type: ignore[no-any-return]

    def at(self, k: int) -> Weights:
        return {name: weight.clone().requires_grad_() for name, weight in self.weights[k].items()}

    def grad(self, value: Tensor, weights: Weights) -> Weights:
        found = torch.autograd.grad(value, list(weights.values()), retain_graph=True, materialize_grads=True)
        return dict(zip(weights, found, strict=True))

    def flat(self, weights: Weights) -> Tensor:
        return torch.cat([weights[name].flatten() for name in self.moving])

    def moved(self, weights: Weights, by: Tensor) -> Weights:
        """Add a flat vector over what moves."""
        sizes = [weights[name].numel() for name in self.moving]
        parts = dict(zip(self.moving, by.split(sizes), strict=True))
        return {name: w + parts[name].view_as(w) if name in parts else w for name, w in weights.items()}

    def slope(self, weights: Weights, batch: Batch) -> Tensor:
        """Return the gradient of the attacker's loss over what moves, flat, with its graph."""
        found = torch.autograd.grad(
            self.loss(weights, batch), [weights[name] for name in self.moving], create_graph=True
        )
        return torch.cat([part.flatten() for part in found])


def added(*parts: tuple[float, Weights]) -> Weights:
    return {name: sum(weight * part[name] for weight, part in parts) for name in parts[0][1]}  # type: ignore[misc]


def assert_gradients(found: Weights, expected: Weights, rtol: float = 1e-8, atol: float = 1e-12) -> None:
    assert any(value.abs().max() > 1e-6 for value in expected.values()), "the reference must say something"
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


SCOPES = pytest.mark.parametrize("scope", ["all", "head"])


# ---- suppression ----------------------------------------------------------------------------------------------------


def suppression(way: Way, weight: float = 1.0) -> Weights:
    parts = []
    for k, batch in way.batches.items():
        weights = way.at(k)
        loss = way.loss(weights, batch, "suppression_loss")
        parts.append((weight * GAMMA[k - 1], way.grad(loss, weights)))
    return added(*parts)


def test_plain_suppression_is_what_is_asked_by_default_to_the_bit() -> None:
    attackers = tiny_model(), tiny_model()
    one = first_order(attackers[0], PLAN, tiny_task(), iter(ADAPT), iter(QUERY), GAMMA)
    other = first_order(
        attackers[1], PLAN, tiny_task(), iter(ADAPT), iter(QUERY), GAMMA, objectives=objectives_of({"suppression": {}})
    )
    assert one.query_losses == other.query_losses
    assert all(torch.equal(value, other.gradients[name]) for name, value in one.gradients.items())
    assert_same_state(attackers[1], state_of(attackers[0]))
    assert not any(each.remembers for each in PLAIN), "no copy of any weight"


@SCOPES
@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_suppression_with_a_weight(weight: float, scope: str) -> None:
    plan = replace(PLAN, scope=scope)
    run, _ = run_with((Suppression(weight),), plan)
    assert_gradients(run.gradients, suppression(Way(plan), weight))


def test_without_weight_the_suppression_loss_is_measured_only() -> None:
    measured, _ = run_with((Suppression(0.0),))
    asked, _ = run_with(PLAIN)
    assert measured.query_losses == asked.query_losses
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


def test_no_sharpness_is_plain_suppression() -> None:
    sharp, plain = run_with((Sharpness(0.0),))[0], run_with(PLAIN)[0]
    assert_gradients(sharp.gradients, plain.gradients, rtol=1e-12, atol=1e-15)


class Flat(ClassificationTask):
    """Whose suppression loss depends on no weight that moves."""

    def suppression_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return 0.0 * sum(weight.sum() for weight in model.parameters())  # type: ignore[return-value]


def test_where_the_loss_is_flat_there_is_nowhere_to_go() -> None:
    attacker = tiny_model()
    task = Flat(tiny_task().spec, suppression_loss="klu", dtype=torch.float64)
    run = first_order(attacker, PLAN, task, iter(ADAPT), iter(QUERY), GAMMA, objectives=(Sharpness(1.0),))
    assert not any(value.any() for value in run.gradients.values())


# ---- CLAMP ----------------------------------------------------------------------------------------------------------


def directions(way: Way, count: int) -> list[Tensor]:
    """Draw what the clamp draws: the generator is seeded by who simulates."""
    torch.manual_seed(SEED)
    drawn = [torch.cat([torch.randn_like(way.weights[0][name]).flatten() for name in way.moving]) for _ in range(count)]
    return [one / one.norm() for one in drawn]


def curvature(way: Way, config: Clamp) -> Weights:
    parts = []
    for k, batch in way.batches.items():
        weights = way.at(k)
        step = way.flat(way.weights[k]) - way.flat(way.weights[k - 1])
        along = WIDTH * step / step.norm()
        up, here, down = (way.loss(way.moved(weights, side * along), batch) for side in (1, 0, -1))
        kappa = (up - 2 * here + down) / WIDTH**2
        assert abs(kappa.item()) > 1e-6
        parts.append((config.curvature * GAMMA[k - 1], way.grad(F.softplus(config.kappa_min - kappa), weights)))
    return added(*parts)


def end(way: Way, config: Clamp) -> tuple[Weights, float, float]:
    """Return the gradient of contraction and tail, their value, and the rate c."""
    last, first = way.at(STEPS), way.at(0)
    batch = way.batches[STEPS]

    def update_map(weights: Weights) -> Tensor:
        return way.flat(weights) - way.lr * way.slope(weights, batch)

    def rate(direction: Tensor) -> Tensor:
        return (update_map(way.moved(last, WIDTH * direction)) - update_map(last)).norm() / WIDTH

    c = max((rate(direction) for direction in directions(way, config.probes)), key=Tensor.item)
    length = (way.flat(way.weights[STEPS]) - way.flat(way.weights[STEPS - 1])).norm()
    reach = length / (1 - c.clamp(max=config.c_limit))
    drop = way.loss(first, batch) - way.loss(last, batch)
    bound = drop + way.slope(last, batch).norm() * reach + config.lipschitz / 2 * reach**2
    value = config.contract * F.softplus(c - config.c_max) + config.tail * F.relu(bound - config.slack)
    # theta^k = theta^0 + constant: both points move with the released weights
    return added((1, way.grad(value, last)), (1, way.grad(value, first))), value.item(), c.item()


def clamped(plan: FineTuneStrategy, **values: Any) -> tuple[Simulation, Clamp]:
    config = Clamp(probe_width=WIDTH, **values)
    run, attacker = run_with((Suppression(0.0), config), plan)
    assert_same_state(attacker, state_of(run_with(PLAIN, plan)[1]))
    return run, config


@SCOPES
@pytest.mark.parametrize("kappa_min", [0.0, 2.5])
def test_curvature(kappa_min: float, scope: str) -> None:
    plan = replace(PLAN, scope=scope, schedule="constant")
    run, config = clamped(plan, curvature=0.7, kappa_min=kappa_min)
    assert_gradients(run.gradients, curvature(Way(plan), config), rtol=1e-6, atol=1e-9)


def test_an_attacker_that_stands_still_has_no_curvature() -> None:
    plan = replace(PLAN, optimizer="sgd", lr=1e-300, schedule="constant")
    run, _ = clamped(plan, curvature=1.0)
    assert all(value.abs().max() < 1e-6 for value in run.gradients.values())


CASES: dict[str, dict[str, Any]] = {
    "contraction": {"contract": 0.8, "c_max": 0.9, "c_limit": 0.9999},
    "contraction, the worst of three": {"contract": 0.8, "c_max": 0.9, "c_limit": 0.9999, "probes": 3},
    "tail": {"tail": 0.6, "c_limit": 0.999},
    "tail, c at its limit": {"tail": 0.6, "c_limit": 0.5, "lipschitz": 3.0},
    "both": {"tail": 0.6, "contract": 0.8, "c_limit": 0.999, "slack": 0.01, "lipschitz": 0.5},
}


@SCOPES
@pytest.mark.parametrize("case", CASES)
def test_contraction_and_tail(case: str, scope: str) -> None:
    plan = replace(PLAN, optimizer="sgd", lr=0.5, scope=scope, schedule="constant")
    run, config = clamped(plan, **CASES[case])
    way = Way(plan)
    expected, value, c = end(way, config)
    assert value > 0
    assert (c < config.c_limit) is ("limit" not in case)
    assert_gradients(run.gradients, expected, rtol=1e-6, atol=1e-9)


def test_within_the_slack_nothing_is_asked() -> None:
    run, _ = clamped(PLAN, tail=1.0, slack=1e6)
    assert not any(value.any() for value in run.gradients.values())


class Guessing(ClassificationTask):
    """Where a guess is as bad, or as good, as said."""

    chance = 0.0

    def chance_loss(self, model: nn.Module) -> float:
        return self.chance


@SCOPES
@pytest.mark.parametrize(("chance", "asked"), [(1e-6, False), (1e6, True)])
def test_inverse_has_no_reward_for_worse_than_a_guess(chance: float, asked: bool, scope: str) -> None:
    plan = replace(PLAN, scope=scope)
    task, way = Guessing(tiny_task().spec, suppression_loss="klu", dtype=torch.float64), Way(plan)
    task.chance = chance
    objectives = (Suppression(0.0), Clamp(inverse=0.4))
    run = first_order(tiny_model(), plan, task, iter(ADAPT), iter(QUERY), GAMMA, objectives=objectives)
    weights = way.at(0)
    if asked:
        expected = way.grad(way.loss(weights, way.batches[STEPS]), weights)
        assert_gradients(run.gradients, added((-0.4, expected)))
    else:
        assert not any(value.any() for value in run.gradients.values())


def test_all_terms_add_up_with_suppression() -> None:
    values = {"curvature": 0.7, "contract": 0.8, "tail": 0.6, "inverse": 0.4, "c_limit": 0.999}
    plan = replace(PLAN, schedule="constant")
    config = Clamp(probe_width=WIDTH, **values)
    together, _ = run_with((Suppression(0.5), config, Condition(0.3)), plan)
    parts = [(1.0, clamped(plan, **{**values, **dict.fromkeys(rest, 0.0)})[0].gradients) for rest in rests()]
    parts.append((1.0, run_with((Suppression(0.5),), plan)[0].gradients))
    parts.append((1.0, run_with((Suppression(0.0), Condition(0.3)), plan)[0].gradients))
    assert_gradients(together.gradients, added(*parts), rtol=1e-7, atol=1e-10)


def rests() -> Iterator[list[str]]:
    """Name what is switched off: all but one, each in turn; contraction and tail, which share probes, are one."""
    groups = (["curvature"], ["contract", "tail"], ["inverse"])
    for kept in groups:
        yield [name for group in groups if group is not kept for name in group]


class Watched(ClassificationTask):
    """Notes whether passes were autocast."""

    def attacker_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        seen.append(self.amp)
        return super().attacker_loss(model, batch)


seen: list[bool] = []


def test_differences_are_not_taken_in_half_precision() -> None:
    seen.clear()
    task = Watched(tiny_task().spec, suppression_loss="klu", amp=True, dtype=torch.float64)
    model = tiny_model()
    objectives = (*PLAIN, Clamp(curvature=1.0))
    first_order(model, replace(PLAN, steps=1), task, iter(ADAPT), iter(QUERY), [1.0], objectives=objectives)
    assert seen == [True, False, False, False]
    assert task.amp


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


def test_sharpness_of_a_denoiser_vanishes_with_its_radius() -> None:
    plain, *_ = denoise((Suppression(),))
    sharp, *_ = denoise((Sharpness(1e-9),))
    assert sharp.query_losses == plain.query_losses
    assert_gradients(sharp.gradients, plain.gradients, rtol=1e-5, atol=1e-7)


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
        ({"clamp": {"c_limit": 1.0}}, r"^method\.objectives\.clamp\.c_limit: 1\.0 is not allowed"),
        ({"clamp": {"probes": 0}}, r"^method\.objectives\.clamp\.probes: 0 is not allowed"),
        ({"sharpness": {"weight": 0.0}}, r"^method\.objectives\.sharpness\.weight: 0\.0 is not allowed; .* > 0"),
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


@pytest.mark.parametrize("asked", [{"suppression": {"weight": 0.5}}, {"suppression": {}, "condition": {}}])
def test_the_second_order_asks_plain_suppression_alone(asked: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^method\.engine: second_order asks plain suppression alone"):
        engine_of(MethodConfig("x", engine="second_order"), objectives_of(asked))


def test_an_engine_asks_them_of_who_goes_on_as_well() -> None:
    objectives, plan = (Sharpness(SHARP), Clamp(curvature=0.5)), replace(PLAN, steps=8)
    for past in (lambda: None, lambda: past_of(plan)):
        going_on = past()
        expected, _ = run_with(objectives, plan, past())
        model = tiny_model()
        torch.manual_seed(SEED)
        rest = {} if going_on is None else {"past": going_on}
        engine = engine_of(MethodConfig("x"), objectives)
        found = engine(model, plan, tiny_task(), iter(ADAPT), iter(QUERY), GAMMA, **rest)
        assert all(torch.equal(value, expected.gradients[name]) for name, value in found.gradients.items())
        assert not torch.equal(found.gradients["fc.bias"], run_with(PLAIN, plan, past())[0].gradients["fc.bias"])


# ---- what objectives are made of ------------------------------------------------------------------------------------


def test_weights_stand_elsewhere_for_a_while() -> None:
    model = tiny_model()
    before, moving = state_of(model), [model.conv1.weight, model.fc.bias]
    with standing_at(moving, [torch.zeros_like(weight) for weight in moving]):
        assert not any(weight.any() for weight in moving)
        assert torch.equal(model.fc.weight, before["fc.weight"])
    assert_same_state(model, before)
    with pytest.raises(KeyError), standing_at(moving, [weight + 1 for weight in moving]):
        raise KeyError
    assert_same_state(model, before)


def test_generators_come_back() -> None:
    torch.manual_seed(0)
    rewind = rewinder(torch.device("cpu"))
    first = torch.randn(3)
    rewind()
    assert torch.equal(torch.randn(3), first)
    assert not torch.equal(torch.randn(3), first)
    copy.deepcopy(rewind)()
    assert torch.equal(torch.randn(3), first)
