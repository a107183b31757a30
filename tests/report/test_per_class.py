"""Scores of classes, reliability, tables and the page of mistakes."""

import csv
import io

import numpy as np
import pytest
import torch
from html_view import View
from PIL import Image
from sklearn.metrics import classification_report
from torchmetrics.functional.classification import multiclass_calibration_error

from smallfry.io.csv_text import csv_text, harmless
from smallfry.report import mistakes_page as page
from smallfry.report.per_class import (
    class_scores,
    confusion_csv,
    reliability,
    reliability_diagram,
    scores_csv,
    scores_dict,
)

NAMES = ["ant", "=bee", "<b>cat</b>", "never"]


@pytest.fixture
def answers():
    """Logits of 200 images of three classes of four, mostly right."""
    torch.manual_seed(0)
    labels = torch.randint(3, (200,))
    outputs = torch.randn(200, 4) + 2 * torch.nn.functional.one_hot(labels, 4)
    return outputs, labels


def test_scores_are_those_of_scikit_learn(answers):
    outputs, labels = answers
    wanted = classification_report(
        *(labels.numpy(), outputs.argmax(1).numpy()),
        labels=range(4),
        target_names=NAMES,
        output_dict=True,
        zero_division=0.0,
    )
    found = class_scores(outputs, labels, NAMES)
    assert [each.name for each in found] == NAMES
    for each in found:
        theirs = wanted[each.name]
        assert each.precision == pytest.approx(theirs["precision"])
        assert each.recall == pytest.approx(theirs["recall"])
        assert each.f1 == pytest.approx(theirs["f1-score"])
        assert each.images == theirs["support"]
    assert found[3].images == 0
    assert scores_dict(found)["ant"].keys() == {"precision", "recall", "f1", "images"}


@pytest.mark.parametrize("bins", [5, 15])
def test_reliability_agrees_with_torchmetrics_and_with_counting(answers, bins):
    outputs, labels = answers
    found = reliability(outputs, labels, bins)
    probabilities = outputs.softmax(1)
    wanted = multiclass_calibration_error(probabilities, labels, 4, n_bins=bins).item()
    assert found.error == pytest.approx(wanted, abs=1e-6)
    confidence, predicted = probabilities.max(1)
    for i in range(bins):
        inside = (confidence >= i / bins) & (confidence < (i + 1) / bins)
        assert found.counts[i] == inside.sum()
        if inside.any():
            assert found.accuracy[i] == pytest.approx((predicted == labels)[inside].double().mean())
    certain = reliability(torch.tensor([[50.0, 0.0]]), torch.tensor([0]))
    assert certain.counts[-1] == 1
    assert certain.error == 0
    assert reliability(outputs[:0], labels[:0]).error == 0


def test_the_diagram_is_drawn_with_few_and_many_images(answers, tmp_path):
    outputs, labels = answers
    for count in (1, 200):
        reliability_diagram(outputs[:count], labels[:count], tmp_path / f"{count}.png")
        assert np.asarray(Image.open(tmp_path / f"{count}.png")).std() > 5


def test_no_text_of_a_table_is_a_formula():
    for text in ("=1+1", "+1", "-1", "@SUM(A1)", "\tx", "\r=1", "\n=1", "＝1"):
        assert harmless(text) == f"'{text}"
    for cell in ("cat", "a=b", " =1", -1, -0.5, None, ""):
        assert harmless(cell) == cell
    rows = [["=a", 'b"c,d'], [-1.25, "é"]]
    assert csv_text(rows) == '\'=a,"b""c,d"\n-1.25,é\n'


def test_tables_hold_every_class_and_pair(answers, monkeypatch):
    outputs, labels = answers
    scores = list(
        csv.DictReader(io.StringIO(scores_csv(scores_dict(class_scores(outputs, labels, NAMES)))))
    )
    assert [row["class"] for row in scores] == ["ant", "'=bee", "<b>cat</b>", "never"]
    assert int(scores[0]["images"]) == (labels == 0).sum()
    rows = list(csv.reader(io.StringIO(confusion_csv(outputs, labels, NAMES))))
    assert rows[0] == ["true \\ predicted", "ant", "'=bee", "<b>cat</b>", "never"]
    matrix = torch.tensor([[int(cell) for cell in row[1:]] for row in rows[1:]])
    predicted = outputs.argmax(1)
    for true in range(4):
        for said in range(4):
            assert matrix[true, said] == ((labels == true) & (predicted == said)).sum()
    monkeypatch.setattr("smallfry.report.per_class.MOST_COLUMNS", 3)
    pairs = list(csv.DictReader(io.StringIO(confusion_csv(outputs, labels, NAMES))))
    assert pairs[0].keys() == {"true", "predicted", "images"}
    assert sum(int(row["images"]) for row in pairs) == 200
    assert len(pairs) == (matrix > 0).sum()


def test_mistakes_are_grouped_by_pair_the_surest_first():
    outputs = torch.tensor([[9.0, 0, 0], [1, 0, 0], [5, 0, 0], [0, 0, 7], [0, 8, 0]])
    labels = torch.tensor([1, 1, 1, 0, 1])
    first, second = page.class_pairs(outputs, labels)
    assert (first.true, first.predicted) == (1, 0)
    assert [each.position for each in first.mistakes] == [0, 2, 1]
    assert first.mistakes[1].confidence == pytest.approx(outputs[2].softmax(0)[0].item())
    assert (second.true, second.predicted, len(second.mistakes)) == (0, 2, 1)
    assert page.class_pairs(outputs[4:], labels[4:]) == []


def built(answers, tmp_path, side=8):
    outputs, labels = answers
    images = torch.randint(0, 256, (200, 3, side, side), dtype=torch.uint8)
    Image.new("L", (4, 4)).save(tmp_path / "reliability.png")
    return View(
        page.mistakes_page(
            "1 < 2",
            {"accuracy": 0.5},
            scores_dict(class_scores(outputs, labels, NAMES)),
            page.name_pairs(page.class_pairs(outputs, labels), NAMES),
            lambda chosen: images[chosen],
            lambda i: f"<img src=x>/{i}.png",
            tmp_path,
            {"model": "<i>run</i>"},
        )
    )


def test_the_page_shows_each_mistake_with_its_place_and_escapes_names(answers, tmp_path):
    view = built(answers, tmp_path)
    outputs, labels = answers
    wrong = (outputs.argmax(1) != labels).nonzero()[:, 0].tolist()
    thumbnails = [each for each in view.of("img") if "taken for" in each["alt"]]
    assert len(thumbnails) == len(wrong)
    assert len(view.of("img")) == len(wrong) + 1  # reliability; the other plot is missing
    text = " ".join(view.texts)
    assert all(f"<img src=x>/{i}.png" in text for i in wrong)
    assert "<i>run</i>" in text
    assert "<b>cat</b>, taken for" in text
    assert not view.of("script")
    assert not view.of("b") + view.of("i")


def test_a_page_of_many_mistakes_is_short_and_says_so(answers, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "MOST_GROUPS", 2)
    monkeypatch.setattr(page, "MOST_SHOWN", 1)
    monkeypatch.setattr(page, "SIDE", 16)
    outputs, labels = answers
    pairs = page.class_pairs(outputs, labels)
    view = built(answers, tmp_path, side=40)
    shown = [each for each in view.of("img") if "taken for" in each["alt"]]
    assert len(shown) == 2
    left = sum(len(pair.mistakes) for pair in pairs[2:])
    assert f"{len(pairs) - 2} smaller groups with {left} mistakes are left out" in " ".join(
        view.texts
    )
    assert len(shown[0]["src"]) < 4 * 16 * 16 * 3  # shrunk
