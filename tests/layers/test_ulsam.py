"""ULSAM against its authors' implementation, and inside other networks."""

import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from smallfry.errors import UsageError
from smallfry.layers.ulsam import ULSAM, insert_ulsam, join_subspaces, replace_with_ulsam

sys.path.append(str(Path(__file__).parents[1] / "models"))
from zoo_golden import GOLDEN, assert_summary, filled, images, load

LAYERS = GOLDEN["layers"]


def sizes(name: str) -> tuple[int, int]:
    _, channels, groups = name.split("_")
    return int(channels), int(groups[1:])


def named(channels: int, groups: int) -> list:
    each = channels // groups
    parts = {
        "conv_dws.weight": (each, 1, 1, 1),
        "conv_dws.bias": (each,),
        "conv_point.weight": (1, each, 1, 1),
        "conv_point.bias": (1,),
    }
    for norm, count in (("bn_dws", each), ("bn_point", 1)):
        for part in ("weight", "bias", "running_mean", "running_var"):
            parts[f"{norm}.{part}"] = (count,)
    return [(f"subspaces.{i}.{k}", shape) for i in range(groups) for k, shape in parts.items()]


def loaded(name: str, **settings: float) -> nn.Module:
    channels, groups = sizes(name)
    layer = ULSAM(channels, groups, **settings)
    return load(layer, named(channels, groups), lambda state, _: join_subspaces(state))


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_costs(name: str) -> None:
    entry, (channels, groups) = LAYERS[name], sizes(name)
    if "tensors" in entry:
        known = [(n, tuple(s)) for n, s in entry["tensors"] + entry["buffers"]]
        assert sorted(known) == sorted(named(channels, groups))
    layer = loaded(name)
    numbers = sum(p.numel() for p in layer.parameters())
    assert numbers == entry["n_params"] == 5 * channels + 3 * groups
    assert entry["macs_one_image"] == 2 * channels * 14 * 14
    with torch.no_grad():
        assert_summary(layer(images(entry["input_shape"])), entry["output"])


def test_training_with_the_authors_momentum() -> None:
    entry = LAYERS["ulsam_64_g4"]["train_mode_7x5"]
    layer = loaded("ulsam_64_g4", bn_momentum=0.9).train()
    inputs = images((2, 64, 7, 5)).requires_grad_()
    out = layer(inputs)
    assert_summary(out, entry["output"])
    (out * images(out.shape, "cotangent")).sum().backward()
    assert inputs.grad is not None
    assert_summary(inputs.grad, entry["grad_input"])
    for name, wanted in entry["running_mean_after"].items():
        _, number, *rest = name.split(".")
        found = layer.get_buffer(".".join(rest)).chunk(4)[int(number)]
        assert_summary(found, wanted)
    assert len(entry["grad_l2"]) == 8 * 4
    for name, norm in entry["grad_l2"].items():
        _, number, *rest = name.split(".")
        gradient = layer.get_parameter(".".join(rest)).grad
        found = gradient.chunk(4)[int(number)].norm().item()
        assert found == pytest.approx(norm, rel=1e-7, abs=1e-12), name


def test_all_groups_at_once_are_each_alone() -> None:
    torch.manual_seed(0)
    layer = ULSAM(12, 3).double().eval()
    x = torch.randn(2, 12, 5, 4, dtype=torch.float64)
    parts = []
    for i, part in enumerate(x.chunk(3, dim=1)):
        at = slice(4 * i, 4 * i + 4)
        a = F.conv2d(part, layer.conv_dws.weight[at], layer.conv_dws.bias[at], groups=4)
        a = F.max_pool2d((a / (1 + 1e-5) ** 0.5).relu(), 3, 1, 1)
        a = F.conv2d(a, layer.conv_point.weight[i : i + 1], layer.conv_point.bias[i : i + 1])
        a = (a / (1 + 1e-5) ** 0.5).relu().flatten(2).softmax(2).view(2, 1, 5, 4)
        parts.append(part * a + part)
    torch.testing.assert_close(layer(x), torch.cat(parts, 1))


def test_a_single_position_is_doubled() -> None:
    x = torch.randn(2, 8, 1, 1)
    torch.testing.assert_close(ULSAM(8, 2)(x), 2 * x)


def test_weights_of_other_layers_pass_the_filter() -> None:
    state = {"conv.weight": filled("conv.weight", (2, 2)), "a.subspaces.10.w": torch.ones(1)}
    state |= {f"a.subspaces.{i}.w": torch.full((1,), float(i)) for i in range(10)}
    found = join_subspaces(state)
    assert found.keys() == {"conv.weight", "a.w"}
    assert found["a.w"].tolist() == [*range(10), 1.0]


def test_timms_attention_factory_takes_it() -> None:
    model = timm.create_model("resnet18", block_args={"attn_layer": ULSAM}, num_classes=3).eval()
    assert sum(isinstance(m, ULSAM) for m in model.modules()) == 8
    assert model(torch.rand(1, 3, 32, 32)).shape == (1, 3)


def test_layers_are_inserted_and_replace_blocks() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 4, 1))
    net.double().eval()
    example = torch.rand(2, 3, 8, 8)
    with pytest.raises(UsageError, match="ULSAM replaces modules that keep the shape"):
        replace_with_ulsam(net, ["2"], example=example)
    with pytest.raises(UsageError, match="no module '3'"):
        insert_ulsam(net, ["3"], example=example)
    with pytest.raises(UsageError, match="give an example"):
        insert_ulsam(net, ["0"])
    with pytest.raises(UsageError, match="3 groups don't divide 8"):
        replace_with_ulsam(net, ["1"], groups=3, example=example)
    replace_with_ulsam(net, ["1"], groups=2, bn_momentum=0.9, example=example)
    insert_ulsam(net, ["2"], example=example)
    assert isinstance(net[1], ULSAM)
    assert net[1].bn_dws.momentum == 0.9
    assert [type(m) for m in net[2]] == [nn.Conv2d, ULSAM]
    assert net[1].conv_dws.weight.dtype == torch.float64
    assert not net[1].training
    assert net(example.double()).shape == (2, 4, 4, 4)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    with pytest.raises(UsageError, match="1 gives no map"):
        insert_ulsam(flat, ["1"], example=torch.rand(1, 3, 2, 2))
