"""Disguised networks: equal outputs, and one trace for all."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from smallfry.analysis.disguise import Schedule, disguise, plan_schedule
from smallfry.analysis.traces import trace_model
from smallfry.errors import UsageError


def layer(inputs, outputs, size=3, stride=1, groups=1, act=nn.ReLU6):
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=groups > 1)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), act())


class Inverted(nn.Module):
    def __init__(self, width, wide, outputs, stride=1):
        super().__init__()
        self.layers = nn.Sequential(
            layer(width, wide, 1),
            layer(wide, wide, 3, stride, wide),
            layer(wide, outputs, 1, act=nn.Identity),
        )
        self.adds = stride == 1 and width == outputs

    def forward(self, features):
        changed = self.layers(features)
        return features + changed if self.adds else changed


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.second = layer(width, width, act=nn.ReLU), nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, features):
        return F.relu(self.second(self.first(features)) + features)


def ended(*layers, width):
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))


def random(model, seed=0):
    """A network in float64 whose norms have statistics of their own."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return model.double().eval()


def separable():
    middle = (layer(8, 8, 3, 1, 8), layer(8, 16, 1), layer(16, 16, 3, 2, 16), layer(16, 24, 1))
    return ended(layer(3, 8, 3, 2), *middle, width=24)


def inverted():
    blocks = (Inverted(8, 16, 8), Inverted(8, 16, 12, 2), Inverted(12, 24, 12))
    return ended(layer(3, 8, 3, 2), *blocks, width=12)


def residual():
    return ended(layer(3, 8, 3, 2), layer(8, 12, 3, 2, act=nn.Identity), Residual(12), width=12)


KINDS = {"separable": separable, "inverted": inverted, "residual": residual}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [16, 17])
def test_outputs_are_equal(kind, side):
    model = random(KINDS[kind]())
    images = torch.randn(2, 3, side, side, dtype=torch.float64)
    hidden = disguise(model, plan_schedule([model]))
    torch.testing.assert_close(hidden(images), model(images), atol=1e-13, rtol=1e-13)


def test_networks_of_one_schedule_have_one_trace_and_their_own_outputs():
    models = [random(build(), seed) for seed, build in enumerate(KINDS.values())]
    schedule = plan_schedule(models)
    assert schedule == Schedule((5, 5), (24, 40))
    hidden = [disguise(model, schedule) for model in models]
    traces = [trace_model(model, (3, 16, 16)) for model in hidden]
    assert traces[0] == traces[1] == traces[2]
    assert len({tuple(trace_model(model, (3, 16, 16))) for model in models}) == 3
    images = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    for model, secret in zip(models, hidden, strict=True):
        torch.testing.assert_close(secret(images), model(images), atol=1e-13, rtol=1e-13)


def test_images_of_more_channels_than_any_layer_are_disguised():
    model = random(ended(layer(12, 4), layer(4, 4, 3, 2), width=4))
    images = torch.randn(2, 12, 8, 8, dtype=torch.float64)
    schedule = plan_schedule([model])
    assert schedule.channels == (16, 8)
    found = disguise(model, schedule)(images)
    torch.testing.assert_close(found, model(images), atol=1e-13, rtol=1e-13)
    with pytest.raises(UsageError, match="larger than its schedule"):
        disguise(model, plan_schedule([random(ended(layer(3, 8), layer(8, 8, 3, 2), width=8))]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenetv1_100", "mobilenetv2_035"])
def test_networks_of_timm_are_disguised(name):
    model = random(timm.create_model(name, num_classes=4))
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    hidden = disguise(model, plan_schedule([model]))
    torch.testing.assert_close(hidden(images), model(images), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([nn.Conv2d(3, 8, 5, padding=2)], "1×1 and 3×3 with same padding"),
        ([nn.Conv2d(3, 8, 3)], "1×1 and 3×3 with same padding"),
        ([nn.Conv2d(3, 8, 3, 3, 1)], "stride 1 or 2"),
        ([layer(3, 8), nn.MaxPool2d(2)], "can't be disguised"),
        ([layer(3, 8, act=nn.GELU)], "can't be disguised"),
        ([layer(3, 8), nn.ReLU()], "an activation behind a convolution"),
    ],
)
def test_what_can_not_be_rewritten_is_refused(layers, message):
    with pytest.raises(UsageError, match=message):
        plan_schedule([ended(*layers, width=8)])


def test_a_network_without_a_classifier_is_refused():
    with pytest.raises(UsageError, match="linear classifier of means"):
        plan_schedule([layer(3, 8)])


def test_a_value_kept_across_a_change_of_resolution_is_refused():
    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = layer(3, 3, act=nn.Identity), layer(3, 3, 3, 2, act=nn.Identity)
            self.head = nn.Linear(3, 2)

        def forward(self, images):
            first = self.a(images)
            return self.head((self.b(first) + first).mean((2, 3)))

    with pytest.raises(UsageError, match="kept across a change of resolution"):
        plan_schedule([Kept()])


def test_schedules_that_do_not_fit_are_refused():
    small, large = random(residual()), random(inverted())
    with pytest.raises(UsageError, match="larger than its schedule"):
        disguise(large, plan_schedule([small]))
    with pytest.raises(UsageError, match="has 2 stages, the schedule 1"):
        disguise(small, Schedule((9,), (64,)))
    with pytest.raises(UsageError, match="as many stages each, not 2, 1"):
        plan_schedule([small, ended(layer(3, 8), width=8)])
