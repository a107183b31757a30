"""Rectangular images, from a folder to the runtime on a device."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from rectangles import write_photographs

import smallfry
from smallfry.cli import main
from smallfry.data import load_data
from smallfry.deploy.benchmark import _noise, _subject
from smallfry.deploy.contestants import Input, peers
from smallfry.deploy.memory import _with_onnx_runtime
from smallfry.deploy.pretrained import from_pretrained, save_pretrained
from smallfry.errors import RunError, UsageError
from smallfry.training.config import read_config
from smallfry_runtime.frames import RESIZES, Frame
from smallfry_runtime.images import decode
from smallfry_runtime.manifest import CLASS_FORMAT, Manifest
from smallfry_runtime.runtime import Runtime

TINY = "{embed_dim: 16, num_heads: 2, mlp_hidden_dim: 16, depth: 1, latent_steps: 1, patch_size: 2}"
GIVEN = (
    *("--model.name=vitrm_micro_patch4_8", f"--model.options={TINY}", "--references=false"),
    *("--progress=quiet", "--epochs=1", "--batch_size=8", "--threads=1"),
)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    return write_photographs(tmp_path_factory.mktemp("photographs") / "halves")


@pytest.fixture(scope="module")
def run(photographs, tmp_path_factory) -> Path:
    """A run of images of 8 × 12 pixels between borders."""
    folder = tmp_path_factory.mktemp("runs") / "wide"
    size = ("--data.image_size", "8", "12", "--data.resize", "letterbox")
    assert main(["train", "--data", str(photographs), *size, *GIVEN, "--run", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def export(run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "wide"
    return smallfry.export(run, folder)


def files_of(photographs):
    return sorted(photographs.rglob("*.png"))


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("size", [(8, 12), (12, 8), 8])
def test_training_and_the_runtime_see_the_same_pixels(photographs, size, resize):
    data = load_data(str(photographs), image_size=size, resize=resize, validation=0.3, test=0.2)
    assert data.input_shape == ((1, *size) if isinstance(size, tuple) else (1, 8, 8))
    for name, split in {
        "train": data.train,
        "validation": data.validation,
        "test": data.test,
    }.items():
        for position in range(len(split)):
            file = Path(data.locate(name, position))
            seen = split.images[position].numpy()
            assert np.array_equal(decode(file, "", data.frame, 1), seen), file


def test_streamed_images_are_the_same(photographs, tmp_path):
    table = {"image": [{"bytes": f.read_bytes(), "path": None} for f in files_of(photographs)]}
    table["label"] = [file.parent.name for file in files_of(photographs)]
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "train-0.parquet")
    given = {"image_size": (6, 10), "resize": "squash", "validation": 0.0, "test": 0.0}
    kept, streamed = (load_data(str(tmp_path), stream=s, **given) for s in (False, True))
    assert torch.equal(kept.train.images, streamed.train.pixels[streamed.train.rows])
    assert streamed.train.pixels.shape[1:] == (1, 6, 10)


def test_a_run_remembers_size_and_way(run):
    assert read_config(run / "config.yaml").data.image_size == [8, 12]
    sample = json.loads((run / "best/manifest.json").read_text())["input"]
    assert (sample["size"], sample["resize"]) == ([8, 12], "letterbox")
    trained = smallfry.load(run)
    assert trained.input_shape == (1, 8, 12)
    assert trained.frame == Frame(8, 12, "letterbox")
    assert trained.spec.arguments["img_size"] == [8, 12]


@pytest.mark.slow
def test_the_export_answers_as_the_run_does(run, export, photographs):
    runtime = Runtime(export)
    assert runtime.manifest.frame == Frame(8, 12, "letterbox")
    assert json.loads((export / "manifest.json").read_text())["format"] == CLASS_FORMAT
    files = files_of(photographs)
    trained = smallfry.load(run)
    pixels = np.stack([decode(file, "", trained.frame, 1) for file in files])
    assert runtime._decoded(files).tobytes() == pixels.tobytes()
    theirs = trained.normalize(torch.from_numpy(pixels)).numpy()
    assert runtime.preprocess(pixels).tobytes() == theirs.tobytes()
    answers = trained.predict(files, top_k=2)
    for ours, row in zip(answers, runtime.predict(files).probabilities, strict=True):
        assert dict(ours.top) == pytest.approx(
            dict(zip(runtime.classes, row, strict=True)), abs=1e-4
        )
    square = pixels[..., :8]
    with pytest.raises(smallfry.errors.DataError, match=r"shape \(images, 1, 8, 12\)"):
        runtime.predict(square)


@pytest.mark.slow
def test_onnx_files_describe_their_images(export):
    entries = {e.key: json.loads(e.value) for e in onnx.load(export / "model.onnx").metadata_props}
    assert (entries["height"], entries["width"], entries["channels"]) == (8, 12, 1)
    assert entries["resize"] == "letterbox"
    assert entries["classes"] == ["left", "right"]
    manifest = Manifest.read(export)
    assert (tuple(entries["mean"]), tuple(entries["std"])) == (manifest.mean, manifest.std)


@pytest.mark.slow
def test_the_commands_take_such_models(run, export, photographs, capsys):
    assert main(["predict", str(run), str(photographs / "left")]) == 0
    first = capsys.readouterr().out
    assert main(["predict", str(export), str(photographs / "left")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(first.splitlines())
    assert main(["evaluate", str(run), "--data", str(photographs), "--split=train"]) == 0
    assert "accuracy" in capsys.readouterr().out


@pytest.mark.slow
def test_the_benchmark_has_images_of_their_shape(run, export):
    assert _noise(smallfry.load(run)).shape[1:] == (1, 8, 12)
    subject = _subject(str(export), "best").trained
    assert subject.frame == Frame(8, 12, "letterbox")
    load, inputs = _with_onnx_runtime(export, 1)
    assert inputs == (Frame(8, 12, "letterbox"), 1)
    load()(np.zeros((2, 1, 8, 12), np.uint8))


@pytest.mark.slow
def test_other_models_of_the_benchmark_take_that_shape(tmp_path):
    wanted = Input(("a", "b"), (32, 48), 3, (0.5,) * 3, (0.5,) * 3, "squash")
    found = next(peers(wanted, tmp_path, ("float32",), 1))
    assert Manifest.read(next(tmp_path.glob("*-float32"))).frame == Frame(32, 48, "squash")
    assert found.model


def test_the_demo_shows_the_patches_in_rows_and_columns(run, photographs):
    from smallfry.demo.routes import Shown, answer
    from smallfry.demo.trace import think

    trained = smallfry.load(run)
    file = photographs / "left/1.png"
    attention = think(trained, decode(file, "", trained.frame, 1), runs=1).moments[-1].attention
    assert attention.patches.shape == (4, 6)
    found = answer([Shown("run", trained)], file.read_bytes(), "1.png")
    assert "8 × 12 pixels" in found["panels"][0]["views"][-1]


def test_a_shared_folder_keeps_size_and_way(run, photographs, tmp_path):
    folder = save_pretrained(run, tmp_path / "shared")
    config = json.loads((folder / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [1, 8, 12]
    assert config["pretrained_cfg"]["crop_mode"] == "border"
    assert "8×12 pixels" in (folder / "README.md").read_text()
    ours, theirs = smallfry.load(run), from_pretrained(folder)
    assert theirs.frame == ours.frame
    files = files_of(photographs)[:3]
    assert theirs.predict(files) == ours.predict(files)


def test_a_shared_folder_of_another_way_is_too_new_for_versions_without_it(run, tmp_path):
    config = json.loads((save_pretrained(run, tmp_path / "a") / "config.json").read_text())
    assert config["smallfry"]["format"] == 3
    file = tmp_path / "a/config.json"
    config["smallfry"]["resize"] = "stretch"
    file.write_text(json.dumps(config))
    with pytest.raises(RunError, match="resize is 'stretch'"):
        from_pretrained(tmp_path / "a")


def test_fine_tuning_takes_the_size_or_resamples_the_positions(run, photographs, tmp_path):
    same, other = tmp_path / "same", tmp_path / "other"
    common = ["train", "--data", str(photographs), "--model.start", str(run), *GIVEN[2:]]
    assert main([*common, "--run", str(same)]) == 0
    assert smallfry.load(same).frame == Frame(8, 12, "letterbox")
    changed = ("--data.image_size", "4", "6", "--data.resize=squash", "--run", str(other))
    assert main([*common, *changed]) == 0
    trained = smallfry.load(other)
    assert trained.frame == Frame(4, 6, "squash")
    assert trained.model.pos_embed.shape[1] == trained.model.z_init.shape[1] == 6


def test_the_first_batch_is_drawn(photographs, tmp_path):
    size = ("--data.image_size", "8", "12")
    file = tmp_path / "batch.png"
    assert main(["train", "--data", str(photographs), *size, *GIVEN, f"--show_batch={file}"]) == 0
    assert file.stat().st_size > 5000


@pytest.mark.parametrize(
    ("size", "model", "message"),
    [
        (("9", "12"), "vitrm_micro_patch4_8", "patch_size 4 does not divide img_size 9×12"),
        (("0", "12"), "auto", "data.image_size must be at least 1, got 0×12"),
        (("8", "-12"), "auto", "data.image_size must be at least 1, got 8×-12"),
        (("8", "12", "3"), "auto", "data.image_size must be a side in pixels, or height and width"),
        (("8", "4097"), "auto", "data.image_size must be at most 4096, got 8×4097"),
        (("8", "12"), "trm_sudoku9_attention", "a TRM takes square grids"),
        (("9.5", "12"), "auto", "data.image_size: expected int or list"),
    ],
)
def test_sizes_that_can_not_be_are_refused(photographs, capsys, size, model, message):
    data = ("--data", str(photographs), "--data.image_size", *size, "--data.channels=1")
    assert main(["train", *data, "--model.name", model, "--progress=quiet"]) == 2
    assert message in capsys.readouterr().err


def test_sides_of_squares_are_no_schedule_of_rectangles(photographs, capsys):
    data = ("--data", str(photographs), "--data.image_size", "32", "48", "--model.name=resnet18")
    assert main(["train", *data, "--augment.sizes", "16", "32", "--progress=quiet"]) == 2
    assert (
        "augment.sizes are sides of squares, and these images are 32×48" in capsys.readouterr().err
    )


def test_a_generated_puzzle_has_no_other_shape():
    for wrong in ({"image_size": (4, 9)}, {"resize": "squash"}):
        with pytest.raises(UsageError, match="has no data"):
            load_data("sudoku4", options={"puzzles": 10}, **wrong)
