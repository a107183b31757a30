"""Decoding of texts, against all paths, the spec's values, and each other."""

from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from smallfry_runtime.decoders import decoder_of, has_decoder, ocr, puzzle
from smallfry_runtime.decoders.ocr import (
    beam,
    decode,
    edit_distance,
    greedy,
    log_likelihood,
    log_softmax,
)
from smallfry_runtime.errors import UsageError

EXAMPLE = log_softmax(2 * np.cos(0.9 * np.arange(20)).reshape(5, 4))
CLASSES = ("", "a", "b", "c")


def collapsed(path):
    kept = [s for i, s in enumerate(path) if i == 0 or path[i - 1] != s]
    return tuple(s for s in kept if s)


def all_texts(logs):
    """Probabilities of all texts, path by path."""
    found = {}
    for path in product(range(logs.shape[1]), repeat=len(logs)):
        share = np.exp(sum(logs[step, symbol] for step, symbol in enumerate(path)))
        found[collapsed(path)] = found.get(collapsed(path), 0.0) + share
    return found


def random_logs(seed, steps=None, symbols=None):
    random = np.random.default_rng(seed)
    shape = steps or random.integers(1, 7), symbols or random.integers(2, 5)
    return log_softmax(2 * random.standard_normal(shape))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ((1,), 5.926691688),
        ((1, 1), 5.247310890),
        ((1, 2, 3), 3.587741089),
        ((3, 3), 2.780368417),
        ((2, 1, 2, 1, 2), 12.744678613),
        ((1, 1, 1), 12.840776575),
    ],
)
def test_likelihoods_are_the_published_examples(text, value):
    assert -log_likelihood(EXAMPLE, text) == pytest.approx(value, abs=1e-9)
    found = F.ctc_loss(
        torch.from_numpy(EXAMPLE)[:, None], torch.tensor([text]), [5], [len(text)], reduction="sum"
    )
    assert found.item() == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("seed", range(50))
def test_likelihoods_and_the_beam_are_those_of_all_paths(seed):
    logs = random_logs(seed)
    wanted = all_texts(logs)
    assert sum(wanted.values()) == pytest.approx(1)
    for text, share in wanted.items():
        assert np.exp(log_likelihood(logs, text)) == pytest.approx(share, rel=1e-9)
    found = beam(logs, 10**9)
    best = max(wanted.values())
    assert np.exp(found.log_probability) == pytest.approx(best, rel=1e-9)
    assert wanted[found.symbols] == pytest.approx(best, rel=1e-9)


def test_the_likeliest_path_is_not_the_likeliest_text():
    assert greedy(EXAMPLE).symbols == (3, 2, 3)
    found = beam(EXAMPLE, 10**9)
    assert found.symbols == (3, 2)
    assert np.exp(found.log_probability) == pytest.approx(0.083509192, abs=1e-9)
    two = np.log([[0.4, 0.35, 0.25]] * 2)
    assert greedy(two).symbols == ()
    assert np.exp(greedy(two).log_probability) == pytest.approx(0.16)
    assert beam(two, 10).symbols == (1,)
    assert np.exp(beam(two, 10).log_probability) == pytest.approx(0.4025)


def test_equal_texts_are_ordered_by_their_symbols():
    even = np.log(np.full((1, 4), 0.25))
    assert beam(even, 4).symbols == ()
    assert beam(even, 1).symbols == ()


def test_an_impossible_text_has_no_probability():
    assert log_likelihood(EXAMPLE[:2], (1, 1)) == -np.inf  # which takes three steps
    assert log_likelihood(EXAMPLE[:3], (1, 1)) > -np.inf
    assert np.exp(log_likelihood(EXAMPLE, ())) == pytest.approx(np.exp(EXAMPLE[:, 0].sum()))


@pytest.mark.parametrize("seed", range(20))
def test_characters_lie_on_the_likeliest_path_of_a_text(seed):
    logs = random_logs(seed, steps=6, symbols=4)
    found = beam(logs, 50)
    paths = [p for p in product(range(4), repeat=6) if collapsed(p) == found.symbols]
    best = max(paths, key=lambda path: sum(logs[step, s] for step, s in enumerate(path)))
    steps, before = [], None
    for step, symbol in enumerate(best):
        if symbol and symbol != before:
            steps.append([step, step])
        elif symbol:
            steps[-1][1] = step
        before = symbol
    assert [list(pair) for pair in found.steps] == steps


@cache
def slow_distance(one, other):
    if not one or not other:
        return len(one) + len(other)
    if one[0] == other[0]:
        return slow_distance(one[1:], other[1:])
    parts = ((one[1:], other), (one, other[1:]), (one[1:], other[1:]))
    return 1 + min(slow_distance(*part) for part in parts)


@given(st.text("abc", max_size=6), st.text("abc", max_size=6))
def test_edits_are_the_fewest(one, other):
    assert edit_distance(one, other) == slow_distance(one, other) == edit_distance(other, one)


def sure(*path, symbols=4):
    return 9.0 * np.eye(symbols)[list(path)]


def test_texts_are_decoded_with_places_in_pixels():
    (found,) = decode(sure(0, 1, 1, 0, 1, 3)[None], CLASSES)
    assert found["text"] == "aac"
    assert found["confidence"] == pytest.approx(1, abs=0.01)
    assert found["characters"] == [
        {"char": "a", "start": 4, "end": 11},
        {"char": "a", "start": 16, "end": 19},
        {"char": "c", "start": 20, "end": 23},
    ]
    assert decode(sure(0, 0)[None], CLASSES)[0]["text"] == ""
    assert decode(np.empty((0, 5, 4)), CLASSES) == []
    (wide,) = decode(np.log([[[0.4, 0.35, 0.25]] * 2]), CLASSES[:3], {"beam": 10})
    assert wide["text"] == "a"
    assert wide["confidence"] == pytest.approx(0.4025)


def test_a_text_is_one_of_given_words():
    outputs = sure(1, 0, 2, 0, 3)[None]
    assert decode(outputs, CLASSES, {"words": ["ab", "cab", "ba"]})[0]["text"] == "ab"
    assert decode(outputs, CLASSES, {"words": ["abc", "cab"]})[0]["text"] == "abc"
    far = decode(outputs, CLASSES, {"words": ["cacacacaca"]})  # further than three edits
    assert far[0]["text"] == "cacacacaca"
    assert far[0]["confidence"] == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"width": 3}, "the settings beam and words"),
        ({"beam": -1}, "beam is a whole number from 0 to 100, got -1"),
        ({"beam": 2.5}, "beam is a whole number"),
        ({"words": "abc"}, "words must be a list of texts"),
        ({"words": ["xa"]}, r"the word 'xa' has symbols unknown to the model: \['x'\]"),
        ({"words": [""]}, "the word '' has"),
    ],
)
def test_wrong_settings_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        decode(sure(1)[None], CLASSES, settings)


def test_decoders_are_found_by_their_task():
    assert decoder_of("ocr") is ocr
    assert decoder_of("puzzle") is puzzle
    assert not has_decoder("os")
    for name in ("speech", "../ocr", "ocr.Settings", ""):
        with pytest.raises(
            UsageError, match=f"no decoder for the task '{name}'; there are eeg, .*ocr"
        ):
            decoder_of(name)
    with pytest.raises(UsageError, match="decoding has no setting 'beam' here"):
        puzzle.decode(np.zeros((1, 4, 3)), "#ab", {"beam": 2})
    outputs = np.eye(3)[[[1, 2, 2, 1]]]
    assert puzzle.decode(outputs, "#ab") == [["ab", "ba"]]
    labels = np.array([[1, 2, 2, 1]])
    assert puzzle.right(outputs, labels).tolist() == [True]
    assert puzzle.right(outputs, np.array([[0, 2, 2, 1]])).tolist() == [True]  # not labelled
    assert puzzle.right(outputs, np.array([[2, 2, 2, 1]])).tolist() == [False]
    assert puzzle.right(outputs, np.zeros((1, 4), int)).tolist() == [False]  # nothing is
