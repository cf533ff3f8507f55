"""The bench of experiments/strength: its rows mean something, its steps go on, its table says what was found."""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
import yaml
from hydra.core.global_hydra import GlobalHydra
from hypothesis import given
from hypothesis import strategies as st

from sophon.audit.plan import strategies
from sophon.cli import conf_dir
from sophon.config import Config
from sophon.errors import UserError
from sophon.strategies import StrategySampler, fields_outside
from sophon.tasks import ClassificationTask
from sophon.tracking import Tracker
from sophon.validation import from_omegaconf, strategy_from
from tests.cli_helpers import PRETRAIN, load, sophon
from tests.tiny import state_of, tiny_domain, tiny_images, tiny_model, tiny_spec, tiny_task

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
METRIC = {"name": "accuracy", "unit": "%", "higher_is_better": True}


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the scripts find one another, as they do when one of them is run."""
    for folder in (EXPERIMENTS, EXPERIMENTS / "strength"):
        monkeypatch.syspath_prepend(str(folder))


@cache
def composed(*overrides: str, verb: str = "protect") -> Config:
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return from_omegaconf(hydra.compose("config", overrides=[*overrides, f"verb={verb}"]))


def rows(name: str = "methods.yaml") -> dict[str, list[str]]:
    groups = yaml.safe_load((EXPERIMENTS / "strength" / name).read_text())
    return {name: overrides for group in groups.values() for name, overrides in group.items()}


# ---- what is compared ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", rows())
def test_every_row_composes_and_shares_the_yardstick(name: str) -> None:
    config, usual = composed("experiment=bench_c", *rows()[name]), composed("experiment=bench_c")
    # a patient guard, or one without repairs, ends with the same constraint
    guard = replace(config.guard, patience=0, repair_steps=usual.guard.repair_steps)
    assert (guard, config.domain, config.model) == (usual.guard, usual.domain, usual.model)
    assert config.reference == usual.reference
    # whose protection is NTR alone has it at rates and batches of its own
    alone = config.method.fts_steps == 0
    assert alone == (name == "coordinates")
    for key in ("fts_lr",) if alone else ("fts_lr", "ntr_lr", "ntr_batch_size"):
        assert getattr(config.method, key) == getattr(usual.method, key)
    # an anchor does a part of NTR's work; and who waits for the rates to fall lets them
    anchored = config.method.name == "pool_anchored"
    assert alone or config.method.ntr_steps == (5 if anchored else usual.method.ntr_steps)
    assert (config.guard.patience > 0) == (anchored or alone)
    assert config.guard.growth == 1, "or rounds would become dearer, and budgets differ"
    assert (config.method.distillation == 0) == name.endswith("_paper")
    if not name.endswith("_paper"):
        mine, theirs = (StrategySampler(each.sampler).support() for each in (config, usual))
        assert mine["optimizer"].items() <= theirs["optimizer"].items()
        assert set(mine["head"]) <= set(theirs["head"])
        assert [each for each in mine["surgery"] if each not in theirs["surgery"]] == [] or name == "pool_reinitialised"


@pytest.mark.slow
@pytest.mark.parametrize("name", rows("denoisers.yaml"))
def test_every_row_of_denoisers_shares_the_yardstick(name: str) -> None:
    config, usual = composed("experiment=bench_d", *rows("denoisers.yaml")[name]), composed("experiment=bench_d")
    assert (replace(config.guard, patience=0), config.domain, config.model, config.task) == (
        usual.guard,
        usual.domain,
        usual.model,
        usual.task,
    )
    assert config.method.suppression_loss == "dos"
    assert (config.guard.patience > 0) == (config.method.pool > 0), "whose rates fall is patient"
    assert config.guard.growth == 1
    assert (config.method.fixed_norms != "none") == name.endswith("_fixed")
    support = StrategySampler(config.sampler).support()
    momentum = name in ("sophon_dos", "dos_pool_momentum")
    assert set(support["optimizer"]) == ({"momentum"} if momentum else {"momentum", "adam", "adamw"})


def test_attacks_on_denoisers_have_every_family_and_their_names_mean_what_they_mean_elsewhere() -> None:
    bench, usual = (
        composed("experiment=bench_d", f"attack={name}", verb="audit").attack
        for name in ("bench_d", "standard_diffusion")
    )
    named, known = strategies(bench), strategies(usual)
    own = {"adam_3e-3", "adam_1e-3_5x"}
    assert named.keys() - known.keys() == own
    assert {name: each for name, each in named.items() if name not in own} == {
        name: each for name, each in known.items() if name in named
    }
    assert {each.scope for each in named.values()} == {"all", "last_blocks", "lora"}
    assert sorted(each.steps for each in named.values())[-2:] == [100, 500]
    assert [(each.trials, each.steps) for each in bench.search.values()] == [(16, 100)]
    support = StrategySampler(composed("experiment=bench_d").sampler).support()
    seen = {name for name, each in named.items() if not fields_outside(support, each)}
    assert seen == {"momentum_1e-2", "adam_1e-3", "adam_3e-3"}


def test_rows_have_names_of_their_own_and_groups_can_be_chosen(tmp_path: Path) -> None:
    from rows import chosen, read_rows

    groups = read_rows()
    assert chosen(groups, ["methods", "ablations"]) == rows()
    assert list(chosen(groups, ["pool_fixed", "pool", "pool"])) == ["pool_fixed", "pool"]
    assert len(groups["methods"]) >= 11
    with pytest.raises(UserError, match="--methods: 'pol' is not known; allowed: ablations"):
        chosen(groups, ["pol"])
    for text, message in (
        ("methods: {a: [x=1]}\nablations: {a: [x=1]}", "'a' is not allowed"),
        ("methods: {controls: [x=1]}", "'controls' is not allowed"),
        ("methods: {a/b: [x=1]}", "'a/b' is not allowed"),
        ("methods: {a: x=1}", "a: x=1 is not a list of overrides"),
        ("mine: {a: [x=1]}", "give groups of rows"),
    ):
        (tmp_path / "rows.yaml").write_text(text)
        with pytest.raises(UserError, match=message):
            read_rows(tmp_path / "rows.yaml")


def test_the_attacks_have_every_family_and_share_names_with_the_same_attacks() -> None:
    whole, screen = (
        composed("experiment=bench_c", f"attack={name}", verb="audit") for name in ("bench_c", "bench_c_screen")
    )
    named, few = strategies(whole.attack), strategies(screen.attack)
    assert few.items() <= named.items()
    assert len(few) == 8
    assert {each.steps for each in few.values()} == {200}
    assert not screen.attack.search
    assert whole.attack.eval_points == screen.attack.eval_points, "or the one cannot reuse the other's attempts"
    assert sorted(each.steps for each in named.values())[-2:] == [200, 4000]
    assert [(each.trials, each.steps, each.seeds) for each in whole.attack.search.values()] == [(64, 200, 3)]
    assert len(whole.attack.benign) == 2
    operations = {operation.name for each in named.values() for operation in each.surgery}
    assert {"renormalise", "reset_affine", "reinitialise", "shrink_perturb", "distil", "heal"} <= operations
    assert {"all", "lora", "last_blocks"} == {each.scope for each in named.values()}
    families = [yaml.safe_load(path.read_text()) for path in (conf_dir() / "attack" / "family").glob("*.yaml")]
    shared = {name: each for family in families for name, each in (family.get("strategies") or {}).items()}
    assert len(named.keys() & shared.keys()) >= 10
    for name in named.keys() & shared.keys():
        assert replace(strategy_from(name, shared[name]), batch_size=32) == named[name], name


def test_what_the_sampler_holds_out_is_held_out() -> None:
    config = composed("experiment=bench_c", verb="audit")
    support = StrategySampler(config.sampler).support()
    outside = {name: fields_outside(support, each) for name, each in strategies(config.attack).items()}
    seen = {"adam_1e-3_kept", "adam_1e-3_fresh", "adam_5e-3_fresh", "momentum_5e-2_kept", "momentum_5e-2_fresh"}
    assert {name for name, fields in outside.items() if not fields} == {*seen, "renormalise_adam_5e-3", "reset_affine"}
    assert outside["rmsprop_1e-3_fresh"] == ("optimizer",)
    assert outside["adam_1e-3_cosine_20x"] == ("steps", "schedule")
    assert outside["renormalise_channels_adam_fresh"] == outside["distil_attack"] == ("surgery",)


# ---- the budget ------------------------------------------------------------------------------------------------------


@given(
    few=st.integers(1, 50),
    more=st.integers(1, 50),
    start=st.floats(0, 100),
    each=st.floats(0.01, 100),
    minutes=st.floats(0.1, 100),
)
def test_a_budget_buys_the_rounds_that_fit(few: int, more: int, start: float, each: float, minutes: float) -> None:
    from budget import Calibration

    timed = Calibration((few, few + more), (start + few * each, start + (few + more) * each))
    assert timed.seconds_per_round == pytest.approx(each, rel=1e-6)
    bought = timed.rounds_for(minutes)
    assert bought >= 1
    assert bought == 1 or bought * each <= 60 * minutes * (1 + 1e-6)
    assert (bought + 1) * each > 60 * minutes * (1 - 1e-6)


def test_times_that_tell_nothing_are_refused() -> None:
    from budget import Calibration

    for rounds, seconds in (((5, 15), (3.0, 3.0)), ((5, 15), (3.0, 2.0)), ((5, 5), (2.0, 3.0))):
        with pytest.raises(UserError, match="cannot be told"):
            Calibration(rounds, seconds).rounds_for(1)


# ---- the schedule ----------------------------------------------------------------------------------------------------


def _steps(order: list[str], *wanted: tuple[str, tuple[str, ...]], fails: str = "") -> list[Any]:
    from schedule import Step, StepFailed

    def work(name: str) -> Callable[[], str]:
        def run() -> str:
            order.append(name)
            if name == fails:
                raise StepFailed("no luck")
            return "fine"

        return run

    return [Step(name, 1.0, lambda: False, work(name), needs) for name, needs in wanted]


def test_steps_are_done_in_their_order_as_far_as_others_allow() -> None:
    from schedule import Processes, run_steps

    order: list[str] = []
    steps = _steps(order, ("b", ("a",)), ("c", ()), ("a", ()), ("d", ("b", "c")))
    assert run_steps(steps, 1, Processes(), Tracker()) == {}
    assert order == ["c", "a", "b", "d"]


def test_what_needs_a_failed_step_is_left_out_and_the_rest_goes_on() -> None:
    from schedule import Processes, run_steps

    order: list[str] = []
    steps = _steps(order, ("a", ()), ("b", ("a",)), ("c", ("b",)), ("d", ()), fails="a")
    failed = run_steps(steps, 2, Processes(), Tracker())
    assert sorted(order) == ["a", "d"]
    assert failed["a"] == "no luck"
    assert set(failed) == {"a", "b", "c"}


def test_processor_time_is_the_commands_own_and_sleep_costs_none(tmp_path: Path) -> None:
    from schedule import Processes

    busy = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass\nprint('said')"
    worked = Processes().run([sys.executable, "-c", busy], tmp_path / "log")
    slept = Processes().run([sys.executable, "-c", "import time, sys\ntime.sleep(0.5)\nsys.exit(3)"], tmp_path / "log")
    assert worked.code == 0
    assert worked.core_seconds >= 0.3
    assert slept.code == 3
    assert slept.seconds >= 0.5
    assert slept.core_seconds < 0.4
    assert "said\n" in (tmp_path / "log").read_text()


def test_stopping_ends_what_runs_and_starts_nothing_more(tmp_path: Path) -> None:
    from schedule import Processes, Step, StepFailed, run_steps

    processes = Processes()
    codes: list[int] = []

    def sleep() -> str:
        codes.append(processes.run([sys.executable, "-c", "import time\ntime.sleep(60)"], tmp_path / "log").code)
        return "slept"

    def interrupt() -> str:
        while not processes._running:
            time.sleep(0.01)
        raise KeyboardInterrupt

    steps = [Step("sleep", 1.0, lambda: False, sleep), Step("interrupt", 1.0, lambda: False, interrupt)]
    with pytest.raises(KeyboardInterrupt):
        run_steps(steps, 2, processes, Tracker())
    assert codes == [-15]
    with pytest.raises(StepFailed, match="stopped"):
        processes.run(["true"], tmp_path / "log")


# ---- the bench, with a command that only pretends --------------------------------------------------------------------

STUB = """
import json, pathlib, sys, time
verb, *rest = sys.argv[1:]
given = dict(each.split("=", 1) for each in rest)
folder = pathlib.Path(given["run_dir"].strip("'"))
calls = pathlib.Path(__file__).with_name("calls")
calls.open("a").write(json.dumps([verb, given]) + "\\n")
folder.mkdir(parents=True, exist_ok=True)
if verb == "protect":
    end = time.process_time() + 0.04 * int(given["method.rounds"])
    while time.process_time() < end:
        pass
    if given["method"] == "refused":
        sys.exit(3)
    if given["method"] == "broken" and "seed1" in str(folder) and not calls.with_name("mended").exists():
        print("something broke")
        sys.exit(1)
else:
    (folder / "audit.json").write_text(json.dumps({"verdict": "Pretended."}))
"""


@pytest.fixture
def stage(tmp_path: Path) -> Callable[..., int]:
    (tmp_path / "stub.py").write_text(STUB)
    (tmp_path / "reference" / "checkpoint").mkdir(parents=True)
    (tmp_path / "reference" / "checkpoint" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "rows.yaml").write_text(
        "methods: {good: [method=good], refused: [method=refused], broken: [method=broken]}"
    )

    def run(*arguments: str) -> int:
        from bench import main

        where = ["--runs", str(tmp_path / "runs"), "--reference", str(tmp_path / "reference")]
        options = [*where, "--rows", str(tmp_path / "rows.yaml"), "--minutes", "0.002", "--looks", "1", *arguments]
        return main(options, (sys.executable, str(tmp_path / "stub.py")))

    return run


def calls(tmp_path: Path) -> list[tuple[str, dict[str, str]]]:
    """Return and forget what was called."""
    path = tmp_path / "calls"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    path.unlink(missing_ok=True)
    return [(verb, {key: value.strip("'") for key, value in each.items()}) for verb, each in found]


def folders(tmp_path: Path, found: list[tuple[str, dict[str, str]]]) -> list[str]:
    return [str(Path(each["run_dir"]).relative_to(tmp_path / "runs")) for _, each in found]


def test_the_bench_goes_breadth_first_and_on_where_it_stopped(
    tmp_path: Path, stage: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert stage("--methods", "good", "refused", "--seeds", "0", "1") == 0
    found = calls(tmp_path)
    assert folders(tmp_path, found) == [
        "controls/audit",
        *("good/timed_1", "good/timed_3", "good/seed0/protect", "good/seed0/audit"),
        *("refused/timed_1", "refused/timed_3", "refused/seed0/protect"),
        *("good/seed1/protect", "good/seed1/audit", "refused/seed1/protect"),
    ]
    controls, audits = found[0][1], [each for verb, each in found[1:] if verb == "audit"]
    assert controls["attack.roles"] == "[unprotected,scratch]"
    assert controls["checkpoint"] == str(tmp_path / "reference")
    for audit_ in audits:
        assert str(tmp_path / "runs" / "controls" / "audit") in audit_["attack.reuse"]
        assert audit_["seed"] == controls["seed"], "or nothing could be reused"
    assert [each["seed"] for verb, each in found if verb == "protect" and "good/seed" in each["run_dir"]] == [
        "0",
        "1",
    ]
    assert {each["threads"] for _, each in found} == {"1"}
    assert {each["device"] for _, each in found} == {"cpu"}

    budget = load(tmp_path / "runs" / "good" / "budget.json")
    used = {each["method.rounds"] for verb, each in found if "good/seed" in each["run_dir"] and verb == "protect"}
    assert used == {str(budget["rounds"])}
    cell = load(tmp_path / "runs" / "good" / "seed1" / "cell.json")
    assert cell["protect"]["exit_code"] == cell["audit"]["exit_code"] == 0
    assert cell["protect"]["core_seconds"] > 0.04 * budget["rounds"]
    assert cell["overrides"] == ["method=good"]
    refused = load(tmp_path / "runs" / "refused" / "seed0" / "cell.json")
    assert refused["protect"]["exit_code"] == 3
    assert "audit" not in refused

    assert stage("--methods", "good", "refused", "--seeds", "0", "1") == 0
    assert calls(tmp_path) == []
    assert stage("--methods", "good", "--seeds", "2") == 0
    assert folders(tmp_path, calls(tmp_path)) == ["good/seed2/protect", "good/seed2/audit"]
    assert stage("--methods", "good", "--seeds", "0", "--screen") == 0
    screened = calls(tmp_path)
    assert folders(tmp_path, screened) == ["controls/screen", "good/seed0/screen"]
    assert {each["attack"] for _, each in screened} == {"bench_c_screen"}
    assert "core-minutes" in capsys.readouterr().err


@pytest.mark.slow
def test_a_step_that_fails_is_said_and_tried_again(
    tmp_path: Path, stage: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert stage("--methods", "broken", "good", "--seeds", "0", "1", "--jobs", "2") == 1
    assert "good/seed1/audit" in folders(tmp_path, calls(tmp_path))
    said = capsys.readouterr().err
    assert "bench: broken/seed1/protect: exit code 1, something broke" in said
    assert "bench: broken/seed1/audit: left out" in said
    before = load(tmp_path / "runs" / "broken" / "seed1" / "cell.json")["protect"]["core_seconds"]
    (tmp_path / "mended").touch()
    assert stage("--methods", "broken", "good", "--seeds", "0", "1") == 0
    assert folders(tmp_path, calls(tmp_path)) == ["broken/seed1/protect", "broken/seed1/audit"]
    assert load(tmp_path / "runs" / "broken" / "seed1" / "cell.json")["protect"]["core_seconds"] > before


def test_a_bench_keeps_to_what_it_began_with(
    tmp_path: Path, stage: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert stage("--methods", "good") == 0
    calls(tmp_path)
    assert stage("--methods", "good", "--minutes", "1") == 2
    assert "minutes=0.002, now minutes=1.0" in capsys.readouterr().err
    rows = tmp_path / "rows.yaml"
    rows.write_text(rows.read_text().replace("method=good", "method=better"))
    assert stage("--methods", "good") == 2
    assert "was made with ['method=good'], now ['method=better']" in capsys.readouterr().err
    weights = tmp_path / "reference" / "checkpoint" / "model.safetensors"
    pipeline = tmp_path / "reference" / "checkpoint" / "unet" / "diffusion_pytorch_model.safetensors"
    pipeline.parent.mkdir()
    weights.rename(pipeline)
    assert stage("--methods", "good") == 2, "the same weights, wherever they are, but other rows"
    assert "was made with" in capsys.readouterr().err
    pipeline.unlink()
    assert stage("--methods", "good") == 2
    assert "holds no model.safetensors" in capsys.readouterr().err
    assert calls(tmp_path) == []
    for wrong in (("--minutes", "0"), ("--minutes", "nan"), ("--jobs", "0")):
        with pytest.raises(SystemExit, match="2"):
            stage(*wrong)


# ---- the table -------------------------------------------------------------------------------------------------------


def attack(name: str, protected: float, *, search: bool = False, **changes: Any) -> dict[str, Any]:
    """Return an entry of audit.json's attacks in which unprotected reaches 80 and scratch 60."""
    values = {"protected": protected, "unprotected": 80.0, "scratch": 60.0}
    roles = {
        role: {"mean": v, "values": [v], "ci95": None, "n": 1, "failed": 0, "select": v, "details": {}}
        for role, v in values.items()
    }
    gap = {"value": (80 - protected) / 20, "ci95": None, "reason": None}
    exposure = changes.pop("exposure", "seen")
    strategy = {"steps": 200, "scope": "all", "surgery": [], "data_budget": None, **changes}
    found = {"name": "tpe_search"} if search else None
    return {
        "attack": name,
        "strategy": strategy,
        "search": found,
        "exposure": exposure,
        "roles": roles,
        "gap_closed": gap,
    }


def audit(best: float, loss: float, share: float | None = 0.5) -> dict[str, Any]:
    """Return what collect.py reads of an audit.json; ``best`` is what the search gets out of the protected model."""
    weights = {"layers": {"norm": {"ratio": {"mean": 1.25}}}}
    return {
        "metric": METRIC,
        "verdict": "Said.",
        "attacks": [
            attack("adam", 70.0),
            attack("tpe_search", best, search=True, exposure="held_out"),
            attack("lora", 64.0, scope="lora", exposure="held_out"),
            attack("renormalise", 66.0, surgery=[{"operation": "renormalise"}]),
            attack("long", 79.0, steps=4000, exposure="longer"),
        ],
        "intactness": {"metric": "accuracy", "unit": "%", "higher_is_better": True, "loss": loss},
        "benign": {"worst_harm": {"attack": "adam", "value": 2.0, "ci95": None}},
        "masking": {"measured": {"weights": weights}, "pairs": [], "share": share},
    }


def cell(runs: Path, method: str, seed: int, found: dict[str, Any] | None, code: int = 0) -> None:
    folder = runs / method / f"seed{seed}"
    (folder / "audit").mkdir(parents=True)
    protect = {"exit_code": code, "core_seconds": 660.0, "seconds": 700.0, "machine": {}, "date": "2026-01-01"}
    budget = {"rounds": 90, "minutes": 12.0, "seconds_per_round": 8.0}
    facts = {"method": method, "seed": seed, "overrides": [f"method={method}"], "budget": budget, "protect": protect}
    (folder / "cell.json").write_text(json.dumps(facts))
    if found is not None:
        (folder / "audit" / "audit.json").write_text(json.dumps(found))


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    for seed, best in enumerate((72.0, 74.0, 76.0)):
        cell(tmp_path / "runs", "pool", seed, audit(best, 1.0 + seed))
    cell(tmp_path / "runs", "mlac", 0, audit(80.0, 0.5, share=None))
    cell(tmp_path / "runs", "mlac", 1, None, code=3)
    cell(tmp_path / "runs", "tar", 0, None, code=130)
    cell(tmp_path / "runs", "without_kept", 0, audit(78.0, 0.5))
    cell(tmp_path / "runs", "mine", 0, audit(78.0, 0.5))
    return tmp_path


def lines(text: str) -> dict[str, list[str]]:
    """Return the rows of Markdown tables by their first cell."""
    cut = [[part.strip() for part in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in cut}


def test_the_table_has_means_with_intervals_and_says_what_is_missing(finished: Path) -> None:
    from collect import main

    assert main([str(finished / "runs"), "--out", str(finished / "out")]) == 0
    text = (finished / "out" / "table.md").read_text()
    found = lines(text)
    head = found["method"]
    pool = dict(zip(head, found["pool"], strict=True))
    # gaps closed by the search, the best of 200 steps: 0.4, 0.3, 0.2; Student's t at 2 degrees of freedom is 4.30
    assert pool["**worst case**"] == pool["search"] == pool["held out"] == "0.30 ± 0.25"
    assert pool["intactness loss"] == "2.0 ± 2.5"
    assert (pool["plain"], pool["surgery"], pool["lora"]) == ("0.50 ± 0.00", "0.70 ± 0.00", "0.80 ± 0.00")
    assert pool["partial"] == "-"
    assert pool["long"] == "0.05 ± 0.00"
    assert (pool["masked share"], pool["norm ratio"]) == ("0.50 ± 0.00", "1.25 ± 0.00")
    assert (pool["benign harm"], pool["core-minutes"]) == ("2.0 ± 0.0", "11.0 ± 0.0")
    assert pool["seeds"] == "3"
    mlac = dict(zip(head, found["mlac"], strict=True))
    assert mlac["**worst case**"] == "0.00 (n = 1)"
    assert mlac["masked share"] == "-"
    assert mlac["seeds"] == "1, 1 without an acceptable checkpoint"
    assert dict(zip(head, found["tar"], strict=True))["seeds"] == "0, 1 unfinished"
    assert text.count("| method |") == 3, "methods, ablations, others"
    assert text.index("| mlac |") < text.index("| pool |") < text.index("| without_kept |") < text.index("| mine |")
    assert "unprotected 80.0 (tpe_search), scratch 60.0 (tpe_search)" in text


def test_results_keep_every_raw_value_and_the_figure_is_drawn(finished: Path) -> None:
    from collect import main

    out = finished / "out"
    assert main([str(finished / "runs"), "--out", str(out)]) == 0
    results = load(out / "results.json")
    assert {"date", "machine", "methods"} <= set(results)
    seed = results["methods"]["pool"]["seeds"]["1"]
    assert seed["attacks"]["tpe_search"]["test"] == {"protected": [74.0], "unprotected": [80.0], "scratch": [60.0]}
    assert seed["groups"]["worst_case"]["gap_closed"]["value"] == pytest.approx(0.3)
    assert seed["groups"]["exposure/seen"]["roles"]["protected"]["attack"] == "adam"
    assert (results["methods"]["pool"]["rounds"], seed["core_minutes"]) == (90, 11.0)
    assert results["methods"]["mlac"]["seeds"]["1"]["exit_code"] == 3
    first = (out / "worst_case.svg").read_text()
    assert first.startswith("<?xml")
    from collect import gather, points

    drawn = points(gather(finished / "runs", "audit", 200), ["pool", "tar", "mlac"])
    assert drawn == {"pool": [(1.0, 0.4), (2.0, 0.3), (3.0, 0.2)], "mlac": [(0.5, 0.0)]}


def test_losses_of_an_error_are_in_percent_of_it(tmp_path: Path) -> None:
    from collect import main

    found = audit(70.0, 0.002)
    found["metric"] = {"name": "eps_mse", "unit": "", "higher_is_better": False}
    found["intactness"] = {**found["metric"], "before": 0.04, "after": 0.042, "loss": 0.002}
    found["benign"]["worst_harm"] |= {"value": 0.001, "sgrc": 2.5}
    for entry in found["attacks"]:  # of errors the larger is the worse for an attacker
        roles = entry["roles"]
        roles["unprotected"], roles["scratch"] = roles["scratch"], roles["unprotected"]
    cell(tmp_path / "runs", "dos", 0, found)
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "table.md").read_text()
    row = dict(zip(lines(text)["method"], lines(text)["dos"], strict=True))
    assert (row["intactness loss"], row["benign harm"]) == ("5.0", "2.5")
    assert "in percent of the error" in text
    assert "loss on the original domain (percent)" in (tmp_path / "out" / "worst_case.svg").read_text()


def test_seeds_of_an_earlier_bench_are_added_and_replace_nothing(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from collect import main

    earlier, out = finished / "earlier", finished / "out"
    cell(earlier, "pool", 0, audit(79.0, 0.0))
    cell(earlier, "pool", 3, audit(78.0, 1.0))
    cell(earlier, "sharpness", 0, audit(80.0, 1.0))
    assert main([str(earlier), "--out", str(earlier)]) == 0
    also = ["--also", str(earlier / "results.json"), "--out", str(out)]
    assert main([str(finished / "runs"), *also]) == 0
    methods = load(out / "results.json")["methods"]
    searched = {
        seed: each["attacks"]["tpe_search"]["test"]["protected"] for seed, each in methods["pool"]["seeds"].items()
    }
    assert searched == {"0": [72.0], "1": [74.0], "2": [76.0], "3": [78.0]}
    assert list(methods["sharpness"]["seeds"]) == ["0"]
    changed = json.loads((earlier / "results.json").read_text())
    changed["methods"]["pool"]["overrides"] = ["method=pool", "method.pool=3"]
    (earlier / "results.json").write_text(json.dumps(changed))
    assert main([str(finished / "runs"), *also]) == 2
    assert "has pool with" in capsys.readouterr().err


def test_an_empty_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from collect import main

    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "holds no cell" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- for real --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_tiny_cell_for_real(tmp_path: Path) -> None:
    from bench import main
    from collect import main as collect

    assert sophon(tmp_path, *PRETRAIN).code == 0
    bench = tmp_path / "bench"
    (tmp_path / "rows.yaml").write_text("methods: {pooled: [method=pool, method.pool=2]}")
    sizes = [each for each in PRETRAIN if each.startswith("domain.")]
    # rounds that take longer than the time of two starts differs
    others = ["guard.every=1", "guard.tolerance=100", "sampler.steps=[20,20]", "sampler.batch_sizes=[64]"]
    where = ["--runs", str(bench), "--reference", str(tmp_path / "runs" / "quickstart" / "seed0" / "pretrain")]
    what = ["--rows", str(tmp_path / "rows.yaml"), "--experiment", "quickstart", "--attack", "smoke"]
    options = [*where, *what, "--minutes", "0.05", "--looks", "10", "--set", *sizes, *others]
    assert main(options) == 0

    budget = load(bench / "pooled" / "budget.json")
    assert budget["rounds"] == max(1, int(3 / budget["seconds_per_round"]))
    manifest = load(bench / "pooled" / "seed0" / "protect" / "checkpoint" / "sophon.json")
    assert manifest["history"]["rounds"] == budget["rounds"]
    attempts = sorted((bench / "pooled" / "seed0" / "audit" / "attempts").iterdir())
    shared = [path for path in attempts if "-protected-" not in path.name]
    assert len(shared) == 2 * (len(attempts) - len(shared)) > 0
    for mine in shared:
        theirs = load(bench / "controls" / "audit" / "attempts" / mine.name)
        assert theirs["seconds"] == load(mine)["seconds"], "taken over, not run again"

    assert collect([str(bench), "--steps", "40", "--out", str(tmp_path / "out")]) == 0
    seed = load(tmp_path / "out" / "results.json")["methods"]["pooled"]["seeds"]["0"]
    assert seed["groups"]["worst_case"]["roles"].keys() == {"protected", "unprotected", "scratch"}
    assert seed["norm_ratio"] > 0
    assert seed["core_minutes"] > 0


# ---- a model without learnt features in its first layers -------------------------------------------------------------


def test_what_is_to_stay_random_stays_and_all_else_is_distilled() -> None:
    import growth
    import handicap

    model, before = tiny_model(1), state_of(tiny_model(1))
    first = next(name for name, _ in model.named_parameters()).rsplit(".", 1)[0]
    options = handicap.parsed(["--reference", "r", "--out", "o", "--random", first, "--steps", "3"])
    kept = handicap.held(model, options.random)
    task = tiny_task()
    task.distillation = 1.0
    growth.grow(model, tiny_model(0), task, tiny_images(0), options, lambda: handicap.put_back(kept))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith(first), name
    with pytest.raises(UserError, match="--random: no parameter's name begins with 'nowhere'"):
        handicap.held(model, ["nowhere"])


# ---- what a gain asks of the arithmetic ------------------------------------------------------------------------------


@given(st.floats(-1e6, 1e6, width=32))
def test_rounding_to_seven_bits_is_bfloat16s(value: float) -> None:
    from gains import rounded

    exact = torch.tensor([value])
    found, wanted = rounded(exact, 7), exact.to(torch.bfloat16).float()
    # a tie may go either way
    assert torch.equal(found, wanted) or (found - exact).abs() == (wanted - exact).abs()
    assert torch.equal(rounded(exact, 23), exact)


def test_precision_rounds_what_is_multiplied_and_leaves_no_trace() -> None:
    from gains import precision

    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 16, 2))
    images = torch.randn(5, 3, 6, 6)
    before, state = model(images), state_of(model)
    with precision(model, 7):
        rough = model(images)
    assert 1e-5 < (rough - before).abs().max() < 0.1
    assert torch.equal(model(images), before)
    assert all(torch.equal(value, state[name]) for name, value in state_of(model).items())


def test_gains_for_all_interfaces_and_for_one_at_a_time() -> None:
    from gains import choices, parsed

    needed = ["--run", "r", "--reference", "r", "--out", "o"]
    options = parsed([*needed, "--gains", "10", "--spreads", "1", "1e4", "--only", "100"])
    assert choices(options, 3) == {
        "10": ([10, 10, 10], 1),
        "10-spread10000": ([10, 10, 10], 1e4),
        "100-0": ([100, 1, 1], 1),
        "100-1": ([1, 100, 1], 1),
        "100-2": ([1, 1, 100], 1),
    }
    for wrong in (["--gains", "0"], ["--spreads", "0.5"], ["--untrained", "inf"]):
        with pytest.raises(SystemExit):
            parsed([*needed, *wrong])


def test_an_attacker_may_normalise_what_its_head_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    import normalised_head

    monkeypatch.setattr(normalised_head, "STEPS", 30)
    model, before = tiny_model(0), state_of(tiny_model(0))
    model.get_parameter("fc.weight").data.mul_(1e4)  # of no concern to who replaces it
    domain, task = tiny_domain("restricted", ("attack", "test")), ClassificationTask(tiny_spec())
    first, last, *found = normalised_head.attacked(model.float(), task, domain, "adam", 0.01, 0)
    assert last < first < 3
    assert all(0 <= accuracy <= 100 for accuracy in found)
    assert model.state_dict().keys() == before.keys(), "a copy was attacked"


def test_kfac_takes_the_same_steps_in_other_coordinates() -> None:
    import preconditioned

    torch.manual_seed(0)
    images, wanted = torch.randn(64, 6, dtype=torch.float64), torch.randn(64, 4, dtype=torch.float64)
    mixed, turned = (torch.randn(6, 6, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64))
    plain = torch.nn.Linear(6, 4, dtype=torch.float64)
    other = torch.nn.Linear(6, 4, dtype=torch.float64)
    with torch.no_grad():  # the same function of images, read as images @ mixed, and said as turned @ answer
        other.weight.copy_(turned @ plain.weight @ mixed.inverse().T)
        other.bias.copy_(turned @ plain.bias)
    stepped = []
    for layer, seen, says in ((plain, images, None), (other, images @ mixed, turned.inverse())):
        stepper, answers = preconditioned.KFAC(layer, 0.1, 1e-12, 1e-3), []
        for _ in range(5):
            answer = layer(seen) if says is None else layer(seen) @ says.T
            layer.zero_grad()
            (answer - wanted).square().mean().backward()
            stepper.step(1.0)
            answers.append(answer.detach())
        stepped.append(answers)
    assert not torch.allclose(stepped[0][0], stepped[0][-1], atol=1e-3)
    for ours, theirs in zip(*stepped, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_steps_the_models_own_weights_as_torch_does(layout: torch.memory_format) -> None:
    import preconditioned

    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.Flatten(), torch.nn.Linear(12, 2))
    network = network.to(memory_format=layout)
    before, images = copy.deepcopy(network), torch.randn(5, 2, 4, 4)
    stepper = preconditioned.Muon(network, 0.1, 0.01)
    network(images).square().sum().backward()
    stepper.step(0.5)
    matrix = torch.nn.Parameter(before[0].weight.detach().clone().reshape(3, 18))
    matrix.grad = network[0].weight.grad.reshape(3, 18)
    torch.optim.Muon([matrix], lr=0.05, weight_decay=0.0).step()
    torch.testing.assert_close(network[0].weight.detach().reshape(3, 18), matrix.detach())
    assert not torch.equal(network[0].weight, before[0].weight)
    # Adam's first step is its rate
    torch.testing.assert_close((network[2].bias - before[2].bias).abs(), torch.full((2,), 0.005), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("optimizer", "setting"), [("kfac", (0.1, 0.01, 1e-3)), ("muon", (0.01, 1e-3))])
def test_a_preconditioning_attacker_learns(
    optimizer: str, setting: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    import preconditioned

    monkeypatch.setattr(preconditioned, "BATCH", 8)
    monkeypatch.setattr(preconditioned, "STEPS", 60)
    model, domain = tiny_model(0).float(), tiny_domain("restricted", ("attack", "select", "test"))
    task, before = ClassificationTask(tiny_spec()), copy.deepcopy(state_of(model))
    found = preconditioned.attacked(model, task, domain, optimizer, setting, 0)
    assert min(found) >= 0
    assert max(found) > task.evaluate(model, domain["select"])
    assert all(torch.equal(value, before[name]) for name, value in state_of(model).items()), "a copy was attacked"
