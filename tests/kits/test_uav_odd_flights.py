"""Flights and demonstrations that are odd: without a scale, on the spot, of few; and by loops."""

import numpy as np
import pytest

from smallfry.data import load_data
from smallfry.errors import UsageError
from smallfry.kits.uav.demonstrations import FlightSettings, demonstrate
from smallfry.kits.uav.flight import (
    FORWARD,
    LAND,
    LEFT,
    RIGHT,
    Pilot,
    clearances,
    corridor_of,
    fly,
    relative_depth,
)
from smallfry.kits.uav.rooms import make_room
from smallfry.kits.uav.students import policy_input
from smallfry_runtime.decoders.uav_segmentation import Camera

TINY = (2, 2)  # no pixel has seven neighbours: without a scale, flights end in an emergency


@pytest.mark.parametrize("seed", range(3))
def test_clearance_is_that_of_a_loop_over_columns(seed):
    random = np.random.default_rng(seed)
    depth, floor = random.uniform(0.3, 6, (20, 9)), random.random((20, 9)) < 0.5
    floor[:, 4] = True
    single = []
    for u in range(9):
        kept = np.sort(depth[~floor[:, u], u])
        single.append(kept[int(0.1 * (len(kept) - 1))] if len(kept) else 100.0)
    edged = [single[0], *single, single[-1]]
    wanted = [np.median(edged[u : u + 3]) for u in range(9)]
    found = clearances(depth, floor)
    assert found == pytest.approx(wanted)
    assert clearances(depth, np.ones_like(floor)).tolist() == [100.0] * 9
    camera = Camera(9.0, 1.0, 4.0, 9.5)
    ahead = [f for u, f in enumerate(found) if abs(u - 4) / 9 * f < 0.35 or abs(u - 4) <= 2]
    assert corridor_of(found, camera) == pytest.approx(min(ahead))


def test_relative_depth_without_errors_is_the_depth_over_its_scale():
    depth = np.random.default_rng(0).uniform(1, 5, (6, 8))
    found = relative_depth(depth, np.random.default_rng(1), 2.5, noise=0.0, field=0.0)
    assert found == pytest.approx(depth / 2.5)
    large = relative_depth(depth, np.random.default_rng(1), noise=5.0, field=0.1)
    assert (large > 0).all()


def test_a_flight_without_a_scale_is_an_emergency_landing():
    flight = fly(Pilot(), make_room(0), shape=TINY)
    assert flight.outcome in ("landed early", "unsafe landing")
    assert flight.actions[:9].tolist() == [LEFT] * 9
    assert {*flight.actions[9:].tolist()} == {LAND}
    assert flight.distance == 0
    assert flight.seconds == pytest.approx(0.2 * len(flight.actions))
    assert flight.path[:, 3].min() < 1.0
    assert (flight.path[9:, :3] == flight.path[9, :3]).all()


@pytest.mark.parametrize("action", [LEFT, RIGHT])
def test_turning_on_the_spot_ends_with_the_time(action):
    flight = fly(lambda glance: action, make_room(1), shape=TINY)
    assert (flight.outcome, flight.is_safe) == ("out of time", True)
    assert flight.seconds == pytest.approx(90)
    assert flight.path.shape == (451, 4)
    turns = np.diff(np.unwrap(np.radians(flight.path[:, 2])))
    assert np.degrees(turns) == pytest.approx(np.full(450, 12.0 if action == LEFT else -12.0))
    assert flight.covered == pytest.approx(0.25**2)


def test_a_flight_is_as_long_as_its_steps_and_covers_its_cells():
    steps = [FORWARD, FORWARD, LEFT, FORWARD, LAND, FORWARD]
    room = make_room(2)
    flight = fly(lambda glance: steps[round(glance.seconds / 0.2) % len(steps)], room, shape=TINY)
    forward = int((flight.actions == FORWARD).sum())
    assert flight.distance == pytest.approx(0.08 * forward)
    cells = {tuple(cell) for cell in (flight.path[:, :2] // 0.25).tolist()}
    assert flight.covered == pytest.approx(0.0625 * len(cells))
    assert flight.path[5, 3] == pytest.approx(0.94)
    assert flight.path[6, 3] == pytest.approx(1.0)  # it rises again
    assert flight.path[0, :3] == pytest.approx([*room.start])


@pytest.fixture
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SMALLFRY_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("_cache")
@pytest.mark.parametrize(
    ("flights", "test", "validation", "wanted"),
    [
        (4, 0.9, 0.9, [1, 0, 3]),  # one flight is always left to train on
        (4, 0.25, 0.9, [1, 2, 1]),
        (5, 0.01, 0.01, [3, 1, 1]),
        (4, 0.0, 0.0, [4, 0, 0]),
    ],
)
def test_whole_flights_are_held_out_but_never_all(flights, test, validation, wanted):
    options = {"flights": flights, "frames": 3}
    data = load_data(
        "uav-flights", options=options, test=test, validation=validation, image_size=TINY
    )
    found = [len(each) for each in (data.train, data.validation, data.test)]
    assert found == [3 * count for count in wanted]
    assert data.input_shape == (7, 2, 2)
    rows = demonstrate(len(data.validation) // 3, "train", FlightSettings(**options), TINY)
    for frame, (inputs, action) in enumerate(rows):
        assert np.array_equal(data.train.images[frame].numpy(), inputs)
        assert data.train.labels[frame] == action


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"flights": 3}, "flights is 4 to 100,000, got 3"),
        ({"frames": 0}, "frames is 1 to 150, got 0"),
        ({"frames": 151}, "frames is 1 to 150, got 151"),
        ({"seed": -1}, "seed is a whole number from 0"),
    ],
)
@pytest.mark.usefixtures("_cache")
def test_impossible_settings_of_flights_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        load_data("uav-flights", options=options, image_size=TINY)


def test_runs_of_students_are_separated_by_commas():
    assert FlightSettings(students=" a, b/c ,,").runs == ("a", "b/c")
    assert FlightSettings().runs == ()
    taken = policy_input(np.full((3, 2, 2), 9, np.uint8), LAND)[3:]
    assert [channel.max() for channel in taken] == [0, 0, 0, 255]
