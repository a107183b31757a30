"""Decoders of six kits: equal to PyTorch's answers, and ready for JSON; and damaged arrays."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from smallfry.errors import DataError, UsageError
from smallfry.kits.equivariant.task import Equivariant
from smallfry.kits.graphs.task import Graphs
from smallfry.kits.operators.task import Operators
from smallfry.kits.splats.scene import column_names
from smallfry.kits.splats.task import Splats
from smallfry.kits.symbolic.task import Symbolic
from smallfry_runtime.arrays import read_array
from smallfry_runtime.decoders import decoder_of, equivariant, operators, splats, symbolic
from smallfry_runtime.frames import FLOATS, Frame

CLASSIFIED = [(equivariant, Equivariant, "label"), (symbolic, Symbolic, "colour")]
NAMES = ["equivariant", "graphs", "operators", "splats", "symbolic"]


@pytest.mark.parametrize(("decoder", "task", "word"), CLASSIFIED)
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_probabilities_are_pytorchs_softmax(decoder, task, word, kind):
    logits = (30 * np.random.default_rng(0).normal(size=(4, 5))).astype(kind)
    names = list("abcde")
    wanted = torch.from_numpy(logits.astype(np.float64)).softmax(1)
    found = decoder.decode(logits, names)
    for answer, shares in zip(found, wanted, strict=True):
        assert answer[word] == names[int(shares.argmax())]
        assert [*answer["probabilities"]] == names
        assert [*answer["probabilities"].values()] == pytest.approx(shares.tolist(), abs=1e-12)
    assert json.loads(json.dumps(found)) == found
    again = task().decode(torch.from_numpy(logits), names)
    for one, other in zip(found, again, strict=True):
        assert one[word] == other[word]
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-6)


@pytest.mark.parametrize(("decoder", "task", "word"), CLASSIFIED)
def test_logits_without_bound_do_not_overflow_and_the_first_of_equals_is_taken(decoder, task, word):
    first, second = decoder.decode(np.array([[1e4, -1e4], [7.0, 7.0]]), ["a", "b"])
    assert first == {word: "a", "probabilities": {"a": 1.0, "b": 0.0}}
    assert second[word] == "a"
    assert decoder.decode(np.zeros((0, 2)), ["a", "b"]) == []
    with pytest.raises(ValueError, match="zip"):
        decoder.decode(np.zeros((1, 3)), ["a", "b"])
    half = task().decode(torch.tensor([[0.0, 2.0]], dtype=torch.bfloat16), ["a", "b"])
    assert half[0][word] == "b"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("settings", [None, {}])
def test_no_settings_are_no_settings(name, settings):
    shape = {"graphs": (1, 2, 3), "operators": (1, 2, 3, 3)}.get(name, (1, 2))
    module = decoder_of(name)
    assert len(module.decode(np.zeros(shape), ["a", "b"], settings)) == 1
    with pytest.raises(UsageError, match="no setting 'top' here: leave it out"):
        module.decode(np.zeros(shape), ["a", "b"], {"top": 1})


def test_decoders_of_unknown_tasks_are_refused_with_those_there_are():
    with pytest.raises(UsageError, match=r"'splat'; there are .*operators.* splats.* uav-policy"):
        decoder_of("splat")
    with pytest.raises(UsageError, match=r"no decoder for the task 'x{40}'"):
        decoder_of("x" * 99)


def test_fields_and_attributes_keep_seven_digits_of_the_tensors():
    fields = torch.randn(2, 2, 3, 4)
    found = Operators().decode(fields, ["u", "v"])
    for answer, wanted in zip(found, fields, strict=True):
        arrays = np.array([answer["fields"][name] for name in ("u", "v")])
        assert arrays == pytest.approx(wanted.double().numpy(), rel=5e-7)
        assert (answer["maximum"], answer["minimum"]) == (wanted.max(), wanted.min())
        assert answer["mean"] == pytest.approx(wanted.mean().item(), rel=1e-5)
    assert operators.decode(fields.numpy(), ["u", "v"]) == found
    columns = column_names(1)
    rows = torch.randn(3, len(columns))
    answers = Splats().decode(rows, columns)
    assert answers == splats.decode(rows.numpy(), columns)
    values = np.array([[*each.values()] for each in answers])
    assert values == pytest.approx(rows.double().numpy(), rel=5e-7)
    for decode, given in ((operators.decode, fields.numpy()), (splats.decode, rows.numpy())):
        with pytest.raises(ValueError, match="zip"):
            decode(given, ["u"])


def test_numbers_that_are_none_stay_what_they_are():
    field = np.array([[[[np.nan, -np.inf], [np.inf, 1.0]]]])
    (found,) = operators.decode(field, ["u"])
    assert np.array_equal(found["fields"]["u"], field[0, 0], equal_nan=True)
    (row,) = splats.decode(np.array([[np.nan, np.inf]], np.float32), ["a", "b"])
    assert np.isnan(row["a"])
    assert row["b"] == np.inf


def test_nodes_have_the_answers_of_pytorch_in_their_order():
    logits = torch.randn(2, 3, 4, dtype=torch.float64).to(torch.bfloat16)
    found = Graphs().decode(logits, "abc")
    shares, places = logits.float().softmax(1).max(1)
    for answer, best, chosen in zip(found, shares, places, strict=True):
        assert [node["class"] for node in answer["nodes"]] == ["abc"[i] for i in chosen]
        values = [node["probability"] for node in answer["nodes"]]
        assert values == pytest.approx(best.tolist(), abs=6e-5)


def test_decoding_needs_no_pytorch():
    lines = [
        "import sys, numpy as np",
        "sys.modules['torch'] = None",
        "from smallfry_runtime.decoders import decoder_of",
        "shapes = {'graphs': (1, 2, 3), 'operators': (1, 2, 3, 3)}",
        f"for name in {NAMES}:",
        "    print(decoder_of(name).decode(np.zeros(shapes.get(name, (1, 2))), ['a', 'b']))",
        "assert not any(each.startswith(('smallfry.', 'scipy')) for each in sys.modules)",
    ]
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.count("\n") == 5
    assert "{'a': 0.0, 'b': 0.0}" in done.stdout


# Arrays that are given to predict


def archive(**arrays):
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def plain(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


ONE = np.zeros((1, 4, 4), np.float32)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04",
        archive(a=ONE)[:-5],
        plain(ONE)[:-1],
        plain(ONE)[:20],
        b"\x93NUMPY\x09\x00" + plain(ONE)[8:],
        b"x" * 200,
    ],
    ids=["empty", "zip", "cut zip", "cut", "cut head", "version", "text"],
)
@pytest.mark.parametrize("as_file", [False, True])
def test_damaged_arrays_are_refused_with_what_is_expected(content, as_file, tmp_path):
    given = content
    if as_file:
        given = tmp_path / "a.npy"
        given.write_bytes(content)
    with pytest.raises(DataError, match=r"can't be read .*expected an array of float32, 1×4×4"):
        read_array(given, "a.npy", Frame(4, 4, values=FLOATS), 1)
