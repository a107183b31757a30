"""Picture of a fit: the front of the exports, and a file whatever was tried."""

import pytest
from PIL import Image

from smallfry.report.fit import Mark, draw_fit, pareto

MARKS = [
    Mark("trial", 80.0, 30.0, 1.0),
    Mark("small", 85.0, 10.0, 3.0, exported=True),
    Mark("equal", 85.0, 12.0, 1.0, exported=True),
    Mark("$best$", 92.0, 40.0, 2.0, exported=True, chosen=True),
    Mark("worse", 90.0, 50.0, 2.5, exported=True),
]


def test_the_front_has_what_no_cheaper_one_equals():
    assert [mark.name for mark in pareto(MARKS[1:], "kb")] == ["small", "$best$"]
    assert [mark.name for mark in pareto(MARKS[1:], "ms")] == ["equal", "$best$"]
    assert pareto([], "kb") == []


@pytest.mark.parametrize("marks", [MARKS, MARKS[:1], []])
@pytest.mark.parametrize("limits", [{"kb": 20.0, "ms": None}, {"kb": None, "ms": 2.0}])
def test_the_picture_is_drawn_of_any_marks_and_limits(marks, limits, tmp_path):
    draw_fit(marks, limits, tmp_path / "fit.png")
    with Image.open(tmp_path / "fit.png") as image:
        assert image.width > image.height > 300
