"""Printed results: names as they are, numbers that JSON can hold, tables of predictions."""

import csv
import io
import json
import math
import re

import pytest

from smallfry.cli._completion import commands, script, values_of
from smallfry.cli._extras import install_for
from smallfry.cli._shared import json_line
from smallfry.cli.evaluate import print_per_class
from smallfry.cli.predict import table_of
from smallfry.io.console import CleanConsole
from smallfry.io.csv_text import csv_text
from smallfry_runtime.predictions import Answer

NAMES = ["[bold]b[/bold]", "[/]", ":cat:", "日本", "<i>", "$x$", "a b", "[link=x]"]


def row(f1, images=3):
    return {"precision": 0.5, "recall": 0.25, "f1": f1, "images": images}


def lines(text):
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]


def test_names_of_classes_are_printed_as_they_are_the_worst_first(capsys):
    print_per_class({name: row(1 - i / 10) for i, name in enumerate(NAMES)})
    head, *rows = lines(capsys.readouterr().out)
    assert head == ["class", "precision", "recall", "f1", "images"]
    assert [each[0] for each in rows] == NAMES[::-1]
    assert rows[-1][1:] == ["50.00%", "25.00%", "100.00%", "3"]


def test_names_can_not_control_the_terminal(capsys):
    print_per_class({"a\x1b[31mb": row(0.5), "c\u202ed": row(0.6)})
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert r"a\x1b[31mb" in text
    assert r"c\u202ed" in text


def test_a_console_has_no_pictures_for_words(capsys):
    CleanConsole(highlight=False).print(":smile: is a class")
    assert capsys.readouterr().out == ":smile: is a class\n"
    CleanConsole(emoji=True).print(":smile:")
    assert ":smile:" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"loss": math.nan, "f1": 0.5}, '{"loss": null, "f1": 0.5}'),
        ({"a": [math.inf, -math.inf, 1]}, '{"a": [null, null, 1]}'),
        ({"a": (1, None, True)}, '{"a": [1, null, true]}'),
        ({1: "é"}, '{"1": "\\u00e9"}'),
        ({"a\n": "\ud800"}, '{"a\\n": "\\ud800"}'),
        ([], "[]"),
    ],
)
def test_a_result_is_strict_json_on_a_line(value, text):
    assert json_line(value) == text
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


# Tables of predictions


def read_back(answers):
    return [*csv.DictReader(io.StringIO(csv_text(table_of(answers)), newline=""))]


def test_every_class_has_a_column_though_an_image_lacks_it():
    answers = [
        Answer("a.png", [("<b>", 0.75), ("=c", 0.25)]),
        Answer("b\r.png", [("d", 1.0)]),
        Answer("broken.png", [], error="broken"),
    ]
    first, second, third = read_back(answers)
    assert first == {
        **{"image": "a.png", "class": "<b>", "probability": "0.75"},
        **{"p(<b>)": "0.75", "p(=c)": "0.25", "p(d)": ""},
    }
    assert (second["image"], second["class"], second["p(d)"]) == ("b\r.png", "d", "1.0")
    assert {*third.values()} == {"broken.png", ""}


def test_no_answers_are_a_head_alone():
    assert csv_text(table_of([])) == "image,class,probability\n"


# Completion


def test_no_line_of_a_script_breaks_its_quotes():
    for line in script("fish").splitlines():
        plain = line.replace("\\\\", "").replace("\\'", "")
        assert plain.count("'") % 2 == 0
    for line in script("bash").splitlines():
        assert line.count('"') % 2 == 0


def test_options_have_no_duplicates_and_flags_have_no_values():
    for words, options in commands().items():
        names = [option.name for option in options]
        assert len({*names}) == len(names), words
        assert all(not option.values for option in options if option.is_flag)
        assert "--help" in names


@pytest.mark.parametrize(
    ("kind", "values"),
    [(bool | None, ("true", "false")), (bool | str, ()), (int, ()), (dict[str, int], ())],
)
def test_values_are_offered_where_all_are_known(kind, values):
    assert values_of(kind) == values


# Packages


@pytest.mark.parametrize(
    ("module", "wanted"),
    [
        ("sklearn", "scikit-learn"),
        ("Some_Pkg", "'smallfry[small]'"),
        ("some.pkg", "'smallfry[small]'"),
        ("yaml", "'smallfry[all]'"),
        ("nothing", None),
        ("", None),
    ],
)
def test_the_smallest_extra_has_the_package_in_any_spelling(module, wanted):
    requirements = [
        *("scikit-learn>=1", "a; extra == 'big'", "some-pkg>1; extra == 'big'"),
        *("b; extra == 'big'", 'some_pkg ; extra == "small"', "PyYAML; extra == 'all'"),
        "some-pkg; extra == 'all'",
    ]
    assert install_for(module, requirements) == wanted
