"""Spiking neurons and their plasticity, against a simulator's values and closed forms."""

import numpy as np
import pytest

from smallfry.kits.places.neurons import Layer, Plasticity, normalise_weights

SPIKES = [
    *((89.0, 3), (105.7, 2), (122.7, 1), (141.8, 0), (156.5, 3), (176.2, 2), (196.2, 1)),
    *((214.2, 3), (233.1, 0), (249.6, 2), (270.3, 1), (283.2, 3), (309.4, 2), (326.1, 0)),
    (342.8, 3),
]
SUMS = [6.843225224, 7.310289591, 7.630664682, 8.131559807]
THETA = [20.149298269, 20.14929771, 20.199297219, 20.249296693]
VOLTAGES = [-61.354225, -54.612761, -57.91533, -64.380508]
NONE = np.zeros((1, 1), np.bool_)


def test_a_network_fires_and_learns_as_the_authors_simulator():
    inputs, neurons, dt = 30, 4, 0.1
    i, j = np.mgrid[:inputs, :neurons]
    weights = 0.3 * (0.5 + 0.5 * ((7 * i + 3 * j) % 11) / 10) * (1 + 0.06 * j)
    weights = np.minimum(1, weights)[None]
    synapses = Plasticity(weights, dt, delays=((17 * (4 * i + j)) % 100)[None])
    coming = np.zeros((3500, 1, inputs), np.bool_)
    for number in range(inputs):
        for m in range(34):
            coming[round((5 + 10 * m + 0.1 * ((37 * number) % 97)) / dt), 0, number] = True
    layer = Layer((1, neurons), dt)
    fired, inhibited = [], []
    for step in range(3500):
        spikes, inhibitory = layer.advance()
        layer.ge_e += synapses.arrive(step, coming[step])
        synapses.fire(step, spikes)
        layer.reset(spikes, inhibitory)
        fired += [(round(step * dt, 1), int(n)) for n in np.flatnonzero(spikes)]
        inhibited += [(round(step * dt, 1), int(n)) for n in np.flatnonzero(inhibitory)]
    assert fired == SPIKES
    assert inhibited == [(round(time + 0.5, 1), neuron) for time, neuron in SPIKES]
    assert weights[0].sum(axis=0) == pytest.approx(SUMS, abs=1e-9)
    assert layer.thresholds[0] == pytest.approx(THETA, abs=1e-9)
    assert layer.v_e[0] == pytest.approx(VOLTAGES, abs=1e-6)  # as many digits as are given


def driven(conductance, dt, steps, start=-65.0):
    """Return the steps of the spikes of a neuron under a constant conductance, θ frozen."""
    layer = Layer((1,), dt, theta_step=0.0)
    layer.v_e[:], layer.timer[:] = start, 6.0
    found, voltages = [], []
    for step in range(steps):
        layer.ge_e[:], layer.gi_e[:] = conductance, 0.0
        spikes, inhibitory = layer.advance()
        voltages.append(float(layer.v_e[0]))
        layer.reset(spikes, inhibitory)
        found += [step] if spikes.any() else []
    return found, voltages


@pytest.mark.parametrize(
    ("conductance", "rest", "time"),
    [(0.5, -43.333333333, 61.086048792), (1.0, -32.5, 25.541281188), (2.5, -18.571428571, None)],
)
def test_a_neuron_charges_exponentially(conductance, rest, time):
    tau = 100 / (1 + conductance)
    assert -65 / (1 + conductance) == pytest.approx(rest)
    wanted = tau * np.log((-65 - rest) / (-52 - rest))
    assert wanted == pytest.approx(9.385830485 if time is None else time)
    found, voltages = driven(conductance, 0.01, 8000)
    assert found[0] * 0.01 == pytest.approx(wanted, abs=0.05)
    at = round(wanted / 2 / 0.01)
    exact = rest + (-65 - rest) * np.exp(-(at + 1) * 0.01 / tau)
    assert voltages[at] == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize(("conductance", "interval"), [(0.5, 66.0), (2.5, 50.1)])
def test_a_neuron_is_locked_for_fifty_milliseconds(conductance, interval):
    found, _ = driven(conductance, 0.1, 4000)
    assert np.diff(found) * 0.1 == pytest.approx(interval, abs=0.11)


def test_a_spike_excites_its_partner_which_inhibits_all_others():
    layer = Layer((2, 3), 0.1)
    layer.v_e[1, 0], layer.timer[1, 0] = -30.0, 6.0
    layer.v_i[0, 2] = -30.0
    spikes, inhibitory = layer.advance()
    assert spikes.tolist() == [[False] * 3, [True, False, False]]
    assert inhibitory.tolist() == [[False, False, True], [False] * 3]
    layer.reset(spikes, inhibitory)
    assert layer.ge_i.tolist() == [[0, 0, 0], [10.4, 0, 0]]
    assert layer.gi_e.tolist() == [[17, 17, 0], [0, 0, 0]]
    assert layer.v_e[1, 0] == -65
    assert layer.v_i[0, 2] == -45
    assert layer.thresholds[1].tolist() == pytest.approx([20.05, 20, 20])
    before = layer.v_e[1, 0], layer.v_i[0, 2]
    for _ in range(10):
        layer.reset(*layer.advance())
    assert (layer.v_e[1, 0], layer.v_i[0, 2]) == before  # held


def test_one_pair_of_spikes_changes_a_weight_by_its_times():
    dt, first, arrival, second = 0.1, 100, 300, 450
    for delays in (None, np.zeros((1, 1, 1), np.int64)):
        weights = np.full((1, 1, 1), 0.2)
        synapses = Plasticity(weights, dt, delays=delays)
        for step in range(500):
            rise = synapses.arrive(step, NONE | (step == arrival))
            assert rise[0, 0] == (pytest.approx(0.2) if step == arrival else 0)
            synapses.fire(step, NONE | (step in (first, second)))
            if step == arrival:
                after = 1e-4 * np.exp(-(arrival - first) * dt / 20)
                assert weights.item() == pytest.approx(0.2 + after, abs=1e-15)
        rise = 0.01 * np.exp(-(second - arrival) * dt / 20) * np.exp(-(second - first) * dt / 40)
        assert weights.item() == pytest.approx(0.2 + after + rise, abs=1e-15)


def test_weights_stay_below_the_greatest_and_need_both_spikes():
    weights = np.full((1, 1, 1), 0.9999)
    synapses = Plasticity(weights, 0.1)
    synapses.fire(0, ~NONE)  # no input before
    assert weights.item() == 0.9999
    for step in range(1, 30):
        synapses.arrive(step, ~NONE)
        synapses.fire(step, ~NONE)
    assert weights.item() == 1
    frozen = np.full((1, 1, 1), 0.5)
    synapses = Plasticity(frozen, 0.1, learns=False)
    for step in range(5):
        synapses.arrive(step, ~NONE)
        synapses.fire(step, ~NONE)
    assert frozen.item() == 0.5


def test_delays_postpone_arrivals():
    weights = np.array([[[0.2, 0.4]]])
    synapses = Plasticity(weights, 0.1, delays=np.array([[[0, 3]]]), learns=False)
    rises = [synapses.arrive(step, np.array([[step == 2]]))[0].tolist() for step in range(7)]
    assert rises[2] == [0.2, 0]
    assert rises[5] == [0, 0.4]
    assert sum(map(sum, rises)) == pytest.approx(0.6)


def test_input_weights_sum_to_the_drive():
    weights = np.random.default_rng(0).random((2, 5, 3))
    ratio = weights[:, 0] / weights[:, 1]
    normalise_weights(weights)
    assert weights.sum(axis=1) == pytest.approx(np.full((2, 3), 78.0))
    assert weights[:, 0] / weights[:, 1] == pytest.approx(ratio)
