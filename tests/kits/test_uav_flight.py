"""Flights: clearance and corridor by brute force, the state machine, and the simulator."""

import math
from dataclasses import replace

import numpy as np
import pytest

from smallfry.kits.uav.flight import (
    ACTIONS,
    FAR,
    FORWARD,
    HEIGHT,
    LAND,
    LEFT,
    MISSION,
    NEAR,
    RADIUS,
    RIGHT,
    Flight,
    Glance,
    Pilot,
    clearances,
    corridor_of,
    fly,
    moved,
    relative_depth,
)
from smallfry.kits.uav.rooms import FLOOR, OBSTACLE, View, is_free, make_room
from smallfry.kits.uav.views import SHAPE
from smallfry_runtime.decoders.uav_segmentation import Camera, ground_depth

CAMERA = Camera.of_view(SHAPE, 75.0, HEIGHT, 15.0)


def glance_at(ahead, last=FORWARD, seconds=0.0, left=None, right=None, camera=CAMERA, scale=1.0):
    """See walls at so many metres: ahead, and if given in the left and right thirds."""
    wall = np.full(SHAPE, float(ahead))
    third = SHAPE[1] // 3
    if left is not None:
        wall[:, :third] = left
    if right is not None:
        wall[:, -third:] = right
    plane = ground_depth(camera, SHAPE)
    labels = np.where(plane < wall, FLOOR, OBSTACLE)
    depth = np.minimum(plane, wall)
    view = View(np.zeros((3, *SHAPE), np.uint8), labels, depth)
    return Glance(view, depth / scale, camera, last, seconds)


def test_clearance_is_a_quantile_of_what_is_no_floor():
    random = np.random.default_rng(0)
    depth = random.uniform(0.5, 5, (20, 9))
    floor = random.random((20, 9)) < 0.4
    floor[:, 4] = True
    columns = []
    for u in range(9):
        values = sorted(depth[~floor[:, u], u])
        at = math.floor(0.1 * (len(values) - 1)) if values else 0
        columns.append(values[at] if values else 100.0)
    wanted = [
        np.median([columns[max(0, u - 1)], columns[u], columns[min(8, u + 1)]]) for u in range(9)
    ]
    assert clearances(depth, floor) == pytest.approx(np.array(wanted))


def test_the_corridor_is_as_wide_as_the_drone():
    clear = np.full(64, 3.0)
    assert corridor_of(clear, CAMERA) == 3.0
    beside = clear.copy()
    u = math.ceil(CAMERA.cx + 0.4 / 1.0 * CAMERA.focal)
    beside[u:] = 1.0  # 0.4 m to the right, at 1 m
    assert corridor_of(beside, CAMERA) == 3.0
    inside = clear.copy()
    inside[math.floor(CAMERA.cx + 0.3 / 1.0 * CAMERA.focal)] = 1.0
    assert corridor_of(inside, CAMERA) == 1.0
    middle = clear.copy()
    middle[34] = 0.1  # one of the five central columns
    assert corridor_of(middle, CAMERA) == 0.1


def test_the_pilot_flies_on_where_the_corridor_is_free():
    assert Pilot()(glance_at(3.0)) == FORWARD
    assert Pilot()(glance_at(3.0, scale=1.7)) == FORWARD
    assert Pilot()(glance_at(1.5, scale=0.4)) == FORWARD


def with_scale(pilot):
    pilot(glance_at(3.0))  # a wall too near leaves no floor to scale by
    return pilot


@pytest.mark.parametrize(("left", "right", "turn"), [(3.0, 0.7, LEFT), (0.7, 3.0, RIGHT)])
def test_the_pilot_turns_to_the_side_with_more_room(left, right, turn):
    pilot = with_scale(Pilot())
    assert pilot(glance_at(0.7, left=left, right=right)) == turn
    assert pilot.state == "avoid"
    # the direction stays, until the corridor is free enough
    assert pilot(glance_at(0.7, left=right, right=left, last=turn)) == turn
    assert pilot(glance_at((NEAR + FAR) / 2, last=turn)) == turn
    assert pilot(glance_at(FAR + 0.2, last=turn)) == FORWARD
    assert pilot.state == "explore"


def test_the_pilot_turns_half_round_where_avoiding_takes_four_seconds():
    pilot = with_scale(Pilot())
    actions = [pilot(glance_at(0.5, last=LEFT)) for _ in range(20)]
    assert {*actions} in ({LEFT}, {RIGHT})
    turning = [pilot(glance_at(0.5, last=LEFT))] + [
        pilot(glance_at(3.0, last=LEFT)) for _ in range(14)
    ]
    assert {*turning} == {actions[0]}  # 15 steps of 12 degrees, whatever is ahead
    assert pilot(glance_at(3.0, last=LEFT)) == FORWARD


def test_two_seconds_without_a_scale_end_in_an_emergency_landing():
    pilot = Pilot()
    blind = glance_at(0.5)
    assert (blind.view.labels != FLOOR).all()
    assert [pilot(blind) for _ in range(9)] == [LEFT] * 9
    assert pilot(blind) == LAND
    assert pilot.state == "emergency"
    assert pilot(glance_at(3.0)) == LAND


def test_a_scale_is_kept_where_no_floor_is_in_view():
    pilot = with_scale(Pilot())
    for _ in range(12):
        assert pilot(glance_at(0.5)) != LAND


def test_the_pilot_lands_after_the_mission_over_floor_that_it_has_seen():
    pilot = Pilot()
    early = [pilot(glance_at(3.0, seconds=n * 0.2)) for n in range(20)]
    assert early == [FORWARD] * 20  # 1.6 m, so it is over what it saw at first
    assert pilot(glance_at(3.0, seconds=MISSION)) == LAND
    assert pilot(glance_at(3.0, last=LAND, seconds=MISSION)) == LAND
    assert pilot(glance_at(0.5, last=LAND, seconds=MISSION)) != LAND  # no floor ahead any more
    fresh = Pilot()
    assert fresh(glance_at(3.0, seconds=MISSION)) == FORWARD  # nothing behind it was ever seen


def test_the_pilot_takes_a_students_masks():
    seen = []

    def segment(pixels):
        seen.append(pixels.shape)
        return np.full(SHAPE, OBSTACLE)

    pilot = Pilot(segment)
    assert pilot(glance_at(3.0)) == LEFT  # all is obstacle: no scale
    assert seen == [(3, *SHAPE)]


def test_movements():
    at = np.array([1.0, 2.0, 30.0])
    ahead = moved(at, FORWARD)
    assert np.hypot(*(ahead - at)[:2]) == pytest.approx(0.08)
    assert math.degrees(math.atan2(*(ahead - at)[1::-1])) == pytest.approx(30)
    assert moved(at, LEFT).tolist() == [1, 2, 42]
    assert moved(at, RIGHT).tolist() == [1, 2, 18]
    assert moved(np.array([0, 0, 5.0]), RIGHT)[2] == 353
    assert moved(at, LAND).tolist() == at.tolist()


def test_relative_depth_has_the_stated_errors():
    random = np.random.default_rng(0)
    depth = np.full((200, 200), 3.0)
    assert relative_depth(depth, random, 2.0, 0.0, 0.0) == pytest.approx(1.5)
    noisy = relative_depth(depth, random, 1.0, 0.05, 0.0)
    assert noisy.std() == pytest.approx(0.15, rel=0.05)
    smooth = relative_depth(depth, random, 1.0, 0.0, 0.1)
    assert np.abs(smooth / 3 - 1).max() <= 0.1 + 1e-12
    assert smooth.std() > 0.02
    assert np.abs(np.diff(smooth, axis=0)).max() < 0.02  # without jumps


def test_a_flight_into_a_wall_ends_in_contact():
    room = make_room(0)
    flight = fly(lambda glance: FORWARD, room)
    assert flight.outcome == "contact"
    assert not flight.is_safe
    x, y, _, height = flight.path[-1]
    assert not is_free(room, x, y, RADIUS, height - 0.1)
    assert all(is_free(room, *p[:2], RADIUS, p[3] - 0.1) for p in flight.path[:-1])
    assert flight.distance == pytest.approx(0.08 * len(flight.actions))
    assert flight.seconds == pytest.approx(0.2 * len(flight.actions))
    assert flight.covered >= 0.0625


def test_low_boxes_are_flown_over_and_not_landed_on():
    room = make_room(0)
    box = int(room.high[:, 2].argmin())
    assert room.high[box, 2] < 0.9
    middle = ((room.low + room.high) / 2)[box]
    above = room._replace(start=room.start._replace(x=float(middle[0]), y=float(middle[1])))
    flight = fly(lambda glance: LAND, above)
    assert flight.outcome == "unsafe landing"
    assert not flight.is_safe
    turning = fly(lambda glance: LEFT, above, shape=(6, 8))
    assert turning.outcome == "out of time"
    assert turning.seconds == pytest.approx(90)
    assert turning.distance == 0


def test_a_landing_takes_a_metre_and_ends_early_before_the_mission():
    room = make_room(0)
    flight = fly(lambda glance: LAND, room)
    assert flight.outcome == "landed early"
    assert len(flight.actions) == 16  # 0.06 m each, from 1 m to below 0.06 m
    assert flight.path[-1, 3] <= 0.06

    def hesitant(glance):
        return LAND if glance.seconds < 1 else LEFT

    heights = fly(hesitant, room, shape=(6, 8)).path[:, 3]
    assert heights.min() == pytest.approx(0.7)
    assert heights[-1] == HEIGHT  # it has climbed again


def test_a_flight_depends_on_its_seed_alone():
    room = make_room(4)
    one, again = (fly(Pilot(), room, shape=(24, 32)) for _ in range(2))
    assert np.array_equal(one.path, again.path)
    glances = []

    def land(glance):
        glances.append(glance)
        return LAND

    fly(land, room, seed=1)
    fly(land, room, seed=2)
    half = len(glances) // 2
    assert not np.array_equal(glances[0].relative, glances[half].relative)
    assert np.array_equal(glances[0].view.depth, glances[half].view.depth)


def test_policies_are_given_the_last_action_the_time_and_the_height():
    seen = []

    def watch(glance, action):
        seen.append((glance.last, glance.seconds, glance.camera.height, action))

    fly(lambda glance: LAND, make_room(0), watch=watch)
    assert seen[0] == (FORWARD, 0.0, HEIGHT, LAND)
    assert seen[1][2] == pytest.approx(0.94)
    assert seen[1][1] == pytest.approx(0.2)
    assert len(ACTIONS) == 4


def test_safe_flights_are_those_without_contact():
    flight = Flight("landed", np.zeros((1, 4)), np.zeros(0, np.int64), 0.0, 0.0, 0.0)
    safe = {
        name
        for name in ("landed", "landed early", "contact", "unsafe landing", "out of time")
        if flight._replace(outcome=name).is_safe
    }
    assert safe == {"landed", "landed early", "out of time"}


def test_the_height_sets_the_scale():
    pilot = Pilot()
    low = replace(CAMERA, height=0.5)
    pilot(glance_at(3.0, camera=low))
    assert pilot.scale.last[-1].a == pytest.approx(1.0)


@pytest.mark.slow
def test_the_pilot_flies_without_contact():
    flights = [fly(Pilot(), make_room(number)) for number in range(20)]
    assert sum(flight.is_safe for flight in flights) >= 19
    assert np.mean([flight.distance for flight in flights]) > 7
