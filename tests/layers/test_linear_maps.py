"""Low-rank layers and rounded weights against oracles; for laws of all: test_replacement_laws."""

import pytest
import torch
from torch import nn

from smallfry.layers.low_rank import LowRank
from smallfry.layers.quantized import QuantizedWeight, quantize

DENSE = {
    "linear": (lambda: nn.Linear(7, 5), (4, 7)),
    "no bias": (lambda: nn.Linear(7, 5, bias=False), (2, 3, 7)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 8)),
    "dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=2, bias=False), (2, 4, 9, 8)),
}


@pytest.fixture(params=DENSE)
def dense(request):
    torch.manual_seed(0)
    make, shape = DENSE[request.param]
    return make().double(), torch.randn(*shape).double()


def test_a_full_rank_is_exact_and_a_lower_one_is_the_nearest(dense):
    layer, inputs = dense
    weight = layer.weight.detach().flatten(1)
    full = min(weight.shape)
    exact = LowRank.from_dense(layer, rank=full)
    torch.testing.assert_close(exact(inputs), layer(inputs), atol=1e-12, rtol=0)
    lower = LowRank.from_dense(layer, rank=2).dense().weight.detach().flatten(1)
    left_out = torch.linalg.svdvals(weight)[2:].square().sum()  # Eckart and Young
    torch.testing.assert_close((weight - lower).square().sum(), left_out)


def test_codes_are_rounded_half_to_even_and_scales_are_of_the_channel():
    weight = torch.tensor([[7.0, 2.5, 3.5, -7.0], [0.0, 0.0, 0.0, 0.0], [14.0, 1.0, 3.0, -5.0]])
    codes, scales = quantize(weight, 4)
    assert codes.tolist() == [[7, 2, 4, -7], [0, 0, 0, 0], [7, 0, 2, -2]]
    assert scales.flatten().tolist() == [1.0, 1.0, 2.0]


@pytest.mark.parametrize("bits", range(2, 9))
def test_no_number_is_further_off_than_half_a_step(bits):
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 8, 3)
    small = QuantizedWeight.from_dense(layer, bits=bits)
    assert bool(((small.weight - layer.weight).abs() <= 0.5001 * small.scales).all())
    assert int(small.codes.abs().max()) == 2 ** (bits - 1) - 1


def test_a_depthwise_convolution_is_quantized_and_has_no_low_rank():
    layer, inputs = nn.Conv2d(4, 4, 3, groups=4), torch.randn(1, 4, 6, 6)
    small = QuantizedWeight.from_dense(layer, bits=8)
    torch.testing.assert_close(small(inputs), layer(inputs), atol=0.02, rtol=0)
    with pytest.raises(ValueError, match="groups"):
        LowRank.from_dense(layer, rank=1)


@pytest.mark.parametrize("settings", [{}, {"rank": 0}, {"rank": 6}, {"rank": 2.0}, {"bits": 3}])
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ValueError, match="rank"):
        LowRank.like(nn.Linear(7, 5), **settings)
