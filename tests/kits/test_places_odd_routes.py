"""Routes and modules that are odd or wrong: files, folders, queries; and laws by loops."""

import json

import numpy as np
import pytest
import safetensors.numpy
import torch
from PIL import Image

from smallfry.data import ImageData, Split, load_data
from smallfry.errors import DataError, RunError, UsageError
from smallfry.kits.places.artifact import load_modules, save_modules
from smallfry.kits.places.images import firing_rates, patch_normalise
from smallfry.kits.places.models import SpikingPlaces
from smallfry.kits.places.modules import ModularSNN, Settings, require_traverses
from smallfry.kits.places.neurons import Layer, Plasticity, normalise_weights
from smallfry.kits.places.presentation import image_spikes, present
from smallfry.kits.places.scores import (
    absolute_difference,
    place_scores,
    precision_recall,
    recall_at,
    ridge,
)
from smallfry.kits.places.task import Places, baselines
from smallfry.kits.places.traverse import TraverseSettings, draw_traverse, fractal
from smallfry_runtime.decoders.places import decode, right

SMALL = Settings(places_per_module=2, neurons=4, side=4, presentations=2)


@pytest.fixture(scope="module")
def route():
    return np.random.default_rng(0).integers(0, 256, (2, 4, 4, 4))


@pytest.fixture(scope="module")
def fitted(route):
    return ModularSNN(SMALL).fit(route)


@pytest.fixture
def saved(fitted, tmp_path):
    save_modules(fitted, tmp_path / "modules")
    return tmp_path / "modules"


def change(folder, edit):
    file = folder / "manifest.json"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def test_loaded_modules_answer_as_those_that_were_saved(fitted, saved, route):
    loaded = load_modules(saved)
    assert loaded.settings == fitted.settings
    assert np.array_equal(loaded.respond(route[0]), fitted.respond(route[0]))
    assert loaded.unreachable == fitted.unreachable
    save_modules(loaded, saved)  # into the same folder
    assert np.array_equal(load_modules(saved).weights, fitted.weights)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda m: m["settings"].update(side=8), "the settings of manifest.json are not those"),
        (lambda m: m["settings"].update(neurons=5), "the settings of manifest.json are not those"),
        (lambda m: m["settings"].update(delays=True), "the settings of manifest.json are not"),
        (lambda m: m["settings"].update(neurons=1), "neurons is 2 to 2,000, got 1"),
        (lambda m: m["settings"].update(colour="red"), "colour"),
        (lambda m: m["settings"].pop("seed"), None),  # has a default
        (lambda m: m.update(settings=3), "no readable modules"),
        (lambda m: m.update(places="many"), "no readable modules"),
        (lambda m: m.update(places=1), "manifest.json has 1 places, threshold 0"),
        (lambda m: m.update(threshold=-1), "manifest.json has 4 places, threshold -1"),
        (lambda m: m.update(format="1"), "format 1, this version reads 1"),
        (lambda m: m.update(sha256="0"), "is not the file that was written"),
        (lambda m: m.pop("sha256"), "sha256"),
    ],
)
def test_an_altered_manifest_is_refused(saved, edit, words):
    change(saved, edit)
    if words is None:
        assert load_modules(saved).settings == SMALL
    else:
        with pytest.raises(RunError, match="modules: no readable modules") as caught:
            load_modules(saved)
        assert words in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"null", b"3"])
def test_a_manifest_that_is_none_is_refused(saved, content):
    (saved / "manifest.json").write_bytes(content)
    with pytest.raises(RunError, match="no readable modules"):
        load_modules(saved)


@pytest.mark.parametrize("cut", [1, 100])
def test_truncated_weights_are_refused(saved, cut):
    file = saved / "modules.safetensors"
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(RunError, match="is not the file that was written"):
        load_modules(saved)
    file.unlink()
    with pytest.raises(RunError, match="no readable modules"):
        load_modules(saved)


def test_weights_lie_in_the_file_under_their_names(fitted, saved):
    arrays = safetensors.numpy.load_file(saved / "modules.safetensors")
    assert {*arrays} == {"weights", "theta", "delays", "assignment", "activity"}
    assert arrays["weights"].shape == (2, 16, 4)
    assert arrays["weights"].dtype == np.float64
    manifest = json.loads((saved / "manifest.json").read_text())
    assert manifest["places"] == 4
    assert manifest["silenced"] == int(fitted.silenced.sum())


def test_modules_that_have_learned_nothing_answer_nothing(route):
    with pytest.raises(UsageError, match="have learned nothing yet: fit them to traverses"):
        ModularSNN(SMALL).match(route[0])


def test_no_queries_have_no_matches(fitted):
    found = fitted.match(np.zeros((0, 4, 4)))
    assert found.scores.shape == (0, 4)
    assert found.best.shape == found.confidence.shape == (0,)
    assert fitted.calibrate(np.zeros((0, 4, 4)), np.zeros(0, int)).threshold == 0


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((4, 4)), r"the shape \(4, 4\), expected \(images, 4, 4\), grey"),
        (np.zeros((2, 3, 4, 4)), r"the shape \(2, 3, 4, 4\)"),
        (np.zeros((2, 4, 5)), r"the shape \(2, 4, 5\)"),
    ],
)
def test_queries_of_another_shape_are_refused(fitted, images, words):
    with pytest.raises(DataError, match=words):
        fitted.match(images)
    with pytest.raises(DataError, match="traverses have 1, 2, 1 images: each place needs one"):
        require_traverses([np.zeros((n, 4, 4)) for n in (1, 2, 1)], 4)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_are_whole_numbers_from_0(route, seed):
    with pytest.raises(UsageError, match=f"a seed is a whole number from 0 to .*, got {seed}"):
        ModularSNN(Settings(places_per_module=2, neurons=4, side=4, seed=seed)).fit(route)


@pytest.mark.parametrize("places", [1, 5, 6, 7])
@pytest.mark.parametrize("regions", ["contiguous", "shuffled"])
def test_regions_hold_every_place_once(places, regions):
    settings = Settings(places_per_module=3, regions=regions, members=2, seed=3)
    parts = ModularSNN(settings).regions(places)
    assert len(parts) == 2 * -(-places // 3)
    assert sorted(np.concatenate(parts[::2]).tolist()) == [*range(places)]
    for one, other in zip(parts[::2], parts[1::2], strict=True):
        assert one.tolist() == other.tolist() == sorted(one.tolist())


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (3, 3), (8, 2)])
@pytest.mark.parametrize("window", [1, 3, 9])
def test_patches_of_small_images_are_those_of_their_neighbourhood(shape, window):
    image = np.random.default_rng(0).integers(0, 256, shape)
    found, half = patch_normalise(image, window), window // 2
    for i, j in np.ndindex(shape):
        near = image[max(0, i - half) : i + half + 1, max(0, j - half) : j + half + 1]
        wanted = (image[i, j] - near.mean()) / near.std() if near.std() > 0 else 0.0
        assert found[i, j] == pytest.approx(np.clip(wanted, -1, 1), abs=1e-9)


def test_rates_are_quarters_of_whole_greys():
    images = np.random.default_rng(0).integers(0, 256, (3, 5, 6))
    rates = firing_rates(images)
    assert rates.shape == (3, 30)
    assert (4 * rates == np.floor(4 * rates)).all()
    assert (rates.min(), rates.max()) == (0.0, 63.75)
    assert (firing_rates(np.full((1, 5, 5), 9)) == 0.25 * 127).all()  # of constant images


def test_spikes_are_of_the_image_whatever_its_type_and_place():
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4)).astype(np.uint8)
    spikes = image_spikes(images, 1, 0.5)
    assert spikes.shape == (3, 700, 16)
    assert np.array_equal(image_spikes(images[2:].astype(np.float32), 1, 0.5), spikes[2:])
    assert not np.array_equal(image_spikes(images, 2, 0.5), spikes)


@pytest.mark.parametrize("delays", [False, True])
def test_presentation_is_a_layer_fed_step_by_step(delays):
    """Weights and spikes by a plain loop, with the dynamics of ``Layer``."""
    random = np.random.default_rng(0)
    weights = 12 * random.random((2, 5, 3)) * (random.random((2, 5, 3)) < 0.7)
    spikes = random.random((2, 300, 5)) < 0.05
    late = random.integers(0, 6, weights.shape) if delays else np.zeros((0, 5, 3), int)
    theta = np.full((2, 3), 20.0)
    counts = present(spikes, weights, theta, 0.5, late)
    for image in range(2):
        layer = Layer((2, 3), 0.5, theta, 0.0)
        for _ in range(1000):
            layer.reset(*layer.advance())
        wanted = np.zeros((2, 3), int)
        for step in range(300 + 300):
            fired, inhibitory = layer.advance()
            wanted += fired
            for m, i, n in np.ndindex(weights.shape):
                sent = step - (late[m, i, n] if delays else 0)
                if 0 <= sent < 300 and spikes[image, sent, i]:
                    layer.ge_e[m, n] += weights[m, i, n]
            layer.reset(fired, inhibitory)
        assert np.array_equal(counts[image], wanted)
    assert counts.sum() > 0


def test_without_learning_no_weight_changes():
    weights = np.random.default_rng(0).random((1, 3, 2))
    before = weights.copy()
    synapses = Plasticity(weights, 0.5, learns=False)
    everything = np.ones((1, 3), bool)
    for step in range(20):
        rise = synapses.arrive(step, everything)
        synapses.fire(step, np.ones((1, 2), bool))
    assert np.array_equal(weights, before)
    assert rise == pytest.approx(before.sum(axis=1))
    normalise_weights(weights)
    assert weights.sum(axis=1) == pytest.approx(np.full((1, 2), 78.0))


def test_scores_of_places_without_neurons_are_nothing():
    responses = np.array([[2, 4, 6, 8]])
    assignment = np.array([0, 0, 2, -1])
    assert place_scores(responses, assignment, 4).tolist() == [[3, 0, 6, 0]]
    silent = np.array([True, False, True, False])
    assert place_scores(responses, assignment, 4, silent).tolist() == [[2, 0, 0, 0]]


def test_recall_of_ties_zeros_and_no_queries():
    scores = np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 2.0, 1.0], [-1.0, -2.0, -3.0]])
    truth = np.array([1, 0, 2, 0])
    assert recall_at(scores, truth) == 0.25  # the last; of equal ones the first comes first
    assert recall_at(scores, truth, 2) == 0.75
    assert recall_at(scores, truth, 3) == 0.75  # what scores 0 is no match
    assert recall_at(scores, truth, tolerance=1) == 0.75
    assert recall_at(scores[:0], truth[:0]) == 0.0
    curve = precision_recall(scores[:0], truth[:0])
    assert (curve.area, curve.recall_at_full_precision) == (0.0, 0.0)


@pytest.mark.parametrize("seed", range(3))
def test_the_area_is_that_of_scikit_learn(seed):
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(seed)
    scores = random.integers(1, 6, (40, 5)).astype(float)  # with many equal confidences
    truth = random.integers(0, 5, 40)
    hits = scores.argmax(axis=1) == truth
    wanted = metrics.average_precision_score(hits, scores.max(axis=1)) * hits.mean()
    assert precision_recall(scores, truth).area == pytest.approx(wanted)


def test_image_difference_takes_the_nearest_traverse():
    random = np.random.default_rng(0)
    references, queries = random.uniform(-1, 1, (3, 4, 6)), random.uniform(-1, 1, (5, 6))
    found = absolute_difference(references, queries)
    for q, p in np.ndindex(5, 4):
        nearest = min(np.abs(queries[q] - references[t, p]).mean() for t in range(3))
        assert found[q, p] == pytest.approx(2 - nearest)
    assert ridge(references[:1], references[0], 1e-6) == pytest.approx(np.eye(4), abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"places": 1}, "places is 2 to 100,000, got 1"),
        ({"places": 8, "calibration": 8}, "calibration is 1 to 7, got 8"),
        ({"places": 8, "calibration": 2, "aliased": 5}, "aliased is 0 to 4, got 5"),
        ({"side": 49}, "side is 4 to 48, got 49"),
        ({"shift": 7}, "shift is 0 to 6, got 7"),
        ({"references": 0}, "references is 1 to 20, got 0"),
        ({"places": 4, "calibration": 1, "seed": -1}, "seed is a whole number from 0"),
    ],
)
def test_impossible_routes_are_refused(changes, words):
    with pytest.raises(UsageError, match=words):
        load_data("places-traverse", options=changes)


def test_noise_has_mean_0_and_variance_1():
    found = fractal(np.random.default_rng(0), 16, 40, 1.6, 1 / 10)
    assert found.mean() == pytest.approx(0, abs=1e-12)
    assert found.std() == pytest.approx(1)


def test_the_same_world_is_seen_from_one_place_without_shift():
    settings = TraverseSettings(places=4, calibration=1, shift=0, side=24)
    one, other = (draw_traverse(settings, number).astype(float) for number in (0, 1))
    table = [[np.corrcoef(a.ravel(), b.ravel())[0, 1] for b in other] for a in one]
    assert np.argmax(table, axis=1).tolist() == [0, 1, 2, 3]
    assert (one[0, :, 12:] == one[1, :, :12]).mean() == 1.0  # neighbours overlap by half


def image_data(labels, classes=3):
    pixels = np.arange(len(labels) * 16, dtype=np.uint8).reshape(-1, 1, 4, 4)
    train = Split(torch.from_numpy(pixels), torch.arange(len(labels)), torch.tensor(labels))
    names = tuple(map(str, range(classes)))
    return ImageData("a", "b", names, 4, 1, train, train.take([]), train.take([0]))


@pytest.mark.parametrize("labels", [[0, 1, 2, 0], [0, 1, 1], [0, 1], [0, 0, 1, 1, 1, 2]])
def test_images_that_are_no_whole_traverses_are_refused(labels):
    model = SpikingPlaces(img_size=4, num_classes=3, neurons=2, presentations=1)
    with pytest.raises(UsageError, match="as many training images of each place: whole traverses"):
        Places().fit(model, image_data(labels))


def test_baselines_know_the_images_they_are_given():
    references = draw_traverse(TraverseSettings(places=5, calibration=1), 0)[None]
    split = Split(torch.from_numpy(references[0][:, None]), torch.arange(5), torch.arange(5))
    found = baselines(references, split)
    assert [each["name"] for each in found] == ["image difference", "ridge"]
    assert found[0]["test_accuracy"] == 1.0
    assert baselines(references, split.take([])) == [
        {"name": "image difference", "test_accuracy": 0.0},
        {"name": "ridge", "test_accuracy": 0.0},
    ]


def test_the_decoder_and_the_task_agree_on_what_is_right():
    random = np.random.default_rng(0)
    scores = random.integers(0, 4, (30, 6)).astype(float)
    labels = random.integers(0, 6, 30)
    wanted = Places().right(torch.from_numpy(scores), torch.from_numpy(labels)).tolist()
    assert right(scores, labels).tolist() == wanted
    answers = decode(scores, [f"p{i}" for i in range(6)])
    assert [a["place"] == f"p{i}" for a, i in zip(answers, labels, strict=True)] == wanted
    for answer, row in zip(answers, scores, strict=True):
        assert answer["score"] == row.max()
        assert [*answer["best"].values()] == sorted(row[row > 0], reverse=True)[:5]


def folder_of(place, counts):
    for name, count in counts.items():
        (place / name).mkdir(parents=True)
        for number in range(count):
            Image.new("L", (9, 7), 20 * number).save(place / name / f"{number}.png")
    return place


@pytest.mark.parametrize(
    ("counts", "options", "words"),
    [
        ({"a": 3, "b": 2}, {}, r"traverses of unequal length \(a 3, b 2\): each place needs one"),
        ({"a": 3, "b": 3, "c": 0}, {}, r"unequal length \(a 3, b 3, c 0\)"),
        ({"a": 0, "b": 0}, {}, "two places are the least"),
        ({}, {}, "it has none"),
        ({"a": 3, "b": 3}, {"side": 0}, "image_size must be at least 1"),
        (
            {"a": 3, "b": 3},
            {"calibration": -1},
            "calibration is 0 to 2, got -1: of 3 places one",
        ),
        ({"a": 3, "b": 3}, {"weather": "rain"}, "data.options has no 'weather'"),
    ],
)
def test_traverses_of_unequal_length_are_refused(tmp_path, counts, options, words):
    place = folder_of(tmp_path, counts)
    with pytest.raises((DataError, UsageError), match=words):
        load_data("places-folder", place, options=options)


def test_other_files_of_a_traverse_are_left_alone(tmp_path):
    place = folder_of(tmp_path, {"a": 3, "b": 3})
    (place / "a" / "gps.txt").write_text("no image")
    (place / "notes.txt").write_text("no folder")
    data = load_data("places-folder", place, options={"side": 4, "query": "a"})
    assert data.input_shape == (1, 4, 4)
    assert data.train.images[:, 0, 0, 0].tolist() == [0, 20, 40]
    assert (len(data.validation), len(data.test)) == (1, 2)
    with pytest.raises(UsageError, match=r"needs whole traverses: leave out data\.limit"):
        load_data("places-folder", place, limit=2)
    with pytest.raises(UsageError, match=r"has images of 16 pixels: set data\.options\.side"):
        load_data("places-folder", place, image_size=8)


def test_images_and_traverses_are_in_the_order_of_their_numbers(tmp_path):
    numbers = range(12)
    for traverse, form in (("run2", "{}.png"), ("run10", "frame{:03d}.png")):
        (tmp_path / traverse).mkdir()
        for number in numbers:
            file = tmp_path / traverse / form.format(number)
            Image.new("L", (9, 7), 20 * number).save(file)
    options = {"side": 4, "calibration": 2}
    data = load_data("places-folder", tmp_path, options=options)
    assert data.train.images[:, 0, 0, 0].tolist() == [20 * n for n in numbers]
    held_out = data.test.labels.tolist()
    assert data.test.images[:, 0, 0, 0].tolist() == [20 * place for place in held_out]


@pytest.mark.parametrize("share", [{"validation": 0.5}, {"test": 0.5}])
def test_shares_of_images_are_refused(tmp_path, share):
    place = folder_of(tmp_path, {"a": 3, "b": 3})
    with pytest.raises(UsageError, match=r"set data\.options\.calibration"):
        load_data("places-folder", place, **share)
