"""The maze beside geometry computed one ray at a time."""

import heapq
import math

import numpy as np
import pytest

from smallfry.errors import UsageError
from smallfry.search.neuroevolution import DeepGA, SeedChain
from smallfry.search.neuroevolution.problems.maze import (
    ANGLES,
    BOX,
    FASTEST,
    LAYOUTS,
    RADIUS,
    RANGE,
    SIDE,
    Layout,
    Maze,
)

OPEN = Layout((), (100, 100), 0.0, (150, 100))


def constant(turn, speed):
    """Weights of networks with the same actions whatever they sense."""
    weights = np.zeros((1, 226), np.float32)
    weights[0, -2:] = turn, speed
    return weights


def ray(place, angle, walls):
    """Distance along a ray, by stepping along each wall."""
    found = RANGE
    for x0, y0, x1, y1 in walls:
        matrix = np.array([[math.cos(angle), x0 - x1], [math.sin(angle), y0 - y1]])
        if abs(np.linalg.det(matrix)) > 1e-9:
            distance, share = np.linalg.solve(matrix, [x0 - place[0], y0 - place[1]])
            if distance >= 0 and 0 <= share <= 1:
                found = min(found, distance)
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_range_finders_see_the_nearest_wall(name):
    maze, layout = Maze(name), LAYOUTS[name]
    generator = np.random.default_rng(0)
    places, headings = generator.uniform(20, 180, (20, 2)), generator.uniform(-4, 4, 20)
    found = maze.senses(places, headings)
    walls = [*BOX, *layout.walls]
    for row in range(20):
        expected = [ray(places[row], headings[row] + a, walls) / RANGE for a in ANGLES]
        assert np.allclose(found[row, 1:7], expected, atol=1e-9)
    assert (found[:, 0] == 1).all()
    assert (found[:, 7:].sum(1) == 1).all()


def test_the_quadrant_of_the_goal():
    maze = Maze(OPEN)
    places = np.tile([100.0, 100.0], (4, 1))
    headings = np.array([0, -math.pi / 2, math.pi, math.pi / 2])  # goal ahead, left, behind, right
    assert maze.senses(places, headings)[:, 7:].argmax(1).tolist() == [0, 1, 2, 3]


def test_the_clearance_is_the_distance_to_walls():
    maze = Maze("maze_staggered")
    places = np.array([[100.0, 140.0], [160.0, 130.0], [3.0, 5.0], [100.0, 105.0]])
    assert maze.clearance(places).tolist() == pytest.approx([10, 10, 3, 25])


def test_a_robot_moves_by_its_speed_and_stops_at_walls():
    maze = Maze(OPEN)
    positions, nearest = maze.walk(constant(0, 20))
    steps = np.diff(positions[:, 0, 0])
    assert steps[:14] == pytest.approx(np.minimum(0.2 * np.arange(1, 15), FASTEST))
    assert positions[-1, 0, 0] <= SIDE - RADIUS
    assert positions[-1, 0, 0] > SIDE - RADIUS - FASTEST
    assert (positions[:, 0, 1] == 100).all()
    assert nearest[0] < 2  # it passed the goal
    assert maze(constant(0, 20), 0).behaviours[0].tolist() == positions[-1, 0].tolist()
    assert maze(constant(0, 20), 0).fitness[0] == -nearest[0]


def test_a_turning_robot_goes_in_a_circle():
    positions, _ = Maze(OPEN).walk(constant(20, 20))
    late = positions[200:, 0]
    centre = (late.max(0) + late.min(0)) / 2
    radii = np.linalg.norm(late - centre, axis=1)
    assert radii.mean() == pytest.approx(FASTEST / np.deg2rad(3 * FASTEST), rel=0.02)


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_robot_touches_a_wall_or_leaves_the_box(name):
    maze = Maze(name)
    weights = np.stack([SeedChain(maze.sizes, seed).weights() for seed in range(30)])
    positions, _ = maze.walk(10 * weights)
    assert (positions >= RADIUS).all()
    assert (positions <= SIDE - RADIUS).all()
    for place in positions[::20]:
        assert (maze.clearance(place) >= RADIUS - 1e-9).all()


def test_robots_move_alone_as_they_do_together():
    maze = Maze("maze")
    weights = np.stack([SeedChain(maze.sizes, seed).weights() for seed in range(5)])
    together, _ = maze.walk(weights, 50)
    for row in range(5):
        alone, _ = maze.walk(weights[row : row + 1], 50)
        assert np.allclose(alone[:, 0], together[:, row], atol=1e-3)


def test_unknown_mazes_are_refused():
    with pytest.raises(UsageError, match="no maze 'labyrinth'; use maze, maze_staggered"):
        Maze("labyrinth")


@pytest.mark.slow
def test_evolution_solves_the_staggered_maze_and_random_search_does_not():
    maze = Maze("maze_staggered")
    for seed in range(2):
        evolved = DeepGA(maze, select="novelty", seed=seed)
        history = list(evolved.run(30))
        assert evolved.is_solved(history)
        random = DeepGA(maze, select="random", seed=seed)
        assert not random.is_solved(list(random.run(len(history))))


def farthest_on_the_way(name):
    """Least distance from the goal that any way to it has to go back to, and that of the dead end.

    Places on a grid of 2 pixels, flooded from the start in the order of their distance.
    """
    maze, layout = Maze(name), LAYOUTS[name]
    grid = np.arange(0, SIDE + 1, 2)
    places = np.stack(np.meshgrid(grid, grid, indexing="ij"), 2).reshape(-1, 2)
    free = (maze.clearance(places) >= RADIUS).reshape(len(grid), len(grid))
    distances = np.linalg.norm(places - layout.goal, axis=1).reshape(free.shape)
    start = tuple(round(each / 2) for each in layout.start)
    waiting, seen = [(distances[start], start)], {start}
    farthest, nearest_before = 0.0, np.inf
    while waiting:
        distance, (x, y) = heapq.heappop(waiting)
        if distance < 10:
            return farthest, nearest_before
        if distance > farthest:
            farthest = distance
        if farthest <= distances[start] + 2:
            nearest_before = min(nearest_before, distance)
        for place in ((x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)):
            if place not in seen and free[place]:
                seen.add(place)
                heapq.heappush(waiting, (distances[place], place))
    raise AssertionError("there is no way to the goal")


def test_the_way_to_the_goal_leads_far_back_from_a_dead_end_beside_it():
    farthest, dead_end = farthest_on_the_way("maze")
    assert dead_end < 45
    assert farthest > 150
    start = math.dist(LAYOUTS["maze"].start, LAYOUTS["maze"].goal)
    assert farthest > 2.4 * start
    staggered, _ = farthest_on_the_way("maze_staggered")
    assert staggered < 1.15 * math.dist(
        LAYOUTS["maze_staggered"].start, LAYOUTS["maze_staggered"].goal
    )


@pytest.mark.slow
def test_novelty_finds_the_way_out_of_the_dead_end():
    solved = []
    for seed in (1, 4):
        evolved = DeepGA(Maze("maze"), select="novelty", seed=seed)
        solved.append(evolved.is_solved(list(evolved.run(60))))
    assert any(solved)
