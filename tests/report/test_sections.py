import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sophon.audit.metrics import summarise
from sophon.report.heat import blocks, gap_strength, strengths
from sophon.report.single import write_reports
from tests.report.reports import ACCURACY, CONTEXT, MASKING, MSE, Page, attempt, audit, rows, write


def several():
    """An audit with attacks of two lengths, a search, an operation, controls and benign fine-tuning."""
    attempts = []
    kinds = {
        "short": ({"steps": 30}, {"protected": 30, "unprotected": 60, "scratch": 40}),
        "long": ({"steps": 120}, {"protected": 54, "unprotected": 60, "scratch": 40}),
        "noisy": ({"surgery": [{"operation": "noise", "scale": 0.1}]}, {"protected": 20, "unprotected": 50}),
        "found": ({"lr": 0.5}, {"protected": 58, "unprotected": 64, "scratch": 44}),
        "idle": ({"steps": 0}, {"protected": 5, "unprotected": 15, "scratch": 10}),
    }
    for name, (changes, ends) in kinds.items():
        for role, end in ends.items():
            more = {"search": {"name": "found", "sampler": "tpe", "trials": 4}} if name == "found" else {}
            made = attempt(name, role, end, exposure="longer" if name == "long" else "seen")
            attempts.append(made | {"strategy": made["strategy"] | changes} | more)
    for role, end in {"protected": 70, "unprotected": 71}.items():
        attempts.append(attempt("short", role, end) | {"id": f"benign-{role}", "domain": "benign"})
    attempts.append(attempt("short", "oracle", 75) | {"data_ratio": 10.0})
    return attempts


def searched():
    """The trials of `several`'s search: one complete, one pruned, one failed, one better."""
    values = [(41.0, "complete"), (12.0, "pruned"), (None, "failed"), (58.5, "complete")]
    trials = [
        {"number": n, "state": state, "value": value, "step": 30, "strategy": {"optimizer": "adam", "lr": 0.5}}
        for n, (value, state) in enumerate(values)
    ]
    roles = {role: {"trials": trials, "best": 3} for role in ("protected", "unprotected", "scratch")}
    return CONTEXT | {"searches": [{"name": "found", "sampler": "tpe", "trials": 4, "steps": 30, "roles": roles}]}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write(tmp_path_factory.mktemp("several"), several(), searched())


def test_every_section_is_there_and_named_in_the_contents(written):
    _, page, markdown = written
    Page(page)
    titles = re.findall(r"<h2>([^<]*)</h2>", page)
    assert titles == [
        "Attack by role", "Attacks", "Curves", "Searches", "Does protection wear off?", "Benign fine-tuning",
        "Controls", "To read and to repeat this",
    ]  # fmt: skip
    assert re.findall(r'<a href="#\w+">([^<]*)</a>', page) == titles
    # what Markdown cannot show is left out, with its title where nothing else is below it
    assert re.findall(r"^## (.*)$", markdown, re.MULTILINE) == titles


def test_the_verdict_comes_first_with_its_thresholds_and_the_cost(written):
    summary, page, _ = written
    head = html.unescape(page[: page.index("<nav")])
    assert head.index(summary["verdict"]) < head.index("calls 0.9 and above holding, below 0.1 no protection")
    assert "Intactness" in head
    assert "Harm to benign use" in head
    assert "1.0 points" in head


def test_heat_map_is_grouped_and_begins_with_what_gets_through_most(written):
    page = written[1][written[1].index('<section id="map"') : written[1].index('<section id="attacks"')]
    assert re.findall(r"<caption>([^<]*)</caption>", page) == ["seen", "longer"]
    assert re.findall(r'<th scope="row">([^<]*)</th>', page) == ["found", "short", "noisy", "long"]
    assert re.findall(r'<th scope="col" class="\w*">([^<]*)</th>', page)[:5] == [
        "attack", "scratch", "unprotected", "protected", "gap closed",
    ]  # fmt: skip
    cells = re.findall(r"<td([^>]*)>([^<]*)</td>", page)
    assert [text for _, text in cells[:4]] == ["44.2", "64.2", "58.2", "0.30"]
    assert cells[1][0] == ' style="--level: 100%" class="strong"'  # the best for the attacker of all
    assert cells[10][0] == ' style="--level: 0%"'  # the worst of all
    assert cells[3][0] == ' style="--level: 70%" class="strong"'
    assert cells[8] == ("", "-")  # noisy was not tried on scratch
    assert cells[11] == ("", "-")


def test_strengths_follow_the_direction_of_the_metric():
    assert strengths([10.0, 20.0, None, 30.0], ACCURACY) == [0, 50, None, 100]
    assert strengths([0.01, 0.1, 1.0], MSE) == [100, 50, 0]  # by ratios
    assert strengths([0.0, 0.5, 1.0], MSE) == [100, 50, 0]  # by differences: there is no ratio to 0
    assert strengths([7.0, 7.0], ACCURACY) == [None, None]
    assert strengths([None], ACCURACY) == [None]
    assert [gap_strength(value) for value in (-1.0, 0.0, 0.25, 1.0, 3.0, None)] == [100, 100, 75, 0, 0, None]


@given(st.lists(st.none() | st.floats(allow_nan=False, allow_infinity=False)), st.sampled_from([ACCURACY, MSE]))
def test_strengths_are_percentages(values, metric):
    found = strengths(values, metric)
    assert len(found) == len(values)
    assert all(level is None or 0 <= level <= 100 for level in found)


def test_long_groups_are_cut_into_even_blocks():
    made = blocks({"seen": [("a", [])], "held out": [(str(n), []) for n in range(70)], "none": []}, most=28)
    assert {caption: len(rows_) for caption, rows_ in made.items()} == {
        "seen": 1, "held out, 1 to 24 of 70": 24, "held out, 25 to 48 of 70": 24, "held out, 49 to 70 of 70": 22,
    }  # fmt: skip


def test_an_audit_of_many_attacks_is_folded_away(tmp_path):
    attempts = [attempt(f"attack{n:03}", "protected", n % 90, exposure="held_out") for n in range(130)]
    summary = summarise(attempts, CONTEXT)
    write_reports(tmp_path, summary, [])
    page = (tmp_path / "report.html").read_text()
    Page(page)
    assert "held out, 105 to 130 of 130" in page
    folded = page[page.index("<summary>All 130 attacks</summary>") :]
    assert folded[: folded.index("</details>")].count("<tr>") == 131
    assert "<details open" not in page
    drawn = page[page.index("<summary>All attacks with their intervals</summary>") :]
    assert drawn[: drawn.index("</details>")].count("<svg") == 4  # sheets of paper


def test_worst_cases_of_groups_and_families(written):
    found = {row[0]: row[1:] for row in rows(written[2], "## Attacks")}
    assert found["all attacks"] == ["4", "44.2; found", "64.2; found", "58.2; found", "0.30"]
    assert found["longer"][0] == "1"
    assert "held out" not in found
    assert found["family search"][3] == "58.2; found"
    assert found["family surgery"] == ["1", "-", "50.2; noisy", "20.2; noisy", "-; no result of scratch"]
    assert "family lora" not in found


def test_attacks_are_described(written):
    markdown = written[2]
    assert "| `long`; adam at 0.125, 120 steps" in markdown
    assert "| `noisy`; adam at 0.125, after adding noise with scale 0.1" in markdown
    assert "| `found`; winner: adam at 0.5" in markdown


def test_searches_by_hand(written):
    _, page, markdown = written
    assert rows(markdown, "## Searches")[0] == [
        "search", "role", "winner", "sampler", "trials", "pruned", "failed", "won by trial", "on select",
    ]  # fmt: skip
    assert rows(markdown, "## Searches")[-1] == [
        "`found`", "protected", "adam at 0.5", "tpe, 30 steps", "4", "1", "1", "3", "58.5",
    ]  # fmt: skip
    section = page[page.index('<section id="searches"') : page.index('<section id="course"')]
    assert section.count("<svg") == 1


def test_wearing_off_by_length_and_in_the_course(written):
    markdown = written[2][written[2].index("## Does protection wear off") :]
    assert rows(markdown, "## Does")[1:] == [["`short`", "30", "49.8 %", "1.50"], ["`long`", "120", "10.0 %", "0.30"]]
    course = rows(markdown, "### In the course")
    assert course[0] == ["attack", "steps", "after 25%", "after 50%", "after 75%", "after 100%"]
    assert {row[0]: row[1:] for row in course[1:]} == {
        "`found`": ["30", "6.4 %", "8.1 %", "8.9 %", "9.4 %"],
        "`noisy`": ["30", "37.5 %", "50.0 %", "56.2 %", "60.0 %"],
        "`short`": ["30", "33.3 %", "42.9 %", "47.4 %", "50.0 %"],
        "`long`": ["120", "10.0 %", "-", "-", "-"],  # its curve ends after 30 steps
    }


def test_benign_fine_tuning_by_hand(written):
    assert rows(written[2], "## Benign")[1] == ["`short`", "-", "71.2", "70.2", "1.0", "1.4 %"]
    assert "Mean harm: 1.0 points." in written[2]


def test_controls_by_hand(written):
    assert rows(written[2], "## Controls")[1:] == [
        ["no attack, only what the head needs", "`idle`", "10.2", "15.2", "5.2"],
        ["unprotected, its best attack", "`found`", "-", "64.2", "-"],
        ["scratch, tuned", "`found`", "44.2", "-", "-"],
        ["oracle: unprotected, 10 times the data", "`short`", "-", "75.2", "-"],
    ]


def test_controls_and_benign_fine_tuning_are_no_attacks(written):
    _, page, _ = written
    curves = page[page.index('<section id="curves"') : page.index('<section id="searches"')]
    assert re.findall(r"<figcaption>([^<]*)<", curves) == ["found", "noisy", "short", "long"]
    attacks = rows(written[2], "### All") if "### All" in written[2] else rows(written[2], "| attack ")
    assert "`idle`" not in [row[0] for row in attacks]


def test_curves_of_the_benign_domain_are_not_mixed_in(tmp_path):
    summary, page, _ = write(tmp_path / "one", several(), searched())
    write_reports(tmp_path / "two", summary, [one for one in several() if one.get("domain") != "benign"])
    assert (tmp_path / "two" / "report.html").read_text() == page


def test_an_audit_of_controls_only(tmp_path):
    summary, page, markdown = write(tmp_path, [one for one in several() if one["attack"] == "idle"])
    assert summary["attacks"] == []
    assert "Attack by role" not in page
    assert rows(markdown, "## Controls")[1][1] == "`idle`"
    Page(page)


def test_attacks_that_were_left_out_are_named(tmp_path):
    _, page, markdown = write(tmp_path, audit(), CONTEXT | {"left_out": {"lora": "it has <no> layers"}})
    assert "<dt>lora</dt><dd>it has &lt;no&gt; layers</dd>" in page
    assert r"- `lora`: it has \<no\> layers" in markdown


NEW = ("families", "decay", "controls", "benign", "searches", "hashes", "left_out")


def test_summaries_from_before_there_were_searches(tmp_path):
    summary = summarise(audit(), CONTEXT)
    for key in NEW:
        summary.pop(key, None)
    for each in summary["attacks"]:
        for key in ("horizons", "search", "strategies"):
            each.pop(key, None)
    write_reports(tmp_path, summary, audit())
    page = (tmp_path / "report.html").read_text()
    assert re.findall(r"<h2>([^<]*)</h2>", page) == [
        "Attack by role",
        "Attacks",
        "Curves",
        "To read and to repeat this",
    ]
    Page(page)


def test_masking_by_hand(tmp_path):
    summary = summarise(audit(), CONTEXT) | {"masking": MASKING}
    write_reports(tmp_path, summary, audit())
    page, markdown = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    Page(page)
    assert "<b>weak" not in page
    assert "<h2>Masking</h2>" in page
    section = markdown[markdown.index("## Masking") :]
    spread = ["6.2; 3 to 9", "2; 1 to 4", "3.1; 1.5 to 6.6"]
    assert rows(section, "## Masking") == [
        ["weights before normalisation", "count", "protected", "unprotected", "ratio"],
        ["norm of layers", "3", *spread],
        ["effective rate of layers", "3", *spread],
    ]
    assert rows(section, "What a mild attacker sees") == [
        ["attacker", "quantity", "protected", "unprotected", "ratio"],
        ["fresh head, 0 steps", "gradient", "0.0065", "0.26", "0.025"],
        ["fresh head, 0 steps", "curvature", "-", "-", "-"],
    ]
    assert rows(section, "### Later, and from other head starts")[1:] == [
        ["kept head, 10 steps", "gradient", "0.5", "0.25", "2"],
        ["kept head, 10 steps", "curvature", "-", "-", "-"],
    ]
    assert rows(section, "Its median is 0.75.") == [
        ["attack", "the same without", "gap closed without", "gap closed", "masked share"],
        ["`renormalised`", "`momentum`", "0.60", "0.15", "0.75"],
        ["`reset`", "`<b>weak`", "0.05", "-", "-"],
    ]


@pytest.mark.parametrize("found", [None, {"measured": None, "pairs": [], "share": None}, "older"])
def test_audits_without_masking_have_no_such_section(tmp_path, found):
    summary = summarise(audit(), CONTEXT) | {"masking": found}
    if found == "older":
        del summary["masking"]
    write_reports(tmp_path, summary, audit())
    assert "Masking" not in (tmp_path / "report.html").read_text()
