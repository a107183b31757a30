"""Layers chosen by patterns of their names."""

import warnings

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from smallfry.compress import (
    HESSO,
    LSQ,
    LowRank,
    Magnitude,
    Quantize,
    Session,
    TensorTrain,
    apply_to_model,
)
from smallfry.compress.select import chosen, dense_layers
from smallfry.errors import SmallfryWarning, UsageError

NAMES = ["stem", "blocks.0.fc", "blocks.1.fc", "blocks.1.attn.qkv", "head"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)
        self.attention = nn.MultiheadAttention(4, 2)
        self.head = nn.Linear(4, 2)
        self.again = self.head


def test_linear_layers_and_convolutions_are_listed_once():
    assert dense_layers(Net()) == ["stem", "head"]  # nothing inside PyTorch's own attention


def test_a_layer_that_is_the_model_has_no_name_and_is_listed():
    assert dense_layers(nn.Linear(2, 2)) == [""]


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    def forward(self, x):
        return super().forward(x)


def normed():
    return nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))


def pruned():
    layer = nn.Linear(4, 4)
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


def test_what_is_more_than_its_weight_is_not_listed():
    layers = [Doubled(4, 4), timm.layers.StdConv2d(4, 4, 3), normed(), pruned()]
    assert dense_layers(nn.Sequential(*layers, Renamed(4, 4), nn.Linear(4, 4))) == ["4", "5"]


@pytest.mark.parametrize("build", [normed, pruned, lambda: Doubled(4, 4)])
def test_a_model_of_such_layers_alone_is_refused_by_name(build):
    with pytest.raises(UsageError, match=r"no linear layer.*left; '0' \(.*\) has a forward of its"):
        dense_layers(nn.Sequential(build(), nn.ReLU()))
    with pytest.raises(UsageError, match=r"matches no linear layer.*; '0' \("):
        dense_layers(nn.Sequential(build(), nn.Linear(4, 4)), ["0"])


@pytest.mark.parametrize("method", [Quantize(weights=8, equalize=True), LowRank(smallest=1)])
def test_a_layer_that_is_more_than_its_weight_keeps_what_it_computes(method):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4), nn.ReLU(), Doubled(4, 4), nn.ReLU(), normed()]
    model, x = nn.Sequential(*layers).eval(), torch.randn(5, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        small, _ = apply_to_model(model, [method])
    assert type(small[0]) is not nn.Linear  # it has been replaced
    torch.testing.assert_close(small[2:](x), model[2:](x), rtol=0, atol=0)
    if method.name == "quantize":
        (warned,) = caught
        assert "'2 (Doubled), 4 (ParametrizedLinear)" in f"'{str(warned.message).split(': ')[-1]}"


def test_convolutions_of_other_paddings_stay_dense():
    torch.manual_seed(0)
    convolutions = [
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 1, padding_mode="reflect"),
    ]
    model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(64, 8))
    for method in (LowRank(smallest=1), TensorTrain(smallest=1)):
        small, spec = apply_to_model(model, [method])
        (replaced,) = spec.transforms
        assert list(replaced.settings) == ["4"]
        for one, other in zip(small[:3], model[:3], strict=True):
            assert torch.equal(one.weight, other.weight)


class Tied(nn.Module):
    """A language model whose classifier has the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.words, self.mix, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)
        self.head.weight = self.words.weight

    def forward(self, numbers):
        return self.head(torch.tanh(self.mix(self.words(numbers))))


def test_a_weight_that_is_an_embeddings_too_stays():
    torch.manual_seed(0)
    model, numbers = Tied().eval(), torch.arange(9)[None]
    with pytest.warns(SmallfryWarning, match=r"2 layers with 36 weights stay .* words \(Embedding"):
        small, _ = apply_to_model(model, [Quantize(weights=8)])
    assert torch.equal(small.head.weight, model.head.weight)
    assert small.head.weight is small.words.weight
    torch.testing.assert_close(small(numbers), model(numbers), rtol=0.02, atol=0.02)
    small, spec = apply_to_model(model, [LowRank(smallest=1)])
    assert list(spec.transforms[0].settings) == ["mix"]
    with pytest.raises(UsageError, match=r"none of the chosen layers, such as 'head' \(Linear\)"):
        apply_to_model(model, [Quantize(include=("head", "words"))])


def test_a_layer_that_is_the_model_is_refused_in_words():
    with pytest.raises(ValueError, match=r"whole model: put it into nn.Sequential"):
        apply_to_model(nn.Linear(4, 4), [Quantize(weights=8)])


def test_a_model_that_can_not_be_copied_is_refused_in_words():
    with pytest.raises(UsageError, match=r"can't be copied .*nn.utils.prune.remove"):
        apply_to_model(nn.Sequential(pruned(), nn.Linear(4, 4)), [LowRank()])


@pytest.mark.parametrize("method", [Magnitude(), HESSO(sparsity=0.5)])
def test_a_model_without_channels_to_cut_is_refused_in_words(method):
    model = nn.Sequential(nn.Conv1d(4, 16, 3, groups=2), nn.ReLU(), nn.Flatten())
    with pytest.raises(
        UsageError, match=rf"{method.name} finds no channels to cut: .* convolutions"
    ):
        Session(model, [method], torch.randn(2, 4, 8), steps=10).finish()  # if not at once


@pytest.mark.parametrize("before", [True, False])
def test_an_optimizer_without_the_parameters_of_new_layers_is_announced(before):
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(5, 4)
    early = torch.optim.SGD(model.parameters(), 0.1)
    session = Session(model, [LSQ(weights=4, activations=None)], x, steps=1)
    optimizer = early if before else torch.optim.SGD(model.parameters(), 0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        session.attach(optimizer)
    assert ["'0.weight_log_step', are not in the optimizer" in str(w.message) for w in caught] == (
        [True] * before
    )
    step = model[0].weight_step.detach().clone()
    (model(x).square().sum() + session.penalty()).backward()
    optimizer.step()
    assert torch.equal(model[0].weight_step, step) == before


def test_a_method_that_finds_no_layer_is_announced():
    with pytest.warns(SmallfryWarning, match=r"low_rank leaves the model .* 256 parameters"):
        _, spec = apply_to_model(nn.Sequential(nn.Linear(4, 4)), [LowRank()])
    assert spec.transforms == ()


@given(
    include=st.lists(st.sampled_from(["*", "blocks.*", "*.fc", "head", "stem"]), min_size=1),
    exclude=st.lists(st.sampled_from(["blocks.1.*", "*.qkv", "head"])),
)
def test_what_is_chosen_is_included_not_excluded_and_in_order(include, exclude):
    every = {p: {n for n in NAMES if _matches(n, p)} for p in {*include, *exclude}}
    expected = set().union(*(every[p] for p in include)) - set().union(*(every[p] for p in exclude))
    if not expected:
        with pytest.raises(UsageError, match="matches no layer"):
            chosen(NAMES, include, exclude, "layer")
    else:
        assert chosen(NAMES, include, exclude, "layer") == [n for n in NAMES if n in expected]


def _matches(name, pattern):
    if pattern.startswith("*"):
        return name.endswith(pattern[1:])
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


def test_a_name_that_is_nearly_right_is_named():
    with pytest.raises(UsageError, match=r"matches no layer.*did you mean 'head'"):
        chosen(NAMES, ["haed"], [], "layer")


def test_letters_count_and_brackets_are_patterns():
    with pytest.raises(UsageError, match="matches no layer"):
        chosen(NAMES, ["Head"], [], "layer")
    assert chosen(NAMES, ["blocks.[01].fc"], [], "layer") == ["blocks.0.fc", "blocks.1.fc"]


def test_a_model_without_layers_is_refused():
    with pytest.raises(UsageError, match="has no linear layer or convolution left; if an earlier"):
        dense_layers(nn.ReLU())
