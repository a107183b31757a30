"""Estimators beside plain computations in float64, one pair, place or class at a time."""

import math

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_iris
from sklearn.metrics import log_loss

from smallfry.errors import UsageError
from smallfry.estimators.deep_fisher import DeepFisherNet
from smallfry.estimators.deep_kernel import DeepKernelClassifier
from smallfry.estimators.late_fusion import fuse, fusion_weights

# Deep kernels


def relu_step(signal, kernel):
    """A layer of ReLU, by the angle between two inputs."""
    angle = math.acos(min(1.0, max(-1.0, signal)))
    value = (math.sin(angle) + signal * (math.pi - angle)) / math.pi
    return value, value + kernel * (1 - angle / math.pi)


def series_step(coefficients):
    squares = [a**2 / sum(b**2 for b in coefficients) for a in coefficients]

    def step(signal, kernel):
        value = sum(s * signal**k for k, s in enumerate(squares))
        slope = sum(k * s * signal ** (k - 1) for k, s in enumerate(squares) if k)
        return value, value + kernel * slope

    return step


def on_sphere(X, mean, size):
    rows = np.column_stack([(X - mean) / size, np.ones(len(X))])
    return rows / np.sqrt((rows**2).sum(1))[:, None]


def plain_scores(X, y, other, step, depth, ridge):
    """Scores by solving the kernel's equations, (samples, classes)."""
    mean, size = X.mean(0), math.sqrt(X.var(0).sum())
    points, asked = on_sphere(X, mean, size), on_sphere(other, mean, size)

    def kernel(a, b):
        signal = total = float(np.clip(a @ b, -1, 1))
        top_signal = top = 1.0
        for _ in range(depth):
            signal, total = step(signal, total)
            top_signal, top = step(top_signal, top)
        return total / top

    gram = np.array([[kernel(a, b) for b in points] for a in points])
    between = np.array([[kernel(a, b) for b in points] for a in asked])
    targets = np.where(y[:, None] == np.unique(y), 1.0, -1.0)
    return between @ np.linalg.solve(gram + ridge * np.eye(len(X)), targets)


@pytest.fixture(scope="module")
def table():
    random = np.random.default_rng(0)
    return random.normal(size=(14, 3)) * [1, 5, 0.2] + 7, np.arange(14) % 3


@pytest.mark.parametrize("depth", [0, 1, 4])
@pytest.mark.parametrize("activation", ["relu", (0.0, 1.0, 0.5), (1.0, 0.0, -2.0, 0.25)])
def test_scores_solve_the_equations_of_the_kernel(activation, depth, table):
    X, y = table
    other = np.random.default_rng(1).normal(size=(5, 3)) + 7
    model = DeepKernelClassifier(activation, depth=depth, ridge=0.1).fit(X, y)
    step = relu_step if activation == "relu" else series_step(activation)
    wanted = plain_scores(X, y, other, step, depth, 0.1)
    np.testing.assert_allclose(model.decision_function(other), wanted, atol=1e-7)
    assert (model.predict(other) == np.unique(y)[wanted.argmax(1)]).all()


def test_scores_of_two_classes_are_those_of_the_second(table):
    X, y = table[0], table[1] > 0
    model = DeepKernelClassifier("relu", depth=2, ridge=0.1).fit(X, y)
    wanted = plain_scores(X, y, X, relu_step, 2, 0.1)
    np.testing.assert_allclose(model.decision_function(X), wanted[:, 1], atol=1e-7)
    np.testing.assert_allclose(wanted[:, 0], -wanted[:, 1], atol=1e-9)
    assert (model.predict(X) == (wanted[:, 1] > 0)).all()


@pytest.mark.parametrize("activation", ["optimal", "relu"])
def test_shifts_units_and_turns_of_a_table_change_nothing(activation, table):
    X, y = table
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))[0]
    moved = 1000 * X @ turn - 4
    scores = [
        DeepKernelClassifier(activation, ridge=1e-3).fit(rows, y).decision_function(rows)
        for rows in (X, moved)
    ]
    np.testing.assert_allclose(*scores, atol=1e-6)


def test_names_of_classes_are_of_any_kind():
    X, y = load_iris(return_X_y=True)
    wanted = DeepKernelClassifier(depth=2).fit(X, y).predict(X)
    for names in (np.array(["c", "a", "<b>"]), np.array([3.0, -1.0, 2.0]), np.array([7, 5, 6])):
        found = DeepKernelClassifier(depth=2).fit(X, names[y]).predict(X)
        assert found.dtype == names.dtype
        assert (found == names[wanted]).mean() > 0.98  # ties apart


def test_equal_rows_and_a_single_column_are_classified():
    model = DeepKernelClassifier().fit([[1.0], [1.0], [2.0], [2.0]], [0, 0, 1, 1])
    assert model.predict([[0.9], [2.1]]).tolist() == [0, 1]
    even = DeepKernelClassifier().fit(np.zeros((4, 2)), [0, 0, 0, 1])
    assert even.predict(np.zeros((2, 2))).tolist() == [0, 0]  # all that is there is a majority


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"activation": (math.nan, 1.0)}, "needs finite coefficients, and one other than 0"),
        ({"activation": (math.inf,)}, "needs finite coefficients"),
        ({"activation": ()}, "one other than 0"),
        ({"ridge": math.nan}, "can't be negative"),
        ({"depth": -1}, "can't be negative"),
        ({"dimension": 0}, "a sphere has dimension 1 or more, not 0"),
    ],
)
def test_settings_that_are_no_numbers_are_refused(given, said, table):
    with pytest.raises(UsageError, match=said):
        DeepKernelClassifier(**given).fit(*table)


# Fisher vectors


def plain_vectors(state, rows, regions):
    """Fisher vectors of descriptors (places, features) in regions, joined, in float64."""
    weights = np.exp(state["first_logits"]) / np.exp(state["first_logits"]).sum()
    means, sigma = state["first_means"], np.exp(state["first_log_sigma"])
    found = []
    for region in regions:
        first, second = np.zeros_like(means), np.zeros_like(means)
        for place in region:
            u = (rows[place] - means) / sigma
            density = weights * np.exp(-(u**2).sum(1) / 2) / sigma.prod(1)
            q = (density / density.sum())[:, None]
            first += q * u
            second += q * (u**2 - 1)
        first /= len(region) * np.sqrt(weights)[:, None]
        second /= len(region) * np.sqrt(2 * weights)[:, None]
        vector = np.concatenate([first.ravel(), second.ravel()])
        vector = np.sign(vector) * np.sqrt(np.abs(vector))
        found.append(vector / max(1e-12, np.sqrt((vector**2).sum())))
    joined = np.concatenate(found)
    return joined / np.sqrt((joined**2).sum())


@pytest.mark.parametrize("shape", [(1, 7, 7), (3, 6, 9), (2, 3, 8), (1, 3, 3)])
def test_features_are_fisher_vectors_of_the_image_and_its_quarters(shape):
    _, height, width = shape
    images = np.random.default_rng(0).integers(0, 256, (10, *shape)).astype(np.float32)
    net = DeepFisherNet(components=(3, 2), patch=3, patch_features=5, random_state=0)
    net.fit(images, np.arange(10) % 2)
    state = {k: v.double().numpy() for k, v in net.to_module().state_dict().items()}
    down, across = height - 2, width - 2
    grid = np.arange(down * across).reshape(down, across)
    regions = [grid.ravel()]
    if min(down, across) > 1:
        top, bottom = np.array_split(grid, 2)
        regions += [part.ravel() for half in (top, bottom) for part in np.array_split(half, 2, 1)]
    exact = net.to_module().double().forward_features(torch.from_numpy(images[:3]).double())
    np.testing.assert_allclose(net.transform(images[:3]), exact, atol=0.01)  # in float32
    for image, found in zip(images[:3], exact.numpy(), strict=True):
        rows = []
        for i in range(down):
            for j in range(across):
                patch = image[:, i : i + 3, j : j + 3].astype(np.float64).ravel()
                patch = patch - patch.mean()
                patch /= np.sqrt((patch**2).mean() + 10)
                white = (patch - state["whitening_mean"]) @ state["whitening_basis"]
                at = [-0.5 + (k / (n - 1) if n > 1 else 0) for k, n in ((i, down), (j, across))]
                rows.append([*white, *at])
        wanted = plain_vectors(state, np.array(rows), regions)
        assert len(found) == len(wanted)
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_names_of_classes_and_kinds_of_pixels_change_nothing():
    images = np.random.default_rng(0).integers(0, 256, (12, 1, 6, 6))
    names = np.array(["no", "<yes>", "日本"])[np.arange(12) % 3]
    nets = [
        DeepFisherNet(components=(2, 2), patch=3, random_state=0).fit(pixels, names)
        for pixels in (images.astype(np.uint8), images.astype(np.float64))
    ]
    assert nets[0].classes_.tolist() == ["<yes>", "no", "日本"]
    assert (nets[0].predict(images) == nets[1].predict(images)).all()
    wide = np.zeros((12, 1, 6, 12))
    wide[..., ::2] = images
    np.testing.assert_array_equal(nets[0].transform(wide[..., ::2]), nets[0].transform(images))
    scores = nets[0].decision_function(images)
    assert (nets[0].classes_[scores.argmax(1)] == nets[0].predict(images)).all()


@pytest.mark.parametrize(
    "setting",
    ["patch", "patch_features", "window", "projected", "stacked", "batch_size", "components"],
)
def test_sizes_of_nothing_are_refused_by_name(setting):
    given = {"patch": 3, "components": (2, 2), setting: 0 if setting != "components" else (2, 0)}
    with pytest.raises(UsageError, match=f"{setting} must be at least 1, got 0"):
        DeepFisherNet(**given).fit(np.zeros((4, 1, 6, 6)), [0, 1, 0, 1])


def test_images_of_one_colour_are_predicted_alike():
    net = DeepFisherNet(components=(2, 2), patch=3, random_state=0)
    flat = np.zeros((6, 1, 6, 6))
    assert len({*net.fit(flat, list("ababab")).predict(flat)}) == 1


# Late fusion


def test_fusion_weights_are_those_of_a_general_minimiser():
    random = np.random.default_rng(0)
    labels = random.integers(4, size=150)
    truth = np.eye(4)[labels]
    scores = [truth * scale + random.normal(size=(150, 4)) * noise for scale, noise in
              ((1, 1), (2, 3), (0, 1))]  # fmt: skip

    def loss(weights):
        logits = sum(w * s for w, s in zip(weights, scores, strict=True))
        shares = np.exp(logits - logits.max(1, keepdims=True))
        return log_loss(labels, shares / shares.sum(1, keepdims=True), labels=range(4))

    wanted = scipy.optimize.minimize(loss, np.ones(3), tol=1e-10).x
    found = fusion_weights([torch.from_numpy(each) for each in scores], torch.from_numpy(labels))
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-3)


@settings(max_examples=10)
@given(st.floats(1e-3, 1e3), st.permutations([0, 1, 2]))
def test_fusion_does_not_depend_on_units_or_order(unit, order):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (60,), generator=generator)
    scores = [torch.randn(60, 3, generator=generator).double() for _ in range(3)]
    scores[0] += torch.nn.functional.one_hot(labels, 3)
    first = fusion_weights(scores, labels)
    other = fusion_weights([scores[i] * (unit if i == 1 else 1) for i in order], labels)
    scaled = torch.stack([other[order.index(i)] * (unit if i == 1 else 1) for i in range(3)])
    torch.testing.assert_close(scaled, first, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 5.0, 0.1, -3e4])
def test_equal_scores_leave_the_others_alone(value):
    good = torch.randn(80, 3)
    labels = good.argmax(1)
    scores = [good, torch.full((80, 3), value)]
    weights = fusion_weights(scores, labels)
    assert weights.isfinite().all()
    assert weights[0] > 0
    assert torch.equal(fuse(scores, weights).argmax(1), labels)


def test_scores_of_several_types_are_added_in_the_finest():
    weights = torch.tensor([0.5, 0.25], dtype=torch.float64)
    votes = [torch.tensor([[1, 2]]), torch.tensor([[3, 4]])]
    torch.testing.assert_close(fuse(votes, weights), torch.tensor([[1.25, 2.0]]).double())
    mixed = [votes[0].float(), votes[1].double()]
    for scores in (mixed, mixed[::-1], [votes[0], mixed[1]]):
        assert fuse(scores, weights).dtype == torch.float64
    assert fuse([each.float() for each in votes], weights).dtype == torch.float32
    torch.testing.assert_close(fuse(mixed, weights), torch.tensor([[1.25, 2.0]]).double())


def test_fusion_needs_an_image_and_a_classifier():
    one = fusion_weights([torch.ones(1, 2)], torch.tensor([1]))
    assert one.isfinite().all()
    with pytest.raises(UsageError, match=r"got \(0, 3\) for 0 labels"):
        fusion_weights([torch.zeros(0, 3)], torch.zeros(0, dtype=torch.long))
    with pytest.raises(UsageError, match="needs scores of the same images and classes"):
        fusion_weights([], torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"components": 16}, "components must be 2 values, not 16"),
        ({"components": (16,)}, "components must be 2 values"),
        ({"components": (4.5, 8)}, "components must be a whole number, not 4.5"),
        ({"patch": 2.5}, "patch must be a whole number, not 2.5"),
        ({"batch_size": "10"}, "batch_size must be a whole number"),
        ({"epochs": -1}, "epochs can't be negative"),
        ({"C": 0.0}, "C is above 0"),
    ],
)
def test_settings_of_a_fisher_network_are_checked_before_the_fit(values, message):
    images = np.arange(4 * 64, dtype=np.float32).reshape(4, 1, 8, 8)
    with pytest.raises(UsageError, match=message):
        DeepFisherNet(**values).fit(images, [0, 1, 0, 1])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"depth": 1.5}, "depth must be a whole number"),
        ({"ridge": None}, "ridge can't be null"),
        ({"dimension": 2.5}, "dimension must be a whole number"),
        ({"activation": ("a",)}, "activation needs finite coefficients"),
    ],
)
def test_settings_of_a_deep_kernel_are_checked(values, message):
    with pytest.raises(UsageError, match=message):
        DeepKernelClassifier(**values).fit(np.eye(4), [0, 1, 0, 1])


def test_late_fusion_takes_as_many_weights_as_classifiers():
    scores = torch.eye(3)
    with pytest.raises(UsageError, match=r"one of each of 1 classifiers, got \(2,\)"):
        fuse([scores], torch.ones(2))
    for wrong in ([], [scores, torch.eye(2)], [np.eye(3)]):
        with pytest.raises(UsageError, match="scores"):
            fuse(wrong, torch.ones(len(wrong)))
    with pytest.raises(UsageError, match=r"labels are 0 to 2"):
        fusion_weights([scores], torch.tensor([0, 1, 5]))
    with pytest.raises(UsageError, match="needs finite scores"):
        fusion_weights([scores * math.nan], torch.arange(3))
