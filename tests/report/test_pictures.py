"""What the pictures show is computed right; that they are drawn is seen by opening them."""

import numpy as np
import pytest
import torch
from PIL import Image

from smallfry.report.classification import confusion_matrix, mistakes, surest_mistakes
from smallfry.report.curves import learning_curves
from smallfry.report.recursion import MOST_LINES, interesting, recursion_trace


def trace(steps, images, classes):
    """Random probabilities as a trace has them."""
    return torch.randn(steps, images, classes).softmax(2), torch.rand(steps, images)


def drawn(file):
    pixels = np.asarray(Image.open(file).convert("RGB"))
    assert pixels.std() > 5
    return pixels.shape


def test_the_images_traced_are_unsure_ones_with_mistakes_among_them():
    logits = torch.tensor([[9.0, 0], [0.2, 0], [0, 3.0], [0.1, 0], [0, 0.4], [5.0, 0]])
    labels = torch.tensor([0, 0, 0, 1, 1, 0])
    chosen = interesting(logits, labels, most=4)
    assert chosen.tolist() == [3, 2, 1, 4]
    assert interesting(logits, logits.argmax(1), most=3).tolist() == [3, 1, 4]


def test_the_surest_mistakes_come_first_and_hits_not_at_all():
    logits = torch.tensor([[0, 1.0], [0, 5.0], [3.0, 0], [2.0, 0]])
    labels = torch.tensor([0, 0, 0, 1])
    assert surest_mistakes(logits, labels).tolist() == [1, 3, 0]
    assert surest_mistakes(logits, labels, most=1).tolist() == [1]


@pytest.mark.parametrize("classes", [2, 10, 30, 100])
def test_matrices_and_mistakes_are_drawn_for_few_and_many_classes(tmp_path, classes):
    logits, labels = torch.randn(300, classes), torch.randint(classes, (300,))
    names = ["$_$", *(f"class {i}" for i in range(1, classes))]
    confusion_matrix(logits, labels, names, tmp_path / "matrix.png")
    images = torch.randint(0, 256, (18, 3, 8, 8), dtype=torch.uint8)
    wrong = surest_mistakes(logits, labels)
    mistakes(images, logits[wrong], labels[wrong], names, tmp_path / "mistakes.png")
    drawn(tmp_path / "matrix.png")
    drawn(tmp_path / "mistakes.png")


def test_no_mistakes_at_all_are_drawn_too(tmp_path):
    images = torch.zeros(0, 1, 8, 8, dtype=torch.uint8)
    mistakes(images, torch.zeros(0, 3), torch.arange(0), "abc", tmp_path / "m.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.png"]


def test_curves_are_drawn_with_and_without_halting(tmp_path):
    row = {"learning_rate": 1e-3}
    row |= {f"{s}_{n}": 0.5 for s in ("train", "validation") for n in ("loss", "accuracy")}
    rows = [{**row, "epoch": epoch} for epoch in (1, 2)]
    learning_curves(rows, tmp_path / "plain.png")
    halting = {"train_halting": 0.1, "validation_halting": 0.9}
    learning_curves([{**r, **halting} for r in rows], tmp_path / "halting.png")
    assert drawn(tmp_path / "halting.png")[1] > drawn(tmp_path / "plain.png")[1]


def test_the_trace_is_drawn(tmp_path):
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    labels, file = torch.tensor([0, 4]), tmp_path / "trace.png"
    recursion_trace(
        trace(5, 2, 5), images, labels, "abcde", file, latent_steps=2, recursion_steps=2
    )
    drawn(file)


@pytest.fixture
def figures(monkeypatch):
    """Figures that would be saved."""
    from smallfry.report import recursion

    kept = []
    monkeypatch.setattr(recursion, "save", lambda figure, file: kept.append(figure))
    return kept


def test_of_many_classes_the_trace_has_a_bounded_number_of_lines(tmp_path, figures):
    pixels, names = torch.zeros(1, 3, 8, 8, dtype=torch.uint8), [f"n{i}" for i in range(500)]
    recursion_trace(
        trace(7, 1, 500),
        pixels,
        torch.zeros(1).long(),
        names,
        tmp_path / "x.png",
        latent_steps=3,
        recursion_steps=1,
    )
    assert len(figures[0].axes[1].lines) <= MOST_LINES + 2


@pytest.mark.parametrize(("recursion_steps", "lines"), [(1, [3.0]), (2, [])])
def test_a_line_marks_where_the_model_stops_within_the_trace(
    tmp_path, figures, recursion_steps, lines
):
    recursion_trace(
        trace(7, 1, 3),
        torch.zeros(1, 1, 8, 8, dtype=torch.uint8),
        torch.zeros(1).long(),
        "abc",
        tmp_path / "x.png",
        latent_steps=3,
        recursion_steps=recursion_steps,
    )
    axes = figures[0].axes[1]
    vertical = [line.get_xdata()[0] for line in axes.lines if len({*line.get_xdata()}) == 1]
    assert vertical == lines
    assert (f"{recursion_steps} × in use" in axes.get_xlabel()) is bool(lines)
