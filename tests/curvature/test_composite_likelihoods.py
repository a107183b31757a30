"""Likelihoods of outputs with several parts, and of any distribution."""

from collections import namedtuple

import pytest
import torch
from torch import distributions as td
from torch.nn import functional as F

from smallfry.curvature.composite_likelihoods import FromDistribution, Joint, as_likelihood
from smallfry.curvature.likelihoods import Bernoulli, Categorical, Gaussian
from smallfry.errors import UsageError

D = torch.float64
Output = namedtuple("Output", "logits halt")


def joint():
    return Joint({"logits": Categorical(), "halt": Bernoulli()})


def output(samples=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Output(
        torch.randn(samples, 3, dtype=D, generator=generator),
        torch.randn(samples, dtype=D, generator=generator),
    )


FORMS = {
    "attributes": (lambda o: o, ("logits", "halt")),
    "keys": (lambda o: o._asdict(), ("logits", "halt")),
    "tuple": (tuple, (0, 1)),
    "list": (list, (0, 1)),
    "swapped": (lambda o: (o.halt, o.logits), (1, 0)),
    "nested": (lambda o: {"a": o.logits, 7: o.halt}, ("a", 7)),
}


@pytest.mark.parametrize("form", FORMS)
def test_parts_are_found_in_any_form(form):
    make, keys = FORMS[form]
    z = output()
    likelihood = Joint(dict(zip(keys, (Categorical(), Bernoulli()), strict=True)))
    found = likelihood.select(make(z))
    assert torch.equal(found[0], z.logits)
    assert torch.equal(found[1], z.halt)


@pytest.mark.parametrize("key", ["gone", 2, -9])
def test_a_missing_part_is_named(key):
    with pytest.raises(UsageError, match=f"refers to part '{key}'.*Output without that part"):
        Joint({key: Categorical()}).select(output())
    with pytest.raises(UsageError, match="Tensor without that part"):
        Joint({key: Categorical()}).select(torch.zeros(9, 2))


def test_the_rows_of_a_tensor_are_no_parts():
    with pytest.raises(UsageError, match=r"refers to part .0..*Tensor without that part"):
        Joint({0: Categorical()}).select(torch.zeros(4, 3))


def test_an_empty_mapping_is_refused():
    with pytest.raises(UsageError, match="at least one part"):
        Joint({})


def test_divergences_targets_and_products_are_sums_over_the_parts():
    likelihood, before, after = joint(), output(), output(seed=1)
    z, new = likelihood.select(before), likelihood.select(after)
    one, two = Categorical(), Bernoulli()
    torch.testing.assert_close(
        likelihood.divergence(z, new),
        one.divergence(z[:1], new[:1]) + two.divergence(z[1:], new[1:]),
    )
    assert likelihood.targets(z, [None, None]) == 2.0
    product = likelihood.hessian_product(z, new)
    torch.testing.assert_close(product[0], one.hessian_product(z[:1], new[:1])[0])
    torch.testing.assert_close(product[1], two.hessian_product(z[1:], new[1:])[0])


def test_weights_of_one_part_do_not_reach_the_other():
    likelihood = joint()
    z, new = (likelihood.select(output(seed=seed)) for seed in (0, 1))
    weights = torch.tensor([0.0, 0, 0, 0, 0], dtype=D)
    found = likelihood.divergence(z, new, [weights[:, None], None])
    torch.testing.assert_close(found, Bernoulli().divergence(z[1:], new[1:]))
    assert likelihood.targets(z, [None, None], [weights[:, None], None]) == 1.0


def test_columns_are_the_hessian_block_by_block():
    likelihood = joint()
    z = likelihood.select(output(3))
    columns = [torch.cat([c[0], c[1][:, None]], 1) for c in likelihood.columns(z)]
    fisher = sum(c[:, :, None] * c[:, None] for c in columns)
    p, q = z[0].softmax(-1), z[1].sigmoid()
    torch.testing.assert_close(fisher[:, :3, :3], torch.diag_embed(p) - p[:, :, None] * p[:, None])
    torch.testing.assert_close(fisher[:, 3, 3], q * (1 - q))
    assert fisher[:, 3, :3].abs().max() == 0


def test_samples_of_parts_are_independent_and_centred():
    likelihood, z = joint(), output(2)
    z = likelihood.select(Output(*(part.repeat_interleave(20_000, 0) for part in z)))
    drawn = likelihood.sample_gradients(z, torch.Generator().manual_seed(0))
    for gradient in drawn:
        assert gradient.mean(0).abs().max() < 0.02
    first = torch.cat([drawn[0], drawn[1][:, None]], 1)
    assert (first.T @ first / len(first))[3, :3].abs().max() < 0.02


def test_one_part_that_is_no_density_is_enough():
    likelihood, z = joint(), output()
    assert likelihood.is_density(likelihood.select(z))
    z.halt[0] = torch.nan
    assert not likelihood.is_density(likelihood.select(z))


def test_rows_belong_to_the_part_of_their_output():
    likelihood, z = joint(), output()
    y, halted = torch.tensor([0, 1, -100, 2, 0]), torch.tensor([1.0, 0, 1, 0, 1], dtype=D)
    parts = [part.requires_grad_() for part in likelihood.select(z)]
    loss = F.cross_entropy(parts[0], y) + F.binary_cross_entropy_with_logits(parts[1], halted)
    grads = torch.autograd.grad(loss, parts)
    parts = [part.detach() for part in parts]
    found = [likelihood.row_weights(tuple(parts), i, g) for i, g in enumerate(grads)]
    assert found[0].values.flatten().tolist() == [1, 1, 0, 1, 1]
    assert found[1].values is None
    with pytest.raises(IndexError):
        likelihood.row_weights(tuple(parts), 2, grads[0])


def test_stated_weights_are_a_mapping_by_part():
    likelihood, z = joint(), output()
    outputs = likelihood.select(z)
    given = {"logits": torch.ones(5), "halt": torch.arange(5.0)}
    assert likelihood.given_weights(outputs, 1, given).values.tolist() == [0.0, 0.4, 0.8, 1.2, 1.6]
    for wrong in (torch.ones(5), {"logits": torch.ones(5)}):
        with pytest.raises(ValueError, match="weights for every part, including 'halt'"):
            likelihood.given_weights(outputs, 1, wrong)


def test_a_mean_needs_one_factor_of_all_parts():
    likelihood = joint()
    assert likelihood.mean_factor(likelihood.select(output())) == 1.0
    wide = Output(torch.zeros(4, 3), torch.zeros(4, 5))
    with pytest.raises(UsageError, match=r"differs between the parts of this output \(1, 0\.2\)"):
        likelihood.mean_factor(likelihood.select(wide))


@pytest.mark.parametrize(("first", "second"), [(1.0, 8.0), (8.0, 1.0), (1.0, 1.0)])
def test_the_scale_is_that_of_the_part_farthest_off(first, second):
    torch.manual_seed(0)
    likelihood = joint()
    parts = [part.requires_grad_() for part in likelihood.select(output(16))]
    y, halted = torch.randint(3, (16,)), torch.randint(2, (16,)).to(D)
    loss = first * F.cross_entropy(parts[0], y)
    loss = loss + second * F.binary_cross_entropy_with_logits(parts[1], halted)
    grads = tuple(16 * g for g in torch.autograd.grad(loss, parts))
    scale = likelihood.loss_factor(tuple(p.detach() for p in parts), grads)
    assert scale.factor == pytest.approx(max(first, second))
    assert scale.fits


def test_a_part_that_does_not_fit_is_found_beside_one_that_does():
    torch.manual_seed(0)
    likelihood = joint()
    parts = [part.requires_grad_() for part in likelihood.select(output(16))]
    loss = F.mse_loss(parts[0], 1 + torch.randn(16, 3, dtype=D))
    loss = loss + F.binary_cross_entropy_with_logits(parts[1], torch.ones(16, dtype=D))
    grads = torch.autograd.grad(loss, parts)
    assert not likelihood.loss_factor(tuple(p.detach() for p in parts), grads).fits
    gaussian = Joint({0: Gaussian()})
    z = gaussian.select((torch.zeros(2, 2),))
    assert gaussian.loss_factor(z, z) is None


def test_the_likelihood_of_a_past_output_stays_its_own():
    likelihood = joint()
    z = likelihood.select(output())
    past = likelihood.of_last()
    likelihood.select(output(2))
    torch.testing.assert_close(past.divergence(z, z), torch.zeros(5, dtype=D))


def normal(o):
    return td.Normal(o["mean"], o["log_std"].exp())


def test_any_distribution_has_targets_divergence_and_scores():
    likelihood = FromDistribution(normal)
    z = {"mean": torch.zeros(3, 2, dtype=D), "log_std": torch.zeros(3, 2, dtype=D), "id": 7}
    outputs = likelihood.select(z)
    assert len(outputs) == 2
    assert likelihood.targets(outputs, [None, None]) == 2.0
    moved = likelihood.select(z | {"mean": torch.ones(3, 2, dtype=D)})
    torch.testing.assert_close(likelihood.divergence(outputs, moved), torch.ones(3, dtype=D))
    many = likelihood.select(
        {"mean": torch.zeros(40_000, 1, dtype=D), "log_std": torch.zeros(40_000, 1, dtype=D)}
    )
    mean, log_std = likelihood.sample_gradients(many, torch.Generator().manual_seed(0))
    assert mean.square().mean() == pytest.approx(1.0, abs=0.03)  # 1 / σ²
    assert log_std.square().mean() == pytest.approx(2.0, abs=0.1)


def test_samples_follow_the_generator_and_leave_torchs_alone():
    likelihood = FromDistribution(lambda z: td.Categorical(logits=z))
    z = likelihood.select(torch.zeros(6, 4))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, other, third = (
        likelihood.sample_gradients(z, torch.Generator().manual_seed(seed))[0] for seed in (0, 0, 1)
    )
    assert torch.equal(one, other)
    assert not torch.equal(one, third)
    assert torch.equal(torch.get_rng_state(), before)


def test_outputs_that_the_density_does_not_use_have_no_gradient():
    likelihood = FromDistribution(lambda o: td.Bernoulli(logits=o[0]))
    z = likelihood.select((torch.zeros(3), torch.ones(3, 2)))
    found = likelihood.sample_gradients(z, torch.Generator().manual_seed(0))
    assert found[0].abs().min() == 0.5
    assert torch.equal(found[1], torch.zeros(3, 2))


def test_what_is_no_density_is_refused():
    with pytest.raises(UsageError, match="no floating-point tensor for a density"):
        FromDistribution(normal).select({"ids": torch.arange(3), "name": "x"})
    likelihood = FromDistribution(lambda z: z.softmax(-1))
    z = likelihood.select(torch.zeros(2, 3))
    with pytest.raises(UsageError, match=r"returned Tensor, expected a torch\.distributions"):
        likelihood.targets(z, [None])
    likelihood = FromDistribution(lambda z: td.StudentT(z.exp()))
    z = likelihood.select(torch.zeros(2, 3))
    with pytest.raises(UsageError, match="no kl_divergence of StudentT; add one with register_kl"):
        likelihood.divergence(z, z)


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ("categorical", Categorical),
        ("bernoulli", Bernoulli),
        ("bernoulli_probabilities", Bernoulli),
        ("gaussian", Gaussian),
        ({"a": "gaussian"}, Joint),
        (normal, FromDistribution),
    ],
)
def test_likelihoods_are_built_from_names_mappings_and_functions(given, kind):
    made = as_likelihood(given)
    assert isinstance(made, kind)
    assert as_likelihood(made) is made


@pytest.mark.parametrize("wrong", [None, 3, ["categorical"]])
def test_anything_else_is_no_likelihood(wrong):
    with pytest.raises(UsageError, match="a likelihood must be a name"):
        as_likelihood(wrong)
    with pytest.raises(UsageError, match="unknown likelihood 'gausian'; did you mean 'gaussian'"):
        as_likelihood({"a": "gausian"})
