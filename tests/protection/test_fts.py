"""FTS steps against Adam by hand, and what they must leave alone: statistics, foreign heads, diverging attackers."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sophon.attacker import FineTuneStrategy
from sophon.config import MethodConfig
from sophon.domains import Batch, LoadedDomain, MemoryImages, batches
from sophon.errors import UserError
from sophon.protection import attackers as making
from sophon.protection import fts as fts_module
from sophon.protection.fts import ENGINES, FTS
from sophon.protection.inner_loop import Simulation, query_weights
from sophon.sampler import SamplerConfig, StrategySampler
from sophon.seeds import derive_seed
from sophon.tasks import ClassificationTask, Task
from tests.protection.staged import context
from tests.tiny import CLASSES, assert_same_state, state_of, tiny_bands, tiny_model, tiny_spec, tiny_task

RESTRICTED = tiny_bands("restricted", ("adapt", "query"), seed=10, across=True)
METHOD = MethodConfig(name="test", fts_lr=1e-2, query_batch_size=9, probe_steps=3, gamma="linear", query_every=2)
HEAD = {"fc.weight", "fc.bias"}


SAMPLER = SamplerConfig({"momentum": [0.05, 0.05]}, batch_sizes=[8], steps=[3, 3], heads=["kept"])


def make_fts(
    model: nn.Module,
    method: MethodConfig = METHOD,
    seed: int = 0,
    task: Task | None = None,
    domains: Sequence[LoadedDomain] = (RESTRICTED,),
    **changes: Any,
) -> FTS:
    sampler = replace(SAMPLER, **changes)
    return FTS(context(model, task, method, sampler=sampler, restricted=domains, seed=seed))


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[FineTuneStrategy, Simulation]]:
    """Every simulation that a fts runs, probing included."""
    runs: list[tuple[FineTuneStrategy, Simulation]] = []

    def recorded(engine: Any) -> Any:
        def run(attacker: nn.Module, strategy: FineTuneStrategy, *rest: Any, **settings: Any) -> Simulation:
            simulation = engine(attacker, strategy, *rest, **settings)
            runs.append((strategy, simulation))
            return simulation

        return run

    monkeypatch.setattr(fts_module, "ENGINES", {name: recorded(engine) for name, engine in ENGINES.items()})
    monkeypatch.setattr(making, "first_order", recorded(ENGINES["first_order"]))  # which probes
    return runs


def adam_by_hand(
    parameters: dict[str, Tensor], gradients: Sequence[dict[str, Tensor]], lr: float = METHOD.fts_lr
) -> dict[str, Tensor]:
    """Take one step of Adam for each dictionary of gradients."""
    moved = {name: value.clone() for name, value in parameters.items()}
    first = {name: torch.zeros_like(value) for name, value in moved.items()}
    second = copy.deepcopy(first)
    for step, found in enumerate(gradients, start=1):
        for name, gradient in found.items():
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            root = (second[name] / (1 - 0.999**step)).sqrt() + 1e-8
            moved[name] -= lr * first[name] / (1 - 0.9**step) / root
    return moved


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def assert_close(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.detach(), expected[name], rtol=1e-10, atol=1e-12)


# --- the step -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("attackers", [1, 3])
def test_steps_equal_adam_on_the_mean_gradient(
    engine: str, attackers: int, simulated: list[tuple[FineTuneStrategy, Simulation]]
) -> None:
    model = tiny_model()
    start = parameters_of(model)
    fts = make_fts(model, replace(METHOD, engine=engine, attackers=attackers))
    steps = [fts.step(0, index) for index in range(3)]
    assert len(simulated) == 3 * attackers
    means = []
    for index, step in enumerate(steps):
        runs = [run for _, run in simulated[index * attackers : (index + 1) * attackers]]
        means.append({name: sum(run.gradients[name] for run in runs) / attackers for name in start})
        queries = [loss for run in runs for loss in run.query_losses]
        assert len(queries) == 2 * attackers  # after steps 2 and 3 of three
        assert step.query_loss == pytest.approx(sum(queries) / len(queries))
        assert step.attacker_loss == pytest.approx(sum(run.attacker_losses[-1] for run in runs) / attackers)
        assert step.gradient_norm == pytest.approx(math.sqrt(sum(float((g**2).sum()) for g in means[-1].values())))
        assert step.diverged == 0
    assert_close(model, adam_by_hand(start, means))


def test_gradient_is_that_of_the_attacker_on_adapt_and_query() -> None:
    """Rebuilt from the seed: the strategy, then the attacker's batches of adapt, then the defender's of query."""
    model = tiny_model()
    start = parameters_of(model)
    generator = torch.Generator().manual_seed(derive_seed(4, "fts", 7, 0))
    plan = StrategySampler(SAMPLER).sample(generator)

    def stream(split: str, size: int) -> Iterator[Batch]:
        seed = int(torch.randint(2**62, (), generator=generator))
        return batches(RESTRICTED[split], size, torch.Generator().manual_seed(seed))

    adapt, query = stream("adapt", 8), stream("query", 9)
    gammas = query_weights("linear", 3, 2)
    run = ENGINES["first_order"](copy.deepcopy(model), plan, tiny_task(), adapt, query, gammas)
    step = make_fts(model, seed=4).step(7)
    assert step.query_loss == pytest.approx(sum(run.query_losses) / 2)
    assert_close(model, adam_by_hand(start, [run.gradients]))


def test_steps_lower_the_suppression_loss() -> None:
    model = tiny_model()
    fts = make_fts(model, replace(METHOD, fts_lr=0.02, query_every=1))
    losses = [fts.step(index).query_loss for index in range(40)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_clipping(simulated: list[tuple[FineTuneStrategy, Simulation]]) -> None:
    """The norm reported is the one before clipping; Adam sees the clipped gradient."""
    model = tiny_model()
    fts = make_fts(model, replace(METHOD, fts_max_norm=1e-3))
    step = fts.step(0)
    assert step.gradient_norm > 1e-2
    moments = [state["exp_avg"] for state in fts.optimizer.state.values()]
    norm = math.sqrt(sum(float((moment**2).sum()) for moment in moments)) / 0.1
    assert norm == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("heads", [["kept"], ["fresh"], ["probed"], ["kept", "fresh", "probed"]])
def test_released_statistics_and_modes_stay(engine: str, heads: list[str]) -> None:
    model = tiny_model().eval()
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    assert any(name.endswith("num_batches_tracked") for name in buffers)
    fts = make_fts(model, replace(METHOD, engine=engine), heads=heads)
    for index in range(4):
        fts.step(index)
    for name, value in model.named_buffers():
        assert torch.equal(value, buffers[name]), name
    assert not any(part.training for part in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


# --- the original domain's gradient, and the rate ----------------------------------------------------------------


def anchor_of(model: nn.Module, seed: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in model.named_parameters()}


@pytest.mark.parametrize("heads", [["kept"], ["fresh"]])
@pytest.mark.parametrize("attackers", [1, 3])
def test_anchor_is_added_with_its_weight(
    attackers: int, heads: list[str], simulated: list[tuple[FineTuneStrategy, Simulation]]
) -> None:
    """To the mean over the attackers, once; the released head follows it also where no attacker keeps that head."""
    model = tiny_model()
    start, anchors = parameters_of(model), [anchor_of(model, seed) for seed in (5, 6)]
    before = copy.deepcopy(anchors)
    fts = make_fts(model, replace(METHOD, attackers=attackers, fts_original_weight=0.7), heads=heads)
    steps = [fts.step(index, anchor=anchor) for index, anchor in enumerate(anchors)]
    sums = []
    for index, step in enumerate(steps):
        runs = [run for _, run in simulated[index * attackers : (index + 1) * attackers]]
        learned = {
            name: sum(run.gradients[name] for run in runs) / attackers if heads == ["kept"] or name not in HEAD else 0
            for name in start
        }
        sums.append({name: learned[name] + 0.7 * anchors[index][name] for name in start})
        assert step.gradient_norm == pytest.approx(math.sqrt(sum(float((g**2).sum()) for g in sums[-1].values())))
    assert_close(model, adam_by_hand(start, sums))
    for given, copied in zip(anchors, before, strict=True):
        assert all(torch.equal(given[name], value) for name, value in copied.items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_anchor_leaves_the_simulation_alone(simulated: list[tuple[FineTuneStrategy, Simulation]]) -> None:
    """The attackers, and what they teach, are those of a step without it."""
    model, other = tiny_model(), tiny_model()
    one = make_fts(model, replace(METHOD, fts_original_weight=2.0)).step(0, anchor=anchor_of(model))
    two = make_fts(other, METHOD).step(0)
    assert (one.query_loss, one.attacker_loss) == (two.query_loss, two.attacker_loss)
    (_, found), (_, expected) = simulated
    assert all(torch.equal(found.gradients[name], value) for name, value in expected.gradients.items())
    assert one.gradient_norm != two.gradient_norm


def test_weight_without_anchor_adds_nothing() -> None:
    models = [tiny_model(), tiny_model()]
    for model, weight in zip(models, (0.0, 3.0), strict=True):
        make_fts(model, replace(METHOD, fts_original_weight=weight)).step(0)
    assert_same_state(models[0], state_of(models[1]))


def test_clipping_is_of_the_sum() -> None:
    model = tiny_model()
    anchor = {name: 1e3 * value for name, value in anchor_of(model).items()}
    fts = make_fts(model, replace(METHOD, fts_max_norm=1e-3, fts_original_weight=1.0))
    step = fts.step(0, anchor=anchor)
    length = math.sqrt(sum(float((value**2).sum()) for value in anchor.values()))
    assert step.gradient_norm == pytest.approx(length, rel=1e-2)
    moments = [state["exp_avg"] / 0.1 for state in fts.optimizer.state.values()]
    assert math.sqrt(sum(float((moment**2).sum()) for moment in moments)) == pytest.approx(1e-3, rel=1e-3)
    for moment, value in zip(moments, anchor.values(), strict=True):
        torch.testing.assert_close(moment * length / 1e-3, value, rtol=0.05, atol=20)


def test_factor_is_on_the_rate_of_its_step_alone(simulated: list[tuple[FineTuneStrategy, Simulation]]) -> None:
    model = tiny_model()
    start, half = parameters_of(model), {}
    fts = make_fts(model)
    fts.step(0, factor=0.5)
    half = parameters_of(model)
    assert_close(model, adam_by_hand(start, [simulated[0][1].gradients], 0.5 * METHOD.fts_lr))
    fts.step(1)
    gradients = [run.gradients for _, run in simulated]
    zero = {name: torch.zeros_like(value) for name, value in start.items()}
    both, first = adam_by_hand(zero, gradients), adam_by_hand(zero, gradients[:1])
    assert_close(model, {name: half[name] + both[name] - first[name] for name in half})


# --- heads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("heads", "moves"), [(["kept"], True), (["fresh"], False), (["probed", "fresh"], False)])
def test_only_a_kept_heads_gradient_is_applied(engine: str, heads: list[str], moves: bool) -> None:
    model = tiny_model()
    before = parameters_of(model)
    fts = make_fts(model, replace(METHOD, engine=engine, attackers=2), heads=heads)
    for index in range(3):
        fts.step(index)
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) == (name in HEAD and not moves), name


def begun(fts: FTS, plan: FineTuneStrategy) -> nn.Module:
    return fts.attackers.begin(plan, 0, torch.Generator())[0]


def test_fresh_heads_differ_and_leave_the_released_one() -> None:
    model = tiny_model()
    fts = make_fts(model, heads=["fresh"])
    plan = FineTuneStrategy(head="fresh")
    torch.manual_seed(1)
    one = begun(fts, plan).fc.weight.detach().clone()
    two = begun(fts, plan).fc.weight.detach().clone()
    assert not torch.equal(one, two)
    assert not torch.equal(one, model.fc.weight)


def test_mixed_heads_average_over_all_attackers(simulated: list[tuple[FineTuneStrategy, Simulation]]) -> None:
    """A dropped head counts as a gradient of zero, so the kept head's share is 1 / N as everywhere."""
    model = tiny_model()
    start = parameters_of(model)
    make_fts(model, replace(METHOD, attackers=6), heads=["kept", "fresh"]).step(0)
    assert {strategy.head for strategy, _ in simulated} == {"kept", "fresh"}
    mean = {
        name: sum(run.gradients[name] for strategy, run in simulated if strategy.head == "kept" or name not in HEAD) / 6
        for name in start
    }
    assert_close(model, adam_by_hand(start, [mean]))


def probe_loss(fts: FTS) -> float:
    """The remembered head's loss on adapt, on the released features."""
    net = copy.deepcopy(fts.model).eval()
    with torch.no_grad():
        for name, value in fts.attackers.probed[0].items():
            net.get_parameter(name).copy_(value)
    adapt = RESTRICTED["adapt"]
    return tiny_task().attacker_loss(net, Batch(adapt.images, adapt.labels)).item()


def test_probed_head_is_refreshed_and_remembered(simulated: list[tuple[FineTuneStrategy, Simulation]]) -> None:
    fts = make_fts(tiny_model(), replace(METHOD, fts_lr=1e-9, probe_steps=20, probe_lr=0.05), heads=["probed"])
    losses = [probe_loss(fts)]
    for index in range(4):
        fts.step(index)
        losses.append(probe_loss(fts))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]
    probes, attacks = simulated[::2], simulated[1::2]
    assert {plan.scope for plan, _ in probes} == {"head"}
    assert {plan.optimizer for plan, _ in probes} == {"adam"}
    assert {plan.lr for plan, _ in probes} == {0.05}
    # what is remembered is the head after probing, before the attack: each attack begins where its probe ended
    for (_, probe), (_, run) in zip(probes, attacks, strict=True):
        assert len(probe.attacker_losses) == 20
        assert run.attacker_losses[0] < 1.2 * probe.attacker_losses[-1]


def test_refreshing_moves_the_head_alone() -> None:
    model = tiny_model()
    fts = make_fts(model, heads=["probed"])
    fts.attackers.refresh_probe(0, "a step")
    scratch = fts.attackers.scratch(FineTuneStrategy(head="probed"), 0).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(scratch[name], value) == (name not in HEAD), name
    assert all(torch.equal(scratch[name], fts.attackers.probed[0][name]) for name in HEAD)


@pytest.mark.parametrize("index", range(8))
def test_probed_once_a_step(
    index: int, simulated: list[tuple[FineTuneStrategy, Simulation]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before all attackers, if any of them starts from the probed head; they then all start from the same."""
    model = tiny_model()
    fts = make_fts(model, replace(METHOD, attackers=3), heads=["kept", "fresh", "probed"], steps=[1, 1])
    before, starts = copy.deepcopy(fts.attackers.probed[0]), []
    begin = fts.attackers.begin

    def watched(strategy: FineTuneStrategy, *rest: Any) -> Any:
        started, factors = begin(strategy, *rest)
        starts.append((strategy, state_of(started)))
        return started, factors

    monkeypatch.setattr(fts.attackers, "begin", watched)
    fts.step(index)
    plans = [plan for plan, _ in simulated]
    probes = [plan for plan in plans if plan.scope == "head"]
    assert probes == plans[: len(probes)]
    assert len(plans) - len(probes) == 3
    assert len(probes) == any(plan.head == "probed" for plan in plans[len(probes) :])
    for plan, state in starts[len(probes) :]:
        if plan.head == "probed":
            assert all(torch.equal(state[name], value) for name, value in fts.attackers.probed[0].items())
    moved = any(not torch.equal(fts.attackers.probed[0][name], before[name]) for name in HEAD)
    assert moved == bool(probes)


def test_no_probing_without_steps() -> None:
    fts = make_fts(tiny_model(), replace(METHOD, probe_steps=0), heads=["probed"])
    before = copy.deepcopy(fts.attackers.probed[0])
    fts.step(0)
    assert all(torch.equal(fts.attackers.probed[0][name], before[name]) for name in HEAD)


@pytest.mark.parametrize("classes", [2, 5])
def test_other_classes_than_the_original(classes: int) -> None:
    names = tuple("vwxyz"[:classes])
    splits = {}
    for split, part in RESTRICTED.splits.items():
        labels = torch.arange(len(part)) % classes
        splits[split] = MemoryImages(part.images, labels, names)
    domain = LoadedDomain("other", names, splits, {})
    model = tiny_model()
    before = parameters_of(model)
    with pytest.raises(UserError, match=f"the model has 3 and the restricted domain {classes}"):
        make_fts(model, domains=[domain], heads=["fresh", "kept"])
    fts = make_fts(model, domains=[domain], heads=["fresh", "probed"])
    for index in range(4):
        assert math.isfinite(fts.step(index).query_loss)
    assert fts.attackers.probed[0]["fc.weight"].shape == (classes, 4)
    assert model.fc.weight.shape == (len(CLASSES), 4)
    assert all(torch.equal(value, before[name]) == (name in HEAD) for name, value in model.named_parameters())


# --- attackers that diverge ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_all_diverged_leaves_the_weights(weight: float) -> None:
    model = tiny_model().float()
    before = state_of(model)
    task = ClassificationTask(tiny_spec(), suppression_loss="klu")
    fts = make_fts(
        model, replace(METHOD, attackers=3, fts_original_weight=weight), task=task,
        optimizers={"nesterov": [1e38, 1e38]}, steps=[8, 8],
    )  # fmt: skip
    step = fts.step(0, anchor=anchor_of(model) if weight else None)
    assert step.diverged == 3
    assert all(math.isnan(value) for value in (step.query_loss, step.attacker_loss, step.gradient_norm))
    assert_same_state(model, before)
    assert not fts.optimizer.state


def test_the_diverged_are_left_out(simulated: list[tuple[FineTuneStrategy, Simulation]]) -> None:
    model = tiny_model().float()
    start = parameters_of(model)
    mixed = {"nesterov": [1e38, 1e38], "momentum": [0.05, 0.05]}
    task = ClassificationTask(tiny_spec(), suppression_loss="klu")
    fts = make_fts(model, replace(METHOD, attackers=6), task=task, optimizers=mixed, steps=[8, 8])
    step = fts.step(0)
    tame = [run for strategy, run in simulated if strategy.lr < 1]
    assert 0 < len(tame) < 6
    assert step.diverged == 6 - len(tame)
    assert step.attacker_loss == pytest.approx(sum(run.attacker_losses[-1] for run in tame) / len(tame))
    mean = {name: sum(run.gradients[name] for run in tame) / len(tame) for name in start}
    for name, value in adam_by_hand(start, [mean]).items():
        torch.testing.assert_close(model.get_parameter(name).detach(), value, rtol=1e-4, atol=1e-6)
    assert math.isfinite(fts.step(1).query_loss)


@pytest.mark.parametrize("limit", [None, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("bad", ["gradient", "query loss", "attacker loss"])
def test_what_counts_as_diverged(bad: str, value: float, limit: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a gradient so large that its norm overflows: clipping it would turn every weight into NaN."""

    def engine(attacker: nn.Module, *rest: object, **settings: object) -> Simulation:
        gradients = {name: torch.ones_like(parameter) for name, parameter in attacker.named_parameters()}
        if bad == "gradient":
            gradients["conv1.weight"][0] = value
        return Simulation(
            gradients,
            [1.0, value if bad == "query loss" else 1.0],
            [value if bad == "attacker loss" else 1.0, 1.0],
        )

    monkeypatch.setattr(fts_module, "ENGINES", {"first_order": engine})
    model = tiny_model().float()
    before = state_of(model)
    step = make_fts(model, replace(METHOD, fts_max_norm=limit)).step(0)
    if bad != "gradient" and value == 1e30:
        assert step.diverged == 0
        assert all(parameter.isfinite().all() for parameter in model.parameters())
    else:
        assert step.diverged == 1
        assert_same_state(model, before)


# --- determinism and memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_seed_and_key_decide_everything(engine: str) -> None:
    def after(seed: int, *keys: tuple[object, ...]) -> tuple[list[Any], dict[str, Tensor]]:
        model = tiny_model()
        fts = make_fts(
            model,
            replace(METHOD, engine=engine, attackers=2),
            seed,
            optimizers={"adam": [1e-3, 1e-1], "sgd": [0.1, 1.0]},
            heads=["kept", "fresh", "probed"],
        )
        torch.manual_seed(id(model) % 1000)  # what came before must not matter
        return [fts.step(*key) for key in keys], state_of(model)

    (first, weights), (again, same) = (after(0, (0, 0), (0, 1)) for _ in range(2))
    assert first == again
    assert all(torch.equal(value, same[name]) for name, value in weights.items())
    assert after(1, (0, 0))[0] != after(0, (0, 0))[0]
    assert after(0, (0, 0))[0] != after(0, (1, 0))[0] != after(0, (0, 1))[0]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_memory_does_not_grow(engine: str) -> None:
    fts = make_fts(tiny_model(), replace(METHOD, engine=engine), heads=["kept", "fresh", "probed"])

    def alive() -> tuple[int, int]:
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
        return len(tensors), sum(tensor.numel() for tensor in tensors)

    for index in range(6):  # every head start has been used, every moment exists
        fts.step(index)
    before = alive()
    for index in range(6, 36):
        fts.step(index)
    count, numbers = alive()
    assert count <= before[0] + 4
    assert numbers <= before[1] * 1.01


# --- surgery, several domains, a curriculum -----------------------------------------------------------------------


def test_gradients_come_back_through_surgery(simulated: list[tuple[FineTuneStrategy, Simulation]]) -> None:
    """What is replaced learns nothing from the attacker, what is scaled its share."""
    model = tiny_model()
    start = parameters_of(model)
    surgeries = [[{"operation": "reset_affine"}, {"operation": "prune", "fraction": 0.5}]]
    make_fts(model, heads=["fresh"], surgeries=surgeries).step(0)
    ((_, run),) = simulated
    attackers = make_fts(tiny_model(), heads=["fresh"], surgeries=surgeries).attackers
    torch.manual_seed(0)
    plan = StrategySampler(replace(SAMPLER, heads=["fresh"], surgeries=surgeries)).sample(torch.Generator())
    _, factors = attackers.begin(plan, 0, torch.Generator())
    assert {name for name, factor in factors.items() if isinstance(factor, float) and factor == 0} == {
        "bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias", *HEAD
    }  # fmt: skip
    # Adam's first step moves every weight that has a gradient
    for name, value in model.named_parameters():
        kept = torch.as_tensor(factors.get(name, 1.0)).bool().expand_as(value)
        assert torch.equal(value.detach() != start[name], kept), name
        assert run.gradients[name].any()
    assert factors["conv1.weight"].mean() == 0.5


@pytest.mark.parametrize("pool", [0, 3])
def test_attackers_of_several_domains(pool: int) -> None:
    """Each fine-tunes on the images of its own domain, from a head of its own domain."""
    other = LoadedDomain("other", ("v", "w"), {
        split: MemoryImages(255 - part.images, torch.arange(len(part)) % 2, ("v", "w"))
        for split, part in RESTRICTED.splits.items()
    }, {})  # fmt: skip
    method = replace(METHOD, pool=pool, chunk=2)
    fts = make_fts(tiny_model(), method, domains=[RESTRICTED, other], heads=["fresh", "probed"])
    begun, seen = fts.attackers.begin, []

    def watched(strategy: FineTuneStrategy, domain: int, generator: torch.Generator) -> Any:
        attacker, factors = begun(strategy, domain, generator)
        seen.append((domain, attacker.fc.weight.shape[0]))
        return attacker, factors

    fts.attackers.begin = watched  # type: ignore[method-assign]
    for index in range(16):
        assert math.isfinite(fts.step(index).query_loss)
    assert set(seen) == {(0, 3), (1, 2)}
    assert [head["fc.weight"].shape[0] for head in fts.attackers.probed] == [3, 2]
    members = fts.pool.members.values()
    assert all(member.displacement["fc.weight"].shape[0] == (3, 2)[member.domain] for member in members)
    with pytest.raises(UserError, match="the model has 3 and the restricted domain 2"):
        make_fts(tiny_model(), domains=[RESTRICTED, other])


def test_the_curriculum_hears_of_every_attacker() -> None:
    """An optimizer that does nothing never recovers: it is drawn less."""
    optimizers = {"momentum": [0.1, 0.1], "sgd": [1e-9, 1e-9]}
    method = replace(METHOD, attackers=3, curriculum="bandit", curriculum_memory=0.5, fts_lr=1e-9)
    fts = make_fts(tiny_model(), method, optimizers=optimizers, steps=[12, 12])
    for index in range(8):
        fts.step(index)
    chances = fts.curriculum.table()["optimizer"]
    lazy = sum(value for label, value in chances.items() if "sgd" in label)
    assert lazy < 0.35
