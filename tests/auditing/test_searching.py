"""Searches as part of an audit: what is recorded of them, what they may read, and how they go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from sophon.attacker import FineTuneStrategy
from sophon.auditing import runner as module
from sophon.auditing.words import ROLES
from sophon.auditing.workers import run_jobs
from sophon.domains import ImageSet, LoadedDomain, MemoryImages
from sophon.tasks import ClassificationTask
from sophon.tracking import Tracker
from tests.auditing.staging import BENIGN, FRESH, RESTRICTED, SEARCH, SEARCHING, results, run_all, staged
from tests.tiny import assert_same_state, state_of, tiny_spec

pytestmark = pytest.mark.slow  # whole searches


def test_records_of_a_search(tmp_path: Path, attacked: list[Any]) -> None:
    stage = staged(tmp_path, replace(SEARCHING, roles=list(ROLES)))
    before = {role: state_of(model) for role, model in stage.scene.models.items()}
    attempts, searches = run_all(stage)
    assert [record["role"] for record in searches] == list(ROLES)
    for record in searches:
        assert json.loads((tmp_path / "searches" / f"{record['id']}.json").read_text()) == record
        assert (record["schema_version"], record["name"], record["budget"]) == (2, "tuned", 4)
        for key, value in asdict(SEARCH).items():
            assert key == "trials" or record[key] == value
        assert [trial["number"] for trial in record["trials"]] == [0, 1, 2, 3]
        for trial in record["trials"]:
            assert FineTuneStrategy.of(trial["strategy"]).plain() == trial["strategy"]
            assert trial["strategy"]["steps"] == SEARCH.steps
            assert trial["state"] in ("complete", "pruned")
        complete = [trial for trial in record["trials"] if trial["state"] == "complete"]
        best = record["trials"][record["best"]]
        assert best["value"] == max(trial["value"] for trial in complete)
        winners = [attempt for attempt in attempts if attempt["id"] in record["attempts"]]
        assert [winner["seed"] for winner in winners] == [0, 1]
        for winner in winners:
            assert (winner["attack"], winner["role"], winner["domain"]) == ("tuned", record["role"], "restricted")
            assert winner["strategy"] == best["strategy"]
            assert winner["search"] == {"name": "tuned", "sampler": "tpe", "trials": 4}
            assert [point["step"] for point in winner["curve"]] == [0, 3]  # the audit's points, not the search's
            assert 0 <= winner["test"] <= 100
            assert winner["exposure"] == "seen"
    assert len(attempts) == 3 * 2
    assert len(attacked) == 3 * (4 + 2)
    for role, model in stage.scene.models.items():
        assert_same_state(model, before[role])
    assert stage.missing() == []
    assert run_all(stage) == (attempts, searches)  # what is finished is not run again
    assert len(attacked) == 3 * (4 + 2)


class Reading(LoadedDomain):
    """Remembers which splits were asked for."""

    def __getitem__(self, split: str) -> ImageSet:
        events.append(split)
        return super().__getitem__(split)


events: list[str] = []


def test_test_is_read_by_the_winners_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = module.attack

    def attack(*arguments: Any, **options: Any) -> Any:
        events.append("attacked" if options.get("read_test", True) else "tried")
        return genuine(*arguments, **options)

    monkeypatch.setattr(module, "attack", attack)
    domain = Reading("restricted", RESTRICTED.classes, RESTRICTED.splits, RESTRICTED.hashes)
    stage = staged(tmp_path, SEARCHING, restricted=domain)
    events.clear()
    run_all(stage)
    began = events.index("attacked")
    assert events[:began].count("tried") == 4
    assert set(events[:began]) == {"tried", "attack", "select"}
    assert "tried" not in events[began:]
    # each winner measures it once, looks at its details, and asks for the prompts of pictures
    assert events[began:].count("test") == 2 * 3


def test_every_role_faces_the_same_search(tmp_path: Path, attacked: list[tuple[FineTuneStrategy, int]]) -> None:
    """The same proposals while these are random, and one seed for all trials."""
    config = replace(SEARCHING, roles=list(ROLES), search={"tuned": replace(SEARCH, sampler="random", prune=False)})
    _, searches = run_all(staged(tmp_path, config))
    one, *others = [[trial["strategy"] for trial in record["trials"]] for record in searches]
    assert others == [one, one]
    assert len({json.dumps(strategy) for strategy in one}) == 4
    trials = [call for index, call in enumerate(attacked) if index % 6 < 4]
    assert len({seed for _, seed in trials}) == 1
    winners = [seed for index, (_, seed) in enumerate(attacked) if index % 6 >= 4]
    assert winners == winners[:2] * 3
    assert len({*winners, trials[0][1]}) == 3


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a search gives that nothing interrupts."""
    return run_all(staged(tmp_path_factory.mktemp("whole"), SEARCHING))


@pytest.mark.parametrize("calls", [2, 5, 6])
def test_interrupted_at_any_attack_it_ends_the_same(
    calls: int, whole: Any, tmp_path: Path, attacked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the trials (the first four attacks) or of the winner's attempts (the last two)."""
    genuine: Callable[..., Any] = module.attack

    def stopping(*arguments: Any, **options: Any) -> Any:
        if len(attacked) == calls - 1:
            raise KeyboardInterrupt
        return genuine(*arguments, **options)

    monkeypatch.setattr(module, "attack", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_all(staged(tmp_path, SEARCHING))
    assert not list(tmp_path.glob("searches/*.json"))
    assert len(list(tmp_path.glob("attempts/*.json"))) == max(0, calls - 5)
    monkeypatch.setattr(module, "attack", genuine)
    assert [results(records) for records in run_all(staged(tmp_path, SEARCHING))] == [results(part) for part in whole]
    assert len(attacked) == 6


def test_a_search_in_which_everything_diverges_has_no_winner(tmp_path: Path) -> None:
    search = replace(SEARCH, trials=2, steps=9, optimizers={"nesterov": [1e37, 1e38]})
    models = {role: model.float() for role, model in staged(tmp_path, SEARCHING).scene.models.items()}
    task = ClassificationTask(tiny_spec())
    attempts, [record] = run_all(
        staged(tmp_path, replace(SEARCHING, search={"wild": search}), models=models, task=task)
    )
    assert attempts == []
    assert (record["best"], record["attempts"]) == (None, [])
    assert {(trial["state"], trial["value"]) for trial in record["trials"]} == {("failed", None)}


def test_choices_that_do_not_fit_together_fail_as_a_trial(tmp_path: Path, attacked: list[Any]) -> None:
    """A head made for two benign classes cannot be kept for three, though either choice fits by itself."""
    heal = {"operation": "heal", "domain": "benign", "steps": 1}
    search = replace(SEARCH, trials=8, sampler="random", choices={"head": ["kept", "fresh"], "surgery": [[], [heal]]})
    pair = LoadedDomain(
        "pair",
        ("a", "b"),
        {"attack": MemoryImages(BENIGN["attack"].images, BENIGN["attack"].labels % 2, ("a", "b"))},
        {},
    )
    stage = staged(tmp_path, replace(SEARCHING, search={"tuned": search}), benign=pair)
    assert not stage.plan.left_out
    _, [record] = run_all(stage)
    together = [
        (trial["strategy"]["head"], bool(trial["strategy"]["surgery"]), trial["state"] == "failed")
        for trial in record["trials"]
    ]
    assert ("kept", True, True) in together
    assert all(failed == (head == "kept" and healed) for head, healed, failed in together)


def test_progress_counts_trials_and_winners(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(SEARCHING, strategies={"a": FRESH})
    told: list[tuple[str, int]] = []

    class Telling(Tracker):
        def progress(self, what: str, total: int, done: int = 0) -> Any:
            told.append((what, total - done))
            return Counting()

    class Counting:
        def __enter__(self) -> Callable[..., None]:
            return lambda note="", steps=1: told.append((note, steps))

        def __exit__(self, *error: object) -> None:
            return None

    stage = staged(tmp_path, config)
    run_jobs(stage, lambda: stage, 1, Telling())
    (what, left), *notes = told
    assert (what, left) == ("audit", 4 + 2 + 1)
    assert sum(steps for _, steps in notes) == left
    assert next(note for note, _ in notes if "trial " in note).startswith("tuned on protected: trial 0 ")
    assert [note for note, _ in notes if "winner" in note] == [
        f"tuned on protected: the winner, seed {seed}" for seed in (0, 1)
    ]
    assert ("tuned on protected: 4 trials", 0) in notes
    told.clear()
    run_jobs(staged(tmp_path, config), lambda: stage, 1, Telling())
    assert told == [("audit", 0)]
