"""CP convolutions: the kernel of their factors, fits of known rank, and He's variance."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from smallfry import cost
from smallfry.layers.cp import CP, compose, decompose, rank_for

CONVOLUTIONS = {
    "plain": {"kernel_size": 3},
    "padded": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "uneven": {"kernel_size": (3, 5), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": 2, "bias": False},
    "same": {"kernel_size": (4, 3), "padding": "same", "dilation": 2},
    "valid": {"kernel_size": 2, "padding": "valid"},
    "one column": {"kernel_size": (5, 1), "padding": (2, 0)},
}


def kernel_of_rank(rank, shape=(6, 8, 3, 3), seed=0):
    generator = torch.Generator().manual_seed(seed)
    factors = [torch.randn(n, rank, generator=generator, dtype=torch.float64) for n in shape]
    return compose(factors)


@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_equals_the_convolution_with_the_kernel_of_its_factors(case, dtype):
    torch.manual_seed(0)
    given = CONVOLUTIONS[case]
    layer = nn.Conv2d(4, 6, **given).to(dtype)
    small, images = CP.like(layer, rank=3), torch.randn(2, 4, 12, 11, dtype=dtype)
    if small.expand.bias is not None:
        nn.init.normal_(small.expand.bias)
    kernel = torch.einsum(
        "or,rc,ri,rj->ocij",
        *(small.expand.weight[..., 0, 0], small.reduce.weight[..., 0, 0]),
        *(small.down.weight[:, 0, :, 0], small.across.weight[:, 0, 0]),
    )
    how = {name: getattr(layer, name) for name in ("stride", "padding", "dilation")}
    wanted = F.conv2d(images, kernel, small.expand.bias, **how)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(small(images), wanted, rtol=tolerance, atol=tolerance)
    dense = small.dense()
    assert [getattr(dense, name) for name in how] == [*how.values()]
    torch.testing.assert_close(dense(images), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_kernel_of_a_rank_is_found_exactly(rank):
    layer = nn.Conv2d(8, 6, 3).double()
    layer.weight.data = kernel_of_rank(rank)
    small = CP.from_dense(layer, rank=rank)
    images = torch.randn(2, 8, 7, 7, dtype=torch.float64)
    torch.testing.assert_close(small(images), layer(images), rtol=0, atol=1e-5)
    norms = [f.norm(dim=0) for f in decompose(layer.weight.detach(), rank)]
    torch.testing.assert_close(torch.stack(norms), norms[0].expand(4, -1))


def test_a_fit_of_one_product_is_that_of_the_power_method():
    kernel = kernel_of_rank(3) + 0.3 * kernel_of_rank(5, seed=1)
    vectors = [torch.linalg.svd(kernel.movedim(k, 0).flatten(1)).U[:, 0] for k in range(4)]
    sums = ("ocij,c,i,j->o", "ocij,o,i,j->c", "ocij,o,c,j->i", "ocij,o,c,i->j")
    for _ in range(60):
        for k, axes in enumerate(sums):
            others = [v for n, v in enumerate(vectors) if n != k]
            vectors[k] = torch.einsum(axes, kernel, *others)
            vectors[k] = vectors[k] / vectors[k].norm()
    value = torch.einsum("ocij,o,c,i,j->", kernel, *vectors)
    wanted = (kernel - value * compose([v[:, None] for v in vectors])).norm()
    found = (kernel - compose(decompose(kernel, 1))).norm()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)


def test_the_error_falls_with_the_rank_and_with_sweeps():
    torch.manual_seed(0)
    kernel = torch.randn(6, 8, 3, 3, dtype=torch.float64)
    errors = [float((kernel - compose(decompose(kernel, r, 30))).norm()) for r in (1, 4, 40)]
    assert errors == sorted(errors, reverse=True)
    few, more = (float((kernel - compose(decompose(kernel, 6, n))).norm()) for n in (1, 30))
    assert more < few
    assert errors[-1] < 0.2 * errors[0]  # more products than the inputs have dimensions


def test_a_kernel_of_zeros_gives_zeros():
    layer = nn.Conv2d(4, 6, 3, bias=False)
    nn.init.zeros_(layer.weight)
    assert not CP.from_dense(layer, rank=2)(torch.randn(1, 4, 5, 5)).any()


def test_random_factors_give_a_kernel_of_hes_variance():
    torch.manual_seed(0)
    layer = nn.Conv2d(24, 32, 3)
    kernels = [CP.like(layer, rank=12).dense().weight for _ in range(60)]
    found = torch.stack(kernels).detach().var()
    assert float(found) == pytest.approx(2 / (24 * 9), rel=0.1)
    one, other = CP.like(layer, rank=12), CP.like(layer, rank=12)
    for each in (one, other):
        each.reset_parameters(torch.Generator().manual_seed(3))
    assert torch.equal(one.reduce.weight, other.reduce.weight)


@pytest.mark.parametrize(("inputs", "outputs", "kernel"), [(3, 32, 3), (32, 32, 3), (64, 128, 5)])
def test_a_fifth_of_the_parameters_is_not_exceeded(inputs, outputs, kernel):
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    rank = rank_for(layer, 0.2)
    assert rank == inputs * outputs * kernel**2 // (5 * (inputs + outputs + 2 * kernel))
    found = cost(CP.like(layer, rank=rank), torch.zeros(1, inputs, 8, 8))
    assert found.parameters == rank * (inputs + outputs + 2 * kernel)
    assert found.parameters <= layer.weight.numel() / 5
    assert found.macs == 64 * found.parameters
    assert rank_for(nn.Conv2d(1, 1, 2), 0.01) == 1


@pytest.mark.parametrize("settings", [{}, {"rank": 0}, {"rank": 999}, {"rank": 2.0}, {"ranks": 2}])
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ValueError, match="rank"):
        CP.like(nn.Conv2d(4, 4, 3), **settings)


@pytest.mark.parametrize("layer", [
    nn.Linear(4, 4), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, padding_mode="reflect"),
])  # fmt: skip
def test_other_layers_are_refused(layer):
    with pytest.raises(ValueError, match=r"expected nn\.Conv2d|groups"):
        CP.from_dense(layer, rank=1)
