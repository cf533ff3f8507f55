"""The first-order engine's economies: none of them changes what an attacker does or teaches, and nothing piles up."""

from __future__ import annotations

import copy
import gc
import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from sophon.attacker import FineTuneStrategy
from sophon.protection.inner_loop import Past, Simulation, query_weights
from sophon.protection.meta_gradient.first_order import first_order
from sophon.tasks import ClassificationTask
from tests.tiny import CLASSES, tiny_batches, tiny_model, tiny_spec, tiny_task

STEPS = 4
ADAPT = tiny_batches(1, STEPS)
QUERY = tiny_batches(2, STEPS)
GAMMA = query_weights("linear", STEPS, 1)
PLAN = FineTuneStrategy(optimizer="adam", lr=0.01, steps=STEPS, schedule="cosine", weight_decay=0.01)


def simulate(attacker: nn.Module, plan: FineTuneStrategy = PLAN, gammas: list[float] = GAMMA) -> Simulation:
    return first_order(attacker, plan, tiny_task(), iter(ADAPT), iter(QUERY), gammas)


def test_in_bfloat16_the_gradient_stays_near() -> None:
    """With AMP on the CPU, its losses still in float32: here within two hundredths of its norm."""
    plan, found = replace(PLAN, optimizer="sgd"), []
    for amp in (False, True):
        task = ClassificationTask(tiny_spec(), suppression_loss="klu", amp=amp)
        simulation = first_order(tiny_model().float(), plan, task, iter(ADAPT), iter(QUERY), GAMMA)
        found.append(torch.cat([gradient.flatten() for gradient in simulation.gradients.values()]))
    exact, rounded = found
    assert rounded.dtype == torch.float32
    assert 1e-4 < (rounded - exact).norm() / exact.norm() < 0.02


def test_moments_come_back_in_the_layout_of_their_weights() -> None:
    """Read from a file they are contiguous; an attacker goes on with the same bits as one that never paused."""
    model = tiny_model().to(memory_format=torch.channels_last)
    task, adapt, query = tiny_task(), iter(ADAPT), iter(QUERY)
    moments = first_order(model, PLAN, task, adapt, query, GAMMA[:2]).optimizer_state or {}
    runs = []
    for layout in (torch.preserve_format, torch.contiguous_format):
        attacker = copy.deepcopy(model)
        past = Past(2, {name: value.clone(memory_format=layout) for name, value in moments.items()})
        runs.append((first_order(attacker, PLAN, task, iter(ADAPT[2:]), iter(QUERY[2:]), GAMMA[2:], past), attacker))
    assert not all(value.is_contiguous() for value in moments.values())
    assert_same_run(*runs)


def assert_same_run(one: tuple[Simulation, nn.Module], other: tuple[Simulation, nn.Module]) -> None:
    """Compare to the bit."""
    (run, attacker), (again, reused) = one, other
    assert run.query_losses == again.query_losses
    assert run.attacker_losses == again.attacker_losses
    for found, expected in (
        (again.gradients, run.gradients),
        (again.optimizer_state or {}, run.optimizer_state or {}),
        (reused.state_dict(), attacker.state_dict()),
    ):
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_used_scratch_is_as_good_as_a_fresh_one() -> None:
    """Attackers of all kinds follow one another on one scratch copy; frozen statistics stay as they were released."""
    model, task = tiny_model(), tiny_task()
    scratch = copy.deepcopy(model)
    plans = itertools.product(("adam", "momentum"), ("all", "head"), ("kept", "fresh"), (1, 2), ("trained", "frozen"))
    for index, (optimizer, scope, head, every, batch_norm) in enumerate(plans):
        plan = replace(PLAN, optimizer=optimizer, scope=scope, head=head, batch_norm=batch_norm)
        gammas = query_weights("uniform", STEPS, every)
        runs = []
        for attacker in (copy.deepcopy(model), scratch):
            with torch.no_grad():
                for name, value in attacker.state_dict().items():
                    value.copy_(model.state_dict()[name])
            torch.manual_seed(index)
            task.start_head(attacker, head, CLASSES)
            attacker.double()
            runs.append((simulate(attacker, plan, gammas), attacker))
        assert_same_run(*runs)
        stays = all(torch.equal(value, dict(model.named_buffers())[name]) for name, value in scratch.named_buffers())
        assert stays == (batch_norm == "frozen" or scope == "head")


@pytest.mark.slow
def test_rounds_leave_no_tensors_behind() -> None:
    """As many are alive after 12 rounds as after 3."""
    model = tiny_model()
    scratch, alive = copy.deepcopy(model), []
    for rounds in (3, 9):
        for _ in range(rounds):
            scratch.load_state_dict(model.state_dict())
            simulate(scratch)
        gc.collect()
        alive.append(sum(issubclass(type(found), Tensor) for found in gc.get_objects()))
    assert alive[0] == alive[1]
