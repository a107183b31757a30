"""Quantisers and their ranges, against the golden values and plain code."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from smallfry.compress.quantize.ranges import (
    BINS,
    Histogram,
    _least_divergence,
    find_range,
)
from smallfry.errors import UsageError
from smallfry.layers.quantizers import (
    affine,
    encode,
    grouped,
    least_error_scale,
    round_affine,
    spread,
    symmetric_scale,
)

GOLDEN = json.loads((Path(__file__).parent / "quantizers.json").read_text())
I = torch.arange(64, dtype=torch.float64)  # noqa: E741
X = (0.37 * I + 0.11 * 4 + 0.2).sin() + 0.3 * (1.7 * I).cos()
X[5] = 4.0


def mse(rounded):
    return float((rounded - X).square().mean())


def test_affine_codes_are_the_golden_ones():
    wanted = GOLDEN["minmax_uint8"]
    scale, zero = affine(X.min(), X.max(), 8)
    assert float(scale) == pytest.approx(wanted["scale"], rel=1e-9)
    assert int(zero) == wanted["zero_point"]
    assert encode(X, scale, zero, 0, 255).tolist() == wanted["codes"]
    assert mse(round_affine(X, scale, zero, 8)) == pytest.approx(wanted["mse"], rel=1e-9)


def test_symmetric_codes_are_the_golden_ones():
    wanted = GOLDEN["symmetric_int8"]
    scale = symmetric_scale(X, 8)
    assert float(scale) == pytest.approx(wanted["scale"], rel=1e-9)
    codes = encode(X, scale, 0, -127, 127)
    assert codes.tolist() == wanted["codes"]
    assert mse(codes * scale) == pytest.approx(wanted["mse"], rel=1e-9)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_scale_of_least_error_is_the_golden_one(bits):
    wanted, most = GOLDEN[f"mse_symmetric_int{bits}_100_candidates"], 2 ** (bits - 1) - 1
    scale = least_error_scale(X, bits)
    assert float(scale) == pytest.approx(wanted["scale"], rel=1e-9)
    assert float(scale / symmetric_scale(X, bits)) == pytest.approx(wanted["best_k"] / 100)
    assert mse(encode(X, scale, 0, -most, most) * scale) == pytest.approx(wanted["mse"], rel=1e-9)


@pytest.mark.parametrize(
    ("low", "high", "zero", "scale"),
    [(1.0, 3.0, 0, 1.0), (-3.0, -1.0, 3, 1.0), (0.0, 0.0, 0, 1.0), (-1e-42, 1e-42, 0, 1.0)],
)
def test_ranges_contain_zero_and_no_scale_vanishes(low, high, zero, scale):
    found = affine(torch.tensor(low), torch.tensor(high), 2)
    assert (int(found.zero), float(found.scale)) == (zero, scale)
    assert float(round_affine(torch.zeros(()), *found, 2)) == 0.0


def test_groups_are_consecutive_inputs_with_a_short_one_last():
    matrix = torch.arange(10.0).view(2, 5)
    rows = grouped(matrix, 2)
    assert rows.tolist() == [[[0, 1], [2, 3], [4, 0]], [[5, 6], [7, 8], [9, 0]]]
    scales = symmetric_scale(rows, 4).squeeze(-1)
    assert spread(scales, matrix.shape, 2)[1].tolist() == pytest.approx(
        [6 / 7] * 2 + [8 / 7] * 2 + [9 / 7]
    )


def histogram(values):
    found = Histogram.empty(*map(float, values.aminmax()))
    found.add(values)
    return found


def test_histograms_of_parts_add_up():
    torch.manual_seed(0)
    values = torch.randn(1000)
    whole, ends = histogram(values), tuple(map(float, values.aminmax()))
    parts = Histogram.empty(*ends)
    for some in values.split(300):
        parts.add(some)
    assert torch.equal(parts.counts, whole.counts)
    assert float(whole.counts.sum()) == 1000


def test_a_histogram_of_zeros_has_a_range():
    seen = histogram(torch.zeros(5))
    for kind in ("minmax", "percentile", "mse", "kl"):
        assert find_range(seen, kind, 8) == (0.0, 0.0)


def test_percentile_ranges_are_those_of_the_values_within_a_bin():
    torch.manual_seed(0)
    values = torch.randn(20_000).clamp(min=-1.0)
    seen = histogram(values)
    found = find_range(seen, "percentile", 8, 99.0)
    for end, percent in zip(found, (0.5, 99.5), strict=True):
        wanted = float(values.quantile(percent / 100))
        assert end == pytest.approx(wanted, abs=seen.width)
    assert find_range(seen, "percentile", 8, 100.0) == pytest.approx(
        find_range(seen, "minmax", 8), abs=1e-6
    )


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_range_of_least_error_is_that_of_the_values(bits):
    torch.manual_seed(0)
    values = torch.randn(20_000).double() ** 3
    found = find_range(histogram(values), "mse", bits)
    errors = []
    for k in range(1, 101):
        scale, zero = affine(k / 100 * values.min(), k / 100 * values.max(), bits)
        errors.append(float((round_affine(values, scale, zero, bits) - values).square().mean()))
    best = errors.index(min(errors)) + 1
    assert found.high / float(values.max()) == pytest.approx(best / 100, abs=0.011)
    narrow = affine(*map(torch.tensor, found), bits)
    error = float((round_affine(values, *narrow, bits) - values).square().mean())
    assert error <= 1.02 * min(errors)


def plain_kl(counts):
    """The calibration of least divergence as one would write it down."""
    best = (torch.inf, 0.0)
    for last in range(128, 2049, 16):
        p = counts[:last].clone()
        p[-1] += counts[last:].sum()
        q, edges = torch.zeros(last, dtype=p.dtype), [-(-k * last // 128) for k in range(129)]
        for low, high in itertools.pairwise(edges):
            part = counts[low:high]
            if int((part > 0).sum()):
                q[low:high] = torch.where(part > 0, part.sum() / (part > 0).sum(), 0.0)
        empty_p, empty_q = (p == 0) & (q != 0), (q == 0) & (p != 0)
        p[empty_p], q[empty_q] = 1e-4, 1e-4
        p, q = p / p.sum(), q / q.sum()
        used = p > 0
        divergence = float((p[used] * (p[used] / q[used]).log()).sum())
        if divergence < best[0]:
            best = (divergence, last + 0.5)
    return best[1]


def test_the_threshold_of_least_divergence_is_that_of_plain_code():
    torch.manual_seed(0)
    for values in (torch.randn(50_000), torch.randn(50_000) ** 3, torch.rand(50_000)):
        seen = histogram(values)
        assert len(seen.magnitudes) == BINS // 2 == 2048
        assert float(seen.magnitudes.sum()) == 50_000
        assert _least_divergence(seen.magnitudes) == plain_kl(seen.magnitudes)
    heavy = histogram(torch.cat([torch.randn(50_000), torch.tensor([40.0])]))
    low, high = find_range(heavy, "kl", 8)
    assert high < 20
    assert low == pytest.approx(heavy.low)


def test_another_kind_of_range_is_refused():
    with pytest.raises(UsageError, match="one of minmax"):
        find_range(histogram(torch.ones(3)), "median", 8)
