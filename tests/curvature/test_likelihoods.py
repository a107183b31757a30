"""Likelihoods against torch.distributions, autograd and each other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributions as td
from torch.nn import functional as F

from smallfry.curvature import Bernoulli, Categorical, Gaussian, as_likelihood
from smallfry.errors import UsageError

D = torch.float64
TABLE = {
    "categorical": (Categorical(), lambda z: td.Categorical(logits=z), (4,)),
    "categorical, positions": (
        Categorical(dim=1),
        lambda z: td.Independent(td.Categorical(logits=z.movedim(1, -1)), 1),
        (3, 2),
    ),
    "bernoulli": (Bernoulli(), lambda z: td.Independent(td.Bernoulli(logits=z), 1), (3,)),
    "bernoulli of probabilities": (
        Bernoulli("probabilities"),
        lambda z: td.Independent(td.Bernoulli(probs=z), 1),
        (3,),
    ),
    "gaussian": (Gaussian(0.25), lambda z: td.Independent(td.Normal(z, 0.5), 1), (3,)),
}


def outputs(case, samples=2):
    z = torch.randn(samples, *TABLE[case][2], dtype=D)
    return z.sigmoid() if "probabilities" in case else z


def second_moment(gradients):
    g = torch.stack([g[0].flatten(1) for g in gradients])
    return torch.einsum("kni,knj->nij", g, g)


def fisher_by_autograd(case, z):
    """E[g gᵀ] at each sample's output: the Hessian of the divergence to a copy."""
    blocks = []
    for one in z:
        still = one.detach()[None]

        def divergence(w, still=still):
            density = TABLE[case][1]
            return td.kl_divergence(density(still), density(w[None])).sum()

        hessian = torch.autograd.functional.hessian(divergence, one)
        blocks.append(hessian.reshape(one.numel(), -1))
    return torch.stack(blocks)


@pytest.mark.parametrize("case", TABLE)
def test_the_columns_square_to_the_fisher_at_the_output(case):
    z = outputs(case)
    exact = fisher_by_autograd(case, z)
    torch.testing.assert_close(second_moment(TABLE[case][0].columns((z,))), exact)
    u = torch.randn_like(z)
    product = TABLE[case][0].hessian_product((z,), (u,))[0].flatten(1)
    torch.testing.assert_close(product, torch.einsum("nij,nj->ni", exact, u.flatten(1)))


@pytest.mark.parametrize("case", TABLE)
def test_sampled_gradients_average_to_zero_and_square_to_the_fisher(case):
    likelihood, z, draws = TABLE[case][0], outputs(case, 1), 20_000
    generator = torch.Generator().manual_seed(0)
    many = z.expand(draws, *z.shape[1:])
    g = likelihood.sample_gradients((many,), generator)[0].flatten(1)
    exact = fisher_by_autograd(case, z)[0]
    spread = exact.diagonal().sqrt()
    assert (g.mean(0).abs() < 5 * spread / draws**0.5).all()
    assert torch.linalg.norm(g.T @ g / draws - exact) < 0.05 * torch.linalg.norm(exact)


@pytest.mark.parametrize("case", TABLE)
def test_any_distribution_gives_the_same_fisher_as_the_named_one(case):
    z, draws = outputs(case, 1), 20_000
    likelihood = as_likelihood(TABLE[case][1])
    many = likelihood.select(z.expand(draws, *z.shape[1:]).clone())
    g = likelihood.sample_gradients(many, torch.Generator().manual_seed(0))[0].flatten(1)
    exact = fisher_by_autograd(case, z)[0]
    assert torch.linalg.norm(g.T @ g / draws - exact) < 0.05 * torch.linalg.norm(exact)


@pytest.mark.parametrize("case", TABLE)
def test_the_divergence_is_that_of_the_distributions(case):
    before, after = outputs(case), outputs(case)
    likelihood, density, _ = TABLE[case]
    expected = td.kl_divergence(density(before), density(after))
    torch.testing.assert_close(likelihood.divergence((before,), (after,)), expected)


@pytest.mark.parametrize("likelihood", [Bernoulli(), Gaussian()])
def test_a_single_output_may_lack_its_dimension(likelihood):
    z, moved = torch.randn(4, 1, dtype=D), torch.randn(4, 1, dtype=D)
    found = likelihood.divergence((z[:, 0],), (moved[:, 0],))
    torch.testing.assert_close(found, likelihood.divergence((z,), (moved,)))
    (column,) = [c[0] for c in likelihood.columns((z[:, 0],))]
    assert torch.equal(column, next(likelihood.columns((z,)))[0][:, 0])


def test_the_users_random_numbers_are_not_touched():
    z = outputs("categorical")
    for likelihood in (Categorical(), as_likelihood(lambda z: td.Categorical(logits=z))):
        state = torch.get_rng_state()
        likelihood.sample_gradients(likelihood.select(z), torch.Generator().manual_seed(0))
        assert torch.equal(torch.get_rng_state(), state)


def test_parts_of_an_output_are_independent():
    joint = as_likelihood({"logits": "categorical", 1: Bernoulli()})

    class Output(tuple):
        logits = property(lambda self: self[0])

    z = joint.select(Output((torch.randn(2, 3, dtype=D), torch.randn(2, 1, dtype=D))))
    columns = list(joint.columns(z))
    g = torch.stack([torch.cat(c, 1) for c in columns])
    fisher = torch.einsum("kni,knj->nij", g, g)
    assert fisher[:, :3, 3].abs().max() == 0
    (alone,) = (torch.stack([c[0] for c in Categorical().columns((z[0],))]),)
    torch.testing.assert_close(fisher[:, :3, :3], torch.einsum("kni,knj->nij", alone, alone))
    with pytest.raises(UsageError, match="refers to part 'halting'"):
        as_likelihood({"halting": "bernoulli"}).select(Output(z))


LOSSES = {
    "categorical": lambda z, y: F.cross_entropy(z, y),
    "bernoulli": lambda z, y: F.binary_cross_entropy_with_logits(z, y, reduction="sum") / len(z),
}


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(sorted(LOSSES)), st.floats(0.01, 100), st.integers(2, 8))
def test_hard_targets_reveal_the_scale_of_the_loss(name, factor, classes):
    z = torch.randn(16, classes, dtype=D, requires_grad=True)
    if name == "categorical":
        y = torch.randint(classes, (16,))
    else:
        y = torch.randint(2, (16, classes)).to(D)
    (g,) = torch.autograd.grad(LOSSES[name](z, y) * factor, z)
    scale = as_likelihood(name).loss_factor((z.detach(),), (g * 16,))
    assert scale.factor == pytest.approx(factor)
    assert scale.hard
    assert scale.fits


@settings(deadline=None, max_examples=40)
@given(st.floats(0, 0.4), st.integers(2, 8))
def test_soft_targets_never_look_like_a_larger_loss(smoothing, classes):
    z = torch.randn(16, classes, dtype=D, requires_grad=True)
    y = torch.randint(classes, (16,))
    (g,) = torch.autograd.grad(F.cross_entropy(z, y, label_smoothing=smoothing), z)
    scale = Categorical().loss_factor((z.detach(),), (g * 16,))
    assert scale is None or scale.factor <= 1 + 1e-9


def test_gradients_that_no_class_probabilities_explain_do_not_fit():
    z = torch.randn(16, 4, dtype=D, requires_grad=True)
    (g,) = torch.autograd.grad(F.mse_loss(z, torch.randn_like(z)), z)
    assert not Categorical().loss_factor((z.detach(),), (g * 16,)).fits


@pytest.mark.parametrize("case", ["categorical, positions", "bernoulli", "gaussian"])
def test_pytorchs_mean_is_the_stated_factor(case):
    z = outputs(case).requires_grad_()
    likelihood, density, _ = TABLE[case]
    if case.startswith("categorical"):
        y = torch.randint(3, (2, 2))
        loss = F.cross_entropy(z, y)
    elif case == "bernoulli":
        y = torch.randint(2, (2, 3)).to(D)
        loss = F.binary_cross_entropy_with_logits(z, y)
    else:
        y = torch.randn(2, 3, dtype=D)
        loss = F.mse_loss(z, y)
    (mean,) = torch.autograd.grad(loss, z)
    (nll,) = torch.autograd.grad(-density(z).log_prob(y).mean(), z)
    torch.testing.assert_close(mean, nll * likelihood.mean_factor((z,)))


def test_wrong_likelihoods_are_named():
    with pytest.raises(UsageError, match="did you mean 'categorical'"):
        as_likelihood("categorial")
    with pytest.raises(UsageError, match="not int"):
        as_likelihood(3)
    with pytest.raises(UsageError, match="expects a model that returns a tensor, not tuple"):
        Categorical().select((torch.zeros(1),))
    with pytest.raises(UsageError, match="outside 0 … 1"):
        list(Bernoulli("probabilities").columns((torch.tensor([[2.0]]),)))
    bad = as_likelihood(lambda z: z)
    with pytest.raises(UsageError, match=r"torch\.distributions"):
        bad.sample_gradients(bad.select(torch.zeros(1, 2)), torch.Generator())
    with pytest.raises(UsageError, match="fisher='exact' needs"):
        list(as_likelihood(lambda z: td.Categorical(logits=z)).columns((torch.zeros(1, 2),)))
