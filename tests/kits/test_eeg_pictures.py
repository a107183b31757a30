"""Pictures and decoding of EEG windows, the freezing method, and the loop over subjects."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from smallfry.data import Split
from smallfry.errors import DataError, UsageError
from smallfry.kits.eeg.models import InterpretableCNN
from smallfry.kits.eeg.pictures import band_powers, draw_bands, draw_explanations
from smallfry.kits.eeg.spindles import SpindleSettings, generate
from smallfry.kits.eeg.statistics import Statistics, freeze_statistics
from smallfry.kits.eeg.subjects import Left, leave_one_out, mean_and_error
from smallfry.kits.eeg.task import EEG
from smallfry.tasks import Explained, HasRecipe, Pictured, find_task
from smallfry.training.augment import Normalize
from smallfry.training.calibration import CalibrationBatches
from smallfry.training.method import Running, Setting, find_methods
from smallfry.transforms.spec import ModelSpec
from smallfry_runtime.decoders import decoder_of
from smallfry_runtime.decoders.eeg import decode, right
from smallfry_runtime.errors import UsageError as RuntimeUsageError

CLASSES = ("alert", "drowsy")


@pytest.fixture(scope="module")
def split():
    windows, _ = generate(SpindleSettings(subjects=2, windows=8))
    return Split(windows.values[:, None], torch.arange(16), torch.from_numpy(windows.states))


def scaled(pixels):
    return pixels / 0.6


def test_the_task_is_found_with_its_recipe_and_pictures():
    assert find_task("eeg") is EEG
    task = EEG.create()
    assert isinstance(EEG, HasRecipe)
    assert isinstance(task, Pictured)
    assert isinstance(task, Explained)
    assert EEG.create(0.1).label_smoothing == 0.1


def test_states_are_decoded_with_their_probabilities():
    outputs = np.array([[2.0, 0.0], [-1.0, 1.0]])
    first, second = decode(outputs, CLASSES)
    assert (first["state"], second["state"]) == CLASSES
    wanted = torch.tensor(outputs).softmax(dim=1)
    assert [*second["probabilities"].values()] == pytest.approx(wanted[1].tolist())
    assert EEG().decode(torch.tensor(outputs), CLASSES)[1]["state"] == "drowsy"
    assert decoder_of("eeg").decode(np.full((1, 2), 1e4), CLASSES)[0]["state"] == "alert"
    assert right(outputs, np.array([0, 0])).tolist() == [True, False]
    with pytest.raises(RuntimeUsageError, match="no setting 'beam'"):
        decode(outputs, CLASSES, {"beam": 2})


def test_a_run_gets_pictures_of_bands_and_explanations(tmp_path, split):
    model = timm.create_model("interpretable_cnn")
    freeze_statistics(model, [scaled(split.images)])
    with torch.no_grad():
        outputs = model.eval()(scaled(split.images))
    task = EEG()
    task.draw(outputs, split, CLASSES, tmp_path)
    task.explain(model, split, scaled, CLASSES, tmp_path)
    task.explain(torch.nn.Identity(), split, scaled, CLASSES, tmp_path / "nowhere")
    for name in ("reliability", "confusion_matrix", "bands", "explanations"):
        assert np.asarray(Image.open(tmp_path / f"{name}.png")).std() > 1
    assert not model.training


def test_pictures_of_other_recordings_and_of_nothing(tmp_path):
    windows = torch.randn(4, 1, 5, 128)
    split = Split(windows, torch.arange(4), torch.tensor([0, 1, 0, 1]))
    model = InterpretableCNN(img_size=(5, 128), norm="running")
    draw_explanations(model, split, scaled, CLASSES, tmp_path / "a.png")
    draw_bands(split, CLASSES, tmp_path / "b.png")
    draw_bands(split.take(torch.arange(0)), CLASSES, tmp_path / "c.png")
    assert all((tmp_path / name).is_file() for name in ("a.png", "b.png", "c.png"))


def test_band_powers_are_those_of_scipy(split):
    from scipy.signal import welch

    windows = split.images[:4, 0].numpy()
    rates, power = welch(windows, 128, nperseg=128, scaling="spectrum")
    bands = [(1, 4), (4, 8), (8, 12), (12, 30)]
    found = np.stack(
        [power[..., (rates >= low) & (rates < high)].sum(-1) for low, high in bands], axis=-1
    )
    wanted = found / found.sum(axis=-1, keepdims=True)
    assert band_powers(windows) == pytest.approx(wanted, abs=1e-5)


def start(settings, split, rehearsal=False):
    model = timm.create_model("interpretable_cnn")
    batches = CalibrationBatches(split, Normalize([0.0], [1.0]), model, images=4)
    setting = Setting(
        ModelSpec("interpretable_cnn"), batches.example(), batches, rehearsal=rehearsal
    )
    return model, Running(settings, model, setting)


def test_the_method_takes_all_training_windows_or_a_subjects(tmp_path, split):
    pixels = split.take(torch.arange(12))
    model, running = start(find_methods(["eeg-statistics"]), pixels)
    assert running.finish() == ModelSpec("interpretable_cnn")
    assert running.reports == [{"method": "eeg-statistics", "windows": 12, "of": "training"}]
    values = model.features(pixels.images).temporal.relu()
    assert torch.allclose(model.norm.running_mean, values.mean((0, 2)), atol=1e-6)
    assert torch.allclose(model.norm.running_var, values.var((0, 2), unbiased=False), atol=1e-6)
    own = split.take(torch.arange(12, 16)).images
    np.save(tmp_path / "own.npy", own[:, 0].numpy())
    model, running = start([Statistics(windows=str(tmp_path / "own.npy"))], pixels)
    running.finish()
    assert running.reports[0]["windows"] == 4
    wanted = model.features(own).temporal.relu().mean((0, 2))
    assert torch.allclose(model.norm.running_mean, wanted, atol=1e-6)
    _, running = start([Statistics()], pixels, rehearsal=True)
    running.finish()
    assert running.reports[0]["windows"] == 2


def test_the_method_refuses_other_models_and_windows(tmp_path, split):
    setting = Setting(ModelSpec("linear"), torch.zeros(2, 1, 8, 8))
    with pytest.raises(UsageError, match="is of interpretable_cnn, not of linear"):
        Running([Statistics()], torch.nn.Identity(), setting).finish()
    np.save(tmp_path / "own.npy", np.zeros((3, 28, 384)))
    with pytest.raises(DataError, match=r"has the shape \(3, 28, 384\), expected windows of 30"):
        start([Statistics(windows=str(tmp_path / "own.npy"))], split)[1].finish()
    with pytest.raises(DataError, match=r"none\.npy: not a readable \.npy file"):
        start([Statistics(windows=str(tmp_path / "none.npy"))], split)[1].finish()


def test_results_of_subjects_have_a_mean_and_an_error():
    results = [Left(1, 0.9, 10, "a"), Left(2, 1.0, 10, "b"), Left(3, 0.8, 10, "c")]
    mean, error = mean_and_error(results)
    assert mean == pytest.approx(0.9)
    assert error == pytest.approx(0.1 / 3**0.5)
    assert mean_and_error(results[:1]) == (0.9, 0.0)


@pytest.mark.parametrize(
    ("subjects", "options", "words"),
    [((), {}, "name the subjects to leave out"), ((1,), {"held_out": 1}, "leave it out")],
)
def test_subjects_are_named_once(tmp_path, subjects, options, words):
    with pytest.raises(UsageError, match=words):
        leave_one_out(subjects, tmp_path, {"name": "eeg-spindles", "options": options})
