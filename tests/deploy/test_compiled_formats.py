"""ExecuTorch and LiteRT: compiled programs answer as ONNX does, image by image."""

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

pytestmark = pytest.mark.slow  # their compilers take seconds for each graph
ENDINGS = {"executorch": ".pte", "litert": ".tflite"}


@pytest.fixture(scope="module", params=ENDINGS)
def target(request):
    require_packages(request.param)
    return request.param


@pytest.fixture(scope="module")
def place(target, tmp_path_factory):
    return tmp_path_factory.mktemp(target)


@pytest.fixture(scope="module")
def plain(run, place, target):
    return exported(run, place, target, "float32")


def test_a_program_answers_as_in_onnx(run, plain, anytime):
    check_float32(plain, anytime, pixels_of(run, 40))


def test_damaged_programs_are_refused(plain, target):
    check_damage(plain, [f"{name}{ENDINGS[target]}" for name in ("embed", "step", "read_out")])


def test_int8_answers_as_in_float32_and_as_onnx_in_int8(run, plain, place, target):
    folder = exported(run, place, target, "int8")
    check_int8(folder, plain, exported(run, place, "onnx", "int8"), pixels_of(run, 200))
    assert json.loads((folder / "quantization.json").read_text())["agreement"] > 0.9
