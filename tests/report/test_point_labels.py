"""Labels lie beside their points, on nothing else, and inside the frame."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from smallfry.report.labels import Box, draw_labels, place_labels

FRAME = Box(0, 0, 400, 300)


def marker(x, y, radius=3.0):
    return Box(x - radius, y - radius, x + radius, y + radius)


def overlap(one, other):
    """Area that two boxes share."""
    width = min(one.right, other.right) - max(one.left, other.left)
    height = min(one.top, other.top) - max(one.bottom, other.bottom)
    return max(0.0, width) * max(0.0, height)


@pytest.mark.parametrize(
    ("other", "shared"),
    [
        (Box(5, 5, 15, 15), True),
        (Box(2, 2, 3, 3), True),
        (Box(-5, -5, 50, 50), True),
        (Box(10, 0, 20, 10), False),  # an edge is none
        (Box(0, 10, 10, 20), False),
        (Box(10, 10, 20, 20), False),
        (Box(11, 0, 20, 10), False),
    ],
)
def test_boxes_that_share_an_edge_do_not_overlap(other, shared):
    box = Box(0, 0, 10, 10)
    assert box.overlaps(other) is shared
    assert other.overlaps(box) is shared
    assert (overlap(box, other) > 0) is shared


def test_a_box_is_inside_itself_and_not_inside_a_part_of_it():
    box = Box(0, 0, 10, 10)
    assert box.inside(box)
    assert Box(1, 1, 9, 9).inside(box)
    for part in (Box(1, 0, 10, 10), Box(0, 1, 10, 10), Box(0, 0, 9, 10), Box(0, 0, 10, 9)):
        assert not box.inside(part)


def test_a_lone_label_is_at_the_right_of_its_point():
    point = marker(200, 150)
    (box,) = place_labels([(40, 10)], [point], FRAME)
    assert box.left == point.right + 1
    assert (box.bottom + box.top) / 2 == pytest.approx(150)
    assert (box.right - box.left, box.top - box.bottom) == (40, 10)


def test_at_the_right_edge_a_label_is_at_the_left():
    point = marker(390, 150)
    (box,) = place_labels([(40, 10)], [point], FRAME)
    assert box.right == point.left - 1


def test_in_a_narrow_frame_a_label_is_above_or_below():
    frame = Box(0, 0, 50, 300)
    (above,) = place_labels([(45, 10)], [marker(25, 150)], frame)
    assert above.bottom == 154
    (below,) = place_labels([(45, 10)], [marker(25, 290)], frame)
    assert below.top == 286


def test_a_label_larger_than_the_frame_is_left_out_and_the_next_is_placed():
    boxes = place_labels([(500, 10), (40, 10)], [marker(100, 100), marker(200, 200)], FRAME)
    assert boxes[0] is None
    assert boxes[1] is not None


def test_labels_of_one_place_stand_around_it():
    points = [marker(200, 150)] * 6
    boxes = place_labels([(40, 10)] * 6, points, FRAME)
    assert None not in boxes
    assert len(set(boxes)) == 6


POINTS = st.lists(
    st.tuples(st.floats(5, 395), st.floats(5, 295), st.floats(5, 80), st.floats(5, 20)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(POINTS)
def test_no_label_covers_a_marker_or_another_label(drawn):
    points = [marker(x, y) for x, y, _, _ in drawn]
    sizes = [(width, height) for _, _, width, height in drawn]
    boxes = place_labels(sizes, points, FRAME)
    assert len(boxes) == len(points)
    placed = [box for box in boxes if box is not None]
    for number, box in enumerate(placed):
        assert box.inside(FRAME)
        assert not any(overlap(box, point) > 1e-9 for point in points)
        assert not any(overlap(box, other) > 1e-9 for other in placed[:number])
    for box, size in zip(boxes, sizes, strict=True):
        if box is not None:
            assert math.isclose(box.right - box.left, size[0], abs_tol=1e-9)


def axes_of(labels, at, radii=None, log=False):
    figure = Figure(figsize=(4, 3), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_xlim((1, 1000) if log else (0, 10))
    axes.set_ylim(0, 10)
    if log:
        axes.set_xscale("log")
    draw_labels(axes, labels, at, radii or [4.0] * len(labels))
    return axes


def test_a_label_is_written_within_the_axes():
    axes = axes_of(["here"], [(5, 5)])
    (text,) = axes.texts
    window = axes.get_window_extent()
    extent = text.get_window_extent()
    assert text.get_text() == "here"
    assert window.x0 <= extent.x0
    assert extent.x1 <= window.x1
    x, y = axes.transData.transform((5, 5))
    assert extent.x0 > x
    assert extent.y0 < y < extent.y1
    assert not axes.lines  # it is near enough


def test_labels_on_logarithmic_axes_are_beside_their_points():
    axes = axes_of(["a", "b"], [(10, 5), (100, 5)], log=True)
    for text, place in zip(axes.texts, [(10, 5), (100, 5)], strict=True):
        x, _ = axes.transData.transform(place)
        assert 0 < text.get_window_extent().x0 - x < 20


def test_a_crowd_has_lines_to_the_distant_ones():
    axes = axes_of([f"label {i}" for i in range(14)], [(5, 5)] * 14)
    assert len(axes.texts) == 14
    assert axes.lines
    assert len(axes.lines) < 14


def test_a_label_without_room_is_not_drawn():
    axes = axes_of(["a label that is much too long for a picture of this size " * 3, "b"],
                   [(5, 5), (2, 2)])  # fmt: skip
    assert [text.get_text() for text in axes.texts] == ["b"]
