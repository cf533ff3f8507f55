"""The words of the command line that only say or write something: list, show, init."""

from __future__ import annotations

from pathlib import Path

import pytest

from sophon.auditing.card import facts
from sophon.checkpoint import write_checkpoint
from sophon.cli.groups import choices
from sophon.cli.listing import LISTS
from tests.auditing.records import audit, trio
from tests.cli_helpers import SMALL, load, refusal, refused, sophon
from tests.models.test_adapter_contract import CASES
from tests.test_checkpoint import MANIFEST, model_of


@pytest.mark.parametrize("word", LISTS)
def test_a_list_has_a_line_on_each(word: str) -> None:
    result = sophon(None, "list", word)
    assert (result.code, result.err) == (0, "")
    lines = [line.split(None, 1) for line in result.out.splitlines() if line.startswith("  ")]
    assert [name for name, *_ in lines] == [name for group in LISTS[word] for name in choices(group)]
    assert all(len(line) == 2 for line in lines), "a file without a comment"


@pytest.mark.parametrize("option", [("--config-dir=own",), ("--config-dir", "own")])
def test_a_list_has_ones_own_files(tmp_path: Path, option: tuple[str, ...]) -> None:
    (tmp_path / "own/method").mkdir(parents=True)
    (tmp_path / "own/method/mine.yaml").write_text("# Mine: it works. More of it.\nname: mine\n")
    out = sophon(tmp_path, "list", "methods", *option).out
    assert [" ".join(line.split()) for line in out.splitlines() if " mine " in line] == ["mine Mine: it works"]


@pytest.mark.slow
def test_a_made_project_is_commented_and_runs(tmp_path: Path) -> None:
    result = sophon(tmp_path, "init", "my_project")
    assert result.code == 0, result
    assert result.out.endswith("next: sophon pretrain --config-dir my_project experiment=my_project\n")
    made = sorted(str(path.relative_to(tmp_path / "my_project")) for path in tmp_path.rglob("*.yaml"))
    assert made == [
        *(f"domain/my_project_{role}.yaml" for role in ("original", "restricted")),
        "experiment/my_project.yaml",
        "model/my_project.yaml",
    ]
    assert all("NAME" not in path.read_text() for path in tmp_path.rglob("*.yaml"))
    small = (*SMALL[1:], "--config-dir", "my_project", "experiment=my_project")
    result = sophon(tmp_path, "pretrain", *small, "pretrain.steps=1", "pretrain.batch_size=16")
    assert result.code == 0, result
    manifest = load(tmp_path / "runs/my_project/seed0/pretrain/checkpoint/sophon.json")
    assert manifest["domains"]["original"]["name"] == "my_project_original"
    assert manifest["model"]["architecture"] == "resnet10t"
    result = sophon(tmp_path, "audit", *small, "--cfg", "job")
    assert result.code == 0, result
    assert "is not empty" in refused(tmp_path, "init", "my_project")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list"], "list: give one of methods, attacks"),
        (["list", "methds"], "list: 'methds' is not known (did you mean methods?)"),
        (["list", "methods", "attacks"], "list: give one of"),
        (["init"], "init: give one folder"),
        (["init", "a", "b"], "init: give one folder"),
        (["init", "2 b"], "init: '2 b' is not allowed"),
        (["lst"], "'lst' is not a verb (did you mean list?)"),
        (["show", "checkpoint=nowhere"], "checkpoint: 'nowhere' does not exist"),
    ],
)
def test_what_is_not_known_is_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    assert message in refused(tmp_path, *arguments)


@pytest.mark.slow
def test_show_says_what_a_checkpoint_is_and_refuses_a_changed_one(tmp_path: Path) -> None:
    audits = [facts(audit(trio("a", 57.0, 60.0, 50.0)))]
    method = {**MANIFEST["method"], "name": "sophon_klu"}
    for name, more in {"a": {"method": method}, "b": {"method": method, "audits": audits}}.items():
        write_checkpoint(tmp_path / name, model_of("timm"), CASES["timm"].spec, {**MANIFEST, **more})
    shown = {name: " ".join(sophon(tmp_path, "show", f"checkpoint={name}").out.split()) for name in "ab"}
    for words in ("protected with sophon_klu, seed 3", "restricted faces, 2 classes", "before protection 90.5 %"):
        assert words in shown["a"]
    assert "audit not audited" in shown["a"]
    assert "audit WEAKENED: Protection takes something" in shown["b"]
    write_checkpoint(tmp_path / "c", model_of("timm"), CASES["timm"].spec, {**MANIFEST, "method": None})
    assert "no: the unprotected reference" in sophon(tmp_path, "show", "checkpoint=c").out
    with (tmp_path / "a/model.safetensors").open("ab") as file:
        file.write(b" ")
    assert "sha256" in refusal(sophon(tmp_path, "show", "checkpoint=a"))
