import io
import json
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from smallfry.deploy import benchmark_page
from smallfry.deploy.benchmark import Benchmark, BenchmarkConfig, Figures
from smallfry.deploy.benchmark_page import PAGE, new_report, print_tables, summary_of
from smallfry.deploy.contestants import Skipped
from smallfry.deploy.latency import Latency
from smallfry.deploy.memory import Memory
from smallfry.errors import RunError
from smallfry.report.labels import Box, place_labels

NASTY = "<b>$x$[red]</b>"


def figures(model, form, milliseconds, accuracy=None, memory=None):
    taken = Latency(10, milliseconds, milliseconds, milliseconds, milliseconds, 2 * milliseconds)
    latency = {1: taken, 4: taken}
    trained = accuracy is not None
    return Figures(model, form, trained, 1000, 5_000_000, latency, memory, accuracy, accuracy)


@pytest.fixture
def found():
    memory = Memory(60_000_000, {1: 70_000_000, 4: 80_000_000})
    return Benchmark(
        NASTY,
        [
            figures(NASTY, "PyTorch eager", 8.0, 0.9),
            figures(NASTY, "ONNX int8", 2.0, 0.9, memory),
            figures("peer", "ONNX float32", 3.0),
        ],
        [Skipped(NASTY, "PyTorch compiled", "no <compiler>")],
        "359 test images of <digits>",
        BenchmarkConfig(batch_sizes=(1, 4)),
        {"command": "smallfry benchmark <run>", "commit": None, "versions": {"torch": "2"}},
    )


def write_report(found, folder):
    with new_report(folder) as new:
        benchmark_page.write_report(found, new)
    return folder / PAGE


def test_the_report_is_whole_and_shows_names_as_text(found, tmp_path):
    page = write_report(found, tmp_path / "report")
    names = sorted(file.name for file in page.parent.iterdir())
    assert names == ["latency.png", "report.html", "summary.json"]
    assert [file.name for file in tmp_path.iterdir()] == ["report"]
    html = page.read_text()
    assert "<b>" not in html
    assert html.count("&lt;b&gt;$x$[red]&lt;/b&gt;") > 4
    assert "no &lt;compiler&gt;" in html
    assert "untrained: latency only" in html
    assert np.asarray(Image.open(page.parent / "latency.png").convert("L")).std() > 5


def test_the_summary_has_all_figures(found, tmp_path):
    write_report(found, tmp_path / "report")
    told = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert [row["form"] for row in told["measured"]] == [f.form for f in found.figures]
    assert told["measured"][1]["memory"]["peaks"] == {"1": 70_000_000, "4": 80_000_000}
    assert told["settings"]["batch_sizes"] == [1, 4]
    assert told["measured"][2]["accuracy"] is None


def test_the_table_sets_all_against_eager_pytorch(found):
    head, rows = benchmark_page.cells(found)
    shown = [dict(zip(head, row, strict=True)) for row in rows]
    assert [row["× eager"] for row in shown] == ["1.00", "4.00", "–"]
    assert [row["images/s (4)"] for row in shown] == ["500", "2,000", "1,333"]
    assert [row["memory, MB"] for row in shown] == ["–", "70", "–"]
    assert [row["accuracy"] for row in shown] == ["90.00%", "90.00%", "–"]


def test_printed_tables_show_names_as_they_are(found):
    stream = io.StringIO()
    print_tables(found, Console(file=stream, width=80))
    assert f"{NASTY} (1,000 parameters)" in stream.getvalue()
    assert "Left out: <b>$x$[red]</b>, PyTorch compiled: no <compiler>" in stream.getvalue()
    assert "359 test images" in stream.getvalue()


def test_a_report_replaces_a_report_and_nothing_else(found, tmp_path):
    write_report(found, tmp_path / "report")
    (tmp_path / "report" / "latency.png").write_bytes(b"old")
    write_report(found, tmp_path / "report")
    assert (tmp_path / "report" / "latency.png").stat().st_size > 1000
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "summary.json").write_text("[]")
    with pytest.raises(RunError, match="not a benchmark; use another"):
        write_report(found, tmp_path / "mine")
    assert (tmp_path / "mine" / "summary.json").read_text() == "[]"


def test_a_report_that_fails_leaves_the_old_one(found, tmp_path, monkeypatch):
    write_report(found, tmp_path / "report")
    before = (tmp_path / "report" / "summary.json").read_bytes()

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(benchmark_page, "page", full)
    with pytest.raises(RunError, match="no space left"):
        write_report(found._replace(name="other"), tmp_path / "report")
    assert (tmp_path / "report" / "summary.json").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["report"]


@pytest.mark.parametrize("kept", [[], [0], [2], [0, 1, 2]])
def test_whatever_was_measured_is_drawn(found, tmp_path, kept):
    some = found._replace(figures=[found.figures[i] for i in kept])
    benchmark_page.draw(some, tmp_path / "picture.png")
    assert Image.open(tmp_path / "picture.png").size[0] > 1000
    assert summary_of(some)["measured"] == [found.figures[i]._asdict() for i in kept]


sides = st.floats(0, 1000)


@given(st.lists(st.tuples(sides, sides, st.floats(20, 300)), max_size=12))
def test_labels_cover_neither_each_other_nor_a_point(places):
    frame = Box(0, 0, 1000, 1000)
    points = [Box(x - 4, y - 4, x + 4, y + 4) for x, y, _ in places]
    placed = place_labels([(width, 12) for *_, width in places], points, frame)
    labels = [box for box in placed if box is not None]
    assert len(placed) == len(places)
    for one, other in combinations(labels, 2):
        assert not one.overlaps(other)
    for label in labels:
        assert label.inside(frame)
        assert not any(label.overlaps(point) for point in points)


def test_labels_of_points_on_one_spot_all_find_a_place():
    points = [Box(496, 496, 504, 504)] * 8
    placed = place_labels([(200, 12)] * 8, points, Box(0, 0, 1000, 1000))
    assert None not in placed
    assert placed[0].left > 504  # the first stands beside its point
