"""Sparse confusions and scores: equal to dense ones, and small where classes are many."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.classification import (
    multiclass_confusion_matrix,
    multiclass_f1_score,
)

from smallfry.report.classification import confusion_matrix
from smallfry.report.confusion import count_confusions, macro_f1

pairs = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=60)


@given(pairs)
def test_the_f1_score_is_that_of_torchmetrics_to_the_bit(found):
    predicted, labels = (torch.tensor(column) for column in zip(*found, strict=True))
    wanted = multiclass_f1_score(predicted, labels, 7, average="macro").item()
    assert macro_f1(predicted, labels, 7) == wanted


def test_the_f1_score_of_no_images_is_zero():
    nothing = torch.empty(0, dtype=torch.int64)
    assert macro_f1(nothing, nothing, 5) == 0.0


@given(pairs, st.permutations(range(7)), st.integers(0, 7))
def test_confusions_are_those_of_the_whole_matrix(found, order, most):
    predicted, labels = (torch.tensor(column) for column in zip(*found, strict=True))
    matrix = multiclass_confusion_matrix(predicted, labels, 7)
    counted = count_confusions(predicted, labels, 7)
    assert len(counted.counts) <= len(found)
    assert counted.mistakes.tolist() == (matrix.sum(1) - matrix.diag()).tolist()
    chosen = torch.tensor(order[:most], dtype=torch.int64)
    dense = counted.dense(chosen)
    assert torch.equal(dense[:, :-1], matrix[chosen][:, chosen])
    assert torch.equal(dense.sum(1), matrix[chosen].sum(1))  # the rest is the last column


def test_the_worst_classes_have_the_most_mistakes_and_equal_ones_their_order():
    labels = torch.tensor([0, 1, 1, 2, 2, 3, 4])
    predicted = torch.tensor([0, 0, 0, 0, 2, 1, 1])
    counted = count_confusions(predicted, labels, 6)
    assert counted.mistakes.tolist() == [0, 2, 1, 1, 1, 0]
    assert counted.worst(3).tolist() == [1, 2, 3]
    assert len(counted.worst(99)) == 6


@pytest.mark.parametrize("classes", [100, 101])
def test_of_more_than_100_classes_the_30_worst_are_drawn(classes, tmp_path, monkeypatch):
    from smallfry.report import classification

    drawn = []
    monkeypatch.setattr(classification, "save", lambda figure, file: drawn.append(figure))
    labels = torch.arange(classes).repeat_interleave(2)
    logits = torch.nn.functional.one_hot(labels, classes).float()
    logits[100:110] = logits[:1]  # images of classes 50 to 54 are taken for class 0
    confusion_matrix(logits, labels, [f"n{i}" for i in range(classes)], tmp_path / "x.png")
    (axes,) = drawn[0].axes
    shown = axes.images[0].get_array()
    title = axes.get_title()
    assert f"{1 - 10 / len(labels):.2%} of {len(labels)} test images are right" in title
    if classes == 100:
        assert shown.shape == (100, 100)
        assert shown[50, 0] == 1
        return
    assert "the 30 of 101 classes with the most mistakes" in title
    assert shown.shape == (30, 31)
    assert [text.get_text() for text in axes.get_yticklabels()][:6] == [
        *("n50", "n51", "n52", "n53", "n54", "n0")
    ]
    assert axes.get_xticklabels()[-1].get_text() == "all others"
    assert shown[:5, 5].tolist() == [1] * 5
    assert shown[:5, -1].tolist() == [0] * 5


MEASURE = """
import sys, torch
from pathlib import Path
from smallfry.report.classification import confusion_matrix
from smallfry.training.evaluation import Predictions, score
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
few = Predictions(torch.randn(9, 5), torch.arange(9) % 5, None)
score(few)
confusion_matrix(few.logits, few.labels, list("abcde"), Path(sys.argv[1]))
logits, labels = torch.randn(1000, 10_000), torch.randint(10_000, (1000,))
before = peak()
score(Predictions(logits, labels, None))
scored = peak()
confusion_matrix(logits, labels, [f"class {i}" for i in range(10_000)], Path(sys.argv[1]))
print(scored - before, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_ten_thousand_classes_take_little_memory(tmp_path):
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "x.png")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    scored, drawn = (int(number) / 1024 for number in done.stdout.split())
    assert scored < 200  # with the whole matrix it is 769, and the picture 5,200
    assert drawn < 300
