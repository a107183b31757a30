"""Splits: rows, new labels and shares of every class."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smallfry.data.splits import Split, hold_out, take_some


def split_of(labels):
    """Images whose only pixel is their number, in an array that holds others too."""
    count = len(labels)
    pixels = torch.arange(2 * count, dtype=torch.uint8).view(-1, 1, 1, 1)
    return Split(pixels, torch.arange(count) + count // 2, torch.tensor(labels, dtype=torch.int64))


LABELS = st.lists(st.integers(0, 5), min_size=1, max_size=60)


def test_images_are_those_of_the_rows():
    split = split_of([0, 1, 0, 1])
    assert len(split) == 4
    assert split.images.flatten().tolist() == [2, 3, 4, 5]
    part = split.take(torch.tensor([3, 0, 3]))
    assert part.images.flatten().tolist() == [5, 2, 5]
    assert part.labels.tolist() == [1, 0, 1]
    assert part.take(torch.tensor([1])).images.flatten().tolist() == [2]


def test_no_images_are_a_split_too():
    empty = split_of([0, 1]).take(torch.empty(0, dtype=torch.int64))
    assert len(empty) == 0
    assert empty.images.shape == (0, 1, 1, 1)


def test_new_labels_leave_out_what_they_do_not_map():
    split = split_of([0, 1, 2, 1])
    found = split.relabelled(np.array([1, -1, 0]))
    assert found.labels.tolist() == [1, 0]
    assert found.images.flatten().tolist() == [2, 4]
    assert len(split.relabelled(np.array([-1, -1, -1]))) == 0


def test_an_order_is_that_of_its_generator():
    split = split_of([0] * 9)
    first, again, other = (
        split.shuffled(torch.Generator().manual_seed(seed)).tolist() for seed in (0, 0, 1)
    )
    assert first == again != other
    assert sorted(first) == list(range(9))


@given(LABELS, st.floats(0, 0.9), st.integers(0, 3))
def test_a_share_of_every_class_is_held_out(labels, share, seed):
    split = split_of(labels)
    kept, held = hold_out(split, share, seed)
    assert sorted([*kept.rows.tolist(), *held.rows.tolist()]) == split.rows.tolist()
    assert kept.rows.tolist() == sorted(kept.rows.tolist())
    assert held.rows.tolist() == sorted(held.rows.tolist())
    for label in set(labels):
        count = labels.count(label)
        away = int((held.labels == label).sum())
        assert count - away >= 1
        if share == 0:
            assert away == 0
        else:
            assert away == min(count - 1, max(1, round(share * count)))


@given(LABELS, st.integers(0, 3))
def test_the_choice_follows_the_seed_and_each_image_keeps_its_label(labels, seed):
    split = split_of(labels)
    first, again = (hold_out(split, 0.3, seed)[1] for _ in range(2))
    assert torch.equal(first.rows, again.rows)
    by_row = dict(zip(split.rows.tolist(), labels, strict=True))
    assert [by_row[row] for row in first.rows.tolist()] == first.labels.tolist()


@given(LABELS, st.integers(0, 70), st.integers(0, 3))
def test_a_number_of_images_is_spread_over_the_classes(labels, count, seed):
    split = split_of(labels)
    some = take_some(split, count, seed)
    assert len(some) == min(count, len(labels))
    assert some.rows.tolist() == sorted({*some.rows.tolist()})
    classes = len(set(labels))
    assert len(set(some.labels.tolist())) == min(classes, len(some))
    if len(some) >= classes:
        for label in set(labels):
            share = labels.count(label) * len(some) / len(labels)
            assert abs(int((some.labels == label).sum()) - share) <= classes + 1


def test_fewer_images_are_a_part_of_more():
    """So a run on 200 images sees only images that one on 400 sees."""
    split = split_of([0, 1, 2] * 20)
    few, more = (set(take_some(split, count, 5).rows.tolist()) for count in (9, 30))
    assert few < more


@pytest.mark.parametrize("labels", [[0, 2, 2], [3]])
def test_classes_without_images_do_no_harm(labels):
    kept, held = hold_out(split_of(labels), 0.5, 0)
    assert len(kept) + len(held) == len(labels)
    assert len(take_some(split_of(labels), 1, 0)) == 1
