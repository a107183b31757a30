"""ExecuTorch: programs answer as ONNX does, image by image, in its Python runtime."""

import json

import pytest

from tests.deploy.round_trip import (
    check_damage,
    check_float32,
    check_int8,
    exported,
    pixels_of,
    require_packages,
)

require_packages("executorch")
pytestmark = pytest.mark.slow  # its compiler takes seconds for each graph


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("executorch")


@pytest.fixture(scope="module")
def plain(run, place):
    return exported(run, place, "executorch", "float32")


def test_a_program_answers_as_in_onnx(run, plain, anytime):
    check_float32(plain, anytime, pixels_of(run, 40))


def test_damaged_programs_are_refused(plain):
    check_damage(plain, ["embed.pte", "step.pte", "read_out.pte"])


def test_int8_answers_as_in_float32_and_as_onnx_in_int8(run, plain, place):
    folder = exported(run, place, "executorch", "int8")
    check_int8(folder, plain, exported(run, place, "onnx", "int8"), pixels_of(run, 200))
    assert json.loads((folder / "quantization.json").read_text())["agreement"] > 0.9
