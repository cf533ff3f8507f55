"""What an audit takes over from others: the same attempts and searches, and never different ones."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sophon.auditing import reuse as module
from sophon.config import AttackConfig
from sophon.errors import UserError
from sophon.sampler import SamplerConfig, StrategySampler
from tests.auditing.staging import BENIGN, FRESH, SEARCH, Drawing, attempts_of, results, run_all, staged
from tests.tiny import tiny_model

pytestmark = pytest.mark.slow  # whole audits

SMALL = AttackConfig(seeds=1, eval_points=2, samples=1, strategies={"a": FRESH})
WHOLE = replace(SMALL, search={"tuned": replace(SEARCH, trials=2, seeds=1)}, oracle="a", benign=["a"])
Records = Any


def reusing(config: AttackConfig, *folders: Path) -> AttackConfig:
    return replace(config, reuse=[str(folder) for folder in folders])


def drawing(folder: Path, config: AttackConfig, **changes: Any) -> Any:
    return staged(folder, config, task=Drawing(), benign=BENIGN, **changes)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Records]:
    """An audit of one attack that draws, and its records; not to be written to."""
    folder = tmp_path_factory.mktemp("small")
    return folder, attempts_of(drawing(folder, SMALL))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Records]:
    """An audit of every kind of job, and its records; not to be written to."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run_all(drawing(folder, WHOLE))


def test_everything_is_taken_over_with_its_winners_and_pictures(
    whole: tuple[Path, Records], tmp_path: Path, attacked: list[Any]
) -> None:
    """A taken over result does not tell where it comes from: it can be taken over again."""
    folders = [whole[0], tmp_path / "two", tmp_path / "three"]
    for source, target in pairwise(folders):
        attempts, searches = found = run_all(drawing(target, reusing(WHOLE, source)))
        assert found == whole[1]  # also how long it took
        assert len(searches) == 3
        assert len(attempts) == 3 + 3 + 1 + 3
        files = [sample["file"] for attempt in attempts for sample in attempt["samples"]]
        assert len(files) == 2 * len(attempts)
        files += [str(path.relative_to(source)) for path in source.glob("attempts/*.json")]
        assert all((target / file).read_bytes() == (source / file).read_bytes() for file in files)
    assert not attacked


def test_exposure_is_this_audits_own(whole: tuple[Path, Records], tmp_path: Path, attacked: list[Any]) -> None:
    """Another protection may have simulated other attackers."""
    one, (first, _) = whole
    support = StrategySampler(SamplerConfig({"sgd": [0.001, 0.1]}, [8], [1, 4], ["fresh"])).support()
    second = run_all(drawing(tmp_path, reusing(WHOLE, one), support=support))[0]
    assert not attacked
    assert [record["exposure"] for record in first if record["attack"] == "a"][1:] == ["seen"] * 6
    assert all(record["exposure"] == "held_out" and "optimizer" in record["outside"] for record in second)
    own = ("exposure", "outside")
    assert [{k: v for k, v in r.items() if k not in own} for r in first] == [
        {k: v for k, v in r.items() if k not in own} for r in second
    ]


def test_another_protected_model_takes_over_all_but_its_own_attempts(
    whole: tuple[Path, Records], tmp_path: Path, attacked: list[Any]
) -> None:
    others: dict[str, Any] = {"models": {"protected": tiny_model(7), "unprotected": tiny_model(2)}}
    given = drawing(whole[0], WHOLE).scene.provenance
    others["provenance"] = {**given, "protected": "another protected model"}
    stage = drawing(tmp_path / "two", reusing(WHOLE, whole[0]), **others)
    assert {stage.jobs[path].role for path in stage.missing()} == {"protected"}
    found = run_all(stage)
    # an attempt, one on the benign domain, two trials and the winner
    assert len(attacked) == 1 + 1 + 2 + 1
    for mine, alones in zip(found, run_all(drawing(tmp_path / "alone", WHOLE, **others)), strict=True):
        assert results(mine) == results(alones)


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({"seed": 1}, {}),
        ({"restricted": BENIGN}, {}),
        ({}, {"eval_points": 3}),
        ({}, {"samples": 2}),
        ({}, {"strategies": {"a": replace(FRESH, lr=0.02)}}),
    ],
)
def test_what_would_come_out_differently_is_never_taken_over(
    changes: dict[str, Any], settings: dict[str, Any], small: tuple[Path, Records], tmp_path: Path
) -> None:
    stage = staged(tmp_path, reusing(replace(SMALL, **settings), small[0]), **changes)
    assert len(stage.missing()) == 3


def test_only_what_is_wanted_is_taken_over_from_the_first_that_has_it_and_the_rest_is_run(
    small: tuple[Path, Records], tmp_path: Path, attacked: list[Any]
) -> None:
    one, records = small
    run_all(drawing(tmp_path / "two", replace(SMALL, strategies={"a": FRESH, "b": FRESH, "c": FRESH})))
    attacked.clear()
    config = replace(SMALL, strategies={"a": FRESH, "b": FRESH, "d": FRESH})
    found = attempts_of(drawing(tmp_path / "three", reusing(config, one, tmp_path / "two")))
    assert {strategy for strategy, _ in attacked} == {FRESH}
    assert len(attacked) == 3
    assert [record for record in found if record["attack"] == "a"] == records
    assert len(list((tmp_path / "three" / "attempts").iterdir())) == 9


def test_taking_over_twice_goes_on_where_it_stopped(
    whole: tuple[Path, Records], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search's own file comes last, so that it is never there without its winners."""
    genuine = module.write_json

    def stopping(path: Path, record: Any) -> None:
        if path.parent.name == "searches":
            raise KeyboardInterrupt
        genuine(path, record)

    monkeypatch.setattr(module, "write_json", stopping)
    with pytest.raises(KeyboardInterrupt):
        drawing(tmp_path, reusing(WHOLE, whole[0])).missing()
    assert not list(tmp_path.glob("searches/*"))
    assert list(tmp_path.glob("attempts/tuned-*"))
    monkeypatch.setattr(module, "write_json", genuine)
    assert run_all(drawing(tmp_path, reusing(WHOLE, whole[0]))) == whole[1]


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        ("", r"^attack.reuse: '.*one' is not a folder; give the run directories"),
        ("attempts/a-protected-*", "truncated or not JSON"),
        ("samples/a-*", r"^attack.reuse: an attempt in '.*one' lacks its picture 'a-"),
        ("attempts/tuned-protected-*", r"cannot read .*tuned-protected-.*: no such file"),
    ],
)
def test_what_lacks_something_is_refused_in_one_line(
    damaged: str, message: str, whole: tuple[Path, Records], tmp_path: Path
) -> None:
    if damaged:
        path = next(Path(shutil.copytree(whole[0], tmp_path / "one")).glob(damaged))
        path.write_text("{") if "JSON" in message else path.unlink()
    with pytest.raises(UserError, match=message):
        drawing(tmp_path / "two", reusing(WHOLE, tmp_path / "one")).missing()
