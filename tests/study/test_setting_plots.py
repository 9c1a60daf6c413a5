"""Where a value lies on its axis in the picture of the best setting."""

from __future__ import annotations

import pytest

import search_spaces
from search_spaces.axes import Options, Range
from study.setting_plots import _ends, _place


@pytest.mark.parametrize(
    ("axis", "value", "place"),
    [
        (Range(0.0, 2.0, ""), 0.5, 0.25),
        (Range(0.01, 1.0, "", log=True), 0.1, 0.5),
        (Range(0.0, 1.0, ""), 7.0, 1.04),  # a recipe outside of what was searched stays in the picture
        (Range(0.01, 1.0, "", log=True), 0.0, -0.04),
        (Options((4, 8, 16), ""), 8, 0.5),
        (Options(("a", "b"), ""), "b", 1.0),
    ],
)
def test_a_value_lies_between_the_ends_of_its_axis(
    axis: Range | Options, value: str | float, place: float
) -> None:
    assert _place(axis, value) == pytest.approx(place)


@pytest.mark.parametrize("system", search_spaces.SYSTEMS)
def test_every_published_value_has_a_place(system: str) -> None:
    space = search_spaces.load(system)
    for params in space.RECIPES.values():
        for name, value in params.items():
            if name in space.AXES:
                assert -0.04 <= _place(space.AXES[name], value) <= 1.04
                assert _ends(space.AXES[name])[0][0] == 0
