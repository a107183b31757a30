"""From construction to the last checkpoint: what a training program does around the steps."""

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import functional as F

from smallfry.errors import SmallfryWarning, UsageError
from smallfry.optim import EKFAC, KFAC, KPSVD, ExactNG

X, Y = torch.randn(16, 4, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3


def net():
    torch.manual_seed(1)
    body = [nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh()]
    return nn.Sequential(*body, nn.Linear(5, 3))


def step(model, optimizer, x=X, y=Y):
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", [KFAC, ExactNG])
def test_parameters_instead_of_the_model_are_answered_with_the_line_to_write(kind):
    line = rf"model itself: pass it, not generator.*{kind.__name__}\(model, lr=…\).*params=groups"
    with pytest.raises(UsageError, match=line):
        kind(net().parameters(), lr=0.1)
    with pytest.raises(UsageError, match="not list"):
        kind([{"params": list(net().parameters())}], lr=0.1)


@pytest.mark.parametrize("frozen", [["0.weight"], ["0.weight", "0.bias"], ["5.weight", "5.bias"]])
@pytest.mark.parametrize("kind", [KFAC, EKFAC, KPSVD, ExactNG])
def test_a_layer_can_be_frozen_while_training(kind, frozen):
    model = net()
    optimizer = kind(model, lr=0.1, statistics_every=1)
    step(model, optimizer)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    before = weights(model)
    for _ in range(2):
        step(model, optimizer)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name in frozen), name
    for name in frozen:
        model.get_parameter(name).requires_grad_(True)
    step(model, optimizer)
    assert all(not torch.equal(model.get_parameter(n), before[n]) for n in frozen)
    assert optimizer.counters["statistics"] == 4


@pytest.mark.parametrize("kind", [KFAC, EKFAC, KPSVD, ExactNG])
def test_layers_unfrozen_one_by_one_are_trained_by_their_curvature(kind):
    model = net()
    model.requires_grad_(False)
    model[5].requires_grad_(True)
    optimizer = kind(model, lr=0.1, statistics_every=3, burn_in=0)
    step(model, optimizer)
    kept = optimizer.curvature["5.weight"]
    for index, name in ((3, "3.weight"), (1, None), (0, "0.weight")):
        layer = model[index]
        layer.requires_grad_(True)
        optimizer.add_param_group({"params": layer.parameters(), "lr": 0.05})
        before = weights(layer)
        step(model, optimizer)
        assert all(not torch.equal(p, before[n]) for n, p in layer.named_parameters())
        assert name is None or "inverted" in optimizer.curvature[name]
        assert {group["lr"] for group in optimizer.param_groups} >= {0.1, 0.05} or index == 1
    assert optimizer.curvature["5.weight"] is kept
    assert optimizer.frozen == {}
    assert set(optimizer.uncovered) == {"1.weight", "1.bias"}
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    optimizer.load_state_dict(torch.load(buffer, weights_only=True))
    step(model, optimizer)


def test_samples_are_looked_for_once_a_layer_that_needs_them_is_trained():
    model = net()
    model.requires_grad_(False)
    model[0].requires_grad_(True)
    optimizer = KPSVD(model, sharing={"0": "expand"})
    assert not optimizer.observer.needs_identity
    model[5].requires_grad_(True)
    optimizer.add_param_group({"params": model[5].parameters()})  # with sharing "exact"
    assert optimizer.observer.needs_identity
    step(model, optimizer)
    assert all(optimizer.curvature[block.name] for block in optimizer.blocks)


def test_what_can_not_be_added_is_named():
    model = net()
    model[0].requires_grad_(False)
    optimizer = KFAC(model)
    with pytest.raises(UsageError, match=r"frozen: call requires_grad_\(\) first"):
        optimizer.add_param_group({"params": model[0].parameters()})
    with pytest.raises(UsageError, match=r"'5.weight' is trained by this optimizer already"):
        optimizer.add_param_group({"params": model[5].weight})
    with pytest.raises(UsageError, match="of another model"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


@pytest.mark.parametrize("kind", [KFAC, EKFAC, KPSVD, ExactNG])
@pytest.mark.parametrize("steps", [0, 3])
def test_distributed_checkpoints_go_on_bit_for_bit(kind, steps):
    model = net()
    optimizer = kind(model, lr=0.1, statistics_every=2, burn_in=0)
    for _ in range(steps):
        step(model, optimizer)
    optimizer.zero_grad()
    buffer = io.BytesIO()
    torch.save((model.state_dict(), get_optimizer_state_dict(model, optimizer)), buffer)
    buffer.seek(0)
    saved, state = torch.load(buffer, weights_only=True)
    again = net()
    again.load_state_dict(saved)
    resumed = kind(again, lr=0.1, statistics_every=2, burn_in=0)
    set_optimizer_state_dict(again, resumed, state)
    assert resumed.counters == optimizer.counters
    for _ in range(3):
        step(model, optimizer)
        step(again, resumed)
    for name, p in again.named_parameters():
        assert torch.equal(p, model.get_parameter(name)), name


def test_a_loss_that_is_not_finite_is_announced_once(recwarn):
    model = net()
    optimizer = KFAC(model)
    step(model, optimizer)
    with pytest.warns(SmallfryWarning, match="not finite.*skipped"):
        step(model, optimizer, X * math.inf)
    recwarn.clear()
    step(model, optimizer, X * math.inf)
    assert not recwarn.list
    assert optimizer.counters["skipped_steps"] == 2


@pytest.mark.parametrize("first", [True, False])
def test_an_empty_batch_changes_nothing(first):
    model = net()
    optimizer = KFAC(model, lr=0.1)
    if not first:
        step(model, optimizer)
    before, counters = weights(model), dict(optimizer.counters)
    optimizer.zero_grad()
    F.cross_entropy(model(X[:0]), Y[:0], reduction="sum").backward()
    optimizer.step()
    assert optimizer.counters == counters
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    step(model, optimizer)
    assert optimizer.counters["statistics"] == 2 - first


def test_sparse_embeddings_are_named():
    model = nn.Sequential(nn.Embedding(3, 4, sparse=True), nn.Linear(4, 30))
    with pytest.raises(UsageError, match=r"layer '0' has sparse gradients.*sparse=False"):
        KFAC(model)
    model[0].requires_grad_(False)
    KFAC(model)


@pytest.mark.parametrize("kind", [KFAC, ExactNG])
def test_a_compiled_step_is_a_step(kind):
    ends = []
    for compiled in (False, True):
        model = net()
        optimizer = kind(model, lr=0.1, statistics_every=2)
        stepped = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(X), Y).backward()
            stepped()
        ends.append(weights(model))
    for name, p in ends[0].items():
        assert torch.equal(p, ends[1][name]), name


@pytest.mark.parametrize("kind", [KFAC, EKFAC, ExactNG])
def test_gradients_clipped_by_value_are_accepted(kind):
    model = net()
    optimizer = kind(model, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        torch.nn.utils.clip_grad_value_(model.parameters(), 1e-2)
        optimizer.step()
    assert optimizer.counters["statistics"] == 2


@pytest.mark.parametrize("kind", [KFAC, EKFAC, KPSVD, ExactNG])
def test_forwards_without_backward_change_no_later_draw(kind):
    ends = []
    for logged in (False, True):
        model = net()
        optimizer = kind(model, lr=0.1, statistics_every=1)
        for _ in range(3):
            if logged:
                model(X[:7])
                model(torch.randn(3, 4, generator=torch.Generator().manual_seed(2)))
            step(model, optimizer)
        ends.append((weights(model), optimizer.generator.get_state()))
    for name, p in ends[0][0].items():
        assert torch.equal(p, ends[1][0][name]), name
    assert torch.equal(ends[0][1], ends[1][1])


def test_a_copied_model_is_trained_by_an_optimizer_of_its_own():
    model = net()
    optimizer = KFAC(model, lr=0.1)
    other = copy.deepcopy(model)
    second = KFAC(other, lr=0.1)
    for _ in range(2):
        step(model, optimizer)
        step(other, second)
    for name, p in other.named_parameters():
        assert torch.equal(p, model.get_parameter(name))


def test_hooks_of_state_dicts_are_called_as_those_of_any_optimizer():
    model = net()
    optimizer, calls = KFAC(model, lr=0.1), []
    step(model, optimizer)
    optimizer.register_state_dict_pre_hook(lambda _: calls.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "mine": 7})
    kept = optimizer.state_dict()
    assert kept.pop("mine") == 7
    optimizer.register_load_state_dict_pre_hook(
        lambda _, state: {k: v for k, v in state.items() if k != "theirs"}
    )
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("after loading"))
    optimizer.load_state_dict({**kept, "theirs": 8})
    assert calls == ["before saving", "after loading"]
    step(model, optimizer)
