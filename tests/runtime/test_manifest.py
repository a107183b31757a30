"""Manifests of exports: what is written is read, and every wrong value is named."""

import hashlib
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smallfry_runtime.early_exit import Point
from smallfry_runtime.errors import ExportError
from smallfry_runtime.files import with_digest
from smallfry_runtime.manifest import (
    CLASS_FORMAT,
    FORMAT,
    MANIFEST,
    MOST_STEPS,
    PLAIN_FORMAT,
    Manifest,
    is_export,
    read_export,
    require_free,
)

GRAPH = b"a graph"
WHOLE = Manifest(
    form="whole",
    precision="float32",
    model={"name": "cct_micro", "parameters": 3},
    classes=("cat", "dog"),
    image_size=8,
    channels=1,
    mean=(0.5,),
    std=(0.25,),
    files={"model.onnx": hashlib.sha256(GRAPH).hexdigest()},
)
ANYTIME = replace(
    WHOLE,
    form="anytime",
    recursion_steps=3,
    exits=(Point(0.5, 0.75, 1.25), Point(1.01, 0.8, 3.0)),
    calibrated_on="validation",
    files={
        f"{part}.onnx": hashlib.sha256(part.encode()).hexdigest()
        for part in ("embed", "step", "read_out")
    },
)


def write(folder, manifest, **changes):
    """Write a manifest with changed values under a right digest."""
    content = json.loads(manifest.to_json())
    content.pop("digest", None)
    content = {key: value for key, value in content.items() if "digest" not in key} | changes
    (folder / MANIFEST).write_text(json.dumps(with_digest(content)))
    return folder


@pytest.mark.parametrize("manifest", [WHOLE, ANYTIME], ids=["whole", "anytime"])
def test_what_is_written_is_read(tmp_path, manifest):
    (tmp_path / MANIFEST).write_text(manifest.to_json())
    assert Manifest.read(tmp_path) == manifest
    assert is_export(tmp_path)
    assert json.loads(manifest.to_json())["format"] == PLAIN_FORMAT


@pytest.mark.parametrize("changes", [{"image_size": (6, 4)}, {"resize": "squash"}])
def test_what_older_versions_would_crop_has_a_format_that_they_refuse(tmp_path, changes):
    manifest = replace(WHOLE, **changes)
    (tmp_path / MANIFEST).write_text(manifest.to_json())
    assert Manifest.read(tmp_path) == manifest
    assert json.loads(manifest.to_json())["format"] == CLASS_FORMAT == 4


def test_height_comes_before_width():
    assert replace(WHOLE, image_size=(6, 4)).input_shape == (1, 6, 4)
    assert WHOLE.input_shape == (1, 8, 8)


@given(
    st.lists(st.text(), min_size=1, max_size=4).map(tuple),
    st.integers(1, 4096),
    st.sampled_from([1, 3]),
    st.floats(1e-6, 1e6),
    st.floats(-1e6, 1e6),
    st.dictionaries(st.text(), st.integers() | st.text(), max_size=2),
)
def test_any_right_values_come_back(tmp_path_factory, classes, side, channels, std, mean, origin):
    folder = tmp_path_factory.mktemp("export")
    manifest = replace(
        WHOLE,
        classes=classes,
        image_size=side,
        channels=channels,
        mean=(mean,) * channels,
        std=(std,) * channels,
        source=origin,
    )
    (folder / MANIFEST).write_text(manifest.to_json())
    assert Manifest.read(folder) == manifest


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"form": "half"}, "form 'half'"),
        ({"precision": "int3"}, "precision 'int3'"),
        ({"classes": []}, "classes"),
        ({"classes": ["cat", 3]}, "classes"),
        ({"classes": None}, "TypeError"),
        ({"files": {"model.onnx": 3}}, "classes"),
        ({"image_size": 0}, "image_size"),
        ({"image_size": 4097}, "image_size"),
        ({"image_size": 8.0}, "image_size"),
        ({"image_size": True}, "image_size"),
        ({"image_size": [8, 0]}, "image_size"),
        ({"image_size": [8, 8, 8]}, "image_size"),
        ({"image_size": "8"}, "image_size"),
        ({"resize": "stretch"}, "resize"),
        ({"channels": 0}, "channels"),
        ({"outputs": []}, "outputs"),
        ({"outputs": ["a b"]}, "outputs"),
        ({"outputs": ["a", "a"]}, "outputs"),
        ({"values": "int3"}, "values"),
        ({"mean": [0.5, 0.5]}, "mean and std"),
        ({"std": [0.0]}, "mean and std"),
        ({"std": [-1.0]}, "mean and std"),
        ({"std": ["a"]}, "mean and std"),
        ({"mean": [[0.5]]}, "mean and std"),
        ({"bit_depth": 17}, "bit_depth"),
        ({"bit_depth": "12"}, "bit_depth|TypeError"),
        ({"recursion_steps": 0}, "recursion_steps"),
        ({"recursion_steps": MOST_STEPS + 1}, "recursion_steps"),
        ({"exits": [{"threshold": 0.5, "accuracy": 1.0, "steps": 1.0}]}, "exits"),
        ({"exits": [{"threshold": 0.5}]}, "TypeError"),
        ({"exits": 3}, "TypeError"),
        ({"model": "cct"}, "model"),
        ({"model": {}}, "KeyError: 'name'"),
        ({"model": {"name": 3}}, "model"),
        ({"training": []}, "training"),
        ({"source": []}, "source"),
        ({"files": {}}, "no hash of model.onnx"),
    ],
)
def test_a_wrong_value_is_named_though_the_digest_is_right(tmp_path, changes, problem):
    write(tmp_path, WHOLE, **changes)
    with pytest.raises(ExportError, match=rf"damaged \({problem}.*export the run again"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"recursion_steps": None}, "an anytime form without recursion"),
        ({"files": {"embed.onnx": "0", "step.onnx": "0"}}, "no hash of read_out.onnx"),
        ({"exits": [{"threshold": "a", "accuracy": 1.0, "steps": 1.0}]}, "exits"),
    ],
)
def test_a_wrong_value_of_early_exit_is_named(tmp_path, changes, problem):
    write(tmp_path, ANYTIME, **changes)
    with pytest.raises(ExportError, match=rf"damaged \({problem}"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("key", ["classes", "model", "files", "mean"])
def test_a_missing_value_is_named(tmp_path, key):
    content = json.loads(WHOLE.to_json())
    content = {k: v for k, v in content.items() if "digest" not in k and k != key}
    (tmp_path / MANIFEST).write_text(json.dumps(with_digest(content)))
    with pytest.raises(ExportError, match=f"damaged .KeyError: '{key}'"):
        Manifest.read(tmp_path)


def test_a_changed_value_does_not_fit_the_digest(tmp_path):
    text = WHOLE.to_json().replace('"image_size": 8', '"image_size": 9')
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(ExportError, match="its digest is not that of its content"):
        Manifest.read(tmp_path)


def test_a_manifest_of_a_later_version_is_left_to_it(tmp_path):
    write(tmp_path, WHOLE, format=FORMAT + 1, smallfry="9.0")
    with pytest.raises(ExportError, match=rf"by smallfry 9.0 in format {FORMAT + 1}; this is"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("content", ["[]", "3", "{}", '{"format": 3}', '{"form": "whole"}'])
def test_json_of_another_kind_is_no_manifest(tmp_path, content):
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(ExportError, match="not the manifest of a smallfry export"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("content", ["", "{", '{"a": NaN', "\x00"])
def test_what_is_no_json_is_damaged(tmp_path, content):
    (tmp_path / MANIFEST).write_text(content)
    assert not is_export(tmp_path)
    with pytest.raises(ExportError, match="damaged"):
        Manifest.read(tmp_path)


def test_absent_folders_and_manifests_are_told_apart(tmp_path):
    with pytest.raises(ExportError, match=r"no such export folder; smallfry export RUN --to DIR"):
        Manifest.read(tmp_path / "nowhere")
    with pytest.raises(ExportError, match=r"not an export, manifest\.json is missing; smallfry"):
        Manifest.read(tmp_path)
    assert not is_export(tmp_path)


def graphs(folder, **contents):
    for name, content in contents.items():
        (folder / f"{name}.onnx").write_bytes(content)


def test_graphs_are_read_if_they_are_those_of_the_manifest(tmp_path):
    (tmp_path / MANIFEST).write_text(WHOLE.to_json())
    graphs(tmp_path, model=GRAPH)
    assert read_export(tmp_path) == (WHOLE, {"model.onnx": GRAPH})


def test_a_graph_that_is_missing_or_another_is_named(tmp_path):
    (tmp_path / MANIFEST).write_text(ANYTIME.to_json())
    graphs(tmp_path, embed=b"embed", step=b"step")
    with pytest.raises(ExportError, match=r"read_out.onnx: can't be read \(No such file"):
        read_export(tmp_path)
    graphs(tmp_path, read_out=b"another")
    with pytest.raises(ExportError, match=r"read_out\.onnx: truncated or damaged, its hash"):
        read_export(tmp_path)


def test_an_export_may_be_replaced_and_other_folders_may_not(tmp_path):
    require_free(tmp_path / "new")
    export = tmp_path / "export"
    export.mkdir()
    require_free(export)  # empty
    (export / MANIFEST).write_text(WHOLE.to_json())
    graphs(export, model=GRAPH)
    require_free(export)
    (export / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"notes\.txt too, which is no part of such an export"):
        require_free(export)
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="exists and is not a folder; use another folder"):
        require_free(tmp_path / "file")
    with pytest.raises(ExportError, match="exists and is not an export; use another folder"):
        require_free(tmp_path)
