"""What an audit takes over from others: the same attempts and searches, and never different ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sophon.auditing import reuse as module
from sophon.auditing.runner import Frechet
from sophon.config import AttackConfig
from sophon.errors import UserError
from sophon.sampler import SamplerConfig, StrategySampler
from sophon.tasks import ClassificationTask
from tests.auditing.staging import (
    BENIGN,
    CONFIG,
    FRESH,
    SEARCH,
    attempts_of,
    results,
    run_all,
    staged,
)
from tests.tiny import tiny_model, tiny_spec

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("buildable")]  # whole audits

SMALL = AttackConfig(seeds=1, eval_points=2, samples=1, strategies={"a": FRESH})
WHOLE = replace(SMALL, search={"tuned": replace(SEARCH, trials=2, seeds=1)}, oracle="a", benign=["a"])


class Drawing(ClassificationTask):
    """A classifier that claims to generate."""

    def sample(self, model: nn.Module, count: int, seed: int) -> Tensor:  # type: ignore[override]
        level = int(1000 * float(model.conv1.weight.detach().abs().sum())) % 256
        return torch.full((count, 1, 6, 6), level, dtype=torch.uint8)


def reusing(config: AttackConfig, *folders: Path) -> AttackConfig:
    return replace(config, reuse=[str(folder) for folder in folders])


def drawing(folder: Path, config: AttackConfig, **changes: Any) -> Any:
    return staged(folder, config, task=Drawing(tiny_spec(), dtype=torch.float64), benign=BENIGN, **changes)


def test_everything_is_taken_over_with_its_winners_and_pictures(tmp_path: Path, attacked: list[Any]) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    first = run_all(drawing(one, WHOLE))
    done = len(attacked)
    second = run_all(drawing(two, reusing(WHOLE, one)))
    assert len(attacked) == done
    assert second == first  # also how long it took
    attempts, searches = second
    assert len(searches) == 3
    assert len(attempts) == 3 + 3 + 1 + 3
    pictures = [sample["file"] for attempt in attempts for sample in attempt["samples"]]
    assert len(pictures) == 2 * len(attempts)
    assert all((two / file).read_bytes() == (one / file).read_bytes() for file in pictures)


def test_exposure_is_this_audits_own(tmp_path: Path, attacked: list[Any]) -> None:
    """Another protection may have simulated other attackers."""
    one, two = tmp_path / "one", tmp_path / "two"
    first = run_all(drawing(one, WHOLE))[0]
    support = StrategySampler(SamplerConfig({"sgd": [0.001, 0.1]}, [8], [1, 4], ["fresh"])).support()
    done = len(attacked)
    second = run_all(drawing(two, reusing(WHOLE, one), support=support))[0]
    assert len(attacked) == done
    assert [record["exposure"] for record in first if record["attack"] == "a"][1:] == ["seen"] * 6
    assert all(record["exposure"] == "held_out" and "optimizer" in record["outside"] for record in second)
    own = ("exposure", "outside")
    assert [{k: v for k, v in r.items() if k not in own} for r in first] == [
        {k: v for k, v in r.items() if k not in own} for r in second
    ]


def test_another_protected_model_takes_over_all_but_its_own_attempts(tmp_path: Path, attacked: list[Any]) -> None:
    one, two, alone = tmp_path / "one", tmp_path / "two", tmp_path / "alone"
    run_all(drawing(one, WHOLE))
    attacked.clear()
    others: dict[str, Any] = {"models": {"protected": tiny_model(7), "unprotected": tiny_model(2)}}
    given = drawing(one, WHOLE).scene.provenance
    others["provenance"] = {**given, "protected": "another protected model"}
    stage = drawing(two, reusing(WHOLE, one), **others)
    assert {stage.jobs[path].role for path in stage.missing()} == {"protected"}
    found = run_all(stage)
    # an attempt, one on the benign domain, two trials and the winner
    assert len(attacked) == 1 + 1 + 2 + 1
    for mine, alones in zip(found, run_all(drawing(alone, WHOLE, **others)), strict=True):
        assert results(mine) == results(alones)


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({"seed": 1}, {}),
        ({}, {"eval_points": 3}),
        ({}, {"samples": 2}),
        ({}, {"strategies": {"a": replace(FRESH, lr=0.02)}}),
        ({}, {"strategies": {"b": FRESH}}),
        ({"frechet": Frechet("other", lambda images: 0.0)}, {}),
        ({"restricted": BENIGN}, {}),
        ({"provenance": {}}, {}),
    ],
)
def test_what_would_come_out_differently_is_never_taken_over(
    changes: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    attempts_of(staged(tmp_path / "one", SMALL))
    stage = staged(tmp_path / "two", reusing(replace(SMALL, **settings), tmp_path / "one"), **changes)
    assert len(stage.missing()) == 3


def test_only_what_is_wanted_is_taken_over_and_the_rest_is_run(tmp_path: Path, attacked: list[Any]) -> None:
    run_all(staged(tmp_path / "one", SMALL))
    run_all(staged(tmp_path / "two", replace(SMALL, strategies={"b": FRESH, "c": FRESH})))
    attacked.clear()
    config = replace(SMALL, strategies={"a": FRESH, "b": FRESH, "d": FRESH})
    records = attempts_of(staged(tmp_path / "three", reusing(config, tmp_path / "one", tmp_path / "two")))
    assert len(attacked) == 3
    assert {record["attack"] for record in records} == {"a", "b", "d"}
    assert len(list((tmp_path / "three" / "attempts").iterdir())) == 9


def test_of_several_the_first_and_what_is_there_already_is_left_alone(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two", "three")]
    for folder in folders[:2]:
        attempts_of(staged(folder, SMALL))
    one, two, three = folders
    assert attempts_of(staged(three, reusing(SMALL, one, two))) == attempts_of(staged(one, SMALL))
    assert attempts_of(staged(three, reusing(SMALL, two))) == attempts_of(staged(one, SMALL))


def test_an_unfinished_audit_can_be_taken_over_too(tmp_path: Path, attacked: list[Any]) -> None:
    stage = staged(tmp_path / "one", CONFIG)
    stage.run(next(iter(stage.jobs)))
    assert len(staged(tmp_path / "two", reusing(CONFIG, tmp_path / "one")).missing()) == 11


def test_taking_over_twice_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search's own file comes last, so that it is never there without its winners."""
    one, two = tmp_path / "one", tmp_path / "two"
    whole = run_all(staged(one, WHOLE))
    genuine = module.write_json

    def stopping(path: Path, record: Any) -> None:
        if path.parent.name == "searches":
            raise KeyboardInterrupt
        genuine(path, record)

    monkeypatch.setattr(module, "write_json", stopping)
    with pytest.raises(KeyboardInterrupt):
        staged(two, reusing(WHOLE, one)).missing()
    assert not list(two.glob("searches/*"))
    assert list(two.glob("attempts/tuned-*"))
    monkeypatch.setattr(module, "write_json", genuine)
    assert run_all(staged(two, reusing(WHOLE, one))) == whole


def test_bad_folders_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"attack.reuse: '.*nowhere' is not a folder; give the run directories"):
        staged(tmp_path / "two", reusing(SMALL, tmp_path / "nowhere")).missing()


def test_a_damaged_result_is_refused(tmp_path: Path) -> None:
    attempts_of(staged(tmp_path / "one", SMALL))
    victim = next((tmp_path / "one" / "attempts").iterdir())
    victim.write_text(victim.read_text()[:40])
    with pytest.raises(UserError, match="truncated or not JSON"):
        staged(tmp_path / "two", reusing(SMALL, tmp_path / "one")).missing()


def test_a_missing_picture_is_refused(tmp_path: Path) -> None:
    attempts_of(drawing(tmp_path / "one", SMALL))
    next((tmp_path / "one" / "samples").iterdir()).unlink()
    with pytest.raises(UserError, match=r"attack.reuse: an attempt in '.*one' lacks its picture 'a-"):
        drawing(tmp_path / "two", reusing(SMALL, tmp_path / "one")).missing()


def test_a_search_without_its_winners_is_refused(tmp_path: Path) -> None:
    run_all(staged(tmp_path / "one", WHOLE))
    next((tmp_path / "one" / "attempts").glob("tuned-protected-*")).unlink()
    with pytest.raises(UserError, match=r"cannot read .*tuned-protected-.*: no such file"):
        staged(tmp_path / "two", reusing(WHOLE, tmp_path / "one")).missing()


def test_a_taken_over_result_is_a_file_like_any_other(tmp_path: Path) -> None:
    """What it holds does not tell where it comes from: it can be taken over again."""
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    first = run_all(staged(one, WHOLE))
    run_all(staged(two, reusing(WHOLE, one)))
    assert run_all(staged(three, reusing(WHOLE, two))) == first
    for path in one.glob("attempts/*.json"):
        assert json.loads((three / "attempts" / path.name).read_text()) == json.loads(path.read_text())
