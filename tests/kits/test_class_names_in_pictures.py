"""Class names of any letters in the pictures of kits: whole, told apart, in letters of the font."""

import numpy as np
import pytest
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.text import Text

from smallfry.data import Split
from smallfry.kits.eeg.pictures import draw_bands
from smallfry.kits.equivariant.pictures import draw_turns
from smallfry.kits.graphs.packing import pack
from smallfry.kits.graphs.pictures import draw_graph
from smallfry.kits.ocr.pictures import draw_texts
from smallfry.kits.symbolic.interpreter import run
from smallfry.kits.symbolic.pictures import draw_answers, draw_graphs
from smallfry.kits.symbolic.programs import parse
from smallfry.kits.uav.pictures import draw_masks

NAMES = ("猫", "_犬$", "🐈 a")
EDGE = "(push (add (connect identity)))"
SHOWN = (r"\u732b", r"_\u72ac\$", r"\U0001f408 a")  # in DejaVu Sans


def pictures(count=3, channels=1):
    return torch.zeros(count, channels, 8, 8, dtype=torch.uint8)


def split(count=3):
    return Split(pictures(count), torch.arange(count), torch.arange(count))


def bands(file):
    windows = torch.randn(3, 1, 4, 128)
    draw_bands(Split(windows, torch.arange(3), torch.arange(3), 128.0), NAMES, file)


def graph(file):
    features = np.concatenate([np.eye(3), [[0], [1], [0]]], axis=1)
    packed = torch.from_numpy(pack(features, [], 2, 4))
    draw_graph(packed, torch.tensor([2, -1, -1]), torch.tensor([2, 0, 0]), NAMES, file)


def texts(file):
    logits = torch.full((3, 4, 4), -9.0)
    for row in range(3):
        logits[row, :, row + 1] = 9.0
    words = Split(torch.zeros(3, 1, 32, 16).byte(), torch.arange(3), torch.tensor([[1], [2], [3]]))
    draw_texts(logits, words, ("", *NAMES), file)


DRAWN = {
    "bands": (bands, 3),
    "graph": (graph, 3),
    "texts": (texts, 3),
    "answers": (lambda file: draw_answers(torch.randn(3, 3), split(), NAMES, file), 3),
    "programs": (lambda file: draw_graphs([run(parse(EDGE))], file, NAMES[:1]), 1),
    "turns": (
        lambda file: draw_turns(pictures(), dict.fromkeys(NAMES, (0.0, 1.0)), (0, 90), file),
        3,
    ),
    "masks": (
        lambda file: draw_masks(
            pictures(2, 3), dict.fromkeys(NAMES, torch.zeros(2, 8, 8, dtype=torch.int64)), file
        ),
        3,
    ),
}


@pytest.mark.parametrize("name", DRAWN)
def test_names_are_in_letters_that_the_font_has(name, tmp_path, monkeypatch):
    found = []
    save = Figure.savefig

    def coarse(figure, *given, **more):
        figure.set_layout_engine("none")
        save(figure, *given, **{**more, "dpi": 20})
        found.extend(each.get_text() for each in figure.findobj(Text))

    monkeypatch.setattr(Figure, "savefig", coarse)
    draw, count = DRAWN[name]
    with rc_context({"font.family": ["DejaVu Sans"]}):
        draw(tmp_path / "a.png")
    known = get_font(findfont("DejaVu Sans")).get_charmap()
    assert {letter for text in found for letter in text if ord(letter) > 31} <= {*map(chr, known)}
    for shown in SHOWN[:count]:
        assert any(shown in text for text in found)
