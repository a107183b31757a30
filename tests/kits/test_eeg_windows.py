"""Generated subjects, files of windows and MNE's epochs, and the split by subject."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.io import savemat

from smallfry.data import load_data
from smallfry.errors import DataError, UsageError
from smallfry.kits.eeg.electrodes import ELECTRODES, FRONTAL, numbers_of, positions_of
from smallfry.kits.eeg.pictures import BANDS, band_powers
from smallfry.kits.eeg.spindles import SpindleSettings, draw_window, generate
from smallfry.kits.eeg.windows import join, of_epochs, read_mat

FEW = SpindleSettings(subjects=3, windows=12)


def test_a_window_is_a_function_of_its_numbers():
    one, other = draw_window(FEW, 2, 5), draw_window(SpindleSettings(subjects=7, windows=12), 2, 5)
    assert one.values.tobytes() == other.values.tobytes()
    windows, masks = generate(FEW)
    assert windows.values[12 + 5].numpy().tobytes() == one.values.astype(np.float32).tobytes()
    assert (masks[12 + 5] == one.mask).all()
    every = {row.numpy().tobytes() for row in windows.values}
    assert len(every) == len(windows.values) == 36
    other = draw_window(SpindleSettings(subjects=3, windows=12, seed=1), 2, 5)
    assert other.values.tobytes() != one.values.tobytes()


def test_drowsy_windows_have_spindles_where_the_truth_is():
    settings = SpindleSettings(subjects=2, windows=40)
    windows, masks = generate(settings)
    drowsy = windows.states == 1
    assert windows.values.shape == (80, 30, 384)
    assert masks[drowsy].any(axis=(1, 2)).all()
    assert not masks[~drowsy].any()
    assert 0.02 < masks[drowsy].mean() < 0.06
    inside = np.abs(windows.values.numpy()[drowsy])[masks[drowsy]].mean()
    outside = np.abs(windows.values.numpy()[drowsy])[~masks[drowsy]].mean()
    assert inside > 2 * outside
    alpha = [*BANDS].index("alpha")
    back = [ELECTRODES.index(name) for name in ("Pz", "O1", "O2")]
    powers = band_powers(windows.values.numpy())[:, back, alpha].mean(axis=1)
    assert powers[drowsy].mean() > 2 * powers[~drowsy].mean()
    front = [ELECTRODES.index(name) for name in FRONTAL]
    assert not masks[:, front].any()


def test_hard_spindles_have_half_the_amplitude():
    easy = draw_window(FEW, 1, 1)
    hard = draw_window(SpindleSettings(subjects=3, windows=12, level="hard"), 1, 1)
    assert (easy.mask == hard.mask).all()
    difference = np.abs(easy.values - hard.values).max()
    assert difference > 1
    noise = 2 * hard.values - easy.values  # without the spindles
    assert np.abs(noise[0, :10]).max() == pytest.approx(np.abs(hard.values[0, :10]).max(), rel=1)


def test_bands_share_the_power():
    times = np.arange(384) / 128
    waves = np.stack([np.sin(2 * np.pi * rate * times) for rate in (2, 6, 10, 20)])[None]
    found = band_powers(waves)
    assert found.sum(axis=-1) == pytest.approx(np.ones((1, 4)))
    assert np.diagonal(found[0]).min() > 0.8


def test_the_tested_subject_is_in_nothing_else():
    data = load_data("eeg-spindles", options={"subjects": 3, "windows": 12, "held_out": 2})
    assert data.classes == ("alert", "drowsy")
    assert data.input_shape == (1, 30, 384)
    assert len(data.test) == 12
    assert len(data.train) + len(data.validation) == 24
    sides = {
        split: {data.locate(split, i).split(",")[0] for i in range(len(getattr(data, split)))}
        for split in ("train", "validation", "test")
    }
    assert sides["test"] == {"generated: subject 2"}
    assert sides["train"] | sides["validation"] == {"generated: subject 1", "generated: subject 3"}
    tested = {row.numpy().tobytes() for row in data.test.images}
    for split in (data.train, data.validation):
        assert not tested & {row.numpy().tobytes() for row in split.images}
    assert data.generated["held_out"] == 2
    assert load_data("eeg-spindles", options={"subjects": 3, "windows": 12}).generated[
        "held_out"
    ] == 3  # fmt: skip
    some = load_data("eeg-spindles", options={"subjects": 3, "windows": 12}, limit=7)
    assert len(some.train) == 7


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"options": {"subjects": 1}}, "subjects is 2 to 1,000, got 1"),
        ({"options": {"windows": 3}}, "windows is 4 to 100,000, got 3"),
        ({"options": {"subjects": 3, "held_out": 4}}, "a subject from 1 to 3, or 0 for the last"),
        ({"options": {"level": "medium"}}, "level is easy or hard, got 'medium'"),
        ({"options": {"people": 3}}, "data.options has no 'people'"),
        ({"root": "."}, "does not use data.root: see eeg-mat"),
        ({"channels": 3}, "has no data.channels"),
        ({"image_size": 32}, "30 electrodes and 384 samples, and are not resized"),
    ],
)
def test_wrong_settings_of_subjects_are_refused(settings, words):
    settings = {"options": {"subjects": 2, "windows": 4}} | settings
    with pytest.raises(UsageError, match=words):
        load_data("eeg-spindles", **settings)


def entries(count=12, height=30, **others):
    random = np.random.default_rng(0)
    return {
        "EEGsample": random.standard_normal((count, height, 384)).astype(np.float32),
        "substate": (np.arange(count) % 2)[:, None],
        "subindex": (np.arange(count) // 4 + 1)[:, None],
        **others,
    }


@pytest.mark.parametrize("ending", ["mat", "npz"])
def test_the_published_layout_is_read(tmp_path, ending):
    content = entries()
    file = tmp_path / f"dataset.{ending}"
    if ending == "mat":
        savemat(file, content)
    else:
        np.savez(file, **content)
    data = load_data("eeg-mat", tmp_path, options={"file": file.name, "held_out": 2})
    assert torch.equal(data.test.images[:, 0], torch.from_numpy(content["EEGsample"][4:8]))
    assert data.test.labels.tolist() == [0, 1, 0, 1]
    assert len(data.train) + len(data.validation) == 8
    last = load_data("eeg-mat", tmp_path, options={"file": file.name})
    assert torch.equal(last.test.images[:, 0], torch.from_numpy(content["EEGsample"][8:]))


def test_named_electrodes_are_chosen_and_ordered(tmp_path):
    names = [*reversed(ELECTRODES), "A1", "A2"]
    names[names.index("T3")] = "t7"
    content = entries(height=32)
    savemat(tmp_path / "a.mat", {**content, "electrodes": np.array(names, object), "rate": 128})
    found = read_mat(tmp_path / "a.mat")
    assert torch.equal(found.values, torch.from_numpy(content["EEGsample"][:, 29::-1].copy()))
    assert found.electrodes == ELECTRODES
    assert numbers_of(("Fz", "Q1"), ("FZ ", "Cz.")) == ([0], ["Q1"])
    assert positions_of(("Cz",)).tolist() == [[0, 0]]
    assert positions_of(("Q1",)) is None
    assert np.linalg.norm(positions_of(ELECTRODES), axis=1).max() < 1.02


def without(name):
    return {key: value for key, value in entries().items() if key != name}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (without("substate"), "has no entry 'substate'; there are EEGsample, subindex"),
        (entries(height=28), "has 28 electrodes, expected 30 in the order Fp1 Fp2"),
        (entries(rate=256), "sampled at 256 Hz, expected 128 Hz: resample"),
        (entries(EEGsample=np.zeros((12, 30))), r"EEGsample has the shape \(12, 30\)"),
        (entries(substate=np.arange(12)), r"substate is 0 or 1, got \[0, 1, 2, 3, 4\]"),
        (entries(subindex=np.arange(5)), "subindex has 5 entries of type int64, expected 12"),
        (entries(subindex=np.full(12, 0.5)), "subindex has 12 entries of type float64"),
        (entries(EEGsample=np.full((12, 30, 384), np.nan)), "a value is not a number"),
        (
            entries(electrodes=np.array([f"E{i}" for i in range(30)])),
            "the electrodes Fp1, Fp2, F7, F3, Fz, F4 are missing of the 30",
        ),
        (entries(electrodes=np.array(ELECTRODES[:29])), "29 names for 30 electrodes: name each"),
    ],
)
def test_wrong_files_of_windows_are_refused(tmp_path, content, words):
    np.savez(tmp_path / "a.npz", **content)
    with pytest.raises(DataError, match=words):
        read_mat(tmp_path / "a.npz")


def test_missing_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"dataset\.mat: no such file"):
        load_data("eeg-mat", tmp_path)
    (tmp_path / "dataset.mat").write_bytes(b"no matrix")
    with pytest.raises(DataError, match=r"dataset\.mat: not a readable file of windows"):
        load_data("eeg-mat", tmp_path)
    with pytest.raises(UsageError, match=r"give data\.root"):
        load_data("eeg-mat")
    np.savez(tmp_path / "one.npz", **entries(4))
    with pytest.raises(UsageError, match="the only one: it has 1, and two are needed"):
        load_data("eeg-mat", tmp_path, options={"file": "one.npz"})
    np.savez(tmp_path / "a.npz", **entries())
    with pytest.raises(UsageError, match=r"held_out 9 is none of its 3 .*has 1, 2, 3,"):
        load_data("eeg-mat", tmp_path, options={"file": "a.npz", "held_out": 9})


def epochs(rate=128.0, names=ELECTRODES, events=("alert", "drowsy"), count=6):
    random = np.random.default_rng(1)
    codes = {name: number for number, name in enumerate(events, 1)}
    marks = np.arange(count) % 3 + 1  # of a third event, too, which is left out
    return SimpleNamespace(
        event_id={**codes, "blink": 3},
        events=np.stack([np.arange(count), np.zeros(count), marks], axis=1).astype(int),
        get_data=lambda: random.standard_normal((count, len(names), 384)),
        info={"sfreq": rate},
        ch_names=list(names),
    )


def test_epochs_are_taken_as_they_come():
    found = of_epochs(epochs(), subject=4)
    assert found.states.tolist() == [0, 1, 0, 1]
    assert found.subjects.tolist() == [4] * 4
    assert found.values.shape == (4, 30, 384)
    both = join([found, of_epochs(epochs(), subject=5)])
    assert len(both.values) == len(both.states) == 8
    assert {*both.subjects.tolist()} == {4, 5}
    with pytest.raises(DataError, match="windows of different shapes"):
        join([found, found._replace(values=found.values[..., :100])])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rate": 500.0}, "the epochs of subject 2: sampled at 500 Hz, expected 128 Hz"),
        ({"names": ELECTRODES[1:]}, "the electrodes Fp1 are missing"),
        ({"events": ("rest", "drowsy")}, "no event 'alert'; they have blink, drowsy, rest"),
    ],
)
def test_wrong_epochs_are_refused(changes, words):
    with pytest.raises(DataError, match=words):
        of_epochs(epochs(**changes), subject=2)


def test_folders_of_epochs_are_read(tmp_path):
    mne = pytest.importorskip("mne")
    with pytest.raises(UsageError, match=r"give data\.root"):
        load_data("eeg-epochs")
    with pytest.raises(DataError, match="has no files of epochs"):
        load_data("eeg-epochs", tmp_path)
    info = mne.create_info(list(reversed(ELECTRODES)), 128.0, "eeg")
    for number in range(3):
        made = np.full((6, 30, 384), number, float) + np.arange(30)[::-1, None]
        marks = np.stack([np.arange(6), np.zeros(6), np.arange(6) % 2], axis=1).astype(int)
        each = mne.EpochsArray(
            made, info, marks, event_id={"alert": 0, "drowsy": 1}, verbose="error"
        )
        each.save(tmp_path / f"s{number}-epo.fif", verbose="error", overwrite=True)
    data = load_data("eeg-epochs", tmp_path, options={"held_out": 2})
    assert data.test.labels.tolist() == [0, 1] * 3
    wanted = torch.arange(30.0)[:, None].expand(30, 384) + 1
    assert torch.allclose(data.test.images[0, 0], wanted)
    assert len(data.train) + len(data.validation) == 12
