"""Nearest sums of Kronecker products against dense SVDs of the rearranged block, in float64."""

import pytest
import torch
from best_scale import best_scale
from hypothesis import given, settings
from hypothesis import strategies as st

from smallfry.curvature import kronecker as kr
from smallfry.curvature import shared_map as sm
from smallfry.curvature.kronecker_svd import kfac_correction, nearest_terms
from smallfry.curvature.rows import Rows
from smallfry.curvature.terms import expanded, joined, terms_error
from smallfry.errors import UsageError

D = torch.float64
ONCE = st.tuples(
    st.integers(1, 2), st.integers(1, 2), st.integers(1, 9), st.just(1),
    st.integers(1, 5), st.integers(1, 5), st.integers(0, 10**6),
)  # fmt: skip
SHARED = st.tuples(
    st.integers(1, 2), st.integers(1, 2), st.integers(1, 6), st.integers(2, 4),
    st.integers(1, 5), st.integers(1, 5), st.integers(0, 10**6),
)  # fmt: skip
ANY = st.one_of(ONCE, SHARED)


def make(groups, draws, samples, uses, outputs, inputs, seed, dtype=D):
    random = torch.Generator().manual_seed(seed)
    return Rows(
        torch.randn(groups, samples, uses, inputs, dtype=D, generator=random).to(dtype),
        torch.randn(groups, draws, samples, uses, outputs, dtype=D, generator=random).to(dtype),
    )


def rearranged(rows):
    """Z(F) of every group, (groups, inputs², outputs²)."""
    w = torch.einsum("hknto,hnti->hknoi", rows.gradients, rows.inputs).flatten(1, 2)
    z = torch.einsum("hnoi,hnpj->hijop", w, w) / rows.samples
    return z.flatten(3).flatten(1, 2)


def of(terms, rank=None):
    """Z(Σ R ⊗ S)."""
    return torch.einsum(
        "khx,khy->hxy", terms.inputs[:rank].flatten(2), terms.outputs[:rank].flatten(2)
    )


def symmetric_values(z, inputs, outputs):
    """Singular values between symmetric matrices."""
    pi, po = (
        (torch.eye(n * n, dtype=D) + torch.eye(n * n, dtype=D).reshape(n, n, n * n).transpose(0, 1)
         .reshape(n * n, n * n)) / 2
        for n in (inputs, outputs)
    )  # fmt: skip
    return torch.linalg.svdvals(pi @ z @ po)


def check_semidefinite(matrix):
    values = torch.linalg.eigvalsh(matrix)
    assert (values >= -1e-10 * values.abs().amax(-1, keepdim=True).clamp_min(1e-300)).all()


@settings(deadline=None, max_examples=60)
@given(ANY, st.integers(1, 4), st.sampled_from(["deflation", "lanczos", "full"]))
def test_values_and_errors_are_those_of_a_dense_svd(sizes, rank, solver):
    rows = make(*sizes)
    if sizes[3] > 1 and solver == "full":
        solver = "lanczos"
    terms = nearest_terms(rows, rank, solver=solver)
    z = rearranged(rows)
    values = symmetric_values(z, sizes[5], sizes[4])
    for h in range(sizes[0]):
        exact, top = values[h][:rank], values[h, 0]
        mine = terms.values[h, : len(exact)]
        assert (mine - exact).abs().max() <= 1e-12 * top + 1e-8 * (exact < 1e-6 * top).any() * top
        assert (terms.values[h, len(exact) :] <= 1e-7 * top).all()
        missed = torch.linalg.norm(z[h] - of(terms)[h]) ** 2
        best = torch.linalg.norm(z[h]) ** 2 - (exact**2).sum()
        assert float(missed) == pytest.approx(float(best), abs=1e-12 * float(top) ** 2)
    torch.testing.assert_close(terms.squared_norm, (z**2).sum((1, 2)))
    true = float(torch.linalg.norm(z - of(terms)) / torch.linalg.norm(z))
    assert terms.error == pytest.approx(true, abs=1e-6)
    assert terms_error(rows, terms) == pytest.approx(true, abs=1e-6)
    torch.testing.assert_close(terms.inputs, terms.inputs.transpose(2, 3))
    torch.testing.assert_close(terms.outputs, terms.outputs.transpose(2, 3))
    check_semidefinite(terms.inputs[0])
    check_semidefinite(terms.outputs[0])
    assert (terms.inputs.diagonal(dim1=2, dim2=3).sum(2) >= -1e-12).all()
    norms = terms.inputs.flatten(2).norm(dim=2).T
    large = terms.values > 1e-6 * terms.values[:, :1]
    torch.testing.assert_close(norms[large] ** 2, terms.values[large])


@settings(deadline=None, max_examples=40)
@given(ANY)
def test_errors_are_ordered_as_the_methods_are(sizes):
    rows = make(1, *sizes[1:])
    a, g = kr.input_factor(rows), kr.output_factor(rows)
    kfac = kr.kronecker_error(rows, a, g)
    scaled = kr.kronecker_error(rows, a * best_scale(rows, a, g), g)
    errors = [nearest_terms(rows, rank).error for rank in (1, 2, 3)]
    correction = kfac_correction(rows)
    both = torch.linalg.norm(
        rearranged(rows) - a.reshape(1, -1, 1) * g.reshape(1, 1, -1) - of(correction)
    ) / torch.linalg.norm(rearranged(rows))
    slack = 1e-6
    assert errors[2] - slack <= errors[1] <= errors[0] + slack
    assert errors[0] <= scaled + slack
    assert scaled <= kfac + slack
    assert errors[1] - slack <= float(both) <= kfac + slack


@settings(deadline=None, max_examples=30)
@given(ANY, st.integers(1, 3))
def test_deflations_first_pair_is_kpsvds_and_lanczos_agrees_with_it(sizes, rank):
    rows = make(*sizes)
    one, some = nearest_terms(rows, 1), nearest_terms(rows, rank)
    torch.testing.assert_close(one.inputs[0], some.inputs[0], rtol=0, atol=0)
    torch.testing.assert_close(one.outputs[0], some.outputs[0], rtol=0, atol=0)
    lanczos = nearest_terms(rows, rank, solver="lanczos")
    top = float(some.values.max())
    torch.testing.assert_close(of(lanczos), of(some), rtol=0, atol=1e-7 * top + 1e-300)


@settings(deadline=None, max_examples=30)
@given(ANY, st.floats(0.1, 10.0))
def test_values_are_unchanged_by_turns_of_basis_order_and_copies_of_samples(sizes, scale):
    rows = make(*sizes)
    values = nearest_terms(rows, 3).values
    random = torch.Generator().manual_seed(1)

    def turn(n):
        return torch.linalg.qr(torch.randn(n, n, dtype=D, generator=random)).Q

    turned = Rows(rows.inputs @ turn(sizes[5]), rows.gradients @ turn(sizes[4]))
    order = torch.randperm(sizes[2], generator=random)
    permuted = Rows(rows.inputs[:, order], rows.gradients[:, :, order])
    scaled = Rows(scale * rows.inputs, rows.gradients)
    close = {"rtol": 1e-9, "atol": 1e-7 * float(values.max())}
    for other in (turned, permuted, joined([rows, rows])):
        torch.testing.assert_close(nearest_terms(other, 3).values, values, **close)
    torch.testing.assert_close(nearest_terms(scaled, 3).values / scale**2, values, **close)


def test_kfacs_correction_is_the_centred_pair_and_vanishes_for_a_product_design():
    rows = make(2, 2, 7, 1, 3, 4, 0)
    a, g = kr.input_factor(rows), kr.output_factor(rows)
    rest = rearranged(rows) - a.flatten(1)[:, :, None] * g.flatten(1)[:, None]
    for solver in ("deflation", "lanczos", "full"):
        terms = kfac_correction(rows, 2, solver=solver)
        torch.testing.assert_close(terms.values, torch.linalg.svdvals(rest)[:, :2])
        best = torch.linalg.svdvals(rest)[:, 2:].square().sum()
        assert float(((rest - of(terms)) ** 2).sum()) == pytest.approx(float(best))
        torch.testing.assert_close(terms.squared_norm, (rest**2).sum((1, 2)))
    inputs = rows.inputs[:1].repeat_interleave(5, 1)
    gradients = rows.gradients[:1, :1, :5].repeat(1, 1, 7, 1, 1)
    product = Rows(inputs, gradients)  # every input with every gradient
    found = kfac_correction(product)
    top = nearest_terms(product).values
    assert found.values.abs().max() <= 1e-7 * top.max()
    a, g = kr.input_factor(product), kr.output_factor(product)
    torch.testing.assert_close(
        of(nearest_terms(product)), a.reshape(1, -1, 1) * g.reshape(1, 1, -1)
    )


@pytest.mark.parametrize("uses", [1, 3])
def test_the_correction_of_running_factors_is_that_of_the_running_fisher(uses):
    first, second = make(1, 1, 5, uses, 3, 4, 0), make(1, 1, 6, uses, 3, 4, 1)
    a, g = kr.input_factor(first), kr.output_factor(first)
    before = kfac_correction(first, 12)  # complete
    assert before.error < 1e-6 or uses > 1
    terms = kfac_correction(second, 2, a=a, g=g, stored=before, keep=0.7)
    a = 0.7 * a + 0.3 * kr.input_factor(second)
    g = 0.7 * g + 0.3 * kr.output_factor(second)
    fisher = 0.7 * rearranged(first) + 0.3 * rearranged(second)
    rest = fisher - a.reshape(1, -1, 1) * g.reshape(1, 1, -1)
    rest = rest if uses == 1 else symmetric(rest, 4, 3)
    torch.testing.assert_close(terms.values, torch.linalg.svdvals(rest)[:, :2])
    best = torch.linalg.svdvals(rest)[:, 2:].square().sum()
    assert float(((rest - of(terms)) ** 2).sum()) == pytest.approx(float(best))


def symmetric(z, inputs, outputs):
    z = z.reshape(-1, inputs, inputs, outputs, outputs)
    z = (z + z.transpose(1, 2)) / 2
    z = (z + z.transpose(3, 4)) / 2
    return z.reshape(len(z), inputs**2, outputs**2)


@pytest.mark.parametrize("uses", [1, 3])
@pytest.mark.parametrize("solver", ["deflation", "lanczos"])
def test_the_running_operator_is_the_explicit_average_when_enough_terms_are_kept(uses, solver):
    stored, explicit = None, 0
    for number in range(5):
        rows = make(2, 1, 4, uses, 3, 3, number)
        keep = min(1 - 1 / (number + 1), 0.6)
        stored = nearest_terms(rows, 6, stored=stored, keep=keep, solver=solver)
        explicit = keep * explicit + (1 - keep) * symmetric(rearranged(rows), 3, 3)
        torch.testing.assert_close(of(stored), explicit, rtol=1e-6, atol=1e-7)
        check_semidefinite(stored.inputs[0])
        check_semidefinite(stored.outputs[0])
    constant = nearest_terms(rows, 9)
    again = nearest_terms(rows, 9, stored=constant, keep=0.9)
    torch.testing.assert_close(of(again), of(constant), rtol=1e-6, atol=1e-7)


def test_each_running_truncation_is_optimal_for_what_was_stored_and_the_batch():
    for uses in (1, 2):
        stored = nearest_terms(make(1, 1, 6, uses, 4, 5, 0), 2)
        rows = make(1, 1, 6, uses, 4, 5, 1)
        target = 0.8 * of(stored) + 0.2 * symmetric(rearranged(rows), 5, 4)
        terms = nearest_terms(rows, 2, stored=stored, keep=0.8)
        values = torch.linalg.svdvals(target)
        torch.testing.assert_close(terms.values, values[:, :2])
        best = values[:, 2:].square().sum()
        assert float(((target - of(terms)) ** 2).sum()) == pytest.approx(float(best))


@pytest.mark.parametrize("seed", range(12))
def test_few_samples_leave_the_leading_pair_positive_whatever_was_stored(seed):
    """Two stored terms are not a Fisher: its first pair is semi-definite only nearly."""
    stored = None
    for number in range(8):
        rows = make(1, 1, 3, 1, 4, 5, 100 * seed + number)
        stored = nearest_terms(rows, 2, stored=stored, keep=min(1 - 1 / (number + 1), 0.9))
        for matrix in (stored.inputs[0], stored.outputs[0]):
            values = torch.linalg.eigvalsh(matrix)
            assert values.min() >= -0.05 * values.max()


def test_the_second_pair_is_symmetric_where_an_antisymmetric_one_is_nearer():
    j = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=D)
    w = torch.stack([torch.eye(2, dtype=D), 0.95 * j])
    rows = Rows(torch.eye(2, dtype=D).expand(1, 2, 2, 2), w.transpose(1, 2)[None, None])
    z = rearranged(rows)
    assert symmetric_values(z, 2, 2)[0, 1] < torch.linalg.svdvals(z)[0, 1] - 0.1
    for solver in ("deflation", "lanczos"):
        terms = nearest_terms(rows, 3, solver=solver)
        torch.testing.assert_close(
            terms.values, symmetric_values(z, 2, 2)[:, :3], atol=1e-9, rtol=0
        )
        torch.testing.assert_close(terms.inputs, terms.inputs.transpose(2, 3))


def test_uses_that_all_see_the_same_count_squared_and_expanded_once_each():
    once = make(1, 1, 6, 1, 3, 4, 0)
    often = Rows(once.inputs.repeat(1, 1, 3, 1), once.gradients.repeat(1, 1, 1, 3, 1))
    one, exact, apart = (nearest_terms(r, 2) for r in (once, often, expanded([often])))
    torch.testing.assert_close(exact.values, 9 * one.values)
    torch.testing.assert_close(apart.values, 3 * one.values)


def test_both_forms_of_the_map_agree(monkeypatch):
    rows = make(2, 2, 5, 30, 4, 6, 0)
    kept = torch.tensor([0.5, 0.5], dtype=D)
    stored = nearest_terms(make(2, 1, 5, 1, 4, 6, 1), 2).products
    formed = sm.shared_map(rows, 0.5, stored, kept)
    monkeypatch.setattr(sm, "_FORMED", 0)
    monkeypatch.setattr(sm, "_PAIRED", 1800)
    factored = sm.shared_map(rows, 0.5, stored, kept)
    assert formed.gradients is not None
    assert factored.gradients is None
    v = torch.randn(2, 3, 4, 4, dtype=D)
    v = (v + v.transpose(2, 3)).flatten(2)
    u = torch.randn(2, 3, 6, 6, dtype=D)
    u = (u + u.transpose(2, 3)).flatten(2)
    torch.testing.assert_close(formed.apply(v), factored.apply(v))
    torch.testing.assert_close(formed.adjoint(u), factored.adjoint(u))
    torch.testing.assert_close(formed.squared_norm(), factored.squared_norm())
    pairing = (formed.apply(v) * u).sum()
    torch.testing.assert_close(pairing, (formed.adjoint(u) * v).sum())


def test_repeated_values_are_all_found_and_the_first_pair_stays_positive():
    eye = torch.eye(4, dtype=D)
    rows = Rows(eye[None, :, None], eye[None, None, :, None])  # four orthogonal samples
    for solver in ("deflation", "lanczos", "full"):
        terms = nearest_terms(rows, 4, solver=solver)
        torch.testing.assert_close(terms.values, torch.full((1, 4), 0.25, dtype=D))
        torch.testing.assert_close(of(terms), rearranged(rows))
        check_semidefinite(terms.inputs[0])


@pytest.mark.parametrize("uses", [1, 2])
@pytest.mark.parametrize("solver", ["deflation", "lanczos"])
def test_nothing_seen_gives_zeros_and_not_nan(uses, solver):
    rows = make(1, 1, 3, uses, 2, 4, 0)
    for dead in (Rows(rows.inputs * 0, rows.gradients), Rows(rows.inputs, rows.gradients * 0)):
        terms = nearest_terms(dead, 2, solver=solver)
        assert of(terms).abs().max() == 0
        assert terms.error == 0
        assert (kfac_correction(dead, solver=solver).values == 0).all()
        alive = nearest_terms(rows, 2, stored=terms, keep=0.5)
        torch.testing.assert_close(alive.values * 2, nearest_terms(rows, 2).values)
        faded = nearest_terms(dead, 2, stored=alive, keep=0.5)
        torch.testing.assert_close(faded.values * 2, alive.values)


@pytest.mark.parametrize("uses", [1, 2])
def test_one_sample_used_once_is_one_product(uses):
    rows = make(1, 1, 1, uses, 3, 4, 0)
    error = nearest_terms(rows, 1).error
    assert (error < 1e-6) == (uses == 1)


@pytest.mark.parametrize("uses", [1, 2])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_that_are_not_finite_are_refused(uses, bad):
    rows = make(1, 1, 3, uses, 2, 4, 0)
    rows.inputs[0, 1, 0, 2] = bad
    with pytest.raises(kr.NotFiniteError, match="not finite"):
        nearest_terms(rows)
    with pytest.raises(kr.NotFiniteError, match="not finite"):
        kfac_correction(rows)


def test_the_full_solver_is_refused_for_shared_weights():
    with pytest.raises(UsageError, match="one use"):
        nearest_terms(make(1, 1, 3, 2, 2, 4, 0), solver="full")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("uses", [1, 3])
def test_lower_precision_is_as_good_as_its_rows(dtype, uses):
    rows = make(1, 1, 24, uses, 150, 410, 0, dtype)
    low, high = nearest_terms(rows, 2), nearest_terms(rows.double(), 2)
    assert low.inputs.dtype == torch.float32
    torch.testing.assert_close(low.values, high.values, rtol=1e-5, atol=0)
    assert low.error == pytest.approx(high.error, rel=1e-5)
    assert terms_error(
        rows.double(), low._replace(inputs=low.inputs.double(), outputs=low.outputs.double())
    ) == pytest.approx(high.error, rel=1e-5)


def test_parts_of_a_batch_are_the_batch():
    rows = make(2, 2, 6, 3, 3, 4, 0)
    first = Rows(rows.inputs[:, :2], rows.gradients[:, :, :2])
    second = Rows(rows.inputs[:, 2:], rows.gradients[:, :, 2:])
    whole = joined([first, second])
    assert torch.equal(whole.inputs, rows.inputs)
    assert torch.equal(whole.gradients, rows.gradients)
    uneven = make(2, 1, 4, 2, 3, 4, 1)
    both = rearranged(joined([rows, uneven]))
    torch.testing.assert_close(both, 0.6 * rearranged(rows) + 0.4 * rearranged(uneven))


@pytest.mark.parametrize("kept", [False, True])
def test_the_quick_search_for_one_product_finds_that_of_the_careful_one(kept):
    rows = make(1, 2, 30, 1, 6, 7, 1)
    stored = nearest_terms(make(1, 1, 20, 1, 6, 7, 2)) if kept else None
    quick = nearest_terms(rows, stored=stored, keep=0.6 if kept else 0.0, tolerance=1e-7)
    careful = nearest_terms(rows, stored=stored, keep=0.6 if kept else 0.0)
    assert quick.error == pytest.approx(careful.error, rel=1e-9)
    for found, expected in zip(quick.products, careful.products, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_the_quick_search_gives_up_where_values_are_close():
    # two samples in different coordinates are two products of almost the same size
    rows = make(1, 1, 2, 1, 3, 3, 0)
    rows.inputs.zero_()
    rows.gradients.zero_()
    for sample, size in ((0, 1.0), (1, 1.001)):
        rows.inputs[0, sample, 0, sample] = rows.gradients[0, 0, sample, 0, sample] = size
    found = nearest_terms(rows, tolerance=1e-7)
    assert float(found.values[0, 0]) == pytest.approx(1.001**4 / 2, rel=1e-9)
    assert float(found.inputs[0, 0, 0, 0]) == pytest.approx(0, abs=1e-6)
