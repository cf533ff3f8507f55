"""The first-order engine's economies: none of them changes what an attacker does or teaches, and nothing piles up."""

from __future__ import annotations

import copy
import gc
import itertools
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from sophon.attacker import SIMULATED, FineTuneStrategy, learning_rate
from sophon.optimizers import build_optimizer
from sophon.protection.inner_loop import Past, Simulation, frozen_statistics, query_weights
from sophon.protection.meta_gradient.first_order import first_order
from sophon.tasks import ClassificationTask
from tests.tiny import CLASSES, TinyNet, state_of, tiny_batches, tiny_model, tiny_spec, tiny_task

STEPS = 4
ADAPT = tiny_batches(1, STEPS)
QUERY = tiny_batches(2, STEPS)
GAMMA = query_weights("linear", STEPS, 1)
PLAN = FineTuneStrategy(optimizer="adam", lr=0.01, steps=STEPS, schedule="cosine", weight_decay=0.01)


def simulate(attacker: nn.Module, plan: FineTuneStrategy = PLAN, gammas: list[float] = GAMMA) -> Simulation:
    return first_order(attacker, plan, tiny_task(), iter(ADAPT), iter(QUERY), gammas)


def plainly(attacker: nn.Module, plan: FineTuneStrategy) -> dict[str, Tensor]:
    """Fine-tune with torch's default optimizer and ``autograd.grad``; return the weighted sum of query gradients."""
    task = tiny_task()
    trainable = task.train_mode(attacker, plan.scope)
    parameters = dict(attacker.named_parameters())
    optimizer = build_optimizer(plan, trainable.values())
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for step, (adapt, query) in enumerate(zip(ADAPT, QUERY, strict=True)):
        optimizer.param_groups[0]["lr"] = learning_rate(plan, step)
        optimizer.zero_grad()
        task.attacker_loss(attacker, adapt).backward()
        optimizer.step()
        before = state_of(attacker)
        found = torch.autograd.grad(task.suppression_loss(attacker, query), list(parameters.values()))
        attacker.load_state_dict(before)
        for name, gradient in zip(total, found, strict=True):
            total[name] += GAMMA[step] * gradient
    return total


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


@pytest.mark.parametrize("scope", ["all", "head"])
@pytest.mark.parametrize("optimizer", SIMULATED)
def test_weights_in_channels_last_make_no_difference(optimizer: str, scope: str) -> None:
    """The layout that released classifiers have; a fused kernel would step the wrong weights if it were mixed up."""
    model = tiny_model().to(memory_format=torch.channels_last)
    assert not model.conv2.weight.is_contiguous()
    plan = replace(PLAN, optimizer=optimizer, scope=scope)
    attacker, reference = copy.deepcopy(model), copy.deepcopy(model)
    expected, found = plainly(reference, plan), simulate(attacker, plan).gradients
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-13)
    for name, value in attacker.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[name], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("optimizer", SIMULATED)
def test_fused_optimizers_step_as_the_default_ones(optimizer: str, layout: torch.memory_format) -> None:
    """In float32, 20 steps along the same gradients: within the tolerance that `build_optimizer` states."""
    torch.manual_seed(0)
    start, lr = [torch.randn(8, 4, 3, 3), torch.randn(5)], 1e-2
    gradients = [[torch.randn_like(value) for value in start] for _ in range(20)]
    ends = []
    for fused in (False, True):
        weights = [start[0].to(memory_format=layout), start[1].clone()]
        weights = [value.clone().requires_grad_() for value in weights]
        plan = FineTuneStrategy(optimizer=optimizer, lr=lr, weight_decay=0.01)
        stepper = build_optimizer(plan, weights, fused=fused)
        for found in gradients:
            # as backward() leaves them
            for weight, gradient in zip(weights, found, strict=True):
                weight.grad = torch.empty_like(weight).copy_(gradient)
            stepper.step()
        ends.append(weights)
    for one, other, before in zip(*ends, start, strict=True):
        assert not torch.equal(one, before)
        torch.testing.assert_close(other, one, rtol=1e-6, atol=20 * lr * 1e-5)


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


@pytest.mark.parametrize(("every", "queries"), [(1, 5), (2, 3), (3, 2), (9, 1)])
def test_query_every_saves_whole_passes(every: int, queries: int) -> None:
    """K steps and a query at every m-th of them and the last: K + ceil(K / m) passes, forward and backward."""
    steps, passes = 5, {"forward": 0, "backward": 0}

    def count(direction: str) -> None:
        passes[direction] += 1

    attacker = tiny_model()
    attacker.fc.register_forward_hook(lambda *_: count("forward"))
    attacker.fc.register_full_backward_hook(lambda *_: count("backward"))
    adapt, query = itertools.cycle(ADAPT), itertools.cycle(QUERY)
    plan = replace(PLAN, steps=steps)
    run = first_order(attacker, plan, tiny_task(), adapt, query, query_weights("uniform", steps, every))
    assert len(run.query_losses) == queries
    assert passes == {"forward": steps + queries, "backward": steps + queries}


def test_nothing_is_remembered_for_weights_that_do_not_move() -> None:
    """The passes of an attacker who trains the head build no graph of the body; those of a query do."""
    attacker, graphs = tiny_model(), []
    attacker.bn2.register_forward_hook(lambda *args: graphs.append(args[-1].requires_grad))
    run = simulate(attacker, replace(PLAN, scope="head"), query_weights("uniform", STEPS, 2))
    assert graphs == [False, False, True, False, False, True]
    assert float(run.gradients["conv1.weight"].norm()) > 0
    assert all(parameter.requires_grad for parameter in attacker.parameters())


def test_what_no_query_reaches_gets_zeros() -> None:
    """Nothing is asked at all, or a weight takes no part; and a weight that the attacker's loss misses stays put."""
    attacker = tiny_model()
    attacker.spare = nn.Linear(2, 2).double()
    before = attacker.spare.weight.detach().clone()
    found = simulate(attacker).gradients
    assert found["spare.weight"].shape == (2, 2)
    assert not found["spare.weight"].any()
    assert found["fc.weight"].any()
    assert torch.equal(attacker.spare.weight, before)
    assert not any(value.any() for value in simulate(attacker, gammas=[0.0] * STEPS).gradients.values())


@pytest.mark.parametrize("momentum", [0.1, None])
def test_queries_leave_no_trace_in_statistics(momentum: float | None) -> None:
    """Not in the count of batches either, which cumulative averages divide by."""
    model = tiny_model()
    model.bn1.momentum = model.bn2.momentum = momentum
    queried, alone = copy.deepcopy(model), copy.deepcopy(model)
    simulate(queried)
    simulate(alone, gammas=[0.0] * STEPS)
    for name, buffer in queried.named_buffers():
        assert torch.equal(buffer, alone.get_buffer(name))
        assert not torch.equal(buffer, model.get_buffer(name))


def test_frozen_statistics_end_with_their_block() -> None:
    model = TinyNet()
    model.bn2.track_running_stats = False  # one that never records
    with frozen_statistics(model):
        assert not model.bn1.track_running_stats
    with pytest.raises(ValueError, match="expected 4D"), frozen_statistics(model):
        model.bn1(torch.zeros(4))
    assert model.bn1.track_running_stats
    assert not model.bn2.track_running_stats


def test_rounds_leave_no_tensors_behind() -> None:
    """As many are alive after 40 rounds as after 5."""
    model = tiny_model()
    scratch, alive = copy.deepcopy(model), []
    for rounds in (5, 35):
        for _ in range(rounds):
            scratch.load_state_dict(model.state_dict())
            simulate(scratch)
        gc.collect()
        alive.append(sum(issubclass(type(found), Tensor) for found in gc.get_objects()))
    assert alive[0] == alive[1]


CHILD = """
import copy, itertools, sys, torch
from sophon.domains import Batch
from sophon.models import ModelSpec, build
from sophon.protection.meta_gradient.first_order import first_order
from sophon.protection.inner_loop import query_weights
from sophon.attacker import FineTuneStrategy
from sophon.optimizers import build_optimizer
from sophon.tasks import ClassificationTask
torch.set_num_threads(1)
torch.manual_seed(0)
small = {"layers": [1, 1, 1, 1], "channels": [32, 64, 128, 128], "stem_type": "deep", "stem_width": 16}
spec = ModelSpec("timm", "resnet18", tuple("0123456789"), 3, 32, (0.5,) * 3, (0.5,) * 3, small)
def stream(size):
    images = torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8)
    return itertools.repeat(Batch(images, torch.randint(0, 10, (size,))))
task = ClassificationTask(spec, suppression_loss="klu")
model = build(spec)
def memory(key):  # kB; ru_maxrss would be that of the parent where it is larger
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])
def simulate(steps, batches):
    plan = FineTuneStrategy(optimizer="adam", lr=1e-4, steps=steps)
    first_order(model, plan, task, batches, batches, query_weights("uniform", steps, 1))
def train(steps, batches):
    model.train()
    optimizer = build_optimizer(FineTuneStrategy(optimizer="adam", lr=1e-4), model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        task.attacker_loss(model, next(batches)).backward()
        optimizer.step()
def peak(work, *arguments):
    model.zero_grad()  # what training has left
    before = memory("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # begin the peak anew
    work(*arguments)
    print(memory("VmHWM") - before)
for work in (train, simulate):  # what a first pass adds
    work(1, stream(32))
print(sum(weight.nbytes for weight in model.parameters()) // 1024)
for work, steps in ((train, 3), (simulate, 3), (simulate, 20)):
    peak(work, steps, stream(32))
batches = stream(2)
for count in (5, 25):
    for _ in range(count):
        simulate(1, batches)
    print(memory("VmRSS"))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_steps_or_rounds() -> None:
    """A round's part of a process's peak: at K = 20 as at K = 3, which is that of training and one sum of gradients.

    After 30 rounds the process is as large as after 5, give or take a megabyte of an allocator's own.
    """
    # glibc otherwise raises this threshold as it goes, and what it then keeps for itself is not the run's
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", CHILD], env=environment, check=True, capture_output=True, text=True)
    weights, plain, few, many, early, late = map(int, done.stdout.split())
    assert 0 < many < 1.02 * few
    assert few < 1.02 * (plain + weights)
    assert late - early < 1024
