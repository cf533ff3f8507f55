"""What every attack promises, whatever its optimizer, loop, scope or surgery: finite, repeatable, resumed, reported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sophon.attacker import LOOPS, OPTIMIZERS, SCOPES, FineTuneStrategy
from sophon.auditing.attacks import Outcome, attack
from sophon.auditing.complement import DIRECTIONS, complement
from sophon.auditing.plan import Plan
from sophon.config import AttackConfig, SearchConfig
from sophon.domains import Batch, ImageSet, batches
from sophon.errors import UserError
from sophon.finetune import OnStep
from sophon.held_out import fields_outside
from sophon.optimizers import build_optimizer
from sophon.surgery import OPERATIONS
from sophon.tasks import Task
from sophon.validation import strategy_from
from tests.auditing.staging import BENIGN, ORIGINAL, RESTRICTED, SUPPORT, attempts_of, results, scene, staged
from tests.tiny import assert_same_state, slow, state_of, tiny_model, tiny_spec, tiny_task

HERE = __name__
ADAM = {"optimizer": "adam"}


def sign_descent(
    model: nn.Module,
    strategy: FineTuneStrategy,
    task: Task,
    images: ImageSet,
    generator: torch.Generator,
    on_step: OnStep,
) -> nn.Module:
    """A loop of a user's own: steps along the signs of the gradient."""
    parameters = list(task.train_mode(model, strategy.scope, strategy.blocks).values())
    stream = batches(images, strategy.batch_size, generator)
    for step in range(strategy.steps):
        loss = task.attacker_loss(model, next(stream))
        for parameter, slope in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.data.sub_(strategy.lr * slope.sign())
        on_step(step + 1, loss.item())
    return model


def wrapped(model: nn.Module, *rest: Any) -> nn.Module:
    """A loop that says nothing on its way and ends with another model."""
    return nn.Sequential(sign_descent(model, *rest[:-1], lambda step, loss: None))


def exploding(model: nn.Module, strategy: Any, task: Any, images: Any, generator: Any, on_step: OnStep) -> nn.Module:
    on_step(1, float("nan"))
    raise AssertionError("goes on after a loss that is not finite")


def forgetful(model: nn.Module, strategy: Any, task: Any, images: Any, generator: Any, on_step: OnStep) -> None:
    return None


def failing(model: nn.Module, strategy: Any, task: Any, images: Any, generator: Any, on_step: OnStep) -> nn.Module:
    raise KeyError("nothing of the kind")


def not_a_loop(model: nn.Module) -> nn.Module:
    return model


RATES = {"sgd": 0.3, "adagrad": 0.1, "adadelta": 1.0, "kfac": 0.3, "muon": 0.05}
NOISE = {"operation": "noise", "scale": 0.5}
HEAL = {"operation": "heal", "domain": "benign", "batch_size": 8, "steps": 3}
NEEDED = {"heal": {"domain": "original", "steps": 2}, "distil": {"steps": 2}}
ALONE = [name for name in OPERATIONS if name != "interpolate"]  # that needs a relative
ATTACKS: dict[str, dict[str, Any]] = {
    **{name: {"optimizer": name, "lr": RATES.get(name, 0.02)} for name in OPTIMIZERS},
    "nadam": {"optimizer": "torch.optim.NAdam", "lr": 0.02, "optimizer_args": {"betas": [0.8, 0.9]}},
    "kfac with arguments": {"optimizer": "kfac", "lr": 0.3, "optimizer_args": {"damping": 0.1, "trust": 1e-3}},
    "own loop": {"loop": f"{HERE}.sign_descent", "lr": 0.01},
    "complement": {"loop": "sophon.auditing.complement.complement", "optimizer": "sgd", "lr": 0.1},
    "own loop of another model": {"loop": f"{HERE}.wrapped", "lr": 0.01},
    **{f"scope {name}": {"scope": name, "optimizer": "adam"} for name in SCOPES if "attention" not in name},
    **{f"kfac, scope {name}": {"scope": name, "optimizer": "kfac"} for name in ("head", "last_blocks", "lora")},
    **{f"muon, scope {name}": {"scope": name, "optimizer": "muon"} for name in ("head", "lora")},
    **{f"surgery {name}": {"surgery": [{"operation": name, **NEEDED.get(name, {})}]} for name in ALONE},
    "clipped": {"max_norm": 0.1},
    "averaged": {"ema": 0.9},
    "frozen": {"batch_norm": "frozen"},
    "restated": {"batch_norm": "restated", "optimizer": "kfac"},
    "few images": {"data_budget": 6},
    "probed": {"head": "probed", "probe_steps": 3},
    "all at once": {"scope": "lora", "lora_rank": 1, "head": "probed", "probe_steps": 2, "surgery": [NOISE, HEAL]},
}
every_attack = pytest.mark.parametrize("name", slow(ATTACKS, ("restated", "all at once")))


def strategy(name: str, **changes: Any) -> FineTuneStrategy:
    return strategy_from(name, {"batch_size": 12, "steps": 6, **ATTACKS[name], **changes})


def run(plan: FineTuneStrategy, seed: int = 0) -> Outcome:
    return attack(
        tiny_model(3), plan, tiny_task(), RESTRICTED,
        spec=tiny_spec(), seed=seed, eval_points=4, original=ORIGINAL, benign=BENIGN,
    )  # fmt: skip


@every_attack
def test_is_finite_repeats_itself_and_leaves_nothing_on_the_model(name: str) -> None:
    one, same, other = run(strategy(name)), run(strategy(name)), run(strategy(name), seed=1)
    assert one.finished
    assert [step for step, _ in one.curve][::3] == [0, 6] or name == "own loop of another model"
    assert one.curve[-1][0] == 6
    assert (one.curve, one.test, one.flops) == (same.curve, same.test, same.flops)
    weights, again, others = state_of(one.model), state_of(same.model), state_of(other.model)
    assert all(torch.equal(value, again[key]) for key, value in weights.items())
    assert any(not torch.equal(value, others[key]) for key, value in weights.items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in one.model.modules())
    assert {split: RESTRICTED[split].sha256() for split in RESTRICTED.hashes} == RESTRICTED.hashes


@every_attack
def test_is_plain_data_and_held_out_unless_it_is_simulated(name: str) -> None:
    plan = strategy(name)
    assert FineTuneStrategy.of(json.loads(json.dumps(plan.plain()))) == plan
    outside = set(fields_outside(SUPPORT, plan))
    assert ("optimizer" in outside) == (plan.optimizer != "adam")
    assert ("loop" in outside, "optimizer_args" in outside) == (plan.loop not in LOOPS, bool(plan.optimizer_args))


TAKE_PART = ("kfac", "muon", "nadam", "own loop", "scope lora", "surgery heal", "surgery distil", "all at once")


@pytest.mark.slow  # an audit
def test_takes_part_in_an_audit_is_not_run_again_and_says_so(tmp_path: Path, attacked: list[Any]) -> None:
    strategies = {name.replace(" ", "_"): strategy(name) for name in ("adam", *TAKE_PART)}
    config = AttackConfig(eval_points=2, roles=["protected", "unprotected"], strategies=strategies)
    stage = staged(tmp_path, config, benign=BENIGN)
    assert not stage.plan.left_out
    before = {role: state_of(model) for role, model in stage.scene.models.items()}
    records = attempts_of(stage)
    assert len(attacked) == len(records) == 2 * len(strategies)
    assert results(attempts_of(staged(tmp_path, config, benign=BENIGN))) == results(records)
    assert len(attacked) == len(records), "what is there is not run again"
    for record in records:
        assert FineTuneStrategy.of(record["strategy"]) == strategies[record["attack"]]
        assert record["finished"]
        assert record["test"] is not None
        assert record["exposure"] == "held_out"
        assert ("surgery" in record["outside"]) == bool(strategies[record["attack"]].surgery)
    for role, model in stage.scene.models.items():
        assert_same_state(model, before[role])


@pytest.mark.slow  # an audit
def test_takes_part_in_a_search(tmp_path: Path) -> None:
    """Optimizers by name and by path, and loops, are chosen as everything else is."""
    search = SearchConfig(
        trials=6, steps=2, seeds=1, startup=6, eval_points=2,
        optimizers={"kfac": [0.01, 0.1], "torch.optim.NAdam": [0.001, 0.1]},
        choices={"loop": ["fine_tune", f"{HERE}.sign_descent"], "batch_size": [8]},
    )  # fmt: skip
    runner = staged(tmp_path, AttackConfig(eval_points=2, roles=["protected"], search={"tuned": search}))
    [path] = runner.missing()
    runner.run(path)
    trials = json.loads(path.read_text())["trials"]
    tried = {(trial["strategy"]["optimizer"], trial["strategy"]["loop"]) for trial in trials}
    assert {optimizer for optimizer, _ in tried} == {"kfac", "torch.optim.NAdam"}
    assert {loop for _, loop in tried} == {"fine_tune", f"{HERE}.sign_descent"}
    assert not runner.missing()


def test_a_loss_that_is_not_finite_ends_any_loop() -> None:
    outcome = run(strategy("own loop", loop=f"{HERE}.exploding"))
    assert not outcome.finished
    assert [step for step, _ in outcome.curve] == [0]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_learns(optimizer: str) -> None:
    losses: list[float] = []
    plan = replace(strategy(optimizer), steps=40, batch_size=len(RESTRICTED["attack"]))
    model, task, images = tiny_model(), tiny_task(), RESTRICTED["attack"]
    stepper = build_optimizer(plan, list(task.train_mode(model, "all").values()), model=model)
    for _ in range(plan.steps):
        stepper.zero_grad()
        loss = task.attacker_loss(model, Batch(images.images, images.labels))
        loss.backward()  # type: ignore[no-untyped-call]
        stepper.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "lion"}, "attack.strategies.x.optimizer: 'lion' is not known"),
        ({"optimizer": "torch.optim.Lion"}, "attack.strategies.x.optimizer: .*no function 'Lion'"),
        ({"optimizer": "nowhere.Lion"}, "attack.strategies.x.optimizer: .*cannot be imported"),
        ({"optimizer_args": {"memory": 2}}, "attack.strategies.x.optimizer_args.memory: .*no such argument"),
        ({"optimizer_args": {"eps": {"a": 1}}}, "attack.strategies.x.optimizer_args.eps: .* not allowed"),
        ({"loop": "quick"}, "attack.strategies.x.loop: 'quick' is not known"),
        ({"loop": f"{HERE}.nothing"}, "attack.strategies.x.loop: .*no function 'nothing'"),
        ({"loop": f"{HERE}.not_a_loop"}, "attack.strategies.x.loop: .*it must be a function of"),
        ({"loop": f"{HERE}.failing"}, "attack.strategies.x: loop: a training step .* fails .*nothing of the kind"),
        (
            {"loop": f"{HERE}.forgetful"},
            "attack.strategies.x: loop: '.*forgetful' returned None; it must return the mod",
        ),
        ({"optimizer_args": {"betas": [0.9]}}, "attack.strategies.x: model.architecture: a training step .* fails"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    def plan() -> Plan:
        return Plan(AttackConfig(strategies={"x": strategy_from("attack.strategies.x", ADAM | changes)}), scene())

    with pytest.raises(UserError, match=message) as caught:
        plan()
    assert "\n" not in str(caught.value)


def test_what_moves_is_orthogonal_to_the_first_gradients_but_for_the_head() -> None:
    task, model, images = tiny_task(), tiny_model(), RESTRICTED["attack"]
    plan = FineTuneStrategy(
        optimizer="sgd", lr=0.1, batch_size=8, steps=3, head="kept", loop="sophon.auditing.complement.complement"
    )
    before, twin = state_of(model), tiny_model().train()
    steps: list[int] = []
    ended = complement(
        model, plan, task, images, torch.Generator().manual_seed(0), lambda step, loss: steps.append(step)
    )
    assert ended is model
    assert steps == [1, 2, 3]
    stream = batches(images, 8, torch.Generator().manual_seed(0))
    gradients: dict[str, list[Any]] = {name: [] for name, _ in twin.named_parameters()}
    for _ in range(DIRECTIONS):
        found = torch.autograd.grad(task.attacker_loss(twin, next(stream)), list(twin.parameters()))
        for name, gradient in zip(gradients, found, strict=True):
            gradients[name].append(gradient.flatten())
    moved = {name: (part.data - before[name]).flatten() for name, part in model.named_parameters()}
    for name in ("conv1.weight", "conv2.weight"):
        first = torch.stack(gradients[name])
        assert moved[name].norm() > 0
        assert (first @ moved[name]).abs().max() == pytest.approx(0, abs=1e-9)
    assert (torch.stack(gradients["fc.weight"]) @ moved["fc.weight"]).abs().max() > 1e-6
    assert not any(part._backward_hooks for part in model.parameters())
