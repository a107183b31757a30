"""Groups of channels from a traced graph: what is converted, skipped and given up."""

import sys
import threading
import time
import warnings

import pytest
import torch
from torch import nn

from smallfry.errors import SmallfryWarning
from smallfry.transforms import traced
from smallfry.transforms.groups import Slice
from smallfry.transforms.traced import traced_groups

pytest.importorskip("torch_pruning", reason="groups of convolutions are found by Torch-Pruning")

EXAMPLE = torch.zeros(2, 3, 8, 8)


def net(**given):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, **given), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding=1), nn.Flatten(), nn.Linear(6 * 64, 5),
    )  # fmt: skip


def shapes(group):
    return {(each.tensor, each.dim): tuple(each.entries.shape) for each in group.cut}


def test_a_convolution_is_cut_with_its_norm_and_the_next_ones_inputs():
    second, first = sorted(traced_groups(net(), EXAMPLE, skip={"5"}), key=lambda g: -g.channels)
    assert (first.name, first.channels) == ("0", 4)
    assert shapes(first) == {
        ("0.weight", 0): (4, 1), ("0.bias", 0): (4, 1), ("1.weight", 0): (4, 1),
        ("1.bias", 0): (4, 1), ("1.running_mean", 0): (4, 1), ("1.running_var", 0): (4, 1),
        ("3.weight", 1): (4, 1),
    }  # fmt: skip
    zeroed = {each.tensor for each in first.zeroed}
    assert zeroed == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert (second.name, second.channels) == ("3", 6)
    # a flattened channel is 64 inputs of the linear layer, one after the other
    entries = {each.tensor: each.entries for each in second.cut}["5.weight"]
    assert entries.tolist() == torch.arange(6 * 64).view(6, 64).tolist()


def test_skipped_layers_have_no_group_of_their_own():
    found = traced_groups(net(), EXAMPLE, skip={"0", "5"})
    assert [group.name for group in found] == ["3"]
    assert traced_groups(net(), EXAMPLE, skip={"0", "3", "5"}) == []


def test_the_classifier_is_left_whole():
    class Classifier(nn.Sequential):
        def get_classifier(self):
            return self[5]

    model = Classifier(*net())
    assert "5" not in {group.name for group in traced_groups(model, EXAMPLE)}
    assert "5" in {group.name for group in traced_groups(net(), EXAMPLE)}


def test_the_model_is_left_as_it_is():
    model = net()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    traced_groups(model, EXAMPLE)
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_depthwise_convolution_goes_with_its_channels():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4, padding=1), nn.Conv2d(4, 2, 1)
    )
    (first,) = (group for group in traced_groups(model, EXAMPLE) if group.channels == 4)
    assert ("1.weight", 0) in shapes(first)
    assert ("1.weight", 1) not in shapes(first)


def test_grouped_convolutions_are_left_alone():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=2, padding=1), nn.Conv2d(4, 2, 1)
    )
    assert all("1.weight" not in {each.tensor for each in group.cut}
               for group in traced_groups(model, EXAMPLE))  # fmt: skip


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.layer(self.layer(x))


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return x


@pytest.mark.parametrize("kind", [Twice, Unused, nn.Identity, nn.ReLU])
def test_what_a_graph_can_not_follow_has_no_groups(kind, recwarn):
    assert traced_groups(kind(), EXAMPLE) == []
    assert not [each for each in recwarn if issubclass(each.category, SmallfryWarning)]


def test_calls_are_counted_with_hooks_removed_even_after_an_error():
    model = Twice().train()
    assert traced._calls(model, EXAMPLE)["layer"] == 2
    with pytest.raises(RuntimeError):
        traced._calls(model, torch.zeros(2, 5, 8, 8))
    assert not model.layer._forward_pre_hooks
    assert model.training


def test_without_the_library_convolutions_are_announced(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.warns(SmallfryWarning, match=r"needs Torch-Pruning: pip install .smallfry\[compre"):
        assert traced_groups(net(), EXAMPLE) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert traced_groups(nn.Sequential(nn.Linear(8, 8)), EXAMPLE) == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [(ValueError("first\nsecond"), r"\(first\)"), (KeyError(), r"\(KeyError\)")],
)
def test_a_graph_that_fails_is_given_up_with_its_reason(monkeypatch, error, reason):
    def fail(*_):
        raise error

    monkeypatch.setattr(traced, "_groups", fail)
    with pytest.warns(SmallfryWarning, match=f"no groups of Sequential {reason}"):
        assert traced_groups(net(), EXAMPLE) == []


def test_work_has_a_limit_of_time_and_its_thread_ends():
    begun = threading.active_count()

    def forever():
        while True:
            time.sleep(0.001)

    with pytest.raises(TimeoutError):
        traced._within(0.01, forever)
    assert threading.active_count() == begun
    assert traced._within(5.0, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        traced._within(5.0, lambda: 1 / 0)


@pytest.mark.parametrize(
    ("positions", "roots", "wanted"),
    [
        ([0, 1, 2], [0, 1, 2], [[0], [1], [2]]),
        ([4, 5, 0, 1, 2, 3], [2, 2, 0, 0, 1, 1], [[0, 1], [2, 3], [4, 5]]),
        ([0, 1, 2, 3], [0, 0, 1, 2], None),  # uneven
        ([0, 1], [0, 3], None),  # of another channel than there is
        ([], [], None),
    ],
)
def test_positions_are_by_channel_or_none(positions, roots, wanted):
    found = traced._entries(positions, roots, 3)
    assert (found if found is None else found.tolist()) == wanted


def test_slices_are_kept_once():
    one, same = (Slice("a", 0, torch.tensor([[0], [1]])) for _ in range(2))
    others = [Slice("a", 1, one.entries), Slice("b", 0, one.entries),
              Slice("a", 0, torch.tensor([[1], [0]]))]  # fmt: skip
    assert len(traced._merged([one, same, *others, one])) == 4


@pytest.mark.parametrize(
    ("layer", "known"),
    [
        (nn.Linear(2, 2), True),
        (nn.Conv2d(4, 4, 1), True),
        (nn.Conv2d(4, 4, 1, groups=4), True),
        (nn.Conv2d(4, 4, 1, groups=2), False),
        (nn.BatchNorm2d(4), True),
        (nn.LayerNorm(4), False),
        (nn.Embedding(4, 4), False),
        (nn.LSTM(4, 4), False),
    ],
)
def test_only_layers_whose_shape_follows_from_the_weight_are_known(layer, known):
    assert traced._is_known(layer, is_out=True) == known
    assert traced._is_known(layer, is_out=False) == (known or isinstance(layer, nn.RNNBase))
