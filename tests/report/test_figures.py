import re

import numpy as np
import pytest

from sophon.audit.metrics import summarise
from sophon.report.figures import band, curve_panels, dot_plots
from sophon.report.trends import course_panels, decay_plot, search_panels
from tests.report.reports import ACCURACY, CONTEXT, MSE, attempt, audit


def test_band_is_the_mean_and_its_interval():
    steps, mean, half = band([attempt("a", "protected", end, points=2) for end in (20, 22, 24)])
    assert steps.tolist() == [0, 10]
    assert mean.tolist() == [10, 22]
    assert half.tolist() == pytest.approx([0, 4.3027 * 2 / np.sqrt(3)])
    assert np.isnan(band([attempt("a", "protected", 20)])[2]).all()
    assert all(len(part) == 0 for part in band([]))


def test_panels_share_their_axis_and_leave_out_the_empty():
    attempts = [
        attempt("low", "protected", 12),
        attempt("high", "scratch", 90),
        attempt("none", "protected", 1, points=0),
    ]
    panels = curve_panels(attempts, ["high", "low", "none"], ACCURACY)
    assert list(panels) == ["high", "low"]
    ticks = [re.findall(r">(\d+)</text>", svg) for svg in panels.values()]
    assert ticks[0] == ticks[1]
    assert ">scratch</text>" in panels["high"]
    assert ">protected</text>" not in panels["high"]
    assert curve_panels([], [], ACCURACY) == {}


def test_dot_plot_names_groups_and_attacks():
    (svg,) = dot_plots(summarise(audit(), CONTEXT)["attacks"], ACCURACY)
    for label in ("seen", "longer", "held out", "momentum", "patient"):
        assert f">{label}</text>" in svg


def test_curves_are_of_the_restricted_domain():
    other = attempt("low", "protected", 90) | {"domain": "benign"}
    assert curve_panels([other], ["low"], ACCURACY) == {}
    mine = attempt("low", "protected", 12)
    assert curve_panels([mine, other], ["low"], ACCURACY) == curve_panels([mine], ["low"], ACCURACY)


def test_many_results_are_drawn_on_sheets_with_the_same_axes():
    attempts = [attempt(f"a{n}", "protected", n, exposure="held_out") for n in range(60)]
    sheets = dot_plots(summarise(attempts, CONTEXT)["attacks"], ACCURACY)
    assert len(sheets) == 2
    assert sum(len(re.findall(r">a\d+</text>", svg)) for svg in sheets) == 60
    ticks = [re.findall(r">(\d+)</text>", svg) for svg in sheets]
    assert ticks[0] == ticks[1]
    assert [svg.count(">held out</text>") for svg in sheets] == [1, 0]
    assert dot_plots([], ACCURACY) == []


def search(values, best):
    trials = [{"number": n, "state": state, "value": value} for n, (value, state) in enumerate(values)]
    return {"name": "found", "roles": {"protected": {"trials": trials, "best_so_far": best}}}


def test_searches_show_the_best_so_far_and_mark_pruned_trials():
    complete = [(41.0, "complete"), (12.0, "complete"), (None, "failed"), (58.5, "complete")]
    pruned = [(41.0, "complete"), (12.0, "pruned"), (None, "failed"), (58.5, "complete")]
    best = [41.0, 41.0, 41.0, 58.5]
    shown, marked = (search_panels([search(values, best)], ACCURACY)["found"] for values in (complete, pruned))
    assert ">protected</text>" in shown
    assert ">trials</text>" in shown
    assert shown != marked
    assert 'role="img"' in shown


def test_searches_without_a_value_are_left_out():
    assert search_panels([search([(None, "failed")], [None])], ACCURACY) == {}
    assert search_panels([], ACCURACY) == {}
    # none is complete: there is no line to label
    assert ">protected</text>" not in search_panels([search([(1.0, "pruned")], [None])], MSE)["found"]


def course(*values):
    return [{"step": 25 * (n + 1), "sgrc": value} for n, value in enumerate(values)]


def test_courses_name_the_attack_that_ends_lowest():
    attacks = [{"attack": "a", "horizons": course(50.0, 40.0)}, {"attack": "b", "horizons": course(60.0, 5.0)}]
    without = [{"attack": "c"}, {"attack": "d", "horizons": course(None, None)}]
    panels = course_panels({"seen": attacks + without, "longer": without})
    assert list(panels) == ["seen; strong line: b"]
    assert course_panels({"seen": without}) == {}


def test_decay_names_each_line_by_what_its_attacks_share():
    groups = [
        {"attacks": ["adam_fresh", "adam_fresh_4000"], "steps": [200, 4000], "sgrc": [50.0, 10.0]},
        {"attacks": ["x", "y"], "steps": [200, 1000], "sgrc": [30.0, None]},
        {"attacks": ["p", "q"], "steps": [200, 1000], "sgrc": [None, None]},
    ]
    svg = decay_plot(groups)
    for label in ("adam_fresh", "x", "200", "4000"):
        assert f">{label}</text>" in svg
    assert ">p</text>" not in svg
    assert decay_plot(groups[2:]) is None
    assert decay_plot([]) is None
