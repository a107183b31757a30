import itertools

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing import assert_close

from smallfry import cost
from smallfry.curvature.symmetric import symmetric_product
from smallfry.errors import UsageError
from smallfry.kernels import onednn
from smallfry.models import ViTRM
from smallfry.models.linear import Linear

LEADS = [(), (5,), (2, 7), (2, 1, 3)]


@pytest.fixture(autouse=True)
def products(monkeypatch):
    """Products of oneDNN, on every processor, each of them noted."""
    made, multiply = [], onednn._MULTIPLY

    def noted(*operands):
        made.append(operands)
        return multiply(*operands)

    monkeypatch.setattr(onednn, "_PREFERRED", True)
    monkeypatch.setattr(onednn, "_MULTIPLY", noted)
    return made


def both(bias=True):
    ours, theirs = Linear(6, 4, bias=bias), nn.Linear(6, 4, bias=bias)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def test_intel_keeps_mkl_and_a_variable_decides_otherwise():
    intel, amd = "vendor_id\t: GenuineIntel", "vendor_id\t: AuthenticAMD"
    assert [onednn.prefers_onednn(None, text) for text in (intel, amd)] == [False, True]
    assert onednn.prefers_onednn("", amd)
    assert onednn.prefers_onednn("1", intel)
    assert not onednn.prefers_onednn("0", amd)
    with pytest.raises(UsageError, match="SMALLFRY_ONEDNN must be 0 or 1, not 'yes'"):
        onednn.prefers_onednn("yes", amd)


def test_without_preference_values_are_those_of_torch_to_the_bit(products, monkeypatch):
    monkeypatch.setattr(onednn, "_PREFERRED", False)
    ours, theirs = both()
    rows = torch.randn(5, 6)
    assert torch.equal(ours(rows), theirs(rows))
    assert products == []


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


class Wrapper(torch.Tensor):
    """A tensor that knows its values only through the operators that it is given, as torchao's."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, operator, types, operands, settings=None):
        if "mkldnn" in str(operator):
            raise NotImplementedError(operator)

        def plain(value):
            return value.inner if isinstance(value, cls) else value

        result = operator(*map(plain, operands), **(settings or {}))
        return cls(result) if operator is torch.ops.aten.detach.default else result


@pytest.mark.parametrize("wrapped", [("weight",), ("bias",), ("weight", "bias")])
def test_subclasses_of_tensors_make_their_own_products(wrapped, products):
    ours, theirs = both()
    rows = torch.randn(5, 6)
    wanted = theirs(rows)
    for name in wrapped:
        given = getattr(ours, name).detach()
        setattr(ours, name, nn.Parameter(Wrapper(given), requires_grad=False))
    assert torch.equal(ours(rows), wanted)
    plain, _ = both()
    assert_close(plain(Wrapper(rows)), nn.functional.linear(rows, plain.weight, plain.bias))
    assert products == []
    plain(rows)
    assert len(products) == 1


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_distributed_tensors_train_as_plain_ones_do(mesh, products):
    ours, theirs = both()
    rows = torch.randn(5, 6)
    theirs(rows).square().sum().backward()
    for name, value in list(ours.named_parameters()):
        setattr(ours, name, nn.Parameter(distribute_tensor(value.detach(), mesh, [Shard(0)])))
    out = ours(distribute_tensor(rows, mesh, [Replicate()]))
    assert isinstance(out, DTensor)
    out.square().sum().backward()
    for mine, other in itertools.zip_longest(ours.parameters(), theirs.parameters()):
        assert_close(mine.grad.full_tensor(), other.grad)
    assert products == []


def test_a_sharded_vitrm_takes_a_step(mesh):
    from torch.distributed.fsdp import fully_shard

    sizes = {"embed_dim": 16, "num_heads": 2, "mlp_hidden_dim": 8, "depth": 1, "drop_rate": 0.0}
    whole = ViTRM(8, 4, 1, **sizes)
    shared = ViTRM(8, 4, 1, **sizes)
    shared.load_state_dict(whole.state_dict())
    fully_shard(shared, mesh=mesh)
    images = torch.randn(3, 1, 8, 8)
    for model in (whole, shared):
        model(images).square().sum().backward()
    for mine, other in zip(shared.parameters(), whole.parameters(), strict=True):
        if other.grad is not None:
            assert_close(mine.grad.full_tensor(), other.grad)


def test_curvature_takes_the_products_of_subclasses_as_they_are(products):
    rows = torch.randn(1, 7, 5)
    wanted = symmetric_product(rows, rows)
    assert len(products) == 1

    class Named(torch.Tensor):
        pass

    named = rows.as_subclass(Named)
    assert_close(symmetric_product(named, named).as_subclass(torch.Tensor), wanted)
    assert len(products) == 1
