import html
import json
import re

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf

from sophon.audit.gallery import image_grid, write_gallery
from sophon.audit.metrics import summarise
from sophon.audit.verdict import printable
from sophon.errors import UserError
from sophon.report.repeat import command, experiment
from sophon.report.single import curves_frame, read_audit, table, write_curves, write_reports
from tests.report.reports import CONTEXT, EVIL, MSE, Page, attempt, audit, write

# ---- the page -------------------------------------------------------------------------------------------------------


def test_page_is_well_formed_and_loads_nothing(tmp_path):
    _, page, _ = write(tmp_path, audit())
    parsed = Page(page)
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(parsed.tags)
    assert "http://" not in page
    assert "https://" not in page
    for name, value in parsed.attributes:
        assert name not in ("src", "srcset", "data", "action")
        if name == "href":
            assert value.startswith("#")
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)\)", page))
    assert "@import" not in page


def test_page_holds_the_verdict_and_every_number(tmp_path):
    summary, page, _ = write(tmp_path, audit())
    text = html.unescape(page)
    assert summary["verdict"] in text
    for attack in summary["attacks"]:
        assert attack["attack"] in text
        for score in attack["roles"].values():
            assert f"{score['mean']:.1f} ± {score['ci95']:.1f}" in text
        gap = attack["gap_closed"]
        assert "{:.2f}<small>[{:.2f}, {:.2f}]</small>".format(gap["value"], *gap["ci95"]) in text
    for wanted in (
        "loss 0.8 points, from 73.7 %",
        "ab" * 32,
        "cd" * 32,
        "9.9.9",
        "held out: lr, optimizer",
        "adam at 0.125",
    ):
        assert wanted in text
    assert page.count("<svg") == 1 + 2 * 3  # all results, and by attack its curve and by exposure its course


def test_page_is_readable_in_light_dark_and_print(tmp_path):
    _, page, _ = write(tmp_path, audit())
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page
    svg = page[page.index("<svg") : page.rindex("</svg>")]
    assert re.search(r"(fill|stroke): #(?!ffffff)", svg) is None
    for variable in set(re.findall(r"var\((--[a-z]+)\)", page)) - {"--level"}:
        assert page.count(f"{variable}: #") == 2


def test_page_escapes_names_and_configuration(tmp_path):
    _, page, _ = write(tmp_path, audit())
    assert "<script" not in page
    assert "<b>" not in page
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", page)
    assert html.escape(EVIL, quote=False) in labels


def test_ids_are_unique(tmp_path):
    _, page, _ = write(tmp_path, audit())
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]*)"', page)) | set(re.findall(r"url\(#([^)]*)\)", page)) <= set(ids)


def test_reports_are_deterministic(tmp_path):
    first = write(tmp_path, audit())
    assert write(tmp_path, audit()[::-1]) == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.md"]


def test_reports_from_the_stored_summary_are_the_same(tmp_path):
    summary, page, markdown = write(tmp_path, audit())
    write_reports(tmp_path, json.loads(json.dumps(summary)), audit())
    assert (tmp_path / "report.html").read_text() == page
    assert (tmp_path / "report.md").read_text() == markdown


@pytest.mark.parametrize("present", [("protected",), ("protected", "unprotected"), ("scratch",)])
def test_reports_with_missing_roles(tmp_path, present):
    summary, page, markdown = write(tmp_path, [one for one in audit() if one["role"] in present])
    assert summary["verdict"] in html.unescape(page)
    assert "| -" in markdown
    Page(page)


def test_reports_without_context(tmp_path):
    _, page, markdown = write(tmp_path, audit(), context={})
    assert "Audit of a checkpoint" in page
    assert "Intactness" not in markdown
    Page(page)


@pytest.mark.parametrize("points", [0, 1])
def test_reports_with_curves_of_few_points(tmp_path, points):
    attempts = [attempt("a", role, 10, points=points) for role in ("protected", "unprotected", "scratch")]
    summary, page, _ = write(tmp_path, attempts)
    assert summary["attacks"][0]["signed_area"] is None
    assert page.count("<svg") == 1 + points


def test_reports_of_a_metric_that_falls(tmp_path):
    attempts = [attempt("a", role, end, metric=MSE) for role, end in [("protected", 0.5), ("unprotected", 0.125)]]
    _, page, markdown = write(tmp_path, attempts)
    assert "lower is better for the attacker" in page
    assert "| 0.75 " in markdown
    assert "eps-MSE on the test split" in page


def test_metrics_with_capitals_in_their_name_keep_them(tmp_path):
    _, page, _ = write(tmp_path, [attempt("a", "protected", 0.5, metric=MSE)])
    assert "Eps-MSE on the attacker's own" in html.unescape(page)
    assert "Accuracy (%) on the attacker's own" in html.unescape(write(tmp_path, audit())[1])


def test_failures_are_shown(tmp_path):
    attempts = [*audit(), attempt("momentum", "protected", 1.0, seed=9) | {"test": None}]
    _, page, markdown = write(tmp_path, attempts)
    assert "(1 failed)" in page
    assert "(1 failed)" in markdown


def test_names_outside_the_font_and_control_characters_do_no_harm(tmp_path):
    name = "攻撃\x00\n🙂" + "long" * 40
    _, page, markdown = write(tmp_path, [attempt(name, "protected", 20.0)])
    assert "\x00" not in page + markdown
    assert "攻撃\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}🙂" in page
    assert "longl\N{HORIZONTAL ELLIPSIS}" not in page
    assert "\N{HORIZONTAL ELLIPSIS}</text>" in page
    assert printable("a\ud800b") == "a\N{REPLACEMENT CHARACTER}b"


def test_unwritable_folder_is_a_user_error(tmp_path):
    (tmp_path / "run").write_text("a file, not a folder")
    with pytest.raises(UserError, match="cannot write"):
        write(tmp_path / "run", audit())


# ---- generated images and further measurements ----------------------------------------------------------------------

STEPS = (0, 10, 30)
DETAILS = {"eps-MSE t 0-9": 0.0123456, "eps-MSE t 10-19": None, "Frechet distance": 12.3456}
NETWORK = "small ResNet trained here on cats and dogs, 64 features"


def generating(folder):
    """An audit of denoisers: two attacks, three roles, two seeds, pictures of the first."""
    attempts = []
    for name in ("momentum", EVIL):
        for role, end in {"protected": 0.75, "unprotected": 0.125, "scratch": 0.5}.items():
            for seed in range(2):
                files = [(step, f"samples/{len(attempts)}-{step}.png") for step in STEPS] if seed == 0 else []
                for step, file in files:
                    (folder / "samples").mkdir(exist_ok=True)
                    (folder / file).write_bytes(grid(20 * len(attempts) + step))
                more = {"details": DETAILS, "samples": [{"step": step, "file": file} for step, file in files]}
                attempts.append(attempt(name, role, end, seed, metric=MSE) | more)
    return attempts


def grid(value):
    return image_grid(torch.full((4, 1, 4, 4), value, dtype=torch.uint8))


def images(page):
    return [dict(re.findall(r'(src|alt)="([^"]*)"', tag)) for tag in re.findall(r"<img[^>]*>", page)]


def test_page_embeds_every_picture(tmp_path):
    gallery = write_gallery(tmp_path, {"real <dogs>": torch.full((4, 1, 4, 4), 255, dtype=torch.uint8)})
    _, page, _ = write(tmp_path, generating(tmp_path), CONTEXT | {"gallery": gallery, "feature_network": NETWORK})
    Page(page)
    shown = images(page)
    assert len(shown) == 1 + 2 * 3 * len(STEPS)
    assert all(one["src"].startswith("data:image/png;base64,") for one in shown)
    assert len({one["src"] for one in shown}) == len(shown)
    assert len({one["alt"] for one in shown}) == len(shown)
    assert shown[0]["alt"] == "real &lt;dogs&gt;"
    assert "generated by the scratch model after 0 steps of momentum" in [one["alt"] for one in shown]
    assert "http://" not in page
    assert "https://" not in page
    assert "<script" not in page
    assert "is missing or damaged" not in page


def test_rows_of_pictures_are_the_roles_and_columns_the_steps(tmp_path):
    _, page, _ = write(tmp_path, generating(tmp_path))
    strip = page[page.index('<figure class="strip">') :]
    strip = strip[: strip.index("</figure>")]
    assert re.findall(r'<th scope="col">(\d+)</th>', strip) == ["0", "10", "30"]
    assert re.findall(r'<th scope="row" class="(\w+)">', strip) == ["scratch", "unprotected", "protected"]
    assert strip.count("<td>") == 9
    assert '<div class="wide">' in strip


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n")])
def test_page_names_a_picture_that_it_cannot_show(tmp_path, damage):
    gallery = write_gallery(tmp_path, {"real": torch.zeros(4, 1, 4, 4, dtype=torch.uint8)})
    attempts = generating(tmp_path)
    for file in ("samples/0-10.png", "samples/real.png"):
        damage(tmp_path / file)
    _, page, _ = write(tmp_path, attempts, CONTEXT | {"gallery": gallery})
    assert "samples/0-10.png is missing or damaged" in page
    assert "samples/real.png is missing or damaged" in page
    assert len(images(page)) == 17
    Page(page)


def test_pictures_of_an_attack_with_an_odd_name(tmp_path):
    attempts = generating(tmp_path)
    odd = [one | {"attack": "a\x00\ud800"} for one in attempts if one["attack"] == "momentum"]
    _, page, _ = write(tmp_path, odd)
    assert len(images(page)) == 9
    assert "\x00" not in page


def test_points_that_an_attack_did_not_reach_stay_empty(tmp_path):
    attempts = generating(tmp_path)
    attempts[0]["samples"] = attempts[0]["samples"][:1]
    _, page, _ = write(tmp_path, attempts)
    assert page.count("not drawn") == 2
    assert len(images(page)) == 16


def test_further_measurements_by_hand(tmp_path):
    attempts = [
        attempt("a", role, 0.5, metric=MSE) | {"details": {"eps-MSE t 0-9": value, "Frechet distance": 10 * value}}
        for role, value in {"protected": 0.8, "unprotected": 0.0123456, "scratch": 0.25}.items()
    ]
    _, page, markdown = write(tmp_path, attempts, CONTEXT | {"feature_network": NETWORK})
    assert (
        "| attack | measurement      | scratch | unprotected | protected |\n"
        "| ------ | ---------------- | ------- | ----------- | --------- |\n"
        "| `a`    | eps-MSE t 0-9    | 0.25    | 0.01235     | 0.8       |\n"
        "| `a`    | Frechet distance | 2.5     | 0.1235      | 8         |\n"
    ) in markdown
    table_ = page[page.index("<h2>Further measurements") :]
    assert re.findall(r"<td>\s*([^<\s]*)\s*</td>", table_[: table_.index("</table>")]) == [
        "0.25", "0.01235", "0.8", "2.5", "0.1235", "8",
    ]  # fmt: skip
    for text in (page, markdown):
        assert f"features: {NETWORK}." in text
        assert "FID" not in text


def test_further_measurements_that_some_lack(tmp_path):
    attempts = generating(tmp_path)
    for one in attempts:
        if one["role"] == "scratch":
            del one["details"]
    _, page, markdown = write(tmp_path, attempts)
    assert "| `momentum` " in markdown
    assert re.search(r"\| eps-MSE t 10-19 +\| - +\| - +\| - +\|", markdown)
    assert re.search(r"\| eps-MSE t 0-9 +\| - +\| 0\.01235 +\| 0\.01235 +\|", markdown)
    assert "features: a network that the audit does not name." in page


def test_classifiers_get_the_small_table_and_no_pictures(tmp_path):
    _, plain, _ = write(tmp_path, audit())
    attempts = [one | {"details": {"cross-entropy": 1.5}, "samples": []} for one in audit()]
    _, page, markdown = write(tmp_path, attempts)
    assert "Samples" not in page
    assert images(page) == []
    assert "Frechet" not in page + markdown
    start, end = page.index('<section id="further"'), page.index('<section id="repeat"')
    shown = (page[:start] + page[end:]).replace('<a href="#further">Further measurements</a>', "")
    assert re.sub(r"\s+", "", shown) == re.sub(r"\s+", "", plain)
    assert page[start:end].count("cross-entropy") == 3
    assert re.search(r"\| `momentum` +\| cross-entropy \| 1\.5 +\| 1\.5 +\| 1\.5 +\|", markdown)
    Page(page)


def test_summaries_from_before_there_were_pictures(tmp_path):
    summary = summarise(audit(), CONTEXT)
    del summary["gallery"], summary["feature_network"]
    for attack in summary["attacks"]:
        for score in attack["roles"].values():
            del score["details"]
    write_reports(tmp_path, summary, audit())
    assert "Further measurements" not in (tmp_path / "report.html").read_text() + (tmp_path / "report.md").read_text()


# ---- Markdown and the terminal --------------------------------------------------------------------------------------


def test_table_by_hand():
    attempts = [attempt("a", role, end) for role, end in [("protected", 55), ("unprotected", 60), ("scratch", 50)]]
    assert table(summarise(attempts, CONTEXT)) == (
        "| attack | exposure | scratch (%) | unprotected (%) | protected (%) | gap closed |\n"
        "| ------ | -------- | ----------- | --------------- | ------------- | ---------- |\n"
        "| `a`    | seen     | 50.2        | 60.2            | 55.2          | 0.50       |"
    )


def test_table_cannot_be_broken_by_a_name():
    lines = table(summarise(audit(), CONTEXT)).splitlines()
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {7}
    assert len({len(line) for line in lines}) == 1
    # Inside a code span Markdown shows HTML as text.
    assert r"`<script>alert('$x_1$')</script>\|'&'`" in lines[-1]


def test_markdown_report_has_verdict_numbers_and_provenance(tmp_path):
    summary, _, markdown = write(tmp_path, audit())
    for attack in summary["attacks"]:
        gap = attack["gap_closed"]
        assert "| {:.2f} [{:.2f}, {:.2f}] ".format(gap["value"], *gap["ci95"]) in markdown
    outside_code = re.sub(r"```.*?```|`[^`]*`", "", markdown, flags=re.DOTALL)
    assert re.search(r"(?<!\\)<", outside_code) is None
    assert re.sub(r"\\(.)", r"\1", markdown).count(summary["verdict"]) == 1
    assert '"torch": "9.9.9"' in markdown
    assert "- Intactness: 72.9 % loss 0.8 points, from 73.7 % (on the original domain)" in markdown


# ---- curves ---------------------------------------------------------------------------------------------------------


def test_curves_frame_has_a_row_for_every_point():
    frame = curves_frame(audit()[::-1])
    assert list(frame.columns) == ["attack", "role", "seed", "step", "select", "exposure", "domain"]
    assert len(frame) == 3 * 3 * 2 * 4
    assert frame["seed"].dtype == frame["step"].dtype == "int64"
    assert frame["select"].dtype == "float64"
    one = frame[(frame.attack == "momentum") & (frame.role == "protected") & (frame.seed == 1)]
    assert one["step"].tolist() == [0, 10, 20, 30]
    assert one["select"].tolist() == [10, 14, 18, 22]
    assert set(one["exposure"]) == {"seen"}
    pd.testing.assert_frame_equal(frame, curves_frame(audit()))


def test_curves_frame_keeps_missing_values_and_may_be_empty():
    spoilt = attempt("a", "protected", 20.0)
    spoilt["curve"][1]["select"] = None
    assert curves_frame([spoilt])["select"].isna().tolist() == [False, True, False, False]
    assert curves_frame([]).empty
    assert list(curves_frame([]).columns) == list(curves_frame([spoilt]).columns)


def test_written_curves_read_back(tmp_path):
    write_curves(tmp_path, audit())
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "curves.parquet"), curves_frame(audit()))
    assert [path.name for path in tmp_path.iterdir()] == ["curves.parquet"]


# ---- to repeat it ---------------------------------------------------------------------------------------------------


def test_experiment_is_the_configuration(tmp_path):
    config = {
        "name": "1e-3",
        "attack": {"strategies": {"on": {"lr": 1e-05, "surgery": [], "note": "${a}: #"}, "b": {}}, "seeds": 2},
        "seed": 0,
    }
    text = experiment(config)
    assert text.startswith("# @package _global_\ndefaults:\n- override /attack: null\n")
    loaded = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    assert loaded == {"defaults": [{"override /attack": None}], **config}


def test_command_names_both_checkpoints():
    summary = {"checkpoint": {"path": "runs/a b/checkpoint"}, "reference": {"path": "out/reference"}}
    assert command(summary) == (
        "sophon audit --config-dir=conf experiment=repeat 'checkpoint=runs/a b/checkpoint' reference=out/reference "
        "run_dir=repeat"
    )


def test_read_audit(tmp_path):
    summary, _, _ = write(tmp_path, audit())
    (tmp_path / "audit.json").write_text(json.dumps(summary))
    assert read_audit(tmp_path) == json.loads(json.dumps(summary))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "runs: '.*' holds no audit.json; run `sophon audit run_dir="),
        ("{}", "runs: '.*audit.json' is of schema version None; this sophon reads version 1"),
        ("[]", "runs: '.*audit.json' is of schema version None"),
        ('{"schema_version": 99}', "is of schema version 99"),
        ('{"schema_version": 1, "metric": {}}', "has no verdict, attacks, worst_case"),
        ("{", "audit.json"),
    ],
)
def test_audits_that_cannot_be_read(tmp_path, content, message):
    if content is not None:
        (tmp_path / "audit.json").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_audit(tmp_path, "runs")
    assert "\n" not in str(caught.value)
