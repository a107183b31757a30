"""The C and C++ examples, compiled and run against the installed ONNX Runtime."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image

import smallfry
from smallfry.data.own import write_data
from smallfry_runtime.runtime import Runtime

ROOT = Path(__file__).parents[2]
ABI = Path(__file__).parent / "onnxruntime_abi"
LIBRARIES = sorted(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so*"))


def compiled(source: str, compiler: str, place: Path) -> Path:
    """Compile an example, or skip the test where that is impossible."""
    found = shutil.which(compiler)
    if found is None:
        pytest.skip(f"there is no {compiler}")
    if not LIBRARIES:
        pytest.skip("this ONNX Runtime has no shared library")
    library, program = place / "libonnxruntime.so.1", place / "classify"
    library.symlink_to(LIBRARIES[0])  # the name that a program looks for
    standard = "-std=c++17" if source.endswith("cpp") else "-std=c99"
    command = [found, standard, "-O1", "-Wall", "-Wextra", "-Werror", f"-I{ABI}"]
    command += [str(ROOT / "examples" / source), str(library), f"-Wl,-rpath,{place}"]
    subprocess.run([*command, "-lm", "-o", str(program)], check=True, capture_output=True)
    return program


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """Export a recursive model of colour images, of two steps."""
    folder = tmp_path_factory.mktemp("native")
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (40, 3, 16, 24), np.uint8)
    labels = ["cat", 'dog "rex"', "bird\\jay", "Fuß"] * 10
    smallfry.train(
        data={"name": str(write_data((images, labels), folder / "data")), "image_size": [16, 24]},
        model={
            "name": "vitrm_micro_patch4_8",
            "recursion_steps": 2,
            "options": {"embed_dim": 16, "mlp_hidden_dim": 24, "num_heads": 2},
        },
        epochs=1,
        run=folder / "run",
    )
    return smallfry.export(folder / "run", folder / "export", form="whole")


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    pixels = np.random.default_rng(1).integers(0, 256, (16, 24, 3), np.uint8)
    file = tmp_path_factory.mktemp("picture") / "photo.ppm"
    Image.fromarray(pixels).save(file)
    return file, pixels


def run(program, *arguments, given=None):
    return subprocess.run([program, *map(str, arguments)], input=given, capture_output=True)


@pytest.fixture(scope="module")
def in_c(tmp_path_factory):
    return compiled("c/classify.c", "gcc", tmp_path_factory.mktemp("c"))


@pytest.mark.slow
def test_c_answers_as_the_runtime(export, picture, in_c):
    file, _ = picture
    runtime = Runtime(export)
    wanted = runtime.predict([file]).probabilities[0]
    order = wanted.argsort()[::-1][:3]
    done = run(in_c, export / "model.onnx", file)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode().splitlines()
    found = [line.rsplit(" ", 1) for line in lines]
    assert [name for name, _ in found] == [runtime.classes[i] for i in order]
    assert [float(share) for _, share in found] == pytest.approx(wanted[order], abs=2e-6)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"P6\n# made by hand\n24 8\n255\n" + bytes(576), b"24 x 8 with values to 255"),
        (b"P6 24 16 255\n" + bytes(100), b"is truncated"),
        (b"P5 24 16 255\n" + bytes(384), b"no binary PPM"),
        (b"", b"no binary PPM"),
    ],
)
@pytest.mark.slow
def test_c_refuses_other_images(export, in_c, tmp_path, content, words):
    (tmp_path / "wrong.ppm").write_bytes(content)
    done = run(in_c, export / "model.onnx", tmp_path / "wrong.ppm")
    assert done.returncode == 1
    assert words in done.stderr


@pytest.mark.slow
def test_c_refuses_other_models(in_c, picture, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no model")
    done = run(in_c, tmp_path / "model.onnx", picture[0])
    assert done.returncode == 1
    assert b"classify: ONNX Runtime" in done.stderr


@pytest.mark.slow
def test_cpp_computes_the_logits_of_the_runtime(export, picture, tmp_path):
    program = compiled("cpp/classify.cpp", "g++", tmp_path)
    _, pixels = picture
    done = run(program, export / "model.onnx", 3, 16, 24, given=pixels.tobytes())
    assert done.returncode == 0, done.stderr
    logits = np.array(done.stdout.split(), np.float32).reshape(2, 4)
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1))[None]
    assert logits[-1] == pytest.approx(Runtime(export).compute(planes).logits[0], abs=1e-5)
    short = run(program, export / "model.onnx", 3, 16, 24, given=b"123")
    assert (short.returncode, b"shorter than an image" in short.stderr) == (1, True)
    other = run(program, export / "model.onnx", 3, 16, 23, given=bytes(16 * 23 * 3))
    assert (other.returncode, b"classify:" in other.stderr) == (1, True)
