"""Gated residual and highway layers, and networks of them."""

import pytest
import timm
import torch
from torch.nn import functional as F

from smallfry.errors import UsageError
from smallfry.layers.gated_residual import GatedResidual, Highway
from smallfry.models.gated_mlp import GatedMLP


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("i", "h", "o"), [(5, 7, 5), (5, 7, 4)])
def test_numbers_of_parameters(i: int, h: int, o: int) -> None:
    projection = i * o + o if i != o else 0
    wanted = i * h + h + h * h + h + 2 * (h * o + o) + projection + 2 * o
    assert count(GatedResidual(i, h, o)) == wanted
    assert count(Highway(i)) == 2 * (i * i + i)


@pytest.mark.parametrize("outputs", [6, 4])
def test_a_gated_residual_layer_by_hand(outputs: int) -> None:
    torch.manual_seed(0)
    layer, x = GatedResidual(6, 8, outputs).double(), torch.randn(3, 6, dtype=torch.float64)
    u = layer.fc2(F.elu(layer.fc1(x)))
    g, v = layer.gate(u)[:, :outputs], layer.gate(u)[:, outputs:]
    wanted = layer.project(x) + v / (1 + (-g).exp())
    wanted = F.layer_norm(wanted, (outputs,), layer.norm.weight, layer.norm.bias)
    torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize("outputs", [6, 4])
def test_a_closed_gate_leaves_the_normed_input(outputs: int) -> None:
    torch.manual_seed(0)
    layer, x = GatedResidual(6, 8, outputs).double(), torch.randn(3, 6, dtype=torch.float64)
    with torch.no_grad():
        layer.gate.bias[:outputs] = -20
        layer.gate.weight[:outputs] = 0
    torch.testing.assert_close(layer(x), layer.norm(layer.project(x)), rtol=0, atol=1e-8)


def test_a_highway_layer_begins_near_the_identity() -> None:
    torch.manual_seed(0)
    layer, x = Highway(6).double(), torch.randn(3, 6, dtype=torch.float64)
    t = layer.gate(x).sigmoid()
    torch.testing.assert_close(layer(x), t * layer.fc(x).relu() + (1 - t) * x)
    assert t.mean() < 0.2
    assert layer.gate.bias.eq(-2).all()


@pytest.mark.parametrize("kind", ["grn", "highway"])
def test_timms_contract(kind: str) -> None:
    model = GatedMLP(img_size=(4, 5), in_chans=2, num_classes=3, embed_dim=8, kind=kind).eval()
    some = torch.rand(2, 2, 4, 5)
    features = model.forward_features(some)
    assert features.shape == (2, 8)
    torch.testing.assert_close(model.get_classifier()(features), model(some))
    model.double().reset_classifier(7)
    assert model(some.double()).shape == (2, 7)
    model.reset_classifier(0)
    assert torch.equal(model(some.double()), model.forward_features(some.double()))
    table = GatedMLP(img_size=1, in_chans=13, num_classes=1, kind=kind)
    assert table(torch.rand(4, 13, 1, 1)).shape == (4, 1)
    groups = timm.optim.param_groups_layer_decay(table, layer_decay=0.5)
    assert sum(len(g["params"]) for g in groups) == len(list(table.parameters()))


def test_registered_forms() -> None:
    for name, kind in {"gated_mlp": GatedResidual, "highway_mlp": Highway}.items():
        model = timm.create_model(name)
        assert all(isinstance(block, kind) for block in model.blocks)
    with pytest.raises(UsageError, match="grn or highway, not 'x'"):
        GatedMLP(kind="x")


def test_recomputed_layers_give_the_same_gradients() -> None:
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = GatedMLP()
        model.set_grad_checkpointing(recompute)
        model(torch.ones(2, 1, 8, 8)).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*found)
