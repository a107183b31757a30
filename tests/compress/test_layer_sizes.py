"""Sizes of each layer before and after a compression."""

import timm
import torch
from torch import nn

from smallfry import compress, cost
from smallfry.compress.layer_sizes import LayerSize, layer_sizes, written_bytes

IMAGE = torch.zeros(1, 1, 8, 8)


class Small(nn.Module):
    """A network with a parameter, a stored and a temporary buffer of its own."""

    def __init__(self, inner, last=None):
        super().__init__()
        self.inner, self.last = inner, last
        self.shift = nn.Parameter(torch.zeros(4))
        self.register_buffer("kept", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("temporary", torch.zeros(100), persistent=False)

    def forward(self, x):
        hidden = self.inner(x) + self.shift
        return hidden if self.last is None else self.last(hidden)


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


def test_what_replaces_a_layer_counts_as_this_layer():
    dense, low = linear(8, 4), nn.Sequential(linear(8, 1), nn.Sequential(linear(1, 4)))
    assert layer_sizes(Small(dense), Small(low), torch.zeros(1, 8)) == [
        LayerSize("(model)", (4, 4), (32, 32), (0, 0)),  # the shift and the buffer that is kept
        LayerSize("inner", (32, 12), (128, 48), (32, 12)),
    ]


def test_a_layer_that_is_erased_has_nothing_left_and_a_new_one_had_nothing():
    found = layer_sizes(Small(linear(4, 4)), Small(nn.Identity(), linear(4, 2)), torch.zeros(1, 4))
    assert found[1:] == [
        LayerSize("inner", (16, 0), (64, 0), (16, 0)),
        LayerSize("last", (0, 8), (0, 32), (0, 8)),
    ]


def test_a_shared_weight_counts_once_and_its_products_at_every_call():
    layer = linear(4, 4)
    assert layer_sizes(nn.Sequential(layer, layer), linear(4, 4), torch.zeros(1, 4)) == [
        LayerSize("0", (16, 0), (64, 0), (32, 0)),
        LayerSize("(model)", (0, 16), (0, 64), (0, 16)),
    ]


def test_bytes_of_tensors_in_another_form_are_those_that_methods_report():
    written = written_bytes([{"method": "a"}, {"bytes": {"weight": 7}}, {"bytes": {"bias": 2}}])
    model = nn.Linear(4, 4)
    (found,) = layer_sizes(model, model, torch.zeros(1, 4), written)
    assert found.bytes == (80, 9)
    assert found.to_dict()["bytes"] == {"before": 80, "after": 9}


def test_layers_of_a_compressed_recursive_model_add_up_to_its_cost():
    torch.manual_seed(0)
    model = timm.create_model("vitrm_micro_patch4_8")
    methods = [compress.LowRank(keep=0.5, include=("*.mlp.*",)), compress.RoundWeights(bits=8)]
    small, _ = compress.apply_to_model(model, methods)
    found = layer_sizes(model, small, IMAGE)
    for end, each in enumerate((model, small)):
        whole = cost(each, IMAGE)
        assert sum(row.parameters[end] for row in found) == whole.parameters
        assert sum(row.macs[end] for row in found) == whole.macs
    names = [name for name, _ in model.named_modules()]
    assert [row.name for row in found if row.name != "(model)"] == [
        name for name in names if name in {row.name for row in found}
    ]
    by_name = {row.name: row for row in found}
    assert (
        by_name["blocks.0.mlp.fc2"].parameters[1] < 0.6 * by_name["blocks.0.mlp.fc2"].parameters[0]
    )
