import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from smallfry.errors import UsageError
from smallfry.models import ViTRM
from smallfry.tasks.classification import Classification, ClassTargets
from smallfry.training.build_objective import build_objective
from smallfry.training.config import ObjectiveConfig
from smallfry.training.objective import (
    Batch,
    DeepSupervision,
    Supervised,
    part_of,
)


def with_shares(batch, shares):
    return batch._replace(targets=batch.targets._replace(shares=shares))


def steps(objective, model, batch):
    return objective(objective.prepare(model), batch)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ViTRM(8, 4, 1, 3, embed_dim=16, num_heads=2, mlp_hidden_dim=8, drop_rate=0.0).double()


@pytest.fixture
def batch():
    torch.manual_seed(1)
    labels = torch.tensor([0, 1, 2, 1, 0, 2, 2])
    images = torch.randn(7, 1, 8, 8, dtype=torch.float64)
    return Batch(images, ClassTargets(labels, F.one_hot(labels, 3).double()))


def test_deep_supervision_is_the_loss_of_each_recursion_step(model, batch):
    found_steps = list(
        steps(
            DeepSupervision(Classification(), supervision_steps=3, halt_threshold=2.0), model, batch
        )
    )
    trace = model.recurse(batch.inputs, 3)
    for found, step in zip(found_steps, trace, strict=True):
        right = (step.logits.argmax(1) == batch.targets.labels).double()
        expected = F.cross_entropy(step.logits, batch.targets.labels)
        expected += F.binary_cross_entropy_with_logits(step.halt_logits, right)
        assert_close(found.loss, expected)
        assert_close(found.halting, step.halt_logits.sigmoid())
    assert [step.last for step in found_steps] == [False, False, True]


def test_no_gradient_flows_from_one_supervised_step_into_the_one_before(model, batch):
    first, second = steps(DeepSupervision(Classification(), supervision_steps=2), model, batch)
    second.loss.backward()
    after = model.y_init.grad, model.z_init.grad
    assert after == (None, None)
    first.loss.backward()
    assert model.z_init.grad.abs().sum() > 0


def test_the_halting_target_compares_with_the_unmixed_label(model, batch):
    mixed = with_shares(batch, batch.targets.shares.roll(1, 0))
    plain = next(steps(DeepSupervision(Classification()), model, batch)).loss
    other = next(steps(DeepSupervision(Classification()), model, mixed)).loss
    logits = model(batch.inputs)
    moved = F.cross_entropy(logits, mixed.targets.shares) - F.cross_entropy(
        logits, batch.targets.shares
    )
    assert_close(other - plain, moved)


def test_mixed_targets_give_the_mixture_of_two_losses(model, batch):
    lam, others = 0.3, batch.targets.labels.roll(1)
    targets = lam * batch.targets.shares + (1 - lam) * F.one_hot(others, 3)
    found = next(steps(Supervised(Classification()), model, with_shares(batch, targets))).loss
    logits = model(batch.inputs)
    wanted = lam * F.cross_entropy(logits, batch.targets.labels) + (1 - lam) * F.cross_entropy(
        logits, others
    )
    assert_close(found, wanted)


def test_label_smoothing_is_pytorchs(model, batch):
    found = next(steps(Supervised(Classification(label_smoothing=0.2)), model, batch)).loss
    assert_close(
        found, F.cross_entropy(model(batch.inputs), batch.targets.labels, label_smoothing=0.2)
    )


def test_a_batch_splits_into_parts_that_make_it_up(batch):
    parts = batch.split(3)
    assert [len(part.targets.labels) for part in parts] == [3, 3, 1]
    assert torch.equal(torch.cat([part.inputs for part in parts]), batch.inputs)


def test_auto_takes_deep_supervision_where_the_model_recurs(model):
    assert isinstance(build_objective(ObjectiveConfig(), model), DeepSupervision)
    assert isinstance(build_objective(ObjectiveConfig(), nn.Linear(2, 2)), Supervised)
    assert isinstance(build_objective(ObjectiveConfig("cross_entropy"), model), Supervised)
    with pytest.raises(UsageError, match="needs a recursive model"):
        build_objective(ObjectiveConfig("deep_supervision"), nn.Linear(2, 2))


def test_each_process_takes_its_own_part_of_an_objectives_state():
    states = [{"lowest": 1}, {"lowest": 2}]
    assert part_of(states, 1, 2) == {"lowest": 2}
    with pytest.raises(UsageError, match="that of 2 processes, not 3: start as many"):
        part_of(states, 0, 3)
