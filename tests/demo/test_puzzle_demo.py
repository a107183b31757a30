"""The demo of models that solve puzzles: steps, examples, page and routes."""

import http.client
import io
import json
import re
from urllib.parse import urlsplit

import pytest
import torch
from demo_runs import TINY, untrained
from html_view import View
from PIL import Image

from smallfry.demo import puzzles as demo
from smallfry.demo.page import DROP, DROP_PUZZLE, build_page
from smallfry.demo.routes import Shown, answer
from smallfry.demo.serve import serving
from smallfry.errors import DataError, UsageError
from smallfry.training.config import DataConfig, ModelConfig, ObjectiveConfig, TrainConfig
from smallfry.training.puzzle_inference import PuzzleStep, Solved, solve
from smallfry.training.run import load_run
from smallfry.training.train import train

PUZZLE = "1...\n..1.\n.3..\n...2\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("puzzles") / "run"
    sizes = {"embed_dim": 16, "mlp_hidden_dim": 16, "token_hidden_dim": 16}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMALLFRY_CACHE", str(folder.parent / "cache"))
        train(
            TrainConfig(
                data=DataConfig("sudoku4", options={"extra_clues": 4, "puzzles": 40}),
                model=ModelConfig(options=sizes, recursion_steps=3),
                task="puzzle",
                objective=ObjectiveConfig(supervision_steps=2),
                epochs=1,
                batch_size=8,
                threads=1,
                run=folder,
                progress="quiet",
            )
        )
    return folder


@pytest.fixture(scope="module")
def trained(run):
    return load_run(run)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("images") / "run", **TINY)


def cells(view):
    """Return (text, class) of each cell, row by row."""
    found = re.findall(r"<td(?: class=\"sf-(\w+)\")?>(\w?)</td>", view)
    return [(text, kind) for kind, text in found]


def test_each_view_marks_given_and_changed_cells():
    solved = Solved(["1.", ".2"], [PuzzleStep(["11", "12"], 0.25), PuzzleStep(["12", "12"], 0.75)])
    given, first, second = demo.views_of(solved)
    assert cells(given) == [("1", "given"), ("", ""), ("", ""), ("2", "given")]
    assert cells(first) == [("1", "given"), ("1", "new"), ("1", "new"), ("2", "given")]
    assert cells(second) == [("1", "given"), ("2", "new"), ("1", ""), ("2", "given")]
    assert "The puzzle" in given
    assert "probability" not in given
    assert "2 cells changed" in first
    assert "25.0%" in first
    assert "1 cell changed" in second
    assert "<strong>Improvement step 2 of 2: the model’s answer</strong>" in second
    assert "<strong>" not in first


def test_a_panel_has_the_answers_of_predict(trained):
    panel = demo.panel_of(trained, PUZZLE.encode(), "a.txt")
    assert (panel["answer"], len(panel["views"])) == (3, 4)
    solved = next(solve(trained, PUZZLE))
    for view, step in zip(panel["views"][1:], solved.steps, strict=True):
        shown = "".join(text or "." for text, _ in cells(view))
        assert shown == "".join(step.answer)
        assert f"{step.halting:.1%}" in view
    several = PUZZLE + "\n" + PUZZLE.replace("1", "4")
    assert demo.panel_of(trained, several.encode(), "a.txt") == panel  # the first


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (b"\xff\xfe", "it: is no text"),
        (b"", "it: "),
        (b"12\n21", "it: "),
        (b"x" * 16, "it: puzzle 1: unknown symbol 'x'"),
    ],
)
def test_what_is_no_puzzle_is_refused(trained, file, message):
    with pytest.raises(DataError, match=re.escape(message)):
        demo.panel_of(trained, file, "it")
    answered = answer([Shown("run", trained)], file, "it")
    assert answered["panels"] == []
    assert 'role="alert"' in answered["status"]


def test_symbols_are_escaped():
    solved = Solved(["<"], [PuzzleStep(["&"], 0.5)])
    given, view = demo.views_of(solved)
    assert '<td class="sf-given">&lt;</td>' in given
    assert '<td class="sf-given">&amp;</td>' in view


def test_examples_are_the_test_puzzles_that_change_most(run, trained):
    examples = demo.find_puzzles(trained, str(run))
    assert 1 < len(examples) <= 8
    counts = []
    for example in examples:
        solved = next(solve(trained, example.text.decode()))
        first, last = ("".join(solved.steps[i].answer) for i in (0, -1))
        counts.append(sum(a != b for a, b in zip(first, last, strict=True)))
        image = Image.open(io.BytesIO(example.png))
        assert image.size == (4 * demo.CELL + 1,) * 2
        given = sum(symbol != "." for symbol in "".join(solved.given))
        grey = sum(
            image.getpixel((x * demo.CELL + 2, y * demo.CELL + 2)) == (209, 213, 219)
            for x in range(4)
            for y in range(4)
        )
        assert grey == given
    assert counts == sorted(counts, reverse=True)


def test_without_its_data_there_are_no_examples(run, trained, classifier, tmp_path):
    assert demo.find_puzzles(trained, str(run / "best")) == []
    assert demo.find_puzzles(load_run(classifier), str(classifier)) == []


def test_which_models_solve_puzzles(trained, classifier):
    assert demo.solves_puzzles(trained)
    assert not demo.solves_puzzles(load_run(classifier))
    plain = trained._replace(model=torch.nn.Linear(2, 2))
    assert not demo.solves_puzzles(plain)


def test_the_page_takes_text_and_has_a_slider_over_improvement_steps(run, trained, classifier):
    examples = demo.find_puzzles(trained, str(run))
    config = build_page([Shown(str(run), trained)], examples).get_config_file()
    parts = config["components"]
    sliders = [part["props"] for part in parts if part["type"] == "slider"]
    assert [(s["minimum"], s["maximum"]) for s in sliders] == [(0, 3)]
    assert sliders[0]["label"].startswith("Improvement steps of trm_sudoku4_micro")
    texts = [str(part["props"].get("value")) for part in parts if part["type"] == "html"]
    assert DROP_PUZZLE in texts
    assert any("test puzzle" in text for text in texts)
    about = next(text for text in texts if "Halting" in text)
    assert "A puzzle is text" in about
    assert "megapixels" not in about
    images = build_page([Shown("run", load_run(classifier))]).get_config_file()["components"]
    texts = [str(part["props"].get("value")) for part in images if part["type"] == "html"]
    assert DROP in texts
    assert "megapixels" in next(text for text in texts if "Halting" in text)


def test_the_server_solves_files_and_examples(run, trained):
    with serving([str(run)]) as address:
        connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=600)
        octets = {"content-type": "application/octet-stream"}
        connection.request("POST", "/look?name=a.txt", PUZZLE.encode(), octets)
        (panel,) = json.loads(connection.getresponse().read())["panels"]
        assert panel == demo.panel_of(trained, PUZZLE.encode(), "a.txt")
        connection.request("POST", "/examples/0", b"", octets)
        answered = json.loads(connection.getresponse().read())
        example = demo.find_puzzles(trained, str(run))[0]
        assert answered["panels"] == [demo.panel_of(trained, example.text, example.name)]
        assert example.name in View(answered["status"]).texts[0]
        connection.close()


def test_puzzles_and_images_are_not_compared(run, classifier):
    with (
        pytest.raises(UsageError, match="one solves puzzles and the other classifies images"),
        serving([str(classifier), str(run)]),
    ):
        pass
