"""Recordings that are odd or wrong: rates, electrodes and files; and laws of their windows."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.io import savemat
from torch.testing import assert_close

from smallfry.data import Split, load_data
from smallfry.errors import DataError, UsageError
from smallfry.kits.eeg.electrodes import ELECTRODES, FRONTAL, TEMPORAL, numbers_of, positions_of
from smallfry.kits.eeg.explanation import Explanation, explain, pointing_game
from smallfry.kits.eeg.models import InterpretableCNN
from smallfry.kits.eeg.pictures import BANDS, band_powers
from smallfry.kits.eeg.spindles import SpindleSettings, draw_window, generate
from smallfry.kits.eeg.statistics import Statistics, freeze_statistics
from smallfry.kits.eeg.subjects import leave_one_out
from smallfry.kits.eeg.windows import join, of_epochs, read_mat
from smallfry.training.augment import Normalize
from smallfry.training.calibration import CalibrationBatches
from smallfry.training.method import Running, Setting
from smallfry.transforms.spec import ModelSpec
from smallfry_runtime.decoders.eeg import decode, right

FEW = SpindleSettings(subjects=3, windows=6)


def entries(count=6, height=30, samples=16, **others):
    random = np.random.default_rng(0)
    return {
        "EEGsample": random.standard_normal((count, height, samples)).astype(np.float32),
        "substate": np.arange(count) % 2,
        "subindex": np.arange(count) // 2 + 1,
        **others,
    }


def written(place, content):
    np.savez(place / "a.npz", **content)
    return place / "a.npz"


@pytest.mark.parametrize("kind", ["f2", "f8", ">f4", "i2", "u1"])
def test_values_of_any_real_type_become_float32(tmp_path, kind):
    values = np.arange(6 * 30 * 16).reshape(6, 30, 16) % 200
    found = read_mat(written(tmp_path, entries(EEGsample=values.astype(kind))))
    assert found.values.dtype == torch.float32
    assert torch.equal(found.values, torch.from_numpy(values).float())


def test_columns_and_rows_of_matlab_are_read_alike(tmp_path):
    content = entries()
    for name, shape in (("column", (-1, 1)), ("row", (1, -1))):
        turned = {key: content[key].reshape(shape) for key in ("substate", "subindex")}
        savemat(tmp_path / f"{name}.mat", {**content, **turned})
    one, other = read_mat(tmp_path / "column.mat"), read_mat(tmp_path / "row.mat")
    assert one.states.tolist() == other.states.tolist() == [0, 1] * 3
    assert one.subjects.tolist() == other.subjects.tolist() == [1, 1, 2, 2, 3, 3]
    assert torch.equal(one.values, other.values)
    assert one.rate == 128


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (entries(rate=np.array([])), r"rate is one number, the samples a second, got \[\]"),
        (entries(rate=np.array([128, 256])), r"rate is one number, .* got \[128, 256\]"),
        (entries(rate=np.array("fast")), r"rate is one number, .* got \['fast'\]"),
        (entries(rate=np.nan), "sampled at nan Hz, expected 128 Hz: resample the recording"),
        (entries(rate=0), "sampled at 0 Hz"),
        (entries(rate=128.5), "sampled at 128.5 Hz"),
        (entries(subindex=np.arange(6)), "subindex counts subjects from 1, got 0: add 1"),
        (entries(subindex=np.full(6, np.inf)), "subindex has 6 entries of type float64"),
        (entries(substate=np.full(6, np.nan)), "substate has 6 entries of type float64"),
        (entries(substate=np.full(6, -1)), r"substate is 0 or 1, got \[-1\]"),
        (entries(substate=np.array(["0"] * 6)), "substate has 6 entries of type <U1"),
        (entries(EEGsample=np.full((6, 30, 16), 1e39)), "a value is not a number"),
        (entries(EEGsample=np.zeros((6, 30, 16), complex)), "type complex128, expected numbers"),
        (entries(EEGsample=np.zeros((6, 30, 16), bool)), "type bool, expected numbers"),
        (entries(height=29), "has 29 .*, expected 30 in the order Fp1 Fp2 F7.* entry 'electrodes'"),
        (
            entries(electrodes=np.array([*ELECTRODES[:29], "X9"])),
            "the electrodes O2 are missing of the 30",
        ),
        (
            entries(height=31, electrodes=np.array([*ELECTRODES, "fp1."])),
            "two electrodes are fp1.: name each once",
        ),
        (
            entries(height=31, electrodes=np.array([*ELECTRODES, "T7"])),
            "two electrodes are T7: name each once",  # T3 by its newer name
        ),
        (entries(electrodes=np.array("Fp1")), "1 names for 30 electrodes"),
    ],
)
def test_entries_of_other_forms_are_refused(tmp_path, content, words):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of 1e39 in float32
        with pytest.raises(DataError, match=rf"a\.npz: .*{words}"):
            read_mat(written(tmp_path, content))


def test_an_electrode_without_a_name_is_missing(tmp_path):
    cells = np.array([*ELECTRODES[:-1], ""], object)
    cells[-1] = np.array([], "U1")  # as MATLAB has an empty cell
    savemat(tmp_path / "a.mat", {**entries(), "electrodes": cells})
    with pytest.raises(DataError, match="the electrodes O2 are missing"):
        read_mat(tmp_path / "a.mat")


@pytest.mark.parametrize("rate", [127.9, 128.0, 128.1, 256.0])
def test_a_rate_is_the_models_within_a_thousandth(tmp_path, rate):
    file = written(tmp_path, entries(rate=rate))
    assert read_mat(file, rate).rate == rate
    if rate < 200:
        assert read_mat(file).rate == rate
    with pytest.raises(DataError, match="expected 100 Hz"):
        read_mat(file, 100)


@pytest.mark.parametrize("cut", [10, 200, 2000])
def test_truncated_files_of_windows_are_refused(tmp_path, cut):
    whole = written(tmp_path, entries())
    savemat(tmp_path / "whole.mat", entries())
    for name, file in (("b.npz", whole), ("b.mat", tmp_path / "whole.mat")):
        (tmp_path / name).write_bytes(file.read_bytes()[:cut])
        with pytest.raises(DataError, match=rf"{name}: "):
            read_mat(tmp_path / name)


def test_objects_of_python_are_never_loaded(tmp_path):
    content = entries(electrodes=np.array([*ELECTRODES], object))
    with pytest.raises(DataError, match="not a readable file of windows"):
        read_mat(written(tmp_path, content))


def test_a_file_without_windows_and_one_of_a_single_subject_are_refused(tmp_path):
    file = written(tmp_path, entries(0))
    for root in (tmp_path, file):  # the folder or the file itself
        with pytest.raises(UsageError, match="held_out 0 is none of its 0 subjects"):
            load_data("eeg-mat", root, options={"file": "a.npz"})
    written(tmp_path, entries(subindex=np.full(6, 4)))
    with pytest.raises(UsageError, match="held_out 4 is none of its 1 subjects, or the only one"):
        load_data("eeg-mat", tmp_path, options={"file": "a.npz"})


@pytest.mark.parametrize("held_out", [1, 2, 3])
def test_validation_windows_are_of_training_subjects(tmp_path, held_out):
    written(tmp_path, entries(30, subindex=np.arange(30) % 3 + 1))
    options = {"file": "a.npz", "held_out": held_out}
    data = load_data("eeg-mat", tmp_path, options=options, validation=0.2)
    assert [len(each) for each in (data.train, data.validation, data.test)] == [16, 4, 10]
    rows = {
        split: {int(data.locate(split, i).rsplit(" ", 1)[1]) for i in range(count)}
        for split, count in (("train", 16), ("validation", 4), ("test", 10))
    }
    assert rows["test"] == {row for row in range(30) if row % 3 + 1 == held_out}
    assert sorted(rows["train"] | rows["validation"] | rows["test"]) == [*range(30)]
    assert data.input_shape == (1, 30, 16)


@pytest.mark.parametrize("size", [(30, 16), [30, 16]])
def test_the_windows_own_size_may_be_named(tmp_path, size):
    written(tmp_path, entries())
    load_data("eeg-mat", tmp_path, options={"file": "a.npz"}, image_size=size)
    with pytest.raises(UsageError, match="30 electrodes and 16 samples, and are not resized"):
        load_data("eeg-mat", tmp_path, options={"file": "a.npz"}, image_size=(30, 17))


@pytest.mark.parametrize("name", ["T7", "t7", " T7.", "T3", "t3 "])
def test_names_of_both_systems_are_one_electrode(name):
    others = ["Cz", name, "Pz"]
    assert numbers_of(("T3", "Pz"), others) == ([1, 2], [])
    assert numbers_of(("T7",), others) == ([1], [])
    assert numbers_of(("T4", "T3", "O1"), others) == ([1], ["T4", "O1"])
    assert numbers_of((), others) == ([], [])


def test_frontal_and_temporal_electrodes_are_where_they_are_called():
    assert (positions_of(FRONTAL)[:, 1] >= 0.5).all()
    assert (np.abs(positions_of(TEMPORAL)[:, 0]) > 0.8).all()
    assert positions_of(()).shape[0] == 0


def epochs(values, marks, **changes):
    names = changes.pop("names", ELECTRODES)
    return SimpleNamespace(
        event_id={"alert": 5, "drowsy": 3, "blink": 9},
        events=np.array([[i, 0, mark] for i, mark in enumerate(marks)]).reshape(-1, 3),
        get_data=lambda: values,
        info={"sfreq": 128.0, **changes},
        ch_names=list(names),
    )


def test_events_are_told_apart_by_their_names_not_their_order():
    values = np.arange(4)[:, None, None] * np.ones((4, 30, 8))
    found = of_epochs(epochs(values, [3, 9, 5, 3]))
    assert found.states.tolist() == [1, 0, 1]
    assert found.values[:, 0, 0].tolist() == [0, 2, 3]
    swapped = of_epochs(epochs(values, [3, 9, 5, 3]), events=("drowsy", "alert"))
    assert swapped.states.tolist() == [0, 1, 0]
    assert len(of_epochs(epochs(values[:1], [9])).states) == 0


def test_epochs_with_more_electrodes_give_those_of_the_paper():
    names = ["EOG", *reversed(ELECTRODES), "M1"]
    values = np.broadcast_to(np.arange(32.0)[:, None], (2, 32, 8))
    found = of_epochs(epochs(values, [3, 5], names=names))
    assert found.values[0, :, 0].tolist() == [*range(30, 0, -1)]
    values = np.full((2, 30, 8), np.nan)
    with pytest.raises(DataError, match="the epochs of subject 1: a value is not a number"):
        of_epochs(epochs(values, [3, 5]))
    with pytest.raises(DataError, match="sampled at 0 Hz"):
        of_epochs(epochs(values, [3, 5], sfreq=0.0))


def test_joining_keeps_each_recordings_order():
    parts = [of_epochs(epochs(np.full((2, 30, 8), n), [3, 5]), n) for n in (2, 1)]
    joined = join(parts)
    assert joined.values[:, 0, 0].tolist() == [2, 2, 1, 1]
    assert joined.subjects.tolist() == [2, 2, 1, 1]
    with pytest.raises(DataError, match=r"different shapes: \[\]"):
        join([])


@pytest.mark.parametrize(
    ("subjects", "words"),
    [((0,), "subjects are counted from 1, got 0"), ((2, -1), "from 1, got -1")],
)
def test_subjects_that_are_none_are_refused(tmp_path, subjects, words):
    with pytest.raises(UsageError, match=words):
        leave_one_out(subjects, tmp_path, {"name": "eeg-spindles"})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": -1}, "seed is a whole number from 0"),
        ({"held_out": -1}, "a subject from 1 to 3, or 0 for the last, got -1"),
        ({"subjects": 1001}, "subjects is 2 to 1,000, got 1001"),
        ({"windows": 100_001}, "windows is 4 to 100,000"),
        ({"level": ""}, "level is easy or hard, got ''"),
    ],
)
def test_impossible_settings_of_subjects_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        load_data("eeg-spindles", options={"subjects": 3, "windows": 6, **options})


@pytest.mark.parametrize("number", [1, 3, 5])
def test_a_spindle_is_what_differs_by_level_and_lies_in_its_mask(number):
    """Twice the easy window's excess over the hard one is the spindle alone."""
    easy = draw_window(FEW, 2, number)
    hard = draw_window(SpindleSettings(subjects=3, windows=6, level="hard"), 2, number)
    spindle = 2 * (easy.values - hard.values)
    quiet = spindle[:, ~easy.mask.any(axis=0)]
    assert np.abs(quiet).max() < 1e-12  # nothing before or after
    peaks = np.abs(spindle).max(axis=1)
    assert easy.mask[peaks.argmax()].any()
    rows = easy.mask.any(axis=1)
    assert peaks[rows].min() > peaks[~rows].max() / 4
    assert (easy.state, hard.state) == (1, 1)


def test_windows_alternate_and_gains_are_the_subjects():
    windows, masks = generate(FEW)
    assert windows.states.tolist() == [0, 1] * 9
    assert windows.subjects.tolist() == [1] * 6 + [2] * 6 + [3] * 6
    assert masks.any(axis=(1, 2)).tolist() == [False, True] * 9
    spread = windows.values.std(dim=2).reshape(3, 6, 30)[:, ::2].mean(dim=1)
    assert not np.allclose(spread[0], spread[1], rtol=0.05)


@pytest.mark.parametrize("factor", [0.01, 1.0, 1000.0])
def test_shares_of_bands_forget_amplitude_and_offset(factor):
    windows = np.random.default_rng(0).standard_normal((2, 3, 384))
    wanted = band_powers(windows)
    assert band_powers(factor * windows + 7) == pytest.approx(wanted)
    assert wanted.shape == (2, 3, len(BANDS))
    assert wanted.sum(axis=-1) == pytest.approx(np.ones((2, 3)))
    assert band_powers(np.zeros((1, 2, 384))).tolist() == [[[0.0] * 4] * 2]


@pytest.mark.parametrize(("rate", "hertz"), [(128, 10), (256, 10), (256, 20), (64, 6)])
def test_bands_are_of_the_rate(rate, hertz):
    wave = np.sin(2 * np.pi * hertz * np.arange(512) / rate)[None, None]
    band = [*BANDS][int(band_powers(wave, rate)[0, 0].argmax())]
    assert BANDS[band][0] <= hertz < BANDS[band][1]


def small(norm="population", **settings):
    torch.manual_seed(0)
    return InterpretableCNN(img_size=(3, 40), filters=2, kernel=8, norm=norm, **settings).double()


def test_logits_are_those_of_a_loop_over_time():
    model, windows = small().eval(), torch.randn(2, 3, 40, dtype=torch.float64)
    with torch.no_grad():
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
    p, v = model.spatial.weight[:, 0, :, 0], model.temporal.weight[:, 0, 0]
    mixed = torch.einsum("np,bpt->bnt", p, windows) + model.spatial.bias[:, None]
    steps = []
    for t in range(33):
        z = (mixed[:, [0, 0, 1, 1], t : t + 8] * v).sum(-1) + model.temporal.bias
        scaled = (z.relu() - model.norm.running_mean) / (model.norm.running_var + 1e-5).sqrt()
        steps.append(scaled * model.norm.weight + model.norm.bias)
    wanted = torch.stack(steps).mean(0) @ model.fc.weight.T + model.fc.bias
    assert_close(model(windows), wanted)
    assert_close(model(windows[:, None]), wanted)


@pytest.mark.parametrize("kernel", [40, 41])
def test_a_window_may_be_as_short_as_the_kernel(kernel):
    settings = {"img_size": (3, 40), "kernel": kernel, "filters": 2}
    if kernel > 40:
        with pytest.raises(UsageError, match=r"41 samples at least, .* not 40"):
            InterpretableCNN(**settings)
    else:
        model = InterpretableCNN(**settings).eval()
        assert model(torch.zeros(2, 3, 40)).shape == (2, 2)
        (found,) = explain(model, torch.randn(1, 3, 40), torch.tensor([1]))
        assert {*found.points[:, 1].tolist()} <= {20}


def test_statistics_of_no_windows_leave_the_network_as_it_was():
    model = small()
    before = model.norm.running_mean.clone()
    with pytest.raises(UsageError, match="no windows to take statistics of"):
        freeze_statistics(model, [torch.zeros(0, 1, 3, 40, dtype=torch.float64)])
    assert torch.equal(model.norm.running_mean, before)
    assert model.training


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a readable .npy file"),
        (b"\x93NUMPY", "not a readable .npy file"),
        (np.zeros((2, 3, 40), object), "not a readable .npy file"),
        ({"a": np.zeros((2, 3, 40))}, "holds several arrays, and one of windows in .npy"),
        (np.zeros((3, 40)), r"has the shape \(3, 40\), expected windows of 3 electrodes and 40"),
        (np.zeros((2, 3, 40), bool), r"has the shape \(2, 3, 40\)"),
        (np.full((2, 3, 40), np.nan), "a value is not a number"),
        (np.full((2, 3, 40), -np.inf), "a value is not a number"),
    ],
)
def test_windows_of_a_new_subject_in_another_form_are_refused(tmp_path, content, words):
    file = tmp_path / "own.npy"
    with file.open("wb") as stream:
        if isinstance(content, bytes):
            stream.write(content)
        elif isinstance(content, dict):
            np.savez(stream, **content)
        else:
            np.save(stream, content, allow_pickle=True)
    model = small().float()
    split = Split(torch.zeros(3, 1, 3, 40), torch.arange(3), torch.zeros(3, dtype=torch.int64))
    batches = CalibrationBatches(split, Normalize([0.0], [1.0]), model)
    setting = Setting(ModelSpec("interpretable_cnn"), batches.example(), batches)
    with pytest.raises(DataError, match=rf"own\.npy: .*{words}"):
        Running([Statistics(windows=str(file))], model, setting).finish()
    assert model.norm.running_mean.isfinite().all()


def test_the_pointing_game_needs_a_point_in_the_truth():
    masks = np.zeros((4, 2, 5), bool)
    masks[:3, 1, 2:4] = True
    heat = np.zeros((2, 5))
    points = ([[1, 3], [0, 0]], [[0, 3], [1, 2]], [], [[1, 2]])
    found = [Explanation(heat, np.array(each, int).reshape(-1, 2)) for each in points]
    hits = pointing_game(found, masks)
    assert hits == (3, 1, 0.2)
    assert hits.rate == pytest.approx(1 / 3)
    assert pointing_game(found, masks & False) == (0, 0, 0.0)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_states_are_decoded_as_by_pytorch(kind):
    logits = (8 * np.random.default_rng(0).standard_normal((5, 2))).astype(kind)
    shares = torch.from_numpy(logits.astype(np.float64)).softmax(1).numpy()
    for found, row in zip(decode(logits, ("alert", "drowsy")), shares, strict=True):
        assert [*found["probabilities"].values()] == pytest.approx(row.tolist(), abs=1e-12)
        assert found["state"] == ("alert", "drowsy")[row.argmax()]
    assert right(logits, shares.argmax(1)).all()
    assert not right(logits, 1 - shares.argmax(1)).any()
    assert decode(logits[:0], ("alert", "drowsy")) == []
    assert decode(np.array([[1000.0, -1000.0]]), ("a", "b"))[0]["probabilities"] == {"a": 1, "b": 0}


@pytest.mark.parametrize("rate", [0, -5, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["eeg-mat", "eeg-epochs"])
def test_rates_are_above_0(tmp_path, name, rate):
    written(tmp_path, entries())
    options = {"rate": rate} | ({"file": "a.npz"} if name == "eeg-mat" else {})
    with pytest.raises(UsageError, match=r"data\.options\.rate is above 0"):
        load_data(name, tmp_path, options=options)


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_windows_are_normalised_whatever_their_unit(tmp_path, unit):
    content = entries()
    content["EEGsample"] = (content["EEGsample"] + 3).astype(np.float64) * unit
    written(tmp_path, content)
    data = load_data("eeg-mat", tmp_path, validation=0.0, options={"file": "a.npz"})
    values = data.train.images.double()
    assert data.std == pytest.approx([values.std(correction=0).item()], rel=1e-6)
    shifted = Normalize(data.mean, data.std)(data.train.images)
    assert float(shifted.std(correction=0)) == pytest.approx(1, rel=1e-4)
    content["EEGsample"][:] = 3 * unit  # silence of one value
    written(tmp_path, content)
    silent = load_data("eeg-mat", tmp_path, validation=0.0, options={"file": "a.npz"})
    assert silent.std == (1.0,)
