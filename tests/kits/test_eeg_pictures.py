"""Pictures and decoding of EEG windows, the freezing method, and the loop over subjects."""

import numpy as np
import pytest
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image

from smallfry.data import Split, load_data
from smallfry.errors import DataError, UsageError
from smallfry.kits.eeg.explanation import explain
from smallfry.kits.eeg.models import InterpretableCNN
from smallfry.kits.eeg.pictures import band_powers, draw_bands, draw_explanations
from smallfry.kits.eeg.spindles import SpindleSettings, generate
from smallfry.kits.eeg.statistics import Statistics, freeze_statistics
from smallfry.kits.eeg.subjects import Left, leave_one_out, mean_and_error
from smallfry.kits.eeg.task import EEG
from smallfry.tasks import Explained, HasRecipe, Pictured, create_task, find_task
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
    task = EEG()
    assert isinstance(EEG, HasRecipe)
    assert isinstance(task, Pictured)
    assert isinstance(task, Explained)
    assert create_task("eeg", 0.1).label_smoothing == 0.1


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


@pytest.mark.parametrize("rate", [64.0, 128.0, 256.0])
def test_band_powers_are_those_of_scipy(split, rate):
    from scipy.signal import welch

    windows = split.images[:4, 0].numpy()
    rates, power = welch(windows, rate, nperseg=int(rate), scaling="spectrum")
    bands = [(1, 4), (4, 8), (8, 12), (12, 30)]
    found = np.stack(
        [power[..., (rates >= low) & (rates < high)].sum(-1) for low, high in bands], axis=-1
    )
    wanted = found / found.sum(axis=-1, keepdims=True)
    assert band_powers(windows, rate) == pytest.approx(wanted, abs=1e-5)


@pytest.fixture
def figures(monkeypatch):
    """Figures that were saved, coarsely."""
    found, save = [], Figure.savefig

    def coarse(figure, *given, **more):
        found.append(figure)
        figure.set_layout_engine("none")
        save(figure, *given, **{**more, "dpi": 20})

    monkeypatch.setattr(Figure, "savefig", coarse)
    return found


def waves(rate, hertz, seconds=2, count=4):
    """Windows of a wave, each with an electrode more of it."""
    times = np.arange(int(rate * seconds)) / rate
    values = np.sin(2 * np.pi * hertz * times) * np.ones((count, 30, 1))
    return values.astype(np.float32)


@pytest.mark.parametrize("rate", [128.0, 256.0, 500.0])
def test_pictures_have_the_rate_of_the_data(tmp_path, figures, rate):
    np.savez(
        tmp_path / "a.npz",
        EEGsample=waves(rate, 10),
        substate=[0, 1, 0, 1],
        subindex=[1, 1, 2, 2],
        rate=rate,
    )
    options = {"file": "a.npz", "rate": rate}
    data = load_data("eeg-mat", root=tmp_path, options=options, validation=0.0)
    for part in (data.train, data.test, data.test.take(torch.tensor([1]))):
        assert part.rate == rate
    draw_bands(data.test, CLASSES, tmp_path / "bands.png")
    shares = {axes.get_title(): axes.collections[0].get_array() for axes in figures[0].axes}
    for state in CLASSES:  # ten waves a second are alpha, whatever the rate
        assert shares[f"{state}, alpha"].min() > 0.99
    torch.manual_seed(0)
    model = InterpretableCNN(img_size=(30, int(2 * rate)), norm="running")
    with torch.no_grad():
        model.fc.bias.copy_(torch.tensor([50.0, 0.0]))  # the first window is right, and is shown
    draw_explanations(model, data.test, scaled, CLASSES, tmp_path / "explanations.png")
    traces = figures[1].axes[0]
    assert traces.get_xlabel() == "seconds"
    assert traces.get_xlim() == pytest.approx((0, 2 - 1 / rate))
    inputs, state = scaled(data.test.images[:1]), torch.tensor([0])
    (wanted,) = explain(model, inputs, state, int(rate / 4))  # bells of a quarter of a second
    colours = np.asarray(traces.collections[0].get_array())
    assert colours == pytest.approx(wanted.heat[:, :-1].clip(0).ravel())
    assert colours.max() > 0


def test_windows_without_a_rate_have_that_of_the_paper(tmp_path, figures):
    images, labels = torch.from_numpy(waves(128, 10))[:, None], torch.tensor([0, 1, 0, 1])
    draw_bands(Split(images, torch.arange(4), labels), CLASSES, tmp_path / "bands.png")
    shares = {axes.get_title(): axes.collections[0].get_array() for axes in figures[0].axes}
    assert shares["drowsy, alpha"].min() > 0.99


@pytest.mark.parametrize("width", [1, 8, 32, 64])
def test_heat_is_the_sum_of_bells_of_a_width(width):
    torch.manual_seed(0)
    model = InterpretableCNN(img_size=(3, 200), norm="running", kernel=8).double().eval()
    window = torch.randn(1, 3, 200).double()
    ((heat, points),) = explain(model, window, torch.tensor([1]), width)
    bells = np.zeros((3, 200))
    for electrode, sample in points:
        offsets = np.arange(200) - sample
        near = (offsets >= -width) & (offsets < width)
        bells[electrode] += near * np.exp(-(offsets**2) / (2 * width**2))
    assert heat == pytest.approx((bells - bells.mean()) / np.sqrt((bells**2).mean()), abs=1e-9)
    assert len(points) > 5


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
