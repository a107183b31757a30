"""OpenVINO: exports answer as those in ONNX do, and int8 keeps its scales."""

import json
import pickle
import re

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from smallfry.cli import main
from smallfry.deploy import Runtime
from tests.deploy.round_trip import (
    check_damage,
    check_float32,
    check_int8,
    exported,
    pixels_of,
    require_packages,
)

require_packages("openvino")

from smallfry.deploy.targets.openvino import rounding_for_products  # noqa: E402


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("openvino")


@pytest.fixture(scope="module")
def plain(run, place):
    return exported(run, place, "openvino", "float32")


def test_an_export_answers_as_in_onnx(run, plain, anytime):
    check_float32(plain, anytime, pixels_of(run, 40))


@pytest.mark.slow
def test_int8_answers_as_in_float32_and_as_onnx_in_int8(run, plain, place):
    folder = exported(run, place, "openvino", "int8")
    check_int8(folder, plain, exported(run, place, "onnx", "int8"), pixels_of(run, 200))
    weights = [sum(f.stat().st_size for f in at.glob("*.bin")) for at in (plain, folder)]
    assert weights[1] < 0.6 * weights[0]
    report = json.loads((folder / "quantization.json").read_text())
    assert report["agreement"] > 0.9
    assert report["eight_bits"]["bytes"] > weights[1]


def test_damaged_files_are_refused_and_a_copy_reads_the_export_again(run, plain):
    stems = ("embed", "step", "read_out")
    check_damage(plain, [f"{stem}{end}" for stem in stems for end in (".xml", ".bin")])
    copy = pickle.loads(pickle.dumps(Runtime(plain)))
    pixels = pixels_of(run, 3)
    wanted = Runtime(plain).predict(pixels).probabilities
    np.testing.assert_allclose(copy.predict(pixels).probabilities, wanted, atol=1e-6)


def test_the_commands_export_and_predict(run, plain, tmp_path, capsys):
    to = tmp_path / "a"
    given = ["export", str(run), "--to", str(to), "--target", "openvino", "--form", "whole"]
    assert main(given) == 0
    assert {f.name for f in to.iterdir()} == {"model.xml", "model.bin", "manifest.json"}
    size = sum((to / f"model{end}").stat().st_size for end in (".xml", ".bin"))
    assert f"({size / 1e6:,.2f} MB)" in capsys.readouterr().out
    answers = [Runtime(at).predict(pixels_of(run, 9)).probabilities for at in (to, plain)]
    np.testing.assert_allclose(*answers, atol=1e-5)


def quantized(*nodes, outputs):
    """A graph of images (batch, 4), whose first steps are a quantization and its inverse."""
    make, floats = onnx.helper.make_node, onnx.TensorProto.FLOAT
    shape = ["batch", 4]
    matrix = onnx.numpy_helper.from_array(np.arange(16, dtype=np.int8).reshape(4, 4), "w")
    scale = onnx.numpy_helper.from_array(np.float32(0.5), "scale")
    zero = onnx.numpy_helper.from_array(np.uint8(7), "zero")
    zero_8 = onnx.numpy_helper.from_array(np.int8(0), "zero_8")
    graph = onnx.helper.make_graph(
        [
            make("QuantizeLinear", ["images", "scale", "zero"], ["codes"]),
            make("DequantizeLinear", ["codes", "scale", "zero"], ["rounded"]),
            make("DequantizeLinear", ["w", "scale", "zero_8"], ["weight"]),
            *nodes,
        ],
        "g",
        [onnx.helper.make_tensor_value_info("images", floats, shape)],
        [onnx.helper.make_tensor_value_info(name, floats, shape) for name in outputs],
        [matrix, scale, zero, zero_8],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])


def test_only_products_read_rounded_values():
    make = onnx.helper.make_node
    model = quantized(
        make("MatMul", ["rounded", "weight"], ["product"]),
        make("Add", ["rounded", "product"], ["sum"]),
        outputs=["sum", "rounded"],
    )
    changed = onnx.load_from_string(rounding_for_products(model.SerializeToString()))
    onnx.checker.check_model(changed, full_check=True)
    images = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    codes = np.clip(np.rint(images / np.float32(0.5)) + 7, 0, 255) - 7
    product = (codes @ np.arange(16).reshape(4, 4)) * 0.25
    total, same = ReferenceEvaluator(changed).run(None, {"images": images})
    np.testing.assert_allclose(total, images + product, rtol=1e-6)
    np.testing.assert_array_equal(same, images)
    before = ReferenceEvaluator(model).run(None, {"images": images})[0]
    np.testing.assert_allclose(before, 0.5 * codes + product, rtol=1e-6)


def test_openvino_keeps_the_zero_point_of_an_input_that_others_read(tmp_path):
    import openvino

    make = onnx.helper.make_node
    model = quantized(
        make("MatMul", ["rounded", "weight"], ["product"]),
        make("Add", ["rounded", "product"], ["sum"]),
        outputs=["sum"],
    )
    content = rounding_for_products(model.SerializeToString())
    file = tmp_path / "graph.onnx"
    file.write_bytes(content)
    compiled = openvino.Core().compile_model(file, "CPU")
    images = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)
    wanted = ReferenceEvaluator(onnx.load_from_string(content)).run(None, {"images": images})[0]
    np.testing.assert_allclose(compiled(images)[0], wanted, atol=1e-4)


def test_an_export_that_another_version_wrote_is_refused(plain, tmp_path):
    text = (plain / "manifest.json").read_text()
    assert re.search(r'"engine": "openvino"', text)
    assert json.loads(text)["format"] == 6


@pytest.mark.slow
def test_a_benchmark_has_openvino_beside_onnx_and_its_early_exit(run, tmp_path, capsys):
    settings = ["--seconds", "0.01", "--batch_sizes", "1", "--forms", "float32", "int8", "exit"]
    arguments = ["benchmark", str(run), "--folder", str(tmp_path / "a"), *settings]
    assert main([*arguments, "--targets", "[openvino]", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    forms = {each["form"]: each for each in report["measured"]}
    assert {"ONNX float32", "OpenVINO float32, in parts", "OpenVINO int8, in parts"} <= {*forms}
    assert any(form.startswith("OpenVINO float32, exit at drop") for form in forms)
    plain = forms["OpenVINO float32, in parts"]
    assert plain["accuracy"] == forms["ONNX float32"]["accuracy"]
    assert plain["agreement"] == 1
    assert plain["memory"]


@pytest.mark.slow
def test_costs_of_a_fit_are_those_of_the_format(monkeypatch, tmp_path):
    from smallfry.data import load_data
    from smallfry.deploy.targets import find_target
    from smallfry.fitting import costs
    from smallfry.fitting.zoo import zoo

    monkeypatch.setattr(costs, "cache_folder", lambda: tmp_path)
    entry = next(each for each in zoo(["loopnet_70k"]) if each.width == 0.25)
    digits = load_data("digits")
    ours, theirs = (
        costs.measure_costs(entry, digits, find_target(name)) for name in ("openvino", "onnx")
    )
    assert ours.parameters == theirs.parameters
    assert ours.kb["float32"] > theirs.kb["float32"]  # a graph as text
    assert all(0 < each < 1000 for each in ours.ms.values())
    assert len([*tmp_path.rglob("*.json")]) == 2  # one of each format
