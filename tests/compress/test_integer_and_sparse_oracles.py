"""Integers, ranges, N of M, masks and tables of latencies against exact and plain computations."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from smallfry.compress.prune.budget import LatencyTable, prices
from smallfry.compress.quantize.integer import linear, multiplier, patches, rescale
from smallfry.compress.quantize.ranges import RANGES, Histogram, find_range
from smallfry.compress.sparse.masks import MaskedMethod, largest, require_share
from smallfry.compress.sparse.report import sparsity_report, zero_sums
from smallfry.compress.sparse.schedules import (
    cubic_sparsity,
    kernel_densities,
    n_of_m,
    update_fraction,
)
from smallfry.errors import UsageError
from smallfry.layers.quantizers import affine, encode, round_affine

# Integers


@pytest.mark.parametrize("power", [*range(-90, 8, 7), 0, 1, -31, -32, -62, -63, -64])
def test_a_factor_of_any_size_rescales_within_half_a_unit_and_a_little(power):
    random = np.random.default_rng(power + 100)
    factor = float(random.uniform(0.5, 1)) * 2.0**power
    most = min(2**31 - 1, int(2**30 / max(factor, 1)))
    sums = np.array([0, 1, -1, 5, -5, most, -most, *random.integers(-most, most, 40)])
    by = multiplier(np.array(factor))
    assert 2**30 <= int(by.mantissa) < 2**31
    assert float(by.mantissa) * 2.0 ** (-int(by.shift) - 31) == pytest.approx(factor, rel=2**-30)
    for value, found in zip(sums.tolist(), rescale(sums, by).tolist(), strict=True):
        exact = Fraction(int(by.mantissa)) * value / Fraction(2) ** (int(by.shift) + 31)
        assert abs(found - exact) <= Fraction(1, 2) + Fraction(1, 2 ** max(1, int(by.shift)))


def test_factors_that_round_up_to_a_power_of_two_keep_their_value():
    factors = np.array([np.nextafter(1, 0), 1.0, 0.5 - 2**-40, 2.0**-40])
    found = multiplier(factors)
    np.testing.assert_allclose(found.mantissa * 2.0 ** (-found.shift - 31), factors, rtol=2**-31)
    assert ((found.mantissa >= 2**30) & (found.mantissa < 2**31)).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_layer_of_integers_is_the_rounded_product_of_exact_numbers(bits, has_bias):
    random = np.random.default_rng(bits)
    inputs, weight = random.integers(0, 256, (7, 9)), random.integers(-127, 128, (5, 9))
    bias = random.integers(-1000, 1000, 5) if has_bias else None
    factor = random.uniform(1e-4, 1e-2, 5)
    found = linear(inputs, 100, weight, bias, factor, 3, bits)
    for row, codes in zip(inputs.tolist(), found.tolist(), strict=True):
        for o, code in enumerate(codes):
            total = sum((x - 100) * w for x, w in zip(row, weight[o].tolist(), strict=True))
            total += 0 if bias is None else int(bias[o])
            exact = min(max(total * factor[o] + 3, 0), 2**bits - 1)
            assert abs(code - exact) <= 0.5 + 1e-3
    assert found.min() >= 0
    assert found.max() <= 2**bits - 1
    assert linear(inputs[:0], 0, weight, bias, factor, 0).shape == (0, 5)


def test_a_sum_beyond_32_bits_is_told():
    weight = np.full((1, 2**17), 127)
    with pytest.raises(OverflowError, match="a sum of 131072 products does not fit 32 bits"):
        linear(np.full((1, 2**17), 255), 0, weight, None, np.array([1e-9]), 0)
    assert linear(np.full((1, 2**17), 129), 0, weight, None, np.array([1e-9]), 1).tolist() == [[3]]


@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 1), (3, 2)])
@pytest.mark.parametrize("kernel", [(3, 3), (1, 2), (4, 1)])
def test_patches_times_a_kernel_are_the_convolution(stride, padding, kernel):
    random = np.random.default_rng(0)
    images, fill = random.integers(0, 256, (2, 3, 6, 7)), 11
    weight = torch.from_numpy(random.integers(-9, 9, (4, 3, *kernel))).double()
    rows = patches(images, kernel, stride, padding, fill)
    shifted = torch.from_numpy(images - fill).double()  # so that PyTorch's padding is the fill
    wanted = F.conv2d(shifted, weight, stride=stride, padding=padding)
    found = (torch.from_numpy(rows).double() - fill) @ weight.flatten(1).T
    assert torch.equal(found.view(2, *wanted.shape[2:], 4), wanted.permute(0, 2, 3, 1))


# Ranges


@pytest.mark.parametrize("kind", RANGES)
@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize(
    "values", [[3.0], [-2.0, -1.0], [0.0], [1e-30, 2e-30], [-5.0, 7.0] * 9, [1e30, -1e25]]
)
def test_a_range_of_any_numbers_contains_0_and_has_a_usable_quantizer(kind, bits, values):
    tensor = torch.tensor(values)
    seen = Histogram.empty(float(tensor.min()), float(tensor.max()))
    seen.add(tensor)
    assert float(seen.counts.sum()) == len(values)
    low, high = find_range(seen, kind, bits)
    assert min(seen.low, 0) <= low <= 0 <= high <= max(seen.high, 0)
    scale, zero = affine(torch.tensor(low), torch.tensor(high), bits)
    assert 0 < float(scale) < math.inf
    rounded = round_affine(tensor.double(), scale, zero, bits)
    assert torch.isfinite(rounded).all()
    assert float(round_affine(torch.zeros(1).double(), scale, zero, bits)) == 0
    if kind == "minmax" and max(map(abs, values)) > 1e-29:
        assert ((rounded - tensor.double()).abs() <= scale / 2 * (1 + 1e-6)).all()


def test_codes_of_halves_go_to_even_and_ends_are_not_exceeded():
    values = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 9.0, -9.0, math.inf, -math.inf])
    found = encode(values, torch.tensor(1.0), 0, -3, 3)
    assert found.tolist() == [0, 2, 2, 0, -2, 3, -3, 3, -3]


# Sparse patterns


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 5), (1, 16), (4, 8)])
@pytest.mark.parametrize("shape", [(3, 16), (2, 5), (4, 3, 3, 3), (1, 1), (2, 1, 1, 1), (0, 8)])
def test_n_of_m_is_that_of_plain_loops_also_with_ties(n, m, shape):
    weight = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(m)).float()
    mask = n_of_m(weight, n, m)
    assert mask.shape == weight.shape
    assert mask.dtype == torch.bool
    for row, kept in zip(weight.flatten(1).tolist(), mask.flatten(1).tolist(), strict=True):
        for start in range(0, len(row), m):
            group = row[start : start + m]
            order = sorted(range(len(group)), key=lambda i: (-abs(group[i]), i))
            wanted = {*order[:n]} if len(group) == m else {*order}
            assert {i for i in range(len(group)) if kept[start + i]} == wanted
    assert torch.equal(n_of_m(weight * mask, n, m), mask) or (weight * mask == 0).any()


def test_schedules_begin_and_end_as_they_are_meant():
    assert cubic_sparsity(0.2, 0.9, 0) == cubic_sparsity(0.2, 0.9, -1) == pytest.approx(0.2)
    assert cubic_sparsity(0.2, 0.9, 1) == cubic_sparsity(0.2, 0.9, 7) == 0.9
    assert cubic_sparsity(0.0, 0.8, 0.5) == pytest.approx(0.7)
    assert update_fraction(0.3, 0, 10) == 0.3
    assert update_fraction(0.3, 5, 10) == pytest.approx(0.15)
    assert update_fraction(0.3, 10, 10) == update_fraction(0.3, 99, 10) == pytest.approx(0)
    assert update_fraction(0.3, 0, 0) == 0.3
    assert kernel_densities([(4, 4), (8, 2, 3, 3)], 1.0) == [1.0, 1.0]
    assert kernel_densities([(1, 1)], 0.5) == [0.5]
    assert kernel_densities([], 0.5) == []


@pytest.mark.parametrize("keep", [0, 1, 5, 11, 12, 99])
@pytest.mark.parametrize("one_a_row", [True, False])
def test_the_largest_are_those_of_a_plain_sort(keep, one_a_row):
    scores = [torch.tensor([[3.0, 3, 1], [0, 0, 0]]), torch.tensor([[2.0, 9], [5, 3], [3, 3]])]
    found = largest(scores, keep, one_a_row)
    entries = [(k, i) for k, s in enumerate(scores) for i in range(s.numel())]
    value = {(k, i): float(scores[k].flatten()[i]) for k, i in entries}
    first = set()
    if one_a_row:
        for k, each in enumerate(scores):
            width = each.shape[1]
            first |= {(k, r * width + int(row.argmax())) for r, row in enumerate(each)}
    order = sorted(entries, key=lambda e: (e not in first, -value[e], entries.index(e)))
    wanted = {*order[: max(keep, len(first))]}
    assert {e for e in entries if bool(found[e[0]].flatten()[e[1]])} == wanted
    assert [mask.shape for mask in found] == [each.shape for each in scores]


def test_masks_of_another_model_are_refused():
    method = MaskedMethod(None)
    method.weights = {"fc.weight": nn.Parameter(torch.ones(2, 3))}
    method.load_state_dict({"masks": {"fc.weight": torch.eye(2, 3).bool()}})
    method.project()
    assert torch.equal(method.weights["fc.weight"].detach(), torch.eye(2, 3))
    for masks in ({"fc.weight": torch.ones(3, 2).bool()}, {"gone.weight": torch.ones(2, 3).bool()}):
        with pytest.raises(ValueError, match="the model has no weight"):
            method.load_state_dict({"masks": masks})
    assert list(method.masks) == ["fc.weight"]
    for share in (1.0, -0.1, math.nan):
        with pytest.raises(UsageError, match=r"snip\.sparsity must be in \[0, 1\), not"):
            require_share("snip", sparsity=share)


@pytest.mark.parametrize(("inputs", "whole"), [(3, 0), (4, 4), (9, 8), (18, 16)])
def test_inputs_left_over_by_groups_of_four_are_stored_whole(inputs, whole):
    """Of a layer of three inputs nothing is saved, whatever its values."""
    layer = nn.Linear(inputs, 5)
    (found,) = sparsity_report(nn.Sequential(layer), torch.zeros(1, inputs)).layers
    assert found.zeros == 0
    assert not found.is_2_of_4
    assert found.two_four_bytes is None
    with torch.no_grad():
        layer.weight.mul_(n_of_m(layer.weight, 2, 4))
    report = sparsity_report(nn.Sequential(layer), torch.zeros(1, inputs))
    (found,) = report.layers
    assert found.is_2_of_4 == (whole > 0)
    pairs = 5 * whole // 2
    wanted = None if not whole else 4 * (5 * inputs - pairs) + math.ceil(2 * pairs / 8)
    assert found.two_four_bytes == wanted
    assert report.smallest_bytes() >= 4 * (found.weights - found.zeros)
    assert report.smallest_bytes() <= found.dense_bytes
    assert zero_sums(nn.Sequential(nn.ReLU()), torch.zeros(1, 3)) is None


# Latencies


@pytest.mark.parametrize(
    "groups",
    [
        {"a": {"eight": 1.5}},
        {"a": {"-4": 1.5}},
        {"a": {"": 1.5}},
        {"a": {"1.5": 1.5}},
        {"a": {"²": 1.5}},
        {"a": {"8": True}},
        {"a": {"8": float("nan")}},
        {"a": {"8": float("inf")}},
        {"a": 3},
        {"a": [1.5]},
        [],
        None,
    ],
)
def test_a_damaged_table_is_told_when_it_is_read(tmp_path, groups):
    file = tmp_path / "table.json"
    file.write_text(json.dumps({"whole": 2.0, "groups": groups}))
    with pytest.raises(UsageError, match=r"table\.json: not a table of latencies"):
        LatencyTable.read(file)


def test_savings_are_linear_between_measurements_and_never_fall(tmp_path):
    table = LatencyTable(2.0, {"a": {"4": 1.0, "8": 1.6, "12": 1.7, "16": 2.4}, "b": {}})
    table.write(tmp_path / "table.json")
    assert LatencyTable.read(tmp_path / "table.json") == table
    wanted = {16: 0, 14: 0.15, 12: 0.3, 10: 0.35, 8: 0.4, 6: 0.7, 4: 1.0, 1: 1.0}
    assert {n: table.saving("a", n, 16) for n in wanted} == pytest.approx(wanted)
    assert table.saving("b", 3, 8) == 0
    slow = LatencyTable(2.0, {"a": {"8": 2.5, "4": 1.9}})  # a narrow layer that was slower
    assert slow.saving("a", 8, 16) == 0
    assert slow.saving("a", 4, 16) == pytest.approx(0.1)


def test_prices_are_relative_to_the_dearest_channel():
    class Sum:
        def without(self, removed):
            return 100 - 4 * removed[0] - removed[1] - 0 * removed[2]

    assert prices(Sum(), [0, 0, 0], [2, 1, 4], [8, 8, 8]) == [1.0, 0.25, 1e-3]
    assert prices(Sum(), [6, 0, 0], [2, 1, 4], [8, 8, 8]) == [1.0, 1.0, 1e-3]
    assert prices(Sum(), [6, 7, 4], [2, 1, 4], [8, 8, 8]) == [1.0, 1.0, 1.0]
