"""Budgets, plans and forms of a fit by brute force, and models that int8 makes slower."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smallfry.data import Split, load_data
from smallfry.deploy.targets import find_target
from smallfry.errors import RunError, UsageError
from smallfry.fitting import costs as costs_module
from smallfry.fitting import planning, verify
from smallfry.fitting.config import Budget, FitConfig
from smallfry.fitting.costs import Costs, build, measure_costs
from smallfry.fitting.folder import read_result, write_result
from smallfry.fitting.plan import Plan, Planned, affordable, read_plan, rung_counts, shares
from smallfry.fitting.planning import (
    NothingFits,
    choose_candidates,
    excess,
    find_pretrained,
    needed,
)
from smallfry.fitting.variants import MOST_PRUNED, find_variants, harder
from smallfry.fitting.verify import Verified, choose, measure, nearest
from smallfry.fitting.zoo import Entry, scaled
from smallfry.training.config import DataConfig
from smallfry.training.method import from_dict

TINY = "loopnet_70k"
ALL = ("float32", "int8", "own_bits")
SLOWER = Costs(70_000, 12_000_000, {"float32": 286.0, "int8": 78.0}, {"float32": 0.3, "int8": 0.6})
LIMITS = st.one_of(st.none(), st.floats(1e-3, 1e3))
POSITIVE = st.floats(1e-3, 1e3)


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", limit=60)


def planned(name="a", epoch=1.0, costs=SLOWER):
    return Planned(Entry(name, TINY, 1.0, "loopnet", {}), costs, epoch)


# Budgets


@given(LIMITS, LIMITS, POSITIVE, POSITIVE)
def test_the_excess_is_the_factor_by_which_both_limits_would_have_to_grow(kb, ms, size, time):
    budget = Budget(kb, ms)
    over = budget.excess(size, time)
    assert budget.fits(size, time) == ((kb is None or size <= kb) and (ms is None or time <= ms))
    if over > 1:
        grown = [None if limit is None else limit * over * (1 + 1e-12) for limit in budget]
        assert Budget(*grown).fits(size, time)
        less = [None if limit is None else limit * over * 0.999 for limit in budget]
        assert not Budget(*less).fits(size, time)


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (Budget(20, None), "20 kB"),
        (Budget(None, 0.5), "0.5 ms"),
        (Budget(1.5, 2), "1.5 kB and 2 ms"),
    ],
)
def test_a_budget_is_written_as_its_limits(budget, text):
    assert str(budget) == text


@given(POSITIVE, POSITIVE, POSITIVE, POSITIVE)
def test_what_is_needed_is_enough_and_no_more_than_a_hundredth_too_much(kb, ms, most_kb, most_ms):
    text = needed(kb, ms, Budget(most_kb, most_ms))
    words = {} if text == "nothing more" else dict(p.split() for p in text.split(" and "))
    assert {*words} == {
        name for name, beyond in (("--max_kb", kb > most_kb), ("--max_ms", ms > most_ms)) if beyond
    }
    for name, value in (("--max_kb", kb), ("--max_ms", ms)):
        if name in words:
            assert value <= float(words[name]) <= 1.011 * value


# int8 that is slower


def test_a_model_that_int8_makes_slower_is_pruned_by_the_time_that_int8_takes():
    # neither export fits: float32 is too large, and int8 too slow
    (pruned,) = [v for v in find_variants(SLOWER, Budget(100, 0.5), ALL) if v.kind == "hesso"]
    assert pruned.precision == "int8"
    sparsity = pruned.method["hesso"]["sparsity"]
    assert sparsity == pytest.approx(1 - math.sqrt(0.9 * 0.5 / 0.6), abs=1e-3)
    from_dict(pruned.method)  # which no sparsity of 0 would be worth


@given(st.floats(1, 77), st.floats(0.01, 2), st.floats(0.01, 2), st.floats(0.01, 2))
def test_whatever_does_not_fit_is_pruned_by_at_least_something(kb, ms, fast, slow):
    costs = replace(SLOWER, ms={"float32": fast, "int8": slow})
    budget = Budget(kb, ms)
    found = find_variants(costs, budget, ALL)
    plain = [p for p in ("int8", "float32") if budget.fits(costs.kb[p], costs.ms[p])]
    if plain:
        assert [v.name for v in found] == plain
        return
    assert found[0].kind == "hesso"
    assert 0 < found[0].method["hesso"]["sparsity"] <= MOST_PRUNED
    assert len({v.name for v in found}) == len(found)
    second = harder(found[0], 1.2)
    if second is not None:
        assert second.method["hesso"]["sparsity"] > found[0].method["hesso"]["sparsity"]


def test_the_nearest_is_described_by_the_export_that_comes_nearest(digits, monkeypatch):
    costs = Costs(10, 10, {"float32": 400.0, "int8": 80.0}, {"float32": 0.9, "int8": 1.9})
    monkeypatch.setattr(planning, "measure_costs", lambda *_: costs)
    config = FitConfig(max_kb=100, max_ms=1.0, candidates=(TINY,))
    with pytest.raises(NothingFits, match=r"has 80 kB and 1\.9 ms in int8, .* allow --max_ms 1\.9"):
        choose_candidates(config, digits, {}, lambda _: None)
    assert excess(costs, config.budget) == 1.9
    costs.kb["float32"] = 170.0  # now nearer than int8 is
    with pytest.raises(NothingFits, match=r"170 kB and 0\.9 ms in float32, .* --max_kb 170"):
        choose_candidates(config, digits, {}, lambda _: None)


# Choice

EXPORTS = st.lists(
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(0, 3), st.integers(0, 3)),
    max_size=6,
)


@given(EXPORTS, st.integers(1, 4), st.integers(1, 4))
def test_the_choice_and_the_nearest_are_those_of_a_search_through_all(exports, kb, ms):
    made = [
        Verified(f"e{n}", "r", "m", "int8", "int8", float(k), float(m), a / 3, loss / 3)
        for n, (k, m, a, loss) in enumerate(exports)
    ]
    budget = Budget(kb, ms)
    within = [e for e in made if e.kb <= kb and e.ms <= ms]
    chosen = choose(made, budget)
    if not within:
        assert chosen is None
    else:
        best = max((e.accuracy, -e.loss) for e in within)
        equals = [e for e in within if (e.accuracy, -e.loss) == best]
        assert chosen in equals
        assert chosen.kb == min(e.kb for e in equals)
    if made:
        least = min(max(e.kb / kb, e.ms / ms) for e in made)
        assert budget.excess(nearest(made, budget).kb, nearest(made, budget).ms) == least


# Plans


@given(
    st.integers(1, 9), st.floats(0.01, 500), st.lists(st.floats(0.01, 90), min_size=9, max_size=9)
)
def test_epochs_are_the_seconds_of_all_rungs_so_far_by_those_of_an_epoch(count, seconds, epochs):
    every = tuple(planned(str(n), epochs[n]) for n in range(count))
    plan = Plan(every, rung_counts(count), seconds, 0.0, 1, "abc", {})
    for each in every:
        spent, before = 0.0, 0
        for rung, (share, trained) in enumerate(
            zip(shares(len(plan.counts)), plan.counts, strict=True)
        ):
            spent += share * seconds / trained
            found = plan.epochs(each.name, rung)
            assert found >= before + 1
            if found > before + 1:
                assert abs(found - spent / each.epoch_seconds) <= 0.5 + 1e-6
            before = found


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=9), st.floats(0.1, 1000))
def test_candidates_are_affordable_if_half_an_epoch_is_in_the_first_rung(epochs, seconds):
    every, counts = [planned(str(n), e) for n, e in enumerate(epochs)], rung_counts(len(epochs))
    each = shares(len(counts))[0] * seconds / counts[0]
    wanted = [c.name for c in every if c.epoch_seconds <= 2 * each]
    if not wanted:
        with pytest.raises(UsageError, match="minutes are too few") as error:
            affordable(every, counts, seconds, 3.0)
        needs = float(str(error.value).split("needs about ")[1].split(":")[0])
        more = affordable(every, counts, seconds * (needs + 1e-9) / 3.0, needs)[0]
        assert min(every, key=lambda c: c.epoch_seconds) in more
        return
    kept, reasons = affordable(every, counts, seconds, 3.0)
    assert [c.name for c in kept] == wanted
    assert {*reasons} == {c.name for c in every} - {*wanted}


@pytest.mark.parametrize(
    "change",
    [
        {"counts": []},
        {"counts": [2, 0]},
        {"counts": ["2"]},
        {"counts": [4, 3, 2, 1]},
        {"counts": 3},
        {"candidates": []},
        {"candidates": [{"entry": {}, "costs": {}, "epoch_seconds": 1}]},
        {"candidates": "none"},
        {"epoch_seconds": 0.0},
        {"epoch_seconds": None},
        {"epoch_seconds": "1"},
        {"threads": None, "more": 3},
    ],
)
def test_a_plan_that_was_altered_is_damaged(change, tmp_path):
    plan, file = Plan((planned(),), (1,), 10.0, 0.0, 1, "abc", {}), tmp_path / "plan.json"
    plan.write(file)
    assert read_plan(file) == plan
    content = json.loads(file.read_text())
    if "epoch_seconds" in change:
        content["candidates"][0] |= change
    else:
        content |= change
    file.write_text(json.dumps(content))
    with pytest.raises(RunError, match=r"plan\.json: damaged .* remove it and the runs beside it"):
        read_plan(file)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.99])
def test_a_plan_or_a_result_cut_anywhere_is_damaged(share, tmp_path):
    Plan((planned(),), (1,), 10.0, 0.0, 1, "abc", {}).write(tmp_path / "plan.json")
    write_result(FitConfig(max_kb=3), tmp_path, {"met": True})
    for name in ("plan.json", "fit.json"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(RunError, match=r"plan\.json: damaged"):
        read_plan(tmp_path / "plan.json")
    with pytest.raises(RunError, match=r"fit\.json: damaged"):
        read_result(FitConfig(max_kb=3), tmp_path)


def test_a_fit_goes_on_from_another_working_directory(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    (tmp_path / "other" / "photos").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = FitConfig(DataConfig("photos"), max_kb=3)
    write_result(config, tmp_path, {"met": True})
    assert read_result(replace(config, data=DataConfig("./photos/")), tmp_path) == {"met": True}
    monkeypatch.chdir(tmp_path / "other")
    moved = replace(config, data=DataConfig("../photos"))
    assert read_result(moved, tmp_path) == {"met": True}
    with pytest.raises(UsageError, match=f"data.name {tmp_path}/photos, not {tmp_path}/other/ph"):
        read_result(config, tmp_path)


def test_a_fit_of_before_a_setting_goes_on_with_its_default_alone(tmp_path):
    config = FitConfig(max_kb=3, data=replace(FitConfig().data, root=Path("here")))
    write_result(config, tmp_path, {"met": False})
    content = json.loads((tmp_path / "fit.json").read_text())
    del content["settings"]["search"]
    (tmp_path / "fit.json").write_text(json.dumps(content))
    moved = replace(config, data=replace(config.data, root=Path("there")))
    assert read_result(moved, tmp_path) == {"met": False}
    with pytest.raises(UsageError, match="a fit with search listed, not tpe"):
        read_result(replace(config, search="tpe"), tmp_path)
    with pytest.raises(UsageError, match="a fit with min_accuracy none, not 50"):
        read_result(replace(config, min_accuracy=50.0), tmp_path)
    content["settings"]["gone"] = 3  # of a version that had more
    (tmp_path / "fit.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="a fit with gone 3, not none"):
        read_result(config, tmp_path)


# Starts, costs and answers


def test_two_models_to_start_from_need_different_names(digits, tmp_path, monkeypatch):
    trained = build(Entry(TINY, TINY, 0.25, "loopnet", scaled(TINY, 0.25)), digits)
    other = trained._replace(manifest=trained.manifest | {"data": {"name": "letters"}})
    monkeypatch.setattr(planning, "load_trained", lambda path: other)
    config = FitConfig(pretrained=(tmp_path / "a" / "best", tmp_path / "b" / "best"))
    with pytest.raises(UsageError, match=r"two models to start from are named best.*rename"):
        find_pretrained(config, digits)
    found, left_out = find_pretrained(replace(config, pretrained=(tmp_path / "a",)), digits)
    assert (found, left_out) == ({"a": (tmp_path / "a").resolve()}, {})


def test_costs_are_measured_without_a_place_to_keep_them_and_again_if_they_are_damaged(
    digits, tmp_path, monkeypatch
):
    exported = []

    def export(trained, facts, folders, data, target):
        exported.append(target)

    def runtime(folder, threads):
        return SimpleNamespace(file_bytes=4000 if folder.name == "int8" else 12_000)

    monkeypatch.setattr(costs_module, "export_precisions", export)
    monkeypatch.setattr(costs_module, "Runtime", runtime)
    monkeypatch.setattr(costs_module, "latency", lambda *_: 0.5)
    entry, target = Entry(TINY, TINY, 0.25, "loopnet", scaled(TINY, 0.25)), find_target("onnx")
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("SMALLFRY_CACHE", str(tmp_path / "file" / "cache"))
    first = measure_costs(entry, digits, target)
    assert (first.kb, first.ms["int8"]) == ({"float32": 12.0, "int8": 4.0}, 0.5)
    monkeypatch.setenv("SMALLFRY_CACHE", str(tmp_path / "cache"))
    assert measure_costs(entry, digits, target) == first
    assert len(exported) == 2
    (file,) = (tmp_path / "cache").rglob("*.json")
    whole = file.read_text()
    content = json.loads(whole)
    damaged = [
        whole[:-9], json.dumps(content | {"kb": {"int8": 4.0}}),
        json.dumps(content | {"ms": {"float32": 0.5, "int8": 0}}),
        json.dumps(content | {"macs": "many"}), json.dumps(content | {"more": 1}), "\udcff",
    ]  # fmt: skip
    for text in damaged:
        file.write_bytes(text.encode(errors="surrogateescape"))
        before = len(exported)
        assert measure_costs(entry, digits, target) == first
        assert len(exported) == before + 1
        assert file.read_text() == whole
    measure_costs(entry, digits, target)
    assert len(exported) == 2 + len(damaged)


@pytest.mark.parametrize("wrong", [math.nan, -1.0])
def test_an_export_that_answers_no_numbers_is_refused(wrong, monkeypatch):
    monkeypatch.setattr(verify, "latency", lambda *_: 0.25)
    images = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    split = Split(images, torch.arange(3), torch.tensor([0, 1, 1]))
    answers = np.full((3, 2), 0.5, np.float32)
    answers[1] = wrong
    answering = SimpleNamespace(
        manifest=SimpleNamespace(exits=(), recursion_steps=None),
        file_bytes=1,
        predict=lambda images, threshold=None: SimpleNamespace(probabilities=answers),
    )
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(RunError, match="its loss on the validation images is nan"),
    ):
        measure(answering, SimpleNamespace(validation=split), Budget(20, 2))
