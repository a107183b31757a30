"""The wave equation's generator: conserved energy, exact modes, symmetric walls, seeds."""

import math

import pytest
import torch

from smallfry.data.generators.wave import (
    AHEAD,
    bumps,
    laplacian,
    simulate,
    wave_pairs,
)
from smallfry.errors import UsageError


def energies(fields, courant=0.5):
    """Compute the conserved energy between successive fields, (steps, batch)."""
    now, following = fields[:-1], fields[1:]
    kinetic = (following - now).square().sum((-2, -1))
    stiffness = -(following * laplacian(now)).sum((-2, -1))
    return 0.5 * (kinetic + courant**2 * stiffness)


@pytest.mark.parametrize("courant", [0.2, 0.5, 0.7])
def test_energy_is_conserved(courant):
    fields = simulate(bumps(5, seed=0), steps=100, courant=courant)
    found = energies(fields, courant)
    assert found.shape == (100, 5)
    assert bool((found > 0).all())
    torch.testing.assert_close(found, found[:1].expand_as(found), rtol=1e-10, atol=0)


def test_energy_is_that_of_kinetic_and_strain_summed_cell_by_cell():
    fields = simulate(bumps(1, seed=3, side=6), steps=4)[:, 0]
    for now, following, found in zip(fields, fields[1:], energies(fields[:, None]), strict=False):
        total = 0.0
        for i in range(6):
            for j in range(6):
                total += 0.5 * float(following[i, j] - now[i, j]) ** 2
                for di, dj in ((1, 0), (0, 1)):  # no flux leaves through a wall
                    if i + di < 6 and j + dj < 6:
                        slopes = [float(u[i + di, j + dj] - u[i, j]) for u in (now, following)]
                        total += 0.5 * 0.5**2 * slopes[0] * slopes[1]
        assert float(found) == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize(("down", "across"), [(1, 0), (2, 3), (7, 7)])
def test_a_standing_wave_swings_at_the_frequency_of_the_scheme(down, across):
    """cos(π k (i + ½)/n) is an eigenvector, and sin²(ω dt/2) = C² Σ sin²(π k/2n)."""
    n, courant = 16, 0.5
    cells = torch.arange(n, dtype=torch.float64) + 0.5
    mode = torch.outer(*((math.pi * k * cells / n).cos() for k in (down, across)))
    sines = sum(math.sin(math.pi * k / (2 * n)) ** 2 for k in (down, across))
    torch.testing.assert_close(laplacian(mode[None])[0], -4 * sines * mode)
    angle = 2 * math.asin(courant * math.sqrt(sines))
    fields = simulate(mode[None], steps=60, courant=courant)[:, 0]
    wanted = torch.stack([math.cos(angle * t) * mode for t in range(61)])
    torch.testing.assert_close(fields, wanted, rtol=0, atol=1e-12)


def test_mass_is_kept_and_mirror_images_stay_mirror_images():
    start = bumps(2, seed=1)
    fields = simulate(start, steps=50)
    sums = fields.sum((-2, -1))
    torch.testing.assert_close(sums, sums[:1].expand_as(sums))
    for turned in (start.flip(-1), start.flip(-2), start.mT):
        other = simulate(turned, steps=50)
        back = {0: other.flip(-1), 1: other.flip(-2), 2: other.mT}
        closest = min((fields - each).abs().max() for each in back.values())
        assert closest < 1e-12


def test_pairs_follow_from_the_equation_alone():
    pairs = wave_pairs(6, seed=2)
    before, now = pairs.inputs.unbind(1)
    for _ in range(AHEAD):
        before, now = now, 2 * now - before + 0.25 * laplacian(now)
    torch.testing.assert_close(now[:, None], pairs.targets, rtol=0, atol=1e-12)
    assert pairs.inputs.dtype == torch.float64
    assert float(pairs.inputs.std()) > 0.05


def test_a_seed_gives_its_pairs_and_another_gives_others():
    one, same, other = (wave_pairs(4, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.inputs, same.inputs)
    assert torch.equal(one.targets, same.targets)
    assert not torch.equal(one.inputs, other.inputs)
    assert wave_pairs(2, seed=0, side=12, ahead=1).targets.shape == (2, 1, 12, 12)


@pytest.mark.parametrize(("steps", "courant"), [(0, 0.5), (5, 0.8), (5, 0.0)])
def test_unstable_steps_are_refused(steps, courant):
    with pytest.raises(UsageError, match=r"courant up to 1/√2|steps must be at least 1"):
        simulate(bumps(1, seed=0), steps, courant)
