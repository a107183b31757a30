"""Predictions of images: order, ties, batches and images that can't be read."""

import io
import json
import math

import numpy as np
import pytest
from PIL import Image

from smallfry_runtime.inputs import InputImage
from smallfry_runtime.predictions import BATCH, NOT_FINITE, Answer, Outputs, answers

CLASSES = ("cat", "dog", "eel", "fox")


def image(value, name="image"):
    stream = io.BytesIO()
    Image.fromarray(np.full((2, 2), value, np.uint8)).save(stream, "png")
    return InputImage(name, stream.getvalue())


def by_brightness(pixels):
    """The likeliest class is the first pixel, modulo 4."""
    brightness = pixels[:, 0, 0, 0].astype(int)
    probabilities = np.full((len(pixels), 4), 0.1, np.float32)
    probabilities[np.arange(len(pixels)), brightness % 4] = 0.7
    return Outputs(probabilities)


def run(images, model=by_brightness, **settings):
    return list(answers(model, images, CLASSES, 2, 1, **settings))


def test_no_images_call_no_model():
    assert run([], model=None) == []


def test_the_likeliest_come_first_and_of_equals_the_first_class():
    (answer,) = run([image(2)], top_k=4)
    assert [name for name, _ in answer.top] == ["eel", "cat", "dog", "fox"]
    assert [share for _, share in answer.top] == pytest.approx([0.7, 0.1, 0.1, 0.1])


@pytest.mark.parametrize(("top_k", "named"), [(1, 1), (3, 3), (4, 4), (99, 4)])
def test_at_most_all_classes_are_named(top_k, named):
    (answer,) = run([image(1)], top_k=top_k)
    assert len(answer.top) == named


@pytest.mark.parametrize("count", [1, BATCH - 1, BATCH, BATCH + 1, 2 * BATCH + 3])
def test_images_are_answered_in_order_in_batches_of_64(count):
    sizes = []

    def model(pixels):
        sizes.append(len(pixels))
        return by_brightness(pixels)

    found = run([image(i % 251, str(i)) for i in range(count)], model)
    assert [answer.name for answer in found] == [str(i) for i in range(count)]
    assert [answer.top[0][0] for answer in found] == [CLASSES[i % 251 % 4] for i in range(count)]
    assert sizes == [BATCH] * (count // BATCH) + [count % BATCH] * (count % BATCH > 0)


def test_images_are_read_one_batch_ahead_at_most():
    """A folder of a million images begins to be answered at once."""
    taken = []

    def images():
        for number in range(10 * BATCH):
            taken.append(number)
            yield image(number % 251)

    next(answers(by_brightness, images(), CLASSES, 2, 1))
    assert len(taken) == BATCH


def test_what_can_not_be_read_is_an_error_in_its_place():
    images = [
        image(1, "a"),
        InputImage("b", b"no image"),
        InputImage("c", None, "c: there is no such file"),
        image(3, "d"),
        InputImage("e", None),
    ]
    found = run(images)
    assert [answer.name for answer in found] == ["a", "b", "c", "d", "e"]
    assert [answer.top[:1] and answer.top[0][0] for answer in found] == ["dog", [], [], "fox", []]
    assert found[0].error is None
    assert found[1].error.startswith("b: ")
    assert found[2].error == "c: there is no such file"
    assert found[4].error == "e"


def test_a_batch_of_errors_calls_no_model():
    found = run([InputImage("a", b""), InputImage("b", None, "gone")], model=None)
    assert [bool(answer.error) for answer in found] == [True, True]


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_an_answer_that_is_no_number_is_an_error_of_that_image_alone(wrong):
    def model(pixels):
        outputs = by_brightness(pixels)
        outputs.probabilities[1, 2] = wrong
        return outputs

    found = run([image(1, "a"), image(2, "b"), image(3, "c")], model, top_k=4)
    assert [answer.error for answer in found] == [None, f"b: {NOT_FINITE}", None]
    assert found[1].top == []


def test_halting_and_steps_are_those_of_the_image():
    def model(pixels):
        count = len(pixels)
        halting = np.linspace(0, 1, count, dtype=np.float32)
        return by_brightness(pixels)._replace(halting=halting, steps=np.arange(count))

    found = run([image(1), image(2), image(3)], model)
    assert [answer.halting for answer in found] == [0.0, 0.5, 1.0]
    assert [answer.steps for answer in found] == [0, 1, 2]
    assert all(type(answer.steps) is int and type(answer.halting) is float for answer in found)


def test_a_halting_probability_that_is_no_number_is_an_error():
    def model(pixels):
        return by_brightness(pixels)._replace(halting=np.array([np.nan], np.float32))

    (answer,) = run([image(1, "a")], model)
    assert answer.error == f"a: {NOT_FINITE}"


def test_an_answer_is_json_with_six_digits():
    answer = Answer("a.png", [("cat", 2 / 3), ("dog", 1e-9)], halting=1 / 3, steps=2)
    assert json.loads(json.dumps(answer.to_dict())) == {
        "image": "a.png",
        "class": "cat",
        "top": [
            {"class": "cat", "probability": 0.666667},
            {"class": "dog", "probability": 0.0},
        ],
        "halting": 0.333333,
        "steps": 2,
    }
    assert {*Answer("a", [("cat", 1.0)]).to_dict()} == {"image", "class", "top"}


@pytest.mark.parametrize(
    ("answer", "finite"),
    [
        (Answer("a", []), True),
        (Answer("a", [("cat", 0.5)], halting=0.0), True),
        (Answer("a", [("cat", math.nan)]), False),
        (Answer("a", [("cat", 0.5), ("dog", math.inf)]), False),
        (Answer("a", [("cat", 0.5)], halting=math.nan), False),
    ],
)
def test_all_numbers_of_an_answer_are_looked_at(answer, finite):
    assert answer.is_finite is finite
