"""Gated response of layers, beside the original implementation's outputs and dense weights."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from smallfry.errors import UsageError
from smallfry.layers.hyper import Response

GOLDEN = [2.0764071, 3.6948907, 3.6581434, 3.6121974, 3.5571674, 3.493191, 3.4204282, 2.6000812]
GOLDEN_SUM, GOLDEN_MEAN = 7.801403829481673, 1.5344441952826173


def filled(shape, k):
    """Fill rule of the golden outputs."""
    count = math.prod(shape)
    values = torch.sin(0.37 * torch.arange(count, dtype=torch.float64) + 0.11 * k)
    scale = 0.1 if len(shape) == 1 else math.sqrt(shape[0] / count)
    return (scale * values).reshape(shape)


def cosines(*shape):
    return torch.cos(0.05 * torch.arange(math.prod(shape), dtype=torch.float64)).reshape(shape)


def randomized(response, scale=1.0):
    with torch.no_grad():
        for parameter in response.parameters():
            parameter.copy_(scale * torch.randn_like(parameter))
    return response


def test_a_convolution_has_the_outputs_of_the_original_implementation():
    layer = nn.Conv2d(3, 8, 3, padding=1).double()
    response = Response(layer, 5)
    with torch.no_grad():
        layer.weight.copy_(filled((8, 3, 3, 3), 0))
        response.weight.copy_(filled((8, 3, 3, 3), 1))
        layer.bias.copy_(filled((8,), 2))
        response.bias.copy_(filled((8,), 3))
        response.gates.copy_(filled((16, 5), 5))
        scale = filled((1,), 4)  # of the published layer, 1 in Δ-STN
        images, hypers = cosines(2, 3, 8, 8), cosines(2, 5)
        found = response(layer, images, scale * layer(images), hypers)
    first = found.flatten()[:8].tolist()
    assert first == pytest.approx(GOLDEN, abs=5e-8)
    assert found.sum().item() == pytest.approx(GOLDEN_SUM, abs=1e-9)
    assert found.abs().mean().item() == pytest.approx(GOLDEN_MEAN, abs=1e-12)
    assert sum(each.numel() for each in (*layer.parameters(), *response.parameters())) == 528


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        (nn.Linear(4, 3), torch.randn(1, 4)),
        (nn.Linear(4, 3, bias=False), torch.randn(1, 5, 4)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), torch.randn(1, 4, 7, 7)),
        (nn.Conv2d(4, 4, 3, groups=4, padding=1, padding_mode="reflect"), torch.randn(1, 4, 7, 7)),
    ],
)
def test_gates_fold_into_ordinary_weights(layer, inputs):
    torch.manual_seed(0)
    layer, inputs = layer.double(), inputs.double()
    response, hypers = randomized(Response(layer, 3)), torch.randn(3).double()
    found = response(layer, inputs, layer(inputs), hypers[None])
    weight, bias = response.dense(layer, hypers)
    if isinstance(layer, nn.Linear):
        expected = F.linear(inputs, weight, bias)
    else:
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        expected = layer(inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_each_example_has_gates_of_its_own_and_rows_share_those_of_their_example():
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).double()
    response, hypers = randomized(Response(layer, 2)), torch.randn(5, 2).double()
    inputs = torch.randn(10, 4).double()  # two rows an example
    found = response(layer, inputs, layer(inputs), hypers)
    for row in range(10):
        weight, bias = response.dense(layer, hypers[row // 2])
        torch.testing.assert_close(found[row], F.linear(inputs[row], weight, bias))


def test_the_norms_of_folded_weights():
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3).double()
    response, hypers = randomized(Response(layer, 2)), torch.randn(4, 2).double()
    expected = [response.dense(layer, each)[0].square().sum() for each in hypers]
    torch.testing.assert_close(response.squares(layer, hypers), torch.stack(expected))


def test_a_new_response_changes_nothing_but_has_gradients():
    layer, inputs = nn.Linear(4, 3), torch.randn(5, 4)
    response = Response(layer, 2)
    found = response(layer, inputs, layer(inputs), torch.randn(5, 2))
    assert torch.equal(found, layer(inputs))
    found.square().sum().backward()
    assert float(response.gates.grad.abs().max()) > 0


def test_the_exact_response_of_a_linear_network_to_its_penalty_is_a_sigmoid_gate():
    """Ridge regression through the basis of principal components (MacKay et al., section 3)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(30, generator=generator, dtype=torch.float64)
    left, singular, right = torch.linalg.svd(x, full_matrices=False)
    plain = left.T @ y / singular  # solution without penalty, in the basis of ``right``
    for raw in (-3.0, 0.0, 2.5):
        ridge = torch.linalg.solve(x.T @ x + math.exp(raw) * torch.eye(6).double(), x.T @ y)
        gate = torch.sigmoid(2 * singular.log() - raw)
        torch.testing.assert_close(right @ ridge, gate * plain, rtol=0, atol=1e-12)


def test_other_layers_have_no_response():
    with pytest.raises(UsageError, match="linear layer or convolution"):
        Response(nn.LayerNorm(3), 2)
