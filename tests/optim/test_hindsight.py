"""With batch norm, the divergence of a step is measured on the batch behind it."""

import copy
import io

import pytest
import torch
from small_network import D, batch, divergence, step, vector
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from smallfry.errors import SmallfryWarning, UsageError
from smallfry.optim import EKFAC, KFAC

RATE = 1e-6
SETTINGS = {"lr": 1.0, "kl_clip": 1e-6, "fallback_lr": RATE}


def network(norm=True):
    """The AdamW inside moves the batch norm."""
    torch.manual_seed(0)
    layers = [nn.BatchNorm1d(12)] if norm else []
    layers = [nn.Linear(3, 12), *layers, nn.Tanh(), nn.Linear(12, 12), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(12, 3)).to(D)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@torch.no_grad()
def outputs(model, values, x):
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    return functional_call(model, buffers | values, (x,))


def test_ratios_are_those_of_the_last_step_on_the_next_batch():
    model = network()
    optimizer = KFAC(model, **SETTINGS)
    sizes, modelled = [], optimizer.preconditioner.divergence
    optimizer.preconditioner.divergence = lambda *given: sizes.append(modelled(*given)) or sizes[-1]
    inside = {optimizer.names[p] for g in optimizer.adamw.param_groups for p in g["params"]}
    assert inside == {"1.weight", "1.bias"}
    old = weights(model)
    step(model, optimizer, *batch())
    natural = beside = None
    for seed in range(1, 5):
        x, y = batch(8, seed)
        now, made = weights(model), optimizer.clip**2 * sizes[-1]
        between = now | {name: old[name] for name in inside}
        z = [outputs(model, values, x) for values in (old, between, now)]
        ratio = max(1.0, 2 * divergence(z[0], z[1]) / made)
        inner = 2 * divergence(z[1], z[2]) / RATE**2
        new = 1 / (seed + 1) if seed > 1 else 1.0  # that of the first step, on its own batch, goes
        natural = ratio if natural is None else natural + new * (ratio - natural)
        beside = inner if beside is None else beside + new * (inner - beside)
        step(model, optimizer, x, y)
        assert optimizer.divergence_ratio == pytest.approx(natural, rel=1e-4)
        assert optimizer.fallback_ratio == pytest.approx(beside, rel=1e-3)
        old = now
    assert natural > 1
    assert optimizer.counters["measurements"] == 5


def train(model, optimizer, seeds, size=8):
    for seed in seeds:
        step(model, optimizer, *batch(size, seed))


@pytest.mark.parametrize("how", ["no norm", "a norm in evaluation mode"])
def test_where_no_norm_mixes_samples_a_step_is_measured_on_its_own_batch(how):
    model = network(norm=how != "no norm")
    model[1].eval()
    optimizer = KFAC(model, **SETTINGS)
    for seed in range(4):
        train(model, optimizer, [seed])
        assert optimizer.measured
        assert optimizer.last_step is None


def test_steps_without_a_measurement_behind_them_are_not_kept():
    model = network()
    optimizer = KFAC(model, **SETTINGS | {"burn_in": 1, "statistics_every": 4})
    kept, measured = [], []
    for seed in range(12):
        train(model, optimizer, [seed])
        kept.append(optimizer.last_step is not None)
        measured.append(optimizer.measuring)
    assert kept == measured
    assert True in kept
    assert False in kept


def windows(size, seed):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 2, 4, 4, dtype=D, generator=random)
    return x, (x.mean((1, 2, 3)) > 0).long()


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_the_promise_is_kept_on_batches_that_a_step_has_not_seen(kind):
    torch.manual_seed(0)
    body = [nn.Conv2d(2, 24, 3, 2), nn.BatchNorm2d(24), nn.ReLU(), nn.Flatten(), nn.Linear(24, 24)]
    model = nn.Sequential(*body, nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 2)).to(D)
    kappa = 1e-3
    optimizer = kind(model, lr=1.0, kl_clip=kappa)
    own, others = [], []
    for seed in range(60):
        (x, y), (other, _) = windows(8, seed), windows(8, 1000 + seed)
        before = [outputs(model, {}, each) for each in (x, other)]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        after = [outputs(model, {}, each) for each in (x, other)]
        own.append(divergence(before[0], after[0]))
        others.append(divergence(before[1], after[1]))
    assert 0.3 * kappa / 2 <= sum(others[10:]) / 50 <= 2 * kappa / 2
    assert sum(own[10:]) > 4 * sum(others[10:])


@pytest.mark.parametrize("ended", [1, 3, 6])
def test_a_resumed_optimizer_measures_the_step_before_it_was_saved(ended):
    settings = SETTINGS | {"burn_in": 2, "statistics_every": 3, "fallback_lr": 0.01}
    model = network()
    optimizer = KFAC(model, **settings)
    train(model, optimizer, range(ended))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    resumed = KFAC(other, **settings)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert (resumed.last_step is None) == (optimizer.last_step is None) == (ended == 6)
    train(model, optimizer, range(ended, 12))
    train(other, resumed, range(ended, 12))
    assert torch.equal(vector(model), vector(other))
    assert resumed.divergence_ratio == optimizer.divergence_ratio


@pytest.mark.parametrize("name", ["0.weight", "7.weight"])
def test_a_last_step_of_another_model_is_refused(name):
    model = network()
    optimizer = KFAC(model, **SETTINGS)
    train(model, optimizer, range(2))
    state, before = optimizer.state_dict(), optimizer.last_step
    state["last_step"] = {**state["last_step"], "covered": {name: torch.zeros(3, dtype=D)}}
    with pytest.raises(UsageError, match=f"its last step has '{name}'"):
        optimizer.load_state_dict(state)
    assert optimizer.last_step is before


def test_after_a_step_that_broke_the_model_the_next_one_is_measured_on_its_own_batch():
    model = network()
    optimizer = KFAC(model, **SETTINGS)
    train(model, optimizer, range(2))
    assert not optimizer.measured
    broken = {name: change * torch.nan for name, change in optimizer.last_step.covered.items()}
    optimizer.last_step = optimizer.last_step._replace(covered=broken)
    train(model, optimizer, [2])
    assert optimizer.measured
    assert 1 <= optimizer.divergence_ratio < 1e9
    assert vector(model).isfinite().all()


class Cliff(nn.Module):
    """Outputs are no numbers once the weights have moved."""

    def __init__(self):
        super().__init__()
        self.net = network()
        self.register_buffer("start", self.net[0].weight.detach().clone())

    def forward(self, x):
        return self.net(x) * torch.where((self.net[0].weight == self.start).all(), 1.0, torch.nan)


def test_a_step_of_no_length_is_not_measured():
    model = Cliff()
    optimizer = KFAC(model, **SETTINGS)
    train(model, optimizer, range(3))
    assert optimizer.clip == 0.0
    assert optimizer.last_step is None
    assert optimizer.counters["measurements"] == 0


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.noise = network(), 0.0
        self.random = torch.Generator().manual_seed(0)

    def forward(self, x):
        return self.net(x) + self.noise * torch.randn(3, dtype=D, generator=self.random)


def test_a_model_that_cannot_run_again_is_announced():
    model = Noisy()
    optimizer = KFAC(model, **SETTINGS)
    train(model, optimizer, range(2))
    model.noise = 1.0
    before = vector(model)
    with pytest.warns(SmallfryWarning, match="other outputs when it runs again"):
        train(model, optimizer, [2])
    train(model, optimizer, range(3, 6))
    assert not torch.equal(vector(model), before)
    assert optimizer.last_step is None
    assert optimizer.counters["measurements"] == 2
