"""A model of 12-bit images: every way to ask it takes them for 12 bits."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from smallfry.cli import main
from smallfry.deploy import Runtime
from smallfry.deploy.export import export
from smallfry.deploy.pretrained import from_pretrained, load_trained, save_pretrained
from smallfry.errors import DataError, RunError, SmallfryWarning
from smallfry.training.config import DataConfig, ModelConfig, TrainConfig
from smallfry.training.evaluation_data import load_like
from smallfry.training.inference import classify
from smallfry.training.train import train
from smallfry_runtime.files import with_digest
from smallfry_runtime.images import decode
from smallfry_runtime.inputs import InputImage
from smallfry_runtime.manifest import Manifest

TINY = {"embed_dim": 16, "num_heads": 2, "mlp_hidden_dim": 16, "depth": 1, "latent_steps": 1}


def write(folder, tops, count=20):
    random = np.random.default_rng(0)
    for name, top in tops.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            values = random.integers(top // 2, top, (8, 8)).astype(np.uint16)
            Image.fromarray(values).save(folder / name / f"{i:02}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    write(folder / "photos", {"dark": 1500, "light": 4096})
    with pytest.warns(SmallfryWarning, match="12 bits are assumed"):
        train(
            TrainConfig(
                data=DataConfig(str(folder / "photos")),
                model=ModelConfig(options=TINY),
                epochs=2,
                references=False,
                run=folder / "run",
                progress="quiet",
            )
        )
    export(folder / "run", folder / "export")  # a warning is a failure: the run knows
    save_pretrained(folder / "run", folder / "shared")
    return folder


def test_the_depth_is_in_the_manifests_of_run_export_and_shared_folder(place):
    manifest = json.loads((place / "run" / "best" / "manifest.json").read_text())
    assert manifest["input"]["bit_depth"] == 12
    assert Manifest.read(place / "export").bit_depth == 12
    assert json.loads((place / "export" / "manifest.json").read_text())["format"] == 3
    assert json.loads((place / "shared" / "config.json").read_text())["smallfry"]["bit_depth"] == 12
    for name in ("run", "shared"):
        assert load_trained(place / name).bit_depth == 12


def test_run_shared_folder_and_export_answer_alike(place):
    file = place / "photos" / "light" / "00.png"
    trained = load_trained(place / "run")
    batch = trained.normalize(torch.tensor(decode(file, "x", 8, 1, 12)[None]))
    with torch.inference_mode():
        wanted = trained.model(batch).softmax(1)[0].tolist()
    runtime = Runtime(place / "export", threads=1)
    assert runtime.predict([file]).probabilities[0].tolist() == pytest.approx(wanted, abs=1e-4)
    with Image.open(file) as image:
        assert runtime.predict([image]).probabilities[0].tolist() == pytest.approx(wanted, abs=1e-4)
    found = InputImage(str(file), file)
    for said in (
        *runtime.classify([found]),
        *classify(trained, [found]),
        *classify(from_pretrained(place / "shared"), [found]),
    ):
        assert [share for _, share in sorted(said.top)] == pytest.approx(wanted, abs=1e-4)


def test_evaluation_on_other_images_takes_the_scale_of_the_training(place, capsys):
    write(place / "others", {"dark": 300, "light": 900}, 3)  # 10 bits, if one looked at them alone
    trained = load_trained(place / "run")
    data, split, _ = load_like(trained, place / "run", str(place / "others"))
    assert data.bit_depth == 12
    assert split.images.max() <= 900 * 255 // 4095
    command = ["evaluate", str(place / "run"), "--data", str(place / "others"), "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 6


def test_an_image_of_more_bits_is_refused_and_named(place, tmp_path, capsys):
    Image.fromarray(np.full((8, 8), 9000, np.uint16)).save(tmp_path / "bright.png")
    with pytest.raises(DataError, match=r"bright\.png: holds the value 9,000"):
        Runtime(place / "export").predict([tmp_path / "bright.png"])
    for model in ("run", "export", "shared"):
        assert main(["predict", str(place / model), str(tmp_path / "bright.png")]) == 1
        assert "bright.png: holds the value 9,000" in capsys.readouterr().err


def test_a_run_without_a_depth_is_read_and_a_wrong_one_refused(place, tmp_path):
    import shutil

    for value, message in ((None, ""), (99, "bit_depth"), ("12", "bit_depth")):
        run = tmp_path / str(value)
        shutil.copytree(place / "run", run)
        file = run / "best" / "manifest.json"
        content = json.loads(file.read_text())
        if value is None:
            del content["input"]["bit_depth"]
        else:
            content["input"]["bit_depth"] = value
        file.write_text(
            json.dumps(with_digest({k: v for k, v in content.items() if k != "digest"}))
        )
        if value is None:
            assert load_trained(run).bit_depth is None
        else:
            with pytest.raises(RunError, match=message):
                load_trained(run)
