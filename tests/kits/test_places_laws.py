"""Laws of spiking modules and of scores of places, over random cases."""

import numpy as np
import pytest

from smallfry.kits.places.images import patch_normalise
from smallfry.kits.places.modules import ModularSNN, Settings
from smallfry.kits.places.neurons import Layer, Plasticity
from smallfry.kits.places.scores import (
    absolute_difference,
    place_scores,
    precision_recall,
    recall_at,
    ridge,
)


@pytest.mark.parametrize("seed", range(5))
def test_repeated_neurons_go_on_as_the_one(seed):
    random = np.random.default_rng(seed)
    layer = Layer((2, 6), 0.5, theta_step=0.1)
    drive = random.uniform(0, 4, (2, 6))
    for _ in range(300):
        layer.ge_e += drive * 0.5
        layer.reset(*layer.advance())
    copies = layer.repeated(3)
    for _ in range(300):
        layer.ge_e += drive * 0.5
        copies.ge_e += drive * 0.5
        one, several = layer.advance(), copies.advance()
        assert all((several[k] == one[k][None]).all() for k in range(2))
        layer.reset(*one)
        copies.reset(*several)
    assert (copies.v_e == layer.v_e[None]).all()
    assert (copies.thresholds == layer.thresholds[None]).all()
    assert layer.thresholds.max() > 20


@pytest.mark.parametrize("seed", range(5))
def test_synapses_without_delays_are_those_with_delays_of_nothing(seed):
    random = np.random.default_rng(seed)
    start = random.random((2, 8, 5)) * 0.5
    weights = [start.copy(), start.copy()]
    plain = Plasticity(weights[0], 0.5)
    late = Plasticity(weights[1], 0.5, delays=np.zeros(start.shape, np.int64))
    for step in range(200):
        spikes, fired = random.random((2, 8)) < 0.1, random.random((2, 5)) < 0.02
        rises = plain.arrive(step, spikes), late.arrive(step, spikes)
        assert rises[0] == pytest.approx(rises[1], abs=1e-12)
        plain.fire(step, fired)
        late.fire(step, fired)
    assert weights[0] == pytest.approx(weights[1], abs=1e-12)
    assert (weights[0] >= start).all()  # there is no depression
    assert (weights[0] > start).any()


@pytest.mark.parametrize("seed", range(5))
def test_patches_forget_brightness_and_contrast(seed):
    images = np.random.default_rng(seed).integers(0, 100, (3, 10, 12)).astype(float)
    assert patch_normalise(2 * images + 30) == pytest.approx(patch_normalise(images), abs=1e-9)
    assert patch_normalise(-images) == pytest.approx(-patch_normalise(images), abs=1e-9)
    assert (patch_normalise(np.full((1, 9, 9), 77.0)) == 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_means_of_the_neurons_of_places(seed):
    random = np.random.default_rng(seed)
    responses, assignment = random.integers(0, 5, (6, 30)), random.integers(-1, 8, 30)
    silenced = random.random(30) < 0.3
    found = place_scores(responses, assignment, 8, silenced)
    for place in range(8):
        own = assignment == place
        wanted = np.zeros(6)
        if own.any():
            wanted = (responses * ~silenced)[:, own].sum(axis=1) / own.sum()
        assert found[:, place] == pytest.approx(wanted)


@pytest.mark.parametrize("seed", range(5))
def test_recall_grows_with_the_places_looked_at_and_the_tolerance(seed):
    random = np.random.default_rng(seed)
    scores, truth = random.random((40, 10)), random.integers(0, 10, 40)
    recalls = [recall_at(scores, truth, count) for count in range(1, 11)]
    assert recalls == sorted(recalls)
    assert recalls[-1] == 1
    near = [recall_at(scores, truth, tolerance=t) for t in range(10)]
    assert near == sorted(near)
    assert near[-1] == 1
    curve = precision_recall(scores, truth)
    assert curve.recall[-1] == recalls[0]
    assert 0 <= curve.area <= 1
    perfect = precision_recall(np.eye(10)[truth] + 0.1 * scores, truth)
    assert perfect.area == pytest.approx(1)
    assert perfect.recall_at_full_precision == 1


@pytest.mark.parametrize("seed", range(5))
def test_baselines_do_not_depend_on_other_queries(seed):
    random = np.random.default_rng(seed)
    references, queries = random.uniform(-1, 1, (2, 5, 30)), random.uniform(-1, 1, (4, 30))
    for method in (absolute_difference, ridge):
        together = method(references, queries)
        alone = np.concatenate([method(references, query[None]) for query in queries])
        assert together == pytest.approx(alone, abs=1e-12)
    swapped = absolute_difference(references[::-1], queries)
    assert swapped == pytest.approx(absolute_difference(references, queries))


def random_modules(seed):
    random = np.random.default_rng(seed)
    modules = ModularSNN(Settings(places_per_module=4, neurons=12))
    modules.places = 12
    modules.assignment = random.integers(0, 4, (3, 12)) + 4 * np.arange(3)[:, None]
    modules.activity = random.integers(0, 13, (3, 12))
    return modules, random.integers(0, 6, (20, 3, 12)), random.integers(0, 12, 20)


@pytest.mark.parametrize("seed", range(5))
def test_a_higher_threshold_silences_fewer(seed):
    modules, _, _ = random_modules(seed)
    before, unreachable = modules.activity.size, 12
    for threshold in range(1, 15):
        modules.threshold = threshold
        assert modules.silenced.sum() <= before
        assert len(modules.unreachable) <= unreachable
        before, unreachable = modules.silenced.sum(), len(modules.unreachable)
    assert before == 0


@pytest.mark.parametrize("seed", range(10))
def test_the_chosen_threshold_is_the_best_that_was_tried(seed):
    modules, responses, truth = random_modules(seed)
    found = modules.choose_threshold(responses, truth, thresholds=(0, 2, 4, 6, 8))
    for threshold, recall in found.recalls.items():
        modules.threshold = threshold
        assert recall_at(modules.scores(responses), truth) == recall
    assert found.recalls[found.threshold] == max(found.recalls.values())
    ties = [t for t, recall in found.recalls.items() if recall == max(found.recalls.values())]
    assert found.threshold == (0 if 0 in ties else max(ties))
