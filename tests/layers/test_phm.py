"""Hypercomplex products and adapters against dense computations and the authors' values."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from smallfry import cost
from smallfry.layers.phm import Adapted, PHMLinear, PHMRules, phm_matrix

GOLDEN = json.loads(Path(__file__).with_name("phm_linear.json").read_text())


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def filled(module, order):
    """Fill tensors as the goldens are: sin(0.37 i + 0.11 k) in the order of the list."""
    for k, tensor in enumerate(order):
        values = torch.sin(0.37 * torch.arange(tensor.numel()).double() + 0.11 * k)
        scale = (tensor.numel() / tensor.shape[0]) ** -0.5 if tensor.ndim > 1 else 0.1
        tensor.data = (scale * values).view(tensor.shape)
    return module


def test_outputs_are_those_of_the_authors_code():
    rules = PHMRules(4).double()
    product = PHMLinear(rules, 24, 8).double()
    rule = nn.Parameter(torch.empty(4, 4, 4).double())
    filled(product, [rule, product.left, product.right, product.bias])
    rules.rules.data = rule.data.flatten()
    outputs = product(torch.cos(0.05 * torch.arange(72).double()).view(3, 24))
    head = torch.tensor(GOLDEN["output_head"]).double()
    torch.testing.assert_close(outputs.flatten()[:8], head, atol=1e-7, rtol=0)
    assert outputs.sum().item() == pytest.approx(GOLDEN["output_sum"], abs=1e-6)
    assert outputs.abs().mean().item() == pytest.approx(GOLDEN["output_absmean"], abs=1e-7)
    assert rules.rules.numel() + sum(p.numel() for p in product.parameters()) == GOLDEN["n_params"]


@pytest.mark.parametrize("rank", [1, 3])
def test_a_product_is_the_sum_of_kronecker_products_and_equals_its_form_by_reshapes(rank):
    n, rows, columns = 3, 5, 2
    rules, left = torch.randn(n, n, n).double(), torch.randn(n, rows, rank).double()
    right, inputs = torch.randn(n, rank, columns).double(), torch.randn(4, n * rows).double()
    whole = sum(torch.kron(rules[i], left[i] @ right[i]) for i in range(n))
    torch.testing.assert_close(phm_matrix(rules, left, right), whole, atol=1e-12, rtol=0)
    split = inputs.view(4, n, rows)  # x as n parts; H is never formed
    by_parts = torch.einsum("xap,ipr,iab,irq->xbq", split, left, rules, right).reshape(4, -1)
    torch.testing.assert_close(inputs @ whole, by_parts, atol=1e-12, rtol=0)


def test_gradients_are_those_of_the_dense_product():
    rules = PHMRules(2).double()
    product, inputs = PHMLinear(rules, 4, 6).double(), torch.randn(3, 4).double()
    parameters = [rules.rules, product.left, product.right, product.bias]

    def run(*values):
        matrix = phm_matrix(values[0].view(2, 2, 2), values[1], values[2])
        return inputs @ matrix + values[3]

    assert torch.autograd.gradcheck(run, parameters)
    product(inputs).square().sum().backward()
    expected = torch.autograd.grad(run(*parameters).square().sum(), parameters)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("width", "count", "published"), [(768, 48, 114_048), (768, 24, 57_024)], ids=["full", "++"]
)
def test_adapters_have_the_published_numbers_of_parameters(width, count, published):
    rules = PHMRules(4)
    layer = Adapted(nn.Linear(1, width), rules, width // 32, calls=count)
    assert sum(p.numel() for p in layer.adapters.parameters()) + rules.rules.numel() - 64 == (
        published
    )


def test_a_new_adapter_changes_little_and_an_image_is_adapted_pixel_by_pixel():
    rules = PHMRules(4)
    layer = Adapted(nn.Conv2d(3, 16, 3, padding=1), rules, 4)
    images = torch.randn(2, 3, 6, 5)
    plain, adapted = layer.layer(images), layer(images)
    assert 0 < float((adapted - plain).abs().max()) < 0.01
    rows = layer.adapters[0](plain.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(adapted, rows)


def trained(layer):
    """Give an adapter weights as large as after training."""
    rules = layer.adapters[0].down._shared[0]
    for parameter in (rules.rules, *layer.adapters.parameters()):
        nn.init.normal_(parameter, std=0.5)
    return layer


@pytest.mark.parametrize(
    ("dense", "shape"),
    [
        (nn.Linear(6, 16), (3, 2, 6)),
        (nn.Linear(6, 16, bias=False), (3, 6)),
        (nn.Conv2d(3, 16, 3, stride=2, padding=1), (2, 3, 7, 7)),
        (nn.Conv2d(3, 16, 3, bias=False, padding=1, padding_mode="reflect"), (2, 3, 7, 7)),
    ],
    ids=["rows", "no bias", "image", "reflected"],
)
def test_a_linear_adapter_merges_exactly(dense, shape):
    rules = PHMRules(4).double()
    layer = trained(Adapted(dense.double(), rules, 8, activation="none"))
    inputs = torch.randn(shape).double()
    merged = layer.dense()
    assert type(merged) is type(dense)
    torch.testing.assert_close(merged(inputs), layer(inputs), atol=1e-12, rtol=1e-10)
    assert float((layer(inputs) - dense(inputs)).abs().max()) > 0.1


def test_others_are_not_merged():
    rules = PHMRules(4)
    layers = [
        Adapted(nn.Linear(4, 16), rules, 4),
        Adapted(nn.Linear(4, 16), rules, 4, calls=2, activation="none"),
        Adapted(nn.Conv2d(16, 16, 3, groups=16), rules, 4, activation="none"),
    ]
    for layer in layers:
        assert not layer.is_mergeable
        with pytest.raises(ValueError, match="can be merged"):
            layer.dense()


def test_calls_take_adapters_in_turn():
    layer = trained(Adapted(nn.Linear(4, 8), PHMRules(4), 4, calls=2))
    outputs = [layer(torch.ones(1, 4)) for _ in range(4)]
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])
    assert not torch.equal(outputs[0], outputs[1])


def test_macs_are_those_of_the_layer_the_products_and_their_matrices():
    layer = Adapted(nn.Linear(32, 64, bias=False), PHMRules(4), 8)
    rows = 10
    products = rows * (32 * 64 + 2 * 64 * 8)
    matrices = 2 * (4 * 64 * 8 + 4 * 16 * 2)  # Σ A ⊗ B, and B = s tᵀ
    assert cost(layer, torch.zeros(rows, 32)).macs == products + matrices


@pytest.mark.parametrize("widths", [(6, 8), (8, 6)])
def test_widths_must_be_multiples_of_n(widths):
    with pytest.raises(ValueError, match="multiples of n = 4"):
        PHMLinear(PHMRules(4), *widths)
    with pytest.raises(ValueError, match=r"Linear or nn\.Conv2d"):
        Adapted(nn.ReLU(), PHMRules(4), 4)
