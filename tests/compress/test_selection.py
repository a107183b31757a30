"""Choice of channels: the least salient go, survivors are multiples, budgets are met."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smallfry.compress.prune.selection import (
    block_size,
    can_lose,
    fewest_within,
    lowest,
    lowest_blocks,
    reference_choice,
    without,
)
from smallfry.transforms.groups import ChannelGroup


def group(channels, divisor=1, counts=None, zero_invariant=True):
    return ChannelGroup("g", channels, (), (), zero_invariant, counts or {}, divisor)


@pytest.mark.parametrize(
    ("given_group", "divisible", "size", "loses"),
    [
        (group(64), 16, 16, True),
        (group(17), 16, 16, True),
        (group(16), 16, 1, False),
        (group(8), 16, 1, False),
        (group(8, divisor=4), 16, 4, False),
        (group(64, divisor=32), 16, 32, True),
        (group(4, counts={"attn.heads": 1}), 16, 1, True),
        (group(1, counts={"attn.heads": 1}), 16, 1, False),
        (group(64, zero_invariant=False), 16, 16, False),
        (group(3), 1, 1, True),
        (group(1), 1, 1, False),
    ],
)
def test_survivors_are_multiples_and_heads_go_one_by_one(given_group, divisible, size, loses):
    assert block_size(given_group, divisible) == size
    assert can_lose(given_group, divisible) is loses


def test_the_lowest_of_all_groups_go_first():
    scores = [torch.tensor([5.0, 1.0, 4.0]), torch.tensor([2.0, 3.0, 9.0])]
    every = [[0, 1, 2], [0, 1, 2]]
    assert lowest(scores, every, 1) == [[1], []]
    assert lowest(scores, every, 3) == [[1], [0, 1]]
    assert lowest(scores, [[0, 2], [0, 1, 2]], 2) == [[], [0, 1]]
    assert lowest(scores, every, 0) == [[], []]
    assert lowest(scores, [[], []], 0) == [[], []]
    assert lowest(scores, every, 6) == every


def test_of_equal_channels_the_first_goes():
    assert lowest([torch.zeros(4)], [[0, 1, 2, 3]], 2) == [[0, 1]]
    assert lowest_blocks([torch.zeros(4)], [[]], 2, [2]) == [[0, 1]]


PROBLEM = st.lists(
    st.tuples(st.integers(1, 12), st.integers(1, 5)), min_size=1, max_size=4
).flatmap(
    lambda shapes: st.tuples(
        st.just([step for _, step in shapes]),
        st.tuples(
            *(
                st.lists(st.integers(0, 30), min_size=size, max_size=size)
                for size, _ in shapes
            )
        ),
        st.tuples(*(st.sets(st.integers(0, size - 1), max_size=size) for size, _ in shapes)),
        st.integers(0, 40),
    )
)  # fmt: skip


def prepared(problem):
    steps, drawn, gone, number = problem
    return [torch.tensor(s).float() for s in drawn], [sorted(g) for g in gone], number, steps


@settings(deadline=None)
@given(PROBLEM)
def test_no_channel_that_stays_is_below_one_that_goes(problem):
    scores, gone, number, _ = prepared(problem)
    among = [[c for c in range(len(s)) if c not in g] for s, g in zip(scores, gone, strict=True)]
    number = min(number, sum(map(len, among)))
    chosen = lowest(scores, among, number)
    assert sum(map(len, chosen)) == number
    assert all(each == sorted({*each} & {*own}) for each, own in zip(chosen, among, strict=True))
    taken = [scores[g][c].item() for g, each in enumerate(chosen) for c in each]
    left = [scores[g][c].item() for g, own in enumerate(among) for c in {*own} - {*chosen[g]}]
    assert max(taken, default=-1.0) <= min(left, default=31.0)


@settings(deadline=None)
@given(PROBLEM)
def test_survivors_of_blocks_are_multiples_unless_the_group_is_untouched(problem):
    scores, gone, number, steps = prepared(problem)
    chosen = lowest_blocks(scores, gone, number, steps)
    for score, out, each, step in zip(scores, gone, chosen, steps, strict=True):
        left = len(score) - len(out) - len(each)
        assert left >= 0
        assert not {*each} & {*out}
        assert each == sorted(each)
        if out or each:
            assert left % step == 0
    lowest_of_each = [
        max([score[c].item() for c in each], default=-1.0)
        <= min(
            [score[c].item() for c in range(len(score)) if c not in each and c not in out],
            default=31.0,
        )
        for score, out, each in zip(scores, gone, chosen, strict=True)
    ]
    assert all(lowest_of_each)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(0, 60), st.sampled_from([1, 2, 4, 8]))
def test_one_group_meets_its_number_within_half_a_block(channels, number, step):
    (chosen,) = lowest_blocks([torch.arange(channels).float()], [[]], number, [step])
    most = channels - step if channels > step else 0
    if channels % step == 0 and channels > step:
        assert abs(len(chosen) - min(number, most)) <= step / 2
    assert chosen == list(range(len(chosen)))


@given(st.lists(st.integers(0, 100), min_size=1, max_size=30), st.integers(-5, 105))
def test_the_fewest_that_fit_a_budget_are_those_of_a_search_one_by_one(costs, most):
    falling = sorted(costs, reverse=True)
    found = fewest_within(lambda n: [[n]], lambda c: falling[c[0][0]], most, len(falling) - 1)
    expected = next((n for n, cost in enumerate(falling) if cost <= most), len(falling) - 1)
    assert found == expected


def test_a_budget_that_can_not_be_met_gives_the_limit():
    assert fewest_within(lambda n: [[n]], lambda c: 10.0, 5.0, limit=7) == 7
    assert fewest_within(lambda n: [[n]], lambda c: 1.0, 5.0, limit=7) == 0


def test_the_authors_rule_takes_by_index_and_rounds_up():
    """Worked by hand after only_train_once 3.1: of 8 channels, 3 are asked for, 2 go."""
    scores = [torch.tensor([1.0, 5.0, 2.0, 9.0, 3.0, 8.0, 7.0, 6.0])]
    assert reference_choice(scores, [[]], [[]], 3, 2) == [[0, 2]]
    assert reference_choice(scores, [[]], [[]], 2, 2) == [[0, 2]]
    assert reference_choice(scores, [[0, 2]], [[0, 2]], 2, 2) == [[1, 4]]
    assert reference_choice(scores, [[]], [[]], 3, 1) == [[0, 2, 4]]


def test_the_others_are_listed_in_order():
    assert without([3, 0], 5).tolist() == [1, 2, 4]
    assert without([], 3).tolist() == [0, 1, 2]
    assert without(range(3), 3).tolist() == []
    assert without([], 0).dtype == torch.int64
