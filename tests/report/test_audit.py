import re

import pytest
from omegaconf import OmegaConf

from sophon.auditing.scores import Difference
from sophon.auditing.summary import AuditReport, Intactness
from sophon.errors import UserError
from sophon.report.audit import command, experiment, table, write_reports
from sophon.report.tables import gap_strength, strengths
from tests.auditing.records import ACCURACY, CONTEXT, MSE, attempt, audit, trio
from tests.report.reports import EVIL, check, rows, several, small, write


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write(tmp_path_factory.mktemp("several"), several())


def section(page, key):
    return page[page.index(f'<section id="{key}"') :].partition("</section>")[0]


# ---- the first screen -----------------------------------------------------------------------------------------------


def test_the_first_screen_says_word_sentence_and_what_it_is_about(tmp_path):
    found = small()
    page, markdown = write(tmp_path, found)
    text = check(page[: page.index("<nav")] + "</header></body></html>")
    assert f'<strong class="word holds">{found.verdict.word}</strong> ' in page
    for wanted in ("Audit of tiny <b>", found.verdict.sentence, *found.verdict.findings, "resnet_tiny, 28 x 28 x 1"):
        assert wanted in text
    facts = ("sophon", "cats", "dogs", "2026-01-02", "1000 test images, 2 seeds and 3 attacks")
    assert all(f"<dd>{fact}</dd>" in page for fact in facts)
    assert re.sub(r"\\(.)", r"\1", markdown).count(str(found.verdict)) == 1
    assert "- Rests on: 1000 test images, 2 seeds and 3 attacks" in markdown


def test_headline_cards_and_tables_agree(tmp_path):
    """The attack of the headline is in the table with the headline's figures."""
    held_out = {"exposure": "held_out"}
    found = audit(trio("centre", 89.7, 91.5, 62.7, **held_out) + trio("reset", 74.4, 94.2, 87.7, **held_out))
    page, markdown = write(tmp_path, found)
    assert "BROKEN: Protection does not stop an attacker" in markdown
    assert (
        "to 89.7 % accuracy, fine-tuning the unprotected one to 91.5 % and training from scratch to 62.7 %" in markdown
    )
    readings = [row[2:] for row in rows(markdown, "## Worst cases")[1:3]]
    assert [(row[0], row[4:]) for row in readings] == [
        ("own best attack", ["0.69 [0.69, 0.69]", "weakened"]),
        ("same attack; the lower", ["0.06 [0.06, 0.06]", "broken"]),
    ]
    assert rows(markdown, "## Attacks")[1][4:] == [
        *("62.7 [62.7, 62.7]", "91.5 [91.5, 91.5]", "89.7 [89.7, 89.7]", "0.06 [0.06, 0.06]")
    ]
    cards = re.findall(r'<dt>([^<]*)</dt><dd class="value">([^<]*)</dd>', page)
    assert cards == [
        ("Gap closed, own best attacks", "0.69"),
        ("Gap closed, same attack", "0.06"),
        ("Original domain", "73.0 %"),
    ]


def test_what_the_original_domain_gains_is_no_cost(tmp_path):
    kept = Intactness(ACCURACY, 73.0, 73.7, Difference(-0.7, -2.0, 1.0), 9)
    page, _ = write(tmp_path, audit(trio("a", 21.0, 60.0, 20.0), intactness=kept))
    for words in (
        "0.7 points more than 73.0 %",
        "protection gains 0.7 points (73.7 % after 73.0 %)",
    ):
        assert words in check(page)


def test_nothing_is_shown_of_what_was_not_measured(tmp_path):
    page, markdown = write(tmp_path, audit([attempt("a", "scratch", 10.0)], intactness=None, checkpoint={}))
    assert "Audit of a checkpoint" in check(page)
    assert 'class="card"' not in page
    assert re.findall(r"<h2>([^<]*)</h2>", page) == [
        "Curves",
        "Worst cases",
        "Attacks",
        "Controls",  # that the distillation floor was not run
        "To repeat this",
        "Definitions",
    ]
    assert "Original domain:" in markdown


# ---- sections -------------------------------------------------------------------------------------------------------


def test_sections_are_there_and_named_in_the_contents(written):
    page, markdown = written
    check(page)
    titles = re.findall(r"<h2>([^<]*)</h2>", page)
    assert titles == [
        *("Curves", "Worst cases", "Attacks", "Searches", "Does protection wear off?", "Masking"),
        *("Benign fine-tuning", "Controls", "To repeat this", "Definitions"),
    ]
    contents = page[page.index("<nav") : page.index("</nav>")]
    assert re.findall(r'<a href="#\w+">([^<]*)</a>', contents) == titles
    # what Markdown cannot show is left out, with its title where nothing else is below it
    assert re.findall(r"^## (.*)$", markdown, re.MULTILINE) == titles


def test_column_heads_lead_to_their_definitions(written):
    page, _ = written
    for term in ("gap closed", "exposure", "SGRC", "signed RFD", "harm", "judged"):
        anchor = "term-" + re.sub(r"\W+", "-", term.lower())
        assert f'<a href="#{anchor}">{term}</a>' in page
        assert f'<dt id="{anchor}">{term}</dt>' in page


@pytest.mark.parametrize(
    ("title", "row"),
    [
        ("## Worst cases", ["all attacks", "4", "both", "44.0 [44.0, 44.0]; found", "64.0 [64.0, 64.0]; found",
         "58.0 [58.0, 58.0]; found", "0.30 [0.30, 0.30]", "weakened"]),
        ("## Worst cases", ["family surgery", "1", "both", "-", "50.0 [50.0, 50.0]; renormalised",
         "20.0 [20.0, 20.0]; renormalised", "-; no result of scratch", "cannot be judged"]),
        ("## Attacks", ["`found`; winner: adam at 0.1, 100 steps", "seen", "9.4 %", "4.7 %", "44.0 [44.0, 44.0]",
         "64.0 [64.0, 64.0]", "58.0 [58.0, 58.0]", "0.30 [0.30, 0.30]"]),
        ("## Attacks", ["`short`; adam at 0.1, 30 steps", "seen", "50.0 %", "25.0 %", "40.0 [40.0, 40.0]",
         "60.0 [60.0, 60.0]", "30.0 [30.0, 30.0]; 1 diverged", "1.50 [1.50, 1.50]; worse than scratch"]),
        ("## Searches", ["`found`", "protected", "adam at 0.5", "tpe, 30 steps", "4", "1", "1", "3", "58.5"]),
        ("## Does", ["`long`", "120", "10.0 %", "0.30"]),
        ("## Masking", ["layers", "3", "3.1", "1.5", "6.6"]),
        ("What an attacker sees", ["fresh head", "loss", "-", "1", "-"]),
        ("What an attacker sees", ["kept head", "gradient", "3.3e+09", "1", "3.3e+09"]),
        ("Attacks that differ only by", ["`renormalised`", "`short`", "1.50", "-", "-"]),
        ("## Benign", ["`short`", "-", "75.0 [75.0, 75.0]", "70.0 [70.0, 70.0]", "5.0 [5.0, 5.0]", "6.7 %", "3.3 %"]),
        ("## Controls", ["oracle: unprotected, 8.5 times the data", "`short`", "-", "75.0 [75.0, 75.0]", "-"]),
        ("## Controls", ["distillation floor: a student of the model, from original images alone, then fine-tuned",
         "not run", "-", "-", "-"]),
        ("left out, since", ["`lora`", r"it has \<no\> layers"]),
    ],
)  # fmt: skip
def test_tables_by_hand(written, title, row):
    assert row in rows(written[1], title)


def test_colours_say_what_is_good_for_the_attacker():
    assert strengths([10.0, 20.0, float("nan"), 30.0], ACCURACY) == [0, 50, None, 100]
    assert strengths([0.01, 0.1, 1.0], MSE) == [100, 50, 0]  # by ratios
    assert strengths([0.0, 0.5, 1.0], MSE) == [100, 50, 0]  # by differences: there is no ratio to 0
    assert strengths([7.0, 7.0], ACCURACY) == [None, None]
    assert [gap_strength(value) for value in (-1.0, 0.0, 0.25, 1.0, 3.0, float("nan"))] == [100, 100, 75, 0, 0, None]


@pytest.mark.slow
def test_an_audit_of_many_attacks_is_folded_away(tmp_path):
    found = audit([attempt(f"attack{n:03}", "protected", n, exposure="held_out") for n in range(14)])
    page, _ = write(tmp_path, found)
    check(page)
    for title, tag, count in (("All 14 attacks", "<tr>", 15), ("held out (13)", "<svg", 13)):
        folded = page[page.index(f"<summary>{title}</summary>") :].partition("</details>")[0]
        assert folded.count(tag) == count
    shown = page[page.index("Those of the worst case:") : page.index("<summary>held out")]
    assert re.findall(r"<figcaption>(.*?)</figcaption>", shown) == ["attack013"]


# ---- filtered models, and how far models are from the reference ----------------------------------------------------

GEOMETRY = [
    {"role": "protected", "distance": 0.5, "barrier": 1.2, "neighbours": 61.0},
    {"role": "unprotected", "distance": None, "barrier": None, "neighbours": None},
]


def test_a_filtered_model_is_shown_wherever_roles_are(tmp_path):
    values = {"protected": 61.0, "unprotected": 80.0, "filtered": 60.0, "filtered_2": 50.0, "scratch": 40.0}
    origins = {role: {"path": f"out/{role}", "sha256": "ef" * 32, "name": role} for role in ("filtered", "filtered_2")}
    found = audit([attempt("a", *each) for each in values.items()], filtered=origins, geometry=GEOMETRY)
    page, markdown = write(tmp_path, found)
    assert ["protected", "0.5", "1.2 points", "61.0 %"] in rows(markdown, "## Distance to the reference")
    assert ["unprotected", "-", "-", "-"] in rows(markdown, "## Distance to the reference")
    assert "filtered_2" in check(page)
    cells = {title: dict(zip(*rows(markdown, title)[:2], strict=True)) for title in ("## Worst cases", "## Attacks")}
    for found in cells.values():
        assert found["R"] == "0.95 [0.95, 0.95]"
        assert [found[role].split()[0] for role in values] == [f"{value:.1f}" for value in values.values()]
    assert ["filtered_2", "filtered_2", "-", f"out/filtered_2; sha256 {'ef' * 32}"] in rows(markdown, "## To repeat")
    assert "'filtered=[out/filtered,out/filtered_2]'" in markdown


# ---- whatever names and numbers there are ---------------------------------------------------------------------------


def test_names_are_escaped_and_cannot_break_a_table(tmp_path):
    page, markdown = write(tmp_path, small())
    text = check(page)
    assert EVIL in text
    lines = table(small()).splitlines()
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {7}
    assert len({len(line) for line in lines}) == 1
    # Inside a code span Markdown shows HTML as text.
    assert r"`<script>alert('$x_1$')</script>\|'&'`" in lines[-1]
    outside_code = re.sub(r"```.*?```|`[^`]*`", "", markdown, flags=re.DOTALL)
    assert re.search(r"(?<!\\)<", outside_code) is None


def test_names_outside_the_font_and_control_characters_do_no_harm(tmp_path):
    page, markdown = write(tmp_path, audit([attempt("攻撃\x00\n🙂" + "long" * 40, "protected", 20.0)]))
    assert "\x00" not in page + markdown
    assert "攻撃\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}🙂" in page
    assert "\N{HORIZONTAL ELLIPSIS}</text>" in page


@pytest.mark.parametrize("curve", [[], [{"step": 0, "select": 10.0}]])
def test_curves_of_few_points(tmp_path, curve):
    page, _ = write(tmp_path, audit([one | {"curve": curve} for one in trio("a", 10.0, 60.0, 50.0)]))
    assert section(page, "attacks").count("<svg") == 1
    assert ('<section id="curves"' in page) == bool(curve)


def test_a_metric_that_falls(tmp_path):
    page, markdown = write(tmp_path, audit(trio("a", 0.5, 0.125, 0.75, metric=MSE)))
    assert "lower is better for the attacker" in page
    assert "Eps-MSE on the attacker's own select split" in check(page)
    assert "| 0.5 [0.5, 0.5] " in markdown


def test_table_for_the_terminal_by_hand():
    assert table(audit(trio("a", 55.0, 60.0, 50.0))) == (
        "| attack | exposure | scratch (%) | unprotected (%) | protected (%) | gap closed |\n"
        "| ------ | -------- | ----------- | --------------- | ------------- | ---------- |\n"
        "| `a`    | seen     | 50.0        | 60.0            | 55.0          | 0.50       |"
    )


def test_reports_are_the_same_from_what_was_stored(written, tmp_path):
    several().write(tmp_path)
    assert write(tmp_path, AuditReport.read(tmp_path)) == written


def test_an_unwritable_folder_is_a_user_error(tmp_path):
    (tmp_path / "run").write_text("a file, not a folder")
    with pytest.raises(UserError, match="cannot write"):
        write_reports(tmp_path / "run", small())


# ---- to repeat it ---------------------------------------------------------------------------------------------------


def test_the_command_and_the_experiment_repeat_the_audit(tmp_path):
    assert command(CONTEXT) == (
        "sophon audit --config-dir=conf experiment=repeat checkpoint=out/protected reference=out/reference "
        "run_dir=repeat"
    )
    config = {"name": "x: y", "seed": 3, "attack": {"strategies": {"a": {"lr": 1e-5, "head": None}}, "seeds": 2}}
    text = experiment(config)
    assert text.startswith("# @package _global_\n")
    (tmp_path / "repeat.yaml").write_text(text)
    read = OmegaConf.to_container(OmegaConf.load(tmp_path / "repeat.yaml"))
    assert read.pop("defaults") == [{"override /attack": None}]
    assert read == config
