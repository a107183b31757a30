"""Multigrid convolutions: the classical V-cycle, boundary conditions, and the authors' outputs."""

import math

import numpy as np
import pytest
import torch

from smallfry.errors import UsageError
from smallfry.layers.multigrid import MultigridConv2d, level_sizes

CYCLES = {  # spec of the kit: first application to f = 1, then ratios of the residual's norm
    4: (0.053574945312500004, 6.299055015624999, [0.33258796971688864, 0.10786719732955218]),
    6: (0.05334236243888855, 101.4375787588539, [0.36131781944460434, 0.12461383030875264]),
}


def laplacian(u):
    """Apply −Δ with u = 0 outside, on (n, n) interior points."""
    n = u.shape[-1]
    padded = torch.nn.functional.pad(u, (1, 1, 1, 1))
    inner = 4 * u - padded[..., :-2, 1:-1] - padded[..., 2:, 1:-1]
    return (inner - padded[..., 1:-1, :-2] - padded[..., 1:-1, 2:]) * (n + 1) ** 2


@pytest.mark.parametrize(
    ("size", "levels", "padding", "wanted"),
    [
        (64, 6, 1, [64, 32, 16, 8, 4, 2]),
        (211, 6, 1, [211, 106, 53, 27, 14, 7]),
        (101, 5, 0, [101, 50, 24, 11, 5]),
    ],
)
def test_sizes_of_levels_and_kernels_of_prolongations(size, levels, padding, wanted):
    assert [each[0] for each in level_sizes((size, size), levels, padding)] == wanted
    layer = MultigridConv2d(
        1, 2, [*[(1, 0)] * (levels - 1), (2, 0)], size, transfer_padding=padding
    )
    kernels = [up.transfer.kernel_size[0] for up in layer.up]
    assert kernels == [4 if side % 2 == 0 else 3 for side in wanted[:-1]]
    assert layer(torch.zeros(1, 1, size, size)).shape == (1, 2, size, size)


def test_rectangles_have_a_kernel_for_each_axis():
    layer = MultigridConv2d(2, 3, [(1, 0), (1, 1), (1, 0)], (20, 33))
    assert layer.up[0].transfer.kernel_size == (4, 3)
    assert layer(torch.randn(1, 2, 20, 33)).shape == (1, 3, 20, 33)
    with pytest.raises(UsageError, match="built for grids of 20×33, not 33×20"):
        layer(torch.randn(1, 2, 33, 20))


@pytest.mark.parametrize("levels", CYCLES)
@torch.no_grad()
def test_the_layer_is_a_v_cycle_for_poissons_equation(levels):
    centre, total, ratios = CYCLES[levels]
    n = 2**levels - 1
    cycle = MultigridConv2d.poisson(levels)
    f = torch.ones(1, 1, n, n, dtype=torch.float64)
    u = cycle(f)
    assert u[0, 0, n // 2, n // 2].item() == pytest.approx(centre, rel=1e-12)
    assert u.sum().item() == pytest.approx(total, rel=1e-12)
    for ratio in ratios:
        assert (f - laplacian(u)).norm().item() / f.norm().item() == pytest.approx(ratio, rel=1e-9)
        u = u + cycle(f - laplacian(u))


@pytest.mark.parametrize(
    ("levels", "settings", "wanted"),
    [
        (6, {}, 0.35573776371847116),
        (5, {}, 0.35276925111946583),
        (6, {"pre": 2, "post": 2}, 0.18225004640927434),
        (6, {"post": 0}, 0.5830838119421157),
        (6, {"omega": 2 / 3}, 0.4361756819436406),
    ],
)
@torch.no_grad()
def test_errors_contract_alike_on_all_grids(levels, settings, wanted):
    n = 2**levels - 1
    cycle = MultigridConv2d.poisson(levels, **settings)
    u = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 1, n, n)))
    norms = []
    for _ in range(20):
        u = u - cycle(laplacian(u))
        norms.append(u.norm().item())
    assert norms[-1] / norms[-2] == pytest.approx(wanted, rel=0.02)


def test_without_biases_the_layer_is_linear():
    torch.manual_seed(0)
    layer = MultigridConv2d(3, 6, [(1, 1), (1, 1), (2, 0)], 16).double()
    one, two = torch.randn(2, 1, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(
            layer(2 * one - 3 * two), 2 * layer(one) - 3 * layer(two), rtol=0, atol=1e-12
        )
        biased = MultigridConv2d(3, 6, [(1, 1), (2, 0)], 16, bias=True).double()
        assert biased(torch.zeros_like(one)).abs().max() > 1e-3


@pytest.mark.parametrize("periodic", [True, False])
@torch.no_grad()
def test_shifts_on_a_torus_pass_through_only_with_periodic_prolongations(periodic):
    torch.manual_seed(0)
    layer = MultigridConv2d(
        1, 4, [(1, 0), (1, 1), (2, 0)], 32, "circular", transfer_periodic=periodic
    ).double()
    f = torch.randn(1, 1, 32, 32, dtype=torch.float64)
    shifts = (4, 8)  # multiples of 2^(levels − 1)
    error = (layer(f.roll(shifts, (2, 3))) - layer(f).roll(shifts, (2, 3))).abs().max().item()
    assert (error < 1e-10) is periodic
    assert periodic or error > 1e-3


def test_gradients_equal_differences():
    torch.manual_seed(0)
    layer = MultigridConv2d(1, 2, [(1, 1), (1, 0)], 6, restrict_residual=True, norm=True).double()
    f = torch.randn(1, 1, 6, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, f)
    layer(f).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"iterations": []}, "pairs for each level"),
        ({"iterations": [(0, 1), (1, 0)]}, "at least one before"),
        ({"iterations": [(1, 0), (1, 1)]}, "none after the coarsest"),
        ({"iterations": [(1, 0)] * 7, "img_size": 16}, "at most 5 levels, not 7"),
        ({"img_size": 15, "padding_mode": "circular"}, "halves evenly"),
        ({"img_size": 16, "padding_mode": "circular", "transfer_padding": 0}, "halves evenly"),
    ],
)
def test_impossible_layers_are_refused(settings, words):
    usual = {"iterations": [(1, 0), (1, 0)], "img_size": 16}
    with pytest.raises(UsageError, match=words):
        MultigridConv2d(1, 2, **(usual | settings))


def test_parameters_of_a_layer():
    layer = MultigridConv2d(3, 6, [(1, 1), (1, 1), (2, 0)], 16)
    smooth = 9 * 3 * 6
    iterations = [1 + 2, 2 + 2, 2 * 2]  # S alone first, then A and S
    transfers = 2 * (9 * 36 + 9 * 9 + 16 * 36)
    assert sum(p.numel() for p in layer.parameters()) == smooth * sum(iterations) + transfers
    assert math.isclose(smooth * 11 + transfers, 3744)
