import copy
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from smallfry.cli import main
from smallfry.deploy import Runtime
from smallfry.deploy.export import export
from smallfry.errors import DataError, ExportError, UsageError
from smallfry.models.early_exit import recurse_until
from smallfry.training.augment import Normalize
from smallfry.training.config import DataConfig, ModelConfig, TrainConfig
from smallfry.training.evaluation_data import load_like
from smallfry.training.run import load_run
from smallfry.training.train import train
from smallfry_runtime.files import with_digest
from smallfry_runtime.graphs import Graphs


@pytest.fixture(scope="module")
def pixels(run):
    return load_like(load_run(run), run, split="train")[1].images[:100].numpy()


@pytest.fixture(scope="module")
def runtime(anytime):
    return Runtime(anytime, threads=1)


def a_picture(mode="RGB", size=(20, 14)) -> bytes:
    stream = BytesIO()
    random = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(random).convert(mode if mode != "I;16" else "L")
    if mode == "I;16":
        image = Image.fromarray(40_000 + np.asarray(image).astype(np.uint16) * 100)
    image.save(stream, "TIFF")
    return stream.getvalue()


def test_it_runs_where_pytorch_is_not(anytime, tmp_path):
    (tmp_path / "picture.tif").write_bytes(a_picture())
    code = f"""
import sys
for name in ("torch", "timm", "lightning", "torchvision"):
    sys.modules[name] = None  # an import of it fails
from smallfry.deploy import Runtime
from smallfry.cli import main
runtime = Runtime({str(anytime)!r})
print(runtime.predict([open({str(tmp_path / "picture.tif")!r}, "rb").read()], budget=2).steps)
sys.exit(main(["predict", {str(anytime)!r}, {str(tmp_path)!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "picture.tif: " in done.stdout


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
def test_preprocessing_is_that_of_training_to_the_bit(runtime, seed):
    random = np.random.default_rng(seed)
    mean, std = random.uniform(0, 1), random.uniform(0.01, 1)
    pixels = random.integers(0, 256, (2, 1, 8, 8), np.uint8)
    other = object.__new__(Runtime)
    other._scale = np.array([1 / (255 * std)], np.float32).reshape(-1, 1, 1)
    other._shift = np.array([-mean / std], np.float32).reshape(-1, 1, 1)
    theirs = Normalize([mean], [std])(torch.from_numpy(pixels)).numpy()
    assert other.preprocess(pixels).tobytes() == theirs.tobytes()


def test_its_own_preprocessing_is_that_of_its_run(run, runtime, pixels):
    theirs = load_run(run).normalize(torch.from_numpy(pixels)).numpy()
    assert runtime.preprocess(pixels).tobytes() == theirs.tobytes()


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 2.0])
@pytest.mark.parametrize("batch_size", [3, 64])
def test_early_exit_is_pytorchs_image_by_image(run, runtime, pixels, threshold, batch_size):
    trained = load_run(run)
    wanted = recurse_until(trained.model, trained.normalize(torch.from_numpy(pixels)), threshold)
    said = runtime.predict(pixels, threshold=threshold, batch_size=batch_size)
    np.testing.assert_array_equal(said.steps, wanted.steps.numpy())
    np.testing.assert_allclose(said.probabilities, wanted.logits.softmax(1).numpy(), atol=1e-4)


def test_what_is_left_is_packed_into_full_batches(runtime, pixels, monkeypatch):
    sizes, call = [], Graphs.call

    def counted(self, graph, inputs):
        if graph == "step":
            sizes.append(len(inputs[0]))
        return call(self, graph, inputs)

    monkeypatch.setattr(Graphs, "call", counted)
    halting = runtime.predict(pixels, threshold=0.0).halting
    sizes.clear()
    steps = runtime.predict(pixels, threshold=float(np.median(halting)), batch_size=25).steps
    left = int((steps > 1).sum())
    assert 25 < left < 75
    assert sizes[:4] == [25] * 4
    assert sizes[4:6] == [25, min(25, left - 25)]


def test_a_budget_is_kept_on_the_images_it_was_calibrated_on(run, runtime):
    validation = load_like(load_run(run), run, split="validation")[1]
    images = validation.images.numpy()
    for budget in (1, 1.7, 3):
        assert runtime.predict(images, budget=budget).steps.mean() <= budget + 1e-6
    whole = (runtime.predict(images).probabilities.argmax(1) == validation.labels.numpy()).mean()
    said = runtime.predict(images, drop=0.05)
    assert (said.probabilities.argmax(1) == validation.labels.numpy()).mean() >= whole - 0.05 - 1e-6


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_an_image_of_any_mode_and_size_is_answered(runtime, mode):
    for size in ((1, 1), (3, 50), (64, 64)):
        shares = runtime.predict([a_picture(mode, size)]).probabilities
        np.testing.assert_allclose(shares.sum(), 1, rtol=1e-5)


@pytest.mark.parametrize("form", ["anytime", "whole", "int8", "plain"])
@pytest.mark.parametrize("nothing", [[], (), np.zeros((0, 1, 8, 8), np.uint8)], ids=str)
def test_no_images_give_no_answers(form, nothing, request):
    said = Runtime(request.getfixturevalue(form), threads=1).predict(nothing)
    assert said.probabilities.shape == (0, 10)
    if form == "plain":
        assert said.halting is said.steps is None
    else:
        assert said.halting.shape == said.steps.shape == (0,)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """An export of a model that does not recur."""
    folder = tmp_path_factory.mktemp("plain")
    train(
        TrainConfig(
            data=DataConfig(limit=100),
            model=ModelConfig("resnet10t"),
            epochs=1,
            references=False,
            run=folder / "run",
            progress="quiet",
        )
    )
    return export(folder / "run", folder / "export")


def test_images_are_paths_text_bytes_or_pillows_own(runtime, tmp_path):
    file = tmp_path / "x.tif"
    file.write_bytes(a_picture())
    with Image.open(file) as opened:
        said = runtime.predict([file, str(file), file.read_bytes(), opened]).probabilities
        assert opened.size == (20, 14)  # it stays as it is
    assert (said == said[0]).all()
    wide = Image.fromarray(np.full((8, 8), 40_000, np.uint16))
    assert runtime.predict([wide]).probabilities.shape == (1, 10)


@pytest.mark.parametrize(
    "one",
    [b"x", "x.png", Path("x.png"), Image.new("L", (8, 8))],
    ids=["bytes", "text", "path", "image"],
)
def test_a_single_image_is_no_list(runtime, one):
    with pytest.raises(DataError, match="put it in a list"):
        runtime.predict(one)


def test_what_is_no_image_is_named_by_its_place_or_path(runtime, tmp_path):
    with pytest.raises(DataError, match=r"nothing\.png: can't be read"):
        runtime.predict([str(tmp_path / "nothing.png")])
    with pytest.raises(DataError, match=r"image 1: expected a path, .* got ndarray; .* one array"):
        runtime.predict([a_picture(), np.zeros((1, 8, 8), np.uint8)])
    with pytest.raises(DataError, match=r"image 0: expected a path, .* got NoneType"):
        runtime.predict([None])
    closed = Image.open(BytesIO(a_picture()))
    closed.close()
    with pytest.raises(DataError, match="image 0: the image is damaged"):
        runtime.predict([closed])
    with pytest.raises(DataError, match="image 0: 100,000,000 pixels are too many"):
        runtime.predict([Image.new("1", (10_000, 10_000))])


@pytest.mark.parametrize("form", ["anytime", "whole"])
def test_a_copy_in_another_process_answers_the_same(form, request, pixels, monkeypatch, tmp_path):
    folder = request.getfixturevalue(form)
    monkeypatch.chdir(folder.parent)
    runtime = Runtime(folder.name, threads=1)
    content = pickle.dumps(runtime)
    assert len(content) < 1000  # the folder, not the graphs
    monkeypatch.chdir(tmp_path)
    for copied in (pickle.loads(content), copy.deepcopy(runtime)):
        again, before = copied.predict(pixels[:5]), runtime.predict(pixels[:5])
        assert again.probabilities.tobytes() == before.probabilities.tobytes()
    code = "import pickle, sys; r = pickle.loads(sys.stdin.buffer.read()); print(r.classes)"
    done = subprocess.run([sys.executable, "-c", code], input=content, capture_output=True)
    assert done.stdout.decode().strip() == str(runtime.classes), done.stderr


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", ["anytime", "whole", "plain"])
def test_scores_that_are_no_numbers_are_no_answer(form, value, request, tmp_path, capsys):
    folder = request.getfixturevalue(form)
    copied = tmp_path / "spoilt"
    shutil.copytree(folder, copied)
    name = "read_out.onnx" if form == "anytime" else "model.onnx"
    graph = onnx.load(copied / name)
    for tensor in graph.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.name.endswith(
            ("head.weight", "fc.weight")
        ):
            wrong = np.full(tuple(tensor.dims), value, np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(wrong, tensor.name))
    (copied / name).write_bytes(graph.SerializeToString())
    content = json.loads((copied / "manifest.json").read_text())
    content["files"][name] = hashlib.sha256((copied / name).read_bytes()).hexdigest()
    (copied / "manifest.json").write_text(json.dumps(with_digest(content)))
    runtime = Runtime(copied, threads=1)
    shape = (3, runtime.manifest.channels, *[runtime.manifest.image_size] * 2)
    for options in ({}, {"threshold": 0.5}) if form == "anytime" else ({},):
        with pytest.raises(ExportError, match="answer is not a number"):
            runtime.predict(np.ones(shape, np.uint8), **options)
    (tmp_path / "x.tif").write_bytes(a_picture())
    assert main(["predict", str(copied), str(tmp_path / "x.tif")]) == 1
    assert "answer is not a number" in capsys.readouterr().err


def test_wrong_images_and_wishes_are_told(runtime, whole):
    with pytest.raises(DataError, match="image 0: not an image"):
        runtime.predict([b"no picture"])
    with pytest.raises(DataError, match=r"\(images, 1, 8, 8\), got float64"):
        runtime.predict(np.zeros((1, 1, 8, 8)))
    with pytest.raises(UsageError, match="give one"):
        runtime.predict([], budget=2, threshold=0.5)
    with pytest.raises(UsageError, match="exit_steps must be at least 1"):
        runtime.predict([], budget=0.5)
    with pytest.raises(UsageError, match="--form anytime"):
        Runtime(whole).predict([], budget=2)


@pytest.mark.parametrize(
    ("form", "change"),
    [
        ("anytime", "classes"),
        ("anytime", "image_size"),
        ("whole", "classes"),
        ("whole", "image_size"),
        ("whole", "recursion_steps"),
    ],
)
def test_a_graph_that_is_not_what_the_manifest_says_is_told(request, tmp_path, form, change):
    export = request.getfixturevalue(form)
    found = getattr(Runtime(export).manifest, change)
    other = [*found, "another"] if change == "classes" else found + 1
    runtime = Runtime(damaged(export, tmp_path, **{change: other}), threads=1)
    size = runtime.manifest.image_size
    with pytest.raises(ExportError, match="contradicts the export's manifest"):
        runtime.predict(np.zeros((3, runtime.manifest.channels, size, size), np.uint8))


def damaged(export, tmp_path, **changes):
    copy = tmp_path / "damaged"
    shutil.copytree(export, copy)
    content = json.loads((copy / "manifest.json").read_text()) | changes
    (copy / "manifest.json").write_text(json.dumps(with_digest(content)))
    return copy


def test_an_export_of_another_version_is_refused(anytime, tmp_path, capsys):
    copy = damaged(anytime, tmp_path, format=9, smallfry="9.9")
    with pytest.raises(ExportError, match=r"smallfry 9\.9 in format 9; this is"):
        Runtime(copy)
    assert main(["predict", str(copy), "x.png"]) == 1
    assert "smallfry 9.9 in format 9" in capsys.readouterr().err


@pytest.mark.parametrize("form", [1, 2])
def test_an_export_of_an_earlier_format_is_read(anytime, tmp_path, pixels, form):
    copied = damaged(anytime, tmp_path, format=form)
    content = json.loads((copied / "manifest.json").read_text())
    del content["bit_depth"], content["digest"]
    (copied / "manifest.json").write_text(
        json.dumps(content if form == 1 else with_digest(content))
    )
    old = Runtime(copied, threads=1)
    assert old.manifest.bit_depth is None
    new = Runtime(anytime, threads=1).predict(pixels[:3]).probabilities
    assert old.predict(pixels[:3]).probabilities.tobytes() == new.tobytes()


@pytest.mark.parametrize("name", ["embed.onnx", "step.onnx", "read_out.onnx"])
def test_a_truncated_file_is_refused(anytime, tmp_path, name):
    copy = damaged(anytime, tmp_path)
    os.truncate(copy / name, (copy / name).stat().st_size - 1)
    with pytest.raises(ExportError, match=f"{name}: truncated or damaged"):
        Runtime(copy)
    (copy / name).unlink()
    with pytest.raises(ExportError, match=f"{name}: can't be read"):
        Runtime(copy)


@pytest.mark.parametrize(
    "changes",
    [
        {"form": "pieces"},
        {"form": []},
        {"precision": "int3"},
        {"classes": []},
        {"classes": [1]},
        {"classes": 3},
        {"image_size": 10**9},
        {"image_size": "8"},
        {"channels": 2},
        {"mean": [0.5, 0.5]},
        {"std": [0.0]},
        {"std": [float("nan")]},
        {"std": ["a"]},
        {"bit_depth": 0},
        {"bit_depth": 17},
        {"bit_depth": "12"},
        {"bit_depth": True},
        {"recursion_steps": None},
        {"recursion_steps": -1},
        {"exits": [{"threshold": 1}]},
        {"exits": [{"threshold": "a", "accuracy": 1, "steps": 1}]},
        {"files": {}},
        {"files": {"embed.onnx": 1, "step.onnx": "", "read_out.onnx": ""}},
        {"files": None},
        {"model": {}},
        {"training": 5},
    ],
    ids=str,
)
def test_a_manifest_with_wrong_values_is_refused(anytime, tmp_path, changes):
    with pytest.raises(ExportError, match=r"damaged|truncated"):
        Runtime(damaged(anytime, tmp_path, **changes))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"format": 1}', "[" * 100_000])
def test_a_manifest_that_is_none_is_refused(anytime, tmp_path, text):
    copy = damaged(anytime, tmp_path)
    (copy / "manifest.json").write_text(text)
    with pytest.raises(ExportError, match=r"damaged|not the manifest"):
        Runtime(copy)


def test_a_folder_that_is_no_export_is_told(tmp_path):
    with pytest.raises(ExportError, match=r"manifest\.json is missing"):
        Runtime(tmp_path)
    with pytest.raises(ExportError, match="no such export folder"):
        Runtime(tmp_path / "nothing")


def test_a_folder_without_images_is_told(anytime, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["predict", str(anytime), str(tmp_path / "empty")]) == 1
    assert "there are no images in this folder" in capsys.readouterr().err
