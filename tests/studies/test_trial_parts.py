"""Parts of a trial: batches, evaluation times, losses, sizes, and the settings of a search."""

from dataclasses import replace
from itertools import islice, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from smallfry.studies import trial
from smallfry.studies.contestants import CONTESTANTS, propose
from smallfry.studies.problems import PROBLEMS, Examples
from smallfry.studies.trial import Job, Resources

CPU = torch.device("cpu")


def taken(count, size, seed, batches):
    return [rows.tolist() for rows in islice(trial._batches(count, size, seed, CPU), batches)]


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 5))
def test_an_epoch_has_full_batches_of_different_images(count, size, seed):
    per_epoch = max(1, count // size)
    epoch = taken(count, size, seed, per_epoch)
    assert {len(batch) for batch in epoch} == {min(size, count)}
    rows = [row for batch in epoch for row in batch]
    assert len(rows) == len({*rows})
    assert {*rows} <= {*range(count)}


def test_batches_follow_the_seed_and_change_from_epoch_to_epoch():
    first, again, other = (taken(12, 4, seed, 6) for seed in (0, 0, 1))
    assert first == again != other
    assert first[:3] != first[3:]
    assert sorted(row for batch in first[:3] for row in batch) == list(range(12))


@given(st.floats(0.1, 1e4), st.integers(1, 30))
def test_evaluations_are_denser_at_the_start(seconds, count):
    moments = trial._moments(seconds, count)
    assert len(moments) == count + 1
    assert moments[0] == 0
    assert moments[-1] == pytest.approx(seconds)
    gaps = [after - before for before, after in pairwise(moments)]
    assert gaps == sorted(gaps)


def test_the_loss_of_a_split_is_the_mean_over_its_first_examples(monkeypatch):
    monkeypatch.setattr(trial, "EVALUATED", 25)
    monkeypatch.setattr(trial, "BATCH", 10)
    torch.manual_seed(0)
    pixels = torch.randint(256, (40, 1, 2, 2), dtype=torch.uint8)
    examples = Examples(pixels, torch.randint(3, (40,)), 0.5, 0.25)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 3))
    problem = replace(PROBLEMS["convnet"], build=lambda: model)
    found = trial._evaluate(model, problem, examples)
    assert model.training
    inputs = (pixels[:25].float() / 255 - 0.5) / 0.25
    with torch.no_grad():
        expected = F.cross_entropy(model.eval()(inputs), examples.labels[:25])
    assert found == pytest.approx(expected.item(), rel=1e-5)


def test_inputs_are_their_own_targets_where_they_are_reconstructed():
    examples = Examples(torch.arange(16, dtype=torch.uint8).view(4, 1, 2, 2), torch.arange(4), 0, 1)
    rows = torch.tensor([2, 0])
    inputs, targets = examples.batch(rows, reconstruct=True)
    assert torch.equal(targets, inputs.flatten(1))
    assert inputs[1].flatten().tolist() == pytest.approx([0, 1 / 255, 2 / 255, 3 / 255])
    assert examples.batch(rows, reconstruct=False)[1].tolist() == [2, 0]


def test_the_state_is_counted_in_bytes_wherever_it_is():
    state = {
        "state": {0: {"m": torch.zeros(3), "v": [torch.zeros(2, dtype=torch.float64)], "step": 1}},
        "groups": ({"lr": 0.1}, torch.zeros(1, dtype=torch.uint8)),
    }
    assert trial._state_bytes(state) == 12 + 16 + 1
    weight = nn.Parameter(torch.zeros(5))
    adamw = torch.optim.AdamW([weight])
    weight.sum().backward()
    adamw.step()
    assert trial._state_bytes(adamw.state_dict()) == 2 * 20 + 4


def test_a_trial_is_known_by_everything_but_its_settings():
    job = Job("tuned", "curves", "kfac", {"lr": 0.1}, 3, 5, 10.0)
    assert job.key == ("tuned", "curves", "kfac", 3, 5)
    assert replace(job, settings={"lr": 9.0}, seconds=1.0).key == job.key
    assert replace(job, seed=4).key != job.key


@pytest.mark.parametrize(
    ("resources", "clock"),
    [
        (Resources(), "cpu"),
        (Resources(threads=2), "wall"),
        (Resources(device="cuda"), "wall"),
        (Resources(device="cuda", threads=4), "wall"),
    ],
)
def test_one_thread_is_measured_in_cpu_time(resources, clock):
    assert resources.clock == clock


def test_a_clock_never_goes_back():
    for resources in (Resources(), Resources(threads=2)):
        moments = [resources.now() for _ in range(3)]
        assert moments == sorted(moments)


@pytest.mark.parametrize("name", CONTESTANTS)
@pytest.mark.parametrize("trials", [1, 5])
def test_searches_begin_with_the_defaults_and_stay_in_their_ranges(name, trials):
    contestant = CONTESTANTS[name]
    proposed = propose(contestant, trials)
    assert len(proposed) == trials
    assert proposed[0] == dict(contestant.defaults)
    assert propose(contestant, trials) == proposed
    for settings in proposed[1:]:
        assert {*settings} == {*contestant.ranges}
        for setting, value in settings.items():
            low, high = contestant.ranges[setting]
            assert low * 0.995 <= value <= high * 1.005
            assert value == float(f"{value:.3g}")
    assert len({tuple(s.items()) for s in proposed}) == trials


def test_no_trials_are_proposed_where_none_are_wanted():
    assert propose(CONTESTANTS["adamw"], 0) == []


def test_more_trials_begin_as_fewer():
    few, more = (propose(CONTESTANTS["kfac"], trials) for trials in (3, 8))
    assert more[:3] == few
    rates = sorted(settings["lr"] for settings in more[1:])
    assert rates[-1] / rates[0] > 5  # spread on a logarithmic scale
