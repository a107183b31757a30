"""Joint supervision of every recursion step."""

import pytest
import torch
from torch.nn import functional as F

from smallfry.errors import UsageError
from smallfry.models import ViTRM
from smallfry.models.loopnet_anytime import AnytimeLoopNet
from smallfry.optim import KFAC
from smallfry.tasks import Batch
from smallfry.tasks.classification import Classification, ClassTargets
from smallfry.training.build_objective import build_objective
from smallfry.training.every_step import EveryStep
from smallfry.training.objective_config import ObjectiveConfig


def batch_of(count, classes, size=8, channels=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, channels, size, size, generator=generator, dtype=dtype)
    labels = torch.randint(classes, (count,), generator=generator)
    return Batch(images, ClassTargets(labels, F.one_hot(labels, classes).to(dtype)))


def test_the_loss_is_the_weighted_mean_over_steps():
    torch.manual_seed(0)
    model = AnytimeLoopNet(8, 3, (4,), (1,), in_chans=1, num_classes=3).double().eval()
    batch = batch_of(5, 3)
    objective = EveryStep(Classification(), 3, last_weight=2.0)
    assert objective.weights == [0.25, 0.25, 0.5]
    (step,) = objective(objective.prepare(model), batch)
    total = 0.0
    for weight, each in zip(objective.weights, model.recurse(batch.inputs), strict=True):
        right = (each.logits.argmax(1) == batch.targets.labels).double()
        halting = F.binary_cross_entropy_with_logits(each.halt_logits, right)
        total += weight * (F.cross_entropy(each.logits, batch.targets.labels) + halting)
    torch.testing.assert_close(step.loss, total, rtol=0, atol=1e-12)
    assert step.last
    assert step.halting.shape == (5,)


def test_the_gradient_reaches_the_first_step_through_the_last():
    torch.manual_seed(0)
    model = AnytimeLoopNet(8, 2, (4,), (1,), in_chans=1, num_classes=3).double().eval()
    batch = batch_of(5, 3)
    only_last = EveryStep(Classification(), 2, last_weight=1e9)
    (step,) = only_last(only_last.prepare(model), batch)
    step.loss.backward()
    found = model.stages[-1].layers[0].conv.weight.grad.clone()
    model.zero_grad()
    last = model.recurse(batch.inputs)[-1]
    right = (last.logits.argmax(1) == batch.targets.labels).double()
    halting = F.binary_cross_entropy_with_logits(last.halt_logits, right)
    (F.cross_entropy(last.logits, batch.targets.labels) + halting).backward()
    wanted = model.stages[-1].layers[0].conv.weight.grad
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


def test_natural_gradient_takes_its_likelihood():
    torch.manual_seed(0)
    model = ViTRM(
        img_size=8,
        patch_size=4,
        in_chans=1,
        num_classes=3,
        embed_dim=16,
        mlp_hidden_dim=24,
        num_heads=2,
        latents=4,
        recursion_steps=2,
    ).double()
    batch = batch_of(8, 3)
    objective = EveryStep(Classification(), 2)
    prepared = objective.prepare(model)
    optimizer = KFAC(model, lr=0.1, likelihood=objective.likelihood, forward=prepared)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        (step,) = objective(prepared, batch)
        step.loss.backward()
        optimizer.step()
        losses.append(step.loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_wrong_settings_are_refused():
    with pytest.raises(UsageError, match="last_weight"):
        ObjectiveConfig(name="every_step", last_weight=0.0).settings("every_step")
    plain = torch.nn.Linear(2, 2)
    with pytest.raises(UsageError, match="recursive"):
        build_objective(ObjectiveConfig(name="every_step"), plain)
