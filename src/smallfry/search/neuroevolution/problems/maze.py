"""Mazes of a simulated robot, with deceptive rewards.

senses   1; distance to the nearest wall at −90, −45, 0, 45, 90 and 180°, up to 100, by 100;
         quadrant of the direction of the goal, one of four
acts     turn and speed in (−1, 1): both follow 3 · action by at most 0.2 a step; a step that
         would touch a wall is not taken
fitness  minus the least distance to the goal; an episode ends after 400 steps
behaviour  the last position
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from smallfry.errors import UsageError
from smallfry.search.neuroevolution.deep_ga import Evaluated
from smallfry.search.neuroevolution.network import Array, forward

__all__ = ["LAYOUTS", "Layout", "Maze"]

SIDE, RADIUS, RANGE, NEAR = 200.0, 8.0, 100.0, 10.0
STEPS, FASTEST, CHANGE, TURN = 400, 3.0, 0.2, np.deg2rad(3.0)
ANGLES = np.deg2rad([-90.0, -45.0, 0.0, 45.0, 90.0, 180.0])
Segment = tuple[float, float, float, float]


class Layout(NamedTuple):
    """Walls inside of the box, start and goal."""

    walls: tuple[Segment, ...]  # x and y of both ends
    start: tuple[float, float]
    heading: float  # of the start, radians
    goal: tuple[float, float]


LAYOUTS = {
    "maze": Layout(  # a deep dead end in front of the goal, and ledges beside it
        (
            (60, 30, 60, 150),
            (60, 150, 140, 150),
            (140, 150, 140, 30),
            (0, 120, 30, 120),
            (200, 120, 170, 120),
        ),
        (100, 125),
        np.pi / 2,
        (100, 185),
    ),
    "maze_staggered": Layout(  # hard for random networks, and not deceptive
        ((0, 130, 150, 130), (50, 80, 200, 80)), (180, 30), np.pi / 2, (20, 180)
    ),
}
BOX = ((0, 0, SIDE, 0), (SIDE, 0, SIDE, SIDE), (SIDE, SIDE, 0, SIDE), (0, SIDE, 0, 0))


class Maze:
    """Maze for all networks at once.

    Args:
        layout: A layout, or its name.

    Raises:
        UsageError: There is no such layout.
    """

    sizes: tuple[int, ...] = (11, 16, 2)
    power = 0.1
    solved: float | None = -NEAR
    episodes = 1

    def __init__(self, layout: Layout | str = "maze") -> None:
        if isinstance(layout, str):
            if layout not in LAYOUTS:
                raise UsageError(f"there is no maze '{layout}'; use {', '.join(LAYOUTS)}")
            layout = LAYOUTS[layout]
        self.layout = layout
        walls = np.array([*BOX, *layout.walls], np.float64)
        self._from, self._along = walls[:, :2], walls[:, 2:] - walls[:, :2]

    def __call__(self, weights: Array, seed: int, episodes: int = 1) -> Evaluated:
        """Evaluate networks; all episodes are alike."""
        positions, nearest = self.walk(weights)
        return Evaluated(-nearest, positions[-1])

    def walk(
        self, weights: Array, steps: int = STEPS
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Move networks by their outputs.

        Args:
            weights: (networks, parameters).
            steps: Number of steps.

        Returns:
            Positions, (steps + 1, networks, 2), and the least distance to the goal, (networks,).
        """
        count, goal = len(weights), np.array(self.layout.goal)
        place = np.tile(np.array(self.layout.start, np.float64), (count, 1))
        heading, turn, speed = np.full(count, self.layout.heading), np.zeros(count), np.zeros(count)
        positions, nearest = [place], np.linalg.norm(place - goal, axis=1)
        for _ in range(steps):
            senses = self.senses(place, heading).astype(np.float32)
            actions = np.tanh(forward(self.sizes, weights, senses[:, None])[:, 0])
            turn += np.clip(FASTEST * actions[:, 0] - turn, -CHANGE, CHANGE)
            speed += np.clip(FASTEST * actions[:, 1] - speed, -CHANGE, CHANGE)
            heading = heading + TURN * turn
            step = speed[:, None] * np.stack([np.cos(heading), np.sin(heading)], 1)
            free = self.clearance(place + step) >= RADIUS
            place = np.where(free[:, None], place + step, place)
            nearest = np.minimum(nearest, np.linalg.norm(place - goal, axis=1))
            positions.append(place)
        return np.stack(positions), nearest

    def clearance(self, places: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the distance of places (places, 2) to the nearest wall."""
        offsets = places[:, None] - self._from
        lengths = np.square(self._along).sum(1)
        shares = np.clip((offsets * self._along).sum(2) / lengths, 0, 1)
        gaps = np.linalg.norm(offsets - shares[..., None] * self._along, axis=2)
        found: NDArray[np.float64] = gaps.min(1)
        return found

    def senses(
        self, places: NDArray[np.float64], headings: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Return what robots sense, (robots, 11)."""
        angles = headings[:, None] + ANGLES
        rays = np.stack([np.cos(angles), np.sin(angles)], 2)[:, :, None]  # (robots, rays, 1, 2)
        offsets = (self._from - places[:, None])[:, None]  # (robots, 1, walls, 2)
        crossing = _cross(rays, self._along)
        with np.errstate(divide="ignore", invalid="ignore"):
            distance = _cross(offsets, self._along) / crossing  # along the ray
            share = _cross(offsets, rays) / crossing  # along the wall
        hit = (distance >= 0) & (share >= 0) & (share <= 1)
        ranges = np.where(hit, distance, RANGE).min(2).clip(max=RANGE) / RANGE
        toward = np.array(self.layout.goal) - places
        relative = np.arctan2(toward[:, 1], toward[:, 0]) - headings
        quadrant = np.floor(((relative + np.pi / 4) % (2 * np.pi)) / (np.pi / 2)).astype(int) % 4
        return np.concatenate([np.ones((len(places), 1)), ranges, np.eye(4)[quadrant]], 1)


def _cross(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = one[..., 0] * other[..., 1] - one[..., 1] * other[..., 0]
    return found
