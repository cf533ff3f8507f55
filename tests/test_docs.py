"""Commands in README, docs/ and experiments/ compose, links in them lead somewhere; scripts import what there is.

What a block of Python does is tested by tests/test_docs_python.py and tests/test_extending.py.
"""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from tests.cli_helpers import AUDIT, PROTECT, REPOSITORY, SMALL, own_groups, sophon

SCRIPTS = sorted((REPOSITORY / "experiments").rglob("*.py"))
PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("experiments/**/*.md")])


def lines_of(page: Path) -> list[str]:
    """Return the lines of code for a shell, continued lines joined and shell variables put in."""
    text = page.read_text().replace("\\\n", " ")
    fenced = re.findall(r"^```console\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    indented = [line for line in text.splitlines() if line.startswith("    ")]
    lines = [line.strip() for line in [*indented, *"".join(fenced).splitlines()]]
    variables = {"seed": "0"}
    for line in lines:
        if match := re.fullmatch(r'(\w+)="?([^"]*)"?', line):
            variables[match[1]] = match[2]
    return [re.sub(r"\$(\w+)", lambda found: variables.get(found[1], found[0]), line) for line in lines]


def commands(page: Path) -> list[str]:
    """Return the lines that run sophon, by itself or under torchrun."""
    lines = [re.sub(r"^torchrun .* -m sophon ", "sophon ", line) for line in lines_of(page)]
    return [line for line in lines if line.startswith("sophon ")]


# those of docs/extending.md are run as they stand: tests/test_extending.py
COMMANDS = {command: page for page in PAGES if page.name != "extending.md" for command in commands(page)}


@pytest.mark.slow  # half a second each
@pytest.mark.parametrize("command", COMMANDS, ids=[str(page.relative_to(REPOSITORY)) for page in COMMANDS.values()])
def test_a_command_composes(command: str) -> None:
    if "report compare" in command or "--multirun" in command:
        pytest.skip("has no single configuration to compose")
    result = sophon(REPOSITORY, *shlex.split(command, comments=True)[1:], "--cfg", "job")
    assert result.code == 0, result.err


def test_there_are_commands_to_compose() -> None:
    assert len(COMMANDS) > 20
    assert {"README.md", "quickstart.md", "audit.md", "scaling.md"} <= {page.name for page in PAGES if commands(page)}


def test_scripts_and_targets_that_pages_name_are_there() -> None:
    targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    for page in PAGES:
        for line in lines_of(page):
            if line.startswith("make "):
                assert line.split()[1] in targets, (page, line)
            if found := re.match(r"python (experiments/\S+)", line):
                assert (REPOSITORY / found[1]).is_file(), (page, line)


def test_the_workflow_runs_a_command_that_composes() -> None:
    page = (REPOSITORY / "docs/audit.md").read_text()
    workflow = yaml.safe_load(re.search(r"```yaml\n(name: audit.*?)```", page, re.DOTALL)[1])
    (steps,) = [job["steps"] for job in workflow["jobs"].values()]
    (command,) = [step["run"] for step in steps if step.get("run", "").startswith("sophon ")]
    result = sophon(REPOSITORY, *shlex.split(command)[1:], "--cfg", "job")
    assert result.code == 0, result.err
    assert {key: yaml.safe_load(result.out)["gate"][key] for key in ("worst_case", "intactness")} == {
        "worst_case": 0.9,
        "intactness": 1.0,
    }


@pytest.mark.slow  # whole commands
def test_the_commands_of_the_readme_run_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"pretrain": (*SMALL[1:], "pretrain.steps=5"), "protect": PROTECT[2:], "audit": (*AUDIT[1:2], *AUDIT[3:])}
    own_groups(tmp_path)
    lines = commands(REPOSITORY / "README.md")
    assert [line.split()[1] for line in lines] == ["pretrain", "protect", "audit", "export"]
    for line in lines:
        _, verb, *words = shlex.split(line)
        result = sophon(tmp_path, verb, *words, *sizes.get(verb, ()))
        assert result.code == 0, result
    assert (tmp_path / "release/README.md").read_text().count("It rests on") == 1
    monkeypatch.chdir(tmp_path)
    (load,) = re.findall(r"```python\n(import timm.*?)```", (REPOSITORY / "docs/models.md").read_text(), re.DOTALL)
    exec(load, names := {})
    assert names["model"].num_classes == 5


def anchors(page: Path) -> set[str]:
    """Return the names that a page's headings have in links, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_is_short_and_names_every_page() -> None:
    text = (REPOSITORY / "README.md").read_text()
    assert text.count("\n") <= 150
    assert not [page for page in REPOSITORY.glob("docs/*.md") if f"(docs/{page.name})" not in text]


def test_every_method_and_stage_has_its_paragraph() -> None:
    text = (REPOSITORY / "docs/methods.md").read_text()
    assert not [path.stem for path in (REPOSITORY / "conf/method").glob("*.yaml") if f"**`{path.stem}`**" not in text]


def test_the_citation_is_of_this_version() -> None:
    import sophon as package

    assert yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())["version"] == package.__version__


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.parent.name)
def test_a_script_imports_what_there_is(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
    assert runpy.run_path(str(script), run_name="imported")["__doc__"]
