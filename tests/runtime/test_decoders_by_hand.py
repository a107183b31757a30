"""Decoders of answers, computed by hand, and what their settings and texts may not be."""

import json
import subprocess
import sys
from itertools import product

import numpy as np
import pytest

from smallfry_runtime.decoders import (
    classified,
    decoder_of,
    has_decoder,
    ocr,
    places,
    pose,
    puzzle,
    require_no_settings,
    splats,
    stereo,
)
from smallfry_runtime.errors import DataError, UsageError

LOGITS = np.random.default_rng(0).normal(size=(4, 3)) * 3
CLASSES = ("a", "b", "c")
NAMED = {  # key of the likeliest class in the answer of a task
    "equivariant": "label",
    "eeg": "state",
    "symbolic": "colour",
    "uav-policy": "action",
}


def shares(row):
    weights = [np.exp(float(value)) for value in row]
    return {name: weight / sum(weights) for name, weight in zip(CLASSES, weights, strict=True)}


@pytest.mark.parametrize("task", NAMED)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_classes_come_with_the_probabilities_of_all(task, dtype):
    logits = LOGITS.astype(dtype)
    found = decoder_of(task).decode(logits, CLASSES)
    assert len(json.loads(json.dumps(found))) == 4
    for row, answer in zip(logits, found, strict=True):
        assert answer[NAMED[task]] == CLASSES[int(row.argmax())]
        assert answer["probabilities"] == pytest.approx(shares(row))
    assert decoder_of(task).decode(logits[:0], CLASSES) == []
    with pytest.raises(UsageError, match="decoding has no setting 'beam' here"):
        decoder_of(task).decode(logits, CLASSES, {"beam": 1})


def test_huge_scores_are_probabilities_too_and_ties_go_to_the_first():
    (answer,) = classified(np.array([[-1e300, 1e300]]), CLASSES[:2], "x")
    assert answer == {"x": "b", "probabilities": {"a": 0.0, "b": 1.0}}
    assert classified(np.array([[7.0, 7.0, 7.0]]), CLASSES, "x")[0]["x"] == "a"
    with pytest.raises((IndexError, ValueError)):
        classified(LOGITS, CLASSES[:2], "x")


def test_decoders_are_found_by_the_names_of_tasks():
    assert has_decoder("uav-policy")
    assert not has_decoder("../pose")
    assert not has_decoder("")
    for name in ("os", "..errors", "pose.py", "x" * 500):
        with pytest.raises(UsageError, match=r"no decoder for the task '.{1,40}'; there are eeg,"):
            decoder_of(name)
    require_no_settings({})
    require_no_settings(None)


def test_an_image_without_a_score_has_no_place_and_is_never_right():
    scores = np.array([[0, 2.5, 0, -1], [0, 0, 0, 0], [1, 3, 3, 2], [-2, -1, 0, -3]], np.float32)
    found = places.decode(scores, ["w", "x", "y", "z"])
    assert [answer["place"] for answer in found] == ["x", None, "x", "x"]
    assert [answer["score"] for answer in found] == [2.5, 0.0, 3.0, -1.0]
    assert list(found[0]["best"].items()) == [("x", 2.5), ("z", -1.0)]
    assert list(found[2]["best"]) == ["x", "y", "z", "w"]
    many = places.decode(np.arange(1.0, 9)[None], list("abcdefgh"))[0]["best"]
    assert list(many) == list("hgfed")
    assert places.right(scores, np.array([1, 0, 1, 2])).tolist() == [True, False, True, False]


def test_attributes_have_the_digits_of_float32_and_stay_what_they_are_without_number():
    values = np.array([[1 / 3, -1e-30, 123456789.0], [np.nan, np.inf, 0]], np.float32)
    first, second = splats.decode(values, CLASSES)
    assert first == {"a": 0.3333333, "b": -1e-30, "c": 123456800.0}
    assert np.isnan(second["a"])
    assert (second["b"], second["c"]) == (np.inf, 0.0)


def test_maps_are_enlarged_as_pytorch_does():
    import torch

    values = np.random.default_rng(1).normal(size=(2, 3, 3, 5)).astype(np.float32)
    for factor in (1, 2, 4, 16):
        wanted = torch.nn.functional.interpolate(
            torch.from_numpy(values), scale_factor=factor, mode="bilinear", align_corners=False
        )
        np.testing.assert_allclose(stereo.enlarge(values, factor), wanted.numpy(), atol=1e-5)
    single = stereo.enlarge(np.ones((1, 1, 1, 1)), 4)
    assert single.shape == (1, 1, 4, 4)
    assert (single == 1).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exit": 4}, "exit is 1, 2 or 3"),
        ({"exit": 1.0}, "exit is 1, 2 or 3"),
        ({"exit": True}, "exit is 1, 2 or 3"),
        ({"focal": "9"}, "are numbers"),
        ({"offset": float("nan")}, "are numbers"),
        ({"focal": 9}, "both focal, in pixels, and baseline"),
        ({"focal": -9, "baseline": -1}, "both focal, in pixels, and baseline"),
        ({"colour": 1}, "decoding has the settings exit, focal, baseline, offset and sizes"),
        ({"sizes": 9}, "sizes are pairs of height and width in pixels, got 9"),
        ({"sizes": [9, 9]}, r"pairs of height and width in pixels, got \[9, 9\]"),
        ({"sizes": [[9, 0]]}, "pairs of height and width"),
        ({"sizes": [[9, 9.0]]}, "pairs of height and width"),
        ({"sizes": ["99"]}, "pairs of height and width"),
        ({"sizes": [[9, 9], [9, 9]]}, "2 sizes for 1 pairs; expected one for each"),
        ({"exit": 2}, "the network has 1 exits, and exit 2 was asked for"),
    ],
)
def test_wrong_settings_of_stereo_are_named(settings, message):
    outputs = {"refined16": np.ones((1, 1, 1)), "semantics16": np.ones((1, 2, 1, 1))}
    with pytest.raises(UsageError, match=message):
        stereo.decode(outputs, ["a", "b"], settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"camera": 5}, r"set camera to \[fx, fy, cx, cy\].*got 5"),
        ({"camera": [9, 9, 1]}, r"set camera to"),
        ({"camera": [9, -9, 1, 1]}, r"set camera to"),
        ({"camera": [9, float("inf"), 1, 1]}, r"set camera to"),
        ({"camera": "9911"}, r"set camera to .*got '9911'"),
        ({"camera": None}, r"set camera to"),
        ({"crop": 5}, r"set crop to \[first column, first row, side\].*got 5"),
        ({"crop": []}, r"set crop to"),
        ({"crop": [0, 0, 0]}, r"set crop to"),
        ({"crop": [[0, 0, 2], [0, 0]]}, r"set crop to"),
        ({"crop": "abc"}, r"set crop to"),
        ({"crop": ["abc", "def"]}, r"set crop to"),
        ({"crop": [[0, 0, 2]] * 3}, "crop has 3 squares for 2 inputs"),
        ({"solver": "guess"}, "solver is own or opencv, got 'guess'"),
        ({"seed": -1}, "seed is a whole number from 0"),
        ({"seed": "x"}, "seed is a whole number from 0"),
        ({"seed": 2**31}, "seed is a whole number from 0"),
        ({"seed": True}, "seed is a whole number from 0"),
        ({"lens": 1}, "decoding has the settings camera, crop, solver and seed"),
    ],
)
def test_wrong_settings_of_poses_are_named(changes, message):
    outputs = {
        "x": np.ones((2, 3, 8)),
        "y": np.ones((2, 3, 8)),
        "in_roi": np.ones((2, 1, 8)),
        "points": np.random.default_rng(0).normal(size=(2, 8, 3)),
    }
    settings = {"camera": [9, 9, 1, 1], "crop": [0, 0, 8]}
    assert len(pose.decode(outputs, ["cup"], settings)) == 2
    with pytest.raises(UsageError, match=message):
        pose.decode(outputs, ["cup"], settings | changes)


def test_too_few_keypoints_and_those_of_one_place_give_no_pose_or_a_finite_one():
    settings = {"camera": [50, 50, 8, 8], "crop": [0, 0, 16]}
    outputs = {
        "x": -np.ones((1, 3, 8)),
        "y": -np.ones((1, 3, 8)),
        "in_roi": np.ones((1, 1, 8)),
        "points": np.zeros((1, 8, 3)),
    }
    (answer,) = pose.decode(outputs, ["cup"], settings)
    json.dumps(answer, allow_nan=False)
    assert answer["keypoints"] == [[1.0, 1.0]] * 8
    outputs["in_roi"][0, 0, 5:] = -1
    (answer,) = pose.decode(outputs, ["cup"], settings)
    assert (answer["pose"], answer["inliers"]) == (None, 0)
    assert answer["keypoints"][5:] == [None] * 3


def paths_of(logs):
    """The probability of every text, summed over all paths."""
    found: dict[tuple[int, ...], float] = {}
    for path in product(range(logs.shape[1]), repeat=len(logs)):
        text = tuple(s for i, s in enumerate(path) if s and (i == 0 or s != path[i - 1]))
        found[text] = found.get(text, 0.0) + float(np.exp(sum(logs[range(len(logs)), path])))
    return found


@pytest.mark.parametrize("seed", range(6))
def test_texts_have_the_probability_of_all_their_paths(seed):
    steps = 1 + seed % 5
    logs = ocr.log_softmax(np.random.default_rng(seed).normal(size=(steps, 3)) * 2)
    found = paths_of(logs)
    assert sum(found.values()) == pytest.approx(1)
    for text, share in found.items():
        assert np.exp(ocr.log_likelihood(logs, text)) == pytest.approx(share)
    best = ocr.beam(logs, 1000)
    assert np.exp(best.log_probability) == pytest.approx(max(found.values()))
    assert found[best.symbols] == pytest.approx(max(found.values()))
    longer = (1,) * (steps + 1)
    assert ocr.log_likelihood(logs, longer) == -np.inf
    spans = [step for pair in best.steps for step in pair]
    assert spans == sorted(spans)


def test_words_are_chosen_and_wrong_ones_named():
    logits = np.full((1, 4, 3), -5.0)
    logits[0, range(4), [1, 1, 2, 0]] = 5
    assert ocr.decode(logits, ["", "a", "b"])[0]["text"] == "ab"
    (answer,) = ocr.decode(logits, ["", "a", "b"], {"words": ["b", "ba", "a"]})
    assert answer["text"] in ("b", "a")
    assert answer["characters"][0]["end"] % 4 == 3
    far = ocr.decode(logits, ["", "a", "b"], {"words": ["a" * 9]})[0]  # longer than the picture
    assert (far["text"], far["confidence"]) == ("a" * 9, 0.0)
    for settings, message in (
        ({"words": ["ac"]}, "the word 'ac' has symbols unknown to the model: .'c'."),
        ({"words": "ab"}, "words must be a list of texts"),
        ({"words": [1]}, "words must be a list of texts"),
        ({"words": [""]}, "the word '' has no symbols: leave it out"),
        ({"beam": -1}, "beam is a whole number from 0"),
        ({"beam": True}, "beam is a whole number from 0"),
        ({"width": 3}, "decoding has the settings beam and words"),
    ):
        with pytest.raises(UsageError, match=message):
            ocr.decode(logits, ["", "a", "b"], settings)


SYMBOLS = ["?", ".", "1", "2"]


@pytest.mark.parametrize(
    "text",
    [
        "1221",
        "12\n21",
        "12\r\n21\r\n",
        "; a comment\n12\n21\n",
        '["12", "21"]',
        "[[1, 2], [2, 1]]",
        '{"puzzle": "12\\n21"}',
        '{"puzzles": [["12", "21"]]}',
        '"1221"',
    ],
)
def test_a_puzzle_can_be_written_in_many_ways(text):
    assert puzzle.read(text, SYMBOLS, 2).tolist() == [[[[2, 3], [3, 2]]]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "0 puzzles: expected 1"),
        ("12\n2", "puzzle 1: 3 symbols"),
        ("12\n\n21", "puzzle 1: 1 lines, expected 2"),
        ("12\n23", "puzzle 1: unknown symbol '3'; expected . 1 2"),
        ("[", "not JSON"),
        ("{}", "expected a list of puzzles"),
        ('{"puzzles": 3}', "expected a list of puzzles"),
        ("[null]", "puzzle 1: unknown symbol|puzzle 1: 4 symbols|unknown symbol"),
        ("[" + "9" * 5000 + "]", "not JSON"),
        ("[1.5, 2]", "puzzle 1: 3 symbols"),
        ("[]", "0 puzzles"),
        (json.dumps(["1221"] * 10_001), "10,001 puzzles: expected 1 to 10,000"),
    ],
)
def test_what_is_no_puzzle_is_named(text, message):
    with pytest.raises(DataError, match=message):
        puzzle.read(text, SYMBOLS, 2)


def test_no_depth_of_nested_lists_is_another_error():
    for depth in (10, 400, *range(800, 1000, 3), 5000, 200_000):
        text = "[" * depth + "1" + "]" * depth
        with pytest.raises(DataError):
            puzzle.read(text, SYMBOLS, 2)


def test_open_cells_are_written_as_files_do():
    for letter in "0_ -.":
        assert puzzle.read(f"1{letter}\n{letter}2", SYMBOLS, 2).tolist() == [[[[2, 1], [1, 3]]]]
    assert puzzle.text_of_grid([2, 1, 1, 3], SYMBOLS) == ["1.", ".2"]


def test_every_module_of_the_runtime_is_imported_without_pytorch_and_without_an_engine():
    code = """
import importlib, pkgutil, sys
absent = ["torch", "timm", "smallfry", "onnxruntime", "openvino", "ai_edge_litert", "executorch"]
for name in [*absent, "cv2", "scipy", "yaml"]:
    sys.modules[name] = None  # an import of it fails
import smallfry_runtime
for module in pkgutil.walk_packages(smallfry_runtime.__path__, "smallfry_runtime."):
    if not module.name.endswith("connections"):  # of uvicorn, which a server needs
        importlib.import_module(module.name)
print(len([name for name in sys.modules if name.startswith("smallfry_runtime")]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 50
