"""The Fisher of stable-max against autograd and enumeration, and training with it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from smallfry.cli import main
from smallfry.curvature import as_likelihood
from smallfry.curvature.likelihoods import Categorical
from smallfry.curvature.stablemax import StableMax, log_stable
from smallfry.optim import EKFAC, KFAC
from smallfry.tasks.puzzle import cell_losses, log_stablemax


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(4, 2, 5, dtype=torch.float64, generator=generator)


def scores(z):
    """Gradients of −log p of every class, (classes, classes), and the probabilities."""
    z = z.clone().requires_grad_()
    log_p = log_stable(z).log_softmax(-1)
    rows = [torch.autograd.grad(-each, z, retain_graph=True)[0] for each in log_p]
    return torch.stack(rows), log_p.detach().exp()


def dense_fisher(z):
    g, p = scores(z)
    return torch.einsum("k,ki,kj->ij", p, g, g)


def test_the_logarithm_is_that_of_the_definition():
    z = torch.linspace(-9, 9, 37, dtype=torch.float64)
    s = torch.where(z < 0, 1 / (1 - z), z + 1)
    torch.testing.assert_close(log_stable(z).exp(), s, rtol=1e-14, atol=0)


@pytest.mark.parametrize("value", [-1e6, -1.0, -1e-12, 0.0, 1e-12, 1.0, 1e6])
def test_its_slope_is_one_over_one_and_the_size(value):
    z = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    log_stable(z).backward()
    assert z.grad.item() == pytest.approx(1 / (1 + abs(value)), rel=1e-12)


def test_a_head_that_begins_at_zero_has_a_gradient():
    outputs = torch.zeros(2, 4, 5, requires_grad=True)
    cell_losses(outputs, torch.ones(2, 4, dtype=torch.int64)).sum().backward()
    wanted = F.one_hot(torch.ones(2, 4, dtype=torch.int64), 5)
    torch.testing.assert_close(outputs.grad, (0.2 - wanted) / 4)


def test_columns_are_a_root_of_the_fisher(logits):
    found = torch.zeros(4, 10, 10, dtype=torch.float64)
    for (column,) in StableMax(-1).columns((logits,)):
        flat = column.reshape(4, 10)
        found += flat[:, :, None] * flat[:, None, :]
    for sample in range(4):
        wanted = torch.block_diag(*(dense_fisher(z) for z in logits[sample]))
        torch.testing.assert_close(found[sample], wanted, rtol=1e-12, atol=1e-14)


def test_products_are_those_of_the_fisher(logits):
    tangents = torch.randn_like(logits)
    (found,) = StableMax(-1).hessian_product((logits,), (tangents,))
    for place in range(4):
        for cell in range(2):
            wanted = dense_fisher(logits[place, cell]) @ tangents[place, cell]
            torch.testing.assert_close(found[place, cell], wanted, rtol=1e-12, atol=1e-14)


def test_sampled_gradients_are_those_of_classes_by_their_probability():
    z = torch.tensor([0.5, -2.0, 1.0, -0.25], dtype=torch.float64)
    g, p = scores(z)
    generator = torch.Generator().manual_seed(1)
    (drawn,) = StableMax(-1).sample_gradients((z.expand(20_000, 4),), generator)
    distances = torch.cdist(drawn, g, compute_mode="donot_use_mm_for_euclid_dist")
    assert float(distances.min(1).values.max()) < 1e-12
    shares = distances.argmin(1).bincount(minlength=4) / 20_000
    torch.testing.assert_close(shares.double(), p, rtol=0, atol=0.02)


def test_the_divergence_is_that_of_the_probabilities(logits):
    after = logits + 0.1 * torch.randn_like(logits)
    p, q = (log_stablemax(z).exp() for z in (logits, after))
    wanted = (p * (p / q).log()).sum((1, 2))
    found = StableMax(-1).divergence((logits,), (after,))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)
    half = StableMax(-1).divergence((logits,), (after,), [torch.tensor(0.5).expand(4, 2, 1)])
    torch.testing.assert_close(half, wanted / 2, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("factor", [1.0, 0.5, 1 / 7])
def test_the_factor_of_a_loss_is_read_off_its_gradient(factor, logits):
    z = logits.clone().requires_grad_()
    targets = torch.arange(8).view(4, 2) % 5
    loss = factor * -log_stablemax(z).gather(-1, targets[..., None]).sum()
    (gradient,) = torch.autograd.grad(loss, z)
    scale = StableMax(-1).loss_factor((logits,), (gradient,))
    assert scale.factor == pytest.approx(factor, rel=1e-6)
    other = Categorical(-1).loss_factor((logits,), (gradient,))
    assert other is None or not other.fits


def test_rows_without_a_gradient_have_no_weight(logits):
    z = logits.clone().requires_grad_()
    rows = -log_stablemax(z)[..., 0]
    (gradient,) = torch.autograd.grad((rows * torch.tensor([[1.0, 0.0]])).sum(), z)
    (weights, *_) = StableMax(-1).row_weights((logits,), 0, gradient)
    weights = weights.reshape(4, 2)
    assert weights[:, 1].abs().max() == 0
    assert weights[:, 0].min() > 0


def test_numbers_that_are_not_finite_are_no_density(logits):
    assert StableMax().is_density((logits,))
    logits[0, 0, 0] = -torch.inf  # an impossible class to softmax, no number to stable-max
    assert Categorical().is_density((logits,))
    assert not StableMax().is_density((logits,))


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_natural_gradient_descends_on_a_stable_max_loss(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4))
    inputs = torch.randn(64, 6)
    targets = (inputs[:, 0] > 0).long() + 2 * (inputs[:, 1] > 0).long()
    optimizer = kind(model, lr=0.1, likelihood="stablemax")
    losses = []
    for _ in range(40):
        loss = F.nll_loss(log_stablemax(model(inputs)), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert optimizer.divergence_ratio >= 1
    assert optimizer.counters["measurements"] > 0


def test_the_name_is_known():
    assert isinstance(as_likelihood("stablemax"), StableMax)


def test_a_puzzle_trains_with_natural_gradient(tmp_path, capsys):
    words = ["--task", "puzzle", "--data", "sudoku4", "--data.limit", "64", "--epochs", "1"]
    options = ["--optimizer", "kfac", "--batch_size", "32", "--progress", "quiet"]
    assert main(["train", *words, *options, "--run", str(tmp_path / "run")]) == 0, capsys
    assert (tmp_path / "run" / "summary.json").is_file()
