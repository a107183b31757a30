"""Random search, regularised evolution and NARS: what they propose, and that they learn."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau

from smallfry.errors import RunError, UsageError
from smallfry.search import NARS, TPE, Choice, Evolution, Ledger, Listed, RandomSearch, Trial, run
from smallfry.search import nars as nars_module
from smallfry.search import predictor as predictor_module
from smallfry.search.nars import (
    APART,
    Prediction,
    candidate_pool,
    different,
    evolve,
    most_promising,
    round_sizes,
    shortest_proxy,
    spread_out,
)
from smallfry.search.predictor import Predictor, features, kendall_tau
from smallfry.search.rounds import run_rounds
from smallfry.search.sampling import all_candidates, crossover, mutate, sample
from smallfry.search.space import key_of

WIDTHS, DEPTHS = Choice("width", (4, 8, 16, 32)), Choice("depth", (1, 2, 3, 4))
RATES, HEADS = Choice("lr", (1, 5, 25)), Choice("heads", (2, 4), when={"depth": [3, 4]})
ARCHITECTURE, RECIPE = (WIDTHS, DEPTHS, HEADS), (RATES, Choice("shift", (False, True)))
CHOICES = ARCHITECTURE + RECIPE
MIXED = (
    *CHOICES,
    Choice("decay", low=1e-4, high=1.0, log=True),
    Choice("n", low=1, high=3, whole=True),
)


def value(candidate):
    distance = abs(candidate["depth"] - 3) + abs(WIDTHS.values.index(candidate["width"]) - 2)
    return 90.0 - 5 * distance - 3 * abs(candidate["lr"] - 5) ** 0.5 + candidate["shift"]


def judge(candidate):
    return Trial(candidate, value(candidate))


def narrow(candidate):
    return candidate["width"] * candidate["depth"] <= 16


STRATEGIES = {
    "random": lambda **more: RandomSearch(CHOICES, 30, **more),
    "evolution": lambda **more: Evolution(CHOICES, 30, population=8, tournament=3, **more),
    "nars": lambda **more: NARS(
        ARCHITECTURE, RECIPE, 30, lambda each: [each["width"] * each["depth"]], **more
    ),
    "tpe": lambda **more: TPE(CHOICES, 30, **more),
}


@pytest.fixture
def quick(monkeypatch):
    """A predictor of a few steps, for what does not depend on its quality."""
    monkeypatch.setattr(predictor_module, "COST_STEPS", 10)
    monkeypatch.setattr(predictor_module, "SCORE_STEPS", 20)
    monkeypatch.setattr(nars_module, "GENERATIONS", 3)


@pytest.fixture(params=STRATEGIES)
def make(request, quick):
    if request.param == "tpe":
        pytest.importorskip("optuna", reason="TPE needs the extra search")
    return STRATEGIES[request.param]


# Laws of all strategies


def test_no_strategy_proposes_a_candidate_that_is_not_allowed(make, tmp_path):
    trials = run(make(allowed=narrow), judge, Ledger(tmp_path / "t.jsonl"))
    assert len(trials) == 30
    assert all(narrow(trial.candidate) for trial in trials)


def test_a_strategy_that_may_propose_nothing_ends(make):
    search = make(allowed=lambda candidate: False)
    assert search.ask(3) == search.ask(1) == []


def test_seeds_differ_and_each_gives_the_same_candidates_again(make, tmp_path):
    found = [
        [key_of(t.candidate) for t in run(make(seed=seed), judge, Ledger(tmp_path / f"{n}.jsonl"))]
        for n, seed in enumerate((0, 0, 1))
    ]
    assert found[0] == found[1] != found[2]


def test_failed_trials_are_no_parents_and_no_labels(make, tmp_path):
    def failing(candidate):
        return (
            Trial(candidate, None, failure="diverged")
            if candidate["lr"] == 25
            else judge(candidate)
        )

    trials = run(make(), failing, Ledger(tmp_path / "t.jsonl"))
    assert len(trials) == 30
    assert max(t.value for t in trials if t.value is not None) > 80


def test_a_strategy_whose_every_trial_fails_ends_after_its_count(make, tmp_path):
    trials = run(make(), lambda each: Trial(each, None), Ledger(tmp_path / "t.jsonl"))
    assert len(trials) == 30


@pytest.mark.parametrize(
    "build",
    [
        lambda: RandomSearch((), 3),
        lambda: Evolution(CHOICES, 0),
        lambda: NARS((), (), 3),
        lambda: Evolution(CHOICES, 3, population=2, tournament=3),
        lambda: Evolution(CHOICES, 3, tournament=0),
    ],
)
def test_no_choices_no_candidates_and_impossible_tournaments_are_refused(build):
    with pytest.raises(UsageError, match=r"needs choices|a tournament has"):
        build()


def test_random_search_ends_when_all_candidates_are_known():
    search = RandomSearch([WIDTHS], 50)
    assert sorted(each["width"] for each in search.ask(50)) == [4, 8, 16, 32]
    assert search.ask(1) == []


# Evolution


def test_children_differ_from_a_recent_parent_in_one_choice(tmp_path):
    flat = (WIDTHS, DEPTHS, *RECIPE)
    search = Evolution(flat, 25, seed=1, population=5, tournament=5)
    trials = run(search, judge, Ledger(tmp_path / "t.jsonl"))
    for number in range(5, 15):
        parents = trials[number - 5 : number]
        best = max(trial.value for trial in parents)
        child = trials[number].candidate
        changes = [
            sum(child[name] != trial.candidate[name] for name in child)
            for trial in parents
            if trial.value == best
        ]
        assert 1 in changes


def test_only_the_newest_are_parents(tmp_path):
    flat = (WIDTHS, DEPTHS, *RECIPE)
    falling = iter(range(100, 0, -1))
    search = Evolution(flat, 12, seed=0, population=3, tournament=3)
    trials = run(search, lambda each: Trial(each, float(next(falling))), Ledger(tmp_path / "t"))
    for number in range(3, 12):  # the oldest of the three is always the best
        parent, child = trials[number - 3].candidate, trials[number].candidate
        assert sum(child[name] != parent[name] for name in parent) == 1


# Sampling


@given(st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_mutation_and_crossover_give_candidates_of_the_space(seed):
    generator = np.random.default_rng(seed)
    one, other = sample(MIXED, generator), sample(MIXED, generator)
    before = dict(one)
    for child in (
        mutate(MIXED, one, generator),
        mutate(MIXED, one, generator, rate=0.5),
        crossover(MIXED, one, other, generator),
    ):
        assert ("heads" in child) == (child["depth"] in (3, 4))
        assert list(child) == [choice.name for choice in MIXED if choice.is_active(child)]
        assert 1e-4 <= child["decay"] <= 1
        assert child["n"] in (1, 2, 3)
    assert one == before
    crossed = crossover(CHOICES, {k: one[k] for k in one if k in other}, other, generator)
    kept = [name for name in crossed if name != "heads"]  # drawn anew where a parent lacks it
    assert all(crossed[name] in (one[name], other[name]) for name in kept)


def test_a_mutation_without_a_rate_changes_exactly_one_choice():
    generator, flat = np.random.default_rng(0), (WIDTHS, DEPTHS, *RECIPE)
    parent = sample(flat, generator)
    changed = [
        [name for name in parent if child[name] != parent[name]]
        for child in (mutate(flat, parent, generator) for _ in range(60))
    ]
    assert {len(names) for names in changed} == {1}
    assert {names[0] for names in changed} == {*parent}


def test_a_small_space_is_listed_and_a_large_one_is_spread_by_sobols_points():
    every = all_candidates(CHOICES, 1000)
    assert len(every) == len({key_of(each) for each in every}) == 4 * (2 + 2 * 2) * 6
    assert all_candidates(CHOICES, 100) is None
    assert all_candidates(MIXED, 10**6) is None
    pool = candidate_pool(MIXED, seed=0)
    assert len(pool) > 4000
    assert candidate_pool(MIXED, seed=0) == pool != candidate_pool(MIXED, seed=1)
    for name in ("width", "depth", "n"):
        counts = np.unique([each[name] for each in pool], return_counts=True)[1]
        assert counts.max() < 1.05 * counts.min()
    assert np.median([each["decay"] for each in pool]) == pytest.approx(1e-2, rel=0.05)


# Predictor


@given(st.lists(st.integers(0, 5), min_size=2, max_size=30), st.randoms())
def test_kendalls_tau_is_scipys(values, random):
    other = [random.randint(0, 5) for _ in values]
    expected = kendalltau(values, other).statistic
    assert kendall_tau(values, other) == pytest.approx(0.0 if np.isnan(expected) else expected)


def test_kendalls_tau_of_unsigned_numbers_does_not_wrap():
    one = np.array([3, 1, 2], np.uint16)
    assert kendall_tau(one, one) == 1
    assert kendall_tau(one, [1, 3, 2]) == -1


def test_features_are_positions_of_ordered_values_and_zeros_and_ones_of_others():
    rows = features(CHOICES, [{"width": 16, "depth": 1, "lr": 25, "shift": True}])
    assert rows.tolist() == [[2 / 3, 0.0, 0.0, 1.0, 0.0, 1.0]]
    assert features(MIXED[-2:], [{"decay": 1e-2, "n": 2}]).tolist() == [[0.5, 0.5]]
    assert features((), [{}, {}]).shape == (2, 0)


@pytest.fixture(scope="module")
def pairs():
    generator = np.random.default_rng(0)
    a, r = generator.random((300, 4)), generator.random((300, 2))
    score = 70 + 10 * np.sin(3 * a[:, 0]) - 8 * (r[:, 0] - 0.5) ** 2 * 4 + 5 * a[:, 1] * r[:, 1]
    return a, r, score


def test_a_predictor_orders_pairs_that_it_was_not_fitted_to(pairs):
    a, r, score = pairs
    predictor = Predictor(4, 2)
    predictor.fit_scores(a[:60], r[:60], score[:60])
    found = predictor(a[60:], r[60:])
    assert kendall_tau(found.mean, score[60:]) > 0.6
    assert np.abs(found.mean - score[60:]).mean() < score.std()
    assert found.spread.shape == (240,)
    assert found.spread.min() > 0


def test_a_predictor_learns_costs_before_scores_and_scales_of_scores_do_not_matter(pairs):
    a, r, score = pairs
    costs = np.exp(np.stack([3 * a[:, 0], a.sum(1)], 1))
    found = []
    for scale in (1.0, 1000.0):
        predictor = Predictor(4, 2, seed=5)
        predictor.fit_costs(a, costs)
        with np.errstate(all="raise"):
            predictor.fit_scores(a[:40], r[:40], scale * score[:40] - scale)
        found.append((predictor(a, r).mean + scale) / scale)
    np.testing.assert_allclose(found[0], found[1], atol=0.02)
    constant = Predictor(4, 2)
    constant.fit_costs(a, np.ones((300, 2)))
    constant.fit_scores(a[:3], r[:3], np.full(3, 7.0))
    assert np.isfinite(constant(a, r).mean).all()


def test_the_members_of_an_ensemble_are_the_networks_they_would_be_alone(pairs):
    a, r, score = pairs
    predictor = Predictor(4, 2, members=3)
    predictor.fit_scores(a[:30], r[:30], score[:30])
    alone = Predictor(4, 2, members=1)
    for part in ("_embedding", "_score"):
        state = {
            k: v[:1].clone()
            for k, v in getattr(Predictor(4, 2, members=3), part).state_dict().items()
        }
        getattr(alone, part).load_state_dict(state)
    alone.fit_scores(a[:30], r[:30], score[:30])
    weights = predictor._score.state_dict()["0.weight"]
    np.testing.assert_allclose(weights[:1], alone._score.state_dict()["0.weight"], atol=1e-5)


# NARS


def test_rounds_take_all_candidates():
    assert [sum(round_sizes(count)) for count in range(1, 200)] == [*range(1, 200)]
    assert round_sizes(1) == [1]


def test_nars_measures_a_spread_of_candidates_first_and_waits_for_each_round(quick):
    search = STRATEGIES["nars"]()
    first = search.ask(100)
    assert len(first) == round_sizes(30)[0]
    assert {each["shift"] for each in first} == {False, True}
    assert len({key_of(each) for each in first}) == len(first)
    search.tell([judge(each) for each in first[1:]])
    assert search.ask(5) == []
    search.tell([judge(first[0])])
    assert len(search.ask(100)) == round_sizes(30)[1]


def test_nars_finds_the_best_of_a_space_that_random_search_misses(tmp_path):
    best = max(map(value, all_candidates(CHOICES, 1000)))
    hits = {"nars": 0, "random": 0}
    for seed in range(2):
        for name in hits:
            ledger = Ledger(tmp_path / f"{name}{seed}.jsonl")
            trials = run(STRATEGIES[name](seed=seed), judge, ledger)
            hits[name] += max(trial.value for trial in trials) == best
    assert hits["nars"] == 2 > hits["random"]


def test_evolution_on_predictions_finds_what_the_pool_lacks_within_the_limit():
    def predict(candidates):
        values = np.array([value(each) for each in candidates])
        return Prediction(values, np.zeros_like(values))

    start = [
        {"width": 4, "depth": 1, "lr": 1, "shift": False},
        {"width": 32, "depth": 2, "lr": 25, "shift": True},
    ]
    found = evolve(CHOICES, start, predict, lambda c: c["width"] <= 8, np.random.default_rng(0))
    assert value(found[0]) == max(
        value(c) for c in all_candidates(CHOICES, 1000) if c["width"] <= 8
    )
    assert [value(each) for each in found] == sorted(map(value, found), reverse=True)


def test_a_round_is_the_best_predicted_and_an_eighth_uncertain():
    pool = [{"n": n} for n in range(32)]
    predicted = Prediction(np.arange(32.0), np.array([5.0] + [0.0] * 31))
    chosen = [each["n"] for each in most_promising(pool, predicted, 8)]
    assert chosen == [*range(31, 24, -1), 0]
    assert (
        len(most_promising(pool[:3], Prediction(predicted.mean[:3], predicted.spread[:3]), 8)) == 3
    )


def test_the_first_round_has_one_candidate_of_each_cluster():
    points = np.repeat([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]], 5, 0)
    points = points + np.random.default_rng(0).normal(0, 0.1, points.shape)
    pool = [{"n": n} for n in range(15)]
    chosen = spread_out(pool, points, 3, seed=0)
    assert sorted(each["n"] // 5 for each in chosen) == [0, 1, 2]
    assert spread_out(pool[:2], points[:2], 3, seed=0) == pool[:2]


def test_a_short_training_is_a_proxy_if_it_orders_candidates_as_a_long_one_does():
    assert shortest_proxy([[1, 1, 1], [3, 2, 2], [2, 3, 3]]) == 1
    assert shortest_proxy([[1, 1], [3, 2], [2, 3]]) == 1
    assert shortest_proxy([[1, 1], [3, 2], [2, 3]], least=0.3) == 0


def test_a_predictor_that_knows_costs_is_fitted_once_for_each_architecture(monkeypatch, quick):
    asked = []

    def costs(architecture):
        asked.append(key_of(architecture))
        return [architecture["width"]]

    monkeypatch.setattr(nars_module, "COSTED", 10)
    search = NARS(ARCHITECTURE, RECIPE, 30, costs)
    search.tell([judge(each) for each in search.ask(30)])
    search.ask(1)
    assert len(asked) == len({*asked}) == 10


# Rounds


def test_rounds_resume_whichever_candidate_ended_first(make, tmp_path):
    def backwards(candidates):
        return [judge(each) for each in reversed(candidates)]

    def interrupted(candidates):
        yield judge(candidates[-1])
        raise KeyboardInterrupt

    whole = run_rounds(make(), backwards, Ledger(tmp_path / "whole.jsonl"), together=4)
    ledger = Ledger(tmp_path / "stopped.jsonl")
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run_rounds(make(), interrupted, ledger, together=4)
    assert len(ledger.read()) == 3
    assert run_rounds(make(), backwards, ledger, together=4) == whole
    assert len(ledger.read()) == 30


def test_an_evaluation_that_leaves_a_candidate_out_is_named_with_it(tmp_path):
    def forgetful(candidates):
        return [Trial(each, 1.0) for each in candidates if each["n"] != 2]

    ledger = Ledger(tmp_path / "t.jsonl")
    listed = [{"n": 1}, {"n": 2}, {"n": 3}]
    with pytest.raises(RunError, match=r"has no trial of \{'n': 2\} after its evaluation"):
        run_rounds(Listed(listed), forgetful, ledger, together=2)
    trials = run_rounds(Listed(listed), lambda found: [Trial(e, 1.0) for e in found], ledger, 2)
    assert [trial.candidate["n"] for trial in trials] == [1, 2, 3]


@pytest.mark.parametrize(
    "value", [np.float64(0.1), (1, (2, 3)), {"a": (1, 2)}, {1: 2}, [float("nan")], {"z": 1, "a": 2}]
)
def test_candidates_are_found_again_in_the_form_of_the_ledger(value, tmp_path):
    ledger = Ledger(tmp_path / "t.jsonl")
    search = Listed([{"n": value}])
    trials = run_rounds(search, lambda found: [Trial(each, 1.0) for each in found], ledger)
    assert [trial.value for trial in trials] == [1.0]
    assert run_rounds(Listed([{"n": value}]), lambda found: [], ledger) == trials


def test_a_ledger_of_another_search_is_refused(tmp_path):
    ledger = Ledger(tmp_path / "t.jsonl")
    run_rounds(Listed([{"n": 1}, {"n": 2}]), lambda found: [Trial(e, 1.0) for e in found], ledger)
    with pytest.raises(RunError, match="1 trials of another search"):
        run_rounds(Listed([{"n": 1}]), lambda found: [], ledger)


def test_candidates_that_hardly_differ_from_others_come_last():
    points = np.array([[0.5, 0.5], [0.52, 0.46], [0.5, 0.6], [0.9, 0.9], [0.5, 0.56]])
    candidates = [{"n": row} for row in range(5)]

    def chosen(known, size):
        found = different(candidates, points, np.array(known).reshape(-1, 2), size)
        return [each["n"] for each in found]

    assert chosen([], 3) == [0, 2, 3]
    assert chosen([[0.51, 0.51]], 3) == [2, 3, 0]
    assert chosen([], 5) == [0, 2, 3, 1, 4]
    assert chosen([], 9) == [0, 2, 3, 1, 4]
    assert chosen([], 0) == []


def test_nars_ends_with_candidates_that_differ_in_a_space_of_ranges():
    rate, decay = (Choice(name, low=0.0, high=1.0) for name in ("lr", "decay"))
    search = NARS((), (rate, decay), 24, seed=1)
    asked = []
    while batch := search.ask(24):
        asked += batch
        search.tell([Trial(each, 90 + each["lr"] - each["decay"]) for each in batch])
    points = features((rate, decay), asked)
    distances = np.abs(points[:, None] - points[None]).max(-1) + np.eye(24)
    assert distances[-round_sizes(24)[-1] :].min() >= APART
