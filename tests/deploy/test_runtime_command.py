"""Command of the runtime's own wheel."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from smallfry_runtime import Runtime
from smallfry_runtime.__main__ import main


@pytest.fixture
def pictures(tmp_path):
    random = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(random.integers(0, 256, (12, 10), np.uint8)).save(tmp_path / name)
    return [str(tmp_path / name) for name in ("a.png", "b.png")]


def test_it_prints_what_the_runtime_predicts(anytime, pictures, capsys):
    assert main([str(anytime), *pictures, "--exit_threshold", "0.5", "--top_k", "1"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = Runtime(anytime).predict(pictures, threshold=0.5)
    classes = Runtime(anytime).classes
    assert [line["class"] for line in lines] == [
        classes[row.argmax()] for row in expected.probabilities
    ]
    assert [line["steps"] for line in lines] == expected.steps.tolist()
    assert all(len(line["top"]) == 1 for line in lines)


def test_an_image_that_is_none_fails_and_the_others_are_classified(anytime, pictures, capsys):
    with open(pictures[0], "w") as file:
        file.write("text")
    assert main([str(anytime), *pictures]) == 1
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert "a.png" in first["error"]
    assert "class" in second


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--top_k", "0"], 2, "top_k"),
        (["--exit_steps", "0.1"], 2, "exit_steps must be at least 1"),
        (["--decoding", "beam=10"], 2, "decoding is not JSON"),
        (["--decoding", "[1]"], 2, "decoding is an object of JSON"),
        (["--decoding", '{"beam": 10}'], 2, "decoding has no setting 'beam' here"),
    ],
)
def test_wrong_options_are_explained(anytime, pictures, capsys, options, code, message):
    assert main([str(anytime), *pictures, *options]) == code
    assert message in capsys.readouterr().err


def test_a_missing_export_is_an_error(tmp_path, capsys):
    assert main([str(tmp_path / "none"), "x.png"]) == 1
    assert "no such export" in capsys.readouterr().err


COMMAND = (sys.executable, "-m", "smallfry_runtime")
LISTENING = (  # to Ctrl-C, which a shell's background job ignores
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from smallfry_runtime.__main__ import main; sys.exit(main(sys.argv[1:]))"
)


def test_a_reader_that_has_enough_is_no_failure(anytime, pictures):
    many = "".join(f"{pictures[0]}\n" for _ in range(3000))
    with subprocess.Popen(
        [*COMMAND, str(anytime), "-"], stdin=-1, stdout=-1, stderr=-1, text=True
    ) as process:
        process.stdin.write(many)
        process.stdin.close()
        assert json.loads(process.stdout.readline())["class"]
        process.stdout.close()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (0, "")


def test_names_beyond_the_terminals_letters_are_escaped(anytime, pictures):
    os.rename(pictures[0], named := os.path.join(os.path.dirname(pictures[0]), "猫.png"))
    found = subprocess.run(
        [*COMMAND, str(anytime), named],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert (found.returncode, found.stderr) == (0, "")
    assert r"\u732b.png" in found.stdout


def test_an_interruption_ends_quietly(anytime, pictures):
    many = "".join(f"{pictures[0]}\n" for _ in range(100_000))
    with subprocess.Popen(
        [sys.executable, "-c", LISTENING, str(anytime), "-"],
        stdin=-1,
        stdout=-1,
        stderr=-1,
        text=True,
    ) as process:
        process.stdin.write(many)
        process.stdin.close()
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (130, "")
