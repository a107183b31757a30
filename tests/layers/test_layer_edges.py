"""Layers in place of dense ones: padding, dtypes, strides of memory, and what is refused."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from smallfry.errors import UsageError
from smallfry.layers.linear_map import (
    DENSE,
    LinearMap,
    find_layer,
    layers,
    register_layer,
    require_dense,
)
from smallfry.layers.low_rank import LowRank
from smallfry.layers.quantized import BITS, QuantizedWeight, quantize

CONVOLUTIONS = {
    "reflect": {"padding": 2, "padding_mode": "reflect"},
    "replicate": {"padding": (1, 2), "padding_mode": "replicate", "stride": 2},
    "circular": {"padding": 1, "padding_mode": "circular", "dilation": 2},
    "same, reflect": {"padding": "same", "padding_mode": "reflect"},
    "same": {"padding": "same", "dilation": 2},
    "valid": {"padding": "valid"},
    "uneven": {"padding": (0, 2), "stride": (2, 1)},
    "grouped": {"groups": 2, "padding": 1},
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_a_quantized_convolution_pads_as_the_dense_one(case, bias):
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, bias=bias, **CONVOLUTIONS[case])
    small, inputs = QuantizedWeight.from_dense(layer, bits=8), torch.randn(2, 4, 9, 10)
    rounded = copy.deepcopy(layer)
    with torch.no_grad():
        rounded.weight.copy_(small.weight)
    torch.testing.assert_close(small(inputs), rounded(inputs))
    torch.testing.assert_close(small.dense()(inputs), rounded(inputs))
    assert small.dense().padding_mode == layer.padding_mode


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_a_low_rank_layer_of_another_padding_is_refused(mode):
    layer = nn.Conv2d(4, 6, 3, padding=1, padding_mode=mode)
    with pytest.raises(ValueError, match="non-zero padding modes are not supported"):
        LowRank.from_dense(layer, rank=2)


@pytest.mark.parametrize("kind", [LowRank, QuantizedWeight])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_layers_take_and_give_the_dtype_of_the_model(kind, dtype):
    setting = {"rank": 2} if kind is LowRank else {"bits": 6}
    layer = nn.Linear(6, 5).to(dtype)
    small = kind.from_dense(layer, **setting)
    inputs = torch.randn(3, 6, dtype=dtype)
    assert small(inputs).dtype == dtype
    assert small(inputs).shape == layer(inputs).shape


@pytest.mark.parametrize("kind", [LowRank, QuantizedWeight])
@pytest.mark.parametrize("shape", [(0, 6), (1, 6), (6,), (2, 0, 6)])
def test_empty_and_single_inputs_pass(kind, shape):
    small = kind.from_dense(nn.Linear(6, 5), **({"rank": 2} if kind is LowRank else {"bits": 6}))
    inputs = torch.randn(*shape)
    torch.testing.assert_close(small(inputs), small.dense()(inputs))
    assert small(inputs).shape == (*shape[:-1], 5)


@pytest.mark.parametrize("kind", [LowRank, QuantizedWeight])
def test_transposed_weights_and_inputs_give_the_same(kind):
    setting = {"rank": 2} if kind is LowRank else {"bits": 6}
    plain, strided = nn.Linear(6, 5), nn.Linear(6, 5)
    strided.load_state_dict(plain.state_dict())
    strided.weight = nn.Parameter(plain.weight.detach().T.contiguous().T)
    assert not strided.weight.is_contiguous()
    inputs = torch.randn(6, 4).T
    one, other = (kind.from_dense(each, **setting) for each in (plain, strided))
    torch.testing.assert_close(one(inputs), other(inputs.contiguous()))


def test_gradients_go_through_a_quantized_weight_to_inputs_and_bias_alone():
    small = QuantizedWeight.from_dense(nn.Linear(6, 5), bits=4)
    inputs = torch.randn(3, 6, requires_grad=True)
    small(inputs).sum().backward()
    torch.testing.assert_close(inputs.grad, small.weight.sum(0).expand(3, 6))
    assert small.bias.grad.tolist() == [3.0] * 5
    assert [name for name, p in small.named_parameters() if p.requires_grad] == ["bias"]


@pytest.mark.parametrize("bits", BITS)
def test_rounding_twice_is_rounding_once(bits):
    torch.manual_seed(bits)
    codes, scales = quantize(torch.randn(4, 3, 2), bits)
    again, same = quantize(codes * scales, bits)
    assert torch.equal(again, codes)
    torch.testing.assert_close(same, scales)
    assert scales.shape == (4, 1, 1)


@pytest.mark.parametrize("bits", BITS)
def test_signs_and_order_survive_rounding(bits):
    weight = torch.linspace(-1, 1, 41)[None]
    codes, _ = quantize(weight, bits)
    assert torch.equal(codes.flip(1), -codes)
    assert bool((codes[0, 1:] >= codes[0, :-1]).all())


def test_numbers_of_every_size_are_rounded_to_their_own_scale():
    for size in (1e-30, 1e-3, 1e30):
        weight = torch.tensor([[size, -size / 2, 0.0]])
        codes, scales = quantize(weight, 8)
        torch.testing.assert_close(codes * scales, weight, rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("layer", "settings", "message"),
    [
        (nn.Conv1d(2, 2, 1), {"bits": 4}, "expected nn.Linear or nn.Conv2d, got Conv1d"),
        (nn.LayerNorm(3), {"bits": 4}, "got LayerNorm"),
        (nn.Linear(2, 2), {"bits": 9}, "bits from 2 to 8"),
        (nn.Linear(2, 2), {"bits": 1}, "bits from 2 to 8"),
        (nn.Linear(2, 2), {"bits": True}, "bits from 2 to 8"),
        (nn.Linear(2, 2), {"bits": 4.0}, "bits from 2 to 8"),
        (nn.Linear(2, 2), {}, "bits from 2 to 8"),
        (nn.Linear(2, 2), {"bits": 4, "rank": 1}, "may have group, input_bits, calls and bias"),
    ],
)
def test_what_cannot_be_quantized_is_refused(layer, settings, message):
    with pytest.raises(ValueError, match=message):
        QuantizedWeight.from_dense(layer, **settings)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Conv1d(2, 2, 1), "expected nn.Linear or nn.Conv2d, got Conv1d"),
        (nn.Embedding(3, 2), "got Embedding"),
        (nn.Conv2d(4, 4, 1, groups=2), "convolutions with groups"),
    ],
)
def test_only_dense_layers_are_replaced(layer, message):
    with pytest.raises(ValueError, match=message):
        require_dense(layer)
    for kind in DENSE:
        assert require_dense(kind(2, 2, 1) if kind is nn.Conv2d else kind(2, 2)) is None


def test_layers_are_found_by_name_and_taken_once():
    assert find_layer("low_rank") is LowRank
    assert isinstance(LowRank.like(nn.Linear(2, 2), rank=1), LinearMap)
    assert not isinstance(nn.Linear(2, 2), LinearMap)
    assert {*layers()} >= {"low_rank", "quantized_weight"}
    with pytest.raises(UsageError, match="unknown layer 'low_rnk'; did you mean 'low_rank'"):
        find_layer("low_rnk")
    with pytest.raises(UsageError, match="unknown layer '3'"):
        find_layer(3)

    class Other(nn.Module):
        name = "low_rank"

    with pytest.raises(UsageError, match="two layers are named 'low_rank'"):
        register_layer(Other)
    assert find_layer("low_rank") is LowRank


@pytest.mark.parametrize("outputs", [1, 3, 8])
@pytest.mark.parametrize("inputs", [1, 5])
def test_the_nearest_layer_of_each_rank_gets_nearer(outputs, inputs):
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs).double()
    singular = torch.linalg.svdvals(layer.weight.detach())
    for rank in range(1, min(inputs, outputs) + 1):
        made = LowRank.from_dense(layer, rank=rank)
        distance = (made.dense().weight - layer.weight).norm()
        torch.testing.assert_close(distance, singular[rank:].norm(), atol=1e-12, rtol=1e-9)
        assert made.reduce.weight.shape == (rank, inputs)
        # both factors have one size, so that neither's gradient is larger
        torch.testing.assert_close(made.reduce.weight.norm(), made.expand.weight.norm())


def test_a_low_rank_convolution_keeps_the_form_of_the_dense_one():
    layer = nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2))
    made = LowRank.from_dense(layer, rank=5)
    inputs = torch.randn(2, 3, 7, 8)
    torch.testing.assert_close(made(inputs), layer(inputs), atol=1e-5, rtol=1e-4)
    dense = made.dense()
    for name in ("stride", "padding", "dilation", "kernel_size"):
        assert getattr(dense, name) == getattr(layer, name)
    torch.testing.assert_close(F.conv2d(inputs, dense.weight, dense.bias, (2, 1), (1, 0), (1, 2)),
                               layer(inputs), atol=1e-5, rtol=1e-4)  # fmt: skip
