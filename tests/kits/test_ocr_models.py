"""CRNNs against the authors' network: its values, parameters and numbers of steps."""

import numpy as np
import pytest
import timm
import torch
from torch.testing import assert_close

from smallfry.errors import UsageError
from smallfry.kits.ocr.models import CompactCRNN
from smallfry.models.sources import source_of
from smallfry.transforms.build import build, is_model
from smallfry.transforms.spec import ModelSpec


def fill(model):
    """Fill the parameters as the authors' network was for its values."""
    with torch.no_grad():
        for k, (name, parameter) in enumerate(model.named_parameters()):
            s = torch.sin(0.37 * torch.arange(parameter.numel(), dtype=torch.float64) + 0.11 * k)
            if parameter.ndim >= 2:
                s = s / (parameter.numel() / parameter.shape[0]) ** 0.5
            else:
                s = 1 + 0.1 * s if name.endswith("weight") else 0.1 * s
            parameter.copy_(s.view_as(parameter))


def test_the_networks_values_are_the_authors():
    model = timm.create_model("crnn_vgg", num_classes=37, img_size=(32, 100)).double().eval()
    fill(model)
    images = torch.cos(0.05 * torch.arange(3200, dtype=torch.float64)).view(1, 1, 32, 100)
    with torch.no_grad():
        logits = model(images)
    assert logits.shape == (1, 26, 37)
    head = [0.4687124, 0.3589254, -0.1170423, -0.5619088, -0.5952306, -0.1699219, 0.3861372]
    assert_close(logits.flatten()[:7], torch.tensor(head, dtype=torch.float64), atol=1e-6, rtol=0)
    assert logits.sum().item() == pytest.approx(11.72126, abs=1e-4)
    assert logits.abs().mean().item() == pytest.approx(0.4218348, abs=1e-6)
    assert_close(model.forward_head(model.forward_features(images)), logits)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("crnn_vgg", 8_331_301),
        ("crnn_dw_s", 122_917),
        ("crnn_dw_m", 275_941),
        ("crnn_dw_l", 903_461),
    ],
)
def test_parameters(name, parameters):
    model = timm.create_model(name, num_classes=37)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert source_of(name).paper.startswith("Shi et al. 2017")


@pytest.mark.parametrize(
    ("width", "steps"),
    [(32, 9), (64, 17), (96, 25), (100, 26), (128, 33), (160, 41), (200, 51), (256, 65)],
)
def test_the_papers_network_has_a_step_every_four_pixels_and_one(width, steps):
    model = timm.create_model("crnn_vgg", hidden=8, img_size=(32, width))
    with torch.no_grad():
        assert model.eval()(torch.zeros(1, 1, 32, width)).shape == (1, steps, 37)


@pytest.mark.parametrize("context", ["lstm", "conv"])
@pytest.mark.parametrize("width", [8, 30, 128])
def test_compact_networks_have_a_step_every_four_pixels(context, width):
    model = timm.create_model("crnn_dw_s", num_classes=5, img_size=(32, width), context=context)
    with torch.no_grad():
        assert model.eval()(torch.zeros(2, 1, 32, width)).shape == (2, -(-width // 4), 5)


@pytest.mark.parametrize("name", ["crnn_vgg", "crnn_dw_s"])
def test_the_classifier_is_replaced_and_removed(name):
    model = timm.create_model(name, num_classes=5, img_size=(32, 32)).eval()
    images = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        features = model.forward_features(images)
        assert features.shape[-1] == model.num_features == model.head_hidden_size
        assert_close(model.forward_head(features, pre_logits=True), features)
        assert_close(model.get_classifier()(features), model(images))
        model.reset_classifier(7)
        assert model(images).shape[-1] == model.num_classes == 7
        model.reset_classifier(0)
        assert_close(model(images), features)


def test_every_weight_learns():
    model = timm.create_model("crnn_dw_s", num_classes=5, img_size=(32, 32), context="conv")
    model(torch.rand(4, 1, 32, 32)).square().sum().backward()
    assert all(np.any(p.grad.numpy()) for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"img_size": 64}, "reads images 32 pixels high and 8 wide at least, not 64×64"),
        ({"img_size": (32, 4)}, "not 32×4: set data.image_size"),
        ({"context": "gru"}, "context is lstm or conv, not 'gru'"),
    ],
)
def test_wrong_sizes_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        CompactCRNN(**settings)


def test_a_kits_model_is_built_by_its_name():
    assert is_model("crnn_dw_s")
    assert not is_model("crnn_dw_xxl")
    model = build(ModelSpec("crnn_dw_s", {"num_classes": 5, "img_size": [32, 64], "in_chans": 1}))
    assert isinstance(model, CompactCRNN)
