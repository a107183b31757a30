"""Generated rooms, seen by ray casting: pictures with exact labels and depth.

A room is 5 × 4 × 2.5 m with eight boxes. Rays have a unit component along the optical axis, so that
the parameter of a hit is the depth Z. World axes are x and y on the floor, and z upwards; yaw is
counted from x to y, in degrees. A room is a function of seed, split and number alone.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from smallfry.data.philox import generator
from smallfry_runtime.decoders.uav_segmentation import Camera

__all__ = [
    "CLASSES",
    "VERSION",
    "Pose",
    "Room",
    "View",
    "is_free",
    "look",
    "make_room",
    "random_of",
]

Floats = NDArray[np.float64]
VERSION = 1  # changes whenever the rooms or views of a seed do
CLASSES = ("other", "floor", "obstacle")
OTHER, FLOOR, OBSTACLE = range(3)
SIZE = np.array([5.0, 4.0, 2.5])  # metres
BOXES = 8
SIDES, HEIGHTS = (0.25, 0.5), (0.6, 1.6)  # of boxes, metres
FROM_START = 0.8  # metres between a box and the start
FROM_WALL = 0.6  # metres between the start and a wall
BETWEEN = 0.1  # metres between boxes
BLOBS, WAVES = 5, 3  # shadows on the floor; waves of the texture
BASE = {"floor": (0.48, 0.41, 0.33), "wall": (0.76, 0.75, 0.71), "box": (0.62, 0.47, 0.30)}


class Pose(NamedTuple):
    """Place of a camera in a room."""

    x: float  # metres
    y: float
    yaw: float  # degrees


class Room(NamedTuple):
    """Room, with all settings of its pictures."""

    number: int
    split: str
    low: Floats  # (boxes, 3), corners in metres
    high: Floats
    start: Pose  # of flights
    colours: Floats  # (boxes + 3, 3): of boxes, floor, walls and ceiling
    light: Floats  # (3,), towards it
    gains: Floats  # (3,), colour of the light
    blobs: Floats  # (blobs, 4): x, y, radius and depth of shadows
    waves: Floats  # (waves, 4): wave vector and phase of the texture


class View(NamedTuple):
    """View of a camera."""

    pixels: NDArray[np.uint8]  # (3, height, width)
    labels: NDArray[np.int64]  # (height, width), indices of ``CLASSES``
    depth: Floats  # (height, width), metres along the optical axis


def random_of(name: str, split: str, seed: int, number: int) -> np.random.Generator:
    """Create the random numbers of one thing, independent of all others."""
    return generator(f"{name} {VERSION} {split}", seed, number, 0)


def make_room(number: int, split: str = "test", seed: int = 0) -> Room:
    """Make a room.

    Args:
        number: Its number in its split.
        split: ``train``, of which validation is a part, or ``test``.
        seed: Seed of all rooms.
    """
    random = random_of("uav-rooms", split, seed, number)
    at = random.uniform(FROM_WALL, SIZE[:2] - FROM_WALL)
    start = Pose(float(at[0]), float(at[1]), float(random.uniform(0, 360)))
    low, high = np.zeros((0, 3)), np.zeros((0, 3))
    while len(low) < BOXES:
        sides = random.uniform(*SIDES, 2)
        corner = random.uniform(0, SIZE[:2] - sides)
        bottom = np.append(corner, 0.0)
        top = np.append(corner + sides, random.uniform(*HEIGHTS))
        beside = (bottom[:2] > high[:, :2] + BETWEEN) | (top[:2] < low[:, :2] - BETWEEN)
        if beside.any(axis=1).all() and _distance(at, bottom[None], top[None])[0] >= FROM_START:
            low, high = np.vstack([low, bottom]), np.vstack([high, top])
    names = (*("box",) * BOXES, "floor", "wall", "wall")
    base = np.array([BASE[name] for name in names])
    colours = base * random.uniform(0.88, 1.12, 3) + random.normal(0, 0.035, base.shape)
    light = np.append(random.normal(0, 0.6, 2), 1.0)
    blobs = np.column_stack(
        [
            random.uniform(0, SIZE[:2], (BLOBS, 2)),
            random.uniform(0.15, 0.5, BLOBS),
            random.uniform(0.25, 0.6, BLOBS),
        ]
    )
    waves = np.column_stack(
        [random.normal(0, 9, (WAVES, 3)), random.uniform(0, 2 * math.pi, WAVES)]
    )
    return Room(
        *(number, split, low, high, start, np.clip(colours, 0.05, 0.95)),
        light / np.linalg.norm(light),
        random.uniform(0.85, 1.15, 3),
        *(blobs, waves),
    )


def _distance(at: Floats, low: Floats, high: Floats) -> Floats:
    """Compute the distance on the floor from a point to each box, 0 inside, (boxes,)."""
    outside = np.maximum(0.0, np.maximum(low[:, :2] - at, at - high[:, :2]))
    return np.asarray(np.hypot(outside[:, 0], outside[:, 1]))


def is_free(room: Room, x: float, y: float, radius: float, above: float = 0.0) -> bool:
    """Return whether a disc touches no wall and no box taller than ``above`` metres."""
    at = np.array([x, y])
    if (at < radius).any() or (at > SIZE[:2] - radius).any():
        return False
    tall = room.high[:, 2] > above
    return bool((_distance(at, room.low, room.high)[tall] >= radius).all())


def look(
    room: Room,
    pose: Pose,
    camera: Camera,
    shape: tuple[int, int] = (48, 64),
    noise: np.random.Generator | None = None,
) -> View:
    """Draw what a camera sees.

    Args:
        room: The room.
        pose: Where the camera stands, and its yaw.
        camera: Its height above the floor, pitch, roll and intrinsics.
        shape: Height and width of the picture.
        noise: Random numbers of the sensor's noise; None for none.
    """
    rays = _rays(pose.yaw, camera, shape)
    origin = np.array([pose.x, pose.y, camera.height])
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = 1 / rays.T  # (3, rays)
        # walls, floor and ceiling: where a ray leaves the room
        bounds = np.where(rays.T > 0, SIZE[:, None], 0.0) - origin[:, None]
        out = np.where(rays.T == 0, np.inf, bounds * inverse)
        side = out.argmin(axis=0)
        depth = out.min(axis=0)
        enters, leaves = [], []  # of each axis, (boxes, rays)
        for axis in range(3):
            one = (room.low[:, axis, None] - origin[axis]) * inverse[axis]
            other = (room.high[:, axis, None] - origin[axis]) * inverse[axis]
            enters.append(np.minimum(one, other))
            leaves.append(np.maximum(one, other))
    near = np.maximum(np.maximum(enters[0], enters[1]), enters[2])
    far = np.minimum(np.minimum(leaves[0], leaves[1]), leaves[2])
    near = np.where((near < far) & (near > 0), near, np.inf)
    box = near.argmin(axis=0)
    nearest = near.min(axis=0)
    hits_box = nearest < depth
    chosen = box, np.arange(len(rays))
    box_side = np.stack([enter[chosen] for enter in enters]).argmax(axis=0)
    depth, side = np.where(hits_box, nearest, depth), np.where(hits_box, box_side, side)
    on_floor = ~hits_box & (side == 2) & (rays[:, 2] < 0)
    labels = np.where(hits_box, OBSTACLE, np.where(on_floor, FLOOR, OTHER))
    upwards = ~hits_box & (side == 2) & ~on_floor
    surface = np.where(hits_box, box, BOXES + on_floor * 0 + ~on_floor * 1 + upwards * 1)
    colours = _shaded(room, origin + depth[:, None] * rays, rays, side, surface, on_floor)
    if noise is not None:
        colours = colours + noise.normal(0, noise.uniform(0.01, 0.05), colours.shape)
    pixels = np.rint(np.clip(colours, 0, 1) * 255).astype(np.uint8)
    return View(
        np.ascontiguousarray(pixels.reshape(*shape, 3).transpose(2, 0, 1)),
        labels.reshape(shape),
        depth.reshape(shape),
    )


def _rays(yaw: float, camera: Camera, shape: tuple[int, int]) -> Floats:
    """Compute directions (pixels, 3) with a unit component along the optical axis."""
    turn, pitch, roll = (math.radians(a) for a in (yaw, camera.pitch, camera.roll))
    forward = np.array(
        [math.cos(pitch) * math.cos(turn), math.cos(pitch) * math.sin(turn), -math.sin(pitch)]
    )
    right = np.array([math.sin(turn), -math.cos(turn), 0.0])
    down = np.cross(forward, right)
    dipped = right * math.cos(roll) + down * math.sin(roll)
    down = down * math.cos(roll) - right * math.sin(roll)
    rows, columns = shape
    x = (np.arange(columns) - camera.cx) / camera.focal
    y = (np.arange(rows) - camera.cy) / camera.focal
    rays = forward + y[:, None, None] * down + x[None, :, None] * dipped
    return np.asarray(rays.reshape(-1, 3))


def _shaded(
    room: Room,
    points: Floats,
    rays: Floats,
    side: NDArray[np.int64],
    surface: NDArray[np.int64],
    on_floor: NDArray[np.bool_],
) -> Floats:
    """Compute colours (pixels, 3): colour of the surface × Lambert's law × shadows × texture."""
    towards = -np.sign(np.take_along_axis(rays, side[:, None], 1)[:, 0])  # normals point at us
    shade = 0.55 + 0.45 * np.maximum(0.0, towards * room.light[side])
    texture = np.sin(points @ room.waves[:, :3].T + room.waves[:, 3]).sum(axis=1)
    value = shade * (1 + 0.05 * texture)
    floor = points[on_floor, :2]
    dark = np.ones(len(floor))
    for x, y, radius, depth in room.blobs:
        far = ((floor[:, 0] - x) ** 2 + (floor[:, 1] - y) ** 2) / radius**2
        dark *= 1 - depth * np.exp(-0.5 * far**2)
    value[on_floor] *= dark
    return np.asarray(room.colours[surface] * room.gains * value[:, None])


def at_height(camera: Camera, height: float) -> Camera:
    """Return the camera at another height above the floor."""
    return replace(camera, height=height)
