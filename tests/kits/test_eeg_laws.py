"""Laws of EEG windows, their network and their explanations, over random cases."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from smallfry.kits.eeg.electrodes import ELECTRODES, FRONTAL, TEMPORAL, positions_of
from smallfry.kits.eeg.explanation import explain
from smallfry.kits.eeg.models import InterpretableCNN
from smallfry.kits.eeg.spindles import RATE, SpindleSettings, draw_window
from smallfry.kits.eeg.statistics import freeze_statistics

SETTINGS = SpindleSettings(subjects=20, windows=40)


def network(seed, electrodes=4, samples=100, filters=3):
    torch.manual_seed(seed)
    made = InterpretableCNN(img_size=(electrodes, samples), filters=filters).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.5)
    return made


@pytest.mark.parametrize("seed", range(5))
def test_frozen_statistics_do_not_depend_on_how_windows_are_batched(seed):
    model, windows = network(seed), torch.randn(7, 4, 100, dtype=torch.float64)
    freeze_statistics(model, [windows])
    whole = model.norm.running_mean.clone(), model.norm.running_var.clone()
    freeze_statistics(model, windows.split([1, 4, 2]))
    assert_close((model.norm.running_mean, model.norm.running_var), whole)
    normed = model.features(windows).normed
    scale, shift = model.norm.weight, model.norm.bias
    assert_close(normed.mean((0, 2)), shift)
    deviation = normed.std((0, 2), unbiased=False)
    alive = whole[1] > 1e-3
    assert_close(deviation[alive], scale.abs()[alive], rtol=1e-2, atol=0)


@pytest.mark.parametrize("seed", range(5))
def test_the_logits_are_the_sum_of_the_evidence_over_time(seed):
    model, windows = network(seed), torch.randn(3, 4, 100, dtype=torch.float64)
    freeze_statistics(model, [windows])
    normed = model.features(windows).normed
    evidence = torch.einsum("sf,bft->bs", model.fc.weight, normed) / normed.shape[-1]
    assert_close(model(windows), evidence + model.fc.bias)


@pytest.mark.parametrize("seed", range(5))
def test_a_later_window_is_explained_later(seed):
    model = network(seed, samples=160)
    window = torch.zeros(2, 4, 160, dtype=torch.float64)
    bump = torch.randn(4, 12, dtype=torch.float64)
    window[0, :, 70:82], window[1, :, 80:92] = bump, bump
    freeze_statistics(model, [window])
    first, second = explain(model, window, torch.tensor([1, 1]))
    shifted = {(electrode, sample + 10) for electrode, sample in first.points.tolist()}
    inside = {point for point in shifted if 42 <= point[1] < 160 - 32}
    assert len(inside & {*map(tuple, second.points.tolist())}) >= 0.9 * len(inside)


@pytest.mark.parametrize("seed", range(5))
def test_heat_is_a_sum_of_bells_around_its_points(seed):
    model, window = network(seed), torch.randn(1, 4, 100, dtype=torch.float64)
    ((heat, points),) = explain(model, window, torch.tensor([0]))
    wanted = np.zeros((4, 100))
    for electrode, sample in points.tolist():
        for at in range(max(0, sample - 32), min(100, sample + 32)):
            wanted[electrode, at] += np.exp(-((at - sample) ** 2) / (2 * 32**2))
    wanted /= 32 * np.sqrt(2 * np.pi)
    scale = np.sqrt((wanted**2).mean())
    assert heat == pytest.approx((wanted - wanted.mean()) / scale, abs=1e-9)


@pytest.mark.parametrize("subject", range(1, 11))
def test_spindles_have_the_subjects_own_rate(subject):
    rates = []
    for number in range(1, 40, 2):
        window = draw_window(SETTINGS, subject, number)
        rows, columns = window.mask.any(axis=1), window.mask.any(axis=0)
        power = np.abs(np.fft.rfft(window.values[rows][:, columns].mean(axis=0), 4096)) ** 2
        found = np.fft.rfftfreq(4096, 1 / RATE)
        inside = (found > 6) & (found < 14)
        rates.append(found[inside][power[inside].argmax()])
    assert 8 < np.median(rates) < 12
    assert np.quantile(rates, 0.75) - np.quantile(rates, 0.25) < 1.5


def test_alert_windows_have_blinks_and_bursts_at_times():
    front = [ELECTRODES.index(name) for name in FRONTAL]
    side = [ELECTRODES.index(name) for name in TEMPORAL]
    blinks = bursts = 0
    for subject in range(1, 11):
        for number in range(0, 40, 2):
            values = draw_window(SETTINGS, subject, number).values
            blinks += values[front].mean(axis=0).max() > 2
            power = np.abs(np.fft.rfft(values[side], axis=1)) ** 2
            rates = np.fft.rfftfreq(384, 1 / RATE)
            share = power[:, (rates > 19) & (rates < 31)].sum() / power.sum()
            bursts += share > 0.35
    assert 0.2 < blinks / 200 < 0.4
    assert 0.1 < bursts / 200 < 0.35


def test_electrodes_lie_on_both_sides_alike():
    places = dict(zip(ELECTRODES, positions_of(ELECTRODES).tolist(), strict=True))
    pairs = {"Fp1": "Fp2", "F7": "F8", "F3": "F4", "FT7": "FT8", "FC3": "FC4", "T3": "T4"}
    pairs |= {"C3": "C4", "TP7": "TP8", "CP3": "CP4", "T5": "T6", "P3": "P4", "O1": "O2"}
    for left, right in pairs.items():
        assert places[left] == [-places[right][0], places[right][1]]
    assert all(places[name][0] == 0 for name in ("Fz", "FCz", "Cz", "CPz", "Pz", "Oz"))
    assert len(ELECTRODES) == 30
