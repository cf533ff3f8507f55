"""Filtered models in the page, and how far models are from the reference."""

from tests.auditing.records import attempt, audit
from tests.report.reports import check, rows, write

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
