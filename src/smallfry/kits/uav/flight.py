"""Flights in generated rooms: a state machine on metric depth, and the simulator it flies in.

The state machine, ours, sees a mask and a relative depth. The floor gives the scale; each column
of the image has a clearance, the 10 % quantile of the depth of all that is not floor; the corridor
is the smallest clearance of columns less than 0.35 m from the optical axis there.

    explore    forward; where the corridor is below 0.75 m, avoid
    avoid      turn to the side with more clearance until the corridor is above 1.1 m, at most 4 s,
               then half a turn
    search     after the mission: explore until the drone is over floor that it has seen
    land       descend as long as floor is ahead
    emergency  2 s without any scale: land at once
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from smallfry.kits.uav.rooms import (
    FLOOR,
    Pose,
    Room,
    View,
    at_height,
    is_free,
    look,
    random_of,
)
from smallfry.kits.uav.views import ANGLE, PITCH, SHAPE
from smallfry_runtime.decoders.uav_segmentation import (
    FARTHEST,
    AdaptiveScale,
    Camera,
    ground_depth,
)

__all__ = [
    "ACTIONS",
    "Flight",
    "Glance",
    "Pilot",
    "Policy",
    "clearances",
    "corridor_of",
    "fly",
    "relative_depth",
]

Floats = NDArray[np.float64]
Segment = Callable[[NDArray[np.uint8]], NDArray[np.int64]]
Outcome = Literal["landed", "landed early", "contact", "unsafe landing", "out of time"]

ACTIONS = ("forward", "left", "right", "land")
FORWARD, LEFT, RIGHT, LAND = range(4)
STEP = 0.2  # seconds
SPEED, TURN, SINK = 0.4 * STEP, 60.0 * STEP, 0.3 * STEP  # metres, degrees and metres a step
RADIUS, HEIGHT = 0.15, 1.0  # of the body and the flight, metres
BELOW = 0.1  # metres: boxes that end this far below the drone are flown over
MISSION, LIMIT = 40.0, 90.0  # seconds
TOUCHED = 0.06  # metres: height at which the drone has landed
NEAR, FAR = 0.75, 1.1  # metres of corridor at which avoidance begins and ends
HALF_WIDTH = 0.35  # metres
CENTRAL = 5  # columns that always count
QUANTILE = 0.1
AVOID_STEPS, HALF_TURN, BLIND_STEPS = round(4 / STEP), round(180 / TURN), round(2 / STEP)
CLEAR, STILL_CLEAR = 0.9, 0.5  # share of floor in the window: to remember it, to go on landing
ROOM_TO_LAND, OVER = 0.6, 0.2  # metres
CELL = 0.25  # metres, of coverage


class Glance(NamedTuple):
    """Input of a policy at one step."""

    view: View  # its labels and depth are the truth, for demonstrations
    relative: Floats  # (height, width), depth up to an unknown scale
    camera: Camera  # with the height of the barometer
    last: int  # action of the step before
    seconds: float  # since the start


class Policy(Protocol):
    """Choice of an action."""

    def __call__(self, glance: Glance) -> int:
        """Return the index of one of ``ACTIONS``."""


class Flight(NamedTuple):
    """Flight, with its end."""

    outcome: Outcome
    path: Floats  # (steps + 1, 4): x, y in metres, yaw in degrees, height in metres
    actions: NDArray[np.int64]  # (steps,)
    seconds: float
    distance: float  # flown, metres
    covered: float  # area of the 0.25 m cells that were visited, square metres

    @property
    def is_safe(self) -> bool:
        """True without contact, in flight and landing."""
        return self.outcome in ("landed", "landed early", "out of time")


def relative_depth(
    depth: Floats,
    random: np.random.Generator,
    scale: float = 1.0,
    noise: float = 0.05,
    field: float = 0.1,
) -> Floats:
    """Simulate a network's relative depth: scaled, with noise of pixels and a smooth error.

    Args:
        depth: True depth (height, width) in metres.
        random: Random numbers.
        scale: Metres of one unit.
        noise: Standard deviation of the relative error of each pixel.
        field: Largest relative error of a smooth field, bilinear between 4 × 5 points.
    """
    rows, columns = depth.shape
    points = random.uniform(-1, 1, (4, 5))
    y, x = np.linspace(0, 3, rows), np.linspace(0, 4, columns)
    along = np.stack([np.interp(x, np.arange(5), row) for row in points])
    smooth = np.stack([np.interp(y, np.arange(4), column) for column in along.T], axis=1)
    error = 1 + noise * random.standard_normal(depth.shape)
    return np.asarray(depth / scale * np.maximum(error, 0.1) * (1 + field * smooth))


def clearances(depth: Floats, floor: NDArray[np.bool_]) -> Floats:
    """Compute the clearance of each column in metres, (width,).

    It is the 10 % quantile of the depth of pixels that are no floor, and the median of three
    columns; a column that is all floor is clear.
    """
    ordered = np.sort(np.where(floor, np.inf, depth), axis=0)
    count = (~floor).sum(axis=0)
    chosen = np.floor(QUANTILE * np.maximum(count - 1, 0)).astype(np.int64)
    found = np.minimum(ordered[chosen, np.arange(depth.shape[1])], FARTHEST)
    padded = np.pad(found, 1, mode="edge")
    three = np.stack([padded[:-2], padded[1:-1], padded[2:]])
    return np.asarray(np.median(three, axis=0))


def corridor_of(clear: Floats, camera: Camera) -> float:
    """Compute the smallest clearance of columns in the drone's way, metres."""
    columns = np.arange(len(clear)) - camera.cx
    ahead = np.abs(columns / camera.focal * clear) < HALF_WIDTH
    ahead |= np.argsort(np.argsort(np.abs(columns), kind="stable")) < CENTRAL
    return float(clear[ahead].min())


class Pilot:
    """State machine that flies, and whose flights are demonstrations.

    Args:
        segment: Mask (height, width) of a picture (3, height, width), as by a student; None takes
            the true labels.
    """

    def __init__(self, segment: Segment | None = None) -> None:
        self.segment = segment
        self.scale = AdaptiveScale()
        self.state: Literal["explore", "avoid", "land", "emergency"] = "explore"
        self._turn, self._turned, self._blind = LEFT, 0, 0
        self._at = np.zeros(3)  # by its own actions: x and y in metres, yaw in degrees
        self._spots: list[Floats] = []  # floor that was seen to be free, (2,)

    def __call__(self, glance: Glance) -> int:
        """Choose an action."""
        self._at = moved(self._at, glance.last)
        labels = glance.view.labels if self.segment is None else self.segment(glance.view.pixels)
        floor = labels == FLOOR
        scale = self.scale.update(glance.relative, floor, glance.camera)
        if self.state == "emergency":
            return LAND
        if scale is None:
            self._blind += 1
            if self._blind >= BLIND_STEPS:
                self.state = "emergency"
                return LAND
            return LEFT  # to where there may be floor
        clear = clearances(scale.depth(glance.relative), floor)
        corridor = corridor_of(clear, glance.camera)
        window = _window(floor)
        if self.state == "land":
            if window >= STILL_CLEAR:
                return LAND
            self.state = "explore"
            self._spots.clear()  # what was seen is not as it seemed
        if window >= CLEAR and corridor > ROOM_TO_LAND:
            self._spots.append(self._spot(glance.camera, floor.shape))
        if glance.seconds >= MISSION and self._is_over_floor():
            self.state = "land"
            return LAND
        return self._explore(corridor, clear)

    def _explore(self, corridor: float, clear: Floats) -> int:
        if self.state == "explore":
            if corridor >= NEAR:
                return FORWARD
            left, _, right = (float(part.mean()) for part in np.array_split(clear, 3))
            self._turn = LEFT if left > right else RIGHT
            self.state, self._turned = "avoid", 0
        elif corridor > FAR and not self._turned > AVOID_STEPS:
            self.state = "explore"
            return FORWARD
        self._turned += 1
        if self._turned >= AVOID_STEPS + HALF_TURN:
            self.state = "explore"
        return self._turn

    def _spot(self, camera: Camera, shape: tuple[int, ...]) -> Floats:
        """Return where the middle of the window is on the floor."""
        rows, columns = shape[0], shape[1]
        depth = float(ground_depth(camera, (rows, columns))[round(rows * 5 / 6), columns // 2])
        pitch, row = math.radians(camera.pitch), round(rows * 5 / 6)
        down = (row - camera.cy) / camera.focal
        away = depth * (math.cos(pitch) - down * math.sin(pitch))  # along the floor
        yaw = math.radians(float(self._at[2]))
        return np.asarray(self._at[:2] + away * np.array([math.cos(yaw), math.sin(yaw)]))

    def _is_over_floor(self) -> bool:
        if not self._spots:
            return False
        away = np.hypot(*(np.stack(self._spots) - self._at[:2]).T)
        return bool(away.min() < OVER)


def _window(floor: NDArray[np.bool_]) -> float:
    """Return the share of floor in the lower third of the middle third."""
    rows, columns = floor.shape
    return float(floor[rows - rows // 3 :, columns // 3 : columns - columns // 3].mean())


def moved(at: Floats, action: int) -> Floats:
    """Return a place (x, y, yaw) after an action."""
    x, y, yaw = at
    if action == FORWARD:
        turn = math.radians(yaw)
        return np.array([x + SPEED * math.cos(turn), y + SPEED * math.sin(turn), yaw])
    turns = {LEFT: TURN, RIGHT: -TURN}
    return np.array([x, y, (yaw + turns.get(action, 0.0)) % 360])


def fly(
    policy: Policy,
    room: Room,
    seed: int = 0,
    shape: tuple[int, int] = SHAPE,
    watch: Callable[[Glance, int], Any] | None = None,
) -> Flight:
    """Fly in a room until the drone has landed or touched something, for 90 s at most.

    Args:
        policy: Chooses the actions; one of its own for each flight, where it has a memory.
        room: The room, with the start.
        seed: Seed of noise in pictures and depth.
        shape: Height and width of pictures.
        watch: Called with each glance and action.
    """
    random = random_of("uav-flights", room.split, seed, room.number)
    level = Camera.of_view(shape, ANGLE, HEIGHT, PITCH)
    scale = float(random.uniform(0.5, 2.0))
    at, height, last = np.array(room.start), HEIGHT, FORWARD
    path, actions = [np.append(at, height)], []
    outcome: Outcome = "out of time"
    for number in range(round(LIMIT / STEP)):
        camera = at_height(level, height)
        view = look(room, Pose(*at.tolist()), camera, shape, random)
        relative = relative_depth(view.depth, random, scale)
        glance = Glance(view, relative, camera, last, number * STEP)
        last = policy(glance)
        if watch is not None:
            watch(glance, last)
        at = moved(at, last)
        height = max(height - SINK, 0.0) if last == LAND else min(height + SINK, HEIGHT)
        path.append(np.append(at, height))
        actions.append(last)
        if not is_free(room, float(at[0]), float(at[1]), RADIUS, height - BELOW):
            outcome = "unsafe landing" if last == LAND else "contact"
            break
        if height <= TOUCHED:
            outcome = "landed" if number * STEP >= MISSION else "landed early"
            break
    places = np.stack(path)
    steps = np.diff(places[:, :2], axis=0)
    cells = {tuple(cell) for cell in np.floor(places[:, :2] / CELL).astype(int).tolist()}
    return Flight(
        outcome,
        places,
        np.array(actions, np.int64),
        len(actions) * STEP,
        float(np.hypot(*steps.T).sum()),
        len(cells) * CELL**2,
    )
