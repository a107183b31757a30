"""Values become strict JSON, whatever they were."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smallfry.io.json import strict


class Pair(NamedTuple):
    """A named tuple."""

    first: object
    second: object = 2


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (True, True),
        (3, 3),
        (2**70, 2**70),
        (0.5, 0.5),
        (math.nan, None),
        (math.inf, None),
        (-math.inf, None),
        ("text", "text"),
        (Path("a/b"), "a/b"),
        (1 + 2j, "(1+2j)"),
        ((1, 2.0, math.nan), [1, 2.0, None]),
        ([Pair(math.inf)], [{"first": None, "second": 2}]),
        (Pair(Pair(1), [Pair(2)]), {"first": {"first": 1, "second": 2},
                                    "second": [{"first": 2, "second": 2}]}),
        ({1: {None: math.nan}}, {"1": {"None": None}}),
    ],
)  # fmt: skip
def test_values_are_those_of_json(value, expected):
    found = strict(value)
    assert found == expected
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.tuples(inner, inner)
            | st.builds(Pair, inner, inner)
            | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
        ),
        max_leaves=10,
    )
)
def test_any_value_can_be_written_and_is_not_changed_again(value):
    found = strict(value)
    json.dumps(found, allow_nan=False)
    assert strict(found) == found
