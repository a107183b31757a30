"""Measures of collapse against NumPy in float64, where they degenerate, and their findings."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flat_subject import CLASSES, Flat, split_of, subject_of, trained_of

from smallfry.analysis import collapse
from smallfry.analysis.collapse import (
    WatchCollapse,
    ask,
    collapse_threshold,
    etf_head,
    linear_collapse,
    measure_collapse,
    within_over_between,
)
from smallfry.analysis.geometry import measure_geometry
from smallfry.data import Split
from smallfry.errors import RunError, UsageError


def drawn(seed, counts, features=6, spread=0.4):
    """Features around random means, in a random order, with a random classifier."""
    draw = np.random.default_rng(seed)
    labels = draw.permutation(np.repeat(np.arange(len(counts)), counts))
    means = draw.standard_normal((len(counts), features))
    points = means[labels] + spread * draw.standard_normal((len(labels), features))
    weight = means + 0.3 * draw.standard_normal(means.shape)
    return points, labels, weight


def tensors(*arrays):
    return [torch.from_numpy(each) for each in arrays]


def defined(points, labels, weight):
    """All measures by their definitions, class by class."""
    classes, total = len(weight), points.mean(0)
    means = np.stack([points[labels == c].mean(0) for c in range(classes)])
    centred = means - total
    within = sum(np.outer(p - means[c], p - means[c]) for p, c in zip(points, labels, strict=True))
    between = sum(np.outer(m, m) for m in centred) / classes
    inverse = np.linalg.pinv(between, rcond=1e-10, hermitian=True)
    frame = (np.eye(classes) - 1 / classes) / np.sqrt(classes - 1)

    def normal(matrix):
        return matrix / np.linalg.norm(matrix)

    norms, rows = np.linalg.norm(centred, axis=1), np.linalg.norm(weight, axis=1)
    apart = np.linalg.norm(points[:, None] - means, axis=2)
    return {
        "nc1": np.trace(within / len(points) @ inverse) / classes,
        "nc2_weights": np.linalg.norm(normal(weight @ weight.T) - frame),
        "nc2_means": np.linalg.norm(normal(centred @ centred.T) - frame),
        "nc2_orthogonal": np.linalg.norm(normal(means @ means.T) - np.eye(classes) / classes**0.5),
        "nc3": np.linalg.norm(normal(weight) - normal(centred)),
        "nc4": (apart.argmin(1) != (points @ weight.T).argmax(1)).mean(),
        "equinorm_means": norms.std() / norms.mean(),
        "equinorm_weights": rows.std() / rows.mean(),
        "per_class": [
            np.square(points[labels == c] - means[c]).sum(1).mean() / np.square(norms).mean()
            for c in range(classes)
        ],
        "cosines": normal_rows(centred) @ normal_rows(centred).T,
        "distances": np.linalg.norm(means[:, None] - means, axis=2),
    }


def normal_rows(matrix):
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


@pytest.mark.parametrize(
    "counts", [(20, 20, 20), (31, 1, 7, 2), (5, 9), (4,) * 30], ids=["equal", "rare", "two", "many"]
)
def test_every_measure_is_its_definition(counts):
    arrays = drawn(len(counts), counts)
    found = measure_collapse(*tensors(*arrays))._asdict()
    for name, expected in defined(*arrays).items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-9, atol=1e-12, err_msg=name)


def test_numbers_of_single_precision_are_taken_in_double():
    points, labels, weight = tensors(*drawn(3, [20, 20, 20]))
    points, weight = points.float(), weight.float()
    found = measure_collapse(points, labels, weight)
    expected = measure_collapse(points.double(), labels, weight.double())
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))
    geometry = measure_geometry(points, labels, weight, torch.ones(3))
    assert geometry.margins.dtype == torch.float64


def test_labels_without_a_class_are_refused():
    points, labels, weight = tensors(*drawn(3, [20, 20, 20]))
    with pytest.raises(UsageError, match="labels of 3 classes, and a classifier of 2"):
        measure_collapse(points, labels, weight[:2])
    with pytest.raises(UsageError, match="labels must be 0 to 1"):
        measure_geometry(points, labels, weight[:2])


def test_features_that_are_no_numbers_are_refused():
    points, labels, weight = tensors(*drawn(3, [20, 20]))
    points[0, 0] = torch.nan
    with pytest.raises(UsageError, match="features are not finite"):
        measure_collapse(points, labels, weight)


def test_given_logits_decide_instead_of_the_products():
    points, labels, weight = tensors(*drawn(0, (9, 9, 9), spread=0.1))
    decided = torch.nn.functional.one_hot((labels + 1) % 3, 3).double()
    assert measure_collapse(points, labels, weight, decided).nc4 == 1
    assert measure_collapse(points, labels, weight).nc4 < 1


def test_distances_between_means_far_from_the_origin_are_exact():
    points, labels, weight = drawn(3, (4,) * 40)
    shifted = measure_collapse(*tensors(points + 1e6, labels, weight))
    expected = defined(points, labels, weight)
    np.testing.assert_allclose(shifted.distances, expected["distances"], rtol=1e-8, atol=1e-8)
    assert shifted.distances.diagonal().abs().max() == 0
    nearest = np.linalg.norm(
        points[:, None] - np.stack([points[labels == c].mean(0) for c in range(40)]), axis=2
    ).argmin(1)
    decided = torch.nn.functional.one_hot(torch.from_numpy(nearest), 40).double()
    given = tensors(points + 1e6, labels, weight)
    assert measure_collapse(*given, decided).nc4 == 0


def test_classes_of_equal_means_do_not_drown_what_is_between_the_others():
    points, labels, _ = drawn(1, (12, 12, 12, 12))
    points[labels == 3] = points[labels == 2]
    means = np.stack([points[labels == c].mean(0) for c in range(4)])
    centred = means - points.mean(0)
    within = points - means[labels]
    inverse = np.linalg.pinv(centred.T @ centred / 4, rcond=1e-10, hermitian=True)
    expected = np.trace(within.T @ within / len(points) @ inverse) / 4
    assert within_over_between(*tensors(points, labels)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("features", [1, 2])
def test_fewer_features_than_classes_have_their_own_rank(features):
    points, labels, _ = drawn(2, (8, 8, 8, 8), features)
    means = np.stack([points[labels == c].mean(0) for c in range(4)])
    centred, within = means - points.mean(0), points - means[labels]
    between = centred.T @ centred / 4
    expected = np.trace(within.T @ within / len(points) @ np.linalg.inv(between)) / 4
    assert within_over_between(*tensors(points, labels)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("value", [0.0, 3.7])
def test_features_that_are_all_equal_vary_neither_within_nor_between(value):
    labels = torch.arange(9) % 3
    assert within_over_between(torch.full((9, 4), value).double(), labels) == 0
    found = measure_collapse(torch.full((9, 4), value).double(), labels, torch.eye(3, 4).double())
    assert found.distances.abs().max() == 0
    assert not found.cosines.isnan().any()


def test_a_class_in_the_middle_is_perpendicular_to_all():
    points = torch.tensor([[-1.0], [0.0], [1.0]]).double().repeat(4, 1)
    labels = torch.arange(3).repeat(4)
    found = measure_collapse(points, labels, torch.tensor([[-1.0], [0.0], [1.0]]).double())
    assert found.cosines.tolist() == [[1, 0, -1], [0, 0, 0], [-1, 0, 1]]


def test_one_class_varies_between_nothing():
    points = torch.randn(5, 3, dtype=torch.float64)
    assert within_over_between(points, torch.zeros(5).long()) == 0
    with pytest.raises(UsageError, match="two classes at least"):
        measure_collapse(points, torch.zeros(5).long(), torch.ones(1, 3).double())


# Frames


@pytest.mark.parametrize(("features", "classes"), [(2, 2), (5, 5), (9, 3), (40, 33)])
def test_a_frame_has_rows_of_norm_1_at_equal_angles(features, classes):
    head = etf_head(features, classes, torch.Generator().manual_seed(1))
    gram = (head @ head.T).numpy()
    expected = np.full((classes, classes), -1 / (classes - 1))
    np.fill_diagonal(expected, 1)
    np.testing.assert_allclose(gram, expected, atol=1e-12)
    np.testing.assert_allclose(head.sum(0), 0, atol=1e-12)
    assert torch.equal(head, etf_head(features, classes, torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("classes", [1, 0])
def test_a_frame_needs_two_classes(classes):
    with pytest.raises(UsageError, match=f"two classes at least, not {classes}"):
        etf_head(4, classes)


# Closed form


@pytest.mark.parametrize("layers", [1, 2, 5, 12])
@pytest.mark.parametrize("decay", [1e-2, 1e-5, 1e-9])
def test_each_class_is_at_the_minimum_of_its_own_term(layers, decay):
    counts = (500, 40, 3)
    found = linear_collapse(counts, layers, decay, 2 * decay)
    total = sum(counts)
    b = layers * total * (total * decay**layers * 2 * decay) ** (1 / layers)
    np.testing.assert_allclose(found.ratio, b / np.array(counts), rtol=1e-12)
    loss = 0.0
    for n, root, logit in zip(counts, found.root.tolist(), found.logits.tolist(), strict=True):
        value = n / (1 + root**layers) + b * root
        loss += value / (2 * total)
        grid = np.concatenate([np.linspace(0, 3, 3001), np.geomspace(1e-3, 1e9, 3001)])
        assert value <= (n / (1 + grid**layers) + b * grid).min() * (1 + 1e-12)
        assert logit == pytest.approx(root**layers / (1 + root**layers), rel=1e-12)
        if root > 0:
            slope = n * layers * root ** (layers - 1) / (1 + root**layers) ** 2
            assert slope == pytest.approx(b, rel=1e-8)
    assert found.loss == pytest.approx(loss, rel=1e-12)
    # the network's own output for a class: s^M times the norm of its mean
    outputs = found.singular_values**layers * found.mean_norms
    np.testing.assert_allclose(outputs, found.logits, rtol=1e-9, atol=1e-15)


def test_the_threshold_is_where_collapse_costs_as_much_as_learning():
    for layers in (2, 3, 7):
        ratio = collapse_threshold(layers)
        grid = np.linspace(0, 10, 400_001)
        least = (1 / (1 + grid**layers) + ratio * grid).min()
        assert least == pytest.approx(1, abs=1e-9)  # as at x = 0
    assert collapse_threshold(1) == 1


# Findings


def subject(pixels, labels, weight):
    split = split_of(pixels, labels)
    return subject_of(split, split, trained_of(weight))


def test_the_answer_names_merged_and_rare_classes_with_their_numbers():
    draw = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 24 + [1] * 24 + [2] * 24 + [3] * 4)
    means = torch.tensor([[200, 9, 9, 9], [9, 200, 9, 9], [9, 9, 200, 9], [9, 9, 200, 19]])
    pixels = means[labels] + torch.randint(-4, 5, (76, 4), generator=draw)
    answer = ask(subject(pixels.to(torch.uint8), labels, means - 60))
    numbers, text = answer.numbers, " ".join(answer.findings)
    points = pixels.numpy().astype(float)
    expected = defined(points, labels.numpy(), means.numpy() - 60.0)
    for name in ("nc1", "nc2_means", "nc3", "nc4", "per_class", "cosines"):
        np.testing.assert_allclose(numbers[name], expected[name], rtol=1e-5, err_msg=name)
    upper = expected["distances"][np.triu_indices(4, 1)]
    near = expected["distances"][2, 3] / np.median(upper)
    assert f"cat and dog have collapsed onto each other: their means are {near:.2f} of" in text
    assert text.count("have collapsed onto each other") == 1
    rare = expected["per_class"][3] / np.median(expected["per_class"])
    assert f"dog has 4 images of at most 24, and varies {rare:.2g} times the median class" in text
    rows = {row[0]: row[1:] for row in answer.tables[1].rows}
    assert [rows[name][0] for name in CLASSES] == [24, 24, 24, 4]
    assert (rows["cat"][2], rows["dog"][2]) == ("dog", "cat")
    assert list(numbers["layers"]) == ["head", "features"]
    logits = points @ (means.numpy() - 60.0).T
    within = within_over_between(*tensors(logits, labels.numpy()))
    assert numbers["layers"]["head"] == pytest.approx(within, rel=1e-4)
    assert len(answer.pictures) == 2


def test_a_class_without_images_is_no_answer():
    pixels = torch.arange(32, dtype=torch.uint8).view(8, 4)
    with pytest.raises(UsageError, match="images of every class"):
        ask(subject(pixels, torch.arange(8) % 3, torch.eye(4)))


# Callback


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """A callback over a data set with a class of one image, in a run folder."""
    labels = torch.tensor([0] * 60 + [1] * 59 + [2])
    pixels = torch.randint(256, (120, 1, 2, 2), dtype=torch.uint8)
    split = Split(pixels, torch.arange(120), labels)
    data = SimpleNamespace(
        **{"train": split, "mean": [0.0], "std": [1 / 255], "classes": CLASSES[:3]},
        **{"image_size": 2, "channels": 1},
    )
    config = SimpleNamespace(data=SimpleNamespace(mean=None, std=None))
    monkeypatch.setattr(collapse, "SAMPLE", 20)
    monkeypatch.setattr(collapse, "read_config", lambda file: config)
    monkeypatch.setattr(collapse, "load_config_data", lambda told: data)
    model = Flat(torch.randn(3, 4, generator=torch.Generator().manual_seed(5)))

    def run(epochs, history=()):
        callback = WatchCollapse()
        callback.on_start(SimpleNamespace(folder=tmp_path, history=[{}] * len(history)))
        for epoch in epochs:
            callback.on_epoch(SimpleNamespace(epoch=epoch, model=model, folder=tmp_path))
        return json.loads((tmp_path / "collapse.json").read_text())

    run.folder, run.split, run.model = tmp_path, split, model
    return run


def test_a_sample_of_the_training_images_has_rare_classes_too(watched):
    (row,) = watched([1])
    assert row["epoch"] == 1
    assert row["nc1"] > 0
    assert (watched.folder / "pictures" / "collapse.png").read_bytes().startswith(b"\x89PNG")


def test_rows_of_a_run_that_goes_on_are_kept_and_later_ones_are_written_anew(watched):
    first = watched([1, 2])
    again = watched([2], history=[1])
    assert again == first
    assert [row["epoch"] for row in watched([1])] == [1]  # a run that begins anew


@pytest.mark.parametrize("content", ["{", "3", "[3]", "null", "\xff"])
def test_a_damaged_file_of_rows_is_named(watched, content):
    (watched.folder / "collapse.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(RunError, match=r"collapse.json: damaged .*remove it, then the run goes on"):
        watched([2], history=[1])
