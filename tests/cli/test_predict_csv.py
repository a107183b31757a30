"""Predictions as CSV."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from image_files import write_images

from smallfry.cli import main
from smallfry.cli.predict import table_of
from smallfry_runtime.predictions import Answer

FIXTURES = Path(__file__).parents[1] / "fixtures" / "format_2"


@pytest.fixture
def run(tmp_path):
    return shutil.copytree(FIXTURES / "run", tmp_path / "source")


@pytest.fixture
def photos(tmp_path):
    write_images(tmp_path / "photos", 3)
    (tmp_path / "photos" / "001.png").rename(tmp_path / "photos" / "=1+1.png")
    (tmp_path / "photos" / "broken.png").write_bytes(b"x")
    return tmp_path / "photos"


def test_the_file_has_a_row_for_each_image_and_all_probabilities(run, photos, tmp_path, capsys):
    names = sorted(entry.name for entry in photos.iterdir())
    inputs = [str(photos)]
    assert main(["predict", str(run), *inputs, "--json", "--top_k", "99"]) == 1
    wanted = {each["image"]: each for each in map(json.loads, capsys.readouterr().out.splitlines())}
    file = tmp_path / "new" / "out.csv"
    assert main(["predict", str(run), *inputs, "--csv", str(file)]) == 1
    found = capsys.readouterr()
    assert found.out == f"predictions: {file}\n"
    assert "broken.png" in found.err
    rows = list(csv.DictReader(file.open()))
    assert [Path(row["image"]).name for row in rows] == names
    for row in rows:
        shares = {name[2:-1]: value for name, value in row.items() if name.startswith("p(")}
        assert len(shares) == 10
        if row["image"].endswith("broken.png"):
            assert {*shares.values(), row["class"], row["probability"]} == {""}
            continue
        answer = wanted[row["image"]]
        assert row["class"] == answer["class"]
        for each in answer["top"]:
            assert float(shares[each["class"]]) == pytest.approx(each["probability"], abs=1e-6)
        assert sum(map(float, shares.values())) == pytest.approx(1, abs=1e-5)
        assert float(row["probability"]) == max(map(float, shares.values()))
        assert 0 <= float(row["halting"]) <= 1


def test_names_are_no_formulas(run, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(photos)
    assert main(["predict", str(run), "=1+1.png", "--csv", str(tmp_path / "o.csv")]) == 0
    (row,) = csv.DictReader((tmp_path / "o.csv").open())
    assert row["image"] == "'=1+1.png"


def test_columns_are_those_that_the_model_has():
    plain = Answer("a", [("x", 0.75), ("b", 0.25)])
    assert list(table_of([plain])) == [
        ["image", "class", "probability", "p(b)", "p(x)"],
        ["a", "x", 0.75, 0.25, 0.75],
    ]
    early = Answer("a", [("x", 1.0)], 0.5, 3)
    failed = Answer("z", [], error="unreadable")
    assert list(table_of([early, failed])) == [
        ["image", "class", "probability", "halting", "steps", "p(x)"],
        ["a", "x", 1.0, 0.5, 3, 1.0],
        ["z", "", "", None, None, ""],
    ]
    assert list(table_of([])) == [["image", "class", "probability"]]


def test_a_file_that_can_not_be_written_is_named(run, photos, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    place = str(tmp_path / "file" / "o.csv")
    assert main(["predict", str(run), str(photos / "000.png"), "--csv", place]) == 1
    assert f"{place}: can't be written" in capsys.readouterr().err
