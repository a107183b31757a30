"""Numbers as text."""

import math

from hypothesis import given
from hypothesis import strategies as st

from smallfry.io.numbers import exact


@given(st.floats(allow_nan=False))
def test_a_number_is_read_back_from_its_text(value):
    assert float(exact(value)) == value


def test_what_is_short_stays_short():
    assert [exact(value) for value in (1, 0.3, 3.0, 1e-5, 1e6, math.inf)] == [
        *("1", "0.3", "3", "1e-05", "1e+06", "inf")
    ]


def test_neighbours_have_unlike_texts():
    value = 0.1
    texts = {exact(value), exact(math.nextafter(value, 1)), exact(math.nextafter(value, 0))}
    assert len(texts) == 3
