"""What the AdamW inside moves has its share of the divergence that was promised."""

import math

import pytest
import torch
from dense_fisher import dense_fisher
from small_network import D, batch, moved, step, vector
from torch import nn
from torch.nn import functional as F

from smallfry.optim import KFAC


def partly_covered(rate=1e-3, **settings):
    """Half of the weights are the AdamW's inside."""
    torch.manual_seed(0)
    layers = [nn.Linear(3, 12), nn.Tanh(), nn.Linear(12, 12), nn.LayerNorm(12, bias=False)]
    model = nn.Sequential(*layers, nn.Linear(12, 3)).to(D)
    settings = {"lr": 1.0, "kl_clip": 1e-5, "exclude": ["2"], "fallback_lr": rate} | settings
    return model, KFAC(model, **settings)


def dense_divergence(model, x, moves):
    """Twice the divergence of a move, by the dense Fisher."""
    v = torch.cat(
        [moves.get(n, torch.zeros_like(p)).flatten() for n, p in model.named_parameters()]
    )
    return float(v @ dense_fisher(model, x, "categorical") @ v)


def test_the_divergence_of_the_adamw_inside_is_that_of_the_dense_fisher():
    rate = 1e-6
    model, optimizer = partly_covered(rate)
    inside = {optimizer.names[p] for g in optimizer.adamw.param_groups for p in g["params"]}
    found = []
    for seed in range(2):
        x, y = batch(seed=seed)
        old = {n: p.detach().clone() for n, p in model.named_parameters()}
        step(model, optimizer, x, y)
        moved = {n: p.detach() - old[n] for n, p in model.named_parameters() if n in inside}
        found.append(dense_divergence(model, x, moved) / rate**2)
        assert optimizer.fallback_ratio == pytest.approx(sum(found) / len(found), rel=1e-3)
    share = optimizer.fallback_ratio * rate**2 / 1e-5
    assert 0 < share < 0.5
    assert optimizer.diagnostics().fallback_share == pytest.approx(share)
    assert f"{share:.2g} of it by the AdamW inside" in str(optimizer.summary())


@pytest.mark.parametrize("rate", [1e-5, 1e-3, 0.1])
def test_both_parts_of_a_step_keep_the_promise_together(rate):
    model, optimizer = partly_covered(rate, statistics_every=1)
    found = [moved(model, optimizer, *batch(16, seed)) for seed in range(40)]
    assert max(found) <= 2 * 1e-5 / 2 * 1.05  # both go the same way
    assert 0.3 * 1e-5 / 2 <= sum(found[5:]) / 35 <= 2 * 1e-5 / 2
    assert [g["lr"] for g in optimizer.adamw.param_groups] == [rate]
    assert optimizer.diagnostics().fallback_share <= 0.5 * (1 + 1e-9)


def test_without_a_bound_the_adamw_inside_is_left_alone():
    model, optimizer = partly_covered(0.01, kl_clip=None)
    torch.manual_seed(0)
    other, _ = partly_covered(0.01, kl_clip=None)
    inside = {optimizer.names[p] for g in optimizer.adamw.param_groups for p in g["params"]}
    adamw = torch.optim.AdamW(
        [p for n, p in other.named_parameters() if n in inside], 0.01, weight_decay=0.0
    )
    x, y = batch()
    step(model, optimizer, x, y)
    F.cross_entropy(other(x), y).backward()
    adamw.step()
    mine, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    for name in inside:
        assert torch.equal(mine[name], theirs[name])
    assert optimizer.fallback_ratio == 0.0


def test_what_was_measured_of_the_adamw_inside_is_resumed():
    model, optimizer = partly_covered(0.01, burn_in=2)
    for seed in range(4):
        step(model, optimizer, *batch(seed=seed))
    other, resumed = partly_covered(0.01, burn_in=2)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.fallback_ratio == optimizer.fallback_ratio > 0
    for seed in range(4, 16):
        step(model, optimizer, *batch(seed=seed))
        step(other, resumed, *batch(seed=seed))
    assert torch.equal(vector(model), vector(other))


class NormCliff(nn.Module):
    """Outputs are no numbers once the norm's weight moves."""

    def __init__(self):
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(5).to(D), nn.Linear(5, 12).to(D)

    def forward(self, x):
        z = self.layer(self.norm(x))
        return z * torch.where((self.norm.weight == 1).all(), 1.0, math.nan)


def test_the_adamw_inside_does_not_go_where_outputs_are_no_numbers():
    model = NormCliff()
    optimizer = KFAC(model, lr=0.1)
    x = torch.randn(8, 5, dtype=D)
    for _ in range(3):
        step(model, optimizer, x, torch.arange(8) % 3)
        assert model(x).isfinite().all()
    assert optimizer.fallback_ratio == 0.0
