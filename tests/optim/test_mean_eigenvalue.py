"""λ is relative to the mean eigenvalue of F̂, to which a layer contributes within limits."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from smallfry.optim import EKFAC, KFAC, KPSVD, SNGD, ExactNG
from smallfry.optim import preconditioner as preconditioners
from tests.optim.small_network import D, batch, network, step, vector

EVERY = {"lr": 0.1, "burn_in": 0, "statistics_every": 1, "fisher": "exact"}


def amplifying(scale=1e-6):
    """The norm divides the first layer's outputs by their size, and multiplies derivatives."""
    torch.manual_seed(0)
    layers = (
        nn.Linear(3, 5, bias=False),
        nn.LayerNorm(5, 1e-20, elementwise_affine=False),
        nn.Linear(5, 3),
    )
    model = nn.Sequential(*layers).to(D)
    with torch.no_grad():
        model[0].weight.mul_(scale)
    return model


def traces(model, x):
    """Traces of the dense Fisher of each layer's parameters."""
    found = {name: 0.0 for name, _ in model.named_children()}
    for one in x:
        logits = model(one[None])[0]
        for target, p in enumerate(logits.softmax(0).detach()):
            loss = F.cross_entropy(logits[None], torch.tensor([target]))
            parameters = dict(model.named_parameters())
            grads = torch.autograd.grad(loss, parameters.values(), retain_graph=True)
            for name, grad in zip(parameters, grads, strict=True):
                found[name.split(".")[0]] += float(p * (grad**2).sum()) / len(x)
    return found


@pytest.mark.parametrize("method", [EKFAC, ExactNG])  # their traces are exact
def test_a_layer_counts_for_a_thousand_times_the_last_one_at_most(method):
    model, (x, y) = amplifying(), batch()
    dense = traces(model, x)
    assert dense["0"] > 1e10 * dense["2"]
    damping = {} if method is EKFAC else {"damping": 0.1}
    optimizer = method(model, **EVERY, **damping)
    step(model, optimizer, x, y)
    mean = (1000 * dense["2"] + dense["2"]) / (15 + 18)
    assert optimizer.lambdas == pytest.approx(
        {"0.weight": 0.1 * mean, "2.weight": 0.1 * mean}, rel=1e-6
    )


@pytest.mark.parametrize("method", [KFAC, EKFAC, KPSVD])
def test_the_other_layers_still_move(method, monkeypatch):
    def moved():
        model = amplifying()
        optimizer = method(model, lr=0.1)
        before = model[2].weight.detach().clone()
        for _ in range(20):
            step(model, optimizer, *batch(64))
        return float((model[2].weight.detach() - before).norm())

    limited = moved()
    monkeypatch.setattr(preconditioners, "LARGEST", float("inf"))
    assert limited > 0.001
    assert moved() < 1e-6


@pytest.mark.parametrize("head", [1.0, 1e-4])  # a small head hides the curvature before it
def test_an_ordinary_network_has_the_mean_eigenvalue_of_all_layers(head):
    model, (x, y) = network(), batch()
    with torch.no_grad():
        model[2].weight.mul_(head)
    dense = traces(model, x)
    assert head == 1 or dense["2"] > 1e5 * dense["0"]
    optimizer = EKFAC(model, **EVERY)
    step(model, optimizer, x, y)
    mean = (dense["0"] + dense["2"]) / (20 + 18)
    assert optimizer.lambdas == pytest.approx(
        {"0.weight": 0.1 * mean, "2.weight": 0.1 * mean}, rel=1e-6
    )


def test_inputs_alone_have_no_limit():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 50), nn.Tanh(), nn.Linear(50, 3)).to(D)
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
        model[0].bias.zero_()
    optimizer = SNGD(model, lr=0.1, burn_in=0)
    step(model, optimizer, *batch())
    size = sum(block.size for block in optimizer.blocks)
    held = [
        optimizer.approximation.trace(block, optimizer.curvature[block.name])
        for block in optimizer.blocks
    ]
    assert held[0] > 10 * held[1]
    assert optimizer.lambdas["0.weight"] == pytest.approx(0.1 * sum(held) / size)


class Twice(nn.Module):
    """Layers are called in another order than they are registered, and there are two outputs."""

    def __init__(self, heads):
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 2)
        self.body, self.heads = nn.Linear(3, 4), heads

    def forward(self, x):
        x = self.body(x)
        return {"a": self.first(x), "b": self.second(x)} if self.heads == 2 else self.first(x)


@pytest.mark.parametrize(("heads", "last"), [(1, {"first"}), (2, {"first", "second"})])
def test_the_last_layers_are_those_called_last_one_for_each_output(heads, last):
    model = Twice(heads)
    likelihood = {"a": "categorical", "b": "categorical"} if heads == 2 else "categorical"
    optimizer = KFAC(model, lr=0.1, likelihood=likelihood)
    outputs = model(torch.randn(8, 3))
    outputs = outputs if heads == 2 else {"a": outputs}
    sum(F.cross_entropy(z, torch.arange(8) % 2) for z in outputs.values()).backward()
    optimizer.step()
    assert optimizer.preconditioner.last_called == [
        block.name for block in optimizer.blocks if set(block.layers) <= last
    ]
    assert len(optimizer.preconditioner.last_called) == heads


def test_a_resumed_run_keeps_the_limit_between_statistics():
    settings = {"lr": 0.1, "burn_in": 1, "statistics_every": 5, "inverse_every": 1}
    one, two = amplifying(), amplifying()
    first, second = KFAC(one, **settings), KFAC(two, **settings)
    for number in range(3):
        step(one, first, *batch(seed=number))
    two.load_state_dict(one.state_dict())
    second.load_state_dict(first.state_dict())
    for number in range(3, 9):
        step(one, first, *batch(seed=number))
        step(two, second, *batch(seed=number))
        assert first.lambdas == second.lambdas
    assert torch.equal(vector(one), vector(two))


def test_a_state_of_an_earlier_version_finds_the_last_layers_at_its_next_refresh():
    model = amplifying()
    optimizer = KFAC(model, **EVERY)
    step(model, optimizer, *batch())
    saved = optimizer.state_dict()
    del saved["flags"]["last_called"]
    later = KFAC(model, **EVERY)
    later.load_state_dict(saved)
    assert later.preconditioner.last_called == []
    assert later.lambdas == optimizer.lambdas
    step(model, later, *batch(seed=1))
    assert later.preconditioner.last_called == ["2.weight"]
