"""Features of classifiers of all kinds, and the pooled outputs of layers, against direct passes."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from smallfry.analysis import features
from smallfry.analysis.features import collect, collect_layers, spread
from smallfry.data import Split
from smallfry.errors import UsageError
from smallfry.training.augment import Normalize
from smallfry.training.run import TrainedModel


class Net(nn.Module):
    """Convolution, tokens, and a classifier; the logits are what ``end`` makes of its outputs."""

    def __init__(self, head=None, end=lambda outputs: outputs):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3) if head is None else head
        self.end = end

    def get_classifier(self):
        return self.head

    def forward(self, images):
        found = self.norm(self.conv(images)).relu()
        tokens = self.mix(self.mix(found.flatten(2).transpose(1, 2)).tanh())
        if isinstance(self.head, nn.Conv2d):
            return self.end(self.head(tokens.mean(1)[:, :, None, None]).flatten(1))
        return self.end(self.head(tokens.mean(1)))


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(features, "BATCH", 4)


@pytest.fixture
def split():
    draw = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (11, 1, 5, 5), generator=draw, dtype=torch.uint8)
    return Split(pixels, torch.arange(11), torch.arange(11) % 3)


def trained_of(model):
    return TrainedModel(model.eval(), ("a", "b", "c"), 5, 1, Normalize([0.4], [0.3]), {})


@pytest.mark.parametrize(
    ("head", "factor", "is_biased"),
    [
        (None, 1.0, True),
        (nn.Linear(6, 3, bias=False), 1.0, False),
        (None, 0.25, True),
        (None, -3.0, True),
        (nn.Conv2d(6, 3, 1), 2.0, True),
    ],
)
def test_logits_are_the_features_times_the_weights_that_were_found(head, factor, is_biased, split):
    trained = trained_of(Net(head, lambda outputs: factor * outputs))
    found = collect(trained, split.images, split.labels)
    assert found.features.dtype == found.weight.dtype == torch.float64
    with torch.no_grad():
        expected = trained.model(trained.normalize(split.images)).double()
    torch.testing.assert_close(found.logits, expected, rtol=1e-5, atol=1e-6)
    product = found.features @ found.weight.T + found.bias
    torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-6)
    weight = trained.model.head.weight.detach().flatten(1).double()
    torch.testing.assert_close(found.weight, factor * weight, rtol=1e-6, atol=1e-7)
    assert bool(found.bias.any()) == is_biased
    assert found.accuracy == float((expected.argmax(1) == split.labels).double().mean())


@pytest.mark.parametrize("is_training", [True, False])
def test_modes_and_statistics_are_left_as_they_were(is_training, split):
    trained = trained_of(Net())
    trained.model.train(is_training)
    trained.model.norm.eval()
    before = {name: each.clone() for name, each in trained.model.state_dict().items()}
    collect(trained, split.images, split.labels)
    collect_layers(trained, split)
    assert trained.model.training is trained.model.mix.training is is_training
    assert not trained.model.norm.training
    assert all(torch.equal(each, before[n]) for n, each in trained.model.state_dict().items())
    assert not any(module._forward_hooks for module in trained.model.modules())


class Unpooled(nn.Module):
    """Fully convolutional: the classifier stands before the means."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(1, 3, 1)

    def get_classifier(self):
        return self.head

    def forward(self, images):
        return self.head(images).mean((2, 3))


class Tokens(Unpooled):
    """The classifier sees each token as an image of its own."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, 3)

    def forward(self, images):
        return self.head(images.flatten(0, 2)).view(len(images), 5, 3).mean(1)


@pytest.mark.parametrize("kind", [Unpooled, Tokens])
def test_a_classifier_of_places_or_tokens_is_refused(kind, split):
    with pytest.raises(UsageError, match="does not take whole images"):
        collect(trained_of(kind()), split.images, split.labels)


@pytest.mark.parametrize("end", [torch.sigmoid, lambda z: z + 1, lambda z: z.roll(1, 1)])
def test_logits_that_are_no_multiple_are_refused(end, split):
    with pytest.raises(UsageError, match="no multiple of its last linear layer's outputs"):
        collect(trained_of(Net(end=end)), split.images, split.labels)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_has_diverged_is_named(value, split):
    model = Net()
    model.head.weight.data[0, 0] = value
    with pytest.raises(UsageError, match="not finite: its training has diverged"):
        collect(trained_of(model), split.images, split.labels)


def test_outputs_that_vanish_are_a_multiple(split):
    model = Net()
    model.head.weight.data.zero_()
    model.head.bias.data.zero_()
    found = collect(trained_of(model), split.images, split.labels)
    assert found.weight.abs().max() == found.logits.abs().max() == 0


# Layers


def test_layers_are_pooled_over_places_or_tokens_and_of_the_last_call(split):
    trained = trained_of(Net())
    found = collect_layers(trained, split)
    assert list(found) == ["conv", "mix", "head"]
    model, images = trained.model, trained.normalize(split.images)
    with torch.no_grad():
        maps = model.norm(model.conv(images)).relu()
        tokens = model.mix(model.mix(maps.flatten(2).transpose(1, 2)).tanh())
        expected = {
            "conv": model.conv(images).mean((2, 3)),
            "mix": tokens.mean(1),
            "head": model(images),
        }
    for name, each in expected.items():
        assert found[name].dtype == torch.float64
        torch.testing.assert_close(found[name], each.double(), rtol=1e-5, atol=1e-6)


def test_layers_without_whole_batches_are_left_out(split):
    assert list(collect_layers(trained_of(Tokens()), split)) == []

    class Sometimes(Net):
        def forward(self, images):
            if len(images) == 4:
                return super().forward(images)
            return self.head(images.flatten(1)[:, :6])

    assert list(collect_layers(trained_of(Sometimes()), split)) == ["head"]


# Some of the images


@pytest.mark.parametrize(("images", "count"), [(10, 4), (3, 3), (2, 5), (1, 1), (7, 1)])
def test_images_are_taken_at_equal_distances(images, count):
    split = Split(torch.zeros(images, 1, 1, 1), torch.arange(images), torch.arange(images))
    taken = spread(split, count).labels.tolist()
    assert len(taken) == min(images, count)
    assert taken[0] == 0
    assert taken == sorted(set(taken))
    gaps = [b - a for a, b in pairwise(taken)]
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert images - taken[-1] <= -(-images // len(taken))


def test_images_in_the_order_of_their_classes_give_every_class():
    labels = torch.repeat_interleave(torch.arange(10), 200)
    split = Split(torch.zeros(2000, 1, 1, 1), torch.arange(2000), labels)
    assert torch.bincount(spread(split, 128).labels).tolist() == pytest.approx([12.8] * 10, abs=1)
