"""What an attacker does before its first step: surgery, the head, probing, adapters; in this order, and counted."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sophon.attacker import FineTuneStrategy, Operation
from sophon.auditing import attacks
from sophon.auditing import runner as module
from sophon.auditing.attacks import Outcome, attack
from sophon.config import AttackConfig
from sophon.domains import Batch, ImageSet, LoadedDomain
from sophon.errors import UserError
from sophon.finetune import flops_per_step
from sophon.tasks import ClassificationTask
from tests.auditing.staging import BENIGN, DISTILLED, FRESH, KEPT, ORIGINAL, RESTRICTED, run_all, staged
from tests.tiny import assert_same_state, state_of, tiny_model, tiny_spec, tiny_task

pytestmark = pytest.mark.slow  # whole attacks

NOISY = Operation("noise", (("scale", 0.5),))
HEALED = Operation("heal", (("batch_size", 8), ("domain", "benign"), ("steps", 3)))
CHANGES: dict[str, FineTuneStrategy] = {
    "noise": replace(KEPT, surgery=(NOISY,)),
    "heal": replace(FRESH, surgery=(HEALED,)),
    "distil": DISTILLED,
    "probed": replace(FRESH, head="probed", probe_steps=3),
    "lora": replace(KEPT, scope="lora", lora_rank=2),
    "both": replace(FRESH, scope="lora", lora_rank=1, head="probed", probe_steps=2, surgery=(NOISY, HEALED)),
}


def run(strategy: FineTuneStrategy, model: nn.Module | None = None, task: Any = None, **options: Any) -> Outcome:
    model = tiny_model() if model is None else model
    rest = {"seed": 0, "eval_points": 3, "original": ORIGINAL, "benign": BENIGN} | options
    return attack(model, strategy, task or tiny_task(), RESTRICTED, spec=tiny_spec(), **rest)


class Heads(ClassificationTask):
    """Remembers the head of every model that it trained, before each step."""

    def __init__(self) -> None:
        super().__init__(tiny_spec(), dtype=torch.float64)
        self.heads: list[Tensor] = []
        self.images: list[Tensor] = []

    def attacker_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        self.heads.append(model.fc.weight.detach().clone())
        self.images.append(batch.images)
        return super().attacker_loss(model, batch)


# --- one attempt --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHANGES)
def test_same_seed_same_outcome_whatever_was_drawn_before(name: str) -> None:
    torch.manual_seed(1)
    first = run(CHANGES[name])
    torch.manual_seed(2)
    second = run(CHANGES[name])
    assert (first.curve, first.test, first.flops) == (second.curve, second.test, second.flops)
    assert_same_state(first.model, state_of(second.model))
    other = run(CHANGES[name], seed=1)
    assert not all(torch.equal(value, other.model.state_dict()[key]) for key, value in first.model.state_dict().items())


def test_the_head_comes_after_surgery_and_is_the_same_with_and_without_it() -> None:
    """Two attackers that differ in their surgery face the same fresh head."""
    plain, operated = Heads(), Heads()
    run(FRESH, task=plain)
    run(replace(FRESH, surgery=(NOISY, Operation("shrink_perturb"))), task=operated)
    assert torch.equal(plain.heads[0], operated.heads[0])
    assert len(plain.heads) == len(operated.heads)


def test_surgery_draws_its_own_numbers_and_the_same_ones_for_every_model() -> None:
    kept = replace(KEPT, surgery=(NOISY,), steps=0)

    def noise_of(seed: int, model_seed: int) -> Tensor:
        model = tiny_model(model_seed)
        before = model.conv1.weight.detach().clone()
        spread = before.std(correction=0)
        return (run(kept, model, seed=seed).model.conv1.weight.detach() - before) / spread

    assert torch.allclose(noise_of(0, 0), noise_of(0, 1))
    assert not torch.allclose(noise_of(0, 0), noise_of(1, 0))


def test_operations_are_applied_in_their_order() -> None:
    pruned = Operation("prune", (("fraction", 0.5),))
    last, first = (run(replace(KEPT, steps=0, surgery=surgery)).model for surgery in ((NOISY, pruned), (pruned, NOISY)))
    assert int((last.conv2.weight == 0).sum()) == last.conv2.weight.numel() // 2
    assert int((first.conv2.weight == 0).sum()) == 0


@pytest.mark.parametrize("name", CHANGES)
def test_cost_of_the_preparation_is_counted(name: str) -> None:
    strategy, task, images = CHANGES[name], tiny_task(), RESTRICTED["attack"]
    outcome = run(strategy)
    assert (outcome.prepared_flops > 0) == (name not in ("noise", "lora"))
    rest = strategy.steps * flops_per_step(outcome.model, strategy, task, images)
    assert outcome.flops == outcome.prepared_flops + rest
    if name == "heal":
        plain = replace(FRESH, steps=3)
        assert outcome.prepared_flops == 3 * flops_per_step(tiny_model(), plain, task, images)
    if name == "distil":  # the student's passes and the teacher's
        assert outcome.prepared_flops > 2 * flops_per_step(tiny_model(), FRESH, task, images)


def test_adapters_move_and_the_released_weights_do_not() -> None:
    released = state_of(tiny_model())
    outcome = run(CHANGES["lora"])
    after = state_of(outcome.model)
    assert torch.equal(after["conv1.base_layer.weight"], released["conv1.weight"])
    assert torch.equal(after["conv2.base_layer.weight"], released["conv2.weight"])
    assert not torch.equal(after["fc.weight"], released["fc.weight"])
    adapters = [value for name, value in after.items() if ".lora_B." in name]
    assert len(adapters) == 2
    assert all(bool(value.any()) for value in adapters)
    assert outcome.curve[0][1] == tiny_task().evaluate(tiny_model(), RESTRICTED["select"])


def test_a_distilled_model_takes_the_place_of_the_released_one() -> None:
    """The new object is what is trained, measured and handed back; the old one only teaches."""
    released, measured, told = tiny_model(), [], []

    class Measuring(ClassificationTask):
        def evaluate(self, model: nn.Module, images: ImageSet) -> float:
            measured.append(model)
            return super().evaluate(model, images)

    before = state_of(released)
    outcome = run(
        DISTILLED,
        released,
        Measuring(tiny_spec(), dtype=torch.float64),
        at_point=lambda model, step, value: told.append(model),
    )
    assert outcome.model is not released
    assert {*map(id, measured), *map(id, told)} == {id(outcome.model)}
    assert_same_state(released, before)


def test_a_surgery_that_cannot_be_done_is_one_line() -> None:
    with pytest.raises(UserError, match="heal: the audit was given no benign domain"):
        run(CHANGES["heal"], benign=None)


# --- through the audit --------------------------------------------------------------------------------------------


def test_every_preparation_against_every_role(tmp_path: Path) -> None:
    stage = staged(tmp_path, AttackConfig(seeds=1, eval_points=2, strategies=CHANGES), benign=BENIGN)
    before = {role: state_of(model) for role, model in stage.scene.models.items()}
    attempts, searches = run_all(stage)
    assert not searches
    assert not stage.plan.left_out
    assert len(attempts) == len(CHANGES) * 3
    for record in attempts:
        strategy = CHANGES[record["attack"]]
        assert FineTuneStrategy.of(record["strategy"]) == strategy
        assert record["finished"]
        assert (record["prepared_flops"] > 0) == (record["attack"] not in ("noise", "lora"))
        assert record["flops"] > record["prepared_flops"]
        assert record["steps"] == strategy.steps
        expected = {"surgery"} if strategy.surgery else set()
        assert expected <= set(record["outside"])
    for role, model in stage.scene.models.items():
        assert_same_state(model, before[role])
        assert not any(".lora_" in name for name, _ in model.named_parameters())


def test_the_distilled_model_is_the_one_measured_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes: list[Outcome] = []
    genuine = attacks.attack

    def watched(*arguments: Any, **options: Any) -> Outcome:
        outcomes.append(genuine(*arguments, **options))
        return outcomes[-1]

    monkeypatch.setattr(module, "attack", watched)
    drawn: list[nn.Module] = []
    detailed: list[dict[str, Tensor]] = []

    class Drawing(ClassificationTask):
        def sample(self, model: nn.Module, count: int, *_: Any) -> Tensor:  # type: ignore[override]
            drawn.append(model)
            return torch.zeros(count, 1, 6, 6, dtype=torch.uint8)

        def details(self, model: nn.Module, images: ImageSet) -> dict[str, float]:
            detailed.append(state_of(copy.deepcopy(model)))
            return super().details(model, images)

    config = AttackConfig(
        eval_points=2, samples=1, frechet_samples=2, roles=["protected"], strategies={"distilled": DISTILLED}
    )
    task = Drawing(tiny_spec(), dtype=torch.float64)
    frechet = module.Frechet("pixels", lambda images: float(len(images)))
    [record], _ = run_all(staged(tmp_path, config, frechet=frechet, task=task))
    [outcome] = outcomes
    assert [id(model) for model in drawn] == [id(outcome.model)] * 3  # two points, and for the distance
    assert_same_state(outcome.model, detailed[0])
    assert record["details"]["Frechet distance"] == 2.0
    assert [sample["step"] for sample in record["samples"]] == [0, DISTILLED.steps]
    assert all((tmp_path / sample["file"]).is_file() for sample in record["samples"])


def test_surgery_on_other_domains_makes_these_part_of_the_name(tmp_path: Path) -> None:
    """Where the same attempt is looked for among other audits' results."""
    config = AttackConfig(roles=["protected"], strategies={"plain": FRESH, "healed": CHANGES["heal"]})

    def names(**changes: Any) -> dict[str, str]:
        found = staged(tmp_path, config, **{"benign": BENIGN, **changes}).jobs
        return {path.name.split("-")[0]: path.name for path in found}

    other = LoadedDomain("other", BENIGN.classes, BENIGN.splits, {"attack": "another hash"})
    for changes in ({"benign": other}, {"original": other}):
        changed = names(**changes)
        assert changed["plain"] == names()["plain"]
        assert changed["healed"] != names()["healed"]
