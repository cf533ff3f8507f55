"""Persistent attackers against one that is never interrupted, and what they must not carry along."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sophon.attacker import OPTIMIZERS, SIMULATED, FineTuneStrategy
from sophon.config import MethodConfig
from sophon.domains import Batch, ImageSet
from sophon.errors import UserError
from sophon.protection import simulated_attackers as making
from sophon.protection.distributed import Ranks
from sophon.protection.fts import FTS
from sophon.protection.persistent_attackers import Pool
from sophon.ranges import check
from sophon.tasks import ClassificationTask
from tests.protection.staged import context
from tests.protection.test_fts import HEAD, RESTRICTED, SAMPLER, parameters_of
from tests.protection.test_fts import make_fts as fts_of
from tests.tiny import assert_same_state, state_of, tiny_model, tiny_spec, tiny_task

METHOD = MethodConfig(name="test", fts_lr=1e-2, query_batch_size=9, probe_steps=2, pool=1, chunk=2)
OWN = dict.fromkeys(HEAD, 0.0)  # factors of an attacker whose head is not released
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
    model: nn.Module, method: MethodConfig = METHOD, task: ClassificationTask | None = None, **changes: Any
) -> FTS:
    return fts_of(model, method, task=task, **{"steps": [6, 6]} | changes)


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
    optimizer: Any = getattr(torch.optim, kind.rpartition(".")[2])(
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


@pytest.mark.parametrize(
    ("optimizer", "schedule", "chunk"),
    [*((each, "cosine", 7) for each in SIMULATED), ("sgd", "cosine", 50), ("adam", "warmup", 1)],
)
def test_turns_are_one_attackers_life(optimizer: str, schedule: str, chunk: int, drawn: dict[str, list[Batch]]) -> None:
    """While the released weights stay: its weights, optimizer, statistics, rates and query gradients, step by step."""
    model, task = tiny_model(), Watching()
    released = state_of(model)
    rate = RATES.get(optimizer, 0.02)
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


def displaced(model: nn.Module, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    attacker = copy.deepcopy(model)
    with torch.no_grad():
        for value in attacker.state_dict().values():
            value.add_(torch.ones_like(value) if not value.is_floating_point() else torch.rand_like(value))
    return attacker


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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pool": 2, "engine": "second_order"}, "not allowed with engine second_order; .*first_order"),
        ({"pool": 2, "attackers": 3}, "2 is not allowed with 3 attackers; .* at least as many"),
    ],
)
def test_a_pool_that_cannot_be_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=rf"^method.pool: {words}$"):
        check(MethodConfig(name="test", **changes), "method")
