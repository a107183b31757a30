"""Rewards and policies of N2N, beside enumeration."""

from itertools import product

import pytest
import torch

from smallfry.errors import RunError, UsageError
from smallfry.search.n2n import Layer, constrained_reward, reward
from smallfry.search.n2n.layer import NUMBERS
from smallfry.search.n2n.policy import Removal, Shrinkage, reinforce


def layers_of(count):
    return torch.rand(count, NUMBERS, generator=torch.Generator().manual_seed(1)).double()


def new_policy(kind, seed=0):
    torch.manual_seed(seed)
    return (Removal() if kind == "removal" else Shrinkage((0.25, 0.5, 1.0))).double()


def sequences(actions, count):
    return torch.tensor(list(product(range(actions), repeat=count)))


# Reward


@pytest.mark.parametrize(
    ("compression", "ratio", "expected"),  # of the specification's golden file
    [
        (0.0, 1.0, 0.0),
        (0.25, 1.0, 0.4375),
        (0.25, 0.95, 0.41562499999999997),
        (0.5, 1.0, 0.75),
        (0.9, 1.0, 0.99),
        (0.9, 0.95, 0.9405),
        (0.99, 0.95, 0.949905),
    ],
)
def test_the_reward_has_the_published_values(compression, ratio, expected):
    assert reward(compression, ratio) == pytest.approx(expected, abs=1e-12)
    share = 1 - compression
    assert reward(compression, ratio) == pytest.approx((1 - share**2) * ratio, abs=1e-12)


@pytest.mark.parametrize(
    ("iteration", "expected"),
    [
        (0, 0.8),
        (1, 0.36590222222222235),
        (5, -0.6444444444444443),
        (10, -0.9777777777777777),
        (14, -0.9999644444444444),
        (15, -1.0),
        (40, -1.0),
    ],
)
def test_the_penalty_beyond_a_limit_hardens(iteration, expected):
    assert constrained_reward(0.8, iteration, False) == pytest.approx(expected, abs=1e-12)
    assert constrained_reward(0.8, iteration, True) == 0.8


def test_impossible_rewards_and_layers_are_refused():
    with pytest.raises(UsageError, match="at most 1"):
        reward(1.5, 1.0)
    with pytest.raises(UsageError, match="at least 0"):
        reward(0.5, -0.1)
    for shares in ((0.5,), (0.5, 1.0, 2.0)):
        with pytest.raises(UsageError, match="conv: shares are 0 to 1 and have 1"):
            Layer("conv", shares)


def test_a_descriptor_has_numbers_up_to_one():
    found = Layer("conv", (0.0, 1.0), kernel=31, stride=8, inputs=0.2, outputs=1.0).descriptor(1)
    assert len(found) == NUMBERS
    assert max(found) == 1
    assert Layer("conv", (0.0, 1.0)).is_removable
    assert Layer("conv", (0.0, 0.5, 1.0)).widths == (0.5, 1.0)


# Policies


@pytest.mark.parametrize("kind", ["removal", "shrinkage"])
def test_the_probabilities_of_all_sequences_add_up_to_one(kind):
    policy, layers = new_policy(kind), layers_of(4)
    actions = 2 if kind == "removal" else 3
    possible = torch.ones(4, actions, dtype=torch.bool)
    with torch.no_grad():
        logs, entropy = policy.score(layers, possible, sequences(actions, 4))
    assert float(logs.detach().exp().sum()) == pytest.approx(1, abs=1e-12)
    expected = -(logs.exp() * logs).sum()  # of the joint distribution
    assert float((logs.exp() * entropy).sum()) == pytest.approx(float(expected), abs=1e-12)


def test_impossible_actions_are_never_drawn_and_cost_no_probability():
    policy, layers = new_policy("shrinkage"), layers_of(3)
    possible = torch.tensor([[False, False, True], [True, True, False], [True, True, True]])
    drawn = policy.sample(layers, possible, 200, torch.Generator().manual_seed(0))
    assert bool(possible[torch.arange(3), drawn].all())
    every = sequences(3, 3)
    allowed = every[possible[torch.arange(3), every].all(1)]
    logs, entropy = policy.score(layers, possible, allowed)
    assert float(logs.detach().exp().sum()) == pytest.approx(1, abs=1e-12)
    assert bool(entropy.isfinite().all())


def test_later_shares_depend_on_earlier_ones_and_earlier_ones_not_on_later():
    policy, layers = new_policy("shrinkage"), layers_of(3)
    one, other = (policy.logits(layers, torch.tensor([a])) for a in ([0, 0, 0], [2, 0, 1]))
    torch.testing.assert_close(one[:, 0], other[:, 0], rtol=0, atol=0)
    assert not torch.allclose(one[:, 1], other[:, 1], atol=1e-4)


def test_samples_have_the_frequencies_of_their_probabilities():
    policy, layers, count = new_policy("shrinkage"), layers_of(2), 20_000
    possible = torch.ones(2, 3, dtype=torch.bool)
    drawn = policy.sample(layers, possible, count, torch.Generator().manual_seed(3))
    shares = policy.score(layers, possible, sequences(3, 2))[0].exp()
    found = torch.bincount(drawn @ torch.tensor([3, 1]), minlength=9) / count
    errors = (shares * (1 - shares) / count).sqrt()
    assert float(((found - shares) / errors).abs().max()) < 4


@pytest.mark.parametrize("kind", ["removal", "shrinkage"])
def test_the_estimated_gradient_is_that_of_the_expected_reward(kind):
    policy, layers, count = new_policy(kind), layers_of(3), 10_000
    actions = 2 if kind == "removal" else 3
    possible = torch.ones(3, actions, dtype=torch.bool)
    every = sequences(actions, 3)
    values = torch.rand(len(every), generator=torch.Generator().manual_seed(5)).double()
    bias = policy.head.bias
    logs = policy.score(layers, possible, every)[0]
    exact = torch.autograd.grad((logs.exp() * values).sum(), bias)[0]
    drawn = policy.sample(layers, possible, count, torch.Generator().manual_seed(7))
    places = torch.tensor([actions**2, actions, 1])
    gradients = torch.stack(
        [
            torch.autograd.grad(policy.score(layers, possible, row[None])[0].sum(), bias)[0]
            for row in every
        ]
    )
    numbers = drawn @ places
    rows = (values[numbers] - 0.5)[:, None] * gradients[numbers]
    errors = rows.std(0) / count**0.5
    assert bool(((rows.mean(0) - exact).abs() < 3 * errors).all())


def test_the_steps_of_reinforce_raise_the_expected_reward():
    policy, layers = new_policy("removal"), layers_of(4)
    possible = torch.ones(4, 2, dtype=torch.bool)
    every = sequences(2, 4)
    values = (every == torch.tensor([1, 0, 1, 0])).double().mean(1)
    optimizer = torch.optim.Adam(policy.parameters(), 0.01)

    def expected():
        return (policy.score(layers, possible, every)[0].exp() * values).sum().item()

    before, generator = expected(), torch.Generator().manual_seed(0)
    for _ in range(120):
        drawn = policy.sample(layers, possible, 16, generator)
        rewards = values[drawn @ torch.tensor([8, 4, 2, 1])]
        reinforce(policy, optimizer, layers, possible, drawn, rewards - rewards.mean())
    assert before < 0.6
    assert expected() > 0.9


def test_a_file_of_something_else_is_no_policy(tmp_path):
    from smallfry.search.n2n.strategy import load_policies

    (tmp_path / "a.safetensors").write_bytes(b"no")
    with pytest.raises(RunError, match="no policies of a search by n2n"):
        load_policies(tmp_path / "a.safetensors")
