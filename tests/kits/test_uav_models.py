"""U-Nets and the policy network: parameters, shapes, and what they depend on."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from smallfry.errors import UsageError
from smallfry.kits.uav.models import PilotNet, UNet
from smallfry.models.sources import source_of
from smallfry.transforms.build import build, is_model
from smallfry.transforms.spec import ModelSpec


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [
        ("unet_s", {}, 1_562_275),
        ("unet_xs", {}, 98_347),
        ("unet_s", {"widths": (14, 28, 56, 112, 224)}, 1_487_713),
        ("unet_s", {"widths": (16, 32, 64, 128, 256)}, 1_942_611),
        ("unet_s", {"widths": (24, 48, 96, 192)}, 1_084_731),
        ("pilot_net", {}, 63_796),
    ],
)
def test_parameters(name, options, parameters):
    model = timm.create_model(name, **options)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_the_student_is_as_large_as_the_papers():
    count = sum(p.numel() for p in timm.create_model("unet_s").parameters())
    assert abs(count / 1.6e6 - 1) < 0.05


def test_sources_are_stated():
    assert source_of("unet_s").paper.startswith("Ronneberger")
    assert "our own" in source_of("pilot_net").paper


def by_hand(model, images):
    """Compute a U-Net's features from its parts, level by level."""
    kept, features = [], images
    for level, block in enumerate(model.down):
        if level:
            features = F.max_pool2d(features, 2)
        for conv, norm in ((block[0], block[1]), (block[3], block[4])):
            features = F.relu(norm(F.conv2d(features, conv.weight, padding=1)))
        kept.append(features)
    for level in range(len(model.down) - 2, -1, -1):
        number = len(model.down) - 2 - level
        up = model.up[number]
        raised = F.conv_transpose2d(features, up.weight, up.bias, stride=2)
        features = torch.cat([kept[level], raised], dim=1)
        block = model.join[number]
        for conv, norm in ((block[0], block[1]), (block[3], block[4])):
            features = F.relu(norm(F.conv2d(features, conv.weight, padding=1)))
    return F.conv2d(features, model.head.weight, model.head.bias)


def test_the_values_are_those_of_the_parts():
    model = timm.create_model("unet_xs").double().eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.uniform_(-0.5, 0.5)
            norm.running_var.uniform_(0.5, 2)
    images = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    with torch.no_grad():
        assert_close(model(images), by_hand(model, images))


@pytest.mark.parametrize("size", [(48, 64), (120, 160), (8, 8)])
def test_a_mask_is_as_large_as_its_image(size):
    model = timm.create_model("unet_xs", num_classes=5, img_size=size).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, *size)).shape == (1, 5, *size)


@pytest.mark.parametrize("name", ["unet_xs", "pilot_net"])
def test_the_classifier_is_replaced_and_removed(name):
    model = timm.create_model(name).eval()
    images = torch.randn(2, model.in_chans, 48, 64)
    with torch.no_grad():
        features = model.forward_features(images)
        assert features.shape[1] == model.num_features == model.head_hidden_size
        assert_close(model.forward_head(features, pre_logits=True), features)
        assert_close(model.get_classifier()(features), model(images))
        model.reset_classifier(7)
        assert model(images).shape[1] == model.num_classes == 7
        model.reset_classifier(0)
        assert_close(model(images), features)


@pytest.mark.parametrize("name", ["unet_xs", "pilot_net"])
def test_every_weight_learns(name):
    model = timm.create_model(name)
    images = torch.randn(4, model.in_chans, 48, 64)
    model(images).square().sum().backward()
    assert all(bool(p.grad.any()) for p in model.parameters())


def test_the_policy_depends_on_the_last_action_alone_of_its_channels():
    model = timm.create_model("pilot_net").eval()
    images = torch.randn(1, 7, 48, 64)

    def logits(last, mean=0.5, std=0.5):
        images[:, 3:] = (0 - mean) / std
        images[:, 3 + last] = (1 - mean) / std
        with torch.no_grad():
            return model(images)

    assert not torch.equal(logits(0), logits(1))
    assert_close(logits(2), logits(2, mean=0.01, std=0.001))  # however it is normalised
    assert_close(logits(3), logits(3, mean=0.0, std=1.0))


def test_the_policy_keeps_the_side_on_which_something_is():
    model = timm.create_model("pilot_net").eval()
    images = torch.randn(1, 7, 48, 64)
    images[:, 3:] = images[:, 3:, :1, :1]
    with torch.no_grad():
        features = model.features(images[:, :3]).mean(dim=2)
        mirrored = model.features(images[:, :3].flip(-1)).mean(dim=2)
    assert features.shape == (1, 64, 4)
    assert not torch.allclose(features.sum(-1), features[..., 0] * 4)
    assert not torch.allclose(features, mirrored)


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (UNet, {"img_size": (50, 64)}, "multiples of 8, not 50×64: set data.image_size"),
        (UNet, {"img_size": 40, "widths": (4, 4, 4, 4, 4)}, "of 5 levels .* multiples of 16"),
        (PilotNet, {"in_chans": 3}, "such as 7, not 3: train it on uav-flights"),
        (PilotNet, {"img_size": 16}, "17 pixels and more, not 16×16"),
    ],
)
def test_wrong_sizes_are_refused(kind, settings, words):
    with pytest.raises(UsageError, match=words):
        kind(**settings)


def test_a_kits_model_is_built_by_its_name():
    assert is_model("unet_xs")
    spec = ModelSpec("unet_xs", {"num_classes": 3, "img_size": [24, 32], "in_chans": 3})
    assert isinstance(build(spec), UNet)
