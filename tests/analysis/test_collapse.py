"""Measures vanish on collapsed features, and the closed form is the minimum of the loss."""

import json
from pathlib import Path

import pytest
import torch

from smallfry.analysis.collapse import (
    collapse_threshold,
    etf_head,
    linear_collapse,
    measure_collapse,
    within_over_between,
)
from smallfry.errors import UsageError

CASES = json.loads((Path(__file__).parent / "linear_collapse.json").read_text())


@pytest.fixture
def frame():
    """Collapsed features of 4 classes in 7 dimensions, with their classifier."""
    head = etf_head(7, 4, torch.Generator().manual_seed(0))
    labels = torch.arange(20) % 4
    return head[labels], labels, head


def noisy(scale=0.3, images=200, classes=4):
    draw = torch.Generator().manual_seed(1)
    head = etf_head(7, classes, draw)
    labels = torch.arange(images) % classes
    noise = scale * torch.randn(images, 7, generator=draw, dtype=torch.float64)
    return head[labels] + noise, labels, head


def test_every_measure_of_a_tight_frame_is_zero(frame):
    found = measure_collapse(*frame)
    names = ("nc1", "nc2_weights", "nc2_means", "nc3", "nc4", "equinorm_means", "equinorm_weights")
    assert max(getattr(found, name) for name in names) < 1e-12
    assert found.nc2_orthogonal > 0.1
    off = found.cosines[~torch.eye(4, dtype=torch.bool)]
    torch.testing.assert_close(off, torch.full_like(off, -1 / 3))


def test_orthogonal_means_are_recognised():
    basis = torch.linalg.qr(torch.randn(7, 4, dtype=torch.float64)).Q.T
    labels = torch.arange(12) % 4
    found = measure_collapse(basis[labels], labels, basis)
    assert found.nc2_orthogonal < 1e-12 < found.nc2_weights


def test_variation_within_classes_equals_its_definition():
    features, labels, _ = noisy()
    means = torch.stack([features[labels == c].mean(0) for c in range(4)])
    within = features - means[labels]
    sigma_w = within.T @ within / len(features)
    centred = means - features.mean(0)
    sigma_b = centred.T @ centred / 4
    expected = float(torch.trace(sigma_w @ torch.linalg.pinv(sigma_b, rtol=1e-10)) / 4)
    assert within_over_between(features, labels) == pytest.approx(expected, rel=1e-10)


def test_measures_ignore_rotation_scale_and_shift():
    features, labels, head = noisy()
    turn = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64)).Q
    before = measure_collapse(features, labels, head)
    after = measure_collapse(3 * features @ turn, labels, head @ turn / 2)
    shifted = within_over_between(features + 5, labels)
    for name in ("nc1", "nc2_weights", "nc2_means", "nc2_orthogonal", "nc3", "nc4"):
        assert getattr(after, name) == pytest.approx(getattr(before, name), abs=1e-10)
    assert shifted == pytest.approx(before.nc1)
    torch.testing.assert_close(after.per_class, before.per_class)


def test_the_nearest_mean_is_compared_with_the_decision():
    features, labels, head = noisy(0.9)
    found = measure_collapse(features, labels, head)
    means = torch.stack([features[labels == c].mean(0) for c in range(4)])
    wrong = [int((means - h).norm(dim=1).argmin()) != int((head @ h).argmax()) for h in features]
    assert 0 < found.nc4 == sum(wrong) / len(wrong)


def test_merged_classes_are_near_and_missing_ones_refused():
    features, labels, head = noisy(0.05)
    merged = features.clone()
    merged[labels == 3] = features[labels == 2]
    found = measure_collapse(merged, labels, head)
    assert found.distances[2, 3] < 0.01 < found.distances[0, 3]
    with pytest.raises(UsageError, match="images of every class"):
        measure_collapse(features, labels.clamp(max=2), head)
    with pytest.raises(UsageError, match="needs as many features, not 3"):
        etf_head(3, 4)


# Closed form


@pytest.mark.parametrize("case", CASES)
def test_the_closed_form_is_that_of_an_independent_computation(case):
    found = linear_collapse(case["n"], case["M"], case["lambda_W"], case["lambda_H"])
    near = {"rel": 1e-10}
    assert found.root.tolist() == pytest.approx(case["x"], **near)
    assert found.singular_values.tolist() == pytest.approx(case["s"], **near)
    assert found.mean_norms.tolist() == pytest.approx(case["h_norm"], **near)
    assert found.logits.tolist() == pytest.approx(case["logit"], **near)
    assert found.loss == pytest.approx(case["loss"], abs=1e-12)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_descent_reaches_the_closed_form(layers):
    counts, decay, width = (8, 4, 2), 5e-3, 6
    total = sum(counts)
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    targets = torch.eye(3).double()[labels].T
    draw = torch.Generator().manual_seed(0)
    shapes = [(width, width)] * (layers - 1) + [(3, width)]
    weights = [0.5 * torch.randn(*s, generator=draw, dtype=torch.float64) for s in shapes]
    features = 0.5 * torch.randn(width, total, generator=draw, dtype=torch.float64)
    free = [*weights, features]
    for each in free:
        each.requires_grad_()
    optimizer = torch.optim.LBFGS(
        *(free, 1, 2000), tolerance_grad=1e-12, tolerance_change=1e-16,
        line_search_fn="strong_wolfe", history_size=50,
    )  # fmt: skip

    def loss():
        outputs = features
        for weight in weights:
            outputs = weight @ outputs
        squares = sum(each.square().sum() for each in free)
        return (outputs - targets).square().sum() / (2 * total) + decay / 2 * squares

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    found = linear_collapse(counts, layers, decay, decay)
    assert float(loss().detach()) == pytest.approx(found.loss, abs=1e-10)
    expected = found.singular_values.sort(descending=True).values
    for weight in weights:
        sizes = torch.linalg.svdvals(weight.detach())[:3]
        torch.testing.assert_close(sizes, expected, rtol=1e-4, atol=1e-5)
    means = torch.stack([features.detach()[:, labels == c].mean(1) for c in range(3)])
    torch.testing.assert_close(means.norm(dim=1), found.mean_norms, rtol=1e-4, atol=1e-5)
    assert within_over_between(features.detach().T, labels) < 1e-8


@pytest.mark.parametrize("layers", [2, 3, 4])
def test_a_class_vanishes_exactly_at_the_threshold(layers):
    threshold = collapse_threshold(layers)
    grid = torch.linspace(0, 6, 200_001, dtype=torch.float64)
    for decay in torch.logspace(-2.6, -0.8, 12).tolist():
        found = linear_collapse([30, 6, 1], layers, decay, decay)
        b = float(found.ratio[0]) * 30
        for n, root, ratio in zip((30, 6, 1), found.root, found.ratio, strict=True):
            assert (root == 0) == (ratio >= threshold)
            scanned = n / (1 + grid**layers) + b * grid
            own = n / (1 + root**layers) + b * root
            assert float(own) <= float(scanned.min()) + 1e-9
    assert float(threshold) == pytest.approx({2: 0.5, 3: 0.529134, 4: 0.569877}[layers], abs=1e-6)


def test_impossible_settings_are_refused():
    for settings in (
        ([], 1, 1.0, 1.0),
        ([3, 0], 1, 1.0, 1.0),
        ([3], 0, 1.0, 1.0),
        ([3], 1, 0.0, 1.0),
    ):
        with pytest.raises(UsageError, match="at least 1, and both decays above 0"):
            linear_collapse(*settings)
