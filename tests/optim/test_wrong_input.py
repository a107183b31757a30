"""What is wrong is named, with what to do; what can't be covered is announced and trained."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from smallfry.curvature import Categorical
from smallfry.curvature.scaled import Scaled
from smallfry.errors import SmallfryWarning, UsageError
from smallfry.optim import EKFAC, KFAC, KPSVD, SNGD, Deflation, ExactNG, TwoLevel

X, Y = torch.randn(16, 4, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3


def net(inputs=4, outputs=3):
    return nn.Sequential(nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, outputs))


def once(model, optimizer, loss):
    optimizer.zero_grad()
    loss(model(X)).backward()
    optimizer.step()


def cross_entropy(reduction):
    return lambda z: F.cross_entropy(z, Y, reduction=reduction)


def bce(reduction="mean"):
    target = (torch.arange(16)[:, None] + torch.arange(3)) % 2
    return lambda z: F.binary_cross_entropy_with_logits(z, target.float(), reduction=reduction)


def test_a_sum_where_a_mean_was_told_is_named():
    with pytest.raises(
        UsageError, match=r"16 times .* loss_scale is 1: .*16 is the number of samples"
    ):
        once(model := net(), KFAC(model), cross_entropy("sum"))
    once(model := net(), KFAC(model, loss_scale="sum"), cross_entropy("sum"))


def test_a_mean_over_outputs_is_named():
    with pytest.raises(
        UsageError, match=r"0\.333.* loss_scale is 1.*1/3 looks like a mean over outputs"
    ):
        once(model := net(), KFAC(model, likelihood="bernoulli"), bce())
    once(model := net(), KFAC(model, likelihood="bernoulli", loss_scale="mean"), bce())


def test_a_likelihood_that_does_not_fit_the_loss_is_named():
    target = torch.randn(16, 3)
    with pytest.raises(UsageError, match="'categorical' does not fit the loss"):
        once(model := net(), KFAC(model), lambda z: F.mse_loss(z, target))
    for named, words in (
        ("categorical_mean", "'categorical_mean', with the classes in dimension 1, does not fit"),
        (Scaled(Categorical(), 0.5), "'categorical' times 0.5, with the classes in dimension -1"),
    ):
        with pytest.raises(UsageError, match=words):
            once(model := net(), KFAC(model, likelihood=named), lambda z: 9 * F.mse_loss(z, target))
    with pytest.raises(UsageError, match="does not fit the loss"):
        once(
            model := net(), KFAC(model, likelihood="bernoulli"), lambda z: 9 * F.mse_loss(z, target)
        )
    with pytest.raises(UsageError, match="outside 0 … 1"):
        once(model := net(), KFAC(model, likelihood="bernoulli_probabilities"), bce())


def test_soft_targets_are_no_error():
    mixed = torch.rand(16, 3).softmax(1)
    once(model := net(), KFAC(model), lambda z: F.cross_entropy(z, mixed, label_smoothing=0.1))


def test_a_model_without_a_coverable_layer_is_refused():
    with pytest.raises(UsageError, match="LayerNorm has no layer that EKFAC can cover"):
        EKFAC(nn.LayerNorm(3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"damping": 0.0}, "damping must be positive"),
        ({"lr": -1.0}, "can't be negative"),
        ({"lr": float("inf")}, "can't be negative or infinite"),
        ({"lr": "0.1"}, "lr must be a number, not '0.1'"),
        ({"damping": None}, "damping can't be null"),
        ({"loss_scale": None}, "loss_scale can't be null"),
        ({"loss_scale": [1]}, r"loss_scale must be a number, not \[1\]"),
        ({"statistics_every": 2.5}, "statistics_every must be a whole number, not 2.5"),
        ({"adaptive_damping": "yes"}, "adaptive_damping must be True or False, not 'yes'"),
        ({"factor_rank": float("nan")}, "factor_rank must be a whole number, not nan"),
        ({"factor_rank": 0}, "factor_rank is at least 1, not 0"),
        ({"sharing": 3}, "sharing must be text, not 3"),
        ({"seed": -1}, "seed can't be negative"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"exclude": "0"}, "exclude must be a list, not '0'"),
        ({"exclude": [nn.ReLU()]}, "exclude must be text, not ReLU()"),
        ({"likelihood": Categorical}, r"an object: Categorical\(\), not the class"),
        ({"weight_decy": 0.1}, "KFAC has no setting 'weight_decy'; did you mean 'weight_decay'?"),
        ({"momentum": 1.0}, "momentum is 0 to below 1"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"kl_clip": 0.0}, "kl_clip"),
        ({"statistics_every": 0}, "periods"),
        ({"fisher": "true"}, "fisher must be one of mc, exact, empirical"),
        ({"draws": 0}, "draws"),
        ({"loss_scale": "median"}, "loss_scale is"),
        ({"damping_split": "both"}, "damping_split is"),
        ({"sharing": "exact"}, "sharing is expand or reduce for this method, not 'exact'"),
        ({"sharing": {"9": "reduce"}}, "sharing names layer '9'"),
        ({"exclude": ["nothing"]}, "no such module"),
        ({"params": [nn.Parameter(torch.zeros(1))]}, "of another model"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings, message):
    with pytest.raises(UsageError, match=message):
        KFAC(net(), **settings)


def test_exact_natural_gradient_refuses_what_it_has_not():
    with pytest.raises(UsageError, match="scope is"):
        ExactNG(net(), scope="layer")
    with pytest.raises(UsageError, match="one damping for the network"):
        ExactNG(net(), damping_per="layer")


def test_a_step_without_a_seen_forward_pass_is_an_error_and_a_later_one_is_announced():
    model = net()
    optimizer = KFAC(model, lr=0.01, burn_in=0, statistics_every=1)
    model.eval()
    F.cross_entropy(model(X), Y).backward()
    with pytest.raises(UsageError, match="no training forward pass was seen"):
        optimizer.step()
    model.train()
    once(model, optimizer, cross_entropy("mean"))
    model.eval()
    F.cross_entropy(model(X), Y).backward()
    with pytest.warns(SmallfryWarning, match="waits for the next"):
        optimizer.step()
    assert optimizer.counters["missed_refreshes"] == 1


def test_a_weight_used_past_its_layer_is_named():
    class Past(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            return F.linear(torch.tanh(self.first(x)), self.second.weight, self.second.bias)

    with pytest.raises(UsageError, match=r"layer 'second'.*F\.linear.*exclude=\['second'\]"):
        once(model := Past(), KFAC(model), cross_entropy("mean"))
    model = Past()
    before = model.second.weight.detach().clone()
    once(model, KFAC(model, exclude=["second"]), cross_entropy("mean"))
    assert not torch.equal(model.second.weight, before)


def test_a_layer_that_gets_another_shape_is_named():
    model = net()
    optimizer = KFAC(model, lr=0.01, burn_in=0, statistics_every=1)
    once(model, optimizer, cross_entropy("mean"))
    model[2].weight = nn.Parameter(torch.zeros(7, 5))
    model[2].bias = nn.Parameter(torch.zeros(7))
    with pytest.raises(UsageError, match="layer '2' has another weight than when"):
        once(model, optimizer, cross_entropy("mean"))


def test_transforms_of_torch_func_are_left_alone():
    model = net()
    optimizer = KFAC(model, lr=0.01)
    values = {name: p.detach() for name, p in model.named_parameters()}

    def loss(chosen, x):
        return torch.func.functional_call(model, chosen, (x,)).sum()

    torch.func.vmap(torch.func.grad(loss), (None, 0))(values, X[:, None])
    assert optimizer.observer.pending == []
    once(model, optimizer, cross_entropy("mean"))


def test_a_singular_factor_is_inverted_with_more_damping_and_that_is_said(monkeypatch):
    model = net()
    optimizer = KFAC(model, lr=0.01, damping=1e-12, burn_in=0, statistics_every=1)
    real, before = torch.linalg.cholesky_ex, [0.2]

    def weak(matrix):  # as on a factor that rounding made indefinite
        lower, info = real(matrix)
        small = matrix.diagonal(dim1=1, dim2=2).amax(1) < before[0]
        return lower, info + small.int()

    monkeypatch.setattr(torch.linalg, "cholesky_ex", weak)
    with pytest.warns(SmallfryWarning, match="nearly singular, its damping was raised"):
        once(model, optimizer, cross_entropy("mean"))
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("settings", [{}, {"damping_split": "tikhonov"}])
def test_rank_deficient_and_badly_scaled_factors_give_finite_steps(settings):
    model = net()
    with torch.no_grad():
        model[0].weight.mul_(1e-6)
    scale = torch.tensor([1e4, 1e-4, 1.0, 0.0])
    optimizer = KFAC(model, lr=0.1, damping=1e-4, burn_in=0, statistics_every=1, **settings)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(X * scale), Y).backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert optimizer.counters["failed_refreshes"] == 0


def test_an_inverse_that_fails_leaves_the_last_one_and_is_counted(monkeypatch):
    model = net()
    optimizer = KFAC(model, lr=0.01, burn_in=0, statistics_every=1)
    once(model, optimizer, cross_entropy("mean"))
    before = optimizer.curvature["0.weight"]["ia"].clone()
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda m: (m, torch.ones(len(m))))
    with pytest.warns(SmallfryWarning, match="the last inverse is kept"):
        once(model, optimizer, cross_entropy("mean"))
    assert torch.equal(optimizer.curvature["0.weight"]["ia"], before)
    assert optimizer.counters["failed_refreshes"] == 2


def test_a_dead_layer_does_no_harm():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        model[0].bias.fill_(-100)
    optimizer = KFAC(model, lr=0.1, burn_in=0, statistics_every=1, damping_per="layer")
    for _ in range(3):
        once(model, optimizer, cross_entropy("mean"))
    assert all(p.isfinite().all() for p in model.parameters())


PROBES = {
    "multi-head attention": lambda: nn.MultiheadAttention(4, 2, batch_first=True),
    "transformer layer": lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
    "lstm": lambda: nn.LSTM(4, 4, batch_first=True),
    "embedding-like": lambda: nn.Bilinear(4, 4, 4),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    "grouped": lambda: nn.Conv1d(2, 2, 3, padding="same", groups=2),
    "norm": lambda: nn.BatchNorm1d(2),
}


class Probe(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(4, 3)

    def forward(self, x):
        x = x.view(-1, 2, 4)
        if isinstance(self.layer, nn.MultiheadAttention):
            x = self.layer(x, x, x)[0]
        elif isinstance(self.layer, nn.Bilinear):
            x = self.layer(x, x)
        else:
            x = self.layer(x)
            x = x[0] if isinstance(x, tuple) else x
        return self.head(x.mean(1))


@pytest.mark.filterwarnings("ignore:only .* of the trained weights")
@pytest.mark.parametrize("case", PROBES)
@pytest.mark.parametrize("kind", [KFAC, EKFAC, ExactNG, KPSVD, Deflation, TwoLevel, SNGD])
def test_any_layer_is_preconditioned_or_announced_and_always_trained(case, kind):
    model = Probe(PROBES[case]())
    optimizer = kind(model, lr=0.1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(6, 8)), torch.arange(6) % 3).backward()
        optimizer.step()
    covered = {name for block in optimizer.blocks for name in block.parameters}
    assert covered | set(optimizer.uncovered) == set(before)
    for name, p in model.named_parameters():
        if p.grad.abs().max() > 1e-9:
            assert not torch.equal(p, before[name]), name


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", [KFAC, ExactNG])
def test_a_compiled_model_takes_the_same_steps(backend, kind):
    ends = []
    for compiled in (False, True):
        torch.manual_seed(1)
        model = net()
        called = torch.compile(model, backend=backend) if compiled else model
        optimizer = kind(called, lr=0.05, burn_in=0, statistics_every=2)
        for _ in range(4):
            once(called, optimizer, cross_entropy("mean"))
        assert optimizer.counters["statistics"] == 2
        ends.append([p.detach() for p in model.parameters()])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert math.isfinite(optimizer.clip)


def test_impossible_classes_are_no_obstacle():
    torch.manual_seed(1)
    model, mask = net(), torch.tensor([0.0, -math.inf, 0.0])
    masked = nn.Sequential(model, Mask(mask))
    optimizer = KFAC(masked, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(masked(X), Y % 2 * 2).backward()
        optimizer.step()
    assert optimizer.counters["failed_refreshes"] == 0
    assert all(p.isfinite().all() for p in model.parameters())


class Mask(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, z):
        return z + self.mask


def test_without_any_curvature_nothing_moves_and_that_is_said():
    model = nn.Sequential(net(), Mask(torch.tensor([0.0, 0.0, math.inf])))
    optimizer = KFAC(model, lr=0.1, likelihood="gaussian")
    before = [p.detach().clone() for p in model.parameters()]
    model(X)[:, :2].sum().backward()
    with pytest.warns(SmallfryWarning, match="steps are skipped"):
        optimizer.step()
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old)
    assert optimizer.counters["skipped_steps"] == 1


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_a_layer_first_called_between_two_inversions_is_inverted_at_once(kind):
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.extra = net(), nn.Linear(3, 3)
            self.late = False

        def forward(self, x):
            z = self.body(x)
            return self.extra(z) if self.late else z

    model = Late()
    optimizer = kind(model, lr=0.1, burn_in=0, statistics_every=1, inverse_every=10)
    once(model, optimizer, cross_entropy("mean"))
    model.late = True
    before = model.extra.weight.detach().clone()
    once(model, optimizer, cross_entropy("mean"))
    assert not torch.equal(model.extra.weight, before)
    assert model.extra.weight.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "one", "other"),
    [
        (KFAC, {}, {"damping_split": "tikhonov"}),
        (KFAC, {}, {"factor_rank": 2}),
        (EKFAC, {}, {"sharing": "reduce"}),
        (EKFAC, {}, {"factor_rank": None}),
        (ExactNG, {}, {"scope": "block"}),
    ],
)
def test_a_state_made_with_other_settings_is_refused(kind, one, other):
    model = net()
    optimizer = kind(model, **one)
    once(model, optimizer, cross_entropy("mean"))
    with pytest.raises(UsageError, match="the state was made with"):
        kind(net(), **other).load_state_dict(optimizer.state_dict())


def test_a_state_from_before_a_setting_existed_is_one_without_it():
    once(model := net(), optimizer := EKFAC(model, factor_rank=None), cross_entropy("mean"))
    state = optimizer.state_dict()
    del state["settings"]["factor_rank"]
    EKFAC(net(), factor_rank=None).load_state_dict(state)
    with pytest.raises(UsageError, match="the state was made with factor_rank=None"):
        EKFAC(net()).load_state_dict(state)


def test_what_is_unfrozen_later_is_announced():
    model = net()
    model[0].weight.requires_grad_(False)
    optimizer = KFAC(model, statistics_every=1)
    assert "frozen" in str(optimizer.summary())
    once(model, optimizer, cross_entropy("mean"))
    model[0].weight.requires_grad_(True)
    with pytest.warns(SmallfryWarning, match=r"'0.weight' was frozen"):
        once(model, optimizer, cross_entropy("mean"))


def test_a_weight_penalty_in_the_loss_is_refused_named_or_allowed():
    def penalized(check):
        torch.manual_seed(1)
        model = net()
        optimizer = KFAC(model, check=check)
        penalty = 5 * sum((p**2).sum() for p in model.parameters())
        (F.cross_entropy(model(X), Y) + penalty).backward()
        optimizer.step()

    with pytest.raises(UsageError, match="check='off'"):
        penalized("error")
    with pytest.warns(SmallfryWarning, match="the loss has a term of the weights"):
        penalized("warn")
    penalized("off")


def test_gradients_that_are_nothing_but_rounding_are_accepted():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
    model[0].weight.requires_grad_(False)
    optimizer = KFAC(model, lr=0.1)
    optimizer.zero_grad()
    F.cross_entropy(model(torch.randn(16, 1, 4, 4)), Y).backward()
    optimizer.step()


def test_a_bias_of_two_weights_is_left_to_adamw():
    model = net()
    model[2] = nn.Linear(5, 5)
    model[2].bias = model[0].bias
    model.append(nn.Linear(5, 3))
    optimizer = KFAC(model, lr=0.1)
    assert "shared by layers with different weights" in optimizer.uncovered["0.bias"]
    once(model, optimizer, cross_entropy("mean"))


@pytest.mark.parametrize("kind", [KFAC, EKFAC, ExactNG])
def test_a_model_in_bfloat16_is_trained(kind):
    torch.manual_seed(1)
    model = net().bfloat16()
    optimizer = kind(model, lr=0.1)
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(model(X.bfloat16()).float(), Y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_the_first_steps_are_safe_even_on_the_curvature_of_one_batch_alone():
    def rise(burn_in):
        torch.manual_seed(0)
        x = torch.randn(600, 40) @ torch.randn(40, 40)
        y = x[:, :4].argmax(1)
        model = nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 4))
        optimizer = KFAC(model, lr=0.1, damping=0.01, burn_in=burn_in, statistics_every=10)
        first = worst = 0.0
        for i in range(10):
            part = slice(20 * i, 20 * i + 20)
            loss = F.cross_entropy(model(x[part]), y[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            first = first or float(loss.detach())
            worst = max(worst, float(loss.detach()))
        assert optimizer.counters["statistics"] == max(1, burn_in)
        return worst / first

    assert rise(10) < 1.5
    assert rise(0) < 1.5
