"""Batch norms folded into convolutions: the same outputs, and what can't be folded stays."""

import copy

import pytest
import timm
import torch
from torch import nn

from smallfry.compress import FoldBatchNorm, Quantize, apply_to_model
from smallfry.compress.quantize.fold import find_pairs
from smallfry.errors import UsageError
from smallfry.transforms import ModelSpec, build
from smallfry.transforms.folded import Fold, fold_weights

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def with_statistics(model):
    """A model in evaluation mode whose norms do something."""
    torch.manual_seed(0)
    for each in model.modules():
        if isinstance(each, NORMS) and each.track_running_stats:
            each.running_mean.normal_()
            each.running_var.uniform_(0.5, 2)
            if each.affine:
                nn.init.uniform_(each.weight, -1.5, 1.5)
                nn.init.normal_(each.bias)
    return model.eval()


def norms_of(model):
    return [name for name, each in model.named_modules() if isinstance(each, NORMS)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("dims", [1, 2])
def test_weights_include_the_norm(bias, affine, groups, dims):
    conv, norm = ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv2d, nn.BatchNorm2d))[dims - 1]
    layer = conv(8, 12, 3, padding=1, stride=2, bias=bias, groups=groups).double()
    after = with_statistics(norm(12, affine=affine).double())
    folded = copy.deepcopy(layer)
    weight, shift = fold_weights(layer, after)
    folded.weight, folded.bias = nn.Parameter(weight), nn.Parameter(shift)
    images = torch.randn(3, 8, *[9] * dims, dtype=torch.float64)
    torch.testing.assert_close(folded(images), after(layer(images)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "left"),
    [("resnet8_mlperf_tiny", 0), ("loopnet_70k", 2), ("mobilenetv3_small_050", 0)],
)
def test_a_folded_network_computes_what_it_did(name, left):
    model = with_statistics(timm.create_model(name, num_classes=4)).double()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    expected = model(images)
    small, spec = apply_to_model(copy.deepcopy(model), [FoldBatchNorm()])
    assert len(norms_of(small)) == left < len(norms_of(model))
    torch.testing.assert_close(small.eval()(images), expected, rtol=1e-9, atol=1e-9)
    (fold,) = spec.transforms
    stored = ModelSpec(name, {"num_classes": 4}).then(fold)
    again = build(ModelSpec.from_dict(stored.to_dict()), small.float().state_dict()).eval()
    torch.testing.assert_close(again(images.float()), small(images.float()))


def test_a_folded_network_is_quantized_like_any():
    model = with_statistics(timm.create_model("resnet8_mlperf_tiny", num_classes=4))
    images = torch.randn(8, 3, 32, 32)
    small, spec = apply_to_model(model, [FoldBatchNorm(), Quantize(8)])
    expected = model.eval()(images)
    assert next(each.kind for each in spec.transforms) == "fold"
    difference = (small.eval()(images) - expected).abs().max() / expected.abs().max()
    assert 0 < difference < 0.05


class Odd(nn.Module):
    """Convolutions with norms that can't be folded, and one that can."""

    def __init__(self):
        super().__init__()
        self.read_twice, self.first = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.called_twice, self.second = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.active, self.third = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.of_batch, self.fourth = (
            nn.Conv2d(3, 3, 1),
            nn.BatchNorm2d(3, track_running_stats=False),
        )
        self.tied, self.fifth = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.tied.weight = self.of_batch.weight
        self.good, self.sixth = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.read_twice(x)
        x = self.first(y) + y
        x = self.second(self.called_twice(self.called_twice(x)))
        x = self.third(self.active(x).relu())
        x = self.fifth(self.tied(self.fourth(self.of_batch(x))))
        return self.sixth(self.good(x))


def test_only_a_norm_that_alone_reads_a_layer_of_its_own_is_folded():
    assert find_pairs(with_statistics(Odd())) == {"good": "sixth"}


def test_patterns_choose_the_layers():
    model = with_statistics(timm.create_model("resnet8_mlperf_tiny", num_classes=4))
    pairs = find_pairs(model)
    first = next(iter(pairs))
    small, _ = apply_to_model(copy.deepcopy(model), [FoldBatchNorm(exclude=(first,))])
    assert norms_of(small) == [pairs[first]]
    with pytest.raises(UsageError, match="convolution with a batch norm"):
        apply_to_model(model, [FoldBatchNorm(include=("nothing",))])


def test_networks_without_norms_and_those_that_cant_be_traced_are_refused():
    with pytest.raises(UsageError, match="ViTRM can't be traced: leave it out"):
        apply_to_model(timm.create_model("vitrm_micro_patch4_8"), [FoldBatchNorm()])
    with pytest.raises(UsageError, match="convolution with a batch norm"):
        apply_to_model(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), [FoldBatchNorm()])


@pytest.mark.parametrize(
    ("norms", "message"),
    [
        ({}, "names of modules"),
        ({"conv1": ""}, "names of modules"),
        ({"conv9": "bn1"}, "no convolution 'conv9'"),
        ({"conv1": "fc"}, "with a batch norm 'fc'"),
        ({"layer2.0.conv1": "bn1"}, "other channels"),
    ],
)
def test_wrong_names_are_refused(norms, message):
    with pytest.raises(ValueError, match=message):
        Fold(norms).apply(timm.create_model("resnet18"))


def test_a_norm_with_an_activation_leaves_the_activation():
    model = with_statistics(timm.create_model("mobilenetv3_small_050"))
    Fold({"conv_stem": "bn1"}).apply(model)
    assert [type(each).__name__ for each in model.bn1] == ["Hardswish"]
