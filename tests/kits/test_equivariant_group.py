"""GL⁺(n) and SL(n): coordinates of the authors, identities of the decomposition, and samples."""

import json
import math
from pathlib import Path

import pytest
import torch
from scipy.linalg import logm
from scipy.stats import kstest

from smallfry.errors import UsageError
from smallfry.kits.equivariant.group import (
    GL,
    SL,
    angle,
    log_rotation,
    map_eigenvalues,
    polar,
    rotations,
    sample_rotations,
    symmetric,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "equivariant.json").read_text())
GROUPS = {"gl2": GL(), "sl2": SL()}


def draw(count, n, seed=0):
    """Well-conditioned matrices of positive determinant, in float64."""
    random = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, n * (n + 1) // 2, generator=random, dtype=torch.float64)
    return map_eigenvalues(symmetric(0.4 * noise, n), "exp") @ sample_rotations(count, n, random)


@pytest.mark.parametrize("name", GROUPS)
def test_coordinates_equal_the_authors(name):
    elements = torch.tensor(GOLDEN[f"{name}_elements"], dtype=torch.float64).reshape(3, 2, 2)
    found = GROUPS[name].coordinates(elements)
    assert found.flatten().tolist() == pytest.approx(GOLDEN[f"{name}_coordinates"], abs=1e-12)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_decomposition_exists_is_unique_and_moves_with_rotations(n):
    g, k = draw(200, n), sample_rotations(200, n, torch.Generator().manual_seed(1))
    p, r = polar(g)
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(p @ r, g, **close)
    torch.testing.assert_close(p, p.mT, **close)
    assert torch.linalg.eigvalsh(p).min() > 0
    torch.testing.assert_close(r @ r.mT, torch.eye(n, dtype=g.dtype).expand_as(r), **close)
    assert torch.linalg.det(r).min() > 0.999
    left, right, back = polar(k @ g), polar(g @ k), polar(torch.linalg.inv(g))
    torch.testing.assert_close(left, (k @ p @ k.mT, k @ r), **close)
    torch.testing.assert_close(right, (p, r @ k), **close)
    torch.testing.assert_close(back[1], r.mT, **close)
    torch.testing.assert_close(back[0], r.mT @ torch.linalg.inv(p) @ r, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("group", "n"), [(GL, 2), (SL, 2), (GL, 3), (SL, 3)])
def test_elements_come_back_from_their_coordinates(group, n):
    g = draw(50, n)
    if group is SL:
        g = g / torch.linalg.det(g)[:, None, None] ** (1 / n)
    coordinates = group(n).coordinates(g)
    assert coordinates.shape == (50, group(n).dimension)
    turns = n * (n - 1) // 2
    if group is SL:  # off the diagonal, log r, diagonal
        turn = coordinates[:, turns : 2 * turns]
        rest = torch.cat([coordinates[:, :turns], coordinates[:, 2 * turns :]], dim=1)
    else:
        turn, rest = coordinates[:, -turns:], coordinates[:, :-turns]
    odd = torch.zeros(50, n, n, dtype=g.dtype)
    rows, columns = torch.tril_indices(n, n, -1).tolist()
    odd[:, rows, columns], odd[:, columns, rows] = turn, -turn
    again = map_eigenvalues(symmetric(rest, n), "exp") @ torch.matrix_exp(odd)
    torch.testing.assert_close(again, g, rtol=0, atol=1e-12)
    # coordinates of log P are orthonormal
    norms = map_eigenvalues(polar(g)[0], "log").flatten(1).norm(dim=1)
    torch.testing.assert_close(rest.norm(dim=1), norms, rtol=1e-10, atol=1e-12)


def test_logarithms_of_rotations_equal_scipys():
    r = sample_rotations(20, 4, torch.Generator().manual_seed(3))
    for one, found in zip(r, log_rotation(r), strict=True):
        assert found.flatten().tolist() == pytest.approx(logm(one.numpy()).ravel(), abs=1e-9)


def test_exp_does_not_reach_what_the_decomposition_does():
    g = torch.diag(torch.tensor([-2.0, -0.5], dtype=torch.float64))
    assert abs(logm(g.numpy()).imag).max() == pytest.approx(math.pi)
    p, r = polar(g)
    assert torch.equal(p, torch.diag(torch.tensor([2.0, 0.5], dtype=torch.float64)))
    assert torch.equal(r + 0.0, -torch.eye(2, dtype=torch.float64) + 0.0)
    assert SL().coordinates(g).tolist() == pytest.approx([0, math.pi, math.sqrt(2) * math.log(2)])


def test_angles_are_from_zero_to_below_a_full_turn():
    r = rotations(4).elements.clone()
    r[0, 1, 0] = -1e-9  # rounding
    assert angle(r).tolist() == pytest.approx([0, math.pi / 2, math.pi, 3 * math.pi / 2])
    assert rotations(8, 0.1).elements[3, 1, 0].item() == pytest.approx(
        math.sin(0.1 + 0.75 * math.pi)
    )
    assert {*rotations(4).elements.flatten().tolist()} == {-1.0, 0.0, 1.0}


@pytest.mark.parametrize("n", [2, 3])
def test_rotations_are_drawn_from_haars_measure(n):
    r = sample_rotations(20_000, n, torch.Generator().manual_seed(0))
    assert (torch.linalg.det(r) - 1).abs().max() < 1e-12
    trace = r.diagonal(dim1=1, dim2=2).sum(1)
    if n == 2:
        assert kstest(angle(r).numpy() / (2 * math.pi), "uniform").pvalue > 0.01
    else:  # moments of a character of SO(3): how often k-fold products have an invariant
        moments = [trace.pow(k).mean().item() for k in (1, 2, 3)]
        assert moments == pytest.approx([0, 1, 1], abs=0.06)


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("group", [GL, SL])
def test_samples_have_their_inverses_variance_and_determinant(group, n):
    elements, inverses = group(n, 0.1).sample(4000, torch.Generator().manual_seed(0))
    eye = torch.eye(n, dtype=torch.float64).expand_as(elements)
    torch.testing.assert_close(elements @ inverses, eye, rtol=0, atol=1e-12)
    x = 2 * map_eigenvalues(polar(elements)[0], "log")
    free = group(n).dimension - n * (n - 1) // 2
    assert (x.square().sum((1, 2)).mean() / free).item() == pytest.approx(0.1, rel=0.05)
    determinants = torch.linalg.det(elements)
    assert determinants.min() > 0
    assert bool((determinants - 1).abs().max() < 1e-12) == (group is SL)
    again = group(n, 0.1).sample(4000, torch.Generator().manual_seed(0))
    assert torch.equal(again.elements, elements)


def test_masks():
    places = torch.tensor([[0.0, 0.0], [0.8, 0.8]], dtype=torch.float64)
    assert SL().mask(places, places[:, :0]).tolist() == [1, 0]
    far = torch.full((2, 4), 2.0, dtype=torch.float64)
    wanted = [1 / (1 + math.exp(-2 * (1 - x))) for x in (4, math.sqrt(16 + 1.28))]
    assert GL().mask(places, far).tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("settings", [{"n": 1}, {"variance": -1.0}, {"variance": 11.0}])
def test_impossible_groups_are_refused(settings):
    with pytest.raises(UsageError, match="n ≥ 2 and a variance of 0 to 10"):
        SL(**settings)
