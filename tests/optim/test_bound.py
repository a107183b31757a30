"""A step's divergence is what was promised: measured on batches that the curvature has not seen."""

import copy
import math
import random

import pytest
import torch
from dense_fisher import dense_fisher
from mixed_net import Net
from small_network import D, batch, divergence, moved, network, step, vector
from torch import nn
from torch.distributions import Laplace, Normal, Poisson, VonMises
from torch.nn import functional as F

from smallfry.curvature import as_likelihood
from smallfry.curvature.likelihoods import Bernoulli, Categorical, Gaussian
from smallfry.errors import SmallfryWarning, UsageError
from smallfry.optim import EKFAC, KFAC, KPSVD, bound, hindsight


@pytest.mark.parametrize("kind", [KFAC, EKFAC, KPSVD])
def test_the_measured_divergence_is_that_of_the_dense_fisher_of_the_new_batch(kind):
    model, kappa = network(), 1e-9
    optimizer = kind(model, lr=1.0, kl_clip=kappa, damping=1e-3, momentum=0.0, burn_in=0)
    step(model, optimizer, *batch(4))
    sizes = []
    modelled = optimizer.preconditioner.divergence
    optimizer.preconditioner.divergence = lambda *given: sizes.append(modelled(*given)) or sizes[-1]
    x, y = batch(4, seed=1)
    fisher, before, old = dense_fisher(model, x, "categorical"), vector(model), optimizer.clip
    first = optimizer.divergence_ratio
    step(model, optimizer, x, y)
    v = (vector(model) - before) / optimizer.clip
    found = float(v @ fisher @ v) / sizes[0]
    assert old < 1
    assert optimizer.counters["measurements"] == 2
    assert optimizer.divergence_ratio == pytest.approx((first + max(found, 1)) / 2, rel=1e-3)


def test_no_step_on_a_new_batch_diverges_more_than_promised(method):
    if method.fixed.get("step_length") == "quadratic":
        pytest.skip("does not measure")
    model, kappa, found = network(), 1e-5, []
    settings = {"lr": 1.0, "kl_clip": kappa, "damping": 1e-2, "statistics_every": 1}
    optimizer = method(model, **settings)
    for seed in range(12):
        found.append(moved(model, optimizer, *batch(4, seed)))
    assert max(found) <= kappa / 2 * 1.05
    assert max(found) >= kappa / 2 * 0.5  # and it is used


def test_between_measurements_the_mean_divergence_is_about_what_was_promised():
    model, kappa = network(), 1e-6
    optimizer = KFAC(model, lr=1.0, kl_clip=kappa, statistics_every=5, momentum=0.0)
    found = [moved(model, optimizer, *batch(16, seed)) for seed in range(60)]
    assert 0.3 * kappa / 2 <= sum(found[10:]) / 50 <= 2 * kappa / 2
    assert optimizer.counters["measurements"] < 50


def test_a_step_that_would_be_much_longer_is_kept_short_and_the_next_one_measured():
    model = network()
    optimizer = KFAC(model, lr=1.0, burn_in=0, statistics_every=100, momentum=0.0, kl_clip=1e-5)
    x, y = batch()
    for _ in range(5):
        step(model, optimizer, x, y)
    count = optimizer.counters["measurements"]
    assert count == 2  # the first step, and the one behind its refresh
    with torch.no_grad():
        p = model(x).softmax(1)
    assert moved(model, optimizer, 3 * x, p.argmin(1)) <= 1e-5 / 2 * 1.05
    assert optimizer.counters["measurements"] == count
    assert moved(model, optimizer, 3 * x, p.argmin(1)) <= 1e-5 / 2 * 1.05
    assert optimizer.counters["measurements"] == count + 1


def test_a_step_far_beyond_the_quadratic_is_shortened_until_it_is_not():
    model = network()
    with torch.no_grad():
        model[2].weight *= 50.0  # certain of everything: F is next to nothing
    optimizer = KFAC(model, lr=10.0, damping=1e-6, momentum=0.0)
    x, _ = batch()
    with torch.no_grad():
        wrong = model(x).argmin(1)
    assert moved(model, optimizer, x, wrong) <= 2 * 0.005
    assert optimizer.clip > 0


def test_dropout_and_batch_norm_see_the_step_alone():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(8, 8),
        nn.ReLU(),
        nn.Linear(8, 3),
    ).to(D)
    optimizer = KFAC(model, lr=0.1)
    torch.manual_seed(1)
    for seed in range(4):
        step(model, optimizer, *batch(16, seed))
    drawn = torch.rand(1)
    assert optimizer.counters["measurements"] == 4
    assert int(model[1].num_batches_tracked) == 4
    torch.manual_seed(1)
    for _ in range(4):
        nn.functional.dropout(torch.ones(16, 8, dtype=D), 0.5)
    assert torch.equal(drawn, torch.rand(1))


def test_what_is_measured_is_measured_in_the_precision_of_the_forward_pass():
    model = Net()
    optimizer = KFAC(model, lr=0.1)
    x, y = torch.randn(16, 5), torch.randint(3, (16,))
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert optimizer.counters["measurements"] == 3


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.random = network(), torch.Generator().manual_seed(0)

    def forward(self, x):
        return self.net(x) + torch.randn(3, dtype=D, generator=self.random)


class Overwriting(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        z = self.net(x.clone())
        x.mul_(2)
        return z


@pytest.mark.parametrize(
    ("model", "what"), [(Noisy, "other outputs when it runs again"), (Overwriting, "overwrites")]
)
def test_a_model_that_cannot_run_again_is_announced_and_trained_all_the_same(model, what):
    model = model()
    optimizer = KFAC(model, lr=0.1)
    before = vector(model)
    with pytest.warns(SmallfryWarning, match=what):
        step(model, optimizer, *batch())
    step(model, optimizer, *batch())
    assert not torch.equal(vector(model), before)
    assert optimizer.counters["measurements"] == 0
    assert "by the model alone" in str(optimizer.summary())


def test_a_resumed_optimizer_clips_as_before_and_old_states_load():
    model = network()
    optimizer = KFAC(model, lr=0.5, burn_in=2)
    for seed in range(4):
        step(model, optimizer, *batch(8, seed))
    other = copy.deepcopy(model)
    resumed = KFAC(other, lr=0.5, burn_in=2)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.divergence_ratio == optimizer.divergence_ratio > 1
    for seed in range(4, 8):
        step(model, optimizer, *batch(8, seed))
        step(other, resumed, *batch(8, seed))
    assert torch.equal(vector(model), vector(other))
    old = optimizer.state_dict()
    for name in ("divergence_ratio", "targets", "measuring", "measured_size", "fallback_ratio"):
        del old["flags"][name]
    del old["counters"]["measurements"]
    resumed = KFAC(other, lr=0.5, burn_in=2)
    resumed.load_state_dict(old)
    step(other, resumed, *batch())
    assert resumed.counters["measurements"] == 1


def test_what_was_measured_is_reported():
    model = network()
    optimizer = KFAC(model, lr=1.0, kl_clip=1e-6)
    assert "in 0 measurements" in str(optimizer.summary())
    step(model, optimizer, *batch())
    step(model, optimizer, *batch(seed=1))
    shown = f"{optimizer.divergence_ratio:.3g} × "
    assert optimizer.divergence_ratio > 1
    assert optimizer.diagnostics().divergence_ratio == optimizer.divergence_ratio
    assert shown in str(optimizer.summary())
    assert shown in str(optimizer.diagnostics())
    assert "without bound" in str(KFAC(network(), kl_clip=None).summary())
    assert "exact quadratic" in str(KFAC(network(), step_length="quadratic").summary())


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_no_divergence_comes_from_dropout_or_batch_statistics(kind, monkeypatch):
    torch.manual_seed(0)
    body = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)
    model = nn.Sequential(nn.Linear(3, 8), body, nn.Flatten(), nn.BatchNorm1d(32), nn.Linear(32, 3))
    model, found, measured = model.to(D), [], bound.divergence

    def measure(optimizer, observations, step, start=None):
        idle = {name: torch.zeros_like(part) for name, part in step.items()}
        found.append(measured(optimizer, observations, idle))
        return measured(optimizer, observations, step, start)

    monkeypatch.setattr(bound, "divergence", measure)
    monkeypatch.setattr(hindsight, "divergence", measure)
    optimizer = kind(model, lr=0.1)
    for seed in range(3):
        x = torch.randn(6, 4, 3, dtype=D, generator=torch.Generator().manual_seed(seed))
        step(model, optimizer, x, torch.arange(6) % 3)
    assert len(found) >= 6
    assert found == [0.0] * len(found)


# A gradient that the curvature knows nothing of


def test_a_surprise_leaves_momentum_with_the_step():
    model = network()
    settings = {"burn_in": 0, "statistics_every": 100, "kl_clip": 1e-5, "damping": 1e-2}
    optimizer = KFAC(model, lr=1.0, **settings)
    x, y = batch()
    for _ in range(20):
        step(model, optimizer, x, y)
    assert not optimizer.measuring
    old = {p: optimizer.state[p]["momentum"].clone() for p in model.parameters()}
    known, ratio = 2 * optimizer.measured_size, optimizer.divergence_ratio
    sizes, modelled = [], optimizer.preconditioner.divergence
    optimizer.preconditioner.divergence = lambda *given: sizes.append(modelled(*given)) or sizes[-1]
    with torch.no_grad():
        wrong = model(x).argmin(1)
    step(model, optimizer, 30 * x, wrong)
    growth = sizes[-1] / known
    assert growth > 3
    assert optimizer.clip == pytest.approx((1e-5 / (ratio * growth * sizes[-1])) ** 0.5)
    for p in model.parameters():
        expected = (0.9 * old[p] + p.grad) / growth
        torch.testing.assert_close(optimizer.state[p]["momentum"], expected)
    step(model, optimizer, x, y)
    assert sizes[-1] < 3 * known  # it does not come back


# Targets


def test_each_target_of_a_sample_may_diverge():
    z = torch.randn(4, 6, 3)
    assert Categorical().targets((z,), (None,)) == 6
    assert Categorical(dim=1).targets((z,), (None,)) == 3
    assert Categorical().targets((z[:, 0],), (None,)) == 1
    assert Bernoulli().targets((z,), (None,)) == 18
    assert as_likelihood(lambda z: Normal(z, 1.0)).targets is not None


@pytest.mark.parametrize("unit", [0.1, 1.0, 1000.0])
def test_a_gaussian_target_counts_by_its_error_over_the_variance(unit):
    z, y = torch.zeros(2, 3, dtype=D), unit * torch.ones(2, 3, dtype=D)
    gradient = (z - y) / 4.0
    expected = 3 * max(1.0, unit**2 / 4.0)
    assert Gaussian(4.0).targets((z,), (gradient,)) == pytest.approx(expected)
    assert Gaussian(4.0).targets((z,), (None,)) == 3


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_raw_target_is_approached_as_fast_in_any_unit(reduction):
    x, _ = batch(16)
    y = x.sum(1, keepdim=True) + 3
    left = []
    for unit in (10.0, 1000.0):
        torch.manual_seed(0)
        model = nn.Linear(3, 1).to(D)
        with torch.no_grad():
            model.weight.zero_()
            model.bias.zero_()
        optimizer = KFAC(model, 0.1, likelihood="gaussian", loss_scale=reduction, fisher="exact")
        for _ in range(10):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), unit * y, reduction=reduction)
            (loss if reduction == "mean" else loss / 2).backward()
            optimizer.step()
        left.append(float(F.mse_loss(model(x), unit * y).detach()) / unit**2)
    assert left[1] == pytest.approx(left[0], rel=1e-3)
    assert left[0] < 0.8 * float((y**2).mean())


def test_divergences_of_distributions():
    likelihood = as_likelihood(lambda z: Normal(z, 2.0))
    before, after = (likelihood.select(torch.randn(4, 3, dtype=D)) for _ in range(2))
    expected = Gaussian(4.0).divergence(before, after)
    torch.testing.assert_close(likelihood.divergence(before, after), expected)
    assert likelihood.targets(before, (None,)) == 3
    rates = as_likelihood(lambda z: Poisson(z.exp()))
    before, after = (rates.select(torch.randn(4, dtype=D)) for _ in range(2))
    assert rates.divergence(before, after).shape == (4,)
    mixed = as_likelihood({0: "categorical", 1: lambda z: Laplace(z, 1.0)})
    assert mixed.targets(mixed.select((torch.zeros(4, 5), torch.zeros(4, 2))), (None, None)) == 3
    unknown = as_likelihood(lambda z: VonMises(z, torch.ones_like(z)))
    before = unknown.select(torch.randn(4, 2))
    with pytest.raises(UsageError, match="register_kl"):
        unknown.divergence(before, before)


class Tokens(nn.Module):
    """Logits of each token, (samples × tokens, classes)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).to(D)

    def forward(self, x):
        return self.layers(x).flatten(0, -2)


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_padding_is_no_part_of_the_bound(kind):
    random = torch.Generator().manual_seed(1)
    x = torch.randn(6, 4, 3, dtype=D, generator=random)
    y = torch.randint(3, (6, 4), generator=random)
    padded = y.clone()
    padded[:, 2:] = -100
    found = []
    for inputs, targets in ((x, padded), (x[:, :2], y[:, :2])):
        model = Tokens()
        optimizer = kind(model, lr=1.0, kl_clip=1e-4, fisher="exact", burn_in=0)
        step(model, optimizer, inputs, targets.flatten())
        found.append((optimizer.targets, optimizer.clip, optimizer.divergence_ratio))
        with torch.no_grad():
            before, after = Tokens()(x[:, :2]), model(x[:, :2])
        assert divergence(before, after) == pytest.approx(1e-4 / 2, rel=0.3)
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert found[0][0] == 1.0
    assert found[0][1] < 1.0


class Layerdrop(nn.Module):
    """A layer that is left out by Python's own random numbers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 5).to(D), nn.Linear(5, 3).to(D)

    def forward(self, x):
        h = self.first(x).tanh()
        return self.second(h if random.random() < 0.5 else 3 * h)


def test_a_model_that_draws_elsewhere_is_found_whenever_it_does():
    random.seed(0)
    model = Layerdrop()
    optimizer = KFAC(model, lr=0.1)

    def train():
        for seed in range(30):
            step(model, optimizer, *batch(16, seed))

    with pytest.warns(SmallfryWarning, match="gives other outputs when it runs again"):
        train()
    assert optimizer.divergence_ratio < 1e3
    assert not optimizer.measurable
    other = KFAC(Layerdrop(), lr=0.1)
    other.load_state_dict(optimizer.state_dict())
    assert not other.measurable


class Forces(nn.Module):
    """A gradient is taken inside the forward pass."""

    def __init__(self):
        super().__init__()
        self.body = network()

    def forward(self, x):
        x = x.requires_grad_()
        (force,) = torch.autograd.grad(self.body(x).square().sum(), x, create_graph=True)
        return force


def test_a_model_that_can_not_run_again_is_trained_all_the_same():
    model = Forces()
    optimizer = KFAC(model, lr=0.1, likelihood="gaussian", check="off")

    def train(seed):
        optimizer.zero_grad()
        model(batch(8, seed)[0]).square().sum().backward()
        optimizer.step()

    with pytest.warns(SmallfryWarning, match="can't run again on the same batch"):
        train(0)
    train(1)


class Rewriting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = network()

    def forward(self, inputs):
        inputs["x"] = self.layers(inputs["x"])
        return inputs["x"]


def test_a_model_may_put_other_things_into_its_containers():
    model = Rewriting()
    optimizer = KFAC(model, lr=0.1)
    x, y = batch(8)
    F.cross_entropy(model({"x": x}), y).backward()
    optimizer.step()
    assert optimizer.counters["measurements"] == 1


class Cliff(nn.Module):
    """Outputs are no numbers once a weight is farther than a little from where it began."""

    def __init__(self, width=1e-3):
        super().__init__()
        self.layer = network()[2]
        self.start, self.width = self.layer.weight.detach().clone(), width

    def forward(self, x):
        far = (self.layer.weight - self.start).abs().max() > self.width
        return self.layer(x) * torch.where(far, math.nan, 1.0)


def test_no_step_goes_where_outputs_are_no_numbers():
    model = Cliff()
    optimizer = KFAC(model, lr=1.0)
    x = torch.randn(8, 5, dtype=D)
    for _ in range(3):
        step(model, optimizer, x, torch.arange(8) % 3)
        assert model(x).isfinite().all()
    nothing = torch.full((2, 3), math.nan)
    assert Categorical().divergence((torch.zeros(2, 3),), (nothing,)).isnan().all()
    certain = torch.tensor([[0.0, -math.inf, -math.inf]])
    assert Categorical().divergence((certain,), (torch.zeros(1, 3),)).item() == pytest.approx(
        math.log(3)
    )


def test_where_no_step_is_short_enough_the_next_one_is_measured_too():
    model = Cliff(0.0)
    optimizer = KFAC(model, lr=1.0, burn_in=0, statistics_every=100)
    x = torch.randn(8, 5, dtype=D)
    for _ in range(4):
        step(model, optimizer, x, torch.arange(8) % 3)
        assert optimizer.clip == 0.0
        assert optimizer.measuring
        assert model(x).isfinite().all()
    model.width = 1e9
    step(model, optimizer, x, torch.arange(8) % 3)
    assert optimizer.clip > 0.0
    assert not optimizer.measuring


def test_a_pass_through_frozen_layers_is_no_concern():
    model = network()
    optimizer = KFAC(model, lr=0.1)
    step(model, optimizer, *batch())
    model.requires_grad_(False)
    x = batch(8)[0].requires_grad_()
    model(x).square().sum().backward()
    assert x.grad is not None


def test_a_head_without_a_loss_is_no_part_of_the_divergence():
    class Heads(nn.Module):
        def __init__(self, both):
            super().__init__()
            self.body, self.both = network(), both
            torch.manual_seed(1)
            self.other = nn.Linear(3, 4).to(D)

        def forward(self, x):
            z = self.body(x)
            return {"a": z, "b": 100 * self.other(z)} if self.both else {"a": z}

    found = []
    for both in (True, False):
        model, parts = Heads(both), dict.fromkeys("ab" if both else "a", "categorical")
        optimizer = KFAC(model, lr=1.0, likelihood=parts, fisher="exact", exclude=["other"])
        x, y = batch(16)
        F.cross_entropy(model(x)["a"], y).backward()
        optimizer.step()
        found.append(optimizer.divergence_ratio)
    assert found[0] == pytest.approx(found[1], rel=0.5)
