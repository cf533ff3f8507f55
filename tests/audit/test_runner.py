"""The audit: which attempts there are, how each is recorded, what is reused and what is run again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sophon.audit import runner as module
from sophon.audit.runner import ROLES, Attempt, Runner, exposure, strategies
from sophon.config import AttackConfig
from sophon.domains import Batch, Domain
from sophon.errors import UserError
from sophon.strategies import FineTuneStrategy, SamplerConfig, StrategySampler
from sophon.tasks import ClassificationTask
from sophon.tracking import Tracker
from tests.tiny import TinyNet, assert_same_state, state_of, tiny_bands, tiny_model, tiny_spec

RESTRICTED = tiny_bands("restricted", ("attack", "select", "test"), seed=40, across=True)
FRESH = FineTuneStrategy(optimizer="adam", lr=0.01, batch_size=8, steps=4, head="fresh")
KEPT = replace(FRESH, head="kept", steps=6)
CONFIG = AttackConfig(seeds=2, eval_points=3, strategies={"fresh": FRESH, "kept": KEPT})
SUPPORT = StrategySampler(SamplerConfig({"adam": [0.001, 0.1]}, [8], [1, 4], ["kept", "fresh"])).support()


class Watching(ClassificationTask):
    def __init__(self) -> None:
        super().__init__(tiny_spec(), dtype=torch.float64)
        self.trained: list[Batch] = []
        self.heads: list[Tensor] = []

    def attacker_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        self.trained.append(batch)
        self.heads.append(model.fc.weight.detach().clone())
        return super().attacker_loss(model, batch)


@pytest.fixture(autouse=True)
def built(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models that were built from scratch."""
    models: list[nn.Module] = []

    def build(spec: Any) -> nn.Module:
        assert spec == tiny_spec()
        models.append(TinyNet().double())
        return models[-1]

    monkeypatch.setattr(module, "build", build)
    return models


@pytest.fixture
def attacked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[FineTuneStrategy, int]]:
    """The strategy and the seed of every attack that is run."""
    calls: list[tuple[FineTuneStrategy, int]] = []
    genuine = module.attack

    def attack(model: nn.Module, strategy: FineTuneStrategy, *rest: Any, seed: int, **options: Any) -> Any:
        calls.append((strategy, seed))
        return genuine(model, strategy, *rest, seed=seed, **options)

    monkeypatch.setattr(module, "attack", attack)
    return calls


def runner(
    folder: Path,
    config: AttackConfig = CONFIG,
    task: ClassificationTask | None = None,
    support: Any = SUPPORT,
    provenance: str = "these models",
    seed: int = 0,
    models: dict[str, nn.Module] | None = None,
    restricted: Domain = RESTRICTED,
) -> Runner:
    models = models or {"protected": tiny_model(1), "unprotected": tiny_model(2)}
    task = task or ClassificationTask(tiny_spec(), dtype=torch.float64)
    return Runner(models, tiny_spec(), task, restricted, config, support, provenance, seed, folder)


def results(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


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


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AttackConfig(), r"attack.strategies: empty"),
        (AttackConfig(grid={"lr": []}), r"attack.grid.lr: empty"),
        (AttackConfig(grid={"rate": [0.1]}), r"attack.grid.rate: .*rate"),
        (AttackConfig(grid={"optimizer": ["lion"]}), r"optimizer: 'lion' is not known; allowed: .*sgd"),
        (AttackConfig(grid={"lr": [0.1, -0.1]}), r"lr: -0.1 is not allowed"),
        (AttackConfig(grid={"steps": [0]}), r"steps: 0 is not allowed"),
        (AttackConfig(grid={"lr": ["fast"]}), r"lr: .*fast"),
        (AttackConfig(grid={"lr": [None]}), r"attack.grid.lr: .*None"),
        (AttackConfig(grid={"steps": [2.5]}), r"steps: .*2\.5"),
        (AttackConfig(grid={"augmentation": ["blur"]}), r"augmentation: 'blur' is not known"),
        (AttackConfig(strategies={"bad": replace(FRESH, lr=0.0)}), r"attack.strategies.bad.lr: 0.0 is not allowed"),
        *(
            (AttackConfig(strategies={name: FRESH}), "is not allowed; use letters, digits")
            for name in ("", "a b", "../up", "a/b", "a\nb", "ä")
        ),
    ],
)
def test_bad_strategies_are_one_line(config: AttackConfig, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        strategies(config)
    assert str(caught.value).startswith("attack.")


# --- attempts -----------------------------------------------------------------------------------------------------


def test_every_strategy_role_and_seed(tmp_path: Path) -> None:
    attempts = runner(tmp_path).attempts()
    assert ROLES == ("protected", "unprotected", "scratch")
    assert [(a.attack, a.role, a.seed) for a in attempts] == [
        (name, role, seed) for name in ("fresh", "kept") for role in ROLES for seed in (0, 1)
    ]
    assert {a.strategy for a in attempts if a.attack == "kept"} == {KEPT}


def test_identifiers_change_with_all_that_decides_the_result() -> None:
    attempt = Attempt("fresh", FRESH, "protected", 0)
    name = attempt.identifier("p")
    assert name.startswith("fresh-protected-0-")
    assert name == Attempt("fresh", replace(FRESH), "protected", 0).identifier("p")
    others = [
        attempt.identifier("q"),
        replace(attempt, seed=1).identifier("p"),
        replace(attempt, role="scratch").identifier("p"),
        replace(attempt, attack="other").identifier("p"),
        *(
            replace(attempt, strategy=replace(FRESH, **{field: value})).identifier("p")
            for field, value in {**asdict(KEPT), "lr": 0.02, "batch_size": 9, "data_budget": 3, "probe_lr": 1.0}.items()
            if getattr(FRESH, field) != value
        ),
    ]
    assert len(others) == 4 + 6
    assert len({name, *others}) == 1 + len(others)


def test_records(tmp_path: Path) -> None:
    records = runner(tmp_path).run(Tracker())
    files = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "attempts").iterdir()}
    assert {record["id"]: record for record in records} == files
    assert [record["id"] for record in records] == [a.identifier("these models") for a in runner(tmp_path).attempts()]
    for record in records:
        assert record["schema_version"] == 1
        assert FineTuneStrategy(**record["strategy"]) == {"fresh": FRESH, "kept": KEPT}[record["attack"]]
        assert record["steps"] == record["strategy"]["steps"]
        assert [point["step"] for point in record["curve"]] == [0, record["steps"] // 2, record["steps"]]
        assert record["metric"] == {"name": "accuracy", "unit": "%", "higher_is_better": True}
        assert 0 <= record["test"] <= 100
        assert record["finished"] is True
        assert record["flops"] > 0
    assert {(r["attack"], r["exposure"], tuple(r["outside"])) for r in records} == {
        ("fresh", "seen", ()),
        ("kept", "longer", ("steps",)),
    }


@pytest.mark.parametrize(
    ("outside", "label"),
    [
        (None, "held_out"),
        ((), "seen"),
        (("steps",), "longer"),
        (("lr",), "held_out"),
        (("lr", "steps"), "held_out"),
    ],
)
def test_exposure(outside: tuple[str, ...] | None, label: str) -> None:
    assert exposure(outside) == label


def test_without_a_support_all_is_held_out(tmp_path: Path) -> None:
    records = runner(tmp_path, replace(CONFIG, seeds=1), support=None).run(Tracker())
    assert {(record["exposure"], tuple(record["outside"])) for record in records} == {("held_out", ())}


def test_models_are_never_changed(tmp_path: Path) -> None:
    models: dict[str, nn.Module] = {"protected": tiny_model(1).train(), "unprotected": tiny_model(2).eval()}
    before = {role: state_of(model) for role, model in models.items()}
    config = replace(CONFIG, strategies={**CONFIG.strategies, "head": replace(FRESH, scope="head")})
    runner(tmp_path, config, models=models).run(Tracker())
    for role, model in models.items():
        assert_same_state(model, before[role])
        assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert models["protected"].training
    assert not models["unprotected"].training


def test_roles_face_the_same_head_and_batches(tmp_path: Path) -> None:
    """Only the model differs; another seed changes them all."""
    task = Watching()
    plan = replace(FRESH, augmentation="strong", data_budget=24)
    runner(tmp_path, AttackConfig(seeds=2, eval_points=2, strategies={"a": plan}), task).run(Tracker())
    steps = plan.steps

    def counted(batch: Batch) -> bool:
        return len(batch.images) == plan.batch_size

    # each attempt counts its operations on one batch of its own before it trains
    assert len(task.trained) == 6 * (steps + 1)
    assert all(map(counted, task.trained))
    runs = [task.trained[at + 1 : at + steps + 1] for at in range(0, len(task.trained), steps + 1)]
    heads = task.heads[1 :: steps + 1]
    for seed in (0, 1):
        one, *others = runs[seed::2]
        for other in others:
            for mine, theirs in zip(one, other, strict=True):
                assert torch.equal(mine.images, theirs.images)
                assert torch.equal(mine.labels, theirs.labels)
        assert all(torch.equal(head, heads[seed]) for head in heads[seed::2])
    assert not torch.equal(heads[0], heads[1])
    assert not torch.equal(runs[0][0].images, runs[1][0].images)


def test_scratch_is_built_anew_from_the_attempts_seed(tmp_path: Path, built: list[nn.Module]) -> None:
    config = AttackConfig(seeds=2, eval_points=2, strategies={"a": replace(FRESH, scope="head")})
    runner(tmp_path / "one", config).run(Tracker())
    torch.manual_seed(99)
    runner(tmp_path / "two", config).run(Tracker())
    weights = [model.conv1.weight for model in built]
    assert len(weights) == 4
    assert torch.equal(weights[0], weights[2])
    assert torch.equal(weights[1], weights[3])
    assert not torch.equal(weights[0], weights[1])


def test_same_seed_same_records(tmp_path: Path) -> None:
    config = replace(CONFIG, seeds=1)
    one, two, other = (
        results(runner(tmp_path / name, config, seed=seed).run(Tracker()))
        for name, seed in (("one", 0), ("two", 0), ("other", 1))
    )
    assert one == two
    assert one != other


def test_goes_on_with_what_is_missing(tmp_path: Path, attacked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the middle of the third attempt, two are whole; the rest, and nothing else, is run later."""
    whole = results(runner(tmp_path / "whole").run(Tracker()))
    assert len(attacked) == 12
    genuine: Callable[..., Any] = module.attack

    def stopping(*arguments: Any, **keywords: Any) -> Any:
        if len(attacked) == 14:
            raise KeyboardInterrupt
        return genuine(*arguments, **keywords)

    monkeypatch.setattr(module, "attack", stopping)
    with pytest.raises(KeyboardInterrupt):
        runner(tmp_path / "parts").run(Tracker())
    assert len(list((tmp_path / "parts" / "attempts").iterdir())) == 2
    monkeypatch.setattr(module, "attack", genuine)
    assert results(runner(tmp_path / "parts").run(Tracker())) == whole
    assert len(attacked) == 24
    assert results(runner(tmp_path / "parts").run(Tracker())) == whole
    assert len(attacked) == 24


def test_other_provenance_reuses_nothing(tmp_path: Path, attacked: list[Any]) -> None:
    config = replace(CONFIG, seeds=1)
    runner(tmp_path, config).run(Tracker())
    runner(tmp_path, config, provenance="other models").run(Tracker())
    assert len(attacked) == 12


def test_more_seeds_run_only_the_new_ones(tmp_path: Path, attacked: list[Any]) -> None:
    runner(tmp_path, replace(CONFIG, seeds=1)).run(Tracker())
    first = len(attacked)
    assert len(runner(tmp_path, CONFIG).run(Tracker())) == 12
    assert (first, len(attacked)) == (6, 12)


def test_seeds_differ_by_attack_and_seed_but_not_by_role(tmp_path: Path, attacked: list[Any]) -> None:
    runner(tmp_path).run(Tracker())
    assert len({seed for _, seed in attacked}) == 4
    assert [seed for _, seed in attacked[0:2]] == [seed for _, seed in attacked[2:4]] == [s for _, s in attacked[4:6]]


def test_damaged_record(tmp_path: Path) -> None:
    config = replace(CONFIG, seeds=1)
    runner(tmp_path, config).run(Tracker())
    victim = next((tmp_path / "attempts").iterdir())
    victim.write_text(victim.read_text()[:40])
    with pytest.raises(UserError, match="truncated or not JSON"):
        runner(tmp_path, config).run(Tracker())


def test_diverging_attack_is_a_record_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "build", lambda spec: TinyNet())
    wild = replace(FRESH, optimizer="nesterov", lr=1e38, steps=20)
    models: dict[str, nn.Module] = {"protected": tiny_model(1).float(), "unprotected": tiny_model(2).float()}
    config = AttackConfig(seeds=1, eval_points=5, strategies={"wild": wild})
    records = runner(tmp_path, config, ClassificationTask(tiny_spec()), models=models).run(Tracker())
    assert {record["role"] for record in records} == set(ROLES)
    for record in records:
        assert record["finished"] is False
        assert record["curve"][-1]["step"] < 20
        assert json.loads(json.dumps(record, allow_nan=False)) == record


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (KEPT, "head: 'kept' needs as many classes"),
        (replace(FRESH, augmentation="blur"), "augmentation: 'blur' is not known"),
        (replace(FRESH, data_budget=1), "data_budget: 1 is not allowed"),
        (replace(FRESH, data_budget=1000), "data_budget: 1000 is not allowed"),
    ],
)
def test_attack_that_cannot_run_is_refused_before_any_runs(
    strategy: FineTuneStrategy, message: str, tmp_path: Path
) -> None:
    """Not after hours of the attempts before it."""
    two = Domain("two", ("a", "b"), RESTRICTED.splits, {})
    with pytest.raises(UserError, match=message):
        runner(tmp_path, AttackConfig(strategies={"first": FRESH, "bad": strategy}), restricted=two)


def test_tracker_is_told_of_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runner(tmp_path, replace(CONFIG, seeds=1)).run(Tracker(progress=True))
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("audit 6/6")
    assert "kept on scratch: " in last


def test_only_the_roles_asked_for_are_attacked(tmp_path: Path) -> None:
    some = runner(tmp_path, replace(CONFIG, roles=["scratch", "protected"]))
    assert {attempt.role for attempt in some.attempts()} == {"protected", "scratch"}
    everything = {attempt.identifier("p"): attempt for attempt in runner(tmp_path).attempts()}
    assert all(everything[attempt.identifier("p")] == attempt for attempt in some.attempts())


@pytest.mark.parametrize(("roles", "message"), [([], "attack.roles: empty"), (["victim"], "attack.roles: 'victim'")])
def test_bad_roles_are_refused(tmp_path: Path, roles: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        runner(tmp_path, replace(CONFIG, roles=roles))
