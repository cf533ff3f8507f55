import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sophon.auditing.masking import Masking, Norms, Seen
from sophon.auditing.summary import AuditReport, Intactness
from sophon.errors import UserError
from sophon.tasks import Measured
from tests.auditing.records import ACCURACY, MSE, attempt, audit, duo, idle, oracle, searched, trio

MASKING = Masking([Norms("layers", 2, 1.0, 0.5, 2.0)], [Seen("kept", "loss", math.nan, 1.0, math.nan)], {"x": "y"})


SEARCHES = [
    {"name": name, "role": role, "sampler": "tpe", "trials": [{"number": 0, "value": 0.5}], "best": 0}
    for name in ("s", "t")
    for role in ("protected", "scratch")
]


def several():
    attempts = [*trio("a", 20.0, 60.0, 50.0), *idle(12.0, 30.0, 10.0), oracle(88.0), *duo("b", 58.0, 60.0)]
    return audit([*attempts, *searched("s", 55.0, 80.0, math.nan)], masking=MASKING, searches=SEARCHES)


def test_an_audit_is_read_back_as_it_was_written(tmp_path):
    several().write(tmp_path)
    found = AuditReport.read(tmp_path)
    assert found.json() == several().json() == json.loads((tmp_path / "audit.json").read_text())
    assert repr(found.results) == repr(several().results)
    assert repr(found.context) == repr(several().context)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["attempts.parquet", "audit.json", "curves.parquet"]


def test_what_stands_in_audit_json():
    found = several().json()
    assert found["schema_version"] == 3
    assert found["verdict"]["word"] == "WEAKENED"
    assert found["verdict"]["basis"].startswith("1000 test images, 1 seed, 2 attacks and 64 searched trials")
    assert (found["attempts"], found["date"]) == (len(several().attempts.table), "2026-01-02")
    assert found["worst_case"]["overall"]["decided_by"] in ("own_best", "same_attack")
    assert found["attacks"][0]["roles"]["protected"]["test_images"] == 1000
    assert found["thresholds"]["holds_from"] == 0.9
    assert found["domains"]["restricted"] == "dogs"
    assert [search["name"] for search in found["searches"]] == ["s", "t"]
    assert found["searches"][1]["roles"]["scratch"]["trials"] == [{"number": 0, "value": 0.5}]


def test_only_seconds_depend_on_the_machine():
    attempts = trio("a", 20.0, 60.0, 50.0)
    first, second = (audit([one | {"seconds": seconds} for one in attempts]).json() for seconds in (1.0, 99.0))
    assert first.pop("seconds_total") != second.pop("seconds_total")
    assert first == second


def test_intactness_by_hand():
    kept = Intactness.of(MSE, Measured(0.25, 0.03, 50), Measured(0.5, 0.04, 50))
    assert (kept.before, kept.after, kept.loss.value, kept.images) == (0.25, 0.5, 0.25, 50)
    assert (kept.loss.low, kept.loss.high) == pytest.approx((0.25 - 1.959964 * 0.05, 0.25 + 1.959964 * 0.05))
    assert Intactness.of(ACCURACY, Measured(70.0, 1.0, 9), Measured(71.0, 1.0, 9)).loss.value == -1.0


extremes = st.one_of(st.floats(), st.none(), st.sampled_from([0.0, 1e308, -1e308, 5e-324]))


@settings(max_examples=10)
@given(
    st.lists(
        st.tuples(st.sampled_from(["protected", "unprotected", "scratch"]), extremes, extremes, extremes, extremes),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from([ACCURACY, MSE]),
)
def test_extreme_values_give_plain_json_and_a_sentence(rows, metric):
    attempts = [
        attempt("a", role, test, seed=seed, metric=metric, error=error)
        | {"curve": [{"step": 0, "select": start}, {"step": 7, "select": end}]}
        for seed, (role, start, end, test, error) in enumerate(rows)
    ]
    found = audit(attempts)
    json.dumps(found.json(), allow_nan=False)
    assert found.verdict.sentence.endswith(".")


def spoil(folder, name, change):
    stored = json.loads((folder / "audit.json").read_text())
    (folder / name).write_text(json.dumps(change(stored)))


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        (lambda folder: (folder / "audit.json").unlink(), r"holds no audit.json; run `sophon audit"),
        (
            lambda folder: spoil(folder, "audit.json", lambda s: s | {"schema_version": 1}),
            "is of schema version 1; this",
        ),
        (lambda folder: spoil(folder, "audit.json", lambda s: [s]), "is of schema version None; this sophon reads"),
        (lambda folder: spoil(folder, "audit.json", lambda s: {"schema_version": 3}), "is not whole"),
        (lambda folder: spoil(folder, "audit.json", lambda s: s | {"intactness": 3}), "is not whole"),
        (lambda folder: (folder / "attempts.parquet").unlink(), "is not whole"),
        (lambda folder: (folder / "curves.parquet").write_text("no parquet"), "is not whole"),
    ],
)
def test_what_is_no_audit_is_refused(tmp_path, spoilt, message):
    several().write(tmp_path)
    spoilt(tmp_path)
    with pytest.raises(UserError, match=rf"^there: .*{message}") as error:
        AuditReport.read(tmp_path, "there")
    assert "\n" not in str(error.value)
