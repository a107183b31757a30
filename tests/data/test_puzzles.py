"""Generated puzzles have one solution each, and no symmetry carries one into another split."""

import random
from itertools import islice, permutations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from smallfry.data import NAMED, load_data
from smallfry.data.generators.grids import Puzzle
from smallfry.data.generators.maze import Maze, MazeSettings, shortest_path
from smallfry.data.generators.sudoku import Boxes, Sudoku, guesses, solutions
from smallfry.data.registered import settings_from
from smallfry.data.symmetry import Symmetry
from smallfry.errors import UsageError

FOUR, SIX, NINE = Boxes(2, 2), Boxes(2, 3), Boxes(3, 3)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SMALLFRY_CACHE", str(tmp_path))


def digits_of(text):
    return [-1 if symbol == "." else int(symbol) - 1 for symbol in text]


def is_solution(grid, boxes):
    units = np.array(grid).reshape(boxes.side, boxes.side)
    squares = units.reshape(boxes.columns, boxes.rows, boxes.rows, boxes.columns)
    squares = squares.transpose(0, 2, 1, 3).reshape(boxes.side, -1)
    lines = [*units, *units.T, *squares]
    return all(sorted(line) == list(range(boxes.side)) for line in lines)


def test_the_solver_finds_all_solutions():
    every = list(solutions([-1] * 16, FOUR))
    assert len(every) == len(set(map(tuple, every))) == 288
    assert all(is_solution(grid, FOUR) for grid in every)
    assert list(solutions(digits_of("11.............."), FOUR)) == []
    assert list(solutions(digits_of("12....3..4......"), FOUR)) == []  # no 3 or 4 is left over
    first = next(solutions([-1] * 81, NINE, random.Random(0)))
    assert is_solution(first, NINE)
    assert next(solutions([-1] * 36, SIX, random.Random(0))) != next(solutions([-1] * 36, SIX))
    easy = first.copy()
    easy[40] = -1
    assert guesses(easy, NINE) == 0
    assert list(solutions(easy, NINE)) == [first]
    assert guesses([-1] * 16, FOUR) > 0


@pytest.mark.parametrize(("boxes", "clues"), [(FOUR, 4.3), (SIX, 10.2), (NINE, 23.9)])
def test_puzzles_are_minimal_and_unique(boxes, clues):
    family, counts = Sudoku(boxes), []
    for number in range(20 if boxes == NINE else 60):
        puzzle = family.draw(3, number)
        grid = (puzzle.grid.astype(int) - 2).flatten().tolist()
        found = list(islice(solutions(grid, boxes), 2))
        assert len(found) == 1
        assert found[0] == (puzzle.solution.astype(int) - 2).flatten().tolist()
        given = [cell for cell, digit in enumerate(grid) if digit >= 0]
        counts.append(len(given))
        if number < 3:
            for cell in given:
                fewer = [-1 if i == cell else digit for i, digit in enumerate(grid)]
                assert len(list(islice(solutions(fewer, boxes), 2))) == 2
    assert np.mean(counts) == pytest.approx(clues, abs=0.6)
    more = Sudoku(boxes, extra_clues=5).draw(3, 0)
    assert (more.grid > 1).sum() == counts[0] + 5
    assert (more.solution == family.draw(3, 0).solution).all()
    assert (family.draw(4, 0).solution != family.draw(3, 0).solution).any()


@pytest.mark.slow
def test_minimal_puzzles_of_side_four_are_the_36_known_classes():
    family = Sudoku(FOUR)
    found = {family.canonical(family.draw(0, number)) for number in range(900)}
    assert len(found) == 36
    assert len({solution for solution, _ in found}) == 2
    clues = sorted(whole.split()[1].count("1") for _, whole in found)
    assert [clues.count(n) for n in (4, 5, 6)] == [13, 22, 1]


@pytest.mark.parametrize("boxes", [FOUR, SIX, NINE])
def test_symmetries_give_puzzles_of_the_same_class(boxes):
    torch.manual_seed(0)
    family = Sudoku(boxes)
    puzzle, other = family.draw(0, 0), family.draw(0, 1)
    drawn = family.symmetries(6)
    pair = torch.tensor(np.stack([puzzle.grid, puzzle.solution])).flatten(1)
    moved = drawn(pair.expand(6, -1, -1))
    assert moved.dtype == torch.uint8
    wanted = family.canonical(puzzle)
    side = boxes.side
    for grid, solution in moved.numpy():
        assert is_solution(solution.astype(int) - 2, boxes)
        assert ((grid == 1) | (grid == solution)).all()
        image = Puzzle(grid.reshape(side, side), solution.reshape(side, side), 0)
        assert family.canonical(image) == wanted
    assert len({tuple(solution.tolist()) for _, solution in moved}) == 6
    assert family.canonical(other)[1] != wanted[1]


def test_the_canonical_form_is_the_smallest_of_all_images():
    family = Sudoku(FOUR)
    solution = family.draw(0, 5).solution.astype(int) - 2
    lines = [a + b for a, b in permutations([(0, 1), (2, 3)])]
    lines = [
        x for a, b, c, d in lines for x in ((a, b, c, d), (b, a, c, d), (a, b, d, c), (b, a, d, c))
    ]
    images = []
    for grid in (solution, solution.T):
        for rows in lines:
            for columns in lines:
                image = grid[np.ix_(rows, columns)]
                names = np.argsort(image[0])
                images.append(names[image].flatten().tolist())
    assert len(images) == 128
    smallest = np.array(min(images)).reshape(4, 4) @ 4 ** np.arange(3, -1, -1)
    puzzle = family.draw(0, 5)
    assert family.canonical(puzzle)[0] == "-".join(map(str, smallest.tolist()))


def test_a_symmetry_moves_cells_and_renames_symbols():
    cells = torch.tensor([[2, 0, 1], [0, 1, 2]])
    symbols = torch.tensor([[0, 2, 1], [0, 1, 2]])
    moved = Symmetry(cells, symbols)(torch.tensor([[0, 1, 2], [2, 1, 0]]))
    assert moved.tolist() == [[1, 0, 2], [2, 1, 0]]
    assert Symmetry(cells, symbols).take(torch.tensor([1])).cells.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(("side", "braid"), [(9, 0), (10, 3), (15, 5)])
def test_mazes_have_one_shortest_path(side, braid):
    family = Maze(side, braid, min_path=0.25)
    for number in range(10):
        puzzle = family.draw(0, number)
        walls = puzzle.grid == 1
        assert walls[[0, -1]].all()
        assert walls[:, [0, -1]].all()
        start, goal = (tuple(np.argwhere(puzzle.grid == end)[0]) for end in (3, 4))
        path, count = shortest_path(walls, start, goal)
        assert count == 1
        assert len(path) - 1 == puzzle.difficulty
        assert len(path) >= 0.25 * (~walls).sum()
        changed = np.argwhere(puzzle.grid != puzzle.solution)
        assert {tuple(cell) for cell in changed} == set(path[1:-1])
        assert (puzzle.solution[tuple(changed.T)] == 5).all()
        cells, loops = int((~walls).sum()), 0
        doors = (~walls[1:] & ~walls[:-1]).sum() + (~walls[:, 1:] & ~walls[:, :-1]).sum()
        loops = doors - (cells - 1)  # all are connected
        assert loops == braid if braid == 0 else loops <= braid
    open_hall = np.zeros((2, 2), bool)
    assert shortest_path(open_hall, (0, 0), (1, 1))[1] == 2
    split = np.array([[False, True], [True, False]])
    assert shortest_path(split, (0, 0), (1, 1)) == ([], 0)
    torch.manual_seed(0)
    image = family.symmetries(1)(torch.tensor(puzzle.solution).flatten()[None])
    turned = Puzzle(puzzle.grid, image[0].view(side, side).numpy(), 0)
    assert family.canonical(turned) == family.canonical(puzzle)
    with pytest.raises(UsageError, match="no path of 110%"):
        Maze(9, min_path=1.1).draw(0, 0)


@pytest.mark.parametrize("split", ["puzzle", "class"])
def test_splits_share_no_class(split):
    data = load_data("sudoku6", options={"puzzles": 60, "split": split})
    family = Sudoku(SIX)

    def classes(part):
        pairs = zip(part.images[:, 0].numpy(), part.labels.view(-1, 6, 6).numpy(), strict=True)
        return [
            family.canonical(Puzzle(grid, solution.astype(np.uint8), 0)) for grid, solution in pairs
        ]

    train, validation, test = (classes(p) for p in (data.train, data.validation, data.test))
    every = [whole for _, whole in (*train, *validation, *test)]
    assert len(every) == len(set(every)) == 60
    assert min(map(len, (train, validation, test))) > 0
    if split == "class":
        assert not {kind for kind, _ in test} & {kind for kind, _ in (*train, *validation)}
    else:
        assert len(test) == 12
    assert data.origin == "generated"
    assert data.generated["split"] == split
    assert data.classes == ("_", ".", "1", "2", "3", "4", "5", "6")
    assert data.mean == (0.0,)
    assert data.duplicates() == []
    again = load_data("sudoku6", options={"puzzles": 60, "split": split})
    assert again.fingerprint == data.fingerprint
    assert_close(again.test.labels, data.test.labels)
    other = load_data("sudoku6", options={"puzzles": 60, "split": split, "seed": 1})
    assert other.fingerprint != data.fingerprint
    everything = load_data("sudoku6", validation=0.0, test=0.0, options={"puzzles": 60})
    assert (len(everything.train), everything.test_count) == (60, 0)
    assert len(load_data("sudoku6", limit=7, options={"puzzles": 60}).train) == 7


@pytest.mark.slow
def test_names_are_known_and_other_settings_refused():
    assert {"sudoku4", "sudoku6", "sudoku9", "maze9", "maze30"} <= set(NAMED)
    assert len(load_data("sudoku4").train) == 22  # of 30
    for options, said in (
        ({"puzzle": 20}, "has no 'puzzle'; did you mean"),
        ({"puzzles": "20"}, "must be of type int"),
        ({"puzzles": 3}, "puzzles is 10 to"),
        ({"split": "half"}, "split is puzzle or class"),
        ({"extra_clues": -1}, "extra_clues is 0 to 81"),
        ({"puzzles": 40}, "only 3. of 40 puzzles differ"),
        ({"puzzles": 12, "split": "class"}, "too few symmetry classes"),
    ):
        with pytest.raises(UsageError, match=said):
            load_data("sudoku4", options=options)
    for options, said in (({"braid": -1}, "braid is"), ({"min_path": 1}, "min_path is 0 to 0.9")):
        with pytest.raises(UsageError, match=said):
            load_data("maze9", options=options)
    for given in ({"image_size": 8}, {"channels": 3}, {"label": "x"}, {"stream": True}):
        with pytest.raises(UsageError, match=r"sudoku4 has no data\."):
            load_data("sudoku4", **given)
    with pytest.raises(UsageError, match=r"does not use data\.root"):
        load_data("sudoku4", ".")
    with pytest.raises(UsageError, match="digits is none"):
        load_data("digits", options={"puzzles": 20})
    assert settings_from(MazeSettings, {"min_path": 0}).min_path == 0
