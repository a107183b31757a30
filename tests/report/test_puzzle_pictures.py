"""Pictures of puzzles."""

import matplotlib.image
import pytest
import torch

from smallfry.report.puzzles import draw_puzzles

SYMBOLS = ("#", ".", "1", "2")


def test_a_grid_has_a_frame_on_all_sides(tmp_path):
    grid = torch.tensor([[[2, 1], [1, 1]]])
    answers, right = torch.tensor([[2, 3, 3, 2]]), torch.tensor([[2, 3, 3, 3]])
    draw_puzzles(grid, right, answers, SYMBOLS, tmp_path / "puzzles.png")
    pixels = matplotlib.image.imread(tmp_path / "puzzles.png")[..., :3].mean(-1)
    left = pixels[:, : pixels.shape[1] // 4]
    dark = left < 0.75
    long = int(0.35 * dark.shape[1])  # of a side, which text and single cells don't reach
    across = [i for i, row in enumerate(dark) if row.sum() > 2 * long]
    down = [i for i, column in enumerate(dark.T) if column.sum() > 2 * long]
    assert len(across) >= 2
    assert len(down) >= 2
    top, bottom = pixels[across[0]], pixels[across[-1]]
    for line in (top, bottom):  # both edges are as strong as each other
        assert abs(line[down[0] : down[-1]].mean() - top[down[0] : down[-1]].mean()) < 0.05
    assert (down[-1] - down[0]) / (across[-1] - across[0]) == pytest.approx(1, abs=0.03)
