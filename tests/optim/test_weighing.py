"""Row weights of micro-batches, outputs and processes on one scale."""

from types import SimpleNamespace

import pytest
import torch

from smallfry.curvature.row_weights import RowWeights
from smallfry.optim.weighing import Weighing, weigh_rows, weighings


class Alone:
    """One process, or several that all have the same."""

    def __init__(self, count=1):
        self.count = count

    def sums(self, numbers):
        return [self.count * number for number in numbers]


def seen(weights, size=4, dtype=torch.float32):
    return SimpleNamespace(
        outputs=(torch.zeros(size, 3, dtype=dtype),), weights={0: weights}, size=size,
        samples=size, shares={}, weighted={}, grouping=None,
    )  # fmt: skip


def values(*numbers):
    return torch.tensor(numbers, dtype=torch.float32)[:, None]


def test_equal_rows_are_not_weighted():
    (found,) = weighings([seen(RowWeights(None, 0.25))], False, Alone()).values()
    assert not found.weighted
    assert found.certain
    assert (found.samples, found.size, found.rows, found.unit) == (4.0, 4.0, 4.0, 0.25)
    assert found.counted("mean") == found.counted("sum") == found.counted(1.0) == 4.0


def test_rows_left_out_are_not_counted():
    (found,) = weighings([seen(RowWeights(values(1, 1, 0, 0), 0.5))], False, Alone()).values()
    assert found.weighted
    assert found.within
    assert found.size == 2.0
    assert found.counted("mean") == 2.0
    assert found.counted("sum") == 4.0


def test_weights_that_differ_between_micro_batches_alone_are_uneven():
    parts = [seen(RowWeights(None, 0.5)), seen(RowWeights(None, 1.5))]
    (found,) = weighings(parts, False, Alone()).values()
    assert found.weighted
    assert found.within
    assert found.unit == pytest.approx(1.0)
    same = [seen(RowWeights(None, 0.5)), seen(RowWeights(None, 0.5 * (1 + 1e-5)))]
    assert not weighings(same, False, Alone())[0].weighted


def test_weights_that_differ_between_processes_alone_are_even_within_each():
    terms = []
    for unit in (0.5, 1.5):
        one = SimpleNamespace(sums=lambda numbers: terms.append(numbers) or numbers)
        weighings([seen(RowWeights(None, unit))], False, one)
    both = SimpleNamespace(sums=lambda _: [a + b for a, b in zip(*terms, strict=True)])
    (found,) = weighings([seen(RowWeights(None, 0.5))], False, both).values()
    assert found.weighted
    assert not found.within
    assert found.unit == pytest.approx(1.0)


def test_a_part_of_padding_alone_counts_nothing():
    parts = [seen(None), seen(RowWeights(None, 0.25))]
    (found,) = weighings(parts, False, Alone()).values()
    assert found.weighted
    assert (found.samples, found.size) == (8.0, 4.0)


def test_soft_targets_leave_the_weights_unknown():
    parts = [seen(RowWeights(None, None)), seen(RowWeights(None, 0.25))]
    (found,) = weighings(parts, False, Alone()).values()
    assert not found.certain
    assert found.unit == 0.0


@pytest.mark.parametrize(("given", "scaled"), [(False, True), (True, False)])
def test_a_scaled_loss_leaves_read_weights_unknown_and_stated_ones_not(given, scaled):
    one = RowWeights(values(1, 1, 0, 2), 0.25, given)
    assert weighings([seen(one)], True, Alone())[0].scaled == scaled
    assert not weighings([seen(one)], False, Alone())[0].scaled


def test_processes_are_added_up():
    one = seen(RowWeights(values(1, 1, 0, 0), 0.5))
    alone, both = (weighings([one], False, Alone(count))[0] for count in (1, 2))
    assert both.samples == 2 * alone.samples
    assert both.size == 2 * alone.size
    assert both.unit == pytest.approx(alone.unit)


def test_nothing_seen_is_nothing_weighed():
    assert weighings([], False, Alone()) == {}


@pytest.mark.parametrize("scale", ["mean", "sum", 1.0])
def test_equal_rows_have_a_share_of_one(scale):
    part = seen(RowWeights(None, 0.25))
    weigh_rows([part], 1.0, scale, False, Alone())
    assert part.shares == {0: 1.0}
    assert part.weighted == {0: False}
    assert part.grouping == 1.0


def test_known_weights_give_the_share_of_a_row_in_the_loss():
    # L = Σ ρ nll = factor · mean over samples of Σ ω nll: ω = ρ · samples / factor
    part = seen(RowWeights(values(2, 1, 1, 0), 0.3))
    weigh_rows([part], 2.0, 2.0, False, Alone())
    assert part.shares[0] == pytest.approx(4 * 0.3 / 2.0)
    weigh_rows([part], 2.0, 2.0, False, Alone(2))  # gradients are averaged over processes
    assert part.shares[0] == pytest.approx(8 * 0.3 / (2.0 * 2))


@pytest.mark.parametrize(("scale", "share"), [("mean", 2.0), ("sum", 1.0)])
def test_rows_of_unknown_weight_are_a_mean_or_a_sum_of_those_that_count(scale, share):
    part = seen(RowWeights(values(1, 1, 0, 0), None))
    weigh_rows([part], 1.0, scale, False, Alone())
    assert part.shares[0] == pytest.approx(share)


def test_counted_samples_are_rows_or_samples():
    given = Weighing(True, True, True, False, size=3.0, rows=2.0, samples=4.0, unit=1.0)
    assert [given.counted(scale) for scale in ("mean", "sum", 0.5)] == [2.0, 4.0, 3.0]
