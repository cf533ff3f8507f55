"""What an audit is to run: which jobs there are, in which order and by which names, and what is left out, and why."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sophon.attacker import FineTuneStrategy, Operation
from sophon.auditing.plan import Attempt, Job, Plan, Search, oracle_data, strategies
from sophon.auditing.scene import unfit
from sophon.auditing.words import ROLES
from sophon.config import AttackConfig
from sophon.domains import LoadedDomain
from sophon.errors import UserError
from tests.auditing.staging import BENIGN, CONFIG, FRESH, KEPT, RESTRICTED, SEARCH, TWO, scene
from tests.tiny import assert_same_state, state_of

HEAL_BENIGN = Operation("heal", (("domain", "benign"), ("steps", 2)))


def plan_of(config: AttackConfig = CONFIG, **changes: Any) -> Plan:
    return Plan(config, scene(**changes))


def of(*names: str, **more: Any) -> AttackConfig:
    """A plan of so many attacks of one kind, by these names."""
    return AttackConfig(strategies=dict.fromkeys(names, FRESH), **more)


def shape(jobs: list[Job]) -> list[tuple[Any, ...]]:
    return [(a.attack, a.role, a.seed, a.domain) for a in jobs if isinstance(a, Attempt)]


# --- strategies ---------------------------------------------------------------------------------------------------


def test_named_strategies_come_first_then_the_grid() -> None:
    grid = {"optimizer": ["sgd", "adam"], "lr": [0.1, 1e-5], "data_budget": [None]}
    found = strategies(AttackConfig(strategies={"mine": FRESH}, grid=grid))
    assert list(found) == [
        "mine",
        "sgd-lr0.1-data_budgetNone",
        "sgd-lr1e-05-data_budgetNone",
        "adam-lr0.1-data_budgetNone",
        "adam-lr1e-05-data_budgetNone",
    ]
    assert found["mine"] == FRESH
    assert found["adam-lr0.1-data_budgetNone"] == FineTuneStrategy(optimizer="adam", lr=0.1)
    assert len(set(found.values())) == 5


def test_shots_are_attacks_with_so_many_images_a_class() -> None:
    plan = plan_of(of("a", shots={"a": [1, 1000]}, roles=["protected"]))
    classes = len(RESTRICTED.classes)
    assert [(job.attack, job.strategy.data_budget, job.strategy.batch_size) for job in plan.jobs] == [
        ("a", None, FRESH.batch_size),
        ("a_1_shot", classes, min(FRESH.batch_size, classes)),
    ]
    assert set(plan.left_out) == {"a_1000_shot"}
    for shots, message in (({"b": [1]}, r"attack\.shots"), ({"a": [1], "a_1_shot": [1]}, "the name of another")):
        with pytest.raises(UserError, match=message):
            plan_of(of("a", "a_1_shot", shots=shots))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AttackConfig(), r"attack.strategies: empty"),
        *(
            (AttackConfig(grid=grid), message)
            for grid, message in (
                ({"lr": []}, r"attack.grid.lr: empty"),
                ({"rate": [0.1]}, r"attack.grid.rate: .*rate"),
                ({"optimizer": ["lion"]}, r"optimizer: 'lion' is not known; allowed: .*sgd"),
                ({"lr": [0.1, -0.1]}, r"lr: -0.1 is not allowed"),
                ({"lr": ["fast"]}, r"lr: .*fast"),
                ({"lr": [None]}, r"attack.grid.lr: .*None"),
                ({"steps": [2.5]}, r"steps: .*2\.5"),
                ({"way": [{"head": "kept"}]}, "has no name"),
                ({"way": [{"name": "direct", "neck": "kept"}]}, "neck"),
            )
        ),
        (AttackConfig(grid={"optimizer": ["sgd"]}, strategies={"sgd": FRESH}), "attack.grid: 'sgd' is the name of ano"),
        (AttackConfig(strategies={"bad": replace(FRESH, lr=0.0)}), r"attack.strategies.bad.lr: 0.0 is not allowed"),
        *(
            (AttackConfig(strategies={name: FRESH}), "is not allowed; use letters, digits")
            for name in ("", "a b", "../up", "a/b", "a\nb", "ä")
        ),
        (AttackConfig(search={"a/b": SEARCH}), "is not allowed; use letters, digits"),
    ],
)
def test_bad_strategies_are_one_line(config: AttackConfig, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        strategies(config)
    assert str(caught.value).startswith("attack.")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"roles": []}, "attack.roles: empty"),
        ({"roles": ["victim"]}, "attack.roles: 'victim'"),
        ({"roles": ["oracle"]}, "attack.roles: 'oracle'"),
        ({"benign": ["other"]}, "attack.benign: 'other' is not known; allowed: fresh, kept"),
        ({"oracle": "other"}, "attack.oracle: 'other' is not known; allowed: fresh, kept"),
        ({"search": {"fresh": SEARCH}}, "attack.search.fresh: the name of another attack"),
        ({"search": {"s": replace(SEARCH, choices={"lr": [1]})}}, "attack.search.s.choices.lr: not allowed here"),
        ({"search": {"s": replace(SEARCH, choices={"head": ["big"]})}}, r"attack.search.s.choices.head.*'big'"),
        (
            {"search": {"s": replace(SEARCH, choices={"surgery": [[], [{"operation": "melt"}]]})}},
            r"attack.search.s.choices.surgery\[0\].operation: 'melt' is not known",
        ),
    ],
)
def test_bad_plans_are_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        plan_of(replace(CONFIG, **changes))
    assert "\n" not in str(caught.value)


# --- jobs ---------------------------------------------------------------------------------------------------------


def test_every_strategy_role_and_seed() -> None:
    jobs = plan_of(of("a", "b", seeds=2)).jobs
    assert shape(jobs) == [(name, role, seed, "restricted") for name in "ab" for role in ROLES for seed in (0, 1)]
    assert {job.strategy for job in jobs if isinstance(job, Attempt)} == {FRESH}
    assert all(isinstance(job, Attempt) and job.search is None and job.cost == 1 for job in jobs)


def named(job: Job) -> str:
    return job.identifier("p")


@settings(max_examples=5)  # each makes a plan
@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=6),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 20),
)
def test_the_longest_jobs_come_first(lengths: list[int], seeds: int, trials: int, steps: int) -> None:
    """So that the last of several workers does not begin with the longest."""
    search = replace(SEARCH, trials=trials, steps=steps)
    named = {f"a{index}": replace(FRESH, steps=length) for index, length in enumerate(lengths)}
    jobs = plan_of(AttackConfig(seeds=seeds, strategies=named, search={"s": search})).jobs
    costs = [job.config.steps * job.cost if isinstance(job, Search) else job.strategy.steps for job in jobs]
    assert costs == sorted(costs, reverse=True)
    assert len(jobs) == 3 * (1 + seeds * len(lengths))
    assert {job.cost for job in jobs if isinstance(job, Search)} == {trials + SEARCH.seeds}


def test_benign_attempts_need_a_benign_domain() -> None:
    config = replace(of("a", "b", seeds=2), benign=["b"])
    assert {where for *_, where in shape(plan_of(config).jobs)} == {"restricted"}
    found = [one for one in shape(plan_of(config, benign=BENIGN).jobs) if one[3] == "benign"]
    assert found == [("b", role, seed, "benign") for role in ROLES for seed in (0, 1)]


@pytest.mark.parametrize(
    ("budget", "own", "ratio", "steps", "images"),
    [(None, 36, 3.0, 18, 108), (9, 9, 10.0, 60, 90), (12, 12, 9.0, 54, 108)],
)
def test_the_oracle_has_more_data_for_as_many_epochs(
    budget: int | None, own: int, ratio: float, steps: int, images: int
) -> None:
    strategy = replace(KEPT, data_budget=budget)
    assert oracle_data(strategy, RESTRICTED) == (own, ratio)
    jobs = plan_of(AttackConfig(seeds=2, strategies={"a": strategy}, oracle="a")).jobs
    found = [job for job in jobs if job.role == "oracle"]
    assert shape(found) == [("a", "oracle", seed, "restricted") for seed in (0, 1)]
    wanted = replace(strategy, steps=steps, data_budget=images)
    assert {job.strategy for job in found if isinstance(job, Attempt)} == {wanted}
    assert jobs[:2] == found


# --- names --------------------------------------------------------------------------------------------------------


CHANGED = {
    **asdict(KEPT),
    **{"lr": 0.02, "batch_size": 9, "data_budget": 3, "probe_lr": 1.0, "ema": 0.9, "blocks": 2},
    **{"scope": "lora", "lora_rank": 2},
}
NOISE, PRUNE, LOUD = Operation("noise"), Operation("prune"), Operation("noise", (("scale", 0.2),))


def test_identifiers_change_with_all_that_decides_the_result() -> None:
    attempt = Attempt("fresh", FRESH, "protected", 0)
    name = attempt.identifier("p")
    assert name.startswith("fresh-protected-0-")
    assert name == Attempt("fresh", replace(FRESH), "protected", 0).identifier("p")
    plans = [replace(FRESH, **{key: value}) for key, value in CHANGED.items() if getattr(FRESH, key) != value]
    plans += [replace(FRESH, surgery=surgery) for surgery in ((NOISE,), (LOUD,), (NOISE, PRUNE), (PRUNE, NOISE))]
    others = [{"seed": 1}, {"role": "scratch"}, {"attack": "other"}, {"domain": "benign"}, {"search": "tuned"}]
    changed = [replace(attempt, strategy=plan).identifier("p") for plan in plans]
    changed += [attempt.identifier("q"), *(replace(attempt, **other).identifier("p") for other in others)]
    assert len(plans) == 10 + 4
    assert len({name, *changed}) == 1 + len(changed)
    assert replace(attempt, domain="benign").identifier("p").startswith("fresh-benign-protected-0-")


# --- what does not fit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "reason"),
    [
        (KEPT, "head: 'kept' needs as many classes"),
        (replace(FRESH, data_budget=1), "data_budget: 1 is not allowed"),
        (replace(FRESH, data_budget=1000), "data_budget: 1000 is not allowed"),
        (replace(FRESH, scope="lora", lora_layers="attention"), "lora_layers: 'attention' has no layer"),
        (replace(FRESH, scope="last_blocks", blocks=3), "blocks: 3 is not allowed .* it must be 1 to 2"),
        (replace(FRESH, scope="attention"), "scope: 'attention' is not known"),
        (replace(FRESH, surgery=(Operation("reinitialise", (("blocks", 3),)),)), "the model has only 2"),
        (replace(FRESH, surgery=(HEAL_BENIGN,)), "heal needs a benign domain; set domain.benign"),
    ],
)
def test_what_does_not_fit_is_left_out_with_a_reason_or_refused_if_it_is_all(
    strategy: FineTuneStrategy, reason: str
) -> None:
    """Before any attempt is run, not after hours of those before it."""
    plan = plan_of(AttackConfig(strategies={"bad": strategy, "good": FRESH}), restricted=TWO)
    assert {name for name, *_ in shape(plan.jobs)} == {"good"}
    assert list(plan.left_out) == ["bad"]
    with pytest.raises(UserError, match=f"attack.strategies.bad: .*{reason}") as caught:
        plan_of(AttackConfig(strategies={"bad": strategy}), restricted=TWO)
    assert str(caught.value) == f"attack.strategies.bad: {plan.left_out['bad']}"


@pytest.mark.parametrize(
    "strategy",
    [
        *(FRESH, KEPT, replace(FRESH, head="probed"), replace(FRESH, data_budget=36), replace(FRESH, steps=0)),
        *(replace(FRESH, scope=scope, blocks=2) for scope in ("head", "first_blocks", "last_blocks", "lora")),
        replace(FRESH, surgery=(HEAL_BENIGN, Operation("reinitialise", (("blocks", 2),)))),
        replace(KEPT, surgery=(Operation("distil", (("images", "original"),)),)),
    ],
)
def test_looking_whether_an_attack_fits_leaves_no_trace(strategy: FineTuneStrategy) -> None:
    stage = scene(benign=BENIGN)
    before = {role: state_of(model) for role, model in stage.models.items()}
    torch.manual_seed(5)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert unfit(strategy, stage, RESTRICTED) is None
    assert torch.equal(torch.rand(3), drawn)
    for role, model in stage.models.items():
        assert_same_state(model, before[role])
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_head_that_surgery_replaced_cannot_be_kept_for_other_classes() -> None:
    pair = LoadedDomain("pair", ("a", "b"), TWO.splits, {})
    named = {"a": replace(KEPT, surgery=(HEAL_BENIGN,)), "b": replace(FRESH, surgery=(HEAL_BENIGN,))}
    assert not plan_of(AttackConfig(strategies=named), benign=BENIGN).left_out
    plan = plan_of(AttackConfig(strategies=named), benign=pair)
    assert list(plan.left_out) == ["a"]
    assert "the model has 2 and the restricted domain 3" in plan.left_out["a"]


def test_what_fits_the_restricted_domain_but_not_the_benign_one() -> None:
    plan = plan_of(replace(CONFIG, benign=["fresh", "kept"]), benign=TWO)
    assert list(plan.left_out) == ["kept on the benign domain"]
    assert {(name, where) for name, _, _, where in shape(plan.jobs)} == {
        *(("fresh", "restricted"), ("kept", "restricted"), ("fresh", "benign"))
    }
