"""What a field may be is said at the field, and checked wherever it stands."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sophon.errors import UserError
from sophon.ranges import check, check_value, expand_paths, limited


@dataclass
class Inner:
    rate: float = limited(0.5, gt=0, le=1)

    def validate(self, key: str) -> None:
        if self.rate == 0.25:
            raise UserError(f"{key}.rate: 0.25 is not allowed here")


@dataclass
class Outer:
    count: int = limited(1, ge=1)
    most: int | None = limited(None, ge=0, lt=10)
    word: str = limited("a", choices=("a", "b"))
    words: list[str] = limited(["a"], choices=("a", "b"))
    rates: list[float] = limited([], gt=0)
    ranges: dict[str, list[float] | None] = field(default_factory=dict)
    place: str | None = limited(None, path=True)
    places: list[str] = limited([], path=True)
    free: Any = None
    inner: Inner = field(default_factory=Inner)
    named: dict[str, Inner] = field(default_factory=dict)
    alone: dict[str, Inner] = field(default_factory=dict, metadata={"alone": True})


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"count": 7, "most": 0, "word": "b", "words": [], "rates": [1, 0.1], "free": math.nan},
        {"most": 9, "words": ["b", "a"], "ranges": {"a": [0, 1], "b": None}, "place": "x", "places": ["~", "y"]},
        {"inner": Inner(1), "named": {"x": Inner(1e-9)}, "alone": {}},
    ],
)
def test_what_is_allowed(values: dict[str, Any]) -> None:
    check(Outer(**values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "count: 0 is not allowed; give a whole number >= 1"),
        ({"count": 1.5}, "count: 1.5 is not allowed; give a whole number >= 1"),
        ({"count": True}, "count: True is not allowed; give a whole number >= 1"),
        ({"count": None}, "count: None is not allowed; give a whole number >= 1"),
        ({"most": 10}, "most: 10 is not allowed; give a whole number >= 0 and < 10 or null"),
        ({"word": "c"}, "word: 'c' is not known; allowed: a, b"),
        ({"words": ["a", "c"]}, "words[1]: 'c' is not known; allowed: a, b"),
        ({"rates": [1, 0]}, "rates[1]: 0 is not allowed; give a finite number > 0"),
        ({"rates": [math.nan]}, "rates[0]: nan is not allowed; give a finite number > 0"),
        ({"place": ""}, "place: '' is not allowed; give a path, or leave the key out"),
        ({"places": ["a", ""]}, "places[1]: '' is not allowed; give a path, or leave the key out"),
        ({"inner": Inner(0)}, "inner.rate: 0 is not allowed; give a finite number > 0 and <= 1"),
        ({"inner": Inner(0.25)}, "inner.rate: 0.25 is not allowed here"),
        ({"named": {"x": Inner(2)}}, "named.x.rate: 2 is not allowed; give a finite number > 0 and <= 1"),
        ({"alone": {"x": Inner(2)}}, "alone.rate: 2 is not allowed; give a finite number > 0 and <= 1"),
        ({"alone": {"x": Inner(), "y": Inner(2)}}, "alone.y.rate: 2 is not allowed; give a finite number > 0 and <= 1"),
    ],
)
def test_what_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        check(Outer(**values))
    assert str(caught.value) == message


@given(st.floats() | st.integers() | st.booleans() | st.none() | st.text())
def test_a_number_is_allowed_just_inside_its_limits(value: Any) -> None:
    [rate] = fields(Inner)
    inside = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1
    try:
        check_value("rate", value, rate)
    except UserError:
        assert not inside
    else:
        assert inside


def test_a_home_folder_is_put_in_the_place_of_its_sign(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = Outer(place="~/x", places=["~", "a~", "./~", "no/../such"], word="~")
    expand_paths(config)
    assert config.place == str(tmp_path / "x")
    assert config.places == [str(tmp_path), "a~", "./~", "no/../such"]
    assert config.word == "~"
