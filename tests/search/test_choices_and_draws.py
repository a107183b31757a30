"""Choices of a space and the candidates drawn of them: whole ranges, bounds, and wrong input."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smallfry.errors import UsageError
from smallfry.search import Choice, Evolution, Ledger, RandomSearch, Trial, encode, run
from smallfry.search.predictor import features
from smallfry.search.sampling import (
    all_candidates,
    crossover,
    draw,
    from_units,
    is_ordered,
    mutate,
    new_candidate,
    sample,
)
from smallfry.search.settings_space import read_settings_space
from smallfry.search.space import key_of

LAST = math.nextafter(1.0, 0.0)  # the greatest number that a generator gives
CONDITIONAL = (
    Choice("family", ("loopnet", "cct", "resnet")),
    Choice("heads", (2, 4), when={"family": ["cct"]}),
    Choice("dim", (8, 16), when={"heads": [4]}),
    Choice("depth", low=1, high=3, whole=True, when={"family": ["cct", "resnet"]}),
)


# Draws


@pytest.mark.parametrize(("low", "high"), [(-3, 3), (-5, -2), (0, 1), (2, 9), (-1, 0)])
def test_whole_numbers_of_a_range_are_equally_likely_below_zero_too(low, high):
    choice, count = Choice("n", low=low, high=high, whole=True), high - low + 1
    units = (np.arange(100 * count) + 0.5) / (100 * count)
    found = Counter(draw(choice, unit) for unit in units)
    assert found == dict.fromkeys(range(low, high + 1), 100)
    assert (draw(choice, 0.0), draw(choice, LAST)) == (low, high)
    assert all(type(value) is int for value in found)


@pytest.mark.parametrize(("low", "high"), [(1, 8), (3, 9), (1, 1000), (7, 8)])
def test_whole_numbers_of_a_logarithmic_range_have_the_shares_of_their_logarithms(low, high):
    choice = Choice("n", low=low, high=high, whole=True, log=True)
    total = 20_000
    found = Counter(draw(choice, (unit + 0.5) / total) for unit in range(total))
    assert {*found} <= set(range(low, high + 1))
    for value in range(low, min(high, low + 5) + 1):
        share = math.log((value + 1) / value) / math.log((high + 1) / low)
        assert found[value] / total == pytest.approx(share, abs=2 / total)
    assert draw(choice, LAST) == high


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.sampled_from([0.0, 0.5, LAST]), st.booleans())
def test_reals_stay_within_their_range_to_the_last_bit(low, width, unit, log):
    low = abs(low) + 1e-9 if log else low
    choice = Choice("x", low=low, high=low + width, log=log)
    assert low <= draw(choice, unit) <= low + width
    assert draw(choice, 0.0) == low


def test_a_range_is_drawn_evenly_over_what_it_is_spread_over():
    plain, logarithmic = (Choice("x", low=0.01, high=1.0, log=log) for log in (False, True))
    assert draw(plain, 0.5) == pytest.approx(0.505)
    assert draw(logarithmic, 0.5) == pytest.approx(0.1)
    for choice in (plain, logarithmic):
        (back,) = choice.encode(draw(choice, 0.3))
        assert back == pytest.approx(0.3)


# Lists of candidates


def listed(choices):
    """All candidates by recursion, as the definition has them."""

    def options(choice):
        return choice.values or range(int(choice.low), int(choice.high) + 1)

    def rest(number, known):
        if number == len(choices):
            return [known]
        choice = choices[number]
        if not all(known.get(name) in values for name, values in choice.when.items()):
            return rest(number + 1, known)
        return [c for v in options(choice) for c in rest(number + 1, {**known, choice.name: v})]

    return rest(0, {})


def test_a_space_with_conditions_on_conditions_is_listed_completely():
    found, expected = all_candidates(CONDITIONAL, 100), listed(CONDITIONAL)
    assert sorted(map(key_of, found)) == sorted(map(key_of, expected))
    assert len(found) == 1 + (1 + 2) * 3 + 3
    assert all_candidates(CONDITIONAL, len(found)) == found
    assert all_candidates(CONDITIONAL, len(found) - 1) is None


def test_a_range_of_a_billion_numbers_is_neither_listed_nor_copied():
    choice = Choice("n", low=1, high=10**12, whole=True)
    assert all_candidates([Choice("a", (1, 2)), choice], 4096) is None
    generator = np.random.default_rng(0)
    for _ in range(20):
        child = mutate([choice], {"n": 10**11}, generator)
        assert child["n"] != 10**11
        assert 1 <= child["n"] <= 10**12


@pytest.mark.parametrize("seed", range(3))
def test_random_candidates_reach_every_candidate_of_a_conditional_space_and_no_other(seed):
    expected = {key_of(each) for each in listed(CONDITIONAL)}
    generator = np.random.default_rng(seed)
    drawn = [sample(CONDITIONAL, generator) for _ in range(600)]
    assert {key_of(each) for each in drawn} == expected
    one, other = drawn[:2]
    for _ in range(200):
        one, other = other, crossover(CONDITIONAL, one, other, generator)
        other = mutate(CONDITIONAL, other, generator, rate=0.5)
        assert key_of(other) in expected


def test_a_child_of_equal_parents_is_their_equal():
    generator = np.random.default_rng(0)
    for parent in listed(CONDITIONAL):
        assert crossover(CONDITIONAL, parent, dict(parent), generator) == parent


def test_units_give_the_candidate_whose_values_lie_there():
    assert from_units(CONDITIONAL, [0.4, 0.9, 0.1, 0.5]) == {
        "family": "cct", "heads": 4, "dim": 8, "depth": 2
    }  # fmt: skip
    assert from_units(CONDITIONAL, [0.0, 0.9, 0.1, 0.5]) == {"family": "loopnet"}


def test_proposals_that_are_all_known_or_forbidden_end():
    calls = []

    def propose():
        calls.append(1)
        return {"a": len(calls) % 3}

    assert new_candidate(propose, lambda c: c["a"] < 2, lambda c: c["a"] != 2) is None
    assert 3 <= len(calls) <= 10_000
    assert new_candidate(propose, lambda c: c["a"] < 2, lambda c: True) == {"a": 2}


def test_the_neighbour_of_an_ordered_value_is_taken_more_often_than_a_far_one():
    choice, generator = Choice("w", (1, 2, 4, 8, 16)), np.random.default_rng(0)
    found = Counter(mutate([choice], {"w": 4}, generator)["w"] for _ in range(2000))
    # half of the draws are neighbours, the others any of four
    expected = {1: 0.125, 2: 0.375, 8: 0.375, 16: 0.125}
    assert found.keys() == expected.keys()
    for value, share in expected.items():
        assert found[value] / 2000 == pytest.approx(share, abs=0.04)


@pytest.mark.parametrize(
    ("values", "ordered"),
    [((1, 2, 3), True), ((3, 1), False), ((False, True), False), (("a", "b"), False), ((5,), True)],
)
def test_values_are_ordered_if_they_are_rising_numbers(values, ordered):
    assert is_ordered(Choice("x", values)) == ordered


def test_encodings_and_features_of_every_candidate_are_unique_and_of_one_width():
    every = listed(CONDITIONAL)
    rows = features(CONDITIONAL, every)
    assert rows.shape == (len(every), 3 + 1 + 1 + 1)
    coded = np.stack([encode(CONDITIONAL, each) for each in every])
    assert coded.shape == (len(every), 3 + 2 + 2 + 1)
    assert len({tuple(row) for row in coded.tolist()}) >= len(every) - 1
    assert rows.min() == coded.min() == 0
    assert rows.max() == coded.max() == 1


# Values that are lists


LISTS = Choice("widths", ((8, 16), (16, 32), (32, (64, 64))))


@pytest.mark.parametrize("make", [RandomSearch, Evolution])
def test_values_given_as_tuples_are_those_that_a_ledger_gives_back(make, tmp_path):
    assert LISTS.values == ([8, 16], [16, 32], [32, [64, 64]])
    lr = Choice("lr", (0.1, 0.2, 0.3))
    more = {"population": 3, "tournament": 2} if make is Evolution else {}

    def evaluate(candidate):
        return Trial(candidate, float(candidate["widths"][0]))

    ledger = Ledger(tmp_path / "ledger.jsonl")
    trials = run(make([LISTS, lr], 7, **more), evaluate, ledger)
    assert len({key_of(trial.candidate) for trial in trials}) == 7
    assert run(make([LISTS, lr], 7, **more), evaluate, ledger) == trials
    assert key_of({"widths": (8, (1, 2))}) == key_of({"widths": [8, [1, 2]]})
    assert key_of({"a": 1}) != key_of({"a": "1"})


# Wrong input


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"low": 0.5, "high": 2.7, "whole": True}, "the ends of whole numbers are whole"),
        ({"low": 0.0, "high": math.inf}, "finite numbers, not 0.0 and inf"),
        ({"low": math.nan, "high": 1.0}, "finite numbers"),
        ({"low": "1e-3", "high": "5e-2"}, "finite numbers, not '1e-3' and '5e-2'"),
        ({"low": False, "high": True}, "finite numbers"),
        ({"low": 0, "high": 4, "whole": 2}, "log and whole are true or false"),
        ({"low": 1, "high": 4, "log": "yes"}, "log and whole are true or false"),
        ({"low": 0, "high": 4, "log": True}, "above 0"),
        ({"low": 1}, "give values, or low and high"),
        ({"values": (1, 2, 1)}, r"each value once, not \[1, 2, 1\]"),
        ({"values": ([1], [1])}, "each value once"),
        ({"values": (1, 2), "when": {"a": "sgd"}}, "lists of values by the names"),
        ({"values": (1, 2), "when": {"a": 2}}, "lists of values by the names"),
        ({"values": (1, 2), "when": ["a"]}, r"not \['a'\]"),
    ],
)
def test_choices_that_no_draw_could_serve_are_refused(given, message):
    with pytest.raises(UsageError, match=f"choice x: .*{message}"):
        Choice("x", **given)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("settings: 3\nchoices: {seed: [1]}", "settings are values by name, not 3"),
        ("settings: [epochs]\nchoices: {seed: [1]}", "settings are values by name"),
        ("choices: {optimizer.lr: {low: '1e-3', high: 1}}", "choice optimizer.lr: low and high"),
        ("choices: {epochs: {low: 1, high: 2.5, whole: true}}", "ends of whole numbers"),
        (
            "choices: {seed: [1, 2], epochs: {values: [1, 2], when: {seed: 1}}}",
            "choice epochs: when has lists",
        ),
        ("choices: {seed: [1, 2], epochs: {values: [1, 2], when: [seed]}}", "when has lists"),
        ("choices: {seed: [1, 1]}", "each value once"),
        ("choices: {seed: []}", "give values, or low and high"),
        ("choices: {seed: {values: [1], low: 1, high: 2}}", "give values, or low and high"),
        ("[1, 2]", "the entries settings and choices"),
        ("choices: [seed]", "choices are values or ranges"),
    ],
)
def test_a_file_of_a_space_with_a_wrong_choice_is_refused_by_its_name(text, message, tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_settings_space(file)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    file = tmp_path / "space.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="can't be read as YAML"):
        read_settings_space(file)


@pytest.mark.parametrize("value", [math.nan, math.inf, [1.0, -math.inf], {"a": math.nan}, {1, 2}])
def test_values_that_no_ledger_can_hold_are_refused(value):
    with pytest.raises(UsageError, match="choice n: values are finite numbers, text, true, false"):
        Choice("n", (1.0, value))


def test_values_are_those_of_the_ledger():
    assert Choice("n", (1, (2, (3,)), None, "a", {"b": (4,)})).values == (
        *(1, [2, [3]], None, "a", {"b": [4]}),
    )
    assert key_of({"n": (1, 2), "m": 0.1}) == (("m", "0.1"), ("n", "[1, 2]"))
