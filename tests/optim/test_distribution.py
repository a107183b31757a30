"""Assignment of blocks to processes, and what a refresh costs."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from smallfry.optim import METHODS
from smallfry.optim.distribution import (
    Cost,
    Machine,
    Traffic,
    assign,
    cost_of,
    gradient_time,
    loads,
    owners_of,
    refresh_time,
)

COSTS = st.lists(st.integers(0, 1000).map(float), max_size=40)


@settings(deadline=None)
@given(COSTS, st.integers(1, 9))
def test_the_longest_share_keeps_to_grahams_bound(costs, processes):
    owners = assign(costs, processes)
    assert len(owners) == len(costs)
    assert all(0 <= owner < processes for owner in owners)
    each = loads(costs, owners, processes)
    assert sum(each) == pytest.approx(sum(costs))
    largest = max(costs, default=0.0)
    assert max(each) <= sum(costs) / processes + largest * (1 - 1 / processes) + 1e-9


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 50).map(float), min_size=1, max_size=6), st.integers(1, 3))
def test_it_is_near_the_best_division_there_is(costs, processes):
    every = product(range(processes), repeat=len(costs))
    best = min(max(loads(costs, owners, processes)) for owners in every)
    found = max(loads(costs, assign(costs, processes), processes))
    assert found <= (4 / 3 - 1 / (3 * processes)) * best + 1e-9


@settings(deadline=None)
@given(COSTS)
def test_one_process_owns_everything(costs):
    assert assign(costs, 1) == [0] * len(costs)


def test_equal_costs_go_around_and_ties_go_to_the_first():
    assert assign([1.0] * 5, 2) == [0, 1, 0, 1, 0]
    assert assign([1.0, 5.0, 5.0], 3) == [2, 0, 1]
    assert assign([], 3) == []
    assert loads([], [], 3) == [0.0, 0.0, 0.0]


def test_owners_are_those_of_the_burdens():
    blocks = [SimpleNamespace(name=name, cost=cost) for name, cost in (("a", 1), ("b", 9))]
    method = SimpleNamespace(burden=lambda block: block.cost)
    assert owners_of(blocks, method, 2) == {"a": 1, "b": 0}
    assert owners_of(blocks, method, 1) == {"a": 0, "b": 0}


@pytest.mark.parametrize("name", METHODS)
def test_every_methods_cost_is_counted_and_grows_with_the_rows(name):
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    try:
        optimizer = METHODS[name].optimizer(model, 0.1)
        few, many = optimizer.costs(10), optimizer.costs(1000)
    except NotImplementedError:
        pytest.skip("has no cost of a block")
    assert set(few) == {block.name for block in optimizer.blocks}
    for block in few:
        assert few[block].owned >= 0
        assert all(number >= 0 for number in few[block].traffic)
        assert many[block].shared >= few[block].shared
        assert many[block].traffic.rows >= few[block].traffic.rows
        sums = few[block].traffic.summed + few[block].traffic.rows + few[block].traffic.everywhere
        assert sums > 0, block


def test_wider_numbers_are_more_bytes():
    traffic = {}
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        layer = nn.Linear(6, 5).to(dtype)
        optimizer = METHODS["kfac"].optimizer(layer, 0.1)
        traffic[dtype] = cost_of(optimizer.blocks[0], optimizer.approximation, 10).traffic
    assert traffic[torch.float64].summed == 2 * traffic[torch.float32].summed
    assert traffic[torch.bfloat16] == traffic[torch.float32]  # statistics are float32 at least


MACHINE = Machine(macs=1000.0, solver_macs=100.0, bandwidth=50.0, latency=0.5)
TWO = {
    "a": Cost(2000, 300, Traffic(summed=10, spread=20, rows=0, everywhere=5)),
    "b": Cost(1000, 100, Traffic(summed=0, spread=30, rows=40, everywhere=0)),
}


def test_one_process_sends_nothing():
    found = refresh_time(TWO, 1, MACHINE)
    assert found == (3.0, 4.0, 0.0, 0)
    assert found.seconds == 7.0


def test_a_refresh_of_two_takes_its_shares_and_its_messages():
    found = refresh_time(TWO, 2, MACHINE, messages=3)
    assert found.shared == 1.5
    assert found.owned == 3.0  # the larger block's owner
    assert found.bytes == 60 + (10 + 40) // 2
    assert found.sending == pytest.approx(85 / 50 + 0.5 * 3 * 2)
    assert found.seconds == pytest.approx(1.5 + 3.0 + 4.7)


@pytest.mark.parametrize("processes", [2, 4, 16])
def test_more_processes_compute_less_each(processes):
    one, many = (refresh_time(TWO, count, MACHINE) for count in (1, processes))
    assert many.shared == pytest.approx(one.shared / processes)
    assert many.owned <= one.owned


def test_gradients_are_averaged_in_a_ring():
    assert gradient_time(1000, 1, MACHINE) == 0.0
    assert gradient_time(1000, 2, MACHINE) == pytest.approx(4000 / 50 + 2 * 0.5)
    large = Machine(1.0, 1.0, bandwidth=50.0, latency=0.0)
    assert gradient_time(1000, 1000, large) < 2 * 4000 / 50
