import html
import json
import re

import pytest

from sophon.audit.metrics import summarise
from sophon.errors import UserError
from sophon.report.compare import write_comparison
from tests.report.reports import CONTEXT, EVIL, MASKING, MSE, Page, attempt, rows

HASHES = {"attack": "12" * 32, "select": "34" * 32}


def stored(folder, protected=21, *, attacks=("momentum", "patient"), name="tiny", seed=0, changes=None, **context):
    """Write an audit's ``audit.json``; ``protected`` is what every attack reaches."""
    ends = {"protected": protected, "unprotected": 60, "scratch": 20}
    attempts = [attempt(attack, role, end + n) for n, attack in enumerate(attacks) for role, end in ends.items()]
    config = {"name": name, "seed": seed, "attack": {"seeds": 1, "eval_points": 4}}
    summary = summarise(attempts, CONTEXT | {"config": config, "hashes": {"restricted": HASHES}} | context)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "audit.json").write_text(json.dumps(summary | (changes or {})))
    return folder


def compared(out, *folders):
    path = write_comparison(list(folders), out)
    assert path == out / "compare.html"
    assert sorted(each.name for each in out.iterdir()) == ["compare.html", "compare.md"]
    page = path.read_text()
    Page(page)
    return page, (out / "compare.md").read_text()


def warnings(markdown):
    return re.findall(r"^> \*\*Warning:\*\* (.*)$", markdown, re.MULTILINE)


@pytest.fixture
def two(tmp_path):
    """A strong and a weak protection against the same attacks."""
    return stored(tmp_path / "a", 24, name="strong"), stored(tmp_path / "b", 56, name="weak")


def test_audits_by_hand(tmp_path, two):
    page, markdown = compared(tmp_path / "out", *two)
    assert rows(markdown, "## Audits")[0] == [
        "audit", "method", "intactness loss", "gap closed, shared attacks", "gap closed, all attacks",
        "gap closed, seen", "gap closed, longer", "gap closed, held out", "harm to benign use",
        "masked share",
    ]  # fmt: skip
    assert rows(markdown, "## Audits")[1:] == [
        ["`strong, seed 0`", "sophon", "0.8 points", "0.90", "0.90", "0.90", "-", "-", "-", "-"],
        ["`weak, seed 0`", "sophon", "0.8 points", "0.10", "0.10", "0.10", "-", "-", "-", "-"],
    ]
    assert rows(markdown, "## Gap closed")[1:] == [["`momentum`", "0.90", "0.10"], ["`patient`", "0.90", "0.10"]]
    assert rows(markdown, "## Worst cases")[1:] == [["`plain`", "0.90", "0.10"]]
    for folder in two:
        verdict = json.loads((folder / "audit.json").read_text())["verdict"]
        assert verdict in html.unescape(page)
        assert re.sub(r"\\(.)", r"\1", markdown).count(verdict) == 1
    assert "2 audits; 2 of 2 attacks were run in all of them." in page


def test_masking_is_compared(tmp_path, two):
    summary = json.loads((two[0] / "audit.json").read_text())
    summary["masking"] = MASKING
    (two[0] / "audit.json").write_text(json.dumps(summary))
    older = json.loads((two[1] / "audit.json").read_text())
    del older["masking"]
    (two[1] / "audit.json").write_text(json.dumps(older))
    _, markdown = compared(tmp_path / "out", *two)
    assert [row[-1] for row in rows(markdown, "## Audits")] == ["masked share", "0.75; weights 3.1 times as large", "-"]


def test_audits_of_the_same_things_raise_no_warning(tmp_path, two):
    page, markdown = compared(tmp_path / "out", *two)
    assert warnings(markdown) == []
    assert 'class="warning"' not in page


def test_page_loads_nothing_and_escapes(tmp_path):
    folders = [stored(tmp_path / each, attacks=(EVIL, "a"), name=f"<b>{each}") for each in "ab"]
    page, _ = compared(tmp_path / "out", *folders)
    assert "<script" not in page
    assert "<b>" not in page
    assert not {"http://", "https://", "@import"} & set(re.findall(r"https?://|@import", page))
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    svg = page[page.index("<svg") : page.rindex("</svg>")]
    assert re.search(r"(fill|stroke): #(?!ffffff)", svg) is None
    for variable in set(re.findall(r"var\((--[a-z]+)\)", svg)):
        assert page.count(f"{variable}: #") == 2


def test_heat_map_colours_what_gets_through(tmp_path, two):
    page, _ = compared(tmp_path / "out", *two)
    section = page[page.index('<section id="attacks"') : page.index('<section id="values"')]
    assert re.findall(r"<td([^>]*)>([^<]*)</td>", section)[:2] == [
        (' style="--level: 10%"', "0.90"),
        (' style="--level: 90%" class="strong"', "0.10"),
    ]


def test_attacks_that_all_ran_are_compared_and_the_others_named(tmp_path):
    folders = [
        stored(tmp_path / "a", attacks=("x", "y"), name="a"),
        stored(tmp_path / "b", attacks=("y", "z"), name="b"),
    ]
    page, markdown = compared(tmp_path / "out", *folders)
    assert [row[0] for row in rows(markdown, "## Gap closed")[1:]] == ["`y`"]
    assert warnings(markdown) == [
        "Not the same attacks were tried, and worst cases are of those that were (a, seed 0: 2; b, seed 0: 2)."
    ]
    assert rows(markdown, "### 2 attacks that not all")[1:] == [["`x`", "a, seed 0"], ["`z`", "b, seed 0"]]
    assert "1 of 3 attacks were run in all of them" in page


def test_audits_that_share_no_attack(tmp_path):
    folders = [stored(tmp_path / each, attacks=(each,), name=each) for each in "ab"]
    page, markdown = compared(tmp_path / "out", *folders)
    assert "No attack was run in all of these audits." in markdown
    assert "<svg" not in page
    assert [row[3] for row in rows(markdown, "## Audits")[1:]] == ["-", "-"]


@pytest.mark.parametrize(
    ("other", "warning"),
    [
        ({"hashes": {"restricted": {"attack": "99" * 32}}}, "The images of the restricted domain are not the same"),
        ({"hashes": None}, r"The images of the restricted domain are not the same.*b, seed 0: not known"),
        ({"reference": {"sha256": "ef" * 32}}, r"The unprotected models .* \(a, seed 0: cdcdcdcd; b, seed 0: efefefef"),
        ({"seed": 7}, r"The seeds of the audits are not the same \(a, seed 0: 0; b, seed 7: 7\)\."),
        ({"config": {"name": "b", "seed": 0, "attack": {"seeds": 5, "eval_points": 4}}}, "attempts of each attack are"),
        ({"config": {"name": "b", "seed": 0, "attack": {"seeds": 1, "eval_points": 9}}}, "points of each curve are"),
        (
            {"config": {"name": "b", "seed": 0, "attack": {"seeds": 1, "eval_points": 4}, "task": {"name": "other"}}},
            "Results are not measured alike",
        ),
    ],
)
def test_what_is_not_like_with_like_is_said(tmp_path, other, warning):
    page, markdown = compared(
        tmp_path / "out", stored(tmp_path / "a", name="a"), stored(tmp_path / "b", name="b", **other)
    )
    (found,) = warnings(markdown)
    assert re.search(warning, found)
    assert page.count('<p class="warning">') == 1


def test_attacks_with_the_same_name_and_another_strategy(tmp_path):
    first = stored(tmp_path / "a", name="a")
    summary = json.loads((first / "audit.json").read_text())
    for attack in summary["attacks"]:
        attack["strategy"] |= {"batch_size": 128, "surgery": []}  # the defaults, which older files may lack
    second = stored(tmp_path / "b", name="b", changes={"attacks": summary["attacks"]})
    assert warnings(compared(tmp_path / "out", first, second)[1]) == []
    summary["attacks"][0]["strategy"]["lr"] = 0.5
    third = stored(tmp_path / "c", name="c", changes={"attacks": summary["attacks"]})
    found = warnings(compared(tmp_path / "out", first, third)[1])
    assert found == ["Attacks of the same name are not the same: momentum."]


def test_searches_are_compared_by_their_budget_not_by_what_they_found(tmp_path):
    def with_search(folder, trials, lr):
        stored(folder, attacks=("found",), name=folder.name)
        summary = json.loads((folder / "audit.json").read_text())
        summary["attacks"][0]["strategy"]["lr"] = lr
        summary["searches"] = [{"name": "found", "sampler": "tpe", "trials": trials, "steps": 30, "roles": {}}]
        (folder / "audit.json").write_text(json.dumps(summary))
        return folder

    a, b, c = (
        with_search(tmp_path / name, *each) for name, each in zip("abc", [(8, 0.1), (8, 0.2), (64, 0.1)], strict=True)
    )
    assert warnings(compared(tmp_path / "out", a, b)[1]) == []
    assert "not the same: found" in warnings(compared(tmp_path / "out", a, c)[1])[0]


def test_hashes_of_older_audits_come_from_their_run(tmp_path):
    folders = [stored(tmp_path / each, name=each, hashes=None) for each in "ab"]
    assert "It is not known whether the images" in warnings(compared(tmp_path / "out", *folders)[1])[0]
    for folder, digest in zip(folders, ("12" * 32, "34" * 32), strict=True):
        (folder / "run.json").write_text(json.dumps({"identity": {"restricted": {"attack": digest}}}))
    assert "are not the same, by their hashes" in warnings(compared(tmp_path / "out", *folders)[1])[0]


def test_audits_of_one_name_are_told_apart_by_their_folders(tmp_path):
    folders = [stored(tmp_path / "x" / each) for each in "ab"]
    _, markdown = compared(tmp_path / "out", *folders)
    assert [row[0] for row in rows(markdown, "## Audits")[1:]] == [f"`tiny, seed 0 ({folder})`" for folder in folders]


def test_audits_without_context_or_families(tmp_path):
    folders = []
    for each in "ab":
        changes = {"config": None, "checkpoint": None, "reference": None, "intactness": None, "families": None}
        folders.append(stored(tmp_path / each, changes=changes))
    _, markdown = compared(tmp_path / "out", *folders)
    assert [row[0] for row in rows(markdown, "## Audits")[1:]] == [f"`{folder}`" for folder in folders]
    assert "## Worst cases by family" not in markdown


def test_many_audits_have_a_colour_or_a_mark_of_their_own(tmp_path):
    folders = [stored(tmp_path / f"{n}", seed=n) for n in range(10)]
    page, _ = compared(tmp_path / "out", *folders)
    legend = re.findall(r'<span class="(h\w)">(.) tiny, seed \d</span>', page)
    assert len(legend) == len(set(legend)) == 10


def test_benign_harm_is_shown(tmp_path):
    folders = []
    for name, harm in (("a", 0.5), ("b", -0.25)):
        worst = {
            "attacks": [],
            "worst_harm": {"attack": "x", "value": harm, "ci95": None, "sgrc": 1.0},
            "mean_harm": harm,
        }
        folders.append(stored(tmp_path / name, name=name, changes={"benign": worst}))
    _, markdown = compared(tmp_path / "out", *folders)
    assert [row[-2] for row in rows(markdown, "## Audits")[1:]] == ["0.5 points", "-0.2 points"]


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_audits(tmp_path, count):
    folders = [stored(tmp_path / str(n)) for n in range(count)]
    with pytest.raises(UserError, match=r"^runs: give the run directories of at least two audits$"):
        write_comparison(folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_audit_given_twice(tmp_path, two):
    with pytest.raises(UserError, match=r"^runs: '.*a' is given 2 times; give each audit once$"):
        write_comparison([two[0], two[1], two[0] / ".." / "a"], tmp_path / "out")


def test_audits_of_different_metrics(tmp_path, two):
    other = stored(tmp_path / "c", changes={"metric": MSE})
    with pytest.raises(UserError, match=r"^runs: '.*c' measures eps-MSE and '.*a' accuracy \(%\); give audits with"):
        write_comparison([*two, other], tmp_path / "out")


def test_folders_without_a_readable_audit(tmp_path, two):
    with pytest.raises(UserError, match=r"^runs: '.*none' holds no audit\.json"):
        write_comparison([two[0], tmp_path / "none"], tmp_path / "out")
    newer = stored(tmp_path / "newer", changes={"schema_version": 2})
    with pytest.raises(UserError, match=r"^runs: .* is of schema version 2; this sophon reads version 1"):
        write_comparison([two[0], newer], tmp_path / "out")


def test_unwritable_folder(tmp_path, two):
    (tmp_path / "out").write_text("a file, not a folder")
    with pytest.raises(UserError, match="cannot write"):
        write_comparison(list(two), tmp_path / "out")
