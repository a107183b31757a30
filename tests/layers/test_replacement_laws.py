"""Laws of all layers that stand for dense ones: a new layer joins with a line in ``CASES``."""

from collections.abc import Callable
from typing import Any, NamedTuple

import onnxruntime
import pytest
import torch
from dense_fisher import observe
from torch import nn
from torch.func import functional_call

from smallfry import cost
from smallfry.curvature import cover
from smallfry.curvature.likelihoods import Gaussian
from smallfry.deploy.graphs import exported_program, to_onnx, whole_graph
from smallfry.layers.fake_quant import fake_quantized
from smallfry.layers.linear_map import layers, sizes_of
from smallfry.layers.phm import Adapted, PHMRules
from smallfry.layers.random_features import SNNKLinear
from smallfry.transforms.replace import replace_layers

DENSE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(7, 5), (4, 7)),
    "tokens": (lambda: nn.Linear(12, 8, bias=False), (2, 3, 12)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 8)),
    "dilated": (lambda: nn.Conv2d(4, 6, (3, 2), dilation=2, bias=False), (2, 4, 9, 8)),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1, stride=2), (2, 4, 5, 6)),
}
LINEAR = ("linear", "tokens")
CONVOLUTIONS = ("convolution", "dilated", "pointwise")


class Case(NamedTuple):
    """A registered layer, and the claims about it that depend on its kind."""

    settings: dict[str, Any]
    stands_for: tuple[str, ...] = (*LINEAR, *CONVOLUTIONS)
    parameters: int | None = None  # in place of the first of ``stands_for``, biases included
    macs: int = 0  # of that layer, for one row or image
    covered: bool = True  # natural gradient has a block for every matrix that is trained


CASES = {
    "low_rank": Case({"rank": 3}, parameters=3 * (7 + 5) + 5, macs=3 * (7 + 5)),
    "tensor_train": Case(
        # 7 and 5 are rounded up to 2 · 4; in turn, as the matrix alone takes 64 · 3
        {"ranks": [3]},
        (*LINEAR, "pointwise"),
        parameters=3 * (2 * 2 + 4 * 4) + 5,
        macs=8 * 3 * 4 + 2 * 3 * 8,
    ),
    "cp": Case(
        {"rank": 2}, CONVOLUTIONS, 2 * (4 + 3 + 3 + 6) + 6, 2 * (72 * 4 + 40 * 3 + 20 * 3 + 20 * 6)
    ),
    "quantized_weight": Case({"bits": 5}, parameters=7 * 5 + 5 + 5, macs=7 * 5),
}
EVERY = [(name, dense) for name, case in CASES.items() for dense in case.stands_for]
FIRST = [(name, case.stands_for[0]) for name, case in CASES.items()]


def make(name, dense, dtype=torch.float64):
    """The dense layer, its replacement and inputs."""
    torch.manual_seed(0)
    build, shape = DENSE[dense]
    layer = build().to(dtype)
    return (
        layer,
        layers()[name].from_dense(layer, **CASES[name].settings),
        torch.randn(shape).to(dtype),
    )


def test_every_registered_layer_is_tried_here():
    others = {"binary_weight"}  # of signs of its inputs, so not linear: test_biper.py
    assert set(layers()) == set(CASES) | others


@pytest.mark.parametrize(("name", "dense"), EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_map_that_dense_gives(name, dense, dtype):
    layer, small, inputs = make(name, dense, dtype)
    same = small.dense().to(dtype)
    assert same.weight.shape == layer.weight.shape
    assert same(inputs).shape == layer(inputs).shape
    torch.testing.assert_close(small(inputs), same(inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "dense"), EVERY)
def test_gradients_of_the_inputs_are_those_of_the_dense_map(name, dense):
    _, small, inputs = make(name, dense)
    one, other = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    small(one).square().sum().backward()
    small.dense().double()(other).square().sum().backward()
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "dense"), EVERY)
def test_gradients_of_its_parameters_are_those_of_finite_differences(name, dense):
    _, small, inputs = make(name, dense)
    trained = {n: p for n, p in small.named_parameters() if p.requires_grad}

    def output(*tensors):
        return functional_call(small, dict(zip(trained, tensors, strict=True)), (inputs[:1],))

    values = [p.detach().clone().requires_grad_() for p in trained.values()]
    if values:  # frozen codes alone have none
        assert torch.autograd.gradcheck(output, values, fast_mode=True)


def offers(made, layer, weight, bias):
    """Require that what models read of a layer is there: weight, bias and sizes."""
    assert sizes_of(made) == sizes_of(layer)
    assert (made.weight.dtype, made.weight.device) == (layer.weight.dtype, layer.weight.device)
    assert torch.equal(made.weight, weight)
    assert (made.bias is None) == (bias is None)
    assert bias is None or torch.equal(made.bias, bias)


@pytest.mark.parametrize(("name", "dense"), EVERY)
def test_it_offers_what_models_read_of_a_layer(name, dense):
    layer, small, _ = make(name, dense, torch.float32)
    same = small.dense()
    offers(small, layer, same.weight, same.bias)


@pytest.mark.parametrize("dense", DENSE)
def test_substitutes_that_are_no_linear_maps_offer_it_too(dense):
    layer = DENSE[dense][0]()
    adapted = Adapted(layer, PHMRules(1), inner=2)
    for made in (adapted, fake_quantized(layer, 4)):
        offers(made, layer, layer.weight, layer.bias)
    layer.bias = None
    signs = layers()["binary_weight"].from_dense(layer)
    offers(signs, layer, signs.dense().weight, None)
    if isinstance(layer, nn.Linear):
        features = SNNKLinear.from_dense(layer, features=3)
        offers(features, layer, features.psi.weight, None)


def test_pytorch_s_fused_inference_does_not_go_around_a_replaced_layer():
    def replaced(layer, _=None):
        return layers()["quantized_weight"].from_dense(layer, bits=8, input_bits=2)

    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    replace_layers(model, ["linear1"], replaced)
    inputs = torch.randn(2, 3, 8)
    with torch.no_grad():
        fast = model(inputs)
    torch.testing.assert_close(fast, model(inputs))


@pytest.mark.parametrize(("name", "dense"), EVERY)
def test_its_structure_takes_its_weights(name, dense):
    layer, small, inputs = make(name, dense)
    empty = layers()[name].like(layer, **CASES[name].settings)
    empty.load_state_dict(small.state_dict())
    assert torch.equal(empty(inputs), small(inputs))


@pytest.mark.parametrize(("name", "dense"), FIRST)
def test_its_parameters_and_macs_are_counted(name, dense):
    _, small, inputs = make(name, dense, torch.float32)
    found = cost(small, inputs[:1])
    assert (found.parameters, found.macs) == (CASES[name].parameters, CASES[name].macs)


class Recursion(nn.Module):
    """One layer that is called three times, also under a second name."""

    def __init__(self, layer):
        super().__init__()
        self.layer = self.alias = layer

    def forward(self, inputs):
        return self.alias(self.layer(self.layer(inputs).tanh()).tanh())


class Tied(nn.Module):
    """Two layers of one weight, with a bias each."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.other.weight = self.one.weight

    def forward(self, inputs):
        return self.other(self.one(inputs).tanh())


SQUARE = {name: "linear" in case.stands_for for name, case in CASES.items()}


def square(name):
    """A dense layer whose outputs are as many as its inputs."""
    return nn.Linear(6, 6) if SQUARE[name] else nn.Conv2d(6, 6, 3, padding=1)


@pytest.mark.parametrize("name", CASES)
def test_a_layer_of_several_calls_is_replaced_once(name):
    def replaced(layer, _=None):
        return layers()[name].from_dense(layer, **CASES[name].settings)

    model = Recursion(square(name).double())
    alone = replaced(model.layer)
    inputs = torch.randn(2, 6, dtype=torch.float64)
    inputs = inputs if SQUARE[name] else inputs[..., None, None].expand(2, 6, 4, 4)
    replace_layers(model, ["layer"], replaced)
    assert model.alias is model.layer
    assert cost(model, inputs).parameters == cost(alone, inputs).parameters
    assert cost(model, inputs).macs == 3 * cost(alone, inputs).macs
    torch.testing.assert_close(model(inputs), alone(alone(alone(inputs).tanh()).tanh()))


@pytest.mark.parametrize("name", [name for name in CASES if SQUARE[name]])
def test_layers_of_one_weight_share_it_and_keep_their_biases(name):
    def replaced(layer, _=None):
        return layers()[name].from_dense(layer, **CASES[name].settings)

    model = Tied().double()
    alone, inputs = replaced(model.one), torch.randn(2, 6, dtype=torch.float64)
    expected = replaced(model.other)(alone(inputs).tanh())
    replace_layers(model, ["one", "other"], replaced)
    assert cost(model, inputs).parameters == cost(alone, inputs).parameters + 6
    torch.testing.assert_close(model(inputs), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "dense"), EVERY)
def test_natural_gradient_covers_its_matrices(name, dense):
    """The gradient of each block is the sum of its rows' products."""
    _, small, inputs = make(name, dense)
    model = nn.Sequential(small, nn.Flatten())
    coverage = cover(model)
    missing = {n for n in coverage.uncovered if model.get_parameter(n).ndim > 1}
    assert CASES[name].covered == (not missing)
    if not coverage.blocks:  # all of it is frozen
        return
    seen = observe(model, coverage, inputs, Gaussian())
    outputs = model(inputs)
    for block in coverage.blocks:
        rows = seen.rows(block, torch.float64)
        summed = torch.einsum("gnto,gnti->goi", rows.gradients[:, 0], rows.inputs)
        first = next(Gaussian().columns((outputs,)))
        wanted = torch.autograd.grad(
            outputs, [*block.parameters.values()], first, retain_graph=True
        )
        wanted = block.to_matrix(dict(zip(block.parameters, wanted, strict=True)))
        torch.testing.assert_close(summed, wanted)


@pytest.mark.parametrize(("name", "dense"), FIRST)
def test_its_onnx_graph_gives_its_outputs(name, dense):
    _, small, inputs = make(name, dense, torch.float32)
    graph = whole_graph(small.eval(), inputs)
    content = to_onnx(graph, exported_program(graph)).SerializeToString()
    (given,) = onnxruntime.InferenceSession(content).run(None, {"images": inputs.numpy()})
    torch.testing.assert_close(torch.from_numpy(given), small(inputs), rtol=1e-5, atol=1e-5)
