import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad
from torch.testing import assert_close

from smallfry import cost
from smallfry.models.linear import Linear

LEADS = [(), (5,), (2, 7), (2, 1, 3)]


def both(bias=True):
    ours, theirs = Linear(6, 4, bias=bias), nn.Linear(6, 4, bias=bias)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@settings(max_examples=20, deadline=None)
@given(lead=st.sampled_from(LEADS), bias=st.booleans(), strided=st.booleans(), wide=st.booleans())
def test_values_and_gradients_are_those_of_torch(lead, bias, strided, wide):
    ours, theirs = both(bias)
    rows = torch.randn(*lead, 12)[..., ::2] if strided else torch.randn(*lead, 6)
    rows = rows.double() if wide else rows
    found = []
    for layer in (ours, theirs):
        layer.to(rows.dtype)
        mine = rows.detach().requires_grad_()
        out = layer(mine)
        out.sum().backward()  # an expanded gradient
        found.append([out, mine.grad, *(p.grad for p in layer.parameters())])
    assert_close(*found)


def test_it_can_be_differentiated_twice_and_forwards():
    rows, tangent = torch.randn(2, 3, 6), torch.randn(2, 3, 6)
    found = []
    for layer in both():
        mine = rows.clone().requires_grad_()
        (first,) = torch.autograd.grad(layer(mine).pow(3).sum(), mine, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), [mine, layer.weight])
        with torch.no_grad(), forward_ad.dual_level():
            pushed = forward_ad.unpack_dual(layer(forward_ad.make_dual(rows, tangent))).tangent
        found.append([*second, pushed])
    assert_close(*found)


def test_transforms_of_torch_func_see_through_it():
    ours, theirs = both()
    rows = torch.randn(3, 2, 6)
    for transform in (torch.func.vmap, torch.func.jacrev, torch.func.jacfwd):
        assert_close(transform(ours)(rows), transform(theirs)(rows))


def test_autocast_makes_it_bfloat16_and_switching_onednn_off_changes_no_value():
    ours, theirs = both()
    rows = torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(rows).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(ours(rows), theirs(rows))


def test_its_arithmetic_is_counted():
    assert cost(Linear(8, 4), torch.zeros(5, 3, 8)).macs == 5 * 3 * 8 * 4


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_holds_an_ordinary_linear_layer(strict):
    ours, _ = both()
    program = torch.export.export(ours.eval(), (torch.zeros(5, 6),), strict=strict)
    assert {str(node.target) for node in program.graph.nodes} >= {"aten.linear.default"}
