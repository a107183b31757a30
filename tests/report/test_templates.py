"""Pages are made of templates that escape all text and lack nothing."""

import re
from pathlib import Path

import pytest
from html_view import View
from jinja2 import UndefinedError
from markupsafe import Markup
from PIL import Image

import smallfry
from smallfry.report.page import TEMPLATES, image, png_url, render
from smallfry.report.race_tables import spread
from smallfry.report.races import Spread
from smallfry.report.runs import strong
from smallfry.report.runs_page import Section, write_page
from smallfry.report.table import table

HOSTILE = "<script>alert(\"1\", '2')</script> & co"
PACKAGE = Path(smallfry.__file__).parent
FILES = sorted(PACKAGE.rglob("templates/*.html"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parts[-3]}/{file.name}")
def test_every_template_escapes_and_can_be_loaded(file):
    name = file.relative_to(PACKAGE).as_posix()
    assert TEMPLATES.autoescape is True
    assert TEMPLATES.get_template(name).filename == str(file)
    assert not re.search(r"\|\s*safe|autoescape", file.read_text())


def test_a_template_that_lacks_a_variable_fails():
    with pytest.raises(UndefinedError, match="'alt' is undefined"):
        render("report/templates/image.html", url="x")


def test_a_template_of_another_package_extends_the_page():
    given = {"notes": [HOSTILE], "picture": "", "figures": "", "batches": "", "provenance": None}
    page = View(render("deploy/templates/benchmark.html", title=HOSTILE, **given))
    assert page.texts.count(HOSTILE) == 3  # title, heading, note
    assert "Unknown." in page.texts
    assert page.of("meta")[1]["content"].startswith("default-src 'none'; img-src data:;")
    assert not page.of("script")


def test_a_picture_is_in_the_page_with_its_description(tmp_path):
    Image.new("L", (2, 2)).save(tmp_path / "x.png")
    [picture] = View(image(tmp_path / "x.png", HOSTILE)).of("img")
    assert picture == {"alt": HOSTILE, "src": png_url((tmp_path / "x.png").read_bytes())}


def test_a_table_has_its_groups_words_and_marks():
    given = table(
        ["", HOSTILE], [[HOSTILE, None], [1, Markup("<b>2</b>")]], (0,), [(HOSTILE, 2)], [1]
    )
    shown = View(given)
    assert [text for text in shown.texts if text] == [HOSTILE, HOSTILE, HOSTILE, "None", "1", "2"]
    assert shown.of("th") == [{"class": "group", "colspan": "2"}, {"class": "text"}, {}]
    assert shown.of("td") == [{"class": "text"}, {}] * 2
    assert shown.of("tr") == [{}, {}, {}, {"class": "chosen"}]
    assert shown.of("b") == [{}]
    assert View(table(["a"], [])).of("tr") == [{}]


def test_only_what_is_markup_is_not_escaped():
    assert strong("<i>") == "<b>&lt;i&gt;</b>"
    assert strong(Markup("<i>")) == "<b><i></b>"
    assert strong(spread(Spread(2.0, 1.0, 3.0))) == (
        "<b>2.000 <span class=range>(1.000 .. 3.000)</span></b>"
    )


def test_text_in_a_section_is_a_paragraph_and_markup_stays():
    section = Section("s", ["a < b", Markup("<h3>c</h3>")], None)
    page, _ = write_page("t", "about", [section], [], 3)
    assert re.search(r"<h2>s</h2>\s*<p>a &lt; b</p>\s*<h3>c</h3>\s*<h2>Every run", page)
    assert "0 of 3 runs have ended, 0 of them failed." in page
    assert "Failed runs" not in page
