"""Bias loss against its authors' implementation, and in training."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from smallfry.errors import UsageError
from smallfry.models import LoopNet, ViTRM
from smallfry.tasks import Batch
from smallfry.tasks.classification import Classification, ClassTargets
from smallfry.training.bias_loss import (
    BiasLoss,
    RunningBiasLoss,
    feature_variances,
    sample_weights,
)
from smallfry.training.build_objective import build_objective
from smallfry.training.config import ObjectiveConfig
from smallfry.training.objective import Stateful

sys.path.append(str(Path(__file__).parents[1] / "models"))
from zoo_golden import GOLDEN, images

ENTRY = GOLDEN["losses"]["bias_loss"]
LABELS = torch.tensor([0, 1, 2, 3, 4, 0])


class Fixed(nn.Module):
    """A model with given features and logits."""

    def __init__(self, features: torch.Tensor, logits: torch.Tensor) -> None:
        super().__init__()
        self.features, self.logits = features, logits

    def forward_features(self, _: torch.Tensor) -> torch.Tensor:
        return self.features

    def forward_head(self, _: torch.Tensor) -> torch.Tensor:
        return self.logits


def batch_of(inputs: torch.Tensor, shares: torch.Tensor) -> Batch:
    return Batch(inputs, ClassTargets(LABELS[: len(inputs)], shares))


def near(wanted: object) -> object:
    return pytest.approx(wanted, rel=2e-9, abs=1e-10)


@pytest.mark.parametrize(("mode", "kind"), [("local", BiasLoss), ("global", RunningBiasLoss)])
def test_two_steps(mode: str, kind: type[BiasLoss]) -> None:
    objective = kind(Classification())
    ramp = torch.linspace(0.5, 2, 6, dtype=torch.float64)[:, None, None, None]
    for t, wanted in enumerate(ENTRY[mode]):
        features = images((6, 4, 2, 2), f"features{t}") * ramp * (1 + 0.5 * t)
        logits = images((6, 5), f"logits{t}").requires_grad_()
        assert feature_variances(features).tolist() == near(wanted["variance"])
        model = Fixed(features, logits)
        batch = batch_of(features, F.one_hot(LABELS, 5).double())
        (step,) = objective(objective.prepare(model), batch)
        assert step.loss.item() == near(wanted["loss"])
        step.loss.backward()
        assert logits.grad is not None
        assert logits.grad.norm().item() == near(wanted["grad_logits_l2"])
        assert logits.grad[0].tolist() == near(wanted["grad_logits_row0"])
        assert objective.weights(features).tolist() == near(wanted["weights"])
        assert torch.equal(step.outputs, logits.detach())


def test_weights_are_between_their_bounds() -> None:
    found = sample_weights(torch.tensor([1.0, 2.0, 3.0]))
    assert found[0].item() == pytest.approx(0.7)
    assert found[2].item() == pytest.approx(torch.tensor(0.3).exp().item() - 0.3)
    torch.testing.assert_close(found[1], torch.tensor(0.15).exp() - 0.3)


@pytest.mark.parametrize("count", [1, 3])
def test_equal_samples_weigh_alike(count: int) -> None:
    for objective in (BiasLoss(Classification()), RunningBiasLoss(Classification())):
        objective.weights(torch.rand(5, 8) / 10)
        weights = objective.weights(torch.arange(8.0).expand(count, 8))
        assert weights.tolist() == pytest.approx([0.7] * count)


def test_half_precision_is_computed_in_single() -> None:
    features = torch.full((2, 1000), 300.0, dtype=torch.float16)
    features[1, ::2] = -300  # their squares overflow
    found = feature_variances(features)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([0, 300**2], rel=0.01)


def test_mixed_labels_are_soft_targets_and_weights_carry_no_gradient() -> None:
    torch.manual_seed(0)
    net = LoopNet(widths=(4, 6), depths=(1, 1), loops=(1, 1), num_classes=5)
    inputs, shares = torch.rand(6, 3, 16, 16), torch.rand(6, 5).softmax(1)
    objective = BiasLoss(Classification(0.1))
    (step,) = objective(objective.prepare(net), batch_of(inputs, shares))
    features = net.forward_features(inputs)
    weights = sample_weights(feature_variances(features))
    losses = F.cross_entropy(net(inputs), shares, reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(step.loss, (weights * losses).mean())
    wanted = torch.autograd.grad((weights.detach() * losses).mean(), list(net.parameters())[2:])
    found = torch.autograd.grad(step.loss, list(net.parameters())[2:])
    torch.testing.assert_close(found, wanted)


def test_tokens_are_features_too() -> None:
    features = torch.rand(4, 17, 8)
    torch.testing.assert_close(feature_variances(features), features.flatten(1).var(1))


def test_configuration() -> None:
    net = LoopNet(widths=(4,), depths=(1,), loops=(1,))
    settings = {"name": "bias", "alpha": 0.2, "beta": 0.1}
    plain = build_objective(ObjectiveConfig(**settings), net)
    assert type(plain) is BiasLoss
    assert (plain.alpha, plain.beta) == (0.2, 0.1)
    assert not isinstance(plain, Stateful)
    running = build_objective(ObjectiveConfig(**settings, normalization="running"), net)
    assert isinstance(running, RunningBiasLoss)
    assert isinstance(running, Stateful)
    with pytest.raises(UsageError, match="beta 0 to below 1"):
        ObjectiveConfig(name="bias", beta=1.0)
    for wrong in (nn.Linear(2, 2), ViTRM(8, 4, 1, 3, embed_dim=8, num_heads=2, mlp_hidden_dim=8)):
        with pytest.raises(UsageError, match="needs a model with forward_features"):
            plain.prepare(wrong)


def test_the_running_minimum_is_kept_by_its_state() -> None:
    first, second = RunningBiasLoss(Classification()), RunningBiasLoss(Classification())
    first.weights(torch.rand(3, 5))
    some = torch.rand(4, 5) + torch.rand(4, 5)
    second.load_state_dict(first.state_dict(), batch_of(some, some))
    assert torch.equal(first.weights(some), second.weights(some))
