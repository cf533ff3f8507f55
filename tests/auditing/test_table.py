import math

import pandas as pd
import pytest

from sophon.auditing.table import tabulate, trials_table
from sophon.errors import UserError
from tests.auditing.records import attempt, oracle, searched, trio


def test_a_row_an_attempt_and_a_row_a_point():
    records = trio("b", 20.0, 60.0, 50.0, error=1.5, outside=["lr", "steps"], details={"cross-entropy": 0.5})
    records += [*searched("a", 1.0, 2.0, 3.0), oracle(88.0)]
    records[0]["samples"] = [{"step": 100, "file": "samples/x.png"}]
    table, curves = tabulate(records[::-1])
    assert list(table["id"]) == sorted(record["id"] for record in records)
    row = table[table["id"] == "b-protected-0"].iloc[0]
    expected = {"test": 20.0, "standard_error": 1.5, "test_images": 1000, "outside": "lr, steps", "trials": 0}
    expected |= {"optimizer": "adam", "lr": 0.1, "steps": 100, "surgery": "[]", "diverged": False, "select": 20.0}
    assert {key: row[key] for key in expected} == expected
    assert row["measured: cross-entropy"] == 0.5
    assert table.set_index("id")["trials"].max() == 64
    assert table.set_index("id").loc["a-oracle-0", "data_ratio"] == 8.5
    assert len(curves) == 2 * len(records)
    assert curves.set_index(["id", "step"])["picture"].to_dict()["b-protected-0", 100] == "samples/x.png"


@pytest.mark.parametrize("spoilt", [{"test": None}, {"finished": False}, {"curve": []}])
def test_what_diverged(spoilt):
    (row,) = tabulate([attempt("a", "protected", 1.0) | spoilt]).table.to_dict("records")
    assert row["diverged"]


def test_tables_survive_parquet(tmp_path):
    attempts = tabulate([*trio("a", 20.0, math.nan, 50.0), *trio("b", 20.0, 60.0, 50.0, strategy={"data_budget": 9})])
    for frame in attempts:
        frame.to_parquet(tmp_path / "frame", index=False)
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "frame"), frame, check_dtype=False)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "none found"),
        ([attempt("a", "protected", 1.0) | {"schema_version": 1}], "attempt 'a-protected-0' is of schema version 1"),
    ],
)
def test_what_is_no_attempt_is_refused(records, message):
    with pytest.raises(UserError, match=message):
        tabulate(records)


@pytest.mark.parametrize(
    ("higher", "best"), [(True, [math.nan, 30.0, 30.0, 30.0, 40.0]), (False, [math.nan, 30.0, 20.0, 20.0, 20.0])]
)
def test_trials_get_the_best_so_far(higher, best):
    rows = [(1, "complete", 30.0), (0, "pruned", 90.0), (3, "failed", None), (2, "complete", 20.0), (4, "complete", 40)]
    trials = [{"number": n, "state": state, "value": value, "strategy": {}} for n, state, value in rows]
    search = {"name": "s", "role": "protected", "sampler": "tpe", "steps": 9, "trials": trials, "best": 4}
    found = trials_table([search], higher_is_better=higher)
    assert list(found["trial"]) == [0, 1, 2, 3, 4]
    assert list(found["won"]) == [False, False, False, False, True]
    pd.testing.assert_series_equal(found["best"], pd.Series(best, name="best"))
    assert trials_table([], higher_is_better=higher).empty
