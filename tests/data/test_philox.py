"""Counter-based random numbers: functions of seed and index alone."""

import zlib
from itertools import combinations

import numpy as np
import pytest

from smallfry.data.philox import generator, uniform


def test_uniform_numbers_are_of_numpys_stream():
    philox = np.random.Philox(key=np.array([7, 0], np.uint64), counter=[0, 3, 5, 0])
    wanted = [(int(raw) >> 11) / 2**53 for raw in philox.random_raw(4)]
    assert uniform(4, 7, 3, 5).tolist() == wanted


@pytest.mark.parametrize("index", [(), (3,), (3, 5), (3, 5, 2)])
def test_an_items_generator_is_of_numpys_stream(index):
    key = np.array([zlib.crc32(b"words 1"), 9], np.uint64)
    counter = [0, *index, *[0] * (3 - len(index))]
    wanted = np.random.Generator(np.random.Philox(key=key, counter=counter)).normal(size=8)
    assert generator("words 1", 9, *index).normal(size=8).tolist() == wanted.tolist()


def test_items_families_and_seeds_have_streams_of_their_own():
    named = [("a", 0, 0), ("a", 0, 1), ("a", 1, 0), ("b", 0, 0), (5, 0, 0), ("a", 0, 0, 1)]
    streams = [{*generator(*each).integers(2**63, size=50).tolist()} for each in named]
    assert all(not one & other for one, other in combinations(streams, 2))


def test_more_than_three_indices_are_refused():
    with pytest.raises(ValueError, match="broadcast"):
        generator("a", 0, 1, 2, 3, 4)
