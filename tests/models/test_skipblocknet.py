"""SkipblockNet against the authors' implementation."""

import pytest
import timm
import torch
from torch import nn
from zoo_golden import MODELS, assert_summary, images, load, measured, own_tensors, tensors

from smallfry.errors import UsageError
from smallfry.models.skipblocknet import InvertedResidual, SkipblockNet

ENTRY = MODELS["skipblocknet_m"]


def test_parameters_and_multiply_accumulates_are_exact() -> None:
    found = measured("skipblocknet_m", (3, 224, 224))
    assert (found.parameters, found.macs) == (ENTRY["n_params"], ENTRY["macs_one_image"])
    ten = measured("skipblocknet_m", (3, 224, 224), num_classes=10)
    assert ten.parameters == ENTRY["n_params_10_classes"]
    narrow = measured("skipblocknet_m", (3, 224, 224), width=0.75)
    assert narrow.macs < 0.75 * found.macs


def test_output_under_the_authors_names() -> None:
    model = timm.create_model("skipblocknet_m")
    assert sorted(own_tensors(model)) == sorted(tensors(ENTRY))
    load(model, tensors(ENTRY))
    with torch.no_grad():
        assert_summary(model(images(ENTRY["input_shape"])), ENTRY["output"])


@pytest.mark.parametrize("width", [0.25, 0.5, 1.25])
def test_other_widths_and_small_images(width: float) -> None:
    model = SkipblockNet(num_classes=4, width=width, stem_stride=1).eval()
    some = torch.rand(1, 3, 32, 32)
    assert model.forward_features(some).shape[2:] == (2, 2)
    assert model(some).shape == (1, 4)
    assert model(torch.rand(1, 3, 37, 50)).shape == (1, 4)


def test_skip_blocks_carry_early_features() -> None:
    model = SkipblockNet(num_classes=4, width=0.25, stem_stride=1).eval()
    some = torch.rand(1, 3, 32, 32)
    before = model(some)
    for skip in (model.skip1, model.skip2):
        norm = skip.core_block[7]
        assert isinstance(norm, nn.BatchNorm2d)
        nn.init.constant_(norm.bias, 1.0)
        changed = model(some)
        assert not torch.allclose(before, changed)
        before = changed


def test_residuals_are_where_the_shape_is_kept() -> None:
    blocks = timm.create_model("skipblocknet_m").modules()
    found = [int(m.residual) for m in blocks if isinstance(m, InvertedResidual)]
    assert found == [1, 0, 1, 0, 1, 1, 0, 1, 1, 1, 0, 1, 0, 1, 1]


def test_timms_contract() -> None:
    model = SkipblockNet(num_classes=4, width=0.25).eval()
    some = torch.rand(2, 3, 64, 64)
    hidden = model.forward_head(model.forward_features(some), pre_logits=True)
    assert hidden.shape == (2, 1280)
    torch.testing.assert_close(model.get_classifier()(hidden), model(some))
    model.double().reset_classifier(7)
    assert model(some.double()).shape == (2, 7)
    model.reset_classifier(0)
    assert model(some.double()).shape == (2, 1280)
    net = timm.create_model("skipblocknet_m", features_only=True)
    maps = net(torch.rand(1, 3, 64, 64))
    assert [m.shape[2] for m in maps] == [64 // r for r in net.feature_info.reduction()]
    assert [m.shape[1] for m in maps] == [40, 80, 112, 160]
    groups = timm.optim.param_groups_layer_decay(SkipblockNet(width=0.25), layer_decay=0.5)
    assert len({g["lr_scale"] for g in groups}) == 16
    for wrong in ({"width": 0}, {"stem_stride": 4}):
        with pytest.raises(UsageError, match="width is positive and stem_stride 1 or 2"):
            SkipblockNet(**wrong)


def test_recomputed_groups_give_the_same_gradients() -> None:
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = SkipblockNet(num_classes=3, width=0.25, drop_rate=0.0).double()
        model.set_grad_checkpointing(recompute)
        some = torch.linspace(0, 1, 2 * 3 * 32 * 32, dtype=torch.float64).view(2, 3, 32, 32)
        model(some).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*found)
