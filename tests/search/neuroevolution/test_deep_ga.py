"""Deep GA and novelty search, beside exhaustive computation and random search."""

import numpy as np
import pytest

from smallfry.errors import UsageError
from smallfry.search.neuroevolution import DeepGA, SeedChain
from smallfry.search.neuroevolution.deep_ga import Evaluated
from smallfry.search.neuroevolution.novelty import novelties
from smallfry.search.neuroevolution.problems import PROBLEMS, find_problem
from smallfry.search.neuroevolution.problems.digits import Digits


class Sphere:
    """Fitness with its maximum at weights of one half, and noise if there are several episodes."""

    sizes = (3, 2)
    power = 0.1
    solved = None

    def __init__(self, noise=0.0, solved=None):
        self.noise, self.solved = noise, solved
        self.episodes = 30 if noise else 1
        self.calls = []

    def __call__(self, weights, seed, episodes=1):
        self.calls.append((len(weights), episodes))
        fitness = -np.square(weights - 0.5).sum(1).astype(np.float64)
        noise = np.random.default_rng(seed).standard_normal((len(weights), episodes))
        return Evaluated(fitness + self.noise * noise.mean(1), weights[:, :2].astype(np.float64))


def run(problem, generations, **settings):
    settings = {"population": 40, "parents": 5, **settings}
    return list(DeepGA(problem, **settings).run(generations))


def test_the_elite_never_gets_worse_and_beats_random_networks():
    found = run(Sphere(), 25)
    elites = [each.elite_fitness for each in found]
    assert elites == sorted(elites)
    assert elites[-1] > -0.1
    random = run(Sphere(), 25, select="random")
    assert elites[-1] > max(each.elite_fitness for each in random)
    assert [each.evaluations for each in found][-1] == 25 * 40


def test_parents_are_the_best_of_the_generation_and_the_elite():
    problem = Sphere()
    ga = DeepGA(problem, population=40, parents=5)
    before = None
    for generation in ga.run(6):
        parents = [ga.chain(each) for each in generation.parents]
        assert len(parents) == 5
        assert ga.chain(generation.elite) in parents
        weights = np.stack([each.weights() for each in parents])
        values = problem(weights, 0).fitness
        assert values.max() == pytest.approx(generation.elite_fitness, rel=1e-6)
        if before is not None:  # children of the parents before, or the elite
            known = {SeedChain.from_list((3, 2), each) for each in before.parents}
            for each in parents:
                one_less = SeedChain(each.sizes, each.seed, each.steps[:-1])
                assert one_less in known or each == ga.chain(generation.elite)
        before = generation


def test_under_noise_the_elite_is_chosen_by_more_episodes():
    problem = Sphere(noise=1.0)
    found = run(problem, 12)
    assert problem.calls[:2] == [(40, 1), (10, 30)]
    true = [
        Sphere()(SeedChain.from_list((3, 2), e.elite).weights()[None], 0).fitness for e in found
    ]
    assert true[-1] > true[0]


def test_an_evolution_goes_on_from_its_generations_to_the_bit():
    for select in ("fitness", "novelty", "random"):
        whole = run(Sphere(), 8, select=select)
        ga = DeepGA(Sphere(), 40, 5, select)
        assert whole[:3] + list(ga.run(8, whole[:3])) == whole
    assert run(Sphere(), 2, seed=1) != run(Sphere(), 2)


def test_an_evolution_ends_when_the_problem_is_solved():
    found = run(Sphere(solved=-0.5), 50)
    assert len(found) < 50
    assert found[-1].best >= -0.5
    assert all(each.best < -0.5 for each in found[:-1])


@pytest.mark.parametrize("settings", [{"parents": 0}, {"parents": 41}])
def test_impossible_sizes_are_refused(settings):
    with pytest.raises(UsageError, match="parents are 1 to 40"):
        run(Sphere(), 1, **settings)


# Novelty


def test_novelty_is_the_mean_distance_to_the_nearest_others():
    generator = np.random.default_rng(0)
    population, archive = generator.random((30, 2)), generator.random((12, 2))
    found = novelties(population, archive, nearest=7)
    every = np.concatenate([population, archive])
    for row, place in enumerate(population):
        distances = [np.linalg.norm(place - e) for n, e in enumerate(every) if n != row]
        assert found[row] == pytest.approx(np.mean(sorted(distances)[:7]), abs=1e-12)
    assert novelties(population[:1], archive[:0]).tolist() == [0.0]


def test_novelty_ignores_fitness_and_fills_an_archive():
    novel = run(Sphere(), 30, select="novelty")
    assert sum(len(each.archived) for each in novel) == pytest.approx(12, abs=10)
    reached = np.array([row for each in novel for row in each.archived])
    assert reached.shape[1] == 2
    fit = run(Sphere(), 30)
    assert fit[-1].mean > novel[-1].mean
    assert not any(each.archived for each in fit)


# Digits


def test_digits_have_the_loss_as_fitness():
    problem = Digits()
    weights = np.stack([SeedChain(problem.sizes, seed).weights() for seed in range(3)])
    found = problem(weights, 0)
    logits = problem._logits(weights, "train").astype(np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(2, keepdims=True)
    right = shares[:, np.arange(597), problem._labels["train"]]
    assert np.allclose(found.fitness, np.log(right).mean(1), atol=1e-9)
    assert np.allclose(found.behaviours.sum(1), 1)


def test_digits_are_learned_without_gradients():
    problem = Digits()
    ga = DeepGA(problem, population=60, parents=6)
    found = list(ga.run(40))
    assert found[-1].elite_fitness > found[0].elite_fitness + 0.3
    accuracy = problem.accuracy(ga.chain(found[-1].elite).weights())
    first = problem.accuracy(ga.chain(found[0].elite).weights())
    assert accuracy > max(0.25, first)


# Control


@pytest.mark.parametrize(("name", "least"), [("cartpole", 9.0), ("acrobot", -500.0)])
def test_control_problems_have_returns(name, least):
    pytest.importorskip("gymnasium", reason="control problems need the extra evolve")
    problem = find_problem(name)
    weights = np.stack([SeedChain(problem.sizes, seed).weights() for seed in range(4)])
    one, again = problem(weights, 3), problem(weights, 3)
    assert np.array_equal(one.fitness, again.fitness)
    assert one.fitness.min() >= least
    assert one.behaviours.shape == (4, problem.sizes[0])
    two = problem(weights[:1], 3, episodes=2).fitness[0]
    assert two == pytest.approx((one.fitness[0] + problem(weights[:1], 4).fitness[0]) / 2)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("MountainCarContinuous-v0", (2, 16, 1)), ("MountainCar-v0", (2, 16, 3))],
)
def test_any_environment_is_a_problem(name, sizes):
    pytest.importorskip("gymnasium", reason="control problems need the extra evolve")
    problem = find_problem(f"gym:{name}")
    assert problem.sizes == sizes
    assert problem.solved is None
    weights = np.stack([SeedChain(sizes, seed).weights() for seed in range(2)])
    found = problem(weights, 0)
    assert found.fitness.shape == (2,)
    assert found.behaviours.shape == (2, 2)


def test_continuous_actions_are_within_their_bounds():
    pytest.importorskip("gymnasium", reason="control problems need the extra evolve")
    problem = find_problem("gym:MountainCarContinuous-v0")
    space = problem._environment.action_space
    for outputs in (-50.0, 0.0, 50.0):
        action = problem._action(np.array([outputs], np.float32))
        assert space.contains(action)
        assert action == pytest.approx(np.tanh(outputs))


def test_environments_of_other_packages_are_found():
    pytest.importorskip("gymnasium", reason="control problems need the extra evolve")
    pytest.importorskip("minatar", reason="MinAtar (GPL-3.0) is not installed")
    problem = find_problem("gym:MinAtar/Breakout-v1")
    assert problem.sizes == (400, 32, 3)
    weights = SeedChain(problem.sizes, 0).weights()[None]
    one, again = problem(weights, 5), problem(weights, 5)
    assert np.array_equal(one.fitness, again.fitness)
    assert np.array_equal(one.behaviours, again.behaviours)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gym:NoSuch-v0", "gym:NoSuch-v0: Gymnasium can't make it"),
        ("gym:FrozenLake-v1", r"FrozenLake-v1 has observations Discrete\(16\)"),
    ],
)
def test_environments_that_can_not_be_played_are_refused(name, words):
    pytest.importorskip("gymnasium", reason="control problems need the extra evolve")
    with pytest.raises(UsageError, match=words):
        find_problem(name)


def test_unknown_problems_are_refused_with_the_nearest_name():
    with pytest.raises(UsageError, match="no problem 'mase'; did you mean 'maze'"):
        find_problem("mase")
    assert {"maze", "digits"} <= {*PROBLEMS}
