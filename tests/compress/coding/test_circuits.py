"""Hidden Chow–Liu trees: golden values, brute force, and lossless coding."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from smallfry.compress.codec import HCLT
from smallfry.compress.coding.chow_liu import levels, mutual_information, spanning_tree
from smallfry.compress.coding.em import EMConfig, expected_counts, initial, learn, maximised
from smallfry.compress.coding.rans import encode_symbols
from smallfry.compress.coding.tree_likelihood import Tables
from smallfry.errors import DataError, UsageError
from smallfry_runtime.latent_trees import LatentTree
from smallfry_runtime.rans import TOTAL

GOLDEN = json.loads((Path(__file__).parent / "hclt_tiny.json").read_text())
PARENTS = (-1, 0, 0, 1)
CELLS = np.array(list(itertools.product(range(3), repeat=4)))


def softmax_of_sines(shape, k):
    values = 2 * np.sin(0.37 * np.arange(math.prod(shape)) + 0.11 * k + 0.2).reshape(shape)
    return np.exp(values) / np.exp(values).sum(axis=-1, keepdims=True)


@pytest.fixture
def tiny():
    transitions = [softmax_of_sines((2, 2), 5 + i) for i in range(4)]
    emissions = [softmax_of_sines((2, 3), 10 + i) for i in range(4)]
    return HCLT(PARENTS, softmax_of_sines((2,), 5), np.stack(transitions), np.stack(emissions))


def joint_with_states(model):
    """p(z, x) of all states and cells by multiplication: (16, 81), and the states (16, 4)."""
    states = np.array(list(itertools.product(range(2), repeat=4)))
    table = np.empty((16, 81))
    for row, z in enumerate(states):
        prior = model.root[z[0]]
        for i in range(1, 4):
            prior *= model.transitions[i, z[PARENTS[i]], z[i]]
        table[row] = prior * np.prod([model.emissions[i, z[i], CELLS[:, i]] for i in range(4)], 0)
    return table, states


def test_joint_probabilities_are_the_golden_ones(tiny):
    found = 2 ** tiny.log2_probability(CELLS)
    np.testing.assert_allclose(found, GOLDEN["joint"], atol=1e-9)
    np.testing.assert_allclose(found, joint_with_states(tiny)[0].sum(0), rtol=1e-12)
    assert found.sum() == pytest.approx(1, abs=1e-12)


def test_prefix_marginals_are_the_golden_ones(tiny):
    sample, mask, found = np.array([GOLDEN["x"]]), np.zeros(4, bool), []
    for variable in GOLDEN["order"]:
        mask[variable] = True
        found.append(2 ** float(tiny.marginal(sample, mask)[0]))
    np.testing.assert_allclose(found, GOLDEN["prefix_marginals"], atol=1e-9)
    assert tiny.marginal(sample, np.zeros((1, 4), bool))[0] == pytest.approx(0, abs=1e-12)


def test_expected_counts_and_a_step_are_those_of_brute_force(tiny):
    samples = CELLS[[3, 50, 77, 12, 12]]
    table, states = joint_with_states(tiny)
    posterior = (table / table.sum(0))[:, [3, 50, 77, 12, 12]]  # (16, samples)
    counts = expected_counts(PARENTS, Tables(tiny.root, tiny.transitions, tiny.emissions), samples)
    weight = posterior.sum(1)
    root = [weight[states[:, 0] == z].sum() for z in range(2)]
    np.testing.assert_allclose(counts.root, root, rtol=1e-10)
    for i, a, b in itertools.product(range(1, 4), range(2), range(2)):
        chosen = (states[:, PARENTS[i]] == a) & (states[:, i] == b)
        assert counts.transitions[i, a, b] == pytest.approx(weight[chosen].sum(), rel=1e-10)
    for i, z, v in itertools.product(range(4), range(2), range(3)):
        expected = posterior[states[:, i] == z][:, samples[:, i] == v].sum()
        assert counts.emissions[i, z, v] == pytest.approx(expected, rel=1e-10)
    after = maximised(Tables(tiny.root, tiny.transitions, tiny.emissions), counts, kappa=0.6)
    np.testing.assert_allclose(after.root, (np.array(root) + 0.3) / 5.6, rtol=1e-10)


@pytest.fixture(scope="module")
def digits():
    images = load_digits().images.astype(int).reshape(-1, 64)
    order = np.random.default_rng(0).permutation(len(images))
    return images[order[:1438]], images[order[1438:]]


@pytest.mark.parametrize("tied", [False, True])
def test_full_steps_never_lower_the_penalised_likelihood(digits, tied):
    samples = digits[0][:200, 16:32]
    parents = spanning_tree(mutual_information(samples, 17))
    config = EMConfig(states=3, tied=tied)
    tables, found = initial(parents, samples, 17, config), []
    for _ in range(20):
        model = HCLT(parents, *tables)
        used = [v for v in range(16) if parents[v] >= 0] if not tied else [0]
        rows = (tables.root, tables.transitions[used], tables.emissions)
        penalty = sum(np.log(each).sum() / each.shape[-1] for each in rows)
        found.append(model.log2_probability(samples).sum() * math.log(2) + penalty)
        tables = maximised(tables, expected_counts(parents, tables, samples), kappa=1.0)
    assert (np.diff(found) >= -1e-9 * abs(found[0])).all()
    assert found[-1] > found[0] + 100


def test_tied_tables_are_counted_over_all_variables(tiny):
    shared = Tables(tiny.root, tiny.transitions[:1], tiny.emissions[:1])
    whole = Tables(tiny.root, *(each.repeat(4, 0) for each in shared[1:]))
    one, all_ = (expected_counts(PARENTS, each, CELLS[:7]) for each in (shared, whole))
    np.testing.assert_allclose(one.transitions[0], all_.transitions.sum(0), rtol=1e-12)
    np.testing.assert_allclose(one.emissions[0], all_.emissions.sum(0), rtol=1e-12)
    assert HCLT(PARENTS, *shared).parameters == 1 + 2 + 4
    assert tiny.parameters == 1 + 3 * 2 + 4 * 2 * 2


def test_mutual_information_is_that_of_its_definition():
    samples = np.random.default_rng(0).integers(0, 4, (500, 3))
    samples[:, 2] = (samples[:, 0] + (samples[:, 1] > 2)) % 4
    found = mutual_information(samples, 4)
    for i, j in itertools.product(range(3), repeat=2):
        joint = np.zeros((4, 4))
        np.add.at(joint, (samples[:, i], samples[:, j]), 1 / 500)
        ratio = joint / np.outer(joint.sum(1), joint.sum(0))
        expected = (joint[joint > 0] * np.log(ratio[joint > 0])).sum()
        assert found[i, j] == pytest.approx(expected, abs=1e-6)
    halves = mutual_information(samples, 4, bins=2)
    assert halves[0, 0] == pytest.approx(math.log(2), abs=0.01)  # entropy of two equal halves


def test_the_spanning_tree_is_the_best_of_all():
    weights = np.random.default_rng(3).random((5, 5))
    weights += weights.T
    parents = spanning_tree(weights)
    total = sum(weights[v, p] for v, p in enumerate(parents) if p >= 0)
    best = 0.0
    for choice in itertools.product(range(5), repeat=4):  # parents of 1 … 4 in a tree rooted at 0
        ancestors = [0]
        for v in ancestors:
            ancestors += [c + 1 for c in range(4) if choice[c] == v and c + 1 not in ancestors]
        if len(ancestors) == 5:
            best = max(best, sum(weights[c + 1, choice[c]] for c in range(4)))
    assert total == pytest.approx(best)


def test_the_root_is_in_the_middle_of_a_longest_path():
    weights = np.zeros((9, 9))
    for v in range(8):
        weights[v, v + 1] = weights[v + 1, v] = 2
    parents = spanning_tree(weights)
    assert parents[4] == -1
    assert [len(level) for level in levels(parents)] == [1, 2, 2, 2, 2]


class Products(np.ndarray):
    """An array that counts its matrix products."""

    count = 0

    def __array_ufunc__(self, ufunc, method, *inputs, **settings):
        Products.count += ufunc is np.matmul
        plain = [np.asarray(each) for each in inputs]
        return getattr(ufunc, method)(*plain, **settings)


def test_conditionals_multiply_to_the_probability_with_two_products_an_edge(digits):
    train, test = digits
    model = HCLT.fit(train[:300], states=4, epochs=3, categories=17)
    tree = model.tree
    whole = HCLT(model.parents, tree.root, tree.transitions, tree.emissions)
    tree.transitions = tree.transitions.view(Products)
    total = np.zeros(20)

    def visit(variable, belief):
        symbols = test[:20, variable]
        total[:] += np.log2((belief * tree.emissions[variable].T[symbols]).sum(1))
        return symbols

    Products.count = 0
    tree.walk(20, visit, rounding=lambda values: values)
    assert 63 <= Products.count <= 2 * 63
    np.testing.assert_allclose(total, whole.log2_probability(test[:20]), rtol=1e-12)


def test_rounded_beliefs_cost_less_than_a_ten_thousandth(digits):
    model = HCLT.fit(digits[0][:400], states=8, epochs=5, categories=17)
    bits = 0.0

    def visit(variable, belief):
        nonlocal bits
        symbols = digits[1][:50, variable]
        frequencies = model.tree.interval(variable, belief, symbols)[1]
        bits -= np.log2(frequencies / TOTAL).sum()
        return symbols

    model.tree.walk(50, visit)
    assert bits == pytest.approx(-model.log2_probability(digits[1][:50]).sum(), rel=1e-4)


def test_both_sides_of_the_coder_have_the_same_integers(digits):
    """The encoder's sums of products, elementwise, and the decoder's, by BLAS."""
    model = HCLT.fit(digits[0][:400], states=8, epochs=3, categories=17)

    def visit(variable, belief):
        symbols = digits[1][:, variable]
        table = model.tree.cumulative(variable, belief)
        rows = np.arange(len(symbols))
        start, frequency = model.tree.interval(variable, belief, symbols)
        assert np.array_equal(start, table[rows, symbols])
        assert np.array_equal(start + frequency, table[rows, symbols + 1])
        assert np.array_equal(table[7:8], model.tree.cumulative(variable, belief[7:8]))
        return symbols

    model.tree.walk(len(digits[1]), visit)


def test_digits_come_back_in_about_the_bits_of_their_probability(digits):
    train, test = digits
    model = HCLT.fit(train, states=4, epochs=12, categories=17)
    data = model.encode(test)
    assert np.array_equal(model.decode(data), test)
    bits = -model.log2_probability(test).sum()
    assert bits < 8 * len(data) < 1.01 * bits + 64 + 8 * 29  # 29 bytes of header
    assert np.array_equal(model.decode(model.encode(test[:1])), test[:1])


@pytest.mark.slow
def test_digits_take_two_bits_a_pixel(digits):
    train, test = digits
    model = HCLT.fit(train, states=16, epochs=50, categories=17)
    data = model.encode(test)
    assert np.array_equal(model.decode(data), test)
    assert 8 * len(data) / test.size <= 2.05


def test_small_batches_learn_too(digits):
    settings = {"batch": 128, "full_epochs": 1, "first_rate": 0.5, "single": True}
    model = HCLT.fit(digits[0], states=4, epochs=4, categories=17, **settings)
    assert -model.log2_probability(digits[1]).mean() / 64 < 2.35  # 2.42 of independent pixels
    again = HCLT.fit(digits[0], states=4, epochs=4, categories=17, **settings)
    assert again.fingerprint == model.fingerprint


def test_one_variable_has_no_edges():
    samples = np.array([[0], [2], [2], [1]])
    model = HCLT.fit(samples, states=2, epochs=4)
    assert model.parents == (-1,)
    found = 2 ** model.log2_probability(np.arange(3)[:, None])
    np.testing.assert_allclose(found, [0.25, 0.25, 0.5], atol=0.06)
    assert np.array_equal(model.decode(model.encode(samples)), samples)


def test_damaged_or_foreign_data_is_refused(tiny):
    data = tiny.encode(CELLS)
    other = HCLT(PARENTS, tiny.root[::-1], tiny.transitions, tiny.emissions)
    with pytest.raises(DataError, match="another model"):
        other.decode(data)
    for damaged in (data[:-1], data[:30], data[:-1] + bytes([data[-1] ^ 1]), data + b"\0"):
        with pytest.raises(DataError, match="damaged"):
            tiny.decode(damaged)
    for foreign in (b"", b"HCLT", b"\x89PNG" * 10):
        with pytest.raises(DataError, match="not the output"):
            tiny.decode(foreign)


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        (np.zeros((2, 5), int), "5"),
        (np.full((2, 4), 3), "0 to 2"),
        (np.full((2, 4), -1), "0 to 2"),
        (np.zeros((2, 4)), "integers"),
        (np.zeros((0, 4), int), "integers"),
        (np.zeros(4, int), "integers"),
    ],
)
def test_wrong_samples_are_refused(tiny, samples, reason):
    for use in (tiny.encode, tiny.log2_probability):
        with pytest.raises(UsageError, match=reason):
            use(samples)


@pytest.mark.parametrize(
    "settings",
    [
        {"states": 0},
        {"states": 300},
        {"epochs": 0},
        {"batch": 0},
        {"pseudo_count": 0.0},
        {"first_rate": 0.1, "last_rate": 0.2},
    ],
)
def test_wrong_settings_are_refused(settings):
    with pytest.raises(UsageError, match="must"):
        EMConfig(**settings)


@pytest.mark.parametrize(
    "parents", [(), (0, -1, 3, 2), (-1, -1, 0, 0), (-1, 0, 9, 0), (1, 0, 0, 0)]
)
def test_parents_that_form_no_tree_are_refused(tiny, parents):
    with pytest.raises(DataError, match="no tree"):
        HCLT(parents, tiny.root, tiny.transitions, tiny.emissions)


def test_tables_of_a_tree_are_validated(tiny):
    tree = tiny.tree
    root, rows = np.array([0, 5, TOTAL]), np.array([[[0, 5, TOTAL], [0, 9, TOTAL]]])
    LatentTree(tree.parents, root, rows, rows)
    for wrong in (rows[..., ::-1], rows[:, :1], rows - 1, np.concatenate([rows] * 3)):
        with pytest.raises(DataError, match="tables"):
            LatentTree(tree.parents, root, wrong, rows)


def test_the_stream_of_a_tree_is_that_of_plain_tables_without_edges():
    """One variable and one state: the coder is that of a histogram."""
    table = np.array([[[0, TOTAL // 4, TOTAL]]])
    tree = LatentTree((-1,), np.array([0, TOTAL]), np.array([[[0, TOTAL]]]), table)
    symbols = np.array([0, 1, 1, 0, 1])
    found = tree.decode(encode_symbols(symbols, table[0], states=2), 5)
    assert found[:, 0].tolist() == symbols.tolist()


def test_learning_is_deterministic(digits):
    samples = digits[0][:50, :8]
    parents = spanning_tree(mutual_information(samples, 17))
    one, two = (learn(parents, samples, 17, EMConfig(states=2, epochs=2)) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
