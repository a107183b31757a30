"""The coarse level against dense linear algebra on the whole network's Fisher, in float64."""

import pytest
import torch
from dense_fisher import observe
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from smallfry.curvature import Categorical, cover
from smallfry.curvature import coarse as co
from smallfry.curvature import kronecker as kr
from smallfry.curvature.rows import Rows

D = torch.float64
SIZES = st.tuples(
    st.integers(1, 2), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3),
    st.integers(0, 10**6), st.floats(1e-2, 10.0),
)  # fmt: skip


class Problem:
    """A network of three blocks: its dense damped Fisher, a gradient and a fine solution."""

    def __init__(self, draws, samples, uses, width, seed, damping):
        random = torch.Generator().manual_seed(seed)
        self.rows = {}
        for key, groups in (("a", 1), ("b", 2), ("c", 1)):
            size = (width, width + 1) if key == "a" else (width + 1, width)
            self.rows[key] = Rows(
                torch.randn(groups, samples, uses, size[0], dtype=D, generator=random),
                torch.randn(groups, draws, samples, uses, size[1], dtype=D, generator=random),
            )
        self.setup(damping, random)

    def setup(self, damping, random):
        self.damping = {key: damping * (1 + n) for n, key in enumerate(self.rows)}
        jacobian, small = [], {}
        for key, rows in self.rows.items():
            w = torch.einsum("hknto,hnti->knhoi", rows.gradients, rows.inputs)
            jacobian.append(w.flatten(0, 1).flatten(1))
            small[key] = w.shape[2:]
        self.shapes = small
        j = torch.cat(jacobian, 1)
        ridge = [torch.full((s.numel(),), self.damping[k], dtype=D) for k, s in self.shapes.items()]
        self.fisher = j.T @ j / next(iter(self.rows.values())).samples + torch.diag(
            torch.cat(ridge)
        )
        self.u, self.z = self.random(random), {}
        for key, rows in self.rows.items():
            a, g = (
                kr.eigendecompose(kr.input_factor(rows)),
                kr.eigendecompose(kr.output_factor(rows)),
            )
            self.z[key] = kr.solve_tikhonov(a, g, self.u[key], self.damping[key])
        self.level = co.fine_level(self.rows, self.u, self.z, self.damping)

    def random(self, generator):
        return {k: torch.randn(s, dtype=D, generator=generator) for k, s in self.shapes.items()}

    def flat(self, vector):
        parts = [vector.get(k, torch.zeros(s, dtype=D)).reshape(-1) for k, s in self.shapes.items()]
        return torch.cat(parts)

    def energy(self, vector):
        missed = self.flat(vector) - torch.linalg.solve(self.fisher, self.flat(self.u))
        return float(missed @ self.fisher @ missed / 2)

    def corrected(self, correction):
        return {k: z + correction.vector.get(k, 0) for k, z in self.z.items()}

    def rows_of(self, count, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return [self.random(generator) for _ in range(count)]

    def everything(self):
        rows = []
        for key, shape in self.shapes.items():
            unit = torch.eye(shape.numel(), dtype=D).reshape(-1, *shape)
            rows += [{key: one} for one in unit]
        return rows


@settings(deadline=None, max_examples=40)
@given(SIZES, st.integers(1, 6))
def test_the_energy_change_is_the_true_one_and_never_rises(sizes, count):
    p = Problem(*sizes)
    basis = p.rows_of(count)
    before = p.energy(p.z)
    close = {"rel": 1e-6, "abs": 1e-9 * (1 + before)}
    for form in ("residual", "additive"):
        found = co.coarse_correction(p.level, basis, form)
        after = p.energy(p.corrected(found))
        assert after - before == pytest.approx(found.energy, **close)
        if form == "residual":
            assert found.energy <= 0
            r0 = torch.stack([p.flat(row) for row in basis])
            right = r0 @ (p.flat(p.u) - p.fisher @ p.flat(p.z))
            best = -right @ torch.linalg.pinv(r0 @ p.fisher @ r0.T) @ right / 2
            assert found.energy == pytest.approx(float(best), **close)
    r = torch.cat([part.reshape(-1) for part in co.residual(p.level).values()])
    torch.testing.assert_close(r, p.flat(p.u) - p.fisher @ p.flat(p.z))


@settings(deadline=None, max_examples=20)
@given(SIZES)
def test_the_energy_vanishes_if_the_space_holds_what_is_missing_or_everything(sizes):
    p = Problem(*sizes)
    before = p.energy(p.z)
    exact = torch.linalg.solve(p.fisher, p.flat(p.u))
    missing, start = {}, 0
    for key, shape in p.shapes.items():
        missing[key] = exact[start : start + shape.numel()].reshape(shape) - p.z[key]
        start += shape.numel()
    for basis in ([missing], [*p.rows_of(2), missing], p.everything()):
        found = co.coarse_correction(p.level, basis)
        assert p.energy(p.corrected(found)) <= 1e-9 * (1 + before)


@settings(deadline=None, max_examples=30)
@given(SIZES, st.integers(1, 4))
def test_only_the_space_counts_and_more_rows_lower_the_energy(sizes, count):
    p = Problem(*sizes)
    basis = p.rows_of(count)
    found = co.coarse_correction(p.level, basis)
    close = {"rtol": 1e-6, "atol": 1e-8}
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(count, count, dtype=D, generator=generator) + 3 * torch.eye(count, dtype=D)
    mix = mix * torch.logspace(-6, 6, count, dtype=D)[:, None]
    rotated = [
        {k: sum(m * row[k] for m, row in zip(line, basis, strict=True)) for k in p.shapes}
        for line in mix
    ]
    again = co.coarse_correction(p.level, rotated)
    for key in p.shapes:
        torch.testing.assert_close(again.vector[key], found.vector[key], **close)
    more = co.coarse_correction(p.level, basis + p.rows_of(2, seed=5))
    assert more.energy <= found.energy + 1e-10


def test_dependent_and_zero_rows_are_dropped():
    p = Problem(1, 5, 2, 2, 0, 0.1)
    basis = p.rows_of(3)
    total = {k: sum(row[k] for row in basis) for k in p.shapes}
    nothing = {k: 0 * part for k, part in total.items()}
    found = co.coarse_correction(p.level, basis)
    again = co.coarse_correction(p.level, [total, *basis, nothing, basis[0]])
    assert (found.dropped, again.dropped) == (0, 3)
    assert again.energy == pytest.approx(found.energy)
    for key in p.shapes:
        torch.testing.assert_close(again.vector[key], found.vector[key])
    none = co.coarse_correction(p.level, [nothing])
    assert (none.vector, none.energy, none.dropped) == ({}, 0.0, 1)


def test_the_fine_solution_itself_as_space_gives_the_best_step_length():
    p = Problem(1, 6, 1, 3, 0, 0.5)
    found = co.coarse_correction(p.level, [p.z])
    u, z = p.flat(p.u), p.flat(p.z)
    assert float(found.coefficients) == pytest.approx(float(u @ z / (z @ p.fisher @ z)) - 1)
    by_block = co.coarse_correction(p.level, co.split(p.z))
    assert by_block.energy <= found.energy


def test_spaces_hold_what_their_names_say():
    p = Problem(1, 6, 1, 3, 0, 0.5)
    eigen = {
        k: (kr.eigendecompose(kr.input_factor(r)), kr.eigendecompose(kr.output_factor(r)))
        for k, r in p.rows.items()
    }

    def precondition(key, part):
        return kr.solve_tikhonov(*eigen[key], part, p.damping[key])

    ones = co.nicolaides(p.u)
    assert [list(row) for row in ones] == [["a"], ["b"], ["c"]]
    assert all((part == 1).all() for row in ones for part in row.values())
    for row in co.spectral(eigen):
        ((key, part),) = row.items()
        a, g = eigen[key]
        image = kr.output_factor(p.rows[key]) @ part @ kr.input_factor(p.rows[key])
        smallest = (g.values[:, :1] * a.values[:, :1]).min()
        torch.testing.assert_close(image, smallest * part)
        assert float(part.norm()) == pytest.approx(1)
    space = co.preconditioned(co.residual(p.level), precondition)
    enriched = co.krylov(space, precondition)
    assert len(enriched) == 6
    energies = [co.coarse_correction(p.level, b).energy for b in (space, enriched)]
    assert energies[1] < energies[0] < 0
    both = co.coarse_correction(p.level, [*space, *co.split(p.z)])
    assert both.energy < energies[0]


def test_a_convolutional_network_is_coupled_through_its_real_taps():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 2, groups=1), nn.Tanh(),
        nn.Flatten(), nn.Linear(18, 3),
    ).double()  # fmt: skip
    coverage = cover(model)
    seen = observe(model, coverage, torch.randn(5, 2, 4, 4, dtype=D), Categorical())
    p = Problem.__new__(Problem)
    observed = {block.name: seen.rows(block, D) for block in coverage.blocks}
    p.rows = {k: Rows(r.inputs.detach(), r.gradients.detach()) for k, r in observed.items()}
    p.setup(0.01, torch.Generator().manual_seed(0))
    before = p.energy(p.z)
    basis = co.nicolaides(p.u) + co.split(p.z) + co.split(co.residual(p.level))
    found = co.coarse_correction(p.level, basis)
    assert p.energy(p.corrected(found)) - before == pytest.approx(found.energy)
    assert found.energy < 0


def test_what_is_not_finite_is_refused():
    p = Problem(1, 4, 1, 2, 0, 0.1)
    basis = p.rows_of(1)
    basis[0]["a"][0, 0, 0] = torch.nan
    with pytest.raises(kr.NotFiniteError, match="coarse"):
        co.coarse_correction(p.level, basis)
