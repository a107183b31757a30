"""Two processes with half batches make the steps of one with the whole, whatever the method."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mixed_net import Net
from torch.nn import functional as F
from two_processes import run_pair

from smallfry.optim import EKFAC, KFAC, KPSVD, SNGD, Deflation, KFACCorrected
from smallfry.optim.distribution import (
    Cost,
    Machine,
    Traffic,
    assign,
    gradient_time,
    loads,
    refresh_time,
)

pytestmark = pytest.mark.slow

STEPS = 20
BATCH = 16
SETTINGS = {"damping": 0.1, "statistics_every": 3, "inverse_every": 4, "burn_in": 3}
CASES = {
    "kfac": (KFAC, SETTINGS),
    "kfac, reduce": (KFAC, {**SETTINGS, "sharing": "reduce", "damping_split": "tikhonov"}),
    "kfac, rank": (KFAC, {**SETTINGS, "factor_rank": 2}),
    "kfac, few uses": (KFAC, {**SETTINGS, "max_rows": 16}),
    "kfac, empirical": (KFAC, {**SETTINGS, "fisher": "empirical"}),
    "kfac, quadratic": (KFAC, {**SETTINGS, "step_length": "quadratic", "adaptive_damping": True}),
    "ekfac": (EKFAC, SETTINGS),
    "ekfac, rank": (EKFAC, {**SETTINGS, "factor_rank": 1}),
    "ekfac, kpsvd": (EKFAC, {**SETTINGS, "basis": "kpsvd"}),
    "kpsvd": (KPSVD, SETTINGS),
    "deflation": (Deflation, SETTINGS),
    "corrected": (KFACCorrected, SETTINGS),
    "sngd": (SNGD, SETTINGS),
}


def batches():
    random = torch.Generator().manual_seed(3)
    x = torch.randn(3 * BATCH, 5, generator=random, dtype=torch.float64)
    y = (x @ torch.randn(5, 3, generator=random, dtype=torch.float64)).argmax(1)
    return list(zip(x.split(BATCH), y.split(BATCH), strict=True))


BATCHES = batches()


def build(case, **more):
    torch.manual_seed(0)
    model = Net().double()
    kind, settings = CASES[case]
    return model, kind(model, 0.05, **{**settings, **more})


def learn(model, optimizer, part, steps, start=0):
    losses = []
    for step in range(start, steps):
        x, y = BATCHES[step % len(BATCHES)]
        loss = F.cross_entropy(model(x[part]), y[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("distributed")
    torch.set_num_threads(1)
    model, optimizer = build("kfac")
    learn(model, optimizer, slice(None), STEPS)
    torch.save({"weights": model.state_dict(), "state": optimizer.state_dict()}, place / "alone.pt")
    run_pair("optim/optimizer_pair.py", place)
    return place


def load(folder, name):
    return torch.load(folder / name, weights_only=True)


def alike(found, expected, rtol=1e-6):
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=rtol, atol=1e-8, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_take_the_steps_of_one_with_the_whole_batch(folder, case):
    model, optimizer = build(case)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    learn(model, optimizer, slice(None), STEPS)
    found = load(folder, f"{case}-0.pt")
    assert any((before[name] - p).abs().max() > 1e-2 for name, p in found["weights"].items())
    alike(found["weights"], model.state_dict())
    assert found["state"]["counters"] == optimizer.state_dict()["counters"]


@pytest.mark.parametrize("case", CASES)
def test_after_20_steps_both_processes_hold_the_same_bits(folder, case):
    first, second = (load(folder, f"{case}-{rank}.pt") for rank in range(2))
    assert first["losses"] != second["losses"]  # of different images
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name
    for name, state in first["state"]["curvature"].items():
        other = second["state"]["curvature"][name]
        assert state.keys() == other.keys()
        for key, value in state.items():
            same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
            assert same(value, other[key]), (name, key)
    assert first["state"]["lambdas"] == second["state"]["lambdas"]


def test_what_two_saved_one_loads_and_what_one_saved_two_load(folder):
    whole, optimizer = build("kfac")
    learn(whole, optimizer, slice(None), 2 * STEPS)
    model, optimizer = build("kfac")
    saved = load(folder, "kfac-1.pt")
    model.load_state_dict(saved["weights"])
    optimizer.load_state_dict(saved["state"])
    learn(model, optimizer, slice(None), 2 * STEPS, STEPS)
    alike(model.state_dict(), whole.state_dict())
    for rank in range(2):
        alike(load(folder, f"continued-{rank}.pt"), whole.state_dict())


def test_process_group_false_leaves_each_process_its_own_model(folder):
    model, optimizer = build("kfac")
    learn(model, optimizer, slice(None), STEPS)
    for rank in range(2):
        alike(load(folder, f"apart-{rank}.pt"), model.state_dict())


def test_the_model_of_cost_foretells_the_bytes_that_are_sent(folder):
    for rank in range(2):
        for case in ("kfac", "kfac, rank", "ekfac"):
            facts = load(folder, f"bytes {case}-{rank}.pt")
            foretold = facts["foretold"].values()
            assert facts["wire"].get("reduce", 0) == sum(t[0] for t in foretold)
            assert facts["wire"]["broadcast"] == sum(t[1] for t in foretold)
            small = 8 * 24 * len(facts["owners"])  # traces, order of calls, numbers of samples
            assert 0 <= facts["wire"]["all_reduce"] - sum(t[3] for t in foretold) <= small
            assert "isend" not in facts["wire"]
            assert facts["counted"].get("summed for owners", 0) == facts["wire"].get("reduce", 0)
            assert facts["counted"]["spread by owners"] == facts["wire"]["broadcast"]
        facts = load(folder, f"bytes kpsvd-{rank}.pt")
        foreign = [t for name, t in facts["foretold"].items() if facts["owners"][name] != rank]
        assert foreign
        # rows = 8 is this process's half of the batch; the shared layer is used twice
        shared = "shared.weight" in {n for n in facts["owners"] if facts["owners"][n] != rank}
        twice = facts["foretold"]["shared.weight"][2] if shared else 0
        assert facts["wire"]["isend"] == sum(t[2] for t in foreign) + twice


def test_methods_that_need_all_samples_say_that_they_work_alone(folder):
    for name in ("ExactNG", "TwoLevel"):
        for rank in range(2):
            said = (folder / f"{name}-{rank}.txt").read_text()
            assert said.startswith(f"{name} works in one process only")


def test_a_wrong_loss_scale_in_one_process_stops_both(folder):
    said = [(folder / f"scale-{rank}.txt").read_text() for rank in range(2)]
    assert said[0].startswith("in another process the loss does not match")
    assert said[1].startswith("the loss is 8 times the mean")


@pytest.mark.parametrize("check", ["error", "off"])
def test_rows_that_one_process_lost_stop_both(folder, check):
    said = [(folder / f"overwritten {check}-{rank}.txt").read_text() for rank in range(2)]
    assert "was overwritten after the call" in said[1]
    assert said[0] == f"another process failed: {said[1]}"


def test_gradients_that_nobody_averaged_stop_both(folder):
    said = [(folder / f"apart-{rank}.txt").read_text() for rank in range(2)]
    assert any("the processes' gradients are not averaged" in each for each in said)


def test_targets_are_drawn_apart_where_drawing_for_all_takes_too_much(monkeypatch):
    monkeypatch.setattr("smallfry.curvature.observer.MOST_DRAWN", 0)
    found = []
    for rank in (0, 1, 1):
        model, optimizer = build("kfac")
        optimizer.observer.process = rank, 2
        learn(model, optimizer, slice(None), 1)
        found.append(optimizer.curvature["head.weight"]["g"])
    assert not torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])


def test_the_distribution_names_each_layer_once():
    _, optimizer = build("kfac")
    (share,) = optimizer.distribution().shares
    assert share.layers == ("first", "shared", "head")
    assert "GMAC" in str(optimizer.distribution())


# Dividing work, on paper

works = st.lists(st.integers(0, 10**6), min_size=1, max_size=40)


@given(works, st.integers(1, 9))
def test_every_block_has_one_owner_and_no_share_is_much_longer_than_it_must_be(costs, processes):
    owners = assign(costs, processes)
    assert len(owners) == len(costs)
    assert set(owners) <= set(range(processes))
    shares = loads(costs, owners, processes)
    assert sum(shares) == sum(costs)
    assert max(shares) <= sum(costs) / processes + max(costs) * (1 - 1 / processes) + 1e-6


@given(st.lists(st.integers(1, 30), min_size=1, max_size=7), st.integers(2, 3))
def test_the_longest_share_is_within_grahams_bound_of_the_best(costs, processes):
    best = {(0,) * processes}
    for cost in costs:
        best = {
            tuple(sorted((*each[:i], each[i] + cost, *each[i + 1 :])))
            for each in best
            for i in range(processes)
        }
    optimum = min(map(max, best))
    longest = max(loads(costs, assign(costs, processes), processes))
    assert longest <= (4 / 3 - 1 / (3 * processes)) * optimum + 1e-9


def test_time_on_paper_adds_up():
    machine = Machine(macs=100.0, solver_macs=10.0, bandwidth=1000.0, latency=0.5)
    costs = {
        "a": Cost(200, 40, Traffic(100, 200, 0, 50)),
        "b": Cost(0, 30, Traffic(0, 300, 400, 0)),
    }
    alone = refresh_time(costs, 1, machine)
    assert alone == (2.0, 7.0, 0.0, 0)
    two = refresh_time(costs, 2, machine, messages=3)
    # 100 + 500 over each link whole, of 2 · 50 + 400 the half that is another's
    assert two == (1.0, 4.0, 850 / 1000 + 3.0, 850)
    assert two.seconds == pytest.approx(8.85)
    assert gradient_time(1000, 2, machine) == pytest.approx(4.0 + 1.0)
    assert gradient_time(1000, 1, machine) == 0.0
