"""What knows that tokens lie on a grid."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from smallfry.models.grid import ConvSwiGLU, GridLayer, Rotary, conv_tokenizer
from smallfry.models.layers import SwiGLU


@pytest.fixture(autouse=True)
def _in_double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_the_convolutional_tokenizer_puts_each_token_over_its_patch(patch_size):
    side = 4
    tokenizer = conv_tokenizer(3, 16, patch_size)
    images = torch.randn(1, 3, side * patch_size, side * patch_size, requires_grad=True)
    tokens = tokenizer(images)
    assert tokens.shape == (1, 16, side, side)
    (gradient,) = torch.autograd.grad(tokens[0, :, 1, 1].sum(), images)
    rows, columns = gradient[0].abs().sum(0).nonzero().unbind(1)
    first, last = patch_size, 2 * patch_size - 1  # of the patch in row 1, column 1
    for seen in (rows, columns):
        assert seen.min() < first
        assert seen.max() >= last
        assert seen.max() - seen.min() < 2 * patch_size + 3


def test_a_fresh_depthwise_convolution_changes_nothing():
    conv = ConvSwiGLU(16, 12)
    plain = SwiGLU(16, 12)
    plain.load_state_dict(conv.state_dict(), strict=False)
    rows = torch.randn(2, 33, 16)
    assert_close(conv(rows, (16, 1, 16)), plain(rows))


def test_depthwise_convolution_keeps_to_each_grid_and_to_the_neighbours():
    conv = ConvSwiGLU(16, 12)
    torch.nn.init.normal_(conv.depthwise.weight)
    rows = torch.randn(1, 16 + 1 + 16, 16, requires_grad=True)
    out = conv(rows, (16, 1, 16))

    def seen_by(row):
        (gradient,) = torch.autograd.grad(out[0, row].sum(), rows, retain_graph=True)
        return gradient[0].abs().sum(1).nonzero().flatten().tolist()

    assert seen_by(5) == [0, 1, 2, 4, 5, 6, 8, 9, 10]  # row 1, column 1 of x
    assert seen_by(16) == [16]  # y
    assert seen_by(17) == [17 + i for i in (0, 1, 4, 5)]  # the corner of z


@settings(max_examples=20, deadline=None)
@given(heads=st.integers(1, 3), quarter=st.integers(1, 4), side=st.integers(2, 5))
def test_rotary_attention_depends_on_relative_position_alone(heads, quarter, side):
    width = heads * quarter * 4
    rotary = Rotary(quarter * 4, (side, side + 1), [(side, side + 1)])
    places = list(product(range(side), range(side + 1)))
    qkv = torch.randn(1, 1, 3 * width).expand(-1, len(places) + 1, -1)
    turned = rotary(qkv, [len(places), 1])
    q, k, v = turned.view(len(places) + 1, 3, heads, -1).unbind(1)
    assert_close(v.flatten(1), qkv[0, :, 2 * width :])  # values stay
    assert_close(turned[0, -1], qkv[0, -1])  # and so does what lies nowhere
    assert_close(q.norm(dim=-1), qkv[0, :, :width].reshape(-1, heads, quarter * 4).norm(dim=-1))
    scores = torch.einsum("ihd,jhd->ijh", q[:-1], k[:-1])
    by_offset = {}
    for i, j in product(range(len(places)), repeat=2):
        offset = tuple(b - a for a, b in zip(places[i], places[j], strict=True))
        assert_close(scores[i, j], by_offset.setdefault(offset, scores[i, j]))
    assert (by_offset[0, 1] - by_offset[0, 0]).abs().max() > 1e-9
    assert (by_offset[0, 1] - by_offset[1, 0]).abs().max() > 1e-9


def test_a_layer_scale_near_zero_makes_a_layer_the_identity():
    layer = GridLayer(16, 2, 12, 0.0, 0.0, depthwise=True, layer_scale=1e-12)
    rows = torch.randn(2, 9, 16)
    assert_close(layer(rows, layer.project(rows), sizes=(9,)), rows, atol=1e-9, rtol=0)
