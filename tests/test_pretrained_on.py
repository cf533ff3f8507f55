"""`pretrain` on the original and the restricted classes together: what it reads, and what is released."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sophon.api.manifests import check_pretraining
from sophon.errors import UserError
from tests.cli_helpers import AUDIT, PRETRAIN, PROTECT, RUNS, load, own_groups, refusal, refused, sophon
from tests.denoising_commands import CONDITIONAL
from tests.denoising_commands import PRETRAIN as PRETRAIN_DENOISER
from tests.denoising_commands import RUNS as DENOISER
from tests.tiny import tiny_domain

pytestmark = pytest.mark.slow  # whole commands

BOTH = ("domain.pretrained_on=both", "pretrain.steps=2")
KEPT = "domain.restricted_outputs=true"


def pretrained(folder: Path, *command: str, runs: Path = RUNS) -> dict:
    result = sophon(folder, *command, *BOTH)
    assert result.code == 0, result
    return load(folder / runs / "pretrain" / "checkpoint" / "sophon.json")


@pytest.mark.parametrize(
    ("command", "runs", "kept", "classes"),
    [
        (PRETRAIN, RUNS, (), 5),
        (PRETRAIN, RUNS, (KEPT,), 10),
        (PRETRAIN_DENOISER, DENOISER, (), 5),
        ((*PRETRAIN_DENOISER, CONDITIONAL), DENOISER, (), 5),
        ((*PRETRAIN_DENOISER, CONDITIONAL), DENOISER, (KEPT,), 15),
    ],
)
def test_what_is_released(tmp_path: Path, command: tuple[str, ...], runs: Path, kept: tuple[str], classes: int) -> None:
    found = pretrained(tmp_path, *command, *kept, runs=runs)
    original, restricted = found["domains"]["original"], found["domains"]["restricted"]
    assert found["pretrained_on"] == {original["name"]: ["train"], restricted["name"]: ["adapt", "query"]}
    assert set(restricted["hashes"]) == {"adapt", "query", "attack", "select", "test"}
    assert len(found["model"]["classes"]) == classes
    assert found["model"]["classes"][:5] == original["classes"]
    assert found["model"]["model_args"].get("num_class_embeds", classes) == classes


def test_a_reference_with_all_outputs_is_protected_and_audited(tmp_path: Path) -> None:
    own_groups(tmp_path)
    pretrained(tmp_path, *PRETRAIN, KEPT)
    fresh = ("sampler.heads=[fresh]", "method.rounds=1")
    for command in ((*PROTECT, *fresh), (*AUDIT, "attack.roles=[protected]")):
        result = sophon(tmp_path, *command)
        assert result.code == 0, result
    assert "momentum_kept" in load(tmp_path / RUNS / "audit" / "audit.json")["left_out"]


@pytest.fixture(scope="module")
def removed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a reference that has seen both domains, what was made of it, a filtered model and its student."""
    folder = tmp_path_factory.mktemp("removed")
    own_groups(folder)
    pretrained(folder, *PRETRAIN)
    filtered = (*PRETRAIN, "run_dir=a", "pretrain.steps=2")
    student = (*PROTECT, "method=distil", "method.rounds=1", "reference=a", "run_dir=b")
    for command in ((*PROTECT, "method.rounds=1"), filtered, student):
        result = sophon(folder, *command)
        assert result.code == 0, result
    return folder


def test_an_audit_is_against_scratch_and_against_the_better_filtered_model(removed: Path) -> None:
    attack = "{optimizer: adam, lr: 0.005, steps: 1, surgery: [{operation: interpolate}]}"
    near = (f"+attack.strategies.near={attack}", "+attack.knowing.near=[suppression]", "attack.relative=a")
    result = sophon(removed, *AUDIT, "filtered=[a,b]", *near)
    assert result.code == 0, result
    folder = removed / RUNS / "audit"
    found = load(folder / "audit.json")
    assert found["roles"] == ["protected", "unprotected", "filtered", "filtered_2", "scratch"]
    assert found["best_filtered"] in ("filtered", "filtered_2")
    origins = found["filtered"]
    assert {role: Path(origin["path"]).parts[0] for role, origin in origins.items()} == {
        "filtered": "a",
        "filtered_2": "b",
    }
    assert all(0 < origin["original"] <= 100 for origin in origins.values())
    assert found["verdict"]["removal"] in ("BROKEN", "WEAKENED", "HOLDS", "CANNOT BE JUDGED")
    assert found["worst_case"]["overall"]["removal"]["reason"] is not None
    for attack in found["attacks"]:
        assert list(attack["roles"]) == found["roles"]
        assert set(attack["removal"]) == set(attack["gap_closed"])
    assert "(suppression) gets to " in found["verdict"]["knowing"]
    assert found["knowing"]["worst_case"]["tried"] == ["near"]
    page = (folder / "report.html").read_text()
    assert "filtered_2" in page
    assert "filtered=[a/checkpoint,b/checkpoint]" in page
    again = sophon(removed, "report", f"run_dir={RUNS}/audit", "gate.removal=-1000")
    assert found["verdict"]["sentence"] in again.out
    message = refusal(sophon(removed, "report", f"run_dir={RUNS}/audit", "gate.removal=1000"), 4)
    assert message.startswith("gate.removal: R ")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (f"filtered=[{RUNS}/pretrain]", ["filtered", "was trained on fashion_shoes_bags"]),
        (f"filtered=[{RUNS}/protect]", ["filtered", "was trained on fashion_shoes_bags"]),
        ("filtered=[nowhere]", ["filtered: 'nowhere' does not exist"]),
        ("attack.relative=nowhere", ["attack.relative: 'nowhere' does not exist"]),
        ("domain.restricted.split_seed=1", ["reference: it was trained on another split of fashion_shoes_bags"]),
    ],
)
def test_what_an_audit_cannot_be_measured_against_is_refused(removed: Path, override: str, words: list[str]) -> None:
    message = refused(removed, *AUDIT, "run_dir=new", override)
    assert all(word in message for word in words)


def test_a_reference_is_not_protected_with_what_its_attackers_will_have(removed: Path) -> None:
    message = refused(removed, *PROTECT, "run_dir=new", "domain.restricted.split_seed=1")
    assert message.startswith("reference: it was trained on another split of fashion_shoes_bags")


def test_a_domain_under_another_name_is_known_by_its_test_images() -> None:
    domain = tiny_domain("renamed", ("attack", "test"))
    seen = {"name": "first", "classes": ["a"], "hashes": {**domain.hashes, "attack": "another split's"}}
    manifest = {"domains": {"original": {}, "restricted": seen}, "pretrained_on": {"first": ["adapt"]}}
    reference: Any = SimpleNamespace(manifest=manifest, path=Path("x"))
    with pytest.raises(UserError, match="reference: it was trained on another split of renamed"):
        check_pretraining(reference, [], [domain])


def test_what_cannot_be_trained_on_is_refused(tmp_path: Path) -> None:
    message = refused(tmp_path, *PRETRAIN, *BOTH, "pretrain.steps=0")
    assert all(word in message for word in ("domain.pretrained_on", "pretrain.steps=0"))


@pytest.mark.parametrize("pretrained", [{"same": ["train"]}, None])
def test_a_reference_that_saw_the_original_domain_alone_is_let_pass_whatever_the_names(pretrained: Any) -> None:
    domains = {"original": {"name": "same", "classes": ["a"], "hashes": {}}}
    manifest = {"domains": domains, **({"pretrained_on": pretrained} if pretrained else {})}
    reference: Any = SimpleNamespace(manifest=manifest, path=Path("x"))
    check_pretraining(reference, [reference], [tiny_domain("same", ("attack",))])
