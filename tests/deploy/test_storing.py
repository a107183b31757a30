"""Packed exports: the same graphs to the bit in fewer bytes, in each precision."""

import shutil

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from smallfry.cli import main
from smallfry.deploy import Runtime
from smallfry.deploy.export import export, export_bytes
from smallfry.deploy.storing import packed_graphs, shared_graphs
from smallfry.errors import ExportError
from smallfry_runtime.manifest import MANIFEST, Manifest, read_export, restored_graphs
from smallfry_runtime.packed import unpack
from smallfry_runtime.shared import restore
from smallfry_runtime.storage import base_of


def graph(**tensors):
    """An ONNX graph that only stores tensors."""
    stored = [numpy_helper.from_array(each, name) for name, each in tensors.items()]
    made = onnx.helper.make_graph([], "g", [], [], stored)
    return onnx.helper.make_model(made).SerializeToString()


@pytest.mark.slow
def test_a_packed_export_answers_as_a_plain_one(run, int8, tmp_path, capsys):
    arguments = ["export", str(run), "--to", str(tmp_path / "a"), "--form", "whole"]
    assert main([*arguments, "--precision", "int8", "--pack"]) == 0
    folder = tmp_path / "a"
    names = {"model.onnx.packed", MANIFEST, "quantization.json", "quantization.png"}
    assert {file.name for file in folder.iterdir()} == names
    manifest, contents = read_export(folder)
    assert manifest.storage == "packed"
    (content,) = restored_graphs(manifest, contents, folder).values()
    onnx.checker.check_model(content)
    size = (folder / "model.onnx.packed").stat().st_size
    assert Runtime(folder).file_bytes == export_bytes(folder) == size < export_bytes(int8) / 2
    pixels = np.random.default_rng(0).integers(0, 17, (5, 1, 8, 8), np.uint8)
    given, wanted = (Runtime(at).predict(pixels).probabilities for at in (folder, int8))
    assert np.array_equal(given, wanted)
    assert f"({size / 1e6:,.2f} MB)" in capsys.readouterr().out
    assert main([*arguments, "--precision", "int8", "--pack"]) == 0  # it replaces its own


def test_a_damaged_packed_file_is_refused(run, tmp_path):
    folder = export(run, tmp_path / "a", form="whole", pack=True)
    file = folder / "model.onnx.packed"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ExportError, match=r"model.onnx.packed: truncated or damaged"):
        Runtime(folder)
    file.unlink()
    with pytest.raises(ExportError, match=r"model.onnx.packed: can't be read"):
        Runtime(folder)


def test_a_manifest_of_an_unknown_storage_is_refused(run, whole, tmp_path):
    from dataclasses import replace

    shutil.copytree(whole, tmp_path / "a")
    manifest = replace(Manifest.read(whole), storage="zipped")
    with pytest.raises(KeyError):
        _ = manifest.graphs
    (tmp_path / "a" / MANIFEST).write_text(manifest.to_json())
    with pytest.raises(ExportError, match="storage 'zipped'"):
        Runtime(tmp_path / "a")


def test_codes_are_coded_by_their_distribution():
    random = np.random.default_rng(0)
    codes = random.normal(0, 6, (64, 64)).round().clip(-127, 127).astype(np.int8)
    content = graph(codes=codes, again=codes, few=codes[:1, :8])
    (name, packed), *_ = packed_graphs({"model.onnx": content}).items()
    assert name == "model.onnx.packed"
    assert unpack(packed) == content
    entropy = np.log2(6 * np.sqrt(2 * np.pi * np.e)) / 8  # bytes a code
    assert len(packed) < 1.1 * entropy * 2 * codes.size + 400
    assert unpack(packed_graphs({"model.xml": content})["model.xml.packed"]) == content


def test_parts_of_the_full_models_weights_are_left_out():
    random = np.random.default_rng(0)
    full = random.standard_normal((12, 40)).astype(np.float32)
    qkv = np.concatenate(
        [full[4 * i : 4 * i + 2] for i in range(3)]
    )  # of each third the first half
    other = random.standard_normal((6, 20)).astype(np.float32)
    base = {"model.onnx": graph(w=full, v=full, u=full, t=full)}
    small = {"model.onnx": graph(w=full[:7, :20], v=qkv, u=other, s=full[:7])}
    (shared,) = shared_graphs(small, base).values()
    assert restore(shared, base["model.onnx"]) == small["model.onnx"]
    kept = other.nbytes + full[:7].nbytes
    assert kept * 0.85 < len(shared) < kept + 500
    same = shared_graphs(base, base)["model.onnx.shared"]
    assert len(same) < 500


def test_other_formats_and_other_types_are_kept_whole():
    codes = np.arange(1000, dtype=np.int8).reshape(10, 100)
    content = graph(w=codes)
    (shared,) = shared_graphs({"model.onnx": content}, {"model.onnx": content}).values()
    assert restore(shared, content) == content
    other = b"<net>" * 100
    (shared,) = shared_graphs({"model.xml": other}, {"model.xml": other}).values()
    assert restore(shared, other) == other


def test_the_base_of_a_sub_model_is_the_export_around_it(tmp_path):
    assert base_of(tmp_path / "a" / "submodels" / "3") == tmp_path / "a"
