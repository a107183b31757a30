"""A run from generated subjects to an export, alone and in batches, and leaving subjects out."""

import json

import numpy as np
import pytest
import torch

import smallfry
from smallfry.cli import main
from smallfry.data import load_data
from smallfry.errors import DataError, SmallfryError, UsageError
from smallfry.kits.eeg.spindles import SpindleSettings, generate
from smallfry.kits.eeg.subjects import leave_one_out, mean_and_error, point_in_generated
from smallfry.training.recipes import recipe_of
from smallfry_runtime.runtime import Runtime

FEW = {"subjects": 3, "windows": 24}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("eeg") / "run"
    asked = ["train", "--task", "eeg", "--data.options", json.dumps(FEW), "--epochs", "2"]
    assert main([*asked, "--progress", "quiet", "--threads", "1", "--run", str(place)]) == 0
    return place


@pytest.fixture(scope="module")
def tested():
    return load_data("eeg-spindles", options=FEW).test


@pytest.fixture(scope="module")
def export(run, tmp_path_factory):
    return smallfry.export(run, tmp_path_factory.mktemp("export") / "eeg")


def test_a_run_freezes_the_statistics_of_training(run):
    assert recipe_of("eeg").name == "recipe.yaml"
    trained = smallfry.load(run)
    assert trained.manifest["methods"] == [{"eeg-statistics": {"windows": ""}}]
    assert trained.manifest["task"] == "eeg"
    data = load_data("eeg-spindles", options=FEW)
    inputs = trained.normalize(data.train.images)
    with torch.no_grad():
        values = trained.model.features(inputs).temporal.relu()
    mean = values.double().mean((0, 2)).float()
    assert torch.allclose(trained.model.norm.running_mean, mean, atol=1e-6)
    pixels = data.train.images.double()
    assert trained.manifest["input"]["mean"] == pytest.approx([pixels.mean().item()], abs=1e-9)
    assert trained.manifest["input"]["values"] == "float32"


def test_answers_do_not_depend_on_the_batch(run, tested):
    trained = smallfry.load(run)
    windows = trained.normalize(tested.images)
    with torch.no_grad():
        whole = trained.model(windows)
        alone = torch.cat([trained.model(window[None]) for window in windows])
        drowsy = trained.model(windows[tested.labels == 1])
    assert torch.allclose(whole, alone, atol=1e-6)
    assert torch.allclose(whole[tested.labels == 1], drowsy, atol=1e-6)


def test_an_exports_answers_to_single_windows_vary(run, export, tested):
    runtime = Runtime(export)
    answers = [runtime.decode(window[None].numpy())[0] for window in tested.images[:6]]
    shares = np.array([each["probabilities"]["drowsy"] for each in answers])
    assert shares.std() > 1e-4
    trained = smallfry.load(run)
    wanted = trained.decode(list(tested.images[:6].numpy()))
    assert shares == pytest.approx([each["probabilities"]["drowsy"] for each in wanted], abs=1e-5)


def test_windows_are_predicted_from_files_and_wrong_ones_refused(run, export, tested, tmp_path):
    np.save(tmp_path / "a.npy", tested.images[0, 0].numpy())
    for place in (run, export):
        assert main(["predict", str(place), str(tmp_path / "a.npy")]) == 0
    trained = smallfry.load(run)
    for shape in ((28, 384), (30, 768)):
        np.save(tmp_path / "b.npy", np.zeros(shape, np.float32))
        with pytest.raises(DataError, match=f"is {shape[0]}×{shape[1]}; expected an array"):
            trained.decode(tmp_path / "b.npy")


def test_a_run_takes_the_statistics_of_a_new_subject(run, tested, tmp_path):
    np.save(tmp_path / "own.npy", tested.images[:12, 0].numpy())
    methods = json.dumps([{"eeg-statistics": {"windows": str(tmp_path / "own.npy")}}])
    asked = ["compress", str(run), "--to", str(tmp_path / "own"), "--methods", methods]
    assert main(asked) == 0
    before, after = smallfry.load(run), smallfry.load(tmp_path / "own")
    inputs = before.normalize(tested.images[:12])
    with torch.no_grad():
        mean = before.model.features(inputs).temporal.relu().mean((0, 2))
    assert torch.allclose(after.model.norm.running_mean, mean, atol=1e-6)
    assert torch.equal(after.model.fc.weight, before.model.fc.weight)


@pytest.mark.filterwarnings("ignore:with norm batch")
def test_a_network_of_the_batchs_statistics_is_not_exported(tmp_path):
    settings = {"data": {"name": "eeg-spindles", "options": FEW}, "progress": "quiet", "epochs": 1}
    settings["model"] = {"name": "interpretable_cnn", "options": {"norm": "batch"}}
    smallfry.train(task="eeg", methods=[], run=tmp_path / "run", **settings)
    with pytest.raises(SmallfryError, match="the answer to a single window is a constant"):
        smallfry.export(tmp_path / "run", tmp_path / "export")
    with pytest.raises(UsageError, match="no statistics to be frozen"):
        smallfry.train(task="eeg", run=tmp_path / "other", **settings)
    assert not (tmp_path / "export").exists()


def test_augmentations_of_pictures_are_refused(tmp_path, capsys):
    asked = ["train", "--task", "eeg", "--augment.flip", "true", "--run", str(tmp_path / "x")]
    assert main([*asked, "--data.options", json.dumps(FEW)]) != 0
    assert "labels of eeg would not hold" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("pictures_drawn")
def test_subjects_are_left_out_in_turn(tmp_path):
    data = {"name": "eeg-spindles", "options": FEW}
    found = leave_one_out([1, 3], tmp_path, data, epochs=1, progress="quiet", threads=1)
    assert [each.subject for each in found] == [1, 3]
    assert [each.windows for each in found] == [24, 24]
    drawn = {file.stem for file in (tmp_path / "subject-1" / "pictures").iterdir()}
    assert drawn >= {"explanations", "bands", "confusion_matrix", "learning_curves"}
    assert 0 <= mean_and_error(found)[0] <= 1
    windows, _ = generate(SpindleSettings(**FEW))
    first = smallfry.load(found[0].run)
    others = windows.values[torch.from_numpy(windows.subjects != 1)].double()
    # of training windows, a part of the other subjects' windows
    assert first.manifest["input"]["mean"] == pytest.approx([others.mean().item()], abs=0.01)
    hits = point_in_generated(first, SpindleSettings(**FEW, held_out=1))
    assert hits.windows == 12
    assert 0.01 < hits.share < 0.08
    with pytest.raises(UsageError, match="explanations are of interpretable_cnn"):
        point_in_generated(first._replace(model=torch.nn.Identity()), SpindleSettings(**FEW))


@pytest.mark.slow
def test_left_out_subjects_are_recognised_for_the_right_reason(tmp_path):
    options = {"subjects": 4, "windows": 60}
    data = {"name": "eeg-spindles", "options": options}
    (found,) = leave_one_out([4], tmp_path, data, epochs=20, progress="quiet", threads=1)
    assert found.accuracy >= 0.8
    hits = point_in_generated(smallfry.load(found.run), SpindleSettings(**options))
    assert hits.rate >= 0.7
    assert hits.rate >= 15 * hits.share
