"""Pages read back: names with markup, pictures as they were given, places of drawn points."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from html_view import View
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import Markup
from PIL import Image

from smallfry.report import mistakes_page as mistakes
from smallfry.report.analysis_page import Section, analysis_page
from smallfry.report.page import words, write
from smallfry.report.pairs import HEIGHT, MARGIN, WIDTH, Pair, draw_pairs
from smallfry.report.runs import Outcome
from smallfry.report.runs_page import Section as RunsSection
from smallfry.report.runs_page import save_page, write_page
from smallfry.report.table import NONE, table

HOSTILE = "</title><script>alert(\"1\", '2')</script> & <b>x"
OTHERS = ["日本語", "עברית", "a\u202eb", "$x$", "{{ 1 }}", "{% if %}", "\ud800", "&lt;", "'\"`"]
VOID = {"meta", "img", "br", "link"}


class Balanced(HTMLParser):
    """Tags that are open at the end of a page, which is checked for pairs."""

    def __init__(self, html):
        super().__init__()
        self.open = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def cells(html):
    """Texts of the rows of all tables."""
    found = []
    for part in re.findall(r"<tr.*?</tr>", html, re.DOTALL):
        found.append([View(c).texts for c in re.findall(r"<t[dh][^>]*>.*?</t[dh]>", part, re.S)])
    return [[" ".join(texts) for texts in line] for line in found]


def pixels_of(url):
    assert url.startswith("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


# Tables


@settings(max_examples=30)
@given(st.lists(st.lists(st.text(max_size=6), min_size=2, max_size=2), max_size=4))
def test_any_text_comes_back_from_a_table(rows):
    html = str(table(["a", "b"], rows))
    [head, *lines] = cells(html)
    assert head == ["a", "b"]
    assert lines == [[" ".join(cell.split()) for cell in row] for row in normal(rows)]
    assert Balanced(html).open == []


def normal(rows):
    """Texts as a reader of HTML has them: without NUL and lone returns."""
    return [[View(f"<p>{Markup.escape(c)}</p>").texts[0] if c else "" for c in r] for r in rows]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({"a": 1, "b": [2]}, "a 1, b [2]"),
        (["x", 2], "x 2"),
        ((), ""),
        (None, "None"),
        ("<b>", "<b>"),
        ({}, ""),
        (0.5, "0.5"),
    ],
)
def test_values_of_provenance_are_on_one_line(value, shown):
    assert words(value) == shown


@pytest.mark.parametrize("name", OTHERS)
def test_a_page_is_written_as_utf_8_with_any_name(name, tmp_path):
    write(tmp_path / "page.html", f"<p>{name}</p>")
    text = (tmp_path / "page.html").read_bytes().decode()
    assert text == f"<p>{name}</p>".replace("\ud800", "?")


# Pages of analyses


def test_an_analysis_has_its_findings_pictures_and_tables():
    png = io.BytesIO()
    Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4)).save(png, "PNG")
    drawing = draw_pairs([Pair((0, 0), (1, 1), HOSTILE, True)], HOSTILE, "y")
    sections = [
        Section(
            *(HOSTILE, ["one < two", HOSTILE], [(HOSTILE, png.getvalue()), ("drawn", drawing)]),
            [("numbers", ["name", "n", HOSTILE], [[HOSTILE, 12345, 0.12345], ["b", None, 2.0]])],
        ),
        Section("none", obstacle=HOSTILE),
    ]
    html = analysis_page(HOSTILE, sections, {"model": HOSTILE, "sizes": [1, 2]})
    view, shown = View(html), " ".join(HOSTILE.split())
    assert not view.of("script") + view.of("b")
    assert Balanced(html).open == []
    # in the title and heading, 2 links and headings, a finding, a picture's title, a pair's text,
    # an axis, a head, a cell, an obstacle and provenance
    assert view.texts.count(shown) == 2 + 2 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1
    [image] = view.of("img")
    assert image["alt"] == HOSTILE
    assert (pixels_of(image["src"]).ravel() == range(12)).all()
    assert cells(html)[1:3] == [[shown, "12,345", "0.123"], ["b", NONE, "2.00"]]
    assert cells(html)[-1] == ["sizes", "1 2"]
    assert [each["id"] for each in view.of("h2") if "id" in each] == ["1", "2"]
    links = [each["href"] for each in view.of("a")]
    assert links == ["#provenance", "#1", "#2"]
    assert {link[1:] for link in links} <= {a["id"] for _, a in view.tags if "id" in a}
    texts = [each.get("class") for each in view.of("td")]
    assert texts[:6] == ["text", None, None] * 2  # words to the left, numbers to the right


def test_an_analysis_of_nothing_is_a_page():
    html = analysis_page("empty", [], {})
    assert Balanced(html).open == []
    assert View(html).texts.count("empty") == 2


# Drawings of pairs


POINT = st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))


@settings(max_examples=40)
@given(st.lists(st.tuples(POINT, POINT, st.booleans()), min_size=1, max_size=5))
def test_pairs_are_drawn_in_place_within_the_margins(points):
    pairs = [Pair(a, b, f"pair {i}", c) for i, (a, b, c) in enumerate(points)]
    html = str(draw_pairs(pairs, "x", "y"))
    view = View(html)
    places = [(float(c["cx"]), float(c["cy"])) for c in view.of("circle")]
    order = sorted(pairs, key=lambda pair: pair.changed)
    assert [g["class"] == "pair changed" for g in view.of("g")] == [p.changed for p in order]
    drawn = [point for pair in order for point in (pair.before, pair.after)]
    for (across, down), (x, y) in zip(places, drawn, strict=True):
        assert MARGIN <= across <= WIDTH - MARGIN
        assert MARGIN <= down <= HEIGHT - MARGIN
        for (other_across, other_down), (other_x, other_y) in zip(places, drawn, strict=True):
            assert (x < other_x) <= (across <= other_across)
            assert (y < other_y) <= (down >= other_down)
    lines = [each for each in view.of("line") if "stroke" not in each]
    for line, before, after in zip(lines, places[::2], places[1::2], strict=True):
        ends = (float(line["x1"]), float(line["y1"])), (float(line["x2"]), float(line["y2"]))
        assert ends == (before, after)


def test_ticks_are_at_their_values():
    html = str(draw_pairs([Pair((0, -1), (10, 3), "p", False)], "x", "y"))
    circles = [(float(c["cx"]), float(c["cy"])) for c in View(html).of("circle")]
    (left, low), (right, high) = circles
    found = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">(-?[\d.]+)<', html)
    assert len(found) > 6
    for x, y, anchor, value in found:
        if anchor == "middle":
            assert float(x) == pytest.approx(left + (right - left) * float(value) / 10, abs=0.11)
        else:
            share = (float(value) + 1) / 4
            assert float(y) == pytest.approx(low + (high - low) * share, abs=0.11)
    values = [float(value) for *_, anchor, value in found if anchor == "middle"]
    assert values == [0, 2, 4, 6, 8, 10]


# Pages of mistakes


def page_of(images, groups, tmp_path, **more):
    given = {
        **{"title": HOSTILE, "scores": {"macro_f1": 0.5}, "per_class": {}, "facts": {}},
        **{"take": lambda rows: images[rows], "place": lambda i: f"{HOSTILE}/{i}.png: "},
    }
    return str(mistakes.mistakes_page(groups=groups, pictures=tmp_path, **given | more))


@pytest.mark.parametrize(
    ("shape", "shown"),
    [
        ((1, 8, 8), (8, 8)),
        ((3, 8, 8), (8, 8, 3)),
        ((3, 96, 10), (96, 10, 3)),
        ((3, 200, 100), (96, 48, 3)),
        ((1, 1, 500), (1, 96)),
        ((1, 500, 2), (96, 1)),
    ],
)
def test_mistakes_are_shown_as_pictures_of_bounded_size(shape, shown, tmp_path):
    images = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
    group = mistakes.Group(HOSTILE, "<i>", (mistakes.Mistake(2, 0.876), mistakes.Mistake(0, 0.5)))
    view = View(page_of(images, [group], tmp_path))
    first, second = view.of("img")
    assert first["alt"] == HOSTILE
    assert pixels_of(first["src"]).shape == pixels_of(second["src"]).shape == shown
    if shown[:2] == shape[1:]:
        wanted = images[2].permute(1, 2, 0).squeeze(2) if shape[0] == 1 else images[2].permute(
            1, 2, 0)  # fmt: skip
        assert np.array_equal(pixels_of(first["src"]), wanted.numpy())
    name = " ".join(HOSTILE.split())
    assert "88% <i>" in view.texts
    assert f"{name}/2.png" in view.texts  # without the colon of messages
    assert f"{name}: 2" in view.texts
    assert not view.of("i") + view.of("script")


def test_classes_are_in_a_table_the_worst_first(tmp_path):
    scores = {
        name: {"images": i, "average_precision": 0.5, "f1": f1}
        for i, (name, f1) in enumerate([("b", 0.25), (HOSTILE, 1.0), ("a", 0.25)])
    }
    html = page_of(torch.zeros(0, 1, 2, 2), [], tmp_path, per_class=scores, unit="class")
    lines = cells(html)
    assert lines[:2] == [["score", "value"], ["macro f1", "0.5000"]]
    assert lines[2] == ["class", "images", "average precision", "F1"]
    assert [line[0] for line in lines[3:6]] == ["a", "b", " ".join(HOSTILE.split())]
    assert lines[3] == ["a", "2", "50.0%", "25.0%"]
    texts = " ".join(View(html).texts)
    assert "Mistakes by class" in texts
    assert "0 mistakes in 0 groups" in texts
    assert "left out" not in texts
    assert "Unknown." not in texts
    assert Balanced(html).open == []


def test_the_surest_of_a_group_are_shown_and_all_are_counted(tmp_path):
    images = torch.zeros(40, 1, 2, 2, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(40)
    group = mistakes.Group("g", "g", tuple(mistakes.Mistake(39 - i, 0.9) for i in range(30)))
    html = page_of(images, [group] * 70, tmp_path)
    view = View(html)
    assert len(view.of("img")) == mistakes.MOST_GROUPS * mistakes.MOST_SHOWN
    numbers = [pixels_of(each["src"])[0, 0] for each in view.of("img")[:12]]
    assert numbers == [*range(39, 27, -1)]
    texts = " ".join(view.texts)
    assert "2,100 mistakes in 70 groups" in texts
    assert "10 smaller groups with 300 mistakes are left out" in texts
    assert "g: 30" in view.texts


# Pages of studies


def outcome(name, failure=None):
    measured = {"test": {"accuracy": 0.5}, "epochs": 1, "best_epoch": 1, "select_on": "validation",
                "seed": 0, "training_seconds": 6.0, "parameters": 1000, "macs": 2e6}  # fmt: skip
    summary = {"measured": measured, "data": {"name": name, "fingerprint": "f", "test": 2000}}
    history = [{"validation_accuracy": float("nan")}]
    return Outcome(name, {"seed": 0}, None if failure else summary, history, failure)


def test_a_study_names_its_failures_and_writes_strict_numbers(tmp_path):
    outcomes = [outcome(HOSTILE), outcome("x", HOSTILE)]
    section = RunsSection(HOSTILE, [HOSTILE, Markup("<p>kept</p>")], {"a": float("inf")}, 1)
    html, summary = write_page(HOSTILE, HOSTILE, [section], outcomes, 3)
    file = save_page(tmp_path, html, summary)
    view = View(file.read_text())
    assert Balanced(file.read_text()).open == []
    assert not view.of("script") + view.of("b")
    texts = " ".join(view.texts)
    assert "2 of 3 runs have ended, 1 of them failed." in texts
    assert "One of 2,000 test images is 0.05 points." in texts
    assert "kept" in view.texts
    shown = " ".join(HOSTILE.split())
    assert ["x", shown] in cells(html)  # what it said
    runs = {line[0]: line[1:] for line in cells(html) if len(line) == 12}
    assert runs[shown][:3] == ["50.00", NONE, "validation"]
    assert runs["x"][0] == "failed"
    text = (tmp_path / "summary.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text


def test_a_study_of_no_runs_is_a_page():
    html, summary = write_page("t", "about", [], [], 5)
    assert "nothing has ended yet" in " ".join(View(html).texts)
    assert "Failed runs" not in html
    assert summary["runs"] == []
    assert Balanced(html).open == []
