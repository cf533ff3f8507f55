"""Several restricted domains, from the command line to what is written."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import hydra
import pytest
from omegaconf import OmegaConf

from sophon.auditing import runner
from sophon.cli import conf_dir
from sophon.config import Config, plain
from sophon.validation import from_omegaconf
from tests.cli_helpers import AUDIT, PROTECT, RUNS, load, refusal, refused, sophon, tree, weights_sha256

DIGITS = (
    "+domain.restricted.digits="
    "{source: bundled, dataset: mnist, classes: ['0', '1', '2', '3', '4'], per_class: 40, test_per_class: 20}"
)
NAMES = ["fashion_shoes_bags", "digits"]


def of_several(command: tuple[str, ...]) -> tuple[str, ...]:
    """Return a command of `tests.cli_helpers` for both domains."""
    return (*command, DIGITS)


# ---- the configuration ----------------------------------------------------------------------------------------------


def typed(*overrides: str) -> Config:
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return from_omegaconf(hydra.compose("config", overrides=["verb=protect", *overrides]))


def also(name: str) -> str:
    return f"+domain@domain.restricted.{name}={name}"


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["domain@domain.restricted=mnist"], ["mnist"]),
        (["domain@domain.restricted=mnist", also("svhn"), also("people")], ["mnist", "svhn", "people"]),
        (["domain@domain.restricted=mnist", DIGITS, also("svhn")], ["mnist", "svhn", "digits"]),
        (["experiment=paper", also("svhn"), "domain.restricted.svhn.root=x"], ["cifar10", "svhn"]),
        (["~domain@domain.restricted", also("svhn"), also("people")], ["svhn", "people"]),
    ],
)
def test_restricted_domains_are_one_and_further_ones_by_name(overrides: list[str], names: list[str]) -> None:
    config = typed(*overrides)
    assert [*config.domain.restricted] == [each.name for each in config.domain.restricted.values()] == names
    assert from_omegaconf(OmegaConf.create(plain(config))) == config


WRONG = {
    "unknown name": ((also("nope"),), ["domain: 'nope'", "objects_a", "svhn"]),
    "the same name": ((also("svhn"), "domain.restricted.svhn.name=mnist", also("mnist")), ["'mnist'", "twice"]),
    "the name of the first": (("domain@domain.restricted=svhn", also("svhn")), ["'svhn'", "twice"]),
    "no folder's name": ((also("svhn"), "domain.restricted.svhn.name=a/b"), ["'a/b'", "folder"]),
    "none": (("~domain@domain.restricted",), ["domain.restricted.source: missing"]),
    "a number": (("+domain.restricted.a=3",), ["domain.restricted.a", "no such key"]),
    "a key a letter off": (("+domain.restricted.rot=x",), ["domain.restricted.rot", "did you mean root?"]),
    "without a source": (("+domain.restricted.a={root: b}",), ["domain.restricted.a.source", "missing"]),
    "unknown key": (("+domain.restricted.a={sourc: b}",), ["domain.restricted.a", "sourc"]),
    "wrong type": (
        ("+domain.restricted.a={per_class: many}",),
        ["domain.restricted.a.per_class", "must be int | None"],
    ),
    "wrong type of the only one": (("domain.restricted.split_seed=x",), ["domain.restricted.split_seed: Value "]),
    "a list": (
        ("domain.restricted=[mnist,svhn]",),
        ["domain.restricted: [mnist,svhn]", "domain@domain.restricted=NAME"],
    ),
}


@pytest.mark.slow  # commands
@pytest.mark.parametrize("case", WRONG)
def test_what_makes_no_domains_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    overrides, words = WRONG[case]
    message = refused(tmp_path, "protect", *overrides)
    for word in words:
        assert word in message


# ---- several, from end to end ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(made, tmp_path_factory.mktemp("pretrained") / "copy"))
    shutil.rmtree(folder / RUNS / "protect")
    return folder


@pytest.mark.slow
def test_kept_heads_are_left_out_where_the_classes_are_not_as_many(pretrained: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pretrained, tmp_path / "copied"))
    result = sophon(folder, *PROTECT, "domain.restricted.classes=[sandal,bag]")
    assert "sampler.heads: 'kept' is left out; fashion_shoes_bags has 2 classes, the model 5\n" in result.out
    made = load(folder / RUNS / "protect" / "checkpoint" / "sophon.json")
    assert made["sampler_support"]["head"] == ["fresh", "probed"]


@pytest.fixture(scope="module")
def both(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which both domains were protected against and audited; never written to again."""
    folder = Path(shutil.copytree(pretrained, tmp_path_factory.mktemp("both") / "copy"))
    for command in (PROTECT, AUDIT):
        result = sophon(folder, *of_several(command))
        assert result.code == 0, result
    return folder


@pytest.mark.slow
def test_the_manifest_and_the_card_name_both(both: Path) -> None:
    checkpoint = both / RUNS / "protect" / "checkpoint"
    manifest = load(checkpoint / "sophon.json")
    restricted = manifest["domains"]["restricted"]
    assert [each["name"] for each in restricted] == NAMES
    assert [*manifest["config"]["domain"]["restricted"]] == NAMES
    digests = [digest for each in restricted for digest in each["hashes"].values()]
    assert len(set(digests)) == len(digests) == 10
    card = (checkpoint / "README.md").read_text()
    assert "**fashion_shoes_bags** and **digits**" in card
    assert all(digest in card for digest in digests)


@pytest.mark.slow
def test_a_protection_goes_on_only_with_the_same_domains_in_the_same_order(both: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(both, tmp_path / "copied"))
    digest = weights_sha256(folder / RUNS / "protect" / "checkpoint")
    assert "already done" in sophon(folder, *of_several(PROTECT)).out
    assert sophon(folder, *of_several(PROTECT), "run_dir=again").code == 0
    assert weights_sha256(folder / "again" / "checkpoint") == digest
    digits = ("name=digits", "dataset=mnist", "classes=[0,1,2,3,4]")
    shoes = ("fashion_shoes_bags.per_class=40", "fashion_shoes_bags.test_per_class=20")
    turned = (also("fashion_shoes_bags"), *(f"domain.restricted.{word}" for word in (*digits, *shoes)))
    assert "order" in refused(folder, *PROTECT, *turned)
    assert "restricted" in refused(folder, *PROTECT)


@pytest.mark.slow
def test_each_domain_has_an_audit_of_its_own_and_they_are_compared(both: Path) -> None:
    folder = both / RUNS / "audit"
    assert sorted(path.name for path in folder.iterdir()) == ["comparison.html", "comparison.md", *sorted(NAMES)]
    text = (folder / "comparison.md").read_text()
    for name in NAMES:
        summary = load(folder / name / "audit.json")
        assert summary["domains"]["restricted"] == name
        assert summary["verdict"]["sentence"] in text
        assert f"seed 0 ({name})" in text
        assert (folder / name / "report.html").exists()


def audited(folder: Path) -> dict[str, Any]:
    return {
        name: {
            key: value
            for key, value in load(folder / name / "audit.json").items()
            if key not in ("seconds_total", "date")
        }
        for name in NAMES
    }


@pytest.mark.slow
def test_the_audit_of_one_of_them_is_the_same_by_itself(both: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(both, tmp_path / "copied"))
    one = ("~domain@domain.restricted", DIGITS)
    command = [word for word in AUDIT if not word.startswith("domain.restricted.")]
    reuse = f"attack.reuse=[{RUNS / 'audit' / 'digits'}]"
    result = sophon(folder, *command, *one, "run_dir=alone", reuse)
    assert result.code == 0, result
    alone, together = load(folder / "alone" / "audit.json"), load(folder / RUNS / "audit" / "digits" / "audit.json")
    assert alone["attacks"] == together["attacks"]
    assert {path.name for path in (folder / "alone" / "attempts").iterdir()} == {
        path.name for path in (folder / RUNS / "audit" / "digits" / "attempts").iterdir()
    }
    assert "one domain" in refused(folder, *of_several(AUDIT), "run_dir=alone")
    assert "run.json" in refused(folder, *command, *one, f"run_dir={RUNS / 'audit'}")


@pytest.mark.slow
def test_report_writes_them_and_their_comparison_again(both: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(both, tmp_path / "copied"))
    before = tree(folder)
    for name in ("comparison.md", *(f"{name}/report.md" for name in NAMES)):
        (folder / RUNS / "audit" / name).unlink()
    result = sophon(folder, "report", f"run_dir={RUNS / 'audit'}")
    assert result.code == 0, result
    after = tree(folder)
    assert {name: after[name] for name in after if name.endswith(".md")} == {
        name: before[name] for name in before if name.endswith(".md")
    }
    for name in NAMES:
        assert re.search(rf"^{name}: ", result.out, re.MULTILINE)


@pytest.mark.slow
def test_an_audit_interrupted_in_its_second_domain_goes_on(both: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(both, tmp_path / "copied"))
    shutil.rmtree(folder / RUNS / "audit" / "digits")
    (folder / RUNS / "audit" / "comparison.html").unlink()
    first, whole, calls = folder / RUNS / "audit" / NAMES[0], runner.attack, 0

    def interrupting(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return whole(*arguments, **options)

    written = tree(first / "attempts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "attack", interrupting)
        refusal(sophon(folder, *of_several(AUDIT)), 130)
    assert not (folder / RUNS / "audit" / "comparison.html").exists()
    assert sophon(folder, *of_several(AUDIT)).code == 0
    assert tree(first / "attempts") == written
    assert audited(folder / RUNS / "audit") == audited(both / RUNS / "audit")


@pytest.mark.slow
def test_nothing_is_begun_if_one_of_them_does_not_fit(both: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(both, tmp_path / "copied"))
    wrong = "domain.restricted.digits.classes=[zero]"
    message = refusal(sophon(folder, *of_several(AUDIT), "run_dir=new", wrong))
    assert message.startswith("domain.restricted.digits.classes: ")
    assert not (folder / "new").exists()
