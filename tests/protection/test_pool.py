"""Persistent attackers against one that is never interrupted, and what they must not carry along."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sophon.attacker import OPTIMIZERS, FineTuneStrategy
from sophon.config import MethodConfig
from sophon.domains import Batch, ImageSet, LoadedDomain, MemoryImages
from sophon.errors import UserError
from sophon.optimizers import build_optimizer
from sophon.protection import attackers as making
from sophon.protection.distributed import Ranks
from sophon.protection.fts import FTS
from sophon.protection.optimizer_state import optimizer_state, restore_optimizer
from sophon.protection.pool import Member, Pool
from sophon.ranges import check
from sophon.sampler import SamplerConfig
from sophon.tasks import ClassificationTask
from sophon.tensor_files import read_tensors, write_tensors
from tests.protection.staged import context
from tests.tiny import assert_same_state, state_of, tiny_bands, tiny_batches, tiny_model, tiny_spec, tiny_task

RESTRICTED = tiny_bands("restricted", ("adapt", "query"), seed=10, across=True)
METHOD = MethodConfig(name="test", fts_lr=1e-2, query_batch_size=9, probe_steps=2, pool=1, chunk=2)
HEAD = {"fc.weight", "fc.bias"}
OWN = dict.fromkeys(HEAD, 0.0)  # factors of an attacker whose head is not released
SAMPLER = SamplerConfig({"momentum": [0.05, 0.05]}, batch_sizes=[8], steps=[6, 6], heads=["kept"])
MODEL = tiny_model()
STILL = 0.0  # a factor on FTS's rate with which the released weights stay where they are


class Watching(ClassificationTask):
    """Remembers what every model looked like whose loss was asked for."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(tiny_spec(), suppression_loss="klu", dtype=dtype)
        self.before_steps: list[dict[str, Tensor]] = []
        self.at_queries: list[dict[str, Tensor]] = []

    def attacker_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        self.before_steps.append(state_of(model))
        return super().attacker_loss(model, batch)

    def suppression_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        self.at_queries.append(state_of(model))
        return super().suppression_loss(model, batch)


def make_fts(
    model: nn.Module,
    method: MethodConfig = METHOD,
    task: ClassificationTask | None = None,
    seed: int = 0,
    domain: LoadedDomain = RESTRICTED,
    **changes: Any,
) -> FTS:
    sampler = replace(SAMPLER, **changes)
    return FTS(context(model, task, method, sampler=sampler, restricted=[domain], seed=seed))


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def meta_gradients(fts: FTS) -> list[dict[str, Tensor]]:
    """Collect the gradient of every FTS step as Adam gets it."""
    found: list[dict[str, Tensor]] = []
    fts.optimizer.register_step_pre_hook(
        lambda *_: found.append({name: p.grad.clone() for name, p in fts.model.named_parameters()})
    )
    return found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare up to the rounding of a difference that is taken and added again; queries count as batches seen."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


# --- one life in many turns ---------------------------------------------------------------------------------------

LIFE = 20
RATES = {"adam": 0.01, "adadelta": 1.0, "rmsprop": 0.005}


# by definition, in a life of 20 steps: two of them warm up
FACTORS = {
    "constant": [1.0] * LIFE,
    "cosine": [0.5 * (1 + math.cos(math.pi * step / LIFE)) for step in range(LIFE)],
    "warmup": [0.5] + [1.0] * (LIFE - 1),
}


def uninterrupted(
    model: nn.Module, plan: FineTuneStrategy, adapt: list[Batch]
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Fine-tune a copy with plain torch.optim; return its state and its optimizer's state after every step."""
    kind, options = OPTIMIZERS[plan.optimizer]
    attacker, task = copy.deepcopy(model).train(), tiny_task()
    optimizer: Any = getattr(torch.optim, kind)(
        attacker.parameters(), lr=1.0, weight_decay=plan.weight_decay, **options
    )
    states, memories = [], []
    for step, batch in enumerate(adapt):
        optimizer.param_groups[0]["lr"] = plan.lr * FACTORS[plan.schedule][step]
        optimizer.zero_grad()
        task.attacker_loss(attacker, batch).backward()
        optimizer.step()
        states.append(state_of(attacker))
        remembered = optimizer.state_dict()["state"]
        memories.append({f"{i}.{key}": value.clone() for i, v in remembered.items() for key, value in v.items()})
    return states, memories


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Batch]]:
    """Every batch that is taken from ``adapt`` and ``query``."""
    taken: dict[str, list[Batch]] = {"adapt": [], "query": []}
    make = making.batches

    def recorded(images: ImageSet, *rest: Any) -> Iterator[Batch]:
        split = next(name for name, part in RESTRICTED.splits.items() if part is images)
        for batch in make(images, *rest):
            taken[split].append(batch)
            yield batch

    monkeypatch.setattr(making, "batches", recorded)
    return taken


@pytest.mark.parametrize("chunk", [7, 50, *(pytest.param(each, marks=pytest.mark.slow) for each in (1, 10))])
@pytest.mark.parametrize("schedule", ["cosine", "warmup"])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_turns_are_one_attackers_life(optimizer: str, schedule: str, chunk: int, drawn: dict[str, list[Batch]]) -> None:
    """While the released weights stay: its weights, optimizer, statistics, rates and query gradients, step by step."""
    model, task = tiny_model(), Watching()
    released = state_of(model)
    rate = RATES.get(optimizer, 0.05)
    fts = make_fts(
        model, replace(METHOD, chunk=chunk, gamma="linear"), task, optimizers={optimizer: [rate, rate]},
        steps=[LIFE, LIFE], schedules=[schedule], weight_decays=[0.01],
    )  # fmt: skip
    gradients, kept = meta_gradients(fts), []
    ends = [min(start + chunk, LIFE) for start in range(0, LIFE, chunk)]
    for turn in range(len(ends)):
        fts.step(turn, factor=STILL)
        kept.append(copy.deepcopy(fts.pool.members))
    assert_same_state(model, released)

    assert len(drawn["adapt"]) == len(drawn["query"]) == LIFE
    plan = FineTuneStrategy(optimizer, rate, 0.01, schedule, 8, LIFE, head="kept")
    states, memories = uninterrupted(model, plan, drawn["adapt"])
    for found, expected in zip(task.at_queries, states, strict=True):
        assert_close(found, expected)
    for found, expected in zip(task.before_steps, [released, *states[:-1]], strict=True):
        assert_close(found, expected)
    for members, end in itertools.islice(zip(kept, ends, strict=True), len(ends) - 1):
        assert members[0].taken == end
        assert_close(members[0].optimizer_state, memories[end - 1])
    assert not kept[-1]
    for found, start, end in zip(gradients, [0, *ends], ends, strict=False):
        expected = query_gradient(model, states[start:end], drawn["query"][start:end])
        assert_close(found, expected)


def query_gradient(model: nn.Module, states: list[dict[str, Tensor]], query: list[Batch]) -> dict[str, Tensor]:
    """Sum of the query gradients at the states of a turn, with weights that rise from 1 and are scaled to sum to 1."""
    total = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    share = sum(range(1, len(states) + 1))
    for k, (state, batch) in enumerate(zip(states, query, strict=True), start=1):
        snapshot = copy.deepcopy(model).train()
        snapshot.load_state_dict(state)
        tiny_task().suppression_loss(snapshot, batch).backward()
        for name, parameter in snapshot.named_parameters():
            total[name] += k / share * parameter.grad
    return total


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_goes_on(optimizer: str, drawn: dict[str, list[Batch]]) -> None:
    model, task = tiny_model(), Watching()
    rate = RATES.get(optimizer, 0.02)
    optimizers = {optimizer: [rate, rate]}
    fts = make_fts(model, replace(METHOD, chunk=3), task, optimizers=optimizers, steps=[9, 9])
    for turn in range(3):
        fts.step(turn, factor=STILL)
    expected, _ = uninterrupted(model, FineTuneStrategy(optimizer, rate), drawn["adapt"])
    for found, state in zip(task.at_queries, expected, strict=True):
        assert_close(found, state)


def test_a_query_follows_the_last_step_of_every_turn(drawn: dict[str, list[Batch]]) -> None:
    fts = make_fts(tiny_model(), replace(METHOD, chunk=4, query_every=3, gamma="last"))
    counts = []
    for turn in range(2):
        fts.step(turn)
        counts.append((len(drawn["adapt"]), len(drawn["query"])))
    assert counts == [(4, 1), (6, 2)]


# --- the released weights move ------------------------------------------------------------------------------------


def test_goes_on_from_the_released_weights_and_its_displacement() -> None:
    """They move by FTS after each turn, and by whatever happens until the next."""
    model, task = tiny_model(), Watching()
    fts = make_fts(model, task=task)
    torch.manual_seed(3)
    then, end = parameters_of(model), state_of(model)
    for turn in range(3):
        now = parameters_of(model)
        fts.step(turn)
        begin = task.before_steps[-METHOD.chunk]
        moved = {name: now[name] + (end[name] - then[name]) for name in now}
        assert_close({name: begin[name] for name in now}, moved)
        assert turn == 0 or min(float((moved[name] - end[name]).abs().max()) for name in now) > 1e-2
        then, end = now, task.at_queries[-1]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))


def test_its_statistics_are_its_own() -> None:
    """An attacker that trains its BatchNorm layers goes on with what they have seen."""
    model, task = tiny_model(), Watching()
    fts = make_fts(model, task=task)
    fts.step(0)
    end = task.at_queries[-1]
    with torch.no_grad():
        model.bn1.running_mean.add_(1.0)
    released = {name: value.clone() for name, value in model.named_buffers()}
    fts.step(1)
    for name, value in released.items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(task.before_steps[2][name], end[name])
            assert not torch.equal(end[name], value)
    for name, value in model.named_buffers():
        assert torch.equal(value, released[name])


def test_a_frozen_backbone_has_the_released_statistics() -> None:
    """One that trains only its head leaves them alone, so it goes on with the released weights' present ones."""
    model, task = tiny_model(), Watching()
    fts = make_fts(model, task=task, scopes=["head"])
    for turn in range(3):
        fts.step(turn)
        for name, value in model.named_buffers():
            assert torch.equal(task.before_steps[-1][name], value)
        with torch.no_grad():
            model.bn1.running_mean.add_(1.0)
            model.bn2.running_var.mul_(2.0)


def test_the_released_model_is_left_alone() -> None:
    model = tiny_model().eval()
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    fts = make_fts(model, replace(METHOD, pool=4, attackers=3), heads=["kept", "fresh", "probed"])
    for turn in range(5):
        fts.step(turn)
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    assert not any(part.training for part in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


# --- heads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["kept", "fresh", "probed"])
def test_only_a_kept_head_is_displaced_and_learned_from(head: str) -> None:
    model, task = tiny_model(), Watching()
    fts = make_fts(model, task=task, heads=[head])
    gradients = meta_gradients(fts)
    fts.step(0, factor=STILL)
    end, then = task.at_queries[-1], parameters_of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3)
    fts.step(1)
    begin = task.before_steps[-METHOD.chunk]
    for name in then:
        moved = end[name] if name in HEAD and head != "kept" else end[name] + 0.3
        torch.testing.assert_close(begin[name], moved, rtol=1e-9, atol=1e-12)
        if name in HEAD and head != "kept":
            assert torch.equal(begin[name], end[name])
            assert all(not gradient[name].any() for gradient in gradients)
            assert torch.equal(model.get_parameter(name), then[name] + 0.3)
        else:
            assert all(gradient[name].any() for gradient in gradients)
    assert not torch.equal(end["fc.weight"], then["fc.weight"])


@pytest.mark.parametrize("classes", [2, 5])
def test_heads_of_another_number_of_classes(classes: int) -> None:
    names = tuple("vwxyz"[:classes])
    splits = {
        name: MemoryImages(part.images, torch.arange(len(part)) % classes, names)
        for name, part in RESTRICTED.splits.items()
    }
    model, domain = tiny_model(), LoadedDomain("other", names, splits, {})
    before = parameters_of(model)
    fts = make_fts(model, replace(METHOD, pool=2, attackers=2), domain=domain, heads=["fresh", "probed"])
    for turn in range(5):
        assert math.isfinite(fts.step(turn).query_loss)
    assert fts.pool.members[0].displacement["fc.weight"].shape == (classes, 4)
    assert all(torch.equal(value, before[name]) == (name in HEAD) for name, value in model.named_parameters())


def test_attackers_of_every_kind_share_the_scratch_copies() -> None:
    """Whoever was simulated in between: each goes on from where its own last turn ended."""
    model, task = tiny_model(), Watching()
    method = replace(METHOD, pool=4, attackers=3, chunk=2)
    optimizers = {"adam": [1e-3, 1e-1], "sgd": [0.05, 0.5]}
    fts = make_fts(
        model, method, task, optimizers=optimizers, heads=["kept", "fresh", "probed"], scopes=["all", "head"]
    )
    entered = []
    enter = fts.pool.enter

    def watched(place: int, *rest: Any) -> Member:
        member = fts.pool.members[place]
        entered.append((fts.pool.members[place].strategy, member.taken, len(task.before_steps)))
        expected, own = copy.deepcopy(member.displacement), set(member.factors)
        returned = enter(place, *rest)
        for name, value in rest[0].named_parameters():
            start = 0 if name in own else model.get_parameter(name)
            assert torch.equal(value, start + expected[name])
        assert all(torch.equal(rest[0].get_buffer(name), value) for name, value in member.buffers.items())
        return returned

    fts.pool.enter = watched  # type: ignore[method-assign]
    places: dict[int, list[tuple[FineTuneStrategy, int]]] = {}
    for turn in range(30):
        fts.step(turn)
        for place, member in fts.pool.members.items():
            seen = places.setdefault(place, [])
            if not seen or seen[-1] != (member.strategy, member.taken):
                seen.append((member.strategy, member.taken))
    assert set(places) == {0, 1, 2, 3}
    assert {(plan.head, plan.scope) for plan, *_ in entered} == set(
        itertools.product(("kept", "fresh", "probed"), ("all", "head"))
    )
    for seen in places.values():
        assert {taken for _, taken in seen} <= {2, 4}  # of 6 steps in turns of 2, the place is empty after the third
        assert len({plan for plan, _ in seen}) > 3


# --- the end of a life --------------------------------------------------------------------------------------------


def test_a_new_attacker_follows_the_last_step() -> None:
    model, task = tiny_model(), Watching()
    fts = make_fts(model, replace(METHOD, chunk=4), task, optimizers={"adam": [1e-3, 1e-1]})
    fts.step(0)
    first = fts.pool.members[0]
    assert first.taken == 4
    fts.step(1)
    assert not fts.pool.members
    assert len(task.before_steps) == 6
    released = state_of(model)
    fts.step(2)
    assert_close(task.before_steps[6], released)
    assert task.before_steps[6]["bn1.num_batches_tracked"] == released["bn1.num_batches_tracked"]
    assert fts.pool.members[0].taken == 4
    assert fts.pool.members[0].strategy != first.strategy
    assert float(fts.pool.members[0].optimizer_state["0.step"]) == 4


@pytest.mark.parametrize(("steps", "empty"), [(3, True), (4, True), (5, False)])
def test_no_longer_than_its_life(steps: int, empty: bool) -> None:
    """The last step of a life leaves no one, whether the chunk is used up or not."""
    task = Watching()
    fts = make_fts(tiny_model(), replace(METHOD, chunk=4), task, steps=[steps, steps])
    fts.step(0)
    assert len(task.before_steps) == min(4, steps)
    assert (not fts.pool.members) == empty


def test_lives_are_the_sampled_ones() -> None:
    """Steps of each attacker's turns add up to what was drawn for it."""
    task = Watching()
    fts = make_fts(tiny_model(), replace(METHOD, chunk=3), task, steps=[1, 10])
    lengths, lived = [], 0
    for turn in range(40):
        before = len(task.before_steps)
        fts.step(turn)
        lived += len(task.before_steps) - before
        if fts.pool.members:
            assert fts.pool.members[0].taken == lived < fts.pool.members[0].strategy.steps
        else:
            lengths.append(lived)
            lived = 0
    assert min(lengths) <= 2
    assert max(lengths) >= 8


def test_whoever_diverges_at_once_is_not_kept() -> None:
    model = tiny_model().float()
    before = state_of(model)
    task = Watching(torch.float32)
    fts = make_fts(model, replace(METHOD, chunk=8), task, optimizers={"nesterov": [1e38, 1e38]}, steps=[40, 40])
    for turn in range(2):
        step = fts.step(turn)
        assert step.diverged == 1
        assert math.isnan(step.query_loss)
        assert not fts.pool.members
        assert_close(task.before_steps[8 * turn], before)
    assert_same_state(model, before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_whoever_diverges_later_leaves_its_place(value: float) -> None:
    model, task = tiny_model(), Watching()
    fts = make_fts(model, task=task)
    fts.step(0)
    before = state_of(model)
    fts.pool.members[0].displacement["conv1.weight"][0] = value
    assert fts.step(1).diverged == 1
    assert not fts.pool.members
    assert_same_state(model, before)
    assert fts.step(2).diverged == 0
    assert_close(task.before_steps[4], before)


def test_the_others_stay_when_one_diverges() -> None:
    fts = make_fts(tiny_model(), replace(METHOD, pool=2, attackers=2, chunk=1), steps=[50, 50])
    fts.step(0)
    assert set(fts.pool.members) == {0, 1}
    fts.pool.members[1].displacement["conv1.weight"][0] = math.nan
    step = fts.step(1)
    assert step.diverged == 1
    assert math.isfinite(step.query_loss)
    assert {place: member.taken for place, member in fts.pool.members.items()} == {0: 2}
    assert fts.step(2).diverged == 0
    assert {place: member.taken for place, member in fts.pool.members.items()} == {0: 3, 1: 1}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(0, 9), st.integers(1, 4))
def test_each_place_belongs_to_one_attacker_and_one_rank(attackers: int, more: int, size: int) -> None:
    """So two attackers of a step never meet, and a member's tensors lie on one rank; the places are spread evenly."""
    size = min(size, attackers)
    owned = []
    for rank in range(size):
        ranks = Ranks()
        ranks.rank, ranks.size = rank, size
        method = replace(METHOD, pool=attackers + more, attackers=attackers)
        fts = FTS(context(MODEL, method=method, sampler=SAMPLER, restricted=[RESTRICTED], ranks=ranks))
        chosen = {fts._draw((step,), index).place for step in range(3) for index in ranks.mine(attackers)}
        assert chosen <= set(fts.pool.own)
        owned.append(set(fts.pool.own))
        for index in range(attackers):
            assert fts._draw((0,), index).place % attackers == index
    assert sorted(itertools.chain(*owned)) == list(range(attackers + more))
    assert max(map(len, owned)) - min(map(len, owned)) <= -(-(attackers + more) // attackers)


def test_every_place_has_its_turn() -> None:
    fts = make_fts(tiny_model(), replace(METHOD, pool=7, attackers=3))
    drawn = {index: {fts._draw((step,), index).place for step in range(40)} for index in range(3)}
    assert drawn == {0: {0, 3, 6}, 1: {1, 4}, 2: {2, 5}}


# --- determinism --------------------------------------------------------------------------------------------------


def test_seed_and_key_decide_everything() -> None:
    def after(seed: int, *keys: int) -> tuple[list[Any], dict[str, Tensor], dict[str, Any]]:
        model = tiny_model()
        optimizers = {"adam": [1e-3, 1e-1], "sgd": [0.1, 1.0]}
        method = replace(METHOD, attackers=2, pool=3)
        fts = make_fts(model, method, seed=seed, optimizers=optimizers, heads=["kept", "fresh", "probed"])
        torch.manual_seed(id(model) % 1000)  # what came before must not matter
        return [fts.step(key) for key in keys], state_of(model) | fts.pool.tensors(), fts.pool.record()

    (first, weights, record), (again, same, recorded) = (after(0, 0, 1, 2, 3) for _ in range(2))
    assert (first, record) == (again, recorded)
    assert weights.keys() == same.keys()
    assert all(torch.equal(value, same[name]) for name, value in weights.items())
    assert after(1, 0)[0] != after(0, 0)[0] != after(0, 1)[0]


def test_a_pool_holds_no_more_than_its_places() -> None:
    """And nothing of autograd's."""
    model = tiny_model()
    fts = make_fts(
        model,
        replace(METHOD, pool=3, attackers=2),
        heads=["kept", "fresh", "probed"],
        optimizers={"adam": [0.01, 0.01]},
    )
    numbers = sum(value.numel() for value in model.parameters())
    for turn in range(12):
        fts.step(turn)
        assert len(fts.pool.members) <= 3
        tensors = fts.pool.tensors()
        assert sum(tensor.numel() for tensor in tensors.values()) <= 3 * (3 * numbers + 100)
        assert not any(tensor.requires_grad for tensor in tensors.values())


# --- the pool by itself -------------------------------------------------------------------------------------------


def displaced(model: nn.Module, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    attacker = copy.deepcopy(model)
    with torch.no_grad():
        for value in attacker.state_dict().values():
            value.add_(torch.ones_like(value) if not value.is_floating_point() else torch.rand_like(value))
    return attacker


def stocked(optimizer: str = "adam", places: tuple[int, ...] = (0, 2)) -> Pool:
    """A pool of three with members at some places, with the state of real optimizers."""
    model, pool = tiny_model(), Pool(3)
    for place in places:
        plan = FineTuneStrategy(optimizer=optimizer, lr=0.1 / 3, head="fresh", steps=40)
        attacker = displaced(model, place)
        torch_optimizer = build_optimizer(plan, attacker.parameters())
        tiny_task().attacker_loss(attacker, tiny_batches(place, 1)[0]).backward()
        torch_optimizer.step()
        pool.leave(place, plan, 1 + place, attacker, model, OWN, optimizer_state(torch_optimizer))
    return pool


def members_of(pool: Pool) -> dict[int, dict[str, Any]]:
    return {place: vars(member) for place, member in pool.members.items()}


def assert_same_members(found: Pool, expected: Pool) -> None:
    """Compare to the bit, types included."""
    assert members_of(found).keys() == members_of(expected).keys()
    for place, facts in members_of(expected).items():
        other = vars(found.members[place])
        assert all(other[name] == facts[name] for name in ("strategy", "taken", "domain"))
        assert isinstance(other["strategy"], FineTuneStrategy)
        for part in ("displacement", "buffers", "optimizer_state", "factors"):
            assert other[part].keys() == facts[part].keys()
            for name, value in facts[part].items():
                assert (other[part][name].dtype, other[part][name].shape) == (value.dtype, value.shape)
                assert torch.equal(other[part][name], value)


def test_what_is_kept_is_a_copy() -> None:
    """The scratch copy serves the next attacker, and the optimizer's tensors change in place."""
    model, pool = tiny_model(), Pool(1)
    attacker, memory = displaced(model, 0), {"0.momentum_buffer": torch.ones(2)}
    factors = OWN | {"conv1.weight": torch.full((4, 1, 1, 1), 0.5)}
    pool.leave(0, FineTuneStrategy(), 1, attacker, model, factors, memory)
    before = copy.deepcopy(members_of(pool))
    with torch.no_grad():
        for value in (
            *attacker.state_dict().values(),
            *model.state_dict().values(),
            *memory.values(),
            factors["conv1.weight"],
        ):
            value.zero_()
    kept = members_of(pool)[0]
    for part in ("displacement", "buffers", "optimizer_state", "factors"):
        for name, value in before[0][part].items():
            assert torch.equal(kept[part][name], value)
            assert value.any() or part == "factors"


def test_entering_twice_is_entering_once() -> None:
    pool, model = stocked(), tiny_model()
    found = []
    for seed in (7, 8):
        attacker = displaced(model, seed)
        pool.enter(2, attacker, model)
        found.append(state_of(attacker))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_a_member_follows_what_is_released_by_its_factors() -> None:
    """Released weights move by one; a part of each goes into the attacker: all, half by channel, none."""
    model, pool = tiny_model(), Pool(1)
    attacker = displaced(model, 0)
    half = torch.tensor([0.5, -2.0, 0.0, 1.0], dtype=torch.float64).view(4, 1, 1, 1)
    factors = OWN | {"conv1.weight": half, "bn1.weight": 0.0, "bn2.weight": 0.25}
    before = parameters_of(attacker)
    pool.leave(0, FineTuneStrategy(), 1, attacker, model, factors, {}, domain=2)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(1.0)
    member = pool.enter(0, displaced(model, 1), model)
    entered = displaced(model, 2)
    pool.enter(0, entered, model)
    for name, value in entered.named_parameters():
        moved = torch.as_tensor(factors.get(name, 1.0), dtype=value.dtype)
        torch.testing.assert_close(value.detach(), before[name] + moved)
    assert member.domain == 2


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_moments_round_trip(optimizer: str) -> None:
    """Two steps with the state moved to another optimizer in between are two steps of one."""
    plan = FineTuneStrategy(optimizer=optimizer, lr=0.01)

    def train(move: bool) -> dict[str, Tensor]:
        model = tiny_model()
        optimizer = build_optimizer(plan, model.parameters())
        for batch in tiny_batches(3, 3):
            optimizer.zero_grad()
            tiny_task().attacker_loss(model, batch).backward()
            optimizer.step()
            if move:
                saved, optimizer = optimizer_state(optimizer), build_optimizer(plan, model.parameters())
                restore_optimizer(optimizer, saved)
        return state_of(model)

    expected = train(False)
    assert all(torch.equal(value, expected[name]) for name, value in train(True).items())


def test_moments_of_weights_without_gradient() -> None:
    """A weight that the loss never reached has none, and gets none back."""
    weights = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = torch.optim.Adam(weights)
    weights[1].grad = torch.ones(2)
    optimizer.step()
    saved = optimizer_state(optimizer)
    assert set(saved) == {"1.step", "1.exp_avg", "1.exp_avg_sq"}
    other = torch.optim.Adam(weights)
    restore_optimizer(other, saved)
    assert list(other.state) == [weights[1]]
    assert optimizer_state(torch.optim.SGD(weights)) == {}


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("places", [(), (1,), (0, 2), (0, 1, 2)])
def test_a_state_file_holds_the_pool(optimizer: str, places: tuple[int, ...], tmp_path: Path) -> None:
    pool, again = stocked(optimizer, places), Pool(3)
    again.members[1] = Member(FineTuneStrategy(), 9, {}, {}, {})  # whoever was there is gone
    write_tensors(tmp_path / "pool.safetensors", pool.tensors(), {"pool": pool.record()})
    tensors, metadata = read_tensors(tmp_path / "pool.safetensors")
    again.restore(tensors, metadata["pool"])
    assert_same_members(again, pool)
    part = Pool(3, {2})  # where one process of several holds one place
    part.restore(tensors, metadata["pool"])
    assert set(part.members) == {2} & set(places)
    assert all(torch.equal(value, pool.tensors()[name]) for name, value in part.tensors().items())


NAMES = st.text(st.sampled_from("ab./0 -é"), min_size=1, max_size=8)
TENSORS = st.sampled_from(
    [torch.tensor(3.0), torch.arange(3), torch.ones(2, 0), torch.full((2, 3), 0.1, dtype=torch.float64)]
)


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.integers(0, 20),
        st.tuples(*[st.dictionaries(NAMES, TENSORS, max_size=3)] * 4, st.integers(1, 99)),
        max_size=3,
    )
)
def test_whatever_the_names(tmp_path_factory: pytest.TempPathFactory, places: dict[int, Any]) -> None:
    """Slashes and dots too, as modules may be called."""
    pool, again = Pool(21), Pool(21)
    for place, (*parts, taken) in places.items():
        pool.members[place] = Member(FineTuneStrategy(lr=0.1 / 3, head="kept"), taken, *parts)
    path = tmp_path_factory.mktemp("pool") / "state.safetensors"
    write_tensors(path, pool.tensors(), {"pool": pool.record()})
    tensors, metadata = read_tensors(path)
    again.restore(tensors, metadata["pool"])
    assert_same_members(again, pool)


# --- the configuration --------------------------------------------------------------------------------------------


def test_only_first_order_attackers_go_on() -> None:
    def settle(**method: Any) -> None:
        check(MethodConfig(name="test", **method), "method")

    settle(pool=2)
    settle(pool=0, engine="second_order")
    with pytest.raises(UserError, match=r"^method.pool: not allowed with engine second_order; .*first_order$"):
        settle(pool=2, engine="second_order")
    settle(pool=3, attackers=3)
    settle(pool=0, attackers=3)
    with pytest.raises(UserError, match=r"^method.pool: 2 is not allowed with 3 attackers; .* at least as many$"):
        settle(pool=2, attackers=3)


def test_a_record_is_plain_data() -> None:
    pool = stocked()
    assert pool.record() == {
        "0": {"strategy": pool.members[0].strategy.plain(), "taken": 1, "domain": 0},
        "2": {"strategy": pool.members[2].strategy.plain(), "taken": 3, "domain": 0},
    }
