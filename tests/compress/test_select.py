"""Layers chosen by patterns of their names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from smallfry.compress.select import chosen, dense_layers
from smallfry.errors import UsageError

NAMES = ["stem", "blocks.0.fc", "blocks.1.fc", "blocks.1.attn.qkv", "head"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)
        self.attention = nn.MultiheadAttention(4, 2)
        self.head = nn.Linear(4, 2)
        self.again = self.head


def test_linear_layers_and_convolutions_are_listed_once():
    assert dense_layers(Net()) == ["stem", "head"]  # nothing inside PyTorch's own attention


def test_a_layer_that_is_the_model_has_no_name_and_is_listed():
    assert dense_layers(nn.Linear(2, 2)) == [""]


@given(
    include=st.lists(st.sampled_from(["*", "blocks.*", "*.fc", "head", "stem"]), min_size=1),
    exclude=st.lists(st.sampled_from(["blocks.1.*", "*.qkv", "head"])),
)
def test_what_is_chosen_is_included_not_excluded_and_in_order(include, exclude):
    every = {p: {n for n in NAMES if _matches(n, p)} for p in {*include, *exclude}}
    expected = set().union(*(every[p] for p in include)) - set().union(*(every[p] for p in exclude))
    if not expected:
        with pytest.raises(UsageError, match="matches no layer"):
            chosen(NAMES, include, exclude, "layer")
    else:
        assert chosen(NAMES, include, exclude, "layer") == [n for n in NAMES if n in expected]


def _matches(name, pattern):
    if pattern.startswith("*"):
        return name.endswith(pattern[1:])
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


def test_a_name_that_is_nearly_right_is_named():
    with pytest.raises(UsageError, match=r"matches no layer.*did you mean 'head'"):
        chosen(NAMES, ["haed"], [], "layer")


def test_letters_count_and_brackets_are_patterns():
    with pytest.raises(UsageError, match="matches no layer"):
        chosen(NAMES, ["Head"], [], "layer")
    assert chosen(NAMES, ["blocks.[01].fc"], [], "layer") == ["blocks.0.fc", "blocks.1.fc"]


def test_a_model_without_layers_is_refused():
    with pytest.raises(UsageError, match="has no linear layer or convolution left"):
        dense_layers(nn.ReLU())
