"""Weighted parts of a loss: their Fisher, divergence and factor beside the inner likelihood's."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from smallfry.curvature import as_likelihood
from smallfry.curvature.composite_likelihoods import Joint
from smallfry.curvature.likelihoods import Bernoulli, Categorical, Gaussian
from smallfry.curvature.scaled import Scaled
from smallfry.errors import UsageError
from smallfry.optim import KFAC

INNER = {
    "categorical": (Categorical(-1), (3, 4)),
    "positions": (Categorical(-1), (3, 5, 4)),
    "bernoulli": (Bernoulli(), (3, 4)),
    "gaussian": (Gaussian(2.0), (3, 4)),
}


@pytest.fixture(params=INNER)
def case(request):
    inner, shape = INNER[request.param]
    z = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return inner, z


def fisher(likelihood, z):
    rows = [column[0].flatten(1) for column in likelihood.columns((z,))]
    return sum(row[:, :, None] * row[:, None, :] for row in rows)


@pytest.mark.parametrize("factor", [0.5, 3.0, "mean"])
def test_curvature_and_divergence_have_the_factor(factor, case):
    inner, z = case
    found = Scaled(inner, factor)
    c = inner.mean_factor((z,)) if factor == "mean" else factor
    torch.testing.assert_close(fisher(found, z), c * fisher(inner, z), rtol=1e-12, atol=1e-14)
    u, new = torch.randn_like(z), z + 0.1
    torch.testing.assert_close(
        found.hessian_product((z,), (u,))[0], c * inner.hessian_product((z,), (u,))[0]
    )
    torch.testing.assert_close(
        found.divergence((z,), (new,)), c * inner.divergence((z,), (new,)), rtol=1e-12, atol=0
    )
    assert found.targets((z,), (None,)) == pytest.approx(c * inner.targets((z,), (None,)))
    assert found.mean_factor((z,)) == pytest.approx(inner.mean_factor((z,)) / c)
    assert found.select(z) == (z,)
    assert found.is_density((z,))


def test_sampled_gradients_have_the_root(case):
    inner, z = case
    first, second = (torch.Generator().manual_seed(3) for _ in range(2))
    (found,) = Scaled(inner, 0.25).sample_gradients((z,), first)
    (wanted,) = inner.sample_gradients((z,), second)
    torch.testing.assert_close(found, 0.5 * wanted)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_the_factor_of_the_whole_loss_is_what_is_left(factor):
    z = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.arange(6) % 4
    loss = 3 * factor * F.cross_entropy(z, targets, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, z)
    scale = Scaled(Categorical(-1), factor).loss_factor((z.detach(),), (gradient,))
    assert scale.factor == pytest.approx(3.0, rel=1e-6)
    ones = Scaled(Categorical(-1), 3 * factor).row_weights((z.detach(),), 0, gradient)
    plain = Categorical(-1).row_weights((z.detach(),), 0, gradient / (3 * factor))
    assert ones == plain


@pytest.mark.parametrize("factor", [0, -1.0, float("nan")])
def test_a_factor_that_is_not_positive_is_refused(factor):
    with pytest.raises(UsageError, match="must be above 0"):
        Scaled(Categorical(), factor)


class TwoHeads(nn.Module):
    """Classes and a probability of one trunk."""

    def __init__(self):
        super().__init__()
        self.trunk, self.classes, self.yes = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(8, 1)

    def forward(self, inputs):
        rows = self.trunk(inputs).tanh()
        return {"classes": self.classes(rows), "yes": self.yes(rows)}


def descend(likelihood):
    torch.manual_seed(0)
    model, inputs = TwoHeads(), torch.randn(64, 5)
    targets, yes = (inputs[:, 0] > 0).long(), (inputs[:, 1:2] > 0).float()
    optimizer = KFAC(model, lr=0.1, likelihood=likelihood)
    for _ in range(30):
        output = model(inputs)
        loss = F.cross_entropy(output["classes"], targets)
        loss = loss + 0.5 * F.binary_cross_entropy_with_logits(output["yes"], yes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_a_loss_with_a_weighted_part_trains_and_is_refused_without_its_weight():
    parts = {"classes": "categorical", "yes": Scaled(Bernoulli(), 0.5)}
    assert descend(parts) < 0.3
    with pytest.raises(UsageError, match="likelihood does not fit the loss"):
        descend({"classes": "categorical", "yes": "bernoulli"})


def test_it_is_a_part_of_joint_likelihoods():
    z, y = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
    joint = Joint({0: Categorical(-1), 1: Scaled(Bernoulli(), 0.5)})
    outputs = joint.select((z, y))
    blocks = sum(
        torch.cat(column, 1)[:, :, None] * torch.cat(column, 1)[:, None, :]
        for column in joint.columns(outputs)
    )
    assert blocks[0, 3, 3].item() == pytest.approx(0.125)
    assert blocks[0, 0, 0].item() == pytest.approx(2 / 9)
    kept = joint.of_last()
    assert isinstance(kept.parts[1], Scaled)
    assert isinstance(as_likelihood("stablemax_mean"), Scaled)


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("categorical_mean", lambda z: F.cross_entropy(z, z.detach().softmax(1))),
        (
            "bernoulli_mean",
            lambda z: F.binary_cross_entropy_with_logits(z, z.detach().sigmoid()),
        ),
        ("gaussian_mean", lambda z: F.mse_loss(z, z.detach())),
    ],
)
def test_named_means_have_the_curvature_of_pytorchs_losses_on_maps(name, loss):
    torch.manual_seed(0)
    maps = torch.randn(1, 3, 2, 2, dtype=torch.float64)
    wanted = torch.autograd.functional.hessian(loss, maps).reshape(12, 12)
    columns = [column[0].reshape(12) for column in as_likelihood(name).columns((maps,))]
    found = sum(torch.outer(column, column) for column in columns)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)
