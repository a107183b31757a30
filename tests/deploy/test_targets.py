"""Device formats without their packages: names, precisions, missing packages, the engines."""

import json
from dataclasses import replace

import numpy as np
import pytest

from smallfry.cli import main
from smallfry.deploy import Runtime
from smallfry.deploy.benchmark import _formats
from smallfry.deploy.benchmark_config import BenchmarkConfig
from smallfry.deploy.contestants import form_of
from smallfry.deploy.export import export, export_bytes
from smallfry.deploy.graphs import anytime_graphs, whole_graph
from smallfry.deploy.targets import (
    Source,
    find_target,
    is_installed,
    register_target,
    require_installed,
    target,
    targets,
)
from smallfry.deploy.targets.single import calibration_batches, one_image
from smallfry.errors import ExportError, UsageError
from smallfry.fitting.config import FitConfig
from smallfry.fitting.run import fit
from smallfry.training.run import load_run
from smallfry_runtime.engines import engine_of, engines, graph_files, one_by_one
from smallfry_runtime.manifest import MANIFEST, Manifest, read_export


def test_every_target_has_an_engine_and_is_an_extra():
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert {*targets()} == {*engines()} == {"onnx", "openvino", "executorch", "litert"}
    for name, each in targets().items():
        assert each.title
        assert {"float32", "int8"} <= {*each.precisions}
        engine = engine_of(name)
        assert all(suffix.startswith(".") for suffix in engine.SUFFIXES)
        if name != "onnx":
            wanted = " ".join(extras[name])
            assert all(package in wanted for package in each.packages)
            assert engine.PACKAGE in each.packages


def test_files_of_graphs_by_form_and_engine():
    assert graph_files("whole") == ("model.onnx",)
    assert graph_files("whole", "openvino") == ("model.xml", "model.bin")
    assert graph_files("anytime", "litert") == ("embed.tflite", "step.tflite", "read_out.tflite")


def test_words_of_forms():
    assert form_of("onnx", "int8_dynamic") == "ONNX int8 dynamic"
    assert form_of("onnx", "own_bits") == "ONNX, own bits"
    assert form_of("openvino", "int8") == "OpenVINO int8"


@pytest.fixture
def without(monkeypatch):
    monkeypatch.setattr(target, "find_spec", lambda name: None if name == "openvino" else object())


def test_a_missing_package_is_named_with_its_extra(without, run, tmp_path, capsys):
    assert not is_installed(find_target("openvino"))
    assert is_installed(find_target("onnx"))
    wanted = r"target openvino needs openvino, which is not installed: .*'smallfry\[openvino\]'"
    with pytest.raises(UsageError, match=wanted):
        require_installed(find_target("openvino"))
    with pytest.raises(UsageError, match=wanted):
        export(run, tmp_path / "a", target="openvino")
    with pytest.raises(UsageError, match=wanted):
        fit(FitConfig(max_kb=1, target="openvino"), tmp_path / "b")
    assert main(["export", str(run), "--target", "openvino", "--to", str(tmp_path / "a")]) == 2
    assert "smallfry[openvino]" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_unknown_targets_and_precisions_are_refused(run, tmp_path):
    with pytest.raises(UsageError, match="no device format 'openvin'; did you mean 'openvino'"):
        export(run, tmp_path / "a", target="openvin")
    with pytest.raises(UsageError, match="litert has the precisions float32, int8, not own_bits"):
        export(run, tmp_path / "a", precision="own_bits", target="litert")


def test_a_benchmark_has_all_formats_that_are_installed_or_those_given(without):
    assert _formats(BenchmarkConfig()) == ("executorch", "litert")
    assert _formats(BenchmarkConfig(targets=("litert", "onnx"))) == ("litert",)
    assert _formats(BenchmarkConfig(targets=())) == ()
    with pytest.raises(UsageError, match="target openvino needs openvino"):
        _formats(BenchmarkConfig(targets=("openvino",)))


def test_an_export_whose_engine_is_missing_names_the_package(anytime, tmp_path, monkeypatch):
    engine = engine_of("litert")

    def start(*_):
        raise ModuleNotFoundError("No module named 'ai_edge_litert'")

    monkeypatch.setattr(engine, "start", start)
    folder = as_engine(anytime, tmp_path / "a", "litert")
    with pytest.raises(ExportError, match=r"for LiteRT, which is not installed .*ai-edge-litert"):
        Runtime(folder)


def as_engine(folder, place, engine):
    """A copy of an export whose graphs have the names of another engine's."""
    manifest, contents = read_export(folder)
    (suffix,) = engine_of(engine).SUFFIXES
    place.mkdir()
    for name, content in contents.items():
        (place / name.replace(".onnx", suffix)).write_bytes(content)
    files = {name.replace(".onnx", suffix): digest for name, digest in manifest.files.items()}
    changed = replace(manifest, engine=engine, files=files)
    (place / MANIFEST).write_text(changed.to_json())
    return place


def test_an_engine_of_single_images_gives_what_one_of_batches_gives(
    anytime, tmp_path, monkeypatch, run
):
    from smallfry_runtime.engines import onnx

    class One:
        def __init__(self, contents, threads, providers):
            self.session = onnx.start(contents, threads, providers)

        def run(self, inputs):
            def one(each):
                assert {len(array) for array in each} == {1}
                return self.session.run(each)

            return one_by_one(one, inputs)

    monkeypatch.setattr(engine_of("executorch"), "start", One)
    folder = as_engine(anytime, tmp_path / "a", "executorch")
    pixels = np.random.default_rng(0).integers(0, 17, (9, 1, 8, 8), np.uint8)
    for threshold in (None, 0.5):
        ours = Runtime(folder, threads=1).predict(pixels, threshold=threshold, batch_size=4)
        theirs = Runtime(anytime, threads=1).predict(pixels, threshold=threshold, batch_size=4)
        np.testing.assert_allclose(ours.probabilities, theirs.probabilities, atol=1e-6)
        assert ours.steps.tolist() == theirs.steps.tolist()
    assert export_bytes(folder) == export_bytes(anytime) == Runtime(folder).file_bytes


def test_manifests_have_the_engine_and_refuse_an_unknown_one(anytime, tmp_path):
    manifest = Manifest.read(anytime)
    assert manifest.engine == "onnx"
    assert "engine" not in json.loads(manifest.to_json())
    place = as_engine(anytime, tmp_path / "a", "litert")
    content = json.loads((place / MANIFEST).read_text())
    assert (content["format"], content["engine"]) == (6, "litert")
    assert Manifest.read(place).graphs == ("embed.tflite", "step.tflite", "read_out.tflite")
    (place / MANIFEST).write_text(replace(manifest, engine="onn").to_json())
    with pytest.raises(ExportError, match="damaged"):
        Manifest.read(place)


def test_calibration_batches_are_the_arguments_of_each_graph(run, anytime):
    trained = load_run(run)
    images = np.random.default_rng(0).standard_normal((5, 1, 8, 8)).astype(np.float32)
    import torch

    modules = anytime_graphs(trained.model, torch.zeros(2, 1, 8, 8))
    contents = {name.removesuffix(".onnx"): c for name, c in read_export(anytime)[1].items()}
    source = Source(contents, modules, images, 3, {})
    found = {name: [*batches] for name, batches in calibration_batches(source).items()}
    assert [len(found[name]) for name in ("embed", "step", "read_out")] == [1, 3, 3]
    with torch.inference_mode():
        x, y, z = modules[0].module(torch.from_numpy(images))
        for arguments in found["step"]:
            for given, wanted in zip(arguments, (x, y, z), strict=True):
                torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-4)
            y, z = modules[1].module(x, y, z)
    with pytest.raises(ExportError, match="static int8 needs images"):
        calibration_batches(replace(source, images=images[:0]))
    assert [len(each) for each in one_image(modules[1])] == [1, 1, 1]
    whole = whole_graph(trained.model, torch.zeros(2, 1, 8, 8))
    assert one_image(whole)[0].shape == (1, 1, 8, 8)


def test_a_target_of_a_plugin_is_found_by_its_name(monkeypatch):
    targets()
    monkeypatch.setattr(target, "_targets", dict(target._targets))

    @register_target
    class Own:
        name = "own"

    assert isinstance(find_target("own"), Own)
