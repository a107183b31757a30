"""What the pictures show is computed right; that they are drawn is seen by opening them."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from smallfry.models import ViTRM
from smallfry.report.classification import confusion_matrix, mistakes, surest_mistakes
from smallfry.report.curves import learning_curves
from smallfry.report.recursion import interesting, recursion_trace, trace_recursion


@pytest.fixture
def model():
    return ViTRM(
        8, 4, 3, 5, embed_dim=16, num_heads=2, mlp_hidden_dim=8, latent_steps=2, recursion_steps=2
    ).eval()


def drawn(file):
    pixels = np.asarray(Image.open(file).convert("RGB"))
    assert pixels.std() > 5
    return pixels.shape


def test_a_trace_agrees_with_recursion_at_the_end_of_every_step(model):
    images = torch.randn(3, 3, 8, 8)
    trace = trace_recursion(model, images, steps=3)
    assert trace.probabilities.shape == (1 + 3 * 2, 3, 5)
    with torch.no_grad():
        steps = model.recurse(images, 3)
    for number, step in enumerate(steps, start=1):
        assert_close(trace.probabilities[2 * number], step.logits.softmax(1))
        assert_close(trace.halting[2 * number], step.halt_logits.sigmoid())


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


def test_the_trace_is_drawn(tmp_path, model):
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    labels = torch.tensor([0, 4])
    file = tmp_path / "trace.png"
    recursion_trace(model, images.float() / 255, images, labels, "abcde", file)
    drawn(file)


def test_of_many_classes_the_trace_has_a_bounded_number_of_lines(tmp_path, monkeypatch):
    from smallfry.report import recursion

    figures = []
    monkeypatch.setattr(recursion, "save", lambda figure, file: figures.append(figure))
    model = ViTRM(8, 4, 3, 500, embed_dim=16, num_heads=2, mlp_hidden_dim=8).eval()
    pixels = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    names = [f"n{i}" for i in range(500)]
    recursion_trace(model, pixels.float(), pixels, torch.zeros(1).long(), names, tmp_path / "x.png")
    assert len(figures[0].axes[1].lines) <= recursion.MOST_LINES + 2
