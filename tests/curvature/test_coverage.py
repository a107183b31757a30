"""Coverage: each trained parameter is in one block, or left out for a stated reason."""

import pytest
import torch
from torch import nn

from smallfry.curvature import cover
from smallfry.errors import UsageError

SHAPES = {  # layer, (groups, outputs, inputs with the bias)
    "linear": (lambda: nn.Linear(4, 3), (1, 3, 5)),
    "linear, no bias": (lambda: nn.Linear(4, 3, bias=False), (1, 3, 4)),
    "one output": (lambda: nn.Linear(4, 1), (1, 1, 5)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 5), (1, 3, 11)),
    "conv2d": (lambda: nn.Conv2d(2, 3, (2, 3)), (1, 3, 13)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 3, 19)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False), (4, 1, 9)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 3, 2), (1, 3, 17)),
    "transposed, grouped": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), (2, 3, 9)),
    "embedding": (lambda: nn.Embedding(9, 4), (1, 4, 9)),
}


@pytest.mark.parametrize("case", SHAPES)
def test_a_block_is_a_matrix_that_holds_every_number_once(case):
    make, shape = SHAPES[case]
    layer = make()
    (block,), uncovered = cover(layer)
    assert not uncovered
    assert block.shape == shape
    assert block.size == sum(p.numel() for p in layer.parameters())
    assert block.has_weight
    assert block.one_hot == (case == "embedding")
    numbers = torch.arange(block.size, dtype=torch.float64)
    sizes = [p.numel() for p in block.parameters.values()]
    parts = zip(block.parameters.items(), numbers.split(sizes), strict=True)
    tensors = {name: part.view(p.shape) for (name, p), part in parts}
    matrix = block.to_matrix(tensors)
    assert matrix.shape == shape
    assert matrix.flatten().sort().values.tolist() == numbers.tolist()
    back = block.from_matrix(matrix)
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor), name


@pytest.mark.parametrize("case", ["linear", "conv2d", "grouped", "transposed, grouped"])
def test_the_matrix_of_a_frozen_weight_is_its_bias(case):
    layer = SHAPES[case][0]()
    layer.weight.requires_grad_(False)
    (block,), _ = cover(layer)
    groups, outputs, _ = SHAPES[case][1]
    assert block.name == "bias"
    assert not block.has_weight
    assert block.shape == (groups, outputs, 1)
    bias = {"bias": torch.randn_like(layer.bias)}
    assert torch.equal(block.from_matrix(block.to_matrix(bias))["bias"], bias["bias"])
    assert block.to_matrix(bias).flatten().tolist() == bias["bias"].tolist()


def test_a_frozen_bias_is_no_column():
    layer = nn.Linear(4, 3)
    layer.bias.requires_grad_(False)
    (block,), uncovered = cover(layer)
    assert block.shape == (1, 3, 4)
    assert block.bias_column(layer) is None
    assert not uncovered


def test_nothing_is_covered_where_nothing_is_trained():
    layer = nn.Linear(4, 3).requires_grad_(False)
    assert cover(layer) == ((), {})
    assert cover(nn.Linear(4, 3), trained=[]) == ((), {})


def test_trained_parameters_are_chosen_among_those_with_a_gradient():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight.requires_grad_(False)
    blocks, uncovered = cover(net, trained=[net[0].bias, net[1].weight, net[1].bias])
    assert [block.name for block in blocks] == ["0.bias", "1.bias"]
    assert not uncovered


class Tied(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=bias)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("bias", [True, False])
def test_a_tied_weight_is_one_block_of_linear_form(bias):
    net = Tied(bias)
    (block,), uncovered = cover(net)
    assert list(block.layers) == ["head", "embed"]
    assert block.shape == (1, 7, 4 + bias)
    assert not block.one_hot
    assert block.bias_column(net.embed) is None
    assert block.bias_column(net.head) == (0 if bias else None)
    assert not uncovered


def test_a_tied_weight_is_left_out_where_its_rows_are_not_known():
    blocks, uncovered = cover(Tied(), tied=False)
    assert not blocks
    reason = "an embedding's and a linear layer's at once: see fisher="
    assert uncovered["embed.weight"] == reason
    assert set(uncovered) == {"embed.weight", "head.bias"}


def test_of_a_frozen_tie_the_linear_layers_bias_is_covered():
    net = Tied()
    net.embed.weight.requires_grad_(False)
    (block,), _ = cover(net)
    assert list(block.layers) == ["head"]
    assert block.name == "head.bias"


class Siblings(nn.Module):
    """Layers with one weight, each with a bias of its own."""

    def __init__(self, count=3):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 3) for _ in range(count))
        for layer in self.layers[1:]:
            layer.weight = self.layers[0].weight


def test_biases_of_layers_that_share_a_weight_are_a_column_each():
    net = Siblings()
    (block,), uncovered = cover(net)
    assert block.shape == (1, 3, 7)
    assert [block.bias_column(layer) for layer in net.layers] == [0, 1, 2]
    assert list(block.parameters) == ["layers.0.weight", *(f"layers.{i}.bias" for i in range(3))]
    assert not uncovered
    tensors = {name: torch.randn_like(p) for name, p in block.parameters.items()}
    matrix = block.to_matrix(tensors)
    assert torch.equal(matrix[0, :, 5], tensors["layers.1.bias"])
    back = block.from_matrix(matrix)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_a_bias_of_layers_with_different_weights_is_left_out():
    net = Siblings(2)
    net.layers[1].weight = nn.Parameter(torch.randn(3, 4))
    net.layers[1].bias = net.layers[0].bias
    blocks, uncovered = cover(net)
    assert [block.shape for block in blocks] == [(1, 3, 4)] * 2
    assert uncovered == {"layers.0.bias": "its bias is shared by layers with different weights"}


class OtherForward(nn.Linear):
    def forward(self, inputs):
        return super().forward(inputs).relu()


class SameForward(nn.Linear):
    def forward(self, inputs):
        return inputs @ self.weight.T + self.bias


class Promised(nn.Linear):
    acts_as = nn.Linear

    def forward(self, inputs):
        raise NotImplementedError  # of a device that is not here


class Random(nn.Linear):
    def forward(self, inputs):
        return super().forward(inputs + torch.randn_like(inputs))


class Conv1D(nn.Module):
    """As transformers has it: x W + b, inputs first."""

    def __init__(self, inputs=4, outputs=3, scale=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))
        self.scale = scale

    def forward(self, x):
        return self.scale * (x @ self.weight) + self.bias


@pytest.mark.parametrize("make", [SameForward, Promised])
def test_a_subclass_that_computes_the_same_or_promises_to_is_covered(make):
    (block,), uncovered = cover(nn.Sequential(make(4, 3)))
    assert block.shape == (1, 3, 5)
    assert not uncovered


def test_transformers_layer_of_inputs_first_is_covered():
    layer = Conv1D()
    (block,), _ = cover(layer)
    assert block.shape == (1, 3, 5)
    tensors = {name: p.detach() for name, p in layer.named_parameters()}
    assert torch.equal(block.to_matrix(tensors)[0, :, :4], layer.weight.T)


REASONS = {
    "another forward": (lambda: OtherForward(4, 3), "OtherForward has a forward of its own"),
    "random": (lambda: Random(4, 3), "Random has a forward of its own"),
    "scaled": (lambda: Conv1D(scale=2.0), "Conv1D has a forward of its own"),
    "norm": (lambda: nn.LayerNorm(3), "LayerNorm is not covered"),
    "batch norm": (lambda: nn.BatchNorm2d(3), "BatchNorm2d is not covered"),
    "bilinear": (lambda: nn.Bilinear(2, 2, 2), "Bilinear is not covered"),
    "3d": (lambda: nn.Conv3d(1, 1, 1), "Conv3d is not covered"),
    "few rows": (
        lambda: nn.Embedding(2, 3), "an Embedding of fewer rows than features is no vocabulary"
    ),
    "max_norm": (
        lambda: nn.Embedding(9, 3, max_norm=1.0),
        "Embedding with max_norm, scale_grad_by_freq or sparse has other gradients",
    ),
    "frequency": (
        lambda: nn.Embedding(9, 3, scale_grad_by_freq=True),
        "Embedding with max_norm, scale_grad_by_freq or sparse has other gradients",
    ),
    "sparse": (
        lambda: nn.Embedding(9, 3, sparse=True),
        "Embedding with max_norm, scale_grad_by_freq or sparse has other gradients",
    ),
    "weight norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)),
        "is computed from other parameters",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REASONS)
def test_what_is_not_covered_has_its_reason(case):
    make, reason = REASONS[case]
    net = nn.Sequential(make(), nn.Linear(2, 2))
    blocks, uncovered = cover(net)
    assert [block.name for block in blocks] == ["1.weight"]
    trained = {name for name, _ in net.named_parameters()} - {"1.weight", "1.bias"}
    assert set(uncovered) == trained
    assert any(reason in each for each in uncovered.values()), uncovered


def test_a_forward_that_is_replaced_on_the_instance_is_not_trusted():
    layer = nn.Linear(4, 3)
    layer.forward = lambda x: x[..., :3]
    assert cover(nn.Sequential(layer)).uncovered == {
        "0.weight": "Linear has a forward of its own", "0.bias": "Linear has a forward of its own"
    }  # fmt: skip


def test_a_lazy_layer_is_an_error_with_its_name():
    with pytest.raises(UsageError, match=r"layer '1' \(LazyLinear\) is lazy and has no shape yet"):
        cover(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)))


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ([], ["head", "body.0", "body.1"]),
        (["head"], ["body.0", "body.1"]),
        (["body"], ["head"]),
        (["body.*"], ["head"]),
        (["*.1", "head"], ["body.0"]),
        (["[hb]*"], []),
    ],
)
def test_names_and_patterns_exclude(exclude, left):
    net = nn.Module()
    net.head = nn.Linear(2, 2)
    net.body = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    blocks, uncovered = cover(net, exclude=exclude)
    assert [next(iter(block.layers)) for block in blocks] == left
    gone = {"head", "body.0", "body.1"} - {*left}
    assert uncovered == {f"{n}.{p}": "excluded" for n in gone for p in ("weight", "bias")}


def test_a_wrong_name_is_an_error_with_the_nearest():
    net = nn.Sequential()
    net.classifier = nn.Linear(2, 2)
    with pytest.raises(UsageError, match="no such module; did you mean 'classifier'"):
        cover(net, exclude=["clasifier"])


def test_the_parts_of_attention_are_covered_and_its_added_keys_are_not():
    net = nn.Sequential()
    net.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True, batch_first=True)
    blocks, uncovered = cover(net)
    assert sorted(block.shape for block in blocks) == [(1, 4, 5), (1, 12, 5)]
    assert uncovered == {
        f"attention.{name}": "a key or value that attention adds" for name in ("bias_k", "bias_v")
    }
    assert all(block.hosts for block in blocks)


@pytest.mark.parametrize(("kind", "gates"), [(nn.RNN, 1), (nn.LSTM, 4), (nn.GRU, 3)])
@pytest.mark.parametrize("directions", [1, 2])
def test_every_weight_of_a_recurrent_layer_is_a_block(kind, gates, directions):
    layer = kind(3, 5, num_layers=2, bidirectional=directions == 2)
    blocks, uncovered = cover(nn.Sequential(layer))
    assert not uncovered
    assert len(blocks) == 2 * 2 * directions  # of inputs and states, in each layer
    assert {block.shape[1] for block in blocks} == {gates * 5}
    assert sum(block.size for block in blocks) == sum(p.numel() for p in layer.parameters())


def test_shapes_of_two_kinds_with_one_weight_are_left_out():
    net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Conv2d(4, 3, 1, bias=False))
    net[1].weight = net[0].weight  # a convolution's has two dimensions more
    blocks, uncovered = cover(net)
    assert not blocks
    assert "used elsewhere, or it belongs to two layers" in uncovered["0.weight"]
