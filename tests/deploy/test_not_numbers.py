"""A model that answers with no numbers is an error wherever it is asked, never a row of nan."""

import hashlib
import json
import shutil

import numpy as np
import onnx
import pytest
import safetensors.torch
from onnx import numpy_helper
from PIL import Image

from smallfry.cli import main
from smallfry.deploy import Runtime, benchmark
from smallfry.errors import ExportError
from smallfry_runtime.files import with_digest
from smallfry_runtime.inputs import InputImage
from smallfry_runtime.predictions import NOT_FINITE, Outputs, answers


def resealed(folder, names):
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    for name in names:
        manifest["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    file.write_text(json.dumps(with_digest(manifest)))


@pytest.fixture
def no_run(run, tmp_path):
    """A run whose weights are numbers, and whose logits are not."""
    folder = shutil.copytree(run, tmp_path / "run")
    file = folder / "best" / "model.safetensors"
    weights = safetensors.torch.load(file.read_bytes())
    weights["head.weight"].fill_(3e38)
    file.write_bytes(safetensors.torch.save(weights))
    resealed(folder / "best", [file.name])
    return folder


@pytest.fixture(params=["whole", "anytime"])
def no_export(request, tmp_path):
    """An export whose graphs hold what is no number."""
    folder = shutil.copytree(request.getfixturevalue(request.param), tmp_path / "export")
    file = folder / ("model.onnx" if request.param == "whole" else "read_out.onnx")
    graph = onnx.load(file)
    for tensor in graph.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.size > 1:
            broken = np.full_like(values, np.nan)
            tensor.CopyFrom(numpy_helper.from_array(broken, tensor.name))
    onnx.save(graph, file)
    resealed(folder, [file.name])
    return folder


@pytest.fixture
def picture(tmp_path):
    Image.new("L", (8, 8), 90).save(tmp_path / "p.png")
    return tmp_path / "p.png"


def refused(capsys, *arguments):
    assert main([*map(str, arguments)]) == 1
    printed = capsys.readouterr()
    assert "the model's answer is not a number" in printed.err
    assert "nan" not in (printed.out + printed.err).lower()


def test_predict_refuses_a_runs_answer(no_run, picture, capsys):
    refused(capsys, "predict", no_run, picture)
    refused(capsys, "predict", no_run, picture, "--json")


def test_predict_refuses_an_exports_answer(no_export, picture, capsys):
    refused(capsys, "predict", no_export, picture)
    refused(capsys, "predict", no_export, picture, "--json")


def test_evaluate_refuses_a_runs_answers(no_run, capsys):
    refused(capsys, "evaluate", no_run)
    refused(capsys, "evaluate", no_run, "--json")


def test_benchmark_refuses_them_and_writes_no_report(
    no_run, no_export, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(benchmark, "measure_memory", lambda *_: None)
    quick = ("--seconds", "0.01", "--batch_sizes", "1", "--forms", "eager")
    for model in (no_run, no_export):
        refused(capsys, "benchmark", model, "--folder", tmp_path / "report", *quick)
        assert not (tmp_path / "report").exists()


def test_the_runtime_refuses_them_and_calibrates_nothing_on_them(no_export):
    runtime = Runtime(no_export)
    pixels = np.zeros((2, 1, 8, 8), np.uint8)
    with pytest.raises(ExportError, match="not a number"):
        runtime.predict(pixels)
    if runtime.manifest.form == "anytime":
        with pytest.raises(ExportError, match="not a number"):
            runtime.trace(pixels, np.zeros(2, np.int64))


def test_an_image_with_an_answer_gets_it_beside_one_without(picture):
    def run(pixels):
        return Outputs(np.array([[np.nan, np.nan], [0.25, 0.75]], np.float32))

    images = [InputImage(name, picture, None) for name in ("a", "b")]
    first, second = answers(run, images, ("x", "y"), 8, 1)
    assert first.error == f"a: {NOT_FINITE}"
    assert second.top == [("y", 0.75), ("x", 0.25)]


def test_a_halting_probability_that_is_no_number_is_no_answer(picture):
    def run(pixels):
        return Outputs(np.ones((1, 1), np.float32), np.array([np.nan], np.float32))

    (answer,) = answers(run, [InputImage("a", picture, None)], ("x",), 8, 1)
    assert answer.error is not None
