"""Questions by name, subjects from run folders, and folders of answers read back."""

import csv
import json
import shutil

import pytest
import torch
from flat_subject import split_of, subject_of, trained_of
from html_view import View
from markupsafe import Markup
from PIL import Image

import smallfry
from smallfry.analysis import page as pages
from smallfry.analysis.page import ask_all, write_answers
from smallfry.analysis.question import (
    Answer,
    Picture,
    Table,
    find_questions,
    question_names,
    register_question,
)
from smallfry.analysis.subject import load_subject
from smallfry.data import load_data
from smallfry.errors import RunError, UsageError
from smallfry.report.figure import encode, new_figure

FACTS = {"model": "runs/<a>", "seed": 3}


def answer(**changes):
    told = {
        "title": "Measures <of> things",
        "findings": ["Three & four.", "x < y"],
        "numbers": {"share": 0.5, "none": float("nan"), "deep": {"list": (1, float("inf"))}},
    }
    return Answer(**{**told, **changes})


def written(folder, **answers):
    page = write_answers(folder, "Title <1>", answers, FACTS)
    assert page == folder / "index.html"
    return View(page.read_text())


# Folders


def test_numbers_are_strict_json_and_the_page_escapes_text(tmp_path):
    view = written(tmp_path / "a", things=answer(), other="Not applicable: too <small>.")
    content = json.loads((tmp_path / "a" / "things.json").read_text(), parse_constant=pytest.fail)
    assert content == {
        "findings": ["Three & four.", "x < y"],
        "numbers": {"share": 0.5, "none": None, "deep": {"list": [1, None]}},
    }
    manifest = json.loads((tmp_path / "a" / "analysis.json").read_text())
    assert manifest == {
        "facts": FACTS,
        "not_applicable": {"other": "Not applicable: too <small>."},
    }
    for text in ("Measures <of> things", "Three & four.", "x < y", "Not applicable: too <small>."):
        assert text in view.texts
    assert [each["id"] for each in view.of("h2") if "id" in each][:2] == ["1", "2"]
    assert not view.of("of")
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == [
        *("analysis.json", "index.html", "things.json")
    ]


def test_pictures_and_tables_stand_on_the_page(tmp_path):
    figure = new_figure(2, 2)
    figure.subplots().plot([1, 2])
    pictures = [Picture("A <curve>", encode(figure)), Picture("Drawn", Markup("<svg><g/></svg>"))]
    tables = [Table("Rows", ["name", "share"], [["a <b>", 0.123456], ["c", float("nan")]])]
    view = written(tmp_path / "a", things=answer(pictures=pictures, tables=tables))
    (image,) = view.of("img")
    assert image["src"].startswith("data:image/png;base64,iVBOR")
    assert len(view.of("svg")) == 1
    for text in ("A <curve>", "Drawn", "Rows", "a <b>", "0.123", "–"):
        assert text in view.texts


def test_samples_come_back_from_their_file(tmp_path):
    rows = [["a,b", 'says "x"', 1.5], ["two\nlines", "", -2], ["ü → ∞", "=1+1", None]]
    samples = {"images": Table("Images", ["name", "text", "value"], rows)}
    written(tmp_path / "a", things=answer(samples=samples))
    with (tmp_path / "a" / "images.csv").open(newline="", encoding="utf-8") as file:
        head, *found = csv.reader(file)
    assert head == ["name", "text", "value"]
    rows[2][1] = "'=1+1"  # which no spreadsheet runs
    assert found == [["" if cell is None else str(cell) for cell in row] for row in rows]


def test_an_analysis_replaces_an_earlier_one_whole(tmp_path):
    folder = tmp_path / "a"
    samples = {"images": Table("Images", ["x"], [[1]])}
    written(folder, things=answer(samples=samples))
    written(folder, others=answer())
    names = {file.name for file in folder.iterdir()}
    assert names == {"analysis.json", "index.html", "others.json"}


@pytest.mark.parametrize("name", ["notes.txt", "pictures"])
def test_what_would_be_lost_is_named_and_stays(tmp_path, name):
    folder = tmp_path / "a"
    written(folder, things=answer())
    (folder / name).mkdir() if "." not in name else (folder / name).write_text("mine")
    before = (folder / "things.json").read_text()
    with pytest.raises(RunError, match=rf"holds {name} too.*use another: --to DIR"):
        written(folder, things=answer(findings=["new"]))
    assert (folder / "things.json").read_text() == before
    assert (folder / name).exists()


def test_folders_and_files_of_something_else_are_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="exists and is not a folder; use another"):
        written(tmp_path / "file", things=answer())
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "page.html").touch()
    with pytest.raises(RunError, match="exists and is not an analysis; use another"):
        written(tmp_path / "b", things=answer())
    (tmp_path / "empty").mkdir()
    written(tmp_path / "empty", things=answer())


def test_what_can_not_be_written_leaves_the_earlier_analysis(tmp_path, monkeypatch):
    written(tmp_path / "a", things=answer())

    def full(file, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pages, "write", full)
    with pytest.raises(RunError, match=r"could not be written \(.*No space left"):
        written(tmp_path / "a", others=answer())
    assert (tmp_path / "a" / "things.json").exists()
    assert [place.name for place in tmp_path.iterdir()] == ["a"]


# Questions


@pytest.fixture
def subject():
    split = split_of(torch.zeros(4, 4, dtype=torch.uint8), torch.arange(4))
    return subject_of(split, split, trained_of(torch.eye(4)))


def asked(monkeypatch, **questions):
    monkeypatch.setattr("smallfry.analysis.question._QUESTIONS", questions)
    find = {name: questions[name] for name in sorted(questions)}
    monkeypatch.setattr("smallfry.analysis.question.scan", lambda package: None)
    return find


def test_questions_are_asked_in_order_and_obstacles_are_answers(monkeypatch, subject):
    def refuse(subject):
        raise RunError("no weights")

    asked(monkeypatch, b=lambda s: answer(title=s.name), a=refuse)
    heard = []
    found = ask_all(subject, progress=heard.append)
    assert heard == list(found) == ["a", "b"]
    assert found["a"] == "Not applicable: no weights."
    assert found["b"].title == "flat"
    assert list(ask_all(subject, "b")) == ["b"]
    with pytest.raises(RunError, match="no weights"):
        ask_all(subject, "a")


def test_a_fault_of_a_question_is_no_obstacle(monkeypatch, subject):
    asked(monkeypatch, a=lambda s: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ask_all(subject)


def test_questions_are_found_by_name_and_known_ones_are_proposed():
    names = question_names()
    assert names == sorted(names)
    assert list(find_questions()) == names
    assert list(find_questions("limits")) == ["limits"]
    for name, near in (("al", "all"), ("leakag", "leakage")):
        with pytest.raises(UsageError, match=f"unknown question '{name}'; did you mean '{near}'"):
            find_questions(name)
    same = find_questions("limits")["limits"]
    assert register_question(same) is same


# Subjects


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of one model, and one that takes larger images."""
    folder = tmp_path_factory.mktemp("runs")
    common = {"epochs": 1, "references": False, "progress": "quiet", "threads": 1}
    model = {"name": "plain_mlp", "options": {"embed_dim": 8, "depth": 2}}
    data = {"name": "digits", "limit": 100}
    smallfry.train(model=model, data=data, run=folder / "a", **common)
    shutil.copytree(folder / "a", folder / "b")
    smallfry.train(model=model, data={**data, "image_size": 12}, run=folder / "large", **common)
    return folder


def test_images_are_a_seeded_draw_in_the_order_of_the_data(runs):
    found = [load_subject(str(runs / "a"), images=40, seed=seed).subject for seed in (1, 1, 2)]
    first, again, other = (each.test for each in found)
    assert len(first) == 40
    assert torch.equal(first.rows, again.rows)
    assert not torch.equal(first.rows, other.rows)
    rows = first.rows.tolist()
    assert rows == sorted(set(rows))
    assert len(found[0].training) == 40
    every = load_subject(str(runs / "a"), images=10**6).subject
    assert len(every.test) == len(load_data("digits").test)
    assert set(rows) <= set(every.test.rows.tolist())


def test_facts_say_what_was_analysed(runs):
    subject, facts = load_subject(f"{runs}/a/", [str(runs / "b")], images=30, seed=5)
    assert (subject.name, subject.seed, list(subject.others)) == ("a", 5, ["b"])
    assert facts["model"] == f"{runs}/a/"
    assert facts["against"] == [str(runs / "b")]
    assert facts["data"] == "digits (real)"
    assert facts["images"] == "30 of training, 30 of the test split"
    other = load_subject(str(runs / "b")).facts
    assert other["weights"] == facts["weights"]
    assert other["against"] == "nothing"
    assert len(facts["weights"].removeprefix("SHA-256 ")) == 64


def test_versions_need_names_of_their_own_and_the_same_images(runs):
    a, b, large = (str(runs / name) for name in ("a", "b", "large"))
    for against in ([a], [b, b], [b, f"{b}/"]):
        with pytest.raises(UsageError, match="against: models need folders of different names"):
            load_subject(a, against)
    with pytest.raises(UsageError, match="against: large takes other images or classes than"):
        load_subject(a, [large])


def test_other_data_has_images_apart_for_training_and_testing(runs, tmp_path):
    digits = load_data("digits").train
    for number in range(60):
        label = digits.labels[number].item()
        for folder in ("plain", f"parted/{'train' if number < 40 else 'val'}"):
            place = tmp_path / folder / str(label) / f"{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            pixels = digits.images[number, 0].numpy().copy()
            pixels[0, 0] = 100 + number
            Image.fromarray(pixels).save(place)
    for folder, sizes, words in (("plain", 60, "the other half"), ("parted", 60, "validation")):
        subject, facts = load_subject(str(runs / "a"), data=str(tmp_path / folder))
        parts = [{i.numpy().tobytes() for i in s.images} for s in (subject.training, subject.test)]
        assert len(parts[0] | parts[1]) == len(parts[0]) + len(parts[1]) == sizes
        assert words in facts["images"]
    assert len(subject.training) == 40
