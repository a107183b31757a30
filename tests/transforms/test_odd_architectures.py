"""Channel groups of unusual networks: whatever is found can be cut, one by one and all at once."""

import copy
import warnings

import pytest
import torch
from named_layers import Net
from timm.layers import Mlp
from timm.models.vision_transformer import Attention
from torch import nn
from torch.nn import functional as F

from smallfry.errors import SmallfryWarning
from smallfry.transforms.declared import declared_groups, gated_group, mlp_group
from smallfry.transforms.find import find_groups
from smallfry.transforms.groups import ChannelGroup, Slice, cut, mask
from smallfry.transforms.resize import Resize

pytest.importorskip("torch_pruning", reason="groups of convolutions are found by Torch-Pruning")


def conv(inputs, outputs, size=3, **more):
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **more)


def pooled(x):
    return x.mean((2, 3))


def joined(m, x):
    x = m.a(x)
    x = torch.cat([m.b(x), m.c(x)], 1)
    return m.head(pooled(F.relu(m.norm(x))))


def added(m, x):
    x = F.relu(m.a(x))
    return m.head(pooled(m.skip(x) + m.c(F.relu(m.norm(m.b(x))))))


def gated(m, x):
    x = F.relu(m.a(x))
    return m.head(pooled(x * torch.sigmoid(m.up(F.relu(m.down(x.mean((2, 3), True)))))))


def multiplied(m, x):
    return m.head(pooled(F.relu(m.a(x)) * torch.tanh(m.b(x))))


def shuffled(m, x):
    x = m.a(x)
    x = x.view(len(x), 2, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
    return m.head(pooled(F.relu(m.b(x))))


def halved(m, x):
    one, other = F.relu(m.a(x)).chunk(2, 1)
    return m.head(pooled(m.b(one) + m.c(other)))


def shared_weight(m, x):
    return m.head(pooled(F.relu(m.b(F.relu(m.a(x))))) + 0 * m.a.weight.sum())


NETS = {
    "chain": (
        lambda m, x: m.head(pooled(F.relu(m.c(F.relu(m.norm(m.b(F.relu(m.a(x)))))))),),
        lambda: {"a": conv(3, 8), "b": conv(8, 6, bias=False), "norm": nn.BatchNorm2d(6),
                 "c": conv(6, 5, 1), "head": nn.Linear(5, 3)},
        {"a", "b", "c"},
    ),
    "flattened": (
        lambda m, x: m.head(F.relu(m.fc(F.max_pool2d(m.a(x), 2).flatten(1)))),
        lambda: {"a": conv(3, 6), "fc": nn.Linear(6 * 16, 10), "head": nn.Linear(10, 3)},
        {"a", "fc"},
    ),
    "joined": (
        joined,
        lambda: {"a": conv(3, 6), "b": conv(6, 4), "c": conv(6, 8, 1),
                 "norm": nn.BatchNorm2d(12), "head": nn.Linear(12, 3)},
        {"a", "b", "c"},
    ),
    "added": (
        added,
        lambda: {"a": conv(3, 6), "b": conv(6, 8), "norm": nn.BatchNorm2d(8), "c": conv(8, 10),
                 "skip": conv(6, 10, 1), "head": nn.Linear(10, 3)},
        {"a", "b", "skip"},
    ),
    "depthwise": (
        lambda m, x: m.head(pooled(F.relu(m.c(m.norm(m.b(m.a(x))))))),
        lambda: {"a": conv(3, 8), "b": conv(8, 8, groups=8), "norm": nn.BatchNorm2d(8),
                 "c": conv(8, 6, 1), "head": nn.Linear(6, 3)},
        {"b", "c"},
    ),
    "depth multiplier": (
        lambda m, x: m.head(pooled(F.relu(m.c(m.b(m.a(x)))))),
        lambda: {"a": conv(3, 4), "b": conv(4, 8, groups=4), "c": conv(8, 6, 1),
                 "head": nn.Linear(6, 3)},
        {"c"},
    ),
    "grouped": (
        lambda m, x: m.head(pooled(F.relu(m.c(m.b(F.relu(m.a(x))))))),
        lambda: {"a": conv(3, 8), "b": conv(8, 8, groups=2), "c": conv(8, 6, 1),
                 "head": nn.Linear(6, 3)},
        {"c"},
    ),
    "squeezed": (
        gated,
        lambda: {"a": conv(3, 8), "down": conv(8, 4, 1), "up": conv(4, 8, 1),
                 "head": nn.Linear(8, 3)},
        {"down", "up"},
    ),
    "multiplied": (
        multiplied,
        lambda: {"a": conv(3, 8), "b": conv(3, 8), "head": nn.Linear(8, 3)},
        {"b"},
    ),
    "shuffled": (
        shuffled,
        lambda: {"a": conv(3, 8), "b": conv(8, 6), "head": nn.Linear(6, 3)},
        {"b"},
    ),
    "halved": (
        halved,
        lambda: {"a": conv(3, 8), "b": conv(4, 6), "c": conv(4, 6), "head": nn.Linear(6, 3)},
        {"b"},
    ),
    "softmax": (
        lambda m, x: m.head(pooled(m.a(x).softmax(1))),
        lambda: {"a": conv(3, 8), "head": nn.Linear(8, 3)},
        set(),
    ),
    "mean of channels": (
        lambda m, x: m.head(m.a(x).mean(1).flatten(1)),
        lambda: {"a": conv(3, 8), "head": nn.Linear(64, 3)},
        set(),
    ),
    "bias behind": (  # sigmoid(0) is not 0
        lambda m, x: m.head(pooled(torch.sigmoid(m.a(x)))),
        lambda: {"a": conv(3, 8), "head": nn.Linear(8, 3)},
        set(),
    ),
    "layer norm": (
        lambda m, x: m.head(m.norm(m.a(x).mean((2, 3)))),
        lambda: {"a": conv(3, 8), "norm": nn.LayerNorm(8), "head": nn.Linear(8, 3)},
        set(),
    ),
    "group norm": (
        lambda m, x: m.head(pooled(m.norm(m.a(x)))),
        lambda: {"a": conv(3, 8), "norm": nn.GroupNorm(4, 8), "head": nn.Linear(8, 3)},
        set(),
    ),
    "prelu": (
        lambda m, x: m.head(pooled(m.b(m.act(m.a(x))))),
        lambda: {"a": conv(3, 8), "act": nn.PReLU(8), "b": conv(8, 6), "head": nn.Linear(6, 3)},
        {"b"},
    ),
    "norm without numbers": (
        lambda m, x: m.head(pooled(F.relu(m.b(m.norm(m.a(x)))))),
        lambda: {"a": conv(3, 8), "norm": nn.BatchNorm2d(8, affine=False), "b": conv(8, 6),
                 "head": nn.Linear(6, 3)},
        {"b"},
    ),
    "transposed": (
        lambda m, x: m.head(pooled(F.relu(m.b(m.up(F.relu(m.a(x))))))),
        lambda: {"a": conv(3, 8), "up": nn.ConvTranspose2d(8, 6, 2, 2), "b": conv(6, 5),
                 "head": nn.Linear(5, 3)},
        {"a", "up", "b"},
    ),
    "one channel": (
        lambda m, x: m.head(pooled(m.b(F.relu(m.a(x))))),
        lambda: {"a": conv(3, 1), "b": conv(1, 6), "head": nn.Linear(6, 3)},
        {"b"},
    ),
    "two answers": (
        lambda m, x: {"classes": m.head(pooled(F.relu(m.a(x)))), "side": [m.side(F.relu(m.a2(x)))]},
        lambda: {"a": conv(3, 8), "a2": conv(3, 6), "side": conv(6, 2, 1), "head": nn.Linear(8, 3)},
        {"a", "a2"},
    ),
    "features": (  # its channels are the outputs
        lambda m, x: pooled(m.b(F.relu(m.a(x)))),
        lambda: {"a": conv(3, 8), "b": conv(8, 6)},
        {"a"},
    ),
    "called again": (
        lambda m, x: m.head(pooled(m.a(F.relu(m.a(x))))),
        lambda: {"a": conv(3, 3), "head": nn.Linear(3, 3)},
        set(),
    ),
    "weight read": (shared_weight, lambda: {"a": conv(3, 8), "b": conv(8, 6),
                                            "head": nn.Linear(6, 3)}, {"a", "b"}),
}  # fmt: skip


def flat(outputs):
    if isinstance(outputs, torch.Tensor):
        return outputs.flatten()
    parts = outputs.values() if isinstance(outputs, dict) else outputs
    return torch.cat([flat(each) for each in parts])


def filled(model):
    """A model in float64 with no weight or statistic at its first value."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.double().state_dict().items():
            if tensor.is_floating_point():
                noise = 0.3 * torch.randn_like(tensor)
                tensor.add_(noise.abs() if "running_var" in name else noise)
    return model.eval()


def quiet_groups(model, example):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SmallfryWarning)
        return find_groups(model, example)


def require_equal(model, groups, example, share=3):
    """Cutting equals masking, and the transform makes the same of a fresh copy."""
    masked, small = copy.deepcopy(model), copy.deepcopy(model)
    keep = {}
    for group in groups:
        # other channels than those by which groups are verified, the first one among them
        gone = torch.arange(0, group.channels, share)[: group.channels - 1]
        keep[group.name] = torch.tensor(sorted({*range(group.channels)} - {*gone.tolist()}))
        mask(masked, group, gone)
    transform = cut(small, groups, keep)
    with torch.no_grad():
        expected, found = flat(masked(example)), flat(small(example))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    again = copy.deepcopy(model)
    Resize(transform.shapes, transform.counts).apply(again)
    again.load_state_dict(small.state_dict())
    with torch.no_grad():
        assert torch.equal(flat(again(example)), found)
    return small


@pytest.mark.parametrize("name", NETS)
def test_what_is_found_in_an_odd_network_can_be_cut(name):
    function, layers, expected = NETS[name]
    torch.manual_seed(0)
    model = filled(Net(function, **layers()))
    example = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    groups = quiet_groups(model, example)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert {group.name for group in groups} == expected
    for group in groups:
        require_equal(model, [group], example)
        require_equal(model, [group], example, share=group.channels)  # but for one
    if groups:
        small = require_equal(model, groups, example)
        numbers = [sum(p.numel() for p in each.parameters()) for each in (small, model)]
        assert numbers[0] < numbers[1]


# Declared blocks


class Gated(nn.Module):
    def __init__(self, gate_is_last, bias):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(5, 12, bias=bias), nn.Linear(6, 4)
        self.gate_is_last = gate_is_last

    def channel_groups(self):
        return [gated_group("fc1", "fc2", self, self.gate_is_last)]

    def forward(self, x):
        one, other = self.fc1(x).chunk(2, -1)
        value, gate = (one, other) if self.gate_is_last else (other, one)
        return self.fc2(value * torch.sigmoid(gate))


BLOCKS = {
    "mlp": (lambda: Mlp(8, 12), 1),
    "mlp without biases": (lambda: Mlp(8, 12, 5, bias=False, act_layer=nn.ReLU), 1),
    "mlp of convolutions": (lambda: Mlp(8, 12, use_conv=True), 0),
    "mlp with a norm": (lambda: Mlp(8, 12, norm_layer=nn.LayerNorm), 0),
    "attention": (lambda: Attention(8, 4), 1),
    "attention of one head": (lambda: Attention(8, 1), 1),
    "attention with biases": (lambda: Attention(8, 2, qkv_bias=True), 1),
    "attention with norms of heads": (
        lambda: Attention(8, 2, qk_norm=True, norm_layer=nn.LayerNorm),
        1,
    ),
    "gate first": (lambda: Gated(False, True), 1),
    "gate last": (lambda: Gated(True, False), 1),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_declared_blocks_hold_within_a_model(name):
    make, count = BLOCKS[name]
    torch.manual_seed(0)
    model = filled(nn.Sequential(nn.Identity(), nn.ModuleDict({"inner": make()})["inner"]))
    groups = declared_groups(model)
    assert len(groups) == count
    width = 5 if name.startswith("gate") else 8
    shape = (2, width, 3, 3) if "convolutions" in name else (2, 3, width)
    example = torch.randn(shape, dtype=torch.float64)
    for group in groups:
        assert group.name.startswith("1.")
        assert group.zero_invariant
        if group.channels > 1:
            small = require_equal(model, [group], example)
            for key, value in group.counts.items():
                owner, leaf = key.rsplit(".", 1)
                full, now = (getattr(m.get_submodule(owner), leaf) for m in (model, small))
                gone = len(range(0, group.channels, 3)[: group.channels - 1])
                assert now == full - value * gone


@pytest.mark.parametrize(
    ("activation", "invariant"),
    [
        (None, True), (nn.GELU(), True), (nn.Tanh(), True), (nn.PReLU(), True), (nn.ELU(), True),
        (nn.Sigmoid(), False), (nn.Softplus(), False), (nn.LogSigmoid(), False),
        (nn.Hardsigmoid(), False),
    ],
)  # fmt: skip
def test_an_activation_is_zero_at_zero_if_the_group_relies_on_it(activation, invariant):
    block = nn.ModuleDict({"one": nn.Linear(3, 4), "two": nn.Linear(4, 2)})
    assert mlp_group("one", "two", block, activation).zero_invariant == invariant
    if invariant and activation is not None:
        assert float(activation(torch.zeros(1)).detach()) == 0


def test_a_block_within_another_has_all_of_its_names_prefixed():
    group = ChannelGroup(
        "fc", 2, (Slice("fc.weight", 0, torch.tensor([[0], [1]])),), (), counts={"heads": 1}
    )
    assert group.within("") is group
    inner = group.within("b").within("a")
    assert (inner.name, inner.zeroed[0].tensor, {*inner.counts}) == (
        "a.b.fc", "a.b.fc.weight", {"a.b.heads"}
    )  # fmt: skip
