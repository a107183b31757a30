"""A disguise has the outputs of its network, or is refused: no third."""

import operator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from smallfry.analysis.disguise import Disguised, Schedule, disguise, plan_schedule
from smallfry.errors import UsageError


class Net(nn.Module):
    """Two convolutions with norms, joined by ``body``, and a classifier of means."""

    def __init__(self, body, pool=None, width=6, **of_convolutions):
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1, **of_convolutions)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.third = nn.Conv2d(width, width, 1)
        self.norm, self.other = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.relu, self.drop = nn.ReLU(), nn.Dropout(0.5)
        self.pool = nn.AdaptiveAvgPool2d(1) if pool is None else pool
        self.head, self.end = nn.Linear(width, 4), nn.Linear(4, 4)
        self.body = body

    def forward(self, images):
        return self.body(self, images)


def classified(network, features):
    return network.head(network.pool(features).flatten(1))


def ready(network, seed=0):
    """The network in float64, with weights and statistics that hide nothing."""
    draw = torch.Generator().manual_seed(seed)
    for each in network.parameters():
        each.data.normal_(0, 0.5, generator=draw)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_var is not None:
            module.running_mean.normal_(0, 0.5, generator=draw)
            module.running_var.uniform_(0.5, 2, generator=draw)
    return network.double().eval()


def check(network, side=7):
    network = ready(network)
    hidden = disguise(network, plan_schedule([network]))
    assert isinstance(hidden, Disguised)
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, side, side, generator=draw, dtype=torch.float64)
    expected = network(images).detach()
    assert float(expected.std()) > 1e-3
    torch.testing.assert_close(hidden(images), expected, atol=1e-12, rtol=1e-12)


def plain(n, x):
    return classified(n, n.relu(n.norm(n.first(x))))


def residual(n, x):
    x = n.relu(n.norm(n.first(x)))
    return classified(n, F.relu(x + n.other(n.second(x))))


def swapped(n, x):
    x = n.first(x)
    return classified(n, F.relu6(operator.iadd(n.second(x), x)))


def projected(n, x):
    x = n.relu(n.first(x))
    main = n.norm(n.second(x))
    return classified(n, n.relu(torch.add(main, n.other(n.third(x)))))


def dropped(n, x):
    return n.drop(classified(n, n.drop(F.relu(n.first(x)))))


def dense(n, x):
    first = n.relu(n.first(x))
    second = n.relu(n.second(first))
    return classified(n, n.third(second) + first)


def ended_by_a_sum(n, x):
    x = n.first(x)
    return n.head((n.second(n.relu(n.third(x))) + x).mean([2, 3]))


@pytest.mark.parametrize(
    "body", [plain, residual, swapped, projected, dropped, dense, ended_by_a_sum]
)
def test_networks_of_many_shapes_keep_their_outputs(body):
    check(Net(body))


@pytest.mark.parametrize(
    "pool",
    [
        nn.AdaptiveAvgPool2d((1, 1)),
        lambda x: x.mean((2, 3)),
        lambda x: x.mean(dim=(-1, -2), keepdim=True),
        lambda x: F.adaptive_avg_pool2d(x, 1),
        lambda x: F.adaptive_avg_pool2d(x, output_size=(1, 1)),
        lambda x: torch.mean(x, (3, 2)),
    ],
)
def test_means_over_all_places_are_seen_however_they_are_written(pool):
    check(Net(plain, pool))


@pytest.mark.parametrize("changes", [{"bias": False}, {"stride": 2}, {"groups": 3}])
@pytest.mark.parametrize("affine", [True, False])
def test_convolutions_and_norms_without_parameters_keep_their_outputs(changes, affine):
    network = Net(plain, **changes)
    network.norm = nn.BatchNorm2d(6, affine=affine, eps=0.1)
    check(network)


def test_a_classifier_without_bias_has_none():
    network = Net(plain)
    network.head = nn.Linear(6, 4, bias=False)
    check(network)


def test_more_units_and_channels_than_needed_change_nothing():
    network = ready(Net(residual))
    images = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    for schedule in (Schedule((2,), (16,)), Schedule((5,), (16,)), Schedule((2,), (40,))):
        hidden = disguise(network, schedule)
        assert len(hidden.units) == schedule.units[0]
        torch.testing.assert_close(hidden(images), network(images), atol=1e-12, rtol=1e-12)


# What would be another function


def norm_behind_activation(n, x):
    return classified(n, n.norm(n.relu(n.first(x))))


def norm_behind_sum(n, x):
    x = n.first(x)
    return classified(n, n.norm(n.second(x) + x))


def sum_behind_activation(n, x):
    x = n.first(x)
    return classified(n, n.relu(n.second(x)) + x)


def shortcut_before_activation(n, x):
    x = n.first(x)
    return classified(n, n.second(n.relu(x)) + x)


def shortcut_before_norm(n, x):
    x = n.first(x)
    return classified(n, n.second(n.norm(x)) + n.drop(x))


def shortcut_before_sum(n, x):
    x = n.first(x)
    inner = n.second(x)
    return classified(n, n.third(inner + x) + inner)


def scaled_sum(n, x):
    x = n.first(x)
    return classified(n, torch.add(n.second(x), x, alpha=2))


def twice(n, x):
    x = n.first(x)
    return classified(n, x + x)


def shifted(n, x):
    return classified(n, n.first(x) + 1.0)


@pytest.mark.parametrize(
    "body",
    [
        norm_behind_activation,
        norm_behind_sum,
        sum_behind_activation,
        shortcut_before_activation,
        shortcut_before_norm,
        shortcut_before_sum,
        scaled_sum,
        twice,
        shifted,
    ],
)
def test_orders_that_a_unit_does_not_have_are_refused(body):
    with pytest.raises(UsageError, match=r"can('t)? be disguised"):
        plan_schedule([ready(Net(body))])


def activation_of_images(n, x):
    return classified(n, n.first(n.relu(x)))


def sum_of_images(n, x):
    return classified(n, n.first(x + x.flip(2)))


def norm_of_images(n, x):
    return classified(n, n.norm(torch.cat([x, x], 1)))


def activation_of_means(n, x):
    return n.head(n.relu(n.pool(n.first(x))).flatten(1))


def convolution_of_means(n, x):
    return n.head(n.third(n.pool(n.first(x))).flatten(1))


def norm_of_means(n, x):
    return n.head(n.norm(n.pool(n.first(x))).flatten(1))


def sum_of_means(n, x):
    x = n.first(x)
    return n.head((n.pool(x) + n.pool(n.second(x))).flatten(1))


def two_classifiers(n, x):
    return n.end(classified(n, n.first(x)))


def classifier_of_places(n, x):
    return n.head(n.first(x).flatten(2).transpose(1, 2)).mean(1)


def softmax(n, x):
    return classified(n, n.first(x)).softmax(1)


def features_beside(n, x):
    x = n.first(x)
    return classified(n, x), x


@pytest.mark.parametrize(
    "body",
    [
        activation_of_images,
        sum_of_images,
        norm_of_images,
        activation_of_means,
        convolution_of_means,
        norm_of_means,
        sum_of_means,
        two_classifiers,
        classifier_of_places,
        softmax,
        features_beside,
    ],
)
def test_operators_before_and_behind_the_units_are_refused(body):
    with pytest.raises(UsageError, match=r"can('t)? be disguised"):
        plan_schedule([ready(Net(body))])


@pytest.mark.parametrize(
    "pool",
    [
        nn.AdaptiveAvgPool2d(2),
        nn.AdaptiveAvgPool2d((None, 1)),
        lambda x: x.mean(3),
        lambda x: x.mean((1, 2, 3)),
        lambda x: x.mean(),
        lambda x: F.adaptive_avg_pool2d(x, 3),
        nn.AvgPool2d(7),
    ],
)
def test_other_means_are_refused(pool):
    with pytest.raises(UsageError, match="can't be disguised here"):
        plan_schedule([ready(Net(plain, pool))])


class Standardized(nn.Conv2d):
    def forward(self, images):
        weight = (self.weight - self.weight.mean()) / self.weight.std()
        return F.conv2d(images, weight, self.bias, padding=1)


def test_convolutions_of_other_borders_and_weights_are_refused():
    for mode in ("reflect", "circular", "replicate"):
        with pytest.raises(UsageError, match="plain convolutions with zeros around"):
            plan_schedule([ready(Net(plain, padding_mode=mode))])
    network = Net(plain)
    network.first = Standardized(3, 6, 3, padding=1)
    with pytest.raises(UsageError, match="plain convolutions with zeros around"):
        plan_schedule([ready(network)])


def test_a_norm_without_means_of_training_is_refused():
    network = Net(plain)
    network.norm = nn.BatchNorm2d(6, track_running_stats=False)
    with pytest.raises(UsageError, match="with means of training"):
        plan_schedule([ready(network)])
