"""Imitation of flights: demonstrations, the task, and a student that flies."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import smallfry
from smallfry.cli import main
from smallfry.data import load_data
from smallfry.errors import RunError, UsageError
from smallfry.kits.uav.demonstrations import FlightSettings, demonstrate
from smallfry.kits.uav.flight import ACTIONS, FORWARD, LAND, LEFT, MISSION, Glance, fly
from smallfry.kits.uav.pictures import EVERY, draw_depth, draw_flights, film
from smallfry.kits.uav.policy import UAVPolicy
from smallfry.kits.uav.rooms import View, make_room
from smallfry.kits.uav.students import masks_of, policy_input, policy_of
from smallfry.tasks import HasRecipe, LimitsAugmentation, Pictured, create_task, find_task
from smallfry.training.recipes import recipe_of
from smallfry_runtime.decoders import uav_policy as decoder
from smallfry_runtime.decoders.uav_segmentation import Camera
from smallfry_runtime.runtime import Runtime

SHAPE = (24, 32)
FLIGHTS = {"flights": 6, "frames": 60}
SMALL = ["--data.options", json.dumps(FLIGHTS), "--data.image_size", "24", "32"]
SMALL += ["--data.validation", "0.4"]


@pytest.fixture(scope="module")
def flights():
    return load_data("uav-flights", options=FLIGHTS, image_size=SHAPE, validation=0.4)


def test_the_task_is_found_with_its_recipe():
    kind = find_task("uav-policy")
    assert kind is UAVPolicy
    assert isinstance(kind, HasRecipe)
    assert isinstance(kind(), Pictured)
    assert isinstance(kind(), LimitsAugmentation)
    assert recipe_of("uav-policy").name == "recipe_policy.yaml"
    assert create_task(kind.name, 0.1).label_smoothing == 0.1
    shares = torch.zeros(2, 10)
    with pytest.raises(UsageError, match=r"one of forward, left, right, land: name flights"):
        kind().targets(torch.zeros(2), shares)


def test_inputs_hold_the_picture_and_the_last_action():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 5), np.uint8)
    found = policy_input(pixels, 2)
    assert found.shape == (7, 4, 5)
    assert np.array_equal(found[:3], pixels)
    assert found[3:, 0, 0].tolist() == [0, 0, 255, 0]
    assert (found[3:] == found[3:, :1, :1]).all()


def test_demonstrations_are_frames_of_whole_flights(flights):
    assert flights.classes == ACTIONS
    assert flights.input_shape == (7, *SHAPE)
    assert len(flights.test) == 60  # one flight
    assert len(flights.validation) == 120
    assert len(flights.train) == 180
    assert flights.generated["flights"] == 6
    frames = demonstrate(0, "train", FlightSettings(**FLIGHTS), SHAPE)
    held = [(inputs.tobytes(), action) for inputs, action in frames]
    images, labels = flights.validation.images.numpy(), flights.validation.labels.tolist()
    assert [(i.tobytes(), a) for i, a in zip(images[:60], labels, strict=False)] == held
    pictures = [
        image[:3].tobytes() for s in (flights.train, flights.test) for image in s.images.numpy()
    ]
    assert len({*pictures}) == 240


def test_demonstrations_fly_and_land(flights):
    labels = torch.cat([flights.train.labels, flights.validation.labels, flights.test.labels])
    assert (labels == FORWARD).any()
    lasts = flights.train.images[:, 3:, 0, 0].argmax(dim=1)
    landing = flights.train.labels == LAND
    assert landing.sum() >= 3  # the end of each flight
    assert (lasts[landing] == LAND).all()


def test_flights_are_read_from_the_cache(flights, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("it is flown again")

    monkeypatch.setattr("smallfry.kits.uav.demonstrations.demonstrate", refuse)
    again = load_data("uav-flights", options=FLIGHTS, image_size=SHAPE, validation=0.4)
    assert again.fingerprint == flights.fingerprint
    assert torch.equal(again.test.images, flights.test.images)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"flights": 3}, "data.options.flights is 4 to 100,000, got 3"),
        ({"frames": 0}, "data.options.frames is 1 to 150, got 0"),
        ({"rooms": 3}, "data.options has no 'rooms'"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        load_data("uav-flights", options=options)


def test_other_students_are_refused(tmp_path):
    with pytest.raises(RunError):
        load_data("uav-flights", options={**FLIGHTS, "students": str(tmp_path)}, image_size=SHAPE)
    with pytest.raises(UsageError, match=r"uav-flights has no data\.channels"):
        load_data("uav-flights", options=FLIGHTS, channels=3)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("uav") / "run"
    asked = ["train", "--task", "uav-policy", *SMALL, "--epochs", "2", "--batch_size", "8"]
    assert main([*asked, "--progress", "quiet", "--run", str(place)]) == 0
    return place


def test_the_task_alone_is_a_run(run, capsys):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["task"] == "uav-policy"
    assert summary["measured"]["parameters"] < 63_796  # of narrower images
    assert {"loss", "accuracy", "macro_f1"} <= {*summary["measured"]["test"]}
    assert {*summary["per_class"]} == {*ACTIONS}
    assert main(["evaluate", str(run), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["loss"] == pytest.approx(summary["measured"]["test"]["loss"])


def test_an_array_is_answered_with_an_action(run, tmp_path, capsys):
    file = tmp_path / "frame.npy"
    np.save(file, policy_input(np.full((3, *SHAPE), 90, np.uint8), LEFT))
    assert main(["predict", str(run), str(file), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["action"] in ACTIONS
    assert sum(answer["probabilities"].values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "value"),
    [("flip", "true"), ("color_jitter", "0.3"), ("cutout", "4"), ("erasing", "0.5")],
)
def test_frames_that_would_show_another_action_are_refused(tmp_path, capsys, name, value):
    asked = ["train", "--task", "uav-policy", *SMALL, "--run", str(tmp_path / "run")]
    assert main([*asked, f"--augment.{name}", value]) == 2
    assert f"would not hold for images changed by augment.{name}" in capsys.readouterr().err


def glance_of(seconds, last=FORWARD):
    pixels = np.random.default_rng(0).integers(0, 256, (3, *SHAPE), np.uint8)
    view = View(pixels, np.ones(SHAPE, np.int64), np.ones(SHAPE))
    camera = Camera.of_view(SHAPE, 75.0, 1.0, 15.0)
    return Glance(view, np.ones(SHAPE), camera, last, seconds)


def test_a_student_lands_after_the_mission_alone(run):
    trained = smallfry.load(run)
    with torch.no_grad():
        trained.model.head.bias[LAND] += 100
    policy = policy_of(trained)
    assert policy(glance_of(MISSION - 0.2)) != LAND
    assert policy(glance_of(MISSION)) == LAND
    with pytest.raises(UsageError, match="a student of uav-segmentation is needed"):
        masks_of(trained)


def test_a_student_chooses_what_its_network_does(run):
    trained = smallfry.load(run)
    glance = glance_of(0.0, last=LEFT)
    inputs = torch.from_numpy(policy_input(glance.view.pixels, LEFT))[None]
    with torch.no_grad():
        logits = trained.model(trained.normalize(inputs))[0]
    assert policy_of(trained)(glance) == int(logits[:LAND].argmax())


def test_flights_of_a_student_are_labelled_by_the_state_machine(run, flights):
    options = {**FLIGHTS, "students": f"{run}, {run}"}
    data = load_data("uav-flights", options=options, image_size=SHAPE, validation=0.4)
    assert len(data.train) == 180 + 2 * 2 * 60  # half as many flights by each
    assert torch.equal(data.train.images[:180], flights.train.images)
    assert torch.equal(data.test.images, flights.test.images)
    assert data.generated["students"] == 2
    settings = FlightSettings(**FLIGHTS)
    frames = demonstrate(1_000_000, "train", settings, SHAPE, policy_of(smallfry.load(run)))
    assert data.train.labels[180:240].tolist() == [action for _, action in frames]


def test_the_labels_are_not_what_the_student_does():
    settings = FlightSettings(flights=4, frames=150)
    frames = demonstrate(0, "train", settings, SHAPE, lambda glance: FORWARD)
    actions = [action for _, action in frames]
    assert FORWARD in actions
    assert {*actions[-20:]} & {1, 2}  # before it touches something, the state machine turns
    lasts = {inputs[3:, 0, 0].argmax() for inputs, _ in frames[1:]}
    assert FORWARD in lasts


def test_answers_are_the_likeliest_actions():
    logits = np.log([[0.1, 0.2, 0.6, 0.1], [0.7, 0.1, 0.1, 0.1]])
    found = decoder.decode(logits, ACTIONS)
    assert [each["action"] for each in found] == ["right", "forward"]
    assert found[0]["probabilities"]["right"] == pytest.approx(0.6)
    again = UAVPolicy().decode(torch.from_numpy(logits).float(), ACTIONS)
    for one, other in zip(again, found, strict=True):
        assert one["action"] == other["action"]
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-6)
    with pytest.raises(UsageError, match="no setting 'beam'"):
        decoder.decode(logits, ACTIONS, {"beam": 3})


def test_mistakes_are_drawn(flights, tmp_path):
    outputs = torch.randn(len(flights.train), 4)
    UAVPolicy().draw(outputs, flights.train, ACTIONS, tmp_path)
    for name in ("reliability.png", "confusion_matrix.png", "mistakes.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 100


def test_flights_are_drawn_and_filmed(tmp_path):
    room, glances = make_room(0), []
    flight = fly(lambda g: FORWARD, room, watch=lambda g, a: glances.append(g))
    draw_flights([room] * 5, [flight] * 5, tmp_path / "flights.png")
    with Image.open(tmp_path / "flights.png") as picture:
        assert picture.width > picture.height > 300
    masks = [glance.view.labels for glance in glances]
    film(room, glances, masks, flight, tmp_path / "flight.gif")
    with Image.open(tmp_path / "flight.gif") as picture:
        assert picture.n_frames == len(range(0, len(glances), EVERY)) + 1
        assert picture.size == (192 + 360, 288)
    shown = {"truth": masks[0], "student": masks[0]}
    draw_depth(glances[0], shown, glances[0].view.depth, tmp_path / "depth.png")
    assert (tmp_path / "depth.png").stat().st_size > 5000


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "int8", "int8_dynamic"])
@pytest.mark.filterwarnings("ignore::smallfry.errors.SmallfryWarning")  # few images
def test_a_run_is_exported_and_decoded_without_pytorch(run, flights, tmp_path, precision):
    export = smallfry.export(run, tmp_path / "export", precision=precision)
    runtime = Runtime(export)
    assert runtime.manifest.task == "uav-policy"
    pixels = flights.train.images.numpy()
    found = [each["action"] for each in runtime.decode(pixels)]
    wanted = [each["action"] for each in smallfry.load(run).decode(pixels)]
    same = np.mean([a == b for a, b in zip(found, wanted, strict=True)])
    assert same == 1 if precision == "float32" else same > 0.7


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::smallfry.errors.SmallfryWarning")  # few images
def test_natural_gradient_and_quantization_work(run, tmp_path):
    asked = ["train", "--task", "uav-policy", *SMALL, "--epochs", "1", "--progress", "quiet"]
    assert main([*asked, "--optimizer", "kfac", "--run", str(tmp_path / "kfac")]) == 0
    methods = ["--methods", "[{quantize: {weights: 8, activations: 8}}]"]
    assert main(["compress", str(run), *methods, "--to", str(tmp_path / "int8")]) == 0
