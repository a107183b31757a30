"""The task: labels, scores, and a run."""

import json

import numpy as np
import pytest
import torch

import smallfry
from smallfry.cli import main
from smallfry.data import load_data
from smallfry.errors import UsageError
from smallfry.io.plugins import load_kit
from smallfry.kits.splats.generate import generate
from smallfry.kits.splats.labels import Labels
from smallfry.kits.splats.scene import column_names, write_scene
from smallfry.kits.splats.task import Splats
from smallfry.tasks import create_task

load_kit("splats")
OPTIONS = {"gaussians": 60, "pixels": 16, "views": 3}


def test_a_scene_is_data_of_which_the_kept_are_learnt():
    data = load_data("splats-torus", options=OPTIONS)
    assert data.classes == column_names(3)
    assert (len(data.train), len(data.validation), len(data.test)) == (36, 60, 60)
    known, scene = Labels(data.test.labels), generate("torus", 60)
    assert np.array_equal(known.scene().positions, scene.positions)
    assert known.importance[known.kept].mean().item() == pytest.approx(1)
    assert (known.importance[~known.kept] == 0).all()
    assert Labels(data.train.labels).kept.all()
    assert torch.equal(data.test.images.flatten(1), known.codes)


def test_the_truth_has_no_loss_but_that_of_pruning():
    data, task = load_data("splats-torus", options=OPTIONS), Splats()
    known = Labels(data.test.labels)
    scores = task.metrics(known.attributes, data.test.labels)
    assert scores["loss"] == 0
    assert scores["accuracy"] == 1
    worse = task.metrics(known.attributes + known.deviations, data.test.labels)
    assert worse["loss"] == pytest.approx(1, rel=1e-5)
    assert worse["psnr"] < scores["psnr"]
    assert task.rank(scores) > task.rank(worse)
    whole = load_data("splats-torus", options={**OPTIONS, "prune": 0.0})
    assert task.metrics(Labels(whole.test.labels).attributes, whole.test.labels)["psnr"] > 100


def test_wrong_data_and_settings_are_refused(tmp_path):
    with pytest.raises(UsageError, match="needs a scene to learn"):
        Splats().targets(torch.zeros(3), torch.zeros(3))
    with pytest.raises(UsageError, match="label_smoothing"):
        create_task("splats", 0.1)
    with pytest.raises(UsageError, match=r"data\.root"):
        load_data("splats-scene")
    with pytest.raises(UsageError, match="is generated"):
        load_data("splats-torus", root=tmp_path)
    for options, words in (({"prune": 1.5}, "prune"), ({"gaussians": 1}, "gaussians")):
        with pytest.raises(UsageError, match=words):
            load_data("splats-torus", options=options)


def test_a_ply_file_is_data(tmp_path):
    write_scene(generate("hills", 50), tmp_path / "a.ply")
    data = load_data("splats-scene", root=tmp_path / "a.ply", options={"pixels": 16})
    assert len(data.test) == 50
    assert data.generated is None


@pytest.mark.slow
def test_a_run_learns_and_its_verbs_work(tmp_path, capsys, pictures_drawn):
    run = tmp_path / "run"
    settings = {"task": "splats", "data": {"name": "splats-torus", "options": OPTIONS}}
    smallfry.train(**settings, epochs=6, batch_size=12, run=run, progress="quiet")
    trained = smallfry.load(run)
    assert trained.evaluate()["loss"] < 1.0
    assert (run / "pictures" / "views.png").is_file()
    data = load_data("splats-torus", options=OPTIONS)
    np.save(tmp_path / "x.npy", data.test.images[0].numpy())
    capsys.readouterr()
    assert main(["predict", str(run), str(tmp_path / "x.npy"), "--json"]) == 0
    assert "opacity" in json.dumps(json.loads(capsys.readouterr().out))
