"""Tensor trains: exact at full rank, bounded by the discarded values, one map both ways."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from smallfry import cost
from smallfry.layers.tensor_train import Modes, TensorTrain, modes_of, to_cores, to_matrix

TWO_CORES = [
    13.9776340781, 12.3990290978, 4.0141108456, 3.0558040328, 2.5058894859, 2.1011834893,
    1.9024590895, 0.7262298277, 0.5196536425, 0.3293299008, 0.291808039, 0.2135922185,
    0.1491560548, 0.0728268084, 0.0207884881, 0.0019968719,
]  # fmt: skip
FIRST_CUT = [14.4529282038, 12.1164158015, 4.6528531604, 3.5490796959]
SECOND_CUT = [
    15.3389154775, 10.8448726369, 3.9016991843, 3.1700043576, 2.2902467353, 1.9586881356,
    1.3126321985, 0.9558697661, 0.1944137431, 0.1109281726, 0.0668711165, 0.0302515171,
    0.0054359339, 0.0013272934, 0.0006349009, 0.0002736493,
]  # fmt: skip
THREE_CORES = {1: 16.2243880849, 2: 7.00373759366, 4: 3.43131171299, 8: 0.235627783982}
BOUNDS = {1: 18.3223876127, 2: 8.44340532274, 4: 3.43131171299, 8: 0.235627783982}


def golden_matrix():
    i = torch.arange(24 * 24, dtype=torch.float64)
    return (torch.sin(0.37 * i + 0.11 * 7 + 0.2) + 0.5 * torch.cos(0.013 * i**1.5)).view(24, 24)


def error_of(matrix, modes, ranks):
    return float((matrix - to_matrix(to_cores(matrix, modes, ranks))).norm())


def unfolding_values(matrix, modes):
    """Singular values of every unfolding of a matrix, by reshaping it axis by axis."""
    count = len(modes.outputs)
    tensor = matrix.reshape(*modes.outputs, *modes.inputs)
    tensor = tensor.permute([a for k in range(count) for a in (k, count + k)])
    sizes = [math.prod(tensor.shape[: 2 * k]) for k in range(1, count)]
    return [torch.linalg.svdvals(tensor.reshape(size, -1)) for size in sizes]


def bound(values, ranks):
    pairs = zip(values, ranks, strict=True)
    return float(sum(each[rank:].square().sum() for each, rank in pairs)) ** 0.5


def test_two_cores_leave_out_the_golden_singular_values():
    matrix, modes = golden_matrix(), modes_of(24, 24, cores=2)
    assert modes == Modes((4, 6), (4, 6))
    for rank in range(1, 17):
        left_out = math.sqrt(sum(value**2 for value in TWO_CORES[rank:]))
        assert error_of(matrix, modes, [rank]) == pytest.approx(left_out, abs=1e-8)


@pytest.mark.parametrize("rank", THREE_CORES)
def test_three_cores_have_the_golden_errors(rank):
    matrix, modes = golden_matrix(), modes_of(24, 24, cores=3)
    assert modes == Modes((2, 3, 4), (2, 3, 4))
    values = unfolding_values(matrix, modes)
    for found, wanted in zip(values, (FIRST_CUT, SECOND_CUT), strict=True):
        torch.testing.assert_close(found[: len(wanted)], torch.tensor(wanted).double())
    ranks = [min(rank, 4), rank]
    assert error_of(matrix, modes, ranks) == pytest.approx(THREE_CORES[rank], abs=1e-8)
    assert bound(values, ranks) == pytest.approx(BOUNDS[rank], abs=1e-8)


@settings(max_examples=40)
@given(
    outputs=st.integers(2, 40),
    inputs=st.integers(2, 40),
    cores=st.integers(2, 3),
    rank=st.integers(1, 12),
    seed=st.integers(0, 999),
)
def test_the_error_is_within_the_bound_and_equals_it_for_two_cores(
    outputs, inputs, cores, rank, seed
):
    modes = modes_of(outputs, inputs, cores)
    generator = torch.Generator().manual_seed(seed)
    shape = [math.prod(side) for side in modes]
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
    ranks = [min(rank, full) for full in modes.full_ranks]
    error, most = error_of(matrix, modes, ranks), bound(unfolding_values(matrix, modes), ranks)
    assert error <= most + 1e-9
    if cores == 2:
        assert error == pytest.approx(most, abs=1e-9)


@pytest.mark.parametrize("cores", [2, 3, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    "layer",
    [nn.Linear(24, 64), nn.Linear(13, 10, bias=False), nn.Conv2d(12, 16, 1, stride=(2, 1))],
    ids=["even", "uneven", "convolution"],
)
def test_full_ranks_are_exact(layer, dtype, tolerance, cores):
    layer = layer.to(dtype)
    modes = modes_of(*layer.weight.flatten(1).shape, cores)
    small = TensorTrain.from_dense(layer, ranks=list(modes.full_ranks))
    shape = (2, 3, 24) if layer.weight.shape[1] == 24 else (2, 13)
    inputs = torch.randn((2, 12, 5, 4) if layer.weight.ndim == 4 else shape).to(dtype)
    torch.testing.assert_close(small.dense()(inputs), layer(inputs), rtol=0, atol=tolerance)
    torch.testing.assert_close(small(inputs), layer(inputs), rtol=0, atol=tolerance)
    norms = torch.stack([core.weight.detach().norm() for core in small.cores])
    torch.testing.assert_close(norms, norms[:1].expand_as(norms))


@pytest.mark.parametrize("cores", [2, 3, 4])
@pytest.mark.parametrize("shape", [(24,), (0, 24), (5, 24), (2, 3, 24), (2, 1, 2, 24)])
def test_cores_in_turn_equal_the_matrix_and_have_its_gradients(shape, cores):
    torch.manual_seed(0)
    ranks = [2, 3, 2][: cores - 1]
    small = TensorTrain.from_dense(nn.Linear(24, 30).double(), ranks=ranks)
    inputs = torch.randn(shape, dtype=torch.float64)
    gradients = []
    for output in (small._contract(inputs), inputs @ small.matrix.T):
        assert output.shape == (*shape[:-1], 30)
        gradients.append(torch.autograd.grad(output.square().sum(), [*small.cores.parameters()]))
        gradients[-1] += (output,)
    torch.testing.assert_close(*gradients)


def test_the_cheaper_way_is_taken_unless_a_core_is_observed():
    layer, rows = nn.Linear(64, 64, bias=False), torch.randn(9, 64)
    small = TensorTrain.from_dense(layer, ranks=[16])
    in_turn, together = 16 * 8 * 8 * (8 + 8), 16 * 64 * 64
    assert cost(small, rows[:5]).macs == 5 * in_turn
    assert cost(small, rows).macs == together + 9 * 64 * 64
    three = TensorTrain.from_dense(layer, ranks=[12, 12])
    many = torch.randn(999, 64)
    assert cost(three, many).macs == three._macs()[1] + 999 * 64 * 64
    calls = []
    small.cores[0].register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(small(rows), rows @ small.matrix.T)
    assert calls == [1]


@pytest.mark.parametrize(("size", "factors"), [
    (64, (8, 8)), (192, (12, 16)), (10, (2, 5)), (13, (4, 4)), (22, (4, 6)), (1, (1, 1)),
    (3, (1, 3)), (76, (4, 19)),
])  # fmt: skip
def test_sizes_are_factored_evenly(size, factors):
    assert modes_of(size, size, cores=2).outputs == factors


@given(size=st.integers(1, 500), cores=st.integers(2, 4))
def test_factors_make_the_size_or_the_next_multiple_of_four(size, cores):
    found = modes_of(size, 1, cores).outputs
    assert math.prod(found) in (size, -(-size // 4) * 4)
    assert [*found] == sorted(found)


@pytest.mark.parametrize("settings", [
    {}, {"ranks": []}, {"ranks": 4}, {"ranks": [0]}, {"ranks": [65]}, {"ranks": [2.0]},
    {"ranks": [2], "rank": 2}, {"ranks": [1] * 10},
])  # fmt: skip
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ValueError, match="ranks"):
        TensorTrain.like(nn.Linear(64, 64), **settings)


@pytest.mark.parametrize("ranks", [[1, 16], [4, 16, 1]])
def test_ranks_that_no_core_connects_are_refused(ranks):
    with pytest.raises(ValueError, match=r"differ by more than a core of (9|4)"):
        TensorTrain.from_dense(
            nn.Linear(24, 24) if ranks[0] == 1 else nn.Linear(16, 16), ranks=ranks
        )


@pytest.mark.parametrize("layer", [
    nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1, padding=1), nn.Conv2d(4, 4, 1, groups=2), nn.GELU(),
])  # fmt: skip
def test_other_layers_are_refused(layer):
    with pytest.raises(ValueError, match=r"1 × 1|groups|expected nn\.Linear"):
        TensorTrain.from_dense(layer, ranks=[1])
