"""Confident predictions are read through the rounding of their probabilities."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from smallfry.curvature.composite_likelihoods import Joint
from smallfry.curvature.likelihoods import Bernoulli, Categorical, Gaussian
from smallfry.errors import UsageError
from smallfry.optim import KFAC

SAMPLES = 6


class Probabilities(nn.Sequential):
    def forward(self, x):
        return super().forward(x).sigmoid()


class Halting(nn.Sequential):
    def forward(self, x):
        z = super().forward(x)
        return {"logits": z[:, :-1], "halt": z[:, -1]}


def classes(z, target):
    return {
        "right": z.argmax(-1),
        "wrong": z.argmin(-1),
        "random": torch.randint(z.shape[-1], z.shape[:1]),
    }[target]


def bits(p, target):
    right = p > 0.5
    drawn = {"right": right, "wrong": ~right, "random": torch.rand_like(p) > 0.5}
    return drawn[target].to(p).detach()


def cross_entropy(z, target, reduction):
    return F.cross_entropy(z, classes(z, target), reduction=reduction)


def smoothed(z, target, reduction):
    return F.cross_entropy(z, classes(z, target), reduction=reduction, label_smoothing=0.1)


def binary(z, target, reduction):
    y = bits(z.sigmoid(), target)
    return F.binary_cross_entropy_with_logits(z, y, reduction=reduction)


def binary_of_probabilities(p, target, reduction):
    return F.binary_cross_entropy(p, bits(p, target), reduction=reduction)


def squares(z, target, reduction):
    distance = {"right": 0.0, "wrong": 100.0, "random": 1.0}[target]
    return F.mse_loss(z, z.detach() + distance, reduction=reduction)


def halting(z, target, reduction):
    y = classes(z["logits"], target)
    right = (z["logits"].argmax(-1) == y).to(z["halt"])
    return F.cross_entropy(z["logits"], y, reduction=reduction) + (
        F.binary_cross_entropy_with_logits(z["halt"], right, reduction=reduction)
    )


CASES = {
    "categorical": (nn.Sequential, Categorical, cross_entropy),
    "categorical, hard": (nn.Sequential, lambda: Categorical(hard=True), cross_entropy),
    "categorical, smoothed": (nn.Sequential, Categorical, smoothed),
    "bernoulli": (nn.Sequential, Bernoulli, binary),
    "bernoulli of probabilities": (
        Probabilities, lambda: Bernoulli("probabilities"), binary_of_probabilities
    ),
    "gaussian": (nn.Sequential, Gaussian, squares),
    "joint": (Halting, lambda: Joint({"logits": Categorical(), "halt": Bernoulli()}), halting),
}  # fmt: skip


def network(kind, size, outputs=3, dtype=torch.float32):
    layer = nn.Linear(4, outputs)
    with torch.no_grad():
        layer.weight.mul_(size)
        layer.bias.mul_(size)
    return kind(layer).to(dtype)


def check(kind, likelihood, loss, size, target, reduction, dtype=torch.float32, scale=None):
    model = network(kind, size, dtype=dtype)
    default = 1.0 if kind is Halting and reduction == "mean" else reduction
    optimizer = KFAC(model, lr=1e-3, likelihood=likelihood(), loss_scale=scale or default)
    loss(model(torch.randn(SAMPLES, 4, dtype=dtype)), target, reduction).backward()
    optimizer.step()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("size", [10.0, 27.0, 200.0])
@pytest.mark.parametrize("case", CASES)
def test_the_right_loss_is_accepted_at_any_size_of_the_logits(case, size, reduction):
    for target in ("right", "wrong", "random"):
        for seed in range(2):
            torch.manual_seed(seed)
            with warnings.catch_warnings():
                # smoothed targets of certain predictions do look like a small loss
                warnings.filterwarnings("ignore", ".*or of targets near the predictions")
                check(*CASES[case], size, target, reduction)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["categorical", "bernoulli", "joint"])
def test_so_it_is_in_half_precision(case, dtype):
    for size in (1.0, 27.0, 500.0):
        for target in ("right", "random"):
            check(*CASES[case], size, target, "mean", dtype)


@pytest.mark.parametrize("case", ["categorical", "bernoulli", "bernoulli of probabilities"])
@pytest.mark.parametrize("size", [10.0, 27.0])
def test_a_wrong_scale_is_still_refused(case, size):
    with pytest.raises(UsageError, match=r"times the mean over samples"):
        check(*CASES[case], size, "wrong", "sum", scale=1.0)


def test_another_likelihood_is_still_refused():
    kind, likelihood, _ = CASES["categorical"]
    with pytest.raises(UsageError, match="'categorical' does not fit the loss"):
        check(kind, likelihood, squares, 60.0, "random", "mean", scale=1.0)
    # a gradient of one sign, ten times as large as rounding explains
    z = torch.tensor([[60.0, 0.0, 0.0]] * 4)
    found = Categorical().loss_factor((z,), (torch.full_like(z, 1e-5),))
    assert found is not None
    assert not found.fits


def test_rounding_is_allowed_for_at_the_stated_scale():
    z = torch.tensor([[60.0, 0.0, 0.0], [0.0, 0.0, 50.0]])
    noise = torch.tensor([[6e-8, 0.0, 0.0], [0.0, 0.0, -6e-8]])
    assert Categorical().loss_factor((z,), (noise,)) is None
    wrong = Categorical().loss_factor((z,), (noise * 1e4,))
    assert wrong is not None
    assert not wrong.fits
    assert Categorical().loss_factor((z,), (noise * 1e4,), stated=1e4) is None
    assert Bernoulli().loss_factor((z,), (noise,)) is None


def test_targets_equal_to_the_predictions_are_no_error():
    model = network(nn.Sequential, 3.0)
    optimizer = KFAC(model, lr=1e-3)
    x = torch.randn(SAMPLES, 4)
    F.cross_entropy(model(x), model(x).detach().softmax(-1)).backward()
    optimizer.step()


def test_a_row_whose_gradient_underflows_counts_in_the_mean():
    z = torch.tensor([[200.0, 0.0, 0.0], [0.3, -0.2, 0.1], [0.0, 0.2, 300.0]], requires_grad=True)
    (g,) = torch.autograd.grad(F.cross_entropy(z, torch.tensor([0, 1, 2])), z)
    assert g[0].abs().max() == 0
    read = Categorical().row_weights((z.detach(),), 0, g)
    assert read.values is None
    assert read.unit == pytest.approx(1 / 3, rel=1e-5)
    # a padding row is told by its uncertain prediction
    (g,) = torch.autograd.grad(F.cross_entropy(z, torch.tensor([0, -100, 0])), z)
    assert Categorical().row_weights((z.detach(),), 0, g).values.flatten().tolist() == [1, 0, 1]
    # stated hard, a row without a gradient has no weight, as of old
    (g,) = torch.autograd.grad(F.cross_entropy(z, torch.tensor([0, 1, 2])), z)
    read = Categorical(hard=True).row_weights((z.detach(),), 0, g)
    assert read.values.flatten().tolist() == [0, 1, 0]


def test_unequal_weights_are_read_beside_a_row_that_underflows():
    z = torch.tensor([[200.0, 0.0, 0.0], [0.3, -0.2, 0.1], [0.5, 0.2, 0.0]], requires_grad=True)
    weights = torch.tensor([1.0, 3.0, 1.0])
    losses = F.cross_entropy(z, torch.tensor([0, 1, 2]), reduction="none")
    (g,) = torch.autograd.grad((weights * losses).mean(), z)
    read = Categorical().row_weights((z.detach(),), 0, g)
    torch.testing.assert_close(read.values.flatten(), torch.tensor([1.0, 1.5, 0.5]))
    assert read.unit == pytest.approx(2 / 3)


def test_probabilities_within_the_bound_of_pytorchs_division_are_left_out():
    p = torch.tensor([[1e-20], [0.25]], requires_grad=True)
    (g,) = torch.autograd.grad(F.binary_cross_entropy(p, torch.ones(2, 1)), p)
    found = Bernoulli("probabilities").loss_factor((p.detach(),), (g * 2,))
    assert found.factor == pytest.approx(1.0)
    assert found.even


def test_smoothed_targets_of_certain_predictions_are_not_taken_for_certain():
    z = torch.tensor([[300.0, 0.0, 0.0]] * 4, requires_grad=True)
    y = torch.zeros(4, dtype=torch.int64)
    (g,) = torch.autograd.grad(F.cross_entropy(z, y, label_smoothing=0.1), z)
    found = Categorical().loss_factor((z.detach(),), (g * 4,))
    assert found.factor == pytest.approx(0.2 / 3, rel=1e-4)
    assert found.fits
    assert not found.hard
