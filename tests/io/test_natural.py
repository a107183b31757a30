"""Natural order of names."""

import random

from smallfry.io.natural import natural


def test_numbers_are_sorted_by_size_and_words_by_letters():
    names = ["a", "a1", "a1b", "a2", "a02b", "a10", "b", "b007", "b7", "b8"]
    assert sorted(random.Random(0).sample(names, len(names)), key=natural) == names


def test_names_are_sorted_alike_whatever_comes_first():
    names = ["٣", "²", "", "1", "01", "x", "-5", "10"]
    ordered = sorted(names, key=natural)
    assert ordered.index("1") < ordered.index("10")
    assert all(sorted(names[i:] + names[:i], key=natural) == ordered for i in range(len(names)))
