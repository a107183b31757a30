"""Searches: each is a function of its settings and its trials, whenever it was stopped."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smallfry.errors import RunError, UsageError
from smallfry.search import (
    NARS,
    RUNG,
    TPE,
    Choice,
    Evolution,
    Halving,
    Ledger,
    Listed,
    RandomSearch,
    Trial,
    encode,
    replay,
    run,
)
from smallfry.search.ledger import best
from smallfry.search.space import key_of

CHOICES = (
    Choice("family", ("loopnet", "cct")),
    Choice("width", (0.25, 0.5, 1.0)),
    Choice("heads", (2, 4), when={"family": ["cct"]}),
    Choice("lr", low=0.01, high=1.0, log=True),
    Choice("depth", low=1, high=4, whole=True),
)
LISTED = [{"family": "loopnet", "width": width} for width in (0.25, 0.5, 0.7, 1.0, 1.4)]


def optuna_or_skip():
    pytest.importorskip("optuna", reason="TPE needs the extra search")


def tpe():
    optuna_or_skip()
    return TPE(CHOICES, 9, seed=3)


SEARCHES = {
    "listed": lambda: Listed(LISTED),
    "tpe": tpe,
    "halving": lambda: Halving(Listed(LISTED), keep=(3, 1)),
    "halving of tpe": lambda: Halving(tpe(), keep=(4, 2)),
}


def evaluate(candidate):
    value = -abs(candidate["width"] - 0.7) - abs(math.log10(candidate.get("lr", 0.1)) + 1)
    return Trial(candidate, value + candidate.get(RUNG, 0), cost={"kb": 80 * candidate["width"]})


@pytest.fixture(params=SEARCHES)
def make(request):
    return SEARCHES[request.param]


# Law of all searches


def test_a_search_that_was_stopped_asks_for_what_an_undisturbed_one_does(make, tmp_path):
    whole = run(make(), evaluate, Ledger(tmp_path / "whole.jsonl"))
    ledger = Ledger(tmp_path / "stopped.jsonl")
    left = (2, 1, 1)

    def stopped(candidate, budget):
        if budget["left"] == 0:
            raise KeyboardInterrupt
        budget["left"] -= 1
        return evaluate(candidate)

    for count in left:
        budget = {"left": count}
        with pytest.raises(KeyboardInterrupt):
            run(make(), lambda candidate, budget=budget: stopped(candidate, budget), ledger)
    assert run(make(), evaluate, ledger) == whole == ledger.read()
    assert ledger.file.read_text() == (tmp_path / "whole.jsonl").read_text()


def test_a_replayed_search_has_the_state_of_the_one_that_made_the_trials(make, tmp_path):
    search, again = make(), make()
    trials = run(search, evaluate, Ledger(tmp_path / "trials.jsonl"))
    replay(again, trials)
    assert again.ask(1) == []
    assert again.state_dict() == search.state_dict()
    json.dumps(search.state_dict())


def test_no_candidate_is_asked_for_twice_and_an_ended_search_asks_for_none(make, tmp_path):
    search = make()
    trials = run(search, evaluate, Ledger(tmp_path / "trials.jsonl"))
    keys = [key_of(trial.candidate) for trial in trials]
    assert len(keys) == len({*keys}) > 3
    assert search.ask(5) == []


def test_trials_of_another_search_are_refused(make):
    with pytest.raises(RunError, match="none of this search"):
        replay(make(), [Trial({"width": 77, RUNG: 0}, 1.0)])


# Halving


def test_the_best_of_each_rung_go_on_and_equals_in_the_order_they_ended(tmp_path):
    values = {0.25: 1.0, 0.5: 2.0, 0.7: 2.0, 1.0: None, 1.4: 0.5}

    def judge(candidate):
        return Trial(candidate, values[candidate["width"]])

    trials = run(Halving(Listed(LISTED), keep=(3, 1)), judge, Ledger(tmp_path / "t.jsonl"))
    rungs = [[t.candidate["width"] for t in trials if t.candidate[RUNG] == r] for r in range(3)]
    assert rungs == [[0.25, 0.5, 0.7, 1.0, 1.4], [0.5, 0.7, 0.25], [0.5]]


def test_a_rung_waits_for_all_trials_of_the_one_before():
    search = Halving(Listed(LISTED[:2]), keep=(1,))
    asked = search.ask(8)
    search.tell([evaluate(asked[0])])
    assert search.ask(1) == []
    search.tell([evaluate(asked[1])])
    assert search.ask(8) == [{**LISTED[1], RUNG: 1}]


def test_if_all_of_a_rung_failed_the_search_ends():
    search = Halving(Listed(LISTED[:2]), keep=(1,))
    search.tell([Trial(each, None, failure="diverged") for each in search.ask(2)])
    assert search.ask(1) == []


@pytest.mark.parametrize("keep", [(0,), (1, 2)])
def test_rungs_that_grow_or_have_no_candidates_are_refused(keep):
    with pytest.raises(UsageError, match="falling"):
        Halving(Listed(LISTED), keep)


def test_a_trial_that_was_not_asked_for_is_refused():
    for search in (Halving(Listed(LISTED), ()), SEARCHES["tpe"]()):
        with pytest.raises(UsageError, match="not asked for"):
            search.tell([Trial({"width": 3, RUNG: 0}, 1.0)])


# TPE


def test_tpe_finds_better_candidates_than_chance(tmp_path):
    optuna_or_skip()
    trials = run(TPE(CHOICES, 30, seed=0), evaluate, Ledger(tmp_path / "t.jsonl"))
    early, late = trials[:10], trials[20:]
    assert sum(t.value for t in late) > sum(t.value for t in early)


def test_tpe_ends_when_all_candidates_of_a_small_space_are_known(tmp_path):
    optuna_or_skip()
    small = TPE([Choice("width", (0.5, 1.0))], 50)
    trials = run(small, evaluate, Ledger(tmp_path / "t.jsonl"))
    assert {trial.candidate["width"] for trial in trials} == {0.5, 1.0}


def test_a_conditional_choice_is_there_exactly_under_its_condition():
    optuna_or_skip()
    for candidate in TPE(CHOICES, 12).ask(12):
        assert ("heads" in candidate) == (candidate["family"] == "cct")
        assert 0.01 <= candidate["lr"] <= 1
        assert candidate["depth"] in range(1, 5)


@pytest.mark.parametrize(("choices", "count"), [((), 3), (CHOICES, 0)])
def test_tpe_without_choices_or_candidates_is_refused(choices, count):
    optuna_or_skip()
    with pytest.raises(UsageError, match="tpe needs"):
        TPE(choices, count)


# Spaces


@given(st.floats(0.01, 1.0))
@settings(max_examples=20)
def test_encodings_are_ones_for_values_and_shares_for_ranges(lr):
    code = encode(CHOICES, {"family": "cct", "width": 0.5, "heads": 4, "lr": lr, "depth": 4})
    assert code[:7].tolist() == [0, 1, 0, 1, 0, 0, 1]
    assert code[7] == pytest.approx(1 + math.log10(lr) / 2, abs=1e-6)
    assert code[8] == 1
    assert encode(CHOICES, {"family": "loopnet", "width": 1.0}).tolist() == [
        1,
        0,
        0,
        0,
        1,
        0,
        0,
        0,
        0,
    ]


@pytest.mark.parametrize(
    "settings_of_choice",
    [
        {},
        {"values": (1,), "low": 0, "high": 1},
        {"low": 1.0},
        {"low": 2, "high": 1},
        {"low": 0, "high": 1, "log": True},
    ],
)
def test_choices_of_nothing_or_of_two_kinds_are_refused(settings_of_choice):
    with pytest.raises(UsageError, match="choice width"):
        Choice("width", **settings_of_choice)


@pytest.mark.parametrize("value", ["high", True])
def test_the_value_of_a_trial_is_a_number_or_none(value):
    with pytest.raises(UsageError, match="value must be"):
        Trial({"width": 0.5}, value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_that_of_a_failed_trial(value):
    trial = Trial({"width": 0.5}, value)
    assert (trial.value, trial.failure) == (None, f"its value is {value}")
    assert Trial({"width": 0.5}, value, failure="diverged").failure == "diverged"


STRATEGIES = {
    "listed": lambda: Listed(LISTED),
    "halving": lambda: Halving(Listed(LISTED), [2]),
    "random": lambda: RandomSearch(CHOICES, count=4),
    "evolution": lambda: Evolution(CHOICES, count=4),
    "nars": lambda: NARS(CHOICES[:2], CHOICES[3:], count=4),
    "tpe": tpe,
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_is_asked_for_a_number_and_told_trials(strategy):
    search = STRATEGIES[strategy]()
    with pytest.raises(UsageError, match="count of candidates can't be negative, got -1"):
        search.ask(-1)
    with pytest.raises(UsageError, match=r"count must be a whole number, not 1.5"):
        search.ask(1.5)
    (candidate,) = search.ask(1)
    for wrong in (Trial(candidate, 1.0), [candidate]):
        with pytest.raises(UsageError, match="tell takes a list of Trial"):
            search.tell(wrong)
    search.tell([Trial(candidate, 1.0)])


def test_no_candidates_are_no_search():
    with pytest.raises(UsageError, match="at least one"):
        Listed([])


# Ledger


def test_a_ledger_keeps_trials_whole_and_names_the_line_that_is_none(tmp_path):
    ledger = Ledger(tmp_path / "trials.jsonl")
    trial = Trial({"width": 0.5}, 0.9, 3, {"kb": 1.5}, 2.0, {"epochs": 3}, None)
    ledger.append(trial)
    ledger.append(Trial({"width": 1.0}, None, failure="diverged", measured={"loss": math.nan}))
    assert ledger.read()[0] == trial
    assert ledger.read()[1].measured == {"loss": None}
    assert best(ledger.read()) == trial
    assert best([]) is None
    with open(ledger.file, "a") as stream:
        stream.write('{"candidate": {}, "value": "high"}\n')
    with pytest.raises(RunError, match=r"line 3: not a trial"):
        ledger.read()


def test_asking_a_halving_for_nothing_ends_nothing():
    search = Halving(Listed(LISTED), keep=(1,))
    assert search.ask(0) == []
    assert len(search.ask(len(LISTED))) == len(LISTED)
    assert search.ask(0) == []
