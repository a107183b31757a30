"""Specs of models: plain data, in one order, rebuilt to the bit."""

import json

import pytest
import timm
import torch
from torch import nn

from smallfry.errors import RunError, UsageError
from smallfry.layers.low_rank import LowRank
from smallfry.layers.quantized import QuantizedWeight
from smallfry.transforms import ModelSpec, Stage, build, kinds
from smallfry.transforms.replace import Replace, replace_layers, tied_layers
from smallfry.transforms.resize import Resize

MICRO = ModelSpec("vitrm_micro_patch4_8", {"num_classes": 10, "embed_dim": 16, "num_heads": 2})
QKV = "blocks.0.attn.qkv"


def test_a_spec_is_plain_data_and_comes_back():
    spec = MICRO.then(Replace("low_rank", {QKV: {"rank": 3}}))
    spec = spec.then(Replace("quantized_weight", {"head": {"bits": 4}}))
    again = ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert "transforms" not in MICRO.to_dict()


def test_the_order_of_stages_is_kept():
    spec = MICRO.then(Replace("quantized_weight", {"head": {"bits": 4}}))
    with pytest.raises(UsageError, match=r"'replace' \(factor\) comes before 'replace' \(bits\)"):
        spec.then(Replace("low_rank", {QKV: {"rank": 3}}))
    assert [*Stage] == sorted(Stage)


def test_all_kinds_are_found():
    assert {"replace", "resize"} <= set(kinds())


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        ("none", "not a list"),
        ([{"version": 1}], "no kind"),
        ([{"kind": "resise", "version": 1}], "did you mean 'resize'"),
        ([{"kind": "resize", "version": 9, "shapes": {}}], "version 9, this smallfry reads"),
        ([{"kind": "resize", "version": 1, "shapes": {"head.weight": [-1]}}], "whole numbers"),
        ([{"kind": "resize", "version": 1, "nonsense": 1}], "is damaged"),
        ([{"kind": "replace", "version": 1, "layer": "os.system", "settings": {"head": {}}}],
         "unknown layer 'os.system'"),
        ([{"kind": "replace", "version": 1, "layer": "low_rank", "settings": 3}], "is damaged"),
        ([{"kind": "resize", "version": 1, "shapes": {}}] * 101, "more than 100"),
    ],
)  # fmt: skip
def test_what_a_file_says_of_transforms_is_judged(transforms, message):
    content = {**MICRO.to_dict(), "transforms": transforms}
    with pytest.raises(RunError, match=message):
        ModelSpec.from_dict(content)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (Resize({"head.weight": [20, 16]}), "would grow"),
        (Resize({"head.weight": [5]}), "no tensor 'head.weight' with 1"),
        (Resize({}, {"blocks.0.attn.training": 1}), "no count"),
        (Resize({}, {"blocks.0.attn.heads": 3}), "no count"),
        (Replace("low_rank", {"blocks.0.attn.qvk": {"rank": 3}}), "did you mean"),
        (Replace("low_rank", {QKV: {"rank": 99}}), "rank is 1 to 16"),
        (Replace("low_rank", {"blocks.0.norm1": {"rank": 1}}), "expected nn.Linear"),
        (Replace("quantized_weight", {"head": {"bits": 9}}), "bits from 2 to 8"),
    ],
)
def test_a_transform_that_does_not_fit_is_refused(transform, message):
    with pytest.raises(RunError, match=f"can't be built from its description.*{message}"):
        build(MICRO.then(transform))


def test_weights_of_another_structure_are_refused():
    spec = MICRO.then(Replace("low_rank", {QKV: {"rank": 3}}))
    with pytest.raises(RunError, match="weights don't fit"):
        build(spec, build(MICRO).state_dict())


def test_a_small_file_makes_no_large_model():
    spec = ModelSpec("vitrm_small_patch4_32", {"embed_dim": 6000, "mlp_hidden_dim": 90_000})
    with pytest.raises(RunError, match="larger than its weights"):
        build(spec.then(Resize({"head.weight": [1, 1]})), {"head.weight": torch.zeros(1, 1)})


class Shared(nn.Module):
    """A layer under two names, and a weight in two layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.again = self.first
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.first.weight

    def forward(self, rows):
        return self.tied(self.again(self.first(rows)))


def low_rank(old, name):
    return LowRank.from_dense(old, rank=2)


def test_a_layer_and_a_weight_of_two_uses_are_replaced_once():
    model = Shared()
    assert tied_layers(model)["first"] == ("first", "again", "tied")
    replace_layers(model, ["first", "tied"], low_rank)
    assert model.again is model.first
    assert model.tied.reduce.weight is model.first.reduce.weight
    assert model.tied.expand.bias is not model.first.expand.bias
    assert sum(p.numel() for p in model.parameters()) == 2 * 2 * 6 + 2 * 6


def test_half_a_tie_is_refused_and_nothing_is_replaced():
    model = Shared()
    with pytest.raises(ValueError, match="'first' has the weight of a layer that is replaced"):
        replace_layers(model, ["tied"], low_rank)
    assert isinstance(model.tied, nn.Linear)


def test_the_projection_of_multihead_attention_is_not_called_and_stays():
    with pytest.raises(ValueError, match="never calls it"):
        replace_layers(nn.Sequential(nn.MultiheadAttention(4, 2)), ["0.out_proj"], low_rank)


@pytest.mark.parametrize("name", ["vitrm_micro_patch4_8", "cct_2_3x2_32", "resnet10t"])
@pytest.mark.parametrize("kind", [LowRank, QuantizedWeight])
def test_a_replaced_model_is_rebuilt_to_the_bit(name, kind):
    spec = ModelSpec(name, {"num_classes": 5})
    model = build(spec)
    named = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    setting = {"rank": 1} if kind is LowRank else {"bits": 3}
    transform = Replace(kind.name, dict.fromkeys(named, setting))
    replace_layers(model, named, lambda old, _: kind.from_dense(old, **setting))
    shape = timm.get_pretrained_cfg(name).input_size
    example = torch.randn(2, *shape)
    again = build(spec.then(transform), model.state_dict())
    assert torch.equal(again(example), model(example))
