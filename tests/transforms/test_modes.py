"""Evaluation for a while leaves the mode of every module as it was."""

import pytest
import torch
from torch import nn

from smallfry import compress
from smallfry.compress.sparse.report import sparsity_report
from smallfry.data import Split
from smallfry.training.attack import PGD, accuracy_under_attack
from smallfry.training.augment import Normalize
from smallfry.training.batch_norm import require_enough_images
from smallfry.training.evaluation import predict
from smallfry.transforms.find import find_groups
from smallfry.transforms.modes import evaluating
from smallfry.transforms.traced import traced_groups


class Frozen(nn.Sequential):
    """Network in training whose batch norm is frozen."""

    num_classes = 3

    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(),
            nn.Linear(144, 3),
        )  # fmt: skip
        self.train()
        self[1].eval()


def modes(model):
    return [module.training for module in model.modules()]


def split(count=5):
    labels = torch.arange(count) % 3
    return Split(torch.zeros(count, 1, 8, 8, dtype=torch.uint8), labels, torch.arange(count))


USES = {
    "predict": lambda net: predict(net, split(), Normalize((0.5,), (0.5,)), batch_size=2),
    "find_groups": lambda net: find_groups(net, torch.randn(2, 1, 8, 8)),
    "traced_groups": lambda net: traced_groups(net, torch.randn(2, 1, 8, 8)),
    "sparsity report": lambda net: sparsity_report(net, torch.randn(2, 1, 8, 8)),
    "attack": lambda net: accuracy_under_attack(
        net, split(3), Normalize((0.5,), (0.5,)), PGD(0.1, steps=1)
    ),
    "batch norm": lambda net: require_enough_images(net, torch.zeros(1, 1, 8, 8), 4, 1, 1, False),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.filterwarnings("ignore::smallfry.errors.SmallfryWarning")
def test_a_frozen_norm_stays_frozen(use):
    net = Frozen()
    before, state = modes(net), {k: v.clone() for k, v in net.state_dict().items()}
    assert before.count(False) == 1
    USES[use](net)
    assert modes(net) == before
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_everything_evaluates_inside():
    net = Frozen()
    with evaluating(net):
        assert not any(modes(net))
    assert net.training


def test_modes_come_back_after_an_error():
    net = Frozen()
    before = modes(net)
    with pytest.raises(ZeroDivisionError), evaluating(net):
        raise ZeroDivisionError
    assert modes(net) == before


def test_a_model_that_evaluates_is_left_evaluating():
    net = Frozen().eval()
    with evaluating(net):
        pass
    assert not any(modes(net))


@pytest.mark.parametrize(
    "method", [compress.LSQ(), compress.LowRank(smallest=1), compress.Quantize(weights=8)]
)
def test_methods_leave_a_frozen_norm_frozen(method):
    net, images = Frozen(), torch.randn(4, 1, 8, 8)
    session = compress.Session(net, [method], images, steps=1, batches=[images])
    assert not net[1].training
    session.finish()
    assert net.training
    assert not net[1].training
    assert net[5].training
