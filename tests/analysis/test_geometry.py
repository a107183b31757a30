"""Angles, lengths and margins give the logits back, and changes add up."""

import io
import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from smallfry.analysis.geometry import _draw_gallery, compare, measure_geometry
from smallfry.data import Split
from smallfry.report.corruptions import draw_corruptions, mean_corruption_errors
from smallfry.report.pairs import Pair, draw_pairs


def drawn(seed, images=300, features=9, classes=5):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    labels = torch.randint(classes, (images,), generator=draw)
    weight, bias = normal(classes, features), normal(classes)
    return normal(images, features) + weight[labels], labels, weight, bias


@pytest.fixture
def two():
    features, labels, weight, bias = drawn(0)
    _, _, other, shift = drawn(1)
    weaker = (0.7 * features, labels, weight + 0.3 * other, bias + 0.1 * shift)
    return measure_geometry(features, labels, weight, bias), measure_geometry(*weaker)


def test_logits_come_back_from_angles_lengths_and_bias():
    features, labels, weight, bias = drawn(0)
    found = measure_geometry(features, labels, weight, bias)
    expected = features @ weight.T + bias
    torch.testing.assert_close(found.logits, expected, atol=1e-10, rtol=0)
    assert torch.equal(found.logits.argmax(1), found.predicted)
    assert found.accuracy == float((expected.argmax(1) == labels).double().mean())


def test_margins_are_signed_distances_to_the_nearest_boundary():
    features, labels, weight, bias = drawn(0)
    found = measure_geometry(features, labels, weight, bias)
    assert torch.equal(found.margins > 0, found.predicted == labels)
    for i in range(40):
        if found.margins[i] <= 0:
            continue
        # a step of the margin along some normal reaches a tie, and no shorter one does
        y, gaps = int(labels[i]), []
        for j in set(range(5)) - {y}:
            normal = weight[j] - weight[y]
            moved = features[i] + found.margins[i] * normal / normal.norm()
            logits = weight @ moved + bias
            gaps.append(float(logits[y] - logits[j]))
        assert min(gaps) == pytest.approx(0, abs=1e-9)


def test_features_that_vanish_are_perpendicular_to_all_classes():
    found = measure_geometry(torch.zeros(1, 3).double(), torch.tensor([0]), torch.eye(3).double())
    assert found.angles[0].tolist() == pytest.approx([math.pi / 2] * 3)
    assert found.lengths.item() == 0


def test_turning_stretching_and_shifting_add_up_to_the_change(two):
    before, after = two
    changes = compare(before, after)
    expected = after.of_class(after.logits) - before.of_class(before.logits)
    total = changes.turning + changes.stretching + changes.shifting
    torch.testing.assert_close(total, expected, atol=1e-10, rtol=0)


def test_pure_shrinking_changes_no_decision_without_bias():
    features, labels, weight, _ = drawn(0)
    before, after = (measure_geometry(s * features, labels, weight) for s in (1.0, 0.5))
    changes = compare(before, after)
    assert changes.agreement == 1
    assert changes.turning.abs().max() < 1e-12
    torch.testing.assert_close(after.angles, before.angles, atol=1e-7, rtol=0)


def test_flips_are_those_of_the_predictions(two):
    before, after = two
    changes = compare(before, after)
    right, still = (g.predicted == g.labels for g in two)
    assert set(changes.broken.tolist()) == set((right & ~still).nonzero()[:, 0].tolist())
    assert set(changes.repaired.tolist()) == set((~right & still).nonzero()[:, 0].tolist())
    assert len(changes.broken) > 2
    drops = (before.margins - after.margins)[changes.broken]
    assert torch.equal(drops, drops.sort(descending=True).values)
    counted = len(changes.broken) + len(changes.repaired) + len(changes.moved)
    assert changes.agreement == pytest.approx(1 - counted / 300)
    assert after.accuracy - before.accuracy == pytest.approx(
        (len(changes.repaired) - len(changes.broken)) / 300
    )


# Pictures


def test_mean_corruption_errors_weigh_corruptions_equally():
    accuracies = {("clean", 0): {"a": 0.9}, ("fog", 1): {"a": 0.5}, ("snow", 1): {"a": 0.8}}
    accuracies[("snow", 2)] = {"a": 0.6}
    assert mean_corruption_errors(accuracies) == {"a": pytest.approx((0.5 + 0.3) / 2)}
    assert draw_corruptions(accuracies).startswith(b"\x89PNG")


def test_the_drawing_of_pairs_has_a_tooltip_each_and_no_script():
    pairs = [
        Pair((10.0, 2.0), (20.0, 3.0), "image 0, <cat>: predicted dog, then cat", True),
        Pair((30.0, 1.0), (35.0, 1.5), "image 1", False),
    ]
    drawing = str(draw_pairs(pairs, "angle", "length"))
    assert drawing.count("<title>") == 2
    assert "&lt;cat&gt;" in drawing
    assert "<script" not in drawing
    assert drawing.count('class="pair changed"') == 1
    assert drawing.index("image 1") < drawing.index("image 0")  # changed ones lie on top
    assert draw_pairs([Pair((1, 1), (1, 1), "alone", False)], "x", "y")


def test_the_gallery_shows_every_chosen_image():
    geometry = measure_geometry(*drawn(0))
    images = torch.zeros(300, 1, 8, 8, dtype=torch.uint8)
    images[3] = 128
    subject = SimpleNamespace(
        trained=SimpleNamespace(classes=("a", "b", "c", "d", "e")),
        test=Split(images, torch.arange(300), geometry.labels),
    )
    encoded = _draw_gallery(subject, torch.tensor([3, 4]), geometry, geometry)
    with Image.open(io.BytesIO(encoded)) as picture:
        grey = torch.tensor(list(picture.convert("L").tobytes()), dtype=torch.uint8)
    assert 0.05 < (grey == 128).float().mean() < 0.5
    assert 0.05 < (grey == 0).float().mean() < 0.5
