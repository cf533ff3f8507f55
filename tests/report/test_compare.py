import re
from dataclasses import replace

import pytest

from sophon.auditing.summary import AuditReport
from sophon.errors import UserError
from sophon.report.compare import write_comparison
from tests.auditing.records import CONTEXT, MSE, audit, duo, trio
from tests.report.reports import MASKING, SEARCHES, check, rows


def stored(
    folder, protected=21.0, *, attacks=("momentum", "patient"), name="tiny", seed=0, metric=None, more=(), **context
):
    """Write an audit; ``protected`` is what every attack reaches, of 20 from scratch and 60 without protection."""
    given = {"metric": metric} if metric else {}
    attempts = [
        one for n, attack in enumerate(attacks) for one in trio(attack, protected + n, 60.0 + n, 20.0 + n, **given)
    ]
    config = {"name": name, "seed": seed, "attack": {"seeds": 1, "eval_points": 4}}
    folder.mkdir(parents=True, exist_ok=True)
    audit([*attempts, *more], **({"config": config} | context)).write(folder)
    return folder


def compared(out, *folders):
    path = write_comparison(list(folders), out)
    assert sorted(each.name for each in out.iterdir()) == ["compare.html", "compare.md"]
    page, markdown = path.read_text(), (out / "compare.md").read_text()
    check(page)
    return page, markdown


def warnings(markdown):
    return re.findall(r"^> \*\*Warning:\*\* (.*)$", markdown, re.MULTILINE)


@pytest.fixture
def two(tmp_path):
    """A strong and a weak protection against the same attacks."""
    return stored(tmp_path / "a", 24.0, name="strong", masking=MASKING), stored(tmp_path / "b", 58.0, name="weak")


def test_audits_by_hand(tmp_path, two):
    page, markdown = compared(tmp_path / "out", *two)
    assert rows(markdown, "## Audits") == [
        ["audit", "judged", "method", "intactness loss", "gap closed, shared attacks", "gap closed, all attacks",
         "gap closed, seen", "masked share"],
        ["`strong, seed 0`", "holds", "sophon", "0.7 points", *["0.90 [0.90, 0.90]"] * 3,
         "-; weights 3.1 times as large"],
        ["`weak, seed 0`", "broken", "sophon", "0.7 points", *["0.05 [0.05, 0.05]"] * 3, "-"],
    ]  # fmt: skip
    assert rows(markdown, "## Gap closed")[1:] == [["`momentum`", "0.90", "0.05"], ["`patient`", "0.90", "0.05"]]
    assert rows(markdown, "## Worst cases")[1:] == [["`plain`", "0.90", "0.05"]]
    for folder in two:
        assert str(AuditReport.read(folder).verdict) in check(page)
    assert "2 audits; 2 of 2 attacks were run in all of them." in page
    assert '<a href="../a/report.html">strong, seed 0</a>' in page
    assert "[`weak, seed 0`](../b/report.html)" in markdown
    assert warnings(markdown) == []
    section = page[page.index('<section id="attacks"') : page.index('<section id="values"')]
    assert re.findall(r'<td class="(.*?)" style="--level: (\d+)%">', section)[:2] == [("", "10"), (" strong", "95")]


def test_attacks_that_not_all_ran(tmp_path):
    a, b = (stored(tmp_path / each, attacks=attacks, name=each) for each, attacks in (("a", "xy"), ("b", "yz")))
    page, markdown = compared(tmp_path / "out", a, b)
    assert [row[0] for row in rows(markdown, "## Gap closed")[1:]] == ["`y`"]
    assert warnings(markdown) == [
        "Not the same attacks were tried, and worst cases are of those that were (a, seed 0: 2; b, seed 0: 2)."
    ]
    assert rows(markdown, "### 2 attacks that not all")[1:] == [["`x`", "a, seed 0"], ["`z`", "b, seed 0"]]
    assert "1 of 3 attacks were run in all of them" in page
    page, markdown = compared(tmp_path / "none", a, stored(tmp_path / "c", attacks="z", name="c"))
    assert "No attack was run in all of these audits." in markdown
    assert "<svg" not in page
    assert "gap closed, shared attacks" not in rows(markdown, "## Audits")[0]


CONFIG = {"name": "b", "seed": 0, "attack": {"seeds": 1, "eval_points": 4}}


@pytest.mark.slow  # a third of a second each
@pytest.mark.parametrize(
    ("other", "warning"),
    [
        ({"hashes": {"attack": "99" * 32}}, "The images of the restricted domain are not the same"),
        ({"hashes": {}}, r"The images of the restricted domain are not the same.*b, seed 0: not known"),
        ({"reference": {"sha256": "ef" * 32}}, r"The unprotected models .* \(a, seed 0: cdcdcdcd; b, seed 0: efefefef"),
        ({"seed": 7}, r"The seeds of the audits are not the same \(a, seed 0: 0; b, seed 7: 7\)\."),
        ({"config": CONFIG | {"attack": {"seeds": 5, "eval_points": 4}}}, "attempts of each attack are"),
        ({"config": CONFIG | {"attack": {"seeds": 1, "eval_points": 9}}}, "points of each curve are"),
        ({"config": CONFIG | {"task": {"name": "other"}}}, "Results are not measured alike"),
        ({"searches": [SEARCHES[0] | {"name": "momentum"}]}, "Attacks of the same name are not the same: momentum"),
    ],
)
def test_what_is_not_like_with_like_is_said(tmp_path, other, warning):
    a, b = stored(tmp_path / "a", name="a"), stored(tmp_path / "b", name="b", **other)
    page, markdown = compared(tmp_path / "out", a, b)
    (found,) = warnings(markdown)
    assert re.search(warning, found)
    assert page.count('<p class="warning">') == 1


def test_audits_without_hashes_or_names(tmp_path):
    bare = {"hashes": {}, "config": {}, "checkpoint": {}, "reference": {}, "intactness": None}
    folders = [stored(tmp_path / each, **bare) for each in "ab"]
    _, markdown = compared(tmp_path / "out", *folders)
    assert [row[0] for row in rows(markdown, "## Audits")[1:]] == [f"`{folder}`" for folder in folders]
    assert "It is not known whether the images" in warnings(markdown)[0]


def test_audits_of_one_name_are_told_apart(tmp_path):
    folders = [stored(tmp_path / "x" / each) for each in "ab"]
    _, markdown = compared(tmp_path / "out", *folders)
    assert [row[0] for row in rows(markdown, "## Audits")[1:]] == [f"`tiny, seed 0 ({folder})`" for folder in folders]
    other = stored(tmp_path / "y", domains=replace(CONTEXT).domains | {"restricted": "birds"})
    _, markdown = compared(tmp_path / "domains", folders[0], other)
    assert [row[0] for row in rows(markdown, "## Audits")[1:]] == ["`tiny, seed 0 (dogs)`", "`tiny, seed 0 (birds)`"]


def test_benign_harm_is_shown(tmp_path):
    folders = [stored(tmp_path / n, name=n, more=duo("x", 60.0 - harm, 60.0)) for n, harm in (("a", 0.5), ("b", -0.25))]
    _, markdown = compared(tmp_path / "out", *folders)
    assert [row[-1] for row in rows(markdown, "## Audits")[1:]] == ["0.5 points", "-0.2 points"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("", "give the run directories of at least two audits"),
        ("a", "give the run directories of at least two audits"),
        ("aba", "'.*a' is given 2 times; give each audit once"),
        ("abc", r"'.*c' measures eps-MSE and '.*a' accuracy \(%\); give audits with the same metric"),
        ("an", r"'.*n' holds no audit\.json"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, two, names, message):
    stored(tmp_path / "c", metric=MSE)
    with pytest.raises(UserError, match=f"^runs: {message}"):
        write_comparison([tmp_path / name for name in names], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unwritable_folder(tmp_path, two):
    (tmp_path / "out").write_text("a file, not a folder")
    with pytest.raises(UserError, match="cannot write"):
        write_comparison(list(two), tmp_path / "out")
