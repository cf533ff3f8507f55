import re
import xml.etree.ElementTree as ET

from sophon.auditing.table import tabulate, trials_table
from sophon.report.drawing import standalone
from sophon.report.figures import band, curve_panels, dot_plot, search_panels
from tests.auditing.records import ACCURACY, MSE, attempt
from tests.report.reports import SEARCHES, small


def test_band_is_the_mean_and_the_span_of_the_seeds():
    found = band(tabulate([attempt("a", "protected", end, seed=seed) for seed, end in enumerate((20, 22, 24))]).curves)
    assert found.index.tolist() == [0, 100]
    assert found["mean"].tolist() == [10, 22]
    assert [found["low"].tolist(), found["high"].tolist()] == [[10, 20], [10, 24]]
    assert band(tabulate([attempt("a", "protected", 20) | {"curve": []}]).curves).empty


def test_panels_share_their_axis_and_leave_out_the_empty():
    attempts = tabulate(
        [
            attempt("low", "protected", 12),
            attempt("high", "scratch", 90),
            attempt("none", "protected", 1) | {"curve": []},
            attempt("low", "unprotected", 90, domain="benign"),
            attempt("low", "scratch", 50, finished=False),
        ]
    )
    panels = curve_panels(attempts, ["high", "low", "none"], ACCURACY)
    assert list(panels) == ["high", "low"]
    ticks = [re.findall(r">(\d+)</text>", svg) for svg in panels.values()]
    assert ticks[0] == ticks[1]
    assert ">scratch</text>" in panels["high"]
    assert re.findall(r">(protected|unprotected|scratch)</text>", panels["low"]) == ["protected"]
    assert curve_panels(attempts, [], ACCURACY) == {}
    alone = ET.fromstring(standalone(panels["high"]))
    assert [alone.tag.rpartition("}")[2], alone[0].tag.rpartition("}")[2]] == ["svg", "style"]
    assert set(re.findall(r"var\((--\w+)\)", standalone(panels["high"]))) <= set(re.findall(r"--\w+", alone[0].text))


def test_dot_plot_names_groups_and_attacks():
    drawn = dot_plot(small().results.attacks, ACCURACY)
    for label in ("seen", "another length", "held out", "momentum", "patient"):
        assert f">{label}</text>" in drawn


def panels(*trials, metric=ACCURACY):
    found = [{"number": n, "state": state, "value": value, "strategy": {}} for n, (value, state) in enumerate(trials)]
    search = SEARCHES[0] | {"trials": found}
    return search_panels(trials_table([search], higher_is_better=metric.higher_is_better), metric)


def test_searches_show_the_best_so_far_and_mark_pruned_trials():
    shown, marked = (
        panels((41.0, "complete"), (12.0, state), (None, "failed"), (58.5, "complete"))["found"]
        for state in ("complete", "pruned")
    )
    assert ">protected</text>" in shown
    assert ">trials</text>" in shown
    assert shown != marked
    assert panels((None, "failed")) == panels() == {}
    # none is complete: there is no line to label
    assert ">protected</text>" not in panels((1.0, "pruned"), metric=MSE)["found"]
