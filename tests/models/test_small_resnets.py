"""Small ResNets against their papers' counts, and the same networks in plain tensor operations."""

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry import cost
from smallfry.errors import UsageError
from smallfry.models.small_resnets import SmallResNet

COUNTS = {  # parameters, with running statistics as Keras counts them, multiply-accumulates
    "resnet8_mlperf_tiny": (78_186, 78_666, 12_501_632),
    "resnet20_he": (269_722, 271_098, 40_551_040),
}


@pytest.mark.parametrize("name", COUNTS)
def test_models_have_the_published_numbers_of_parameters_and_operations(name: str) -> None:
    parameters, with_statistics, macs = COUNTS[name]
    model = timm.create_model(name, num_classes=10)
    found = cost(model, torch.zeros(1, 3, 32, 32))
    assert (found.parameters, found.macs) == (parameters, macs)
    statistics = [b for key, b in model.named_buffers() if "running" in key]
    assert parameters + sum(b.numel() for b in statistics) == with_statistics


def perturbed(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.double().eval()


def by_hand(model: SmallResNet, images: Tensor) -> Tensor:
    w = dict(model.state_dict())

    def norm(x: Tensor, name: str) -> Tensor:
        mean, variance, scale, shift = (
            w[f"{name}.{part}"][:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-5).sqrt() * scale + shift

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = w[f"{name}.weight"]
        return F.conv2d(x, weight, w.get(f"{name}.bias"), stride, padding=weight.shape[2] // 2)

    x = norm(conv(images, "conv1"), "bn1").relu()
    for s, stage in enumerate(model.stages):
        for b in range(len(stage)):
            name, stride = f"stages.{s}.{b}", 2 if s and not b else 1
            change = norm(conv(x, f"{name}.conv1", stride), f"{name}.bn1").relu()
            change = norm(conv(change, f"{name}.conv2"), f"{name}.bn2")
            if f"{name}.shortcut.weight" in w:
                x = conv(x, f"{name}.shortcut", stride)
            elif stride == 2:
                old, new = x.shape[1], change.shape[1]
                longer = change.new_zeros(len(x), new, *change.shape[2:])
                longer[:, (new - old) // 2 : (new - old) // 2 + old] = x[:, :, ::2, ::2]
                x = longer
            x = (x + change).relu()
    return x.flatten(2).mean(2) @ w["head.weight"].T + w["head.bias"]


@pytest.mark.parametrize("name", COUNTS)
def test_models_are_what_their_description_says(name: str) -> None:
    model = perturbed(timm.create_model(name, num_classes=5))
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(model(images), by_hand(model, images), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", COUNTS)
def test_features_classifier_and_grey_images(name: str) -> None:
    features = timm.create_model(name, features_only=True)
    maps = features(torch.rand(1, 3, 32, 32))
    assert [f.shape[1:] for f in maps] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert features.feature_info.reduction() == [1, 2, 4]
    model = timm.create_model(name, in_chans=1, num_classes=10).eval()
    images = torch.rand(2, 1, 9, 9)  # an odd side
    assert model(images).shape == (2, 10)
    model.reset_classifier(0)
    assert model(images).shape == (2, 64)
    model.reset_classifier(7)
    assert model.get_classifier().out_features == model(images).shape[1] == 7


def test_checkpointed_gradients_are_the_same() -> None:
    images, gradients = torch.rand(4, 3, 16, 16), []
    for enable in (False, True):
        torch.manual_seed(0)
        model = timm.create_model("resnet8_mlperf_tiny", num_classes=3).train()
        model.set_grad_checkpointing(enable)
        model(images).square().sum().backward()
        gradients.append(model.conv1.weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"widths": ()}, "needs stages of at least one channel"),
        ({"depth": 0}, "one block, got widths"),
        ({"shortcut": "none"}, "must be convolution or zeros, not 'none'"),
        ({"widths": (16, 8)}, "can't remove channels"),
    ],
)
def test_impossible_sizes_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        SmallResNet(**settings)  # type: ignore[arg-type]


def test_convolutions_in_shortcuts_may_remove_channels() -> None:
    model = SmallResNet(widths=(16, 8), depth=1, shortcut="convolution")
    assert model(torch.rand(2, 3, 16, 16)).shape == (2, 10)
