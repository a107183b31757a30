"""Transforms as files describe them: every wrong one is refused, and right ones come back."""

import dataclasses
import json
import math
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from smallfry.errors import RunError, UsageError
from smallfry.order import Stage
from smallfry.transforms import ModelSpec, build, kinds
from smallfry.transforms.adapters import Adapters
from smallfry.transforms.bits import Bits
from smallfry.transforms.classifier import classifier_names, with_classes
from smallfry.transforms.cues import Cues
from smallfry.transforms.erased import Erase, Skip, Zero
from smallfry.transforms.groups import ChannelGroup, Slice, cut
from smallfry.transforms.nested import (
    CHILD,
    Nested,
    SubModel,
    active,
    extract,
    parse_group,
    plain_group,
    statistics,
)
from smallfry.transforms.registry import find, register
from smallfry.transforms.replace import Replace
from smallfry.transforms.resize import Resize
from smallfry.transforms.shorten import Shorten, owner_of, steps_of

ARGUMENTS = {"num_classes": 3, "embed_dim": 8, "num_heads": 2, "mlp_hidden_dim": 8, "depth": 3}
MICRO = ModelSpec("vitrm_micro_patch4_8", ARGUMENTS)
IMAGES = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def weights():
    return build(MICRO).state_dict()


# Fuzz

NAMES = st.sampled_from(
    ["", "blocks", "blocks.0", "blocks.0.mlp.fc1", "blocks.0.mlp.fc1.weight", "head", "head.weight",
     "blocks.0.attn.heads", "latent_steps", "rank", "inner", "calls", "bits", "first", "no.such",
     "low_rank", "gelu", "patch_embed"]
)  # fmt: skip
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 9), st.floats(width=16), NAMES, st.just(10**30)
)
PLAIN = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=3)
    ),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=60)
@given(data=st.data())
def test_garbage_in_a_file_is_a_transform_or_refused_in_one_line(data, weights):
    known = {name: kind for name, kind in kinds().items() if kind.__module__.startswith("smallfry")}
    name = data.draw(st.sampled_from(sorted(known)))
    fields = [field.name for field in dataclasses.fields(known[name])]
    content = {field: data.draw(PLAIN) for field in fields if data.draw(st.booleans())}
    entry = {"kind": name, "version": known[name].version, **content}
    described = {**MICRO.to_dict(), "transforms": [json.loads(json.dumps(entry))]}
    try:
        spec = ModelSpec.from_dict(described, "a file")
        build(spec, where="a file")
    except RunError as error:
        problem = str(error)
    else:
        problem = None
        assert spec.to_dict()["transforms"][0].items() >= content.items()
    assert problem is None or (problem.startswith("a file: ") and "\n" not in problem)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "unknown architecture None"),
        ({"name": 3}, "unknown architecture 3"),
        ({"name": "vitrm", "arguments": [1]}, "arguments need names"),
        ({"name": "vitrm", "transforms": {"kind": "resize"}}, "not a list"),
        ({"name": "vitrm", "transforms": ["resize"]}, "a transform has no kind"),
        ({"name": "vitrm", "transforms": [{"kind": ["resize"]}]}, "a transform has no kind"),
        ({"name": "vitrm", "transforms": [{"kind": "resize"}]}, "in version None"),
        (
            {
                "name": "vitrm",
                "transforms": [
                    {
                        "kind": "nested",
                        "version": 1,
                        "groups": [],
                        "layers": {},
                        "widths": {"": None},
                    }
                ],
            },
            "its transform 'nested' is damaged",
        ),
    ],
)
def test_what_is_no_spec_is_named(content, message):
    with pytest.raises(RunError, match=message):
        ModelSpec.from_dict(content)


def test_transforms_of_a_file_in_the_wrong_order_are_refused():
    shorten = {"kind": "shorten", "version": 1, "layers": {"blocks": 2}, "steps": {}}
    low = {"kind": "replace", "version": 1, "layer": "low_rank", "settings": {"head": {"rank": 1}}}
    content = {**MICRO.to_dict(), "transforms": [shorten, low]}
    spec = ModelSpec.from_dict(content)
    assert [each.stage for each in spec.transforms] == [Stage.WIDTH, Stage.FACTOR]
    assert spec.to_dict() == content
    content["transforms"].reverse()
    with pytest.raises(RunError, match=r"'shorten' \(width\) comes before 'replace' \(factor\)"):
        ModelSpec.from_dict(content)


def test_two_classes_of_one_kind_are_refused_and_one_again_is_not():
    with pytest.raises(UsageError, match="two transforms are named 'shorten'"):
        register(type("Other", (), {"kind": "shorten"}))
    assert register(Shorten) is Shorten
    assert find("shorten", "here") is kinds()["shorten"] is Shorten
    with pytest.raises(RunError, match=r"here: has the unknown transform 'shortn'.*'shorten'"):
        find("shortn", "here")


# Fewer layers and steps


def test_leading_layers_stay_with_their_weights(weights):
    full = build(MICRO, weights)
    for count in (1, 2, 3):
        spec = MICRO.then(Shorten({"blocks": count}))
        kept = {
            key: value
            for key, value in weights.items()
            if not key.startswith("blocks.") or int(key.split(".")[1]) < count
        }
        small = build(ModelSpec.from_dict(spec.to_dict()), kept)
        assert len(small.blocks) == count
        other = build(ModelSpec(MICRO.architecture, {**ARGUMENTS, "depth": count}), kept)
        torch.testing.assert_close(small(IMAGES), other(IMAGES), rtol=0, atol=0)
    torch.testing.assert_close(small(IMAGES), full(IMAGES), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (Shorten({"blocks": 4}), "no sequence 'blocks' of 4 layers"),
        (Shorten({"head": 1}), "no sequence 'head'"),
        (Shorten({"": 1}), "no sequence ''"),
        (Shorten({"no.such.blocks": 1}), "no module 'no.such'"),
        (Shorten(steps={"recursion_steps": 10**6}), "no recursion_steps of 1000000 or more"),
        (Shorten(steps={"embed_dim": 1}), "no embed_dim of 1 or more"),
        (Shorten(steps={"training": 1}), "no training of 1 or more"),
        (Erase(["no.such"]), "no module 'no'"),
        (Erase(["head.no"]), "no module 'head.no'"),
        (Erase([], ["blocks.9"]), "no module 'blocks.9'"),
        (Resize({"head.weight": [3, 9]}), "would grow from"),
        (Resize({"head": [3]}), "no tensor 'head'"),
        (Resize({}, {"no.heads": 1}), "no count 'no.heads'"),
        (Resize({}, {"embed_dim": 1}), "no count 'embed_dim'"),
        (Replace("low_rank", {"": {"rank": 1}}), "a ViTRM can't be replaced in place"),
        (Replace("low_rank", {"head": {"rank": 1, "colour": 2}}), "colour"),
    ],
)
def test_a_transform_of_another_model_is_refused_by_the_name_that_is_missing(transform, message):
    with pytest.raises(RunError, match=f"can't be built from its description: .*{message}"):
        build(MICRO.then(transform))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Shorten({"blocks": 0}), "1 or more"),
        (lambda: Shorten({"blocks": True}), "whole numbers"),
        (lambda: Shorten(steps={"latent_steps": 1.0}), "whole numbers"),
        (lambda: Erase("head"), "lists of the names"),
        (lambda: Erase([""]), "lists of the names"),
        (lambda: Erase(["a"], [None]), "lists of the names"),
        (lambda: Resize({"head.weight": [0, 1]}), "1 or more"),
        (lambda: Resize({"head.weight": [1.5]}), "whole numbers"),
        (lambda: Resize({}, {"heads": True}), "whole numbers"),
    ],
)
def test_values_that_no_model_could_have_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_names_and_steps_are_found_at_their_owner():
    model = build(MICRO)
    assert owner_of(model, "head.weight") == (model.head, "weight")
    assert owner_of(model, "head") == (model, "head")
    assert steps_of(model, "recursion_steps") == model.recursion_steps
    assert steps_of(nn.Linear(1, 1), "recursion_steps") == steps_of(model, "embed_dim") == 0
    model.recursion_steps = True
    assert steps_of(model, "recursion_steps") == 0


@pytest.mark.parametrize("whole", [False, True])
def test_an_erased_branch_adds_nothing_whatever_it_is_given(whole):
    x, more = torch.randn(2, 3), torch.randn(1)
    zero = Zero(whole)
    assert zero(x, more, mask=None).shape == (x.shape if whole else ())
    assert torch.equal(x + zero(x), x)
    assert zero(x.double()).dtype == torch.float64
    assert Skip()(x, more, mask=None) is x


# Sub-models


class Towers(nn.Module):
    """Two sequences, one of named layers, with batch norms."""

    def __init__(self):
        super().__init__()
        self.numbered = nn.Sequential(*(self.layer() for _ in range(3)))
        self.named = nn.Sequential(OrderedDict((n, self.layer()) for n in ("first", "mid", "last")))
        self.head = nn.Linear(4, 2)

    def layer(self):
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())

    def forward(self, x):
        return self.head(self.named(self.numbered(x)))


def towers(**settings):
    torch.manual_seed(0)
    model = Towers().double().eval()
    for each in model.modules():
        if isinstance(each, nn.BatchNorm1d):
            each.running_mean.normal_()
            each.running_var.uniform_(0.5, 2)
    Nested(**{"groups": [], "layers": {"numbered": 3, "named": 3}, **settings}).apply(model)
    return model


def test_a_sequence_of_named_layers_is_shortened_with_its_norms():
    model, x = towers(depths=(1.0, 0.6)), torch.randn(5, 4, dtype=torch.float64)
    small = SubModel(depth=0.6)
    submodels = getattr(model, CHILD)
    assert len(submodels.statistics_1) == 4 * 2 * 4  # norms, mean and variance, channels
    submodels.statistics_1.copy_(torch.linspace(0.5, 1.5, 32))
    with active(model, small):
        inside = model(x)
    alone, transforms = extract(model, small)
    assert torch.equal(alone(x), inside)
    assert [*alone.named._modules] == ["first", "mid"]
    assert len(alone.numbered) == 2
    assert transforms == (Shorten({"numbered": 2, "named": 2}, {}),)
    assert not torch.equal(model(x), inside)
    assert len(model.named) == len(model.numbered) == 3
    plan = submodels.nest.plan(model, small)
    found = [module for module, leaf, _ in statistics(model, plan) if leaf == "running_mean"]
    expected = [seq[n][1] for seq in (model.numbered, model.named) for n in range(2)]
    assert [id(each) for each in found] == [id(each) for each in expected]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": {"numbered": 4}, "depths": (1.0, 0.5)}, "no sequence 'numbered' of 4 layers"),
        ({"layers": {"numbered": 2}}, "no sequence 'numbered' of 2 layers"),
        ({"layers": {"tower": 3}}, "no sequence 'tower' of 3 layers"),
        ({"layers": {"head": 3}}, "no sequence 'head'"),
        ({"layers": {"no.such": 3}}, "no module 'no'"),
        ({"latent_steps": (None, 2)}, "no latent_steps of 2 or more"),
        ({"recursion_steps": (None, 1)}, "no recursion_steps of 1 or more"),
    ],
)
def test_sub_models_of_another_model_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        towers(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"widths": ()}, "widths are shares"),
        ({"widths": (0.5,)}, "the first of them 1"),
        ({"heads": (1.0, math.nan)}, "heads are shares"),
        ({"depths": (1.0, 1.5)}, "depths are shares"),
        ({"latent_steps": ()}, "whole numbers of 1 or more"),
        ({"latent_steps": (2,)}, "after a first None"),
        ({"latent_steps": (None, 0)}, "1 or more"),
        ({"recursion_steps": (None, -1)}, "1 or more"),
        ({"recursion_steps": (None, True)}, "whole numbers"),
        # listed one by one, these would be 10¹⁵
        (dict.fromkeys(("widths", "heads", "depths"), (1.0,) * 1000)
         | dict.fromkeys(("latent_steps", "recursion_steps"), (None,) + (1,) * 999), "too many"),
    ],
)  # fmt: skip
def test_sizes_of_sub_models_that_cannot_be_are_refused_before_they_are_listed(settings, message):
    with pytest.raises(ValueError, match=message):
        Nested([], {}, **settings)


def test_a_file_of_very_many_sub_models_is_refused_at_once():
    many = {"widths": [1.0] * 5000, "heads": [1.0] * 5000, "depths": [1.0] * 5000}
    entry = {"kind": "nested", "version": 1, "groups": [], "layers": {}, **many}
    with pytest.raises(RunError, match="125000000000 sub-models are too many; at most 10000"):
        ModelSpec.from_dict({**MICRO.to_dict(), "transforms": [entry]})


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 3), st.booleans(), st.integers(0, 99))
def test_groups_come_back_from_plain_data_whatever_their_spacing(channels, each, step, even, seed):
    torch.manual_seed(seed)
    if even:
        entries = torch.randint(0, 50, (each,)) + step * torch.arange(channels)[:, None]
    else:
        entries = torch.randint(0, 50, (channels, each))
    group = ChannelGroup("g", channels, (Slice("a.weight", 1, entries),), (), counts={"heads": 2})
    content = json.loads(json.dumps(plain_group(group, 2)))
    again = parse_group(content)
    assert torch.equal(again.zeroed[0].entries, entries)
    assert (again.name, again.channels, again.cut) == ("g", channels, ())
    assert again.counts == {"heads": 2}
    assert content["block"] == 2


# Types

FC1, FC2 = "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"
ADDED = {
    "adapters": Adapters({FC1: {"inner": 4, "calls": 1}}, n=2),
    "cues": Cues(anchors=3, tokens=2),
    "low_rank": Replace("low_rank", {FC1: {"rank": 2}}),
    "quantized": Replace("quantized_weight", {FC1: {"bits": 4}}),
    "bits": Bits({FC1: {"bits": 4}}),
    "shorter": Shorten({"blocks": 1}),
    "erased": Erase([FC2], [FC1]),
    "narrower": Resize({f"{FC1}.weight": [8, 8], f"{FC1}.bias": [8], f"{FC2}.weight": [8, 4]}),
}


@pytest.mark.parametrize("name", ADDED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_a_transform_adds_has_the_type_of_the_model(name, dtype):
    model = build(MICRO).to(dtype)
    ADDED[name].apply(model)
    floating = {t.dtype for t in model.state_dict().values() if t.is_floating_point()}
    if name not in ("quantized", "bits"):  # whose scales are stored in float32
        assert floating == {dtype}
    with torch.no_grad():
        assert model.eval()(IMAGES.to(dtype)).dtype == dtype


# Cutting, and other classes


def test_channels_that_are_not_there_can_not_be_kept():
    layer = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    rows = torch.arange(3)[:, None]
    group = ChannelGroup(
        "0", 3, (Slice("0.weight", 0, rows),), (Slice("0.weight", 0, rows),
                                               Slice("0.bias", 0, rows), Slice("1.weight", 1, rows))
    )  # fmt: skip
    with pytest.raises(UsageError, match="'0' would have no channel left"):
        cut(layer, [group], {"0": torch.tensor([], dtype=torch.int64)})
    with pytest.raises(UsageError, match="unknown group of channels '1'"):
        cut(layer, [group], {"1": torch.tensor([0])})
    before = layer[0].weight.detach().clone()
    found = cut(layer, [group], {"0": torch.tensor([2, 0, 2])})
    assert torch.equal(layer[0].weight, before[[0, 2]])  # in their own order, each once
    assert (layer[0].out_features, layer[1].in_features) == (2, 2)
    assert found.shapes == {"0.weight": [2, 2], "0.bias": [2], "1.weight": [2, 2]}


@pytest.mark.parametrize("classes", [1, 3, 7])
def test_other_classes_keep_all_but_the_classifier_through_several_transforms(classes):
    spec = MICRO.then(Shorten({"blocks": 2})).then(
        Replace("low_rank", {"head": {"rank": 2}, "blocks.0.mlp.fc1": {"rank": 3}})
    )
    model = build(spec)
    new, new_spec = with_classes(model, spec, classes)
    assert classifier_names(model) == ["head"]
    assert new(IMAGES).shape == (2, classes)
    assert new_spec.arguments["num_classes"] == classes
    assert [t.kind for t in new_spec.transforms] == ["shorten", "replace"]
    assert {*new_spec.transforms[1].settings} == {"blocks.0.mlp.fc1"}
    for key, value in new.state_dict().items():
        assert key.startswith("head.") or torch.equal(value, model.state_dict()[key])
    again = build(ModelSpec.from_dict(new_spec.to_dict()), new.state_dict())
    assert torch.equal(again(IMAGES), new(IMAGES))
