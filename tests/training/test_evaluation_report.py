"""Reports of runs and evaluations, as the command writes them."""

import csv
import json

import pytest
import torch
from html_view import View
from image_files import write_images
from sklearn.metrics import top_k_accuracy_score

from smallfry.cli import main
from smallfry.cli.train import _print_worst
from smallfry.data import load_data
from smallfry.tasks.classification import Classification
from smallfry.training.config import DataConfig
from smallfry.training.train import train

FILES = {
    *("classes.csv", "confusion_matrix.csv", "report.html"),
    *("confusion_matrix.png", "mistakes.png", "reliability.png"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("reported") / "photos"
    for seed, name in enumerate(("=ant", "bee", "cat")):
        write_images(place / name, 20, mode="L", seed=seed)
    return place


@pytest.fixture
def run(variant, folder):
    config = variant(data=DataConfig(str(folder)), epochs=1, batch_size=16)
    train(config)
    return config.run


def test_a_run_ends_with_scores_of_classes_and_its_mistakes(run, folder, capsys):
    summary = json.loads((run / "summary.json").read_text())
    per_class = summary["per_class"]
    assert list(per_class) == ["=ant", "bee", "cat"]
    assert sum(each["images"] for each in per_class.values()) == summary["data"]["test"]
    macro = sum(each["f1"] for each in per_class.values()) / 3
    assert macro == pytest.approx(summary["measured"]["test"]["macro_f1"], abs=1e-6)
    rows = list(csv.DictReader((run / "classes.csv").open()))
    assert [row["class"] for row in rows] == ["'=ant", "bee", "cat"]
    for row in rows:
        assert float(row["f1"]) == per_class[row["class"].lstrip("'")]["f1"]
    view = View((run / "report.html").read_text())
    accuracy = summary["measured"]["test"]["accuracy"]
    shown = [each for each in view.of("img") if "taken for" in each["alt"]]
    assert len(shown) == round((1 - accuracy) * summary["data"]["test"])
    places = [text for text in view.texts if str(folder) in text]
    assert len(places) == len(shown)
    matrix = [row[1:] for row in csv.reader((run / "confusion_matrix.csv").open())][1:]
    right = sum(int(matrix[i][i]) for i in range(3))
    assert right == round(accuracy * summary["data"]["test"])
    assert main(["train", "--resume", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "report.html" in printed
    assert "precision" in printed


def test_evaluation_reports_on_any_data(run, tmp_path, capsys):
    for seed, name in enumerate(("bee", "cat")):
        write_images(tmp_path / "other" / name, 5, mode="L", seed=9 + seed)
    report = tmp_path / "report"
    asked = ["evaluate", str(run), "--data", str(tmp_path / "other"), "--per_class"]
    assert main([*asked, "--report", str(report), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["split"] == "all"
    assert {name: each["images"] for name, each in found["per_class"].items()} == {
        **{"=ant": 0, "bee": 5, "cat": 5}
    }
    assert found["report"] == str(report / "report.html")
    assert {entry.name for entry in report.iterdir()} == FILES
    view = View((report / "report.html").read_text())
    assert sum("confusion matrix" in each["alt"] for each in view.of("img")) == 1
    places = [text for text in view.texts if str(tmp_path / "other") in text]
    assert len(places) == 1 + round(10 * (1 - found["accuracy"]))
    assert main([*asked, "--report", str(report)]) == 0  # an earlier one is replaced
    printed = capsys.readouterr().out
    assert "precision" in printed
    assert str(report) in printed.replace("\n", "")


def test_a_report_replaces_nothing_else(run, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    for place in (tmp_path / "mine", run):
        before = sorted(entry.name for entry in place.iterdir())
        assert main(["evaluate", str(run), "--report", str(place)]) == 1
        assert "use another: --report DIR" in capsys.readouterr().err
        assert sorted(entry.name for entry in place.iterdir()) == before


def test_the_label_is_among_the_five_most_probable():
    torch.manual_seed(0)
    outputs, labels = torch.randn(60, 8), torch.randint(8, (60,))
    found = Classification().metrics(outputs, labels)["top_5_accuracy"]
    wanted = top_k_accuracy_score(labels.numpy(), outputs.numpy(), k=5, labels=range(8))
    assert found == pytest.approx(wanted)
    assert "top_5_accuracy" not in Classification().metrics(outputs[:, :5], labels % 5)


def test_images_are_located_in_every_split(folder, tmp_path):
    data = load_data(str(folder))
    for name, part in {
        "train": data.train,
        "validation": data.validation,
        "test": data.test,
    }.items():
        for i in (0, len(part) - 1):
            assert data.classes[part.labels[i]] in data.locate(name, i)
    assert data.locate("all", 0) == data.locate("train", 0)
    for split, seed in (("train", 1), ("test", 2)):
        for name in ("a", "b"):
            write_images(tmp_path / "d" / split / name, 4, seed=seed + ord(name))
    parted = load_data(str(tmp_path / "d"))
    assert "test/b/003.png" in parted.locate("test", 7)
    assert load_data("digits").locate("test", 0).startswith("digits")


@pytest.mark.parametrize("classes", [2, 7])
def test_the_worst_classes_of_a_run_are_printed(classes, capsys):
    scores = {f"c{i}": {"precision": 0.5, "recall": 0.5, "f1": i / 10} for i in range(classes)}
    _print_worst(scores)
    printed = capsys.readouterr().out
    if classes == 2:
        assert printed == ""
        return
    assert "the 5 worst of 7 classes:" in printed
    assert [word for word in printed.split() if word[:1] == "c" and word[1:].isdigit()] == [
        f"c{i}" for i in range(5)
    ]
    _print_worst(dict(list(scores.items())[:4]))
    assert "worst" not in capsys.readouterr().out


def test_models_of_other_tasks_have_no_report(tmp_path, capsys):
    options = ["--model.options", "{embed_dim: 16, mlp_hidden_dim: 16, token_hidden_dim: 16}"]
    data = ["--data", "sudoku4", "--data.options", "{puzzles: 30, extra_clues: 4}"]
    asked = ["train", "--task", "puzzle", *data, *options, "--epochs", "1", "--batch_size", "8"]
    run = tmp_path / "run"
    assert main([*asked, "--progress", "quiet", "--run", str(run)]) == 0
    assert not (run / "report.html").exists()
    assert "per_class" not in json.loads((run / "summary.json").read_text())
    for option in (["--per_class"], ["--report", str(tmp_path / "report")]):
        assert main(["evaluate", str(run), *option]) == 2
        assert (
            "the model was trained for puzzle, and its answers are not classes"
            in capsys.readouterr().err
        )
    assert not (tmp_path / "report").exists()
    assert main(["predict", str(run), "x.txt", "--csv", str(tmp_path / "o.csv")]) == 2
    assert "csv is for classifiers" in capsys.readouterr().err
