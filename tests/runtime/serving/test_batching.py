"""Batches of simultaneous calls: right rows to each, limits, errors."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from smallfry_runtime.errors import ExportError
from smallfry_runtime.predictions import Outputs
from smallfry_runtime.serving.batching import Batcher, Busy, Late


def images(*values):
    return np.stack([np.full((1, 2, 2), value, np.uint8) for value in values])


def identity(pixels):
    values = pixels[:, 0, 0, 0]
    return Outputs(values[:, None].astype(np.float32), values / 255, values.astype(np.int64))


class Gate:
    """Model that waits before each batch until it may go on, and records the batches."""

    def __init__(self):
        self.batches, self.begun, self.go = [], threading.Event(), threading.Event()

    def __call__(self, pixels):
        self.begun.set()
        assert self.go.wait(60)
        self.batches.append(pixels[:, 0, 0, 0].tolist())
        return identity(pixels)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(40) as threads:
        yield threads


def wait_for(condition):
    while not condition():
        time.sleep(0.001)


def held(gate, batcher, pool, values):
    """Submit one call, which is computed first, and others that wait behind it."""
    first = pool.submit(batcher, images(0))
    assert gate.begun.wait(60)
    calls = []
    for value in values:
        before = batcher.waiting
        calls.append(pool.submit(batcher, images(*value)))
        wait_for(lambda before=before: batcher.waiting > before)
    return first, calls


def test_each_call_gets_its_own_rows(pool):
    batcher = Batcher(identity)
    calls = [(n % 250, n % 7, 3) for n in range(200)]
    found = list(pool.map(lambda values: batcher(images(*values)), calls))
    for values, outputs in zip(calls, found, strict=True):
        assert outputs.probabilities[:, 0].tolist() == list(values)
        assert outputs.steps.tolist() == list(values)
        np.testing.assert_array_equal(outputs.halting, np.array(values, np.uint8) / 255)
    assert batcher.waiting == 0
    batcher.close()


def test_outputs_that_a_model_lacks_stay_absent():
    batcher = Batcher(lambda pixels: Outputs(pixels.mean((2, 3))))
    found = batcher(images(5, 6))
    assert found.halting is None
    assert found.steps is None
    assert found.probabilities.tolist() == [[5.0], [6.0]]
    batcher.close()


def test_outputs_of_any_form_are_cut_row_by_row(pool):
    def run(pixels):
        values = pixels[:, 0, 0, 0]
        return {"one": values, "two": Outputs(np.stack([values, values + 1], 1))}

    gate = Gate()
    batcher = Batcher(lambda pixels: gate(pixels) and run(pixels))
    first, calls = held(gate, batcher, pool, [(1, 2), (3,)])
    gate.go.set()
    found = [call.result(60) for call in (first, *calls)]
    assert gate.batches == [[0], [1, 2, 3]]
    assert [each["one"].tolist() for each in found] == [[0], [1, 2], [3]]
    assert [each["two"].probabilities.tolist() for each in found] == [
        [[0, 1]],
        [[1, 2], [2, 3]],
        [[3, 4]],
    ]
    assert found[0]["two"].steps is None
    batcher.close()


def test_calls_that_wait_are_computed_together_up_to_a_limit(pool):
    gate, sizes = Gate(), []
    batcher = Batcher(gate, most_images=4, observe=sizes.append)
    first, calls = held(
        gate, batcher, pool, [(1,), (2, 3), (4,), (5,), (6, 7, 8, 9, 10, 11), (12,)]
    )
    assert batcher.waiting == 12
    gate.go.set()
    for call in (first, *calls):
        call.result(60)
    assert gate.batches == [[0], [1, 2, 3, 4], [5], [6, 7, 8, 9, 10, 11], [12]]
    wait_for(lambda: len(sizes) == 5)
    assert sizes == [1, 4, 1, 6, 1]
    batcher.close()


def test_too_many_waiting_images_are_refused(pool):
    gate = Gate()
    batcher = Batcher(gate, most_waiting=3)
    first, calls = held(gate, batcher, pool, [(1,), (2, 3)])
    with pytest.raises(Busy, match="3 images are waiting already; try again later"):
        batcher(images(4))
    gate.go.set()
    assert [call.result(60).steps.tolist() for call in (first, *calls)] == [[0], [1], [2, 3]]
    assert batcher(images(4, 5, 6, 7, 8)).steps.tolist() == [4, 5, 6, 7, 8]  # an idle one takes all
    batcher.close()


def test_a_late_call_is_dropped_and_the_others_are_not(pool):
    gate = Gate()
    batcher = Batcher(gate)
    first, (kept,) = held(gate, batcher, pool, [(1,)])
    with pytest.raises(Late, match=r"no answer within 0\.01 s"):
        batcher(images(2), seconds=0.01)
    gate.go.set()
    assert kept.result(60).steps.tolist() == [1]
    assert first.result(60).steps.tolist() == [0]
    batcher.close()
    assert gate.batches == [[0], [1]]
    assert batcher.waiting == 0


@pytest.mark.parametrize("error", [ExportError("the graph is broken"), MemoryError()])
def test_an_error_reaches_every_call_of_its_batch_and_no_other(error, pool):
    def run(pixels):
        if 9 in pixels:
            raise error
        return identity(pixels)

    batcher = Batcher(run)
    with pytest.raises(type(error)):
        batcher(images(9))
    assert batcher(images(1)).steps.tolist() == [1]
    batcher.close()


def test_outputs_of_another_number_of_images_do_not_hang():
    batcher = Batcher(lambda pixels: Outputs(np.zeros((0, 2), np.float32), None, None))
    assert len(batcher(images(1)).probabilities) == 0
    batcher.close()


def test_closing_computes_what_waits(pool):
    gate = Gate()
    batcher = Batcher(gate)
    first, calls = held(gate, batcher, pool, [(1,), (2,)])
    gate.go.set()
    batcher.close()
    assert [call.result(60).steps.tolist() for call in (first, *calls)] == [[0], [1], [2]]
    with pytest.raises(Busy, match="the server is stopping"):
        batcher(images(3))
