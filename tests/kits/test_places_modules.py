"""Modules: training apart and at once, calibration, health, and files."""

import json
from dataclasses import replace

import numpy as np
import pytest

from smallfry.errors import DataError, RunError, UsageError
from smallfry.kits.places.artifact import load_modules, save_modules
from smallfry.kits.places.modules import ModularSNN, Settings
from smallfry.kits.places.presentation import image_spikes, present
from smallfry.kits.places.scores import recall_at
from smallfry.kits.places.task import synaptic_events
from smallfry.kits.places.traverse import TraverseSettings, draw_traverse

SMALL = Settings(places_per_module=3, neurons=16, side=8, presentations=12)
ROUTE = TraverseSettings(places=6, calibration=2, side=8)


@pytest.fixture(scope="module")
def traverses():
    return np.stack([draw_traverse(ROUTE, number) for number in range(3)])


@pytest.fixture(scope="module")
def fitted(traverses):
    return ModularSNN(SMALL).fit(traverses[:2])


def test_modules_trained_apart_are_those_trained_at_once(traverses, fitted):
    for number in (0, 1):
        alone = ModularSNN(SMALL).fit(traverses[:2], [number])
        for name in ("weights", "theta", "assignment", "activity"):
            wanted = getattr(fitted, name)
            wanted = wanted[:, number : number + 1] if wanted.ndim < 2 else wanted[[number]]
            assert (getattr(alone, name) == wanted).all(), name
        responses = fitted.respond(traverses[2])
        assert (alone.respond(traverses[2]) == responses[:, [number]]).all()


def test_each_module_learns_its_own_region(fitted):
    assert fitted.weights.shape == (2, 64, 16)
    assert {*fitted.assignment[0].tolist()} <= {-1, 0, 1, 2}
    assert {*fitted.assignment[1].tolist()} <= {-1, 3, 4, 5}
    assert (fitted.assignment >= 0).any(axis=1).all()
    assert fitted.theta.min() > 20
    assert fitted.activity.max() <= 6
    assert 0 <= fitted.weights.min() <= fitted.weights.max() <= SMALL.most
    assert SMALL.most == 4 * 78 / 64


def test_regions_are_contiguous_or_shuffled_and_have_members():
    contiguous = ModularSNN(SMALL).regions(7)
    assert [part.tolist() for part in contiguous] == [[0, 1, 2], [3, 4, 5], [6]]
    shuffled = ModularSNN(replace(SMALL, regions="shuffled")).regions(7)
    assert sorted(np.concatenate(shuffled).tolist()) == [*range(7)]
    assert [part.tolist() for part in shuffled] != [part.tolist() for part in contiguous]
    several = ModularSNN(replace(SMALL, members=2)).regions(4)
    assert [part.tolist() for part in several] == [[0, 1, 2], [0, 1, 2], [3], [3]]


def test_the_answer_to_an_image_depends_on_no_other(traverses, fitted):
    together = fitted.respond(traverses[2])
    assert (fitted.respond(traverses[2][::-1]) == together[::-1]).all()
    assert (fitted.respond(traverses[2][3:4])[0] == together[3]).all()
    assert together.sum() > 0
    assert together.max() <= 7  # 50 ms apart
    assert fitted.respond(traverses[2][:0]).shape == (0, 2, 16)


def test_members_of_a_region_add_their_scores(traverses):
    both = ModularSNN(replace(SMALL, members=2, presentations=6)).fit(traverses[:2])
    responses = both.respond(traverses[2])
    total = 0.0
    for member in range(2):
        alone = ModularSNN(replace(SMALL, presentations=6))
        alone.places, alone.activity = 6, both.activity[member::2]
        alone.assignment = both.assignment[member::2]
        total = total + alone.scores(responses[:, member::2])
    assert both.scores(responses) == pytest.approx(total)


def test_matches_are_the_best_of_the_candidates(traverses, fitted):
    found = fitted.match(traverses[2])
    assert found.scores.shape == (6, 6)
    assert found.confidence == pytest.approx(found.scores.max(axis=1))
    some = fitted.match(traverses[2], np.array([1, 4]))
    assert {*some.best.tolist()} <= {-1, 1, 4}
    assert (some.scores[:, [0, 2, 3, 5]] == 0).all()
    nothing = ModularSNN(SMALL)
    nothing.places, nothing.assignment = 6, np.full((2, 16), -1)
    nothing.activity = np.zeros((2, 16), np.int64)
    scores = nothing.scores(np.ones((2, 2, 16), np.int64))
    assert recall_at(scores, np.array([0, 0])) == 0


def test_calibration_takes_the_best_threshold_and_silences_fewest(traverses, fitted):
    modules = replace(fitted)
    modules.__dict__.update(fitted.__dict__)
    truth = np.arange(4, 6)
    found = modules.calibrate(traverses[2][4:], truth, np.arange(4, 6), (0, 2, 4, 100))
    assert found.recalls.keys() == {0, 2, 4, 100}
    assert found.recalls[0] == found.recalls[100]  # which silences none
    best = max(found.recalls.values())
    assert found.recalls[found.threshold] == best
    if found.recalls[0] == best:
        assert found.threshold == 0
    assert modules.threshold == found.threshold
    assert found.queries == 2


def test_hyperactive_neurons_answer_to_many_images_and_off_is_off(fitted):
    modules = ModularSNN(SMALL)
    modules.places, modules.assignment = 3, np.array([[0, 1, 1], [2, -1, 2]])
    modules.activity = np.array([[5, 1, 0], [6, 9, 4]])
    assert not modules.silenced.any()
    assert modules.unreachable == []
    modules.threshold = 5
    assert modules.silenced.tolist() == [[True, False, False], [True, True, False]]
    assert modules.unreachable == [0]
    responses = np.array([[[3, 1, 0], [2, 5, 4]]])
    assert modules.scores(responses).tolist() == [[0, 0.5, 2.0]]


def test_presentations_with_delays_are_those_without_when_they_are_none():
    random = np.random.default_rng(0)
    weights, theta = random.random((2, 64, 5)) * 2.4, np.full((2, 5), 25.0)
    spikes = image_spikes(random.integers(0, 256, (2, 8, 8)), 3, 0.5)
    without = present(spikes, weights, theta, 0.5, np.empty((0, 64, 5), np.int64))
    zero = present(spikes, weights, theta, 0.5, np.zeros((2, 64, 5), np.int64))
    assert (zero == without).all()
    assert without.sum() > 0
    late = present(spikes, weights, theta, 0.5, np.full((2, 64, 5), 20))
    assert np.abs(late.sum() - without.sum()) <= 0.3 * without.sum()


def test_delays_are_of_each_synapse(traverses):
    settings = replace(SMALL, delays=True, presentations=4)
    modules = ModularSNN(settings).fit(traverses[:2])
    assert modules.delays.shape == modules.weights.shape
    assert modules.delays.max() * settings.dt <= 10
    assert len({*modules.delays.ravel().tolist()}) > 10


def test_the_rise_of_thresholds_follows_the_presentations():
    assert Settings().rise == pytest.approx(20 / (60 + 17 * 280 / 64))
    assert Settings(theta_step=0.2).rise == 0.2


def test_spikes_of_an_image_have_its_rates():
    image = np.random.default_rng(0).integers(0, 256, (1, 8, 8))
    spikes = image_spikes(image, 0, 0.5)
    assert spikes.shape == (1, 700, 64)
    assert (spikes == image_spikes(image.astype(float), 0, 0.5)).all()
    assert (spikes != image_spikes(image, 1, 0.5)).any()
    assert spikes.mean() == pytest.approx(0.5e-3 * 32, rel=0.1)


def test_events_are_spikes_times_their_targets(traverses, fitted):
    images = traverses[2][:2]
    arriving = image_spikes(images, 0, 0.5).sum() * 2 * 16
    fired = fitted.respond(images).sum() * 16
    assert synaptic_events(fitted, images) == (arriving + fired) / 2


def test_modules_are_saved_and_loaded(tmp_path, traverses, fitted):
    fitted.threshold = 4
    save_modules(fitted, tmp_path / "m")
    save_modules(fitted, tmp_path / "m")  # in place of the former
    found = load_modules(tmp_path / "m")
    assert found.settings == SMALL
    assert (found.match(traverses[2]).scores == fitted.match(traverses[2]).scores).all()
    assert (found.silenced == fitted.silenced).all()
    fitted.threshold = 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "note.txt").write_text("mine")
    with pytest.raises(RunError, match="holds other files"):
        save_modules(fitted, tmp_path / "other")
    with pytest.raises(RunError, match="no readable modules"):
        load_modules(tmp_path / "other")
    file = tmp_path / "m" / "modules.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(RunError, match="is not the file that was written"):
        load_modules(tmp_path / "m")
    manifest = json.loads((tmp_path / "m" / "manifest.json").read_text())
    (tmp_path / "m" / "manifest.json").write_text(json.dumps({**manifest, "format": 9}))
    with pytest.raises(RunError, match="format 9, this version reads 1"):
        load_modules(tmp_path / "m")


def test_traverses_need_equal_lengths_and_the_modules_size(traverses):
    with pytest.raises(DataError, match="traverses have 6, 5 images: each place needs one"):
        ModularSNN(SMALL).fit([traverses[0], traverses[1][:5]])
    with pytest.raises(DataError, match="traverses have no images"):
        ModularSNN(SMALL).fit([])
    with pytest.raises(DataError, match=r"the shape \(6, 4, 8\), expected \(images, 8, 8\)"):
        ModularSNN(SMALL).fit([traverses[0], traverses[1][:, :4]])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"places_per_module": 0}, "places_per_module is 1 to 1,000, got 0"),
        ({"neurons": 1}, "neurons is 2 to 2,000, got 1"),
        ({"side": 100}, "side is 4 to 64, got 100"),
        ({"presentations": 0}, "presentations is 1 to 1,000,000, got 0"),
        ({"theta_step": -1.0}, "theta_step is 0 for automatic, or more, got -1.0"),
        ({"dt": 1.0}, r"dt is 0\.05 to 0\.5 ms"),
        ({"regions": "random"}, "regions is contiguous or shuffled, got 'random'"),
    ],
)
def test_wrong_settings_of_modules_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        Settings(**settings)


@pytest.mark.slow
def test_modules_are_healthy_and_better_than_chance():
    route = TraverseSettings(places=20, calibration=5)
    traverses = np.stack([draw_traverse(route, number) for number in range(3)])
    modules = ModularSNN(Settings(presentations=400)).fit(traverses[:2])
    active = (modules.respond(traverses[0]) > 0).sum(axis=2).mean()
    assert 3 <= active <= 12  # measured: about 8
    assert 30 <= modules.theta.min() <= modules.theta.max() <= 56
    assert recall_at(modules.match(traverses[2]).scores, np.arange(20)) >= 0.3
