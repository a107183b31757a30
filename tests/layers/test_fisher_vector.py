"""Fisher vectors are scaled gradients of the log-likelihood, and agree with reference numbers."""

import json
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from smallfry.errors import UsageError
from smallfry.layers.fisher_vector import (
    FisherVector,
    Mixture,
    fisher_vector,
    fit_mixture,
    log_joint,
    normalized,
    sums_of,
)

FACTS = json.loads((Path(__file__).parent / "fisher_vector.json").read_text())
K, D, N = FACTS["K"], FACTS["D"], FACTS["N"]
NEAR = {"atol": 1e-9, "rtol": 0}


def said(name, *shape):
    return torch.tensor(FACTS[name], dtype=torch.float64).view(*shape)


def s(name, *shape):
    count = int(np.prod(shape))
    h = np.arange(1, count + 1, dtype=np.uint64) * 0x9E3779B1
    h = (h + zlib.crc32(name.encode()) * 0x85EBCA6B) & 0xFFFFFFFF
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39), (15, 1)):
        h = ((h ^ (h >> np.uint64(shift))) * factor) & 0xFFFFFFFF
    return torch.from_numpy(h / 2**31 - 1).view(*shape)


@pytest.fixture
def mixture():
    variances = 1 + 0.5 * s("gmm.variances", K, D)
    return Mixture(said("weights", K).log(), 1.5 * s("gmm.means", K, D), variances.log() / 2)


@pytest.fixture
def descriptors():
    return 2 * s("descriptors", N, D)


def test_likelihoods_posteriors_and_vectors_are_the_references(mixture, descriptors):
    joint = log_joint(descriptors, mixture)
    near = {"atol": 1e-8, "rtol": 1e-9}  # of the digits that are stored
    assert_close(joint.logsumexp(1), said("log_likelihood", N), **near)
    posteriors = joint.softmax(1)
    assert_close(posteriors, said("posteriors", N, K), **NEAR)
    wanted = torch.cat([said("phi_mean", -1), said("phi_variance", -1)])
    found = fisher_vector(sums_of(descriptors, posteriors), mixture, N)
    assert_close(found, wanted, **NEAR)
    rooted = said("fisher_mean_then_variance_signed_sqrt_l2", -1)
    assert_close(normalized(found), rooted, **NEAR)
    hard = torch.nn.functional.one_hot(posteriors.argmax(1), K).double()
    firm = fisher_vector(sums_of(descriptors, hard), mixture, N)
    parts = FACTS["hard_assignment"]
    wanted = torch.tensor(parts["phi_mean"] + parts["phi_variance"], dtype=torch.float64)
    assert_close(firm, wanted, **NEAR)


def test_moments_give_the_plain_form_and_the_gradient_of_the_likelihood(mixture, descriptors):
    weights, sigma = mixture.logits.softmax(0), mixture.log_sigma.exp()
    q = log_joint(descriptors, mixture).softmax(1)
    u = (descriptors[:, None] - mixture.means) / sigma
    plain_mean = (q[..., None] * u).mean(0) / weights.sqrt()[:, None]
    plain_variance = (q[..., None] * (u**2 - 1)).mean(0) / (2 * weights).sqrt()[:, None]
    found = fisher_vector(sums_of(descriptors, q), mixture, N)
    assert_close(found, torch.cat([plain_mean.flatten(), plain_variance.flatten()]))

    means, own_sigma = (part.clone().requires_grad_() for part in (mixture.means, sigma))
    normal = torch.distributions.Independent(torch.distributions.Normal(means, own_sigma), 1)
    density = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(weights), normal
    )
    likelihood = density.log_prob(descriptors)
    assert_close(likelihood, log_joint(descriptors, mixture).logsumexp(1))
    by_mean, by_sigma = torch.autograd.grad(likelihood.mean(), [means, own_sigma])
    scale = sigma / weights.sqrt()[:, None]
    scores = torch.cat([(by_mean * scale).flatten(), (by_sigma * scale / 2**0.5).flatten()])
    assert_close(found, scores, atol=1e-13, rtol=1e-12)


def layer(mixture, **settings):
    pool = FisherVector(D, K, **settings).double()
    with torch.no_grad():
        for own, given in zip(pool.mixture, mixture, strict=True):
            own.copy_(given)
    return pool


def test_the_layer_pools_sets_and_maps_whatever_their_order(mixture, descriptors):
    pool = layer(mixture).eval()
    batch = torch.stack([descriptors, descriptors.flip(0), descriptors + 1])
    found = pool(batch)
    assert found.shape == (3, pool.num_features) == (3, 2 * K * D)
    assert_close(found[0], said("fisher_mean_then_variance_signed_sqrt_l2", -1), **NEAR)
    assert_close(found[1], found[0])
    maps = batch.transpose(1, 2).view(3, D, 2, 5)
    assert_close(pool(maps), found)
    assert_close(found.norm(dim=1), torch.ones(3).double())
    assert_close(pool.train()(batch), found, atol=1e-3, rtol=0)
    for wrong in (torch.zeros(2, 3), torch.zeros(2, 5, D + 1)):
        with pytest.raises(ValueError, match=f"expected descriptors of {D} features"):
            pool(wrong)
    with pytest.raises(ValueError, match="at least 1"):
        FisherVector(0, 2)


def test_gradients_are_finite_and_right(mixture, descriptors):
    pool = layer(mixture)
    inputs = descriptors[None].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: layer(mixture, normalize=False)(x), (inputs,))
    assert torch.autograd.gradcheck(pool, (inputs,), atol=1e-4)
    pool(inputs).sum().backward()
    assert all(p.grad.isfinite().all() for p in pool.parameters())
    still = torch.zeros(1, N, D, dtype=torch.float64, requires_grad=True)
    centred = layer(mixture._replace(means=torch.zeros(K, D).double()))
    centred(still).sum().backward()  # mean parts are exactly 0
    assert still.grad.isfinite().all()
    fixed = layer(mixture, trainable=False)
    assert not any(p.requires_grad for p in fixed.parameters())


def test_expectation_maximisation_climbs_to_the_components():
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [6.0, 0.0], [0.0, 6.0]]).double()
    which = torch.randint(3, (900,), generator=generator)
    noise = torch.randn(900, 2, generator=generator).double() * torch.tensor([0.5, 1.0]).double()
    points = centres[which] + noise
    mixture, climbed = fit_mixture(points, 3, generator=generator)
    assert all(b >= a - 1e-10 for a, b in pairwise(climbed))
    assert climbed[-1] > climbed[0] + 0.5
    order = torch.cdist(centres, mixture.means).argmin(1)
    assert sorted(order.tolist()) == [0, 1, 2]
    assert_close(mixture.means[order], centres, atol=0.2, rtol=0)
    sigma = mixture.log_sigma.exp().mean(0)
    assert_close(sigma, torch.tensor([0.5, 1.0]).double(), atol=0.1, rtol=0)
    again, _ = fit_mixture(points, 3, generator=torch.Generator().manual_seed(5))
    other, _ = fit_mixture(points, 3, generator=torch.Generator().manual_seed(5))
    assert all(torch.equal(a, b) for a, b in zip(again, other, strict=True))
    pool = FisherVector(2, 3, normalize=False).double()
    pool.fit(points, generator=torch.Generator().manual_seed(5))
    assert_close(pool.means.detach(), again.means)
    assert pool(points[None]).abs().max() < 1e-2  # a maximum of the likelihood has no gradient


def test_equal_descriptors_and_too_few_are_handled():
    mixture, _ = fit_mixture(torch.ones(10, 2), 3)
    assert all(part.isfinite().all() for part in mixture)
    with pytest.raises(UsageError, match="2 descriptors are too few for 3 components"):
        fit_mixture(torch.ones(2, 2), 3)
    with pytest.raises(UsageError, match="finite"):
        fit_mixture(torch.full((5, 2), torch.nan), 3)


def test_far_from_the_origin_single_precision_keeps_its_digits(mixture, descriptors):
    moved = mixture._replace(means=mixture.means + 1000)
    found = log_joint((descriptors + 1000).float(), Mixture(*(p.float() for p in moved)))
    assert_close(found.double(), log_joint(descriptors, mixture), atol=1e-2, rtol=1e-2)
