"""Embeddings: diagonal input factors, tied weights, padding, positions that all samples share."""

import copy
import math

import pytest
import torch
from dense_fisher import dense_fisher, dense_of, inverted_fisher, observe
from torch import nn
from torch.nn import functional as F

from smallfry.curvature import Categorical, Rows, Taps, cover
from smallfry.curvature.one_hot import (
    DiagonalProduct,
    frequencies,
    nearest_product,
    row_sums,
    second_moments,
    spelled_out,
)
from smallfry.errors import UsageError
from smallfry.optim import EKFAC, KFAC, KPSVD, SNGD, Deflation, ExactNG, KFACCorrected, TwoLevel

D = torch.float64
EXACT = {"rtol": 1e-10, "atol": 1e-13}
METHODS = (KFAC, EKFAC, KPSVD, Deflation, KFACCorrected, SNGD, ExactNG, TwoLevel)


class Text(nn.Module):
    """Words, perhaps places, mixed into one prediction or one for each word."""

    def __init__(self, words=7, width=4, places="", tied=False, each=False, **settings):
        super().__init__()
        self.embedding, self.places = nn.Embedding(words, width, **settings), places
        self.position = nn.Embedding(5, width) if places else None
        self.mix, self.each = nn.Linear(width, width), each
        self.head = nn.Linear(width, words)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, words):
        x = self.embedding(words)
        if self.position is not None:
            where = torch.arange(words.shape[1])
            whole = where.expand(*words.shape)
            x = x + self.position({"one row": where[None], "bare": where}.get(self.places, whole))
        x = torch.tanh(self.mix(x))
        x = torch.tanh(x + x.mean(1, keepdim=True) ** 2)
        return self.head(x if self.each else x.sum(1))


class Sequences(nn.Module):
    """The same with what was said of each word side by side, one categorical for each."""

    def __init__(self, text):
        super().__init__()
        self.text = text

    def forward(self, words):
        return self.text(words).movedim(-1, 1)


def words_of(samples=6, length=3, words=7):
    torch.manual_seed(5)
    return torch.randint(words, (samples, length))


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("settings", [{}, {"padding_idx": 2}])
def test_the_block_is_the_exact_fisher(length, settings):
    torch.manual_seed(1)
    model, words = Text(**settings).to(D), words_of(8, length)
    if settings:
        assert (words == 2).any()
    coverage = cover(model)
    assert not coverage.uncovered
    block = coverage.blocks[0]
    assert (block.name, block.shape, block.one_hot) == ("embedding.weight", (1, 4, 7), True)
    seen = observe(model, coverage, words, Categorical())
    dense = dense_fisher(model, words, "categorical", block.parameters)
    torch.testing.assert_close(dense_of(block, seen.rows(block, D)), dense, **EXACT)
    numbered = seen.rows(block, D, numbered=True)
    assert numbered.inputs.shape == (1, 8, length, 1)
    torch.testing.assert_close(dense_of(block, spelled_out(numbered, 7)), dense, **EXACT)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("settings", [{}, {"padding_idx": 2}])
def test_a_weight_tied_to_the_head_has_the_exact_fisher(settings, bias):
    torch.manual_seed(1)
    model, words = Text(tied=True, **settings).to(D), words_of(5)
    if not bias:
        model.head.bias = None
    coverage = cover(model)
    block = coverage.blocks[0]
    assert list(block.layers) == ["head", "embedding"]
    assert block.shape == (1, 7, 4 + bias)
    # each column of the Hessian's root is one draw, whose rows are known one by one
    total = 0.0
    names = list(block.parameters)
    for column in range(7):
        seen = observe(model, coverage, words, Categorical())
        seen.draws = [seen.draws[column]]
        total = total + dense_of(block, seen.rows(block, D))
    if "padding_idx" in settings:  # PyTorch leaves out the embedding's part alone
        dense = 0.0
        for word in words:
            dense = dense + _fisher_by_backward(model, word[None], names) / len(words)
    else:
        dense = dense_fisher(model, words, "categorical", names)
    torch.testing.assert_close(total, dense, **EXACT)


def _fisher_by_backward(model, word, names):
    parameters = [dict(model.named_parameters())[name] for name in names]
    z = model(word)[0]
    jacobian = torch.stack(
        [torch.cat([g.reshape(-1) for g in torch.autograd.grad(one, parameters, retain_graph=True)])
         for one in z]
    )  # fmt: skip
    p = z.detach().softmax(0)
    return jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian


def test_a_tied_embedding_has_inputs_as_large_as_the_heads_and_the_trace_is_exact():
    torch.manual_seed(1)
    model, words = Text(tied=True, each=True).to(D), words_of(5)
    coverage, block = cover(model), cover(model).blocks[0]
    taps = Taps((block,))
    assert len(coverage.blocks) == 2
    taps.open()
    z = model(words)
    seen = observe_one(taps, z, len(words))
    rows = seen.rows(block, D)
    head, tied = rows.inputs[0, :, 3:, :4], rows.inputs[0, :, :3, :4]
    ones = rows.inputs[0, :, 3:, 4]
    torch.testing.assert_close((head**2).sum() + (ones**2).sum(), (tied**2).sum())
    a, g = (rows.inputs[0] ** 2).sum(2), (rows.gradients[0, 0] ** 2).sum(2)
    assert float(a.mean() * g.sum()) == pytest.approx(
        float(sum(a[:, own].mean() * g[:, own].sum() for own in (slice(0, 3), slice(3, 6)))), 1e-12
    )


def observe_one(taps, z, samples):
    from smallfry.curvature.taps import Observation

    seen = Observation(samples, taps.close())
    edges = [call.edge for call in seen.calls]
    seen.draws = [torch.autograd.grad(z, edges, torch.randn_like(z), retain_graph=True)]
    return seen


def test_a_frozen_tied_weight_leaves_the_heads_bias():
    model = Text(tied=True).to(D)
    model.head.weight.requires_grad_(False)
    block = next(b for b in cover(model).blocks if "head.bias" in b.parameters)
    assert list(block.layers) == ["head"]
    words = words_of(5)
    seen = observe(model, cover(model), words, Categorical())
    found = dense_of(seen.calls[-1].block, seen.rows(seen.calls[-1].block, D))
    torch.testing.assert_close(
        found, dense_fisher(model, words, "categorical", ["head.bias"]), **EXACT
    )


@pytest.mark.parametrize(
    "settings", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}]
)
def test_embeddings_with_other_gradients_are_left_out(settings):
    assert "has other gradients" in cover(nn.Embedding(3, 2, **settings)).uncovered["weight"]


def test_an_embedding_of_fewer_rows_than_features_is_left_out_unless_it_is_tied():
    assert "no vocabulary" in cover(nn.Embedding(3, 4)).uncovered["weight"]
    assert not cover(nn.Embedding(4, 4)).uncovered
    assert not cover(Text(words=3, width=4, tied=True)).uncovered


@pytest.mark.filterwarnings("ignore:only 36%")
def test_a_tied_weight_is_left_out_where_its_rows_are_not_known():
    model = Text(tied=True)
    assert "at once" in cover(model, tied=False).uncovered["embedding.weight"]
    assert set(KFAC(model).uncovered) == set()
    for settings in ({"fisher": "exact"}, {"draws": 2}):
        assert set(KFAC(model, **settings).uncovered) == {"embedding.weight", "head.bias"}
    assert set(SNGD(model).uncovered) == {"embedding.weight", "head.bias"}


# Factors, against dense ones


def rows_by_number(samples=6, uses=4, words=5, width=3, draws=2):
    torch.manual_seed(2)
    numbers = torch.randint(-1, words, (1, samples, uses, 1)).to(D)
    gradients = torch.randn(1, draws, samples, uses, width, dtype=D) * (numbers >= 0)[:, None]
    return Rows(numbers, gradients)


def blocks_of(rows, words, whole):
    """F_ii of each row, dense."""
    inputs = spelled_out(rows, words).inputs
    if whole:
        w = torch.einsum("hknto,hnti->knoi", rows.gradients, inputs).flatten(0, 1)
    else:
        w = torch.einsum("hknto,hnti->kntoi", rows.gradients, inputs).flatten(0, 2)
    return torch.einsum("noi,npi->iop", w, w) / rows.samples


@pytest.mark.parametrize("whole", [True, False])
def test_sums_of_rows_are_the_diagonal_blocks(whole):
    rows = rows_by_number()
    numbers, h = row_sums(rows, 5, whole)
    dense = blocks_of(rows, 5, whole)
    for i in range(5):
        own = h[numbers == i]
        torch.testing.assert_close(own.T @ own / rows.samples, dense[i], **EXACT)
    basis = torch.linalg.qr(torch.randn(1, 3, 3, dtype=D)).Q
    expected = torch.einsum("oj,iop,pj->ji", basis[0], dense, basis[0])
    found = second_moments(row_sums(rows, 5, whole), basis, 5, rows.samples)
    torch.testing.assert_close(found[0], expected, **EXACT)


@pytest.mark.parametrize("weighted", [False, True])
def test_frequencies_are_the_diagonal_of_the_input_factor(weighted):
    rows = rows_by_number()
    if weighted:
        rows = rows._replace(weights=torch.rand(6, 4, dtype=D))
    inputs = spelled_out(rows, 5).inputs.flatten(1, 2)
    weights = torch.ones(24, dtype=D) if rows.weights is None else rows.weights.flatten()
    a = torch.einsum("hri,hrj,r->ij", inputs, inputs, weights) / 24
    torch.testing.assert_close(torch.diag(frequencies(rows, 5)[0]), a, **EXACT)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("keep", [0.0, 0.6])
def test_the_nearest_product_is_the_leading_singular_pair(whole, keep):
    rows = rows_by_number()
    dense, stored = (1 - keep) * blocks_of(rows, 5, whole), None
    if keep:
        root = torch.randn(3, 3, dtype=D)
        stored = DiagonalProduct(torch.rand(1, 5, dtype=D), (root @ root.T)[None])
        dense = dense + keep * stored.inputs[0][:, None, None] * stored.outputs
    found = nearest_product(row_sums(rows, 5, whole), 5, rows.samples, stored, keep)
    u, values, vh = torch.linalg.svd(dense.reshape(5, 9))
    best = values[0] * torch.outer(u[:, 0], vh[0])
    torch.testing.assert_close(torch.outer(found.inputs[0], found.outputs.flatten()), best, **EXACT)
    assert (found.inputs >= 0).all()


def test_nothing_is_nearest_to_nothing():
    rows = rows_by_number()
    none = rows._replace(gradients=0 * rows.gradients)
    found = nearest_product(row_sums(none, 5, True), 5, 6)
    assert float(found.inputs.abs().sum()) == 0
    assert found.outputs.isfinite().all()


# In optimizers


def optimizer_after(method, model, words, targets, **settings):
    optimizer = method(model, lr=0.1, check="error", **settings)
    optimizer.zero_grad()
    F.cross_entropy(model(words), targets).backward()
    optimizer.step()
    return optimizer


def test_kfac_inverts_frequencies_times_g_damped_apart():
    torch.manual_seed(1)
    model, words = Text().to(D), words_of(8)
    optimizer = optimizer_after(KFAC, model, words, words[:, 0])
    block = optimizer.blocks[0]
    state, damping = optimizer.curvature[block.name], optimizer.lambdas[block.name]
    p = torch.bincount(words.flatten(), minlength=7).to(D) / words.numel()
    torch.testing.assert_close(state["p"][0], p, **EXACT)
    a, g = optimizer.approximation.factors(state)
    pi = ((a[0].trace() / 7) / (g[0].trace() / 4)) ** 0.5
    damped = torch.kron(
        a[0] + pi * math.sqrt(damping) * torch.eye(7, dtype=D),
        g[0] + math.sqrt(damping) / pi * torch.eye(4, dtype=D),
    )
    m = torch.randn(1, 4, 7, dtype=D)
    found = optimizer.approximation.apply(block, state, m, damping)
    expected = torch.linalg.solve(damped, m[0].T.reshape(-1)).reshape(7, 4).T
    torch.testing.assert_close(found[0], expected, **EXACT)
    assert optimizer.approximation.trace(block, state) == pytest.approx(
        float(a[0].trace() * g[0].trace())
    )


@pytest.mark.parametrize("length", [1, 3])
def test_ekfac_has_the_diagonal_of_the_exact_fisher(length):
    torch.manual_seed(1)
    model, words = Text().to(D), words_of(8, length)
    dense = dense_fisher(model, words, "categorical", ["embedding.weight"])
    optimizer = optimizer_after(EKFAC, model, words, words[:, 0], fisher="exact")
    block = optimizer.blocks[0]
    basis = torch.kron(torch.eye(7, dtype=D), optimizer.curvature[block.name]["qg"][0].contiguous())
    expected = basis @ torch.diag((basis.T @ dense @ basis).diagonal()) @ basis.T
    torch.testing.assert_close(inverted_fisher(optimizer, block), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", [KPSVD, Deflation, KFACCorrected])
def test_the_others_have_the_nearest_product(method):
    torch.manual_seed(1)
    model, words = Text().to(D), words_of(8)
    dense = dense_fisher(model, words, "categorical", ["embedding.weight"])
    optimizer = optimizer_after(method, model, words, words[:, 0], fisher="exact")
    block = optimizer.blocks[0]
    a, g = optimizer.approximation.factors(optimizer.curvature[block.name])
    own = torch.stack([dense[4 * i : 4 * i + 4, 4 * i : 4 * i + 4] for i in range(7)])
    u, values, vh = torch.linalg.svd(own.reshape(7, 16))
    best = values[0] * torch.outer(u[:, 0], vh[0])
    torch.testing.assert_close(torch.outer(a[0].diagonal(), g[0].flatten()), best, **EXACT)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings("ignore:only")
def test_every_method_trains_a_text_model(method, tied):
    torch.manual_seed(0)
    text, words = Text(9, 5, "bare", tied, each=True), words_of(16, 4, 9)
    model = Sequences(text)
    targets = (words + 1) % 9
    optimizer, losses = method(model, lr=0.1, statistics_every=4), []
    for _ in range(34):
        loss = F.cross_entropy(model(words), targets) * 4
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    left = {"text.embedding.weight", "text.head.bias"} if tied and method is SNGD else set()
    assert set(optimizer.uncovered) == left
    assert losses[-1] < 0.8 * losses[0]
    assert optimizer.diagnostics().blocks
    assert "text.position" in str(optimizer.summary())
    assert "text.embedding" in str(optimizer.summary())


@pytest.mark.slow
@pytest.mark.parametrize("places", ["one row", "bare", "expanded"])
@pytest.mark.parametrize("samples", [4, 5])  # positions are 4: as many as samples, or not
@pytest.mark.parametrize("method", [KFAC, EKFAC])
def test_positions_have_the_same_fisher_however_they_are_called(method, places, samples):
    """On average over draws: gradients of rows that all samples share come added up."""
    torch.manual_seed(3)
    model, words = Text(places=places).to(D), words_of(samples, 4)
    other = Text(places="expanded").to(D)
    other.load_state_dict(model.state_dict())
    dense = dense_fisher(other, words, "categorical", ["position.weight"])
    optimizer = method(model, draws=4000)
    F.cross_entropy(model(words), words[:, 0]).backward()
    (seen,) = optimizer.observer.take()
    seen.put_together()
    block = next(b for b in optimizer.blocks if b.name == "position.weight")
    rows = seen.rows(block, D)
    found = dense_of(block, rows)
    assert float(found.trace() / dense.trace()) == pytest.approx(1, abs=0.1)
    a = rows.weights if rows.weights is not None else torch.ones(rows.inputs.shape[1:3], dtype=D)
    counted = (rows.inputs[0] * a[..., None]).sum((0, 1)) / a.sum()
    torch.testing.assert_close(counted, torch.tensor([0.25] * 4 + [0.0], dtype=D))
    if method is EKFAC:  # which needs to know what belongs to one sample
        assert float((found - dense).norm() / dense.norm()) < 0.1


@pytest.mark.slow
def test_columns_of_the_exact_fisher_have_random_signs_where_samples_share_rows():
    torch.manual_seed(3)
    model, words = Text(places="one row").to(D), words_of(5, 4)
    other = Text(places="expanded").to(D)
    other.load_state_dict(model.state_dict())
    dense = dense_fisher(other, words, "categorical", ["position.weight"])
    optimizer, total, count = KFAC(model, fisher="exact", statistics_every=1), 0.0, 600
    block = next(b for b in optimizer.blocks if b.name == "position.weight")
    for step in range(count):
        optimizer.counters["steps"] = step  # other signs in each
        F.cross_entropy(model(words), words[:, 0]).backward()
        (seen,) = optimizer.observer.take()
        seen.put_together()
        total = total + dense_of(block, seen.rows(block, D)) / count
    assert float((total - dense).norm() / dense.norm()) < 0.1


def test_an_input_overwritten_later_is_refused_by_name():
    class Overwriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(4, 3)

        def forward(self, words):
            words = words.clone()
            x = self.embedding(words)
            words += 1
            return x

    model, words = Overwriting(), torch.tensor([0, 1])
    coverage = cover(model)
    seen = observe(model, coverage, words, Categorical())
    with pytest.raises(UsageError, match="input of layer 'embedding' was overwritten"):
        seen.rows(coverage.blocks[0], torch.float32)


def test_unfrozen_embeddings_and_resumption():
    torch.manual_seed(0)
    words = words_of(8, 3)

    def build():
        torch.manual_seed(1)
        model = Text()
        model.embedding.weight.requires_grad_(False)
        return model, KFAC(model, statistics_every=2, burn_in=1)

    def train(model, optimizer, steps):
        for _ in range(steps):
            loss = F.cross_entropy(model(words), words[:, 0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    model, optimizer = build()
    train(model, optimizer, 2)
    model.embedding.weight.requires_grad_(True)
    optimizer.add_param_group({"params": [model.embedding.weight]})
    train(model, optimizer, 3)
    assert "p" in optimizer.curvature["embedding.weight"]
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    train(model, optimizer, 4)
    again, resumed = build()
    again.embedding.weight.requires_grad_(True)
    resumed.add_param_group({"params": [again.embedding.weight]})
    again.load_state_dict(weights)
    resumed.load_state_dict(saved)
    train(again, resumed, 4)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
