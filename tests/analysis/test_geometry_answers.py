"""Answers on geometry against brute force in float64: numbers, tables, findings and pictures."""

import csv
import io
import json
import math

import numpy as np
import pytest
import torch
from flat_subject import CLASSES, split_of, subject_of, trained_of
from PIL import Image

from smallfry.analysis import geometry
from smallfry.analysis.geometry import ask, compare, measure_geometry
from smallfry.analysis.page import write_answers
from smallfry.data.corruptions import corrupt

DRAW = np.random.default_rng(0)
PIXELS = DRAW.integers(0, 256, (90, 64)).astype(np.uint8)
WEIGHT = DRAW.standard_normal((4, 64)) / 100
BIAS = np.array([0.3, -0.4, 0.1, 0.0])
LABELS = (PIXELS @ WEIGHT.T + BIAS + 0.8 * DRAW.standard_normal((90, 4))).argmax(1)
OTHER = WEIGHT + 0.004 * DRAW.standard_normal((4, 64))
KINDS = ("broken", "repaired", "moved")
CORRUPTIONS = (("brightness", 2), ("brightness", 5), ("contrast", 4))


def measured(pixels, weight, bias, labels):
    """Angles, lengths, margins and predictions, image by image."""
    found = {"angle": [], "taken": [], "length": [], "margin": [], "prediction": []}
    for h, y in zip(pixels.astype(float), labels, strict=True):
        logits = weight @ h + bias
        c = int(logits.argmax())
        cosine = weight @ h / np.linalg.norm(weight, axis=1) / np.linalg.norm(h)
        found["angle"].append(math.acos(cosine[y]))
        found["taken"].append(math.acos(cosine[c]))
        found["length"].append(np.linalg.norm(h))
        found["margin"].append(
            min(
                (logits[y] - logits[j]) / np.linalg.norm(weight[y] - weight[j])
                for j in range(len(weight))
                if j != y
            )
        )
        found["prediction"].append(c)
    return {name: np.array(values) for name, values in found.items()}


@pytest.fixture(scope="module")
def subject():
    split = split_of(torch.from_numpy(PIXELS), torch.from_numpy(LABELS))
    models = [trained_of(torch.from_numpy(w), torch.from_numpy(BIAS)) for w in (WEIGHT, OTHER)]
    return subject_of(split, split, models[0], {"small": models[1]}, CORRUPTIONS, seed=3)


@pytest.fixture(scope="module")
def answer(subject):
    return ask(subject)


@pytest.fixture(scope="module")
def own():
    return measured(PIXELS, WEIGHT.astype(np.float32), BIAS, LABELS)


@pytest.fixture(scope="module")
def small():
    return measured(PIXELS, OTHER.astype(np.float32), BIAS, LABELS)


def test_the_numbers_of_a_model_are_those_of_its_images(answer, own, small):
    assert answer.numbers["predictions_that_differ_from_the_model"] == 0
    for name, each in (("flat", own), ("small", small)):
        expected = {
            "accuracy": (each["prediction"] == LABELS).mean(),
            "mean_angle_degrees": np.degrees(each["angle"]).mean(),
            "mean_length": each["length"].mean(),
            "mean_margin": each["margin"].mean(),
            "lower_quartile_margin": np.quantile(each["margin"], 0.25),
        }
        assert answer.numbers["models"][name] == pytest.approx(expected, rel=1e-6)
    (models, classes, _) = answer.tables
    assert [row[0] for row in models.rows] == ["flat", "small"]
    assert models.rows[1][1] == answer.numbers["models"]["small"]["accuracy"]
    for row in classes.rows:
        chosen = CLASSES.index(row[0]) == LABELS
        margins = own["margin"][chosen]
        assert row[1:] == pytest.approx(
            [
                chosen.sum(),
                np.degrees(own["angle"][chosen]).mean(),
                own["length"][chosen].mean(),
                *np.quantile(margins, (0.25, 0.5, 0.75)),
            ],
            rel=1e-6,
        )


def test_the_findings_have_medians(answer, own):
    text = answer.findings[1]
    right = own["prediction"] == LABELS
    assert 0 < right.sum() < 90
    for chosen in (right, ~right):
        if chosen.sum() % 2 == 0:  # of which the median is no image's
            assert len(set(own["length"][chosen])) > 1
        angle = math.degrees(np.median(own["angle"][chosen]))
        length = np.median(own["length"][chosen])
        assert f"at {angle:.0f}° from their class with length {length:.3g} (medians)" in text


def test_the_median_of_two_is_between_them():
    features = torch.tensor([[3.0, 0.0], [9.0, 0.0], [0.0, 5.0]]).double()
    found = measure_geometry(features, torch.tensor([0, 0, 0]), torch.eye(2).double())
    assert geometry._median(found, True) == "at 0° from their class with length 6 (medians)"
    assert geometry._median(found, False) == "at 90° from their class with length 5 (medians)"
    assert geometry._median(measure_geometry(*(x[:2] for x in (features, found.labels)),
                                             torch.eye(2).double()), False) == "none"  # fmt: skip


def test_changes_are_those_of_the_predictions_and_add_up(answer, own, small):
    found = answer.numbers["changes"]["small"]
    was, now = own["prediction"], small["prediction"]
    right, still = was == LABELS, now == LABELS
    drop = own["margin"] - small["margin"]
    broken = np.flatnonzero(right & ~still)
    repaired = np.flatnonzero(~right & still)
    moved = np.flatnonzero(~right & ~still & (was != now))
    assert min(len(broken), len(repaired)) > 1
    assert found["broken"] == broken[np.argsort(-drop[broken])].tolist()
    assert found["repaired"] == repaired[np.argsort(drop[repaired])].tolist()
    assert found["moved"] == moved[np.argsort(-drop[moved])].tolist()
    assert found["agreement"] == pytest.approx((was == now).mean())
    # the lengths are those of the pixels in both, and so is the bias: all is turning
    assert found["share_by_turning"] == pytest.approx(1)
    text = " ".join(answer.findings)
    assert f"breaks {len(broken)}, repairs {len(repaired)}, and moves {len(moved)} from" in text
    assert "100% is due to turning" in text


def test_accuracy_under_corruption_is_that_of_the_corrupted_images(answer):
    rows, clean = {}, (measured(PIXELS, WEIGHT, BIAS, LABELS)["prediction"] == LABELS).mean()
    for name, severity in CORRUPTIONS:
        images = corrupt(torch.from_numpy(PIXELS).view(-1, 1, 8, 8), name, severity, seed=3)
        accuracy = {
            model: float(((images.view(90, 64).numpy() @ w.T + BIAS).argmax(1) == LABELS).mean())
            for model, w in (("flat", WEIGHT), ("small", OTHER))
        }
        assert answer.numbers["accuracy"][f"{name} {severity}"] == pytest.approx(accuracy)
        rows.setdefault(name, []).append(accuracy["flat"])
    table = {row[0]: row[1:] for row in answer.tables[2].rows}
    for name, found in rows.items():
        mean = np.mean(found)
        assert table[name][:2] == pytest.approx([mean, (1 - mean) / (1 - clean)])
    errors = np.mean([1 - np.mean(found) for found in rows.values()])
    assert answer.numbers["mean_corruption_error"]["flat"] == pytest.approx(errors)
    assert f"flat {errors:.2%}, small" in answer.findings[-1]


def test_the_file_of_images_has_a_row_for_each_model_and_corruption(answer, own, tmp_path):
    write_answers(tmp_path / "page", "t", {"geometry": answer}, {})
    text = (tmp_path / "page" / "geometry.csv").read_text()
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert len(rows) == 2 * (1 + len(CORRUPTIONS)) * 90
    clean = [row for row in rows if (row["model"], row["corruption"]) == ("flat", "clean")]
    assert [int(row["image"]) for row in clean] == list(range(90))
    assert [row["label"] for row in clean] == [CLASSES[y] for y in LABELS]
    assert [row["prediction"] for row in clean] == [CLASSES[c] for c in own["prediction"]]
    for column, name in (
        ("angle_to_label", "angle"),
        ("angle_to_prediction", "taken"),
        ("length", "length"),
        ("margin", "margin"),
    ):
        values = [float(row[column]) for row in clean]
        np.testing.assert_allclose(values, own[name], rtol=2e-5, atol=1e-6)
    numbers = json.loads((tmp_path / "page" / "geometry.json").read_text())["numbers"]
    assert numbers["changes"] == answer.numbers["changes"]


def test_pictures_show_the_images_that_changed(answer):
    titles = [picture.title for picture in answer.pictures]
    assert titles[1].startswith("flat (hollow) against small (filled)")
    assert titles[2:] == [
        "Images that small has broken",
        "Images that small has repaired",
        "Accuracy under corruption",
    ]
    for picture in (answer.pictures[0], *answer.pictures[2:]):
        with Image.open(io.BytesIO(picture.drawing)) as opened:
            assert min(opened.size) > 50
    drawing = str(answer.pictures[1].drawing)
    assert drawing.count("<title>") == 90
    changed = sum(
        len(answer.numbers["changes"]["small"][k]) for k in ("broken", "repaired", "moved")
    )
    assert drawing.count('class="pair changed"') == changed


def test_all_that_changed_is_linked_and_others_up_to_a_number(monkeypatch, subject):
    monkeypatch.setattr(geometry, "LINKED", 10)
    before, after = (
        measure_geometry(*(torch.from_numpy(x) for x in (PIXELS.astype(float), LABELS, w, BIAS)))
        for w in (WEIGHT, OTHER)
    )
    pairs = geometry._pairs(before, after, CLASSES)
    changed = int((before.predicted != after.predicted).sum())
    assert len(pairs) == max(10, changed)
    assert [pair.changed for pair in pairs] == [True] * changed + [False] * (len(pairs) - changed)
    monkeypatch.setattr(geometry, "LINKED", changed + 3)
    assert sum(not pair.changed for pair in geometry._pairs(before, after, CLASSES)) == 3


def test_a_model_that_is_right_about_all_has_no_error_over_clean():
    labels = torch.from_numpy(measured(PIXELS, WEIGHT, BIAS, LABELS)["prediction"])
    split = split_of(torch.from_numpy(PIXELS), labels)
    trained = trained_of(torch.from_numpy(WEIGHT), torch.from_numpy(BIAS))
    found = ask(subject_of(split, split, trained, {"same": trained}, (("contrast", 5),)))
    assert math.isnan(found.tables[2].rows[0][2])
    assert "wrong ones none" in found.findings[1]
    assert math.isnan(found.numbers["changes"]["same"]["share_by_turning"])
    assert "due to turning" not in " ".join(found.findings)
    assert not any("has broken" in picture.title for picture in found.pictures)


# Measures


@pytest.mark.parametrize("classes", [2, 5, 40])
def test_margins_are_the_least_distance_to_another_class(classes):
    draw = np.random.default_rng(classes)
    weight, bias = draw.standard_normal((classes, 7)), draw.standard_normal(classes)
    features = draw.standard_normal((30, 7))
    labels = draw.integers(classes, size=30)
    found = measure_geometry(*(torch.from_numpy(x) for x in (features, labels, weight, bias)))
    expected = measured(features, weight, bias, labels)
    np.testing.assert_allclose(found.margins, expected["margin"], rtol=1e-10)
    np.testing.assert_allclose(found.of_class(found.angles), expected["angle"], rtol=1e-9)
    np.testing.assert_allclose(found.logits, features @ weight.T + bias, atol=1e-9)


def test_margins_between_classes_of_nearly_equal_weights_are_exact():
    draw = np.random.default_rng(1)
    weight = 100 * np.ones((40, 6)) + 1e-7 * draw.standard_normal((40, 6))
    features, labels = draw.standard_normal((10, 6)), np.arange(10)
    found = measure_geometry(*(torch.from_numpy(x) for x in (features, labels, weight)))
    expected = measured(features, weight, np.zeros(40), labels)
    np.testing.assert_allclose(found.margins, expected["margin"], rtol=1e-4)


def test_shapley_values_are_means_over_both_orders():
    draw = torch.Generator().manual_seed(4)

    def some():
        features = torch.randn(12, 5, generator=draw, dtype=torch.float64)
        weight = torch.randn(3, 5, generator=draw, dtype=torch.float64)
        bias = torch.randn(3, generator=draw, dtype=torch.float64)
        return measure_geometry(features, torch.arange(12) % 3, weight, bias)

    before, after = some(), some()
    found = compare(before, after)
    for i in range(12):
        y = i % 3
        factors = [float(g.norms[y] * g.angles[i, y].cos()) for g in (before, after)]
        lengths = [float(g.lengths[i]) for g in (before, after)]
        turned = [(factors[1] - factors[0]) * length for length in lengths]
        stretched = [(lengths[1] - lengths[0]) * factor for factor in factors]
        assert float(found.turning[i]) == pytest.approx(np.mean(turned))
        assert float(found.stretching[i]) == pytest.approx(np.mean(stretched))
        assert float(found.shifting[i]) == pytest.approx(float((after.bias - before.bias)[y]))
    positions = [i for kind in KINDS for i in getattr(found, kind).tolist()]
    assert len(positions) == len(set(positions)) > 0
    parts = (found.turning, found.stretching, found.shifting)
    lost = [float(part[found.broken].sum()) for part in parts]
    assert geometry._share_by_turning(found) == pytest.approx(lost[0] / sum(lost))
