"""Rules of searches and evolutions: limits, importance, Optuna's storage, and damaged folders."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from smallfry.errors import RunError, UsageError
from smallfry.search import Choice, Ledger, Trial
from smallfry.search.space import key_of
from smallfry.studies.evolution import evolve
from smallfry.studies.evolution_config import EvolutionConfig
from smallfry.studies.search import optuna_engine, session
from smallfry.studies.search.config import SearchConfig
from smallfry.studies.search.importance import importances, variance_share
from smallfry.studies.search.page import Confirmed
from smallfry.studies.search.problem import (
    StudentTable,
    TableProblem,
    TrainingProblem,
    run_name,
    seed_of,
)
from smallfry.studies.search.session import search
from smallfry.studies.search.strategies import limits
from smallfry.training.config import DataConfig

TABLE = SearchConfig("micro_nars", strategy="random", budget=8)


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Pages have a picture and a provenance that take no time."""
    monkeypatch.setattr("smallfry.studies.search.page.provenance", lambda device: {})
    draw = "smallfry.studies.search.page.draw_search"
    monkeypatch.setattr(draw, lambda points, shares, file, *_: file.write_bytes(b"\x89PNG"))


# Limits


def test_what_is_chosen_is_within_the_limits_with_further_seeds_too(tmp_path):
    config = SearchConfig("micro_n2n", strategy="n2n", budget=30, max_parameters=900, confirm=2)
    found = search(config, tmp_path, quiet=True)
    trials = Ledger(tmp_path / "ledger.jsonl").read()
    assert max(trial.cost["parameters"] for trial in trials) > 900  # tried at first
    assert found.best.cost["parameters"] <= 900
    problem = StudentTable()
    assert len(found.confirmed) == 3
    for each in found.confirmed:
        assert problem.costs(each.candidate)["parameters"] <= 900
        assert len(each.values) == 2


def test_further_seeds_are_other_trainings_of_the_best_three(tmp_path):
    found = search(replace(TABLE, confirm=2), tmp_path, quiet=True)
    trials = Ledger(tmp_path / "ledger.jsonl").read()
    best = sorted(trials, key=lambda trial: -trial.value)[:3]
    assert {key_of(e.candidate) for e in found.confirmed} == {key_of(t.candidate) for t in best}
    problem = TableProblem("micro_nars")
    for each in found.confirmed:
        again = [next(problem.evaluate([each.candidate], tmp_path, seed)) for seed in (1, 2)]
        assert list(each.values) == [trial.value for trial in again]
        assert each.mean == pytest.approx(np.mean(each.values))
    means = [each.mean for each in found.confirmed]
    assert means == sorted(means, reverse=True)
    assert Confirmed({}, [1.0, 2.0, 6.0]).mean == 3


@pytest.mark.parametrize(
    ("settings", "macs", "parameters", "allowed"),
    [
        ({}, 1e12, 1e12, True),
        ({"max_mmac": 2.0}, 2e6, 9, True),
        ({"max_mmac": 2.0}, 2e6 + 1, 9, False),
        ({"max_parameters": 9}, 1e9, 9, True),
        ({"max_parameters": 9}, 1, 10, False),
        ({"max_mmac": 1.0, "max_parameters": 9}, 1e6, 10, False),
    ],
)
def test_limits_are_inclusive_and_all_hold(settings, macs, parameters, allowed, monkeypatch):
    problem = TableProblem("micro_nars")
    monkeypatch.setattr(problem, "costs", lambda c: {"macs": macs, "parameters": parameters})
    assert limits(problem, SearchConfig(**settings))({}) is allowed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_mmac": float("nan")}, "max_mmac must be more than 0 and finite, got nan"),
        ({"max_parameters": float("inf")}, "max_parameters must be more than 0 and finite"),
        ({"confirm": -1}, "confirm must be at least 0, got -1"),
        ({"student_epochs": 0}, "student_epochs must be at least 1"),
        ({"seed": 2**63}, r"seed is 0 to below 2\*\*63"),
        ({"space": "micro_n2n", "data": DataConfig(limit=3)}, "micro_n2n has its own data"),
    ],
)
def test_settings_beyond_their_bounds_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        SearchConfig(**settings)


# Folders


def test_a_search_that_was_killed_as_it_began_goes_on(tmp_path, monkeypatch):
    write, written = session.write_whole, []

    def killed(file, data):
        if written:
            raise KeyboardInterrupt
        written.append(file.name)
        write(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(session, "write_whole", killed)
        with pytest.raises(KeyboardInterrupt):
            search(TABLE, tmp_path / "a", quiet=True)
    assert len(written) == 1
    with pytest.raises(UsageError, match="with budget 8, not 9"):
        search(replace(TABLE, budget=9), tmp_path / "a", quiet=True)
    found = search(TABLE, tmp_path / "a", quiet=True)
    assert found.best == search(TABLE, tmp_path / "b", quiet=True).best
    for name in ("search.json", "space.yaml", "ledger.jsonl"):
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()


def test_a_search_goes_on_from_another_working_directory(tmp_path, monkeypatch):
    for name in ("photos", "other/photos"):
        for kind in ("a", "b"):
            (tmp_path / name / kind).mkdir(parents=True)
            for number in range(20):
                image = Image.new("L", (8, 8), number)
                image.save(tmp_path / name / kind / f"{name[0]}{number}.png")
    space, folder = tmp_path / "space.yaml", tmp_path / "a"
    space.write_text("settings: {epochs: 1}\nchoices: {optimizer.lr: [0.1, 0.2]}\n")
    config = SearchConfig(str(space), DataConfig("photos"), strategy="random", budget=2)

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainingProblem, "evaluate", stopped)
    monkeypatch.setattr(TrainingProblem, "costs", lambda *_: {"macs": 1, "parameters": 1})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        search(config, folder, quiet=True)
    monkeypatch.chdir("other")
    with pytest.raises(KeyboardInterrupt):
        search(replace(config, data=DataConfig("../photos/")), folder, quiet=True)
    with pytest.raises(UsageError, match="holds a search with data"):
        search(config, folder, quiet=True)


@pytest.mark.parametrize("content", ["", "{", "3", "null", "[3]", "\xff"])
def test_damaged_settings_are_named(tmp_path, content):
    search(TABLE, tmp_path, quiet=True)
    ledger = (tmp_path / "ledger.jsonl").read_bytes()
    (tmp_path / "search.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(RunError, match=r"damaged \(.*use another --to"):
        search(TABLE, tmp_path, quiet=True)
    assert (tmp_path / "ledger.jsonl").read_bytes() == ledger


@pytest.mark.parametrize("line", [b"{}\n", b'{"candidate": 3}\n', b"\xff\xfe\n", b"\0\0\0\n"])
def test_a_line_that_is_no_trial_is_named_with_its_number(tmp_path, line):
    search(TABLE, tmp_path, quiet=True)
    with open(tmp_path / "ledger.jsonl", "ab") as stream:
        stream.write(line)
    with pytest.raises(RunError, match=r"ledger.jsonl, line 9: not a trial"):
        search(TABLE, tmp_path, quiet=True)


def test_half_a_line_of_any_bytes_is_evaluated_again(tmp_path):
    search(TABLE, tmp_path, quiet=True)
    whole = (tmp_path / "ledger.jsonl").read_bytes()
    (tmp_path / "ledger.jsonl").write_bytes(whole[:-30] + b"\xc3")
    search(TABLE, tmp_path, quiet=True)
    assert (tmp_path / "ledger.jsonl").read_bytes() == whole


def test_trials_of_another_search_are_refused(tmp_path):
    search(TABLE, tmp_path, quiet=True)
    lines = (tmp_path / "ledger.jsonl").read_text().splitlines(keepends=True)
    record = json.loads(lines[0])
    name, value = next(iter(record["candidate"].items()))
    record["candidate"][name] = [value]
    (tmp_path / "ledger.jsonl").write_text("".join([json.dumps(record) + "\n", *lines[1:]]))
    with pytest.raises(RunError, match="has 1 trials of another search"):
        search(TABLE, tmp_path, quiet=True)


def test_a_search_in_a_table_has_a_page_and_no_configuration(tmp_path):
    found = search(TABLE, tmp_path, quiet=True)
    assert not (tmp_path / "best.yaml").exists()
    text = found.page.read_text()
    trials = sorted(Ledger(tmp_path / "ledger.jsonl").read(), key=lambda trial: -trial.value)
    places = [text.index(f"{trial.cost['parameters']:,.0f}</td>") for trial in trials[:1]]
    assert places[0] > 0
    assert f"{trials[0].value:.2f}" in text
    assert "smallfry train --config" not in text


def test_runs_and_seeds_follow_the_candidate_and_not_its_order():
    one, same = {"a": 1, "b": 0.5}, {"b": 0.5, "a": 1}
    assert run_name(one) == run_name(same) != run_name({"a": 1, "b": 0.25})
    assert seed_of(one, 3) == seed_of(one, 2) + 1
    assert 0 <= seed_of(one, 2**31 - 1) < 2**31


# Importance


def epsilon(groups, scores):
    """ε² by its definition."""
    scores = np.asarray(scores, float)
    kinds = sorted(set(groups))
    parts = [scores[[g == kind for g in groups]] for kind in kinds]
    within = sum(((part - part.mean()) ** 2).sum() for part in parts) / (len(scores) - len(kinds))
    return max(0.0, 1 - within / (((scores - scores.mean()) ** 2).sum() / (len(scores) - 1)))


@pytest.mark.parametrize("seed", range(5))
def test_importance_is_epsilon_squared_of_values_and_of_quarters_of_ranges(seed):
    draw = np.random.default_rng(seed)
    choices = [
        Choice("kind", ("a", "b", "c")),
        Choice("lr", low=0.01, high=1.0, log=True),
        Choice("beta", (1, 2), when={"kind": ["a"]}),
        Choice("never", (1, 2), when={"kind": ["z"]}),
    ]
    trials = []
    for _ in range(60):
        kind = str(draw.choice(["a", "b", "c"]))
        candidate = {"kind": kind, "lr": float(10 ** draw.uniform(-2, 0))}
        if kind == "a":
            candidate["beta"] = int(draw.integers(1, 3))
        value = {"a": 0.0, "b": 2.0, "c": 3.0}[kind] + 5 * candidate["lr"] + draw.normal()
        trials.append(Trial(candidate, float(value + candidate.get("beta", 0))))
    found = importances(choices, trials)
    values = [trial.value for trial in trials]
    assert found["kind"] == pytest.approx(epsilon([t.candidate["kind"] for t in trials], values))
    rates = np.array([trial.candidate["lr"] for trial in trials])
    quarters = np.searchsorted(np.quantile(rates, (0.25, 0.5, 0.75)), rates)
    assert sorted(np.bincount(quarters)) == [15] * 4
    assert found["lr"] == pytest.approx(epsilon(quarters.tolist(), values))
    having = [trial for trial in trials if "beta" in trial.candidate]
    betas = [trial.candidate["beta"] for trial in having]
    assert found["beta"] == pytest.approx(epsilon(betas, [trial.value for trial in having]))
    assert found["never"] == 0


def test_shares_of_few_or_equal_scores_are_zero_and_never_negative():
    for groups, scores in (("", []), ("a", [1.0]), ("ab", [1.0, 2.0]), ("aab", [2.0] * 3)):
        assert variance_share(groups, np.array(scores)) == 0
    assert variance_share("abab", np.array([1.0, 1.1, 5.0, 5.1])) == 0
    assert variance_share("aaaa", np.array([1.0, 1.1, 5.0, 5.1])) == 0


# Optuna's storage


@pytest.fixture
def shared(tmp_path):
    pytest.importorskip("optuna", reason="the engine needs the extra search")
    storage = str(tmp_path / "study.log")
    return replace(TABLE, engine="optuna", storage=storage, budget=5)


def states(config):
    study = optuna_engine.open_study(config, 0)
    return [trial.state.name for trial in study.get_trials()]


def test_workers_one_after_the_other_share_a_budget(shared, tmp_path):
    optuna_engine.work(shared, tmp_path, 0)
    assert states(shared) == ["COMPLETE"] * 5
    optuna_engine.work(shared, tmp_path, 1)
    assert states(shared) == ["COMPLETE"] * 5
    optuna_engine.work(replace(shared, budget=7), tmp_path, 1)
    trials = optuna_engine.trials_of(optuna_engine.open_study(shared, 0))
    assert list(trials) == list(range(7))
    table = TableProblem("micro_nars")
    for trial in trials.values():
        (again,) = table.evaluate([trial.candidate], tmp_path, shared.seed)
        assert (trial.value, trial.cost) == (again.value, again.cost)


def test_an_interrupted_candidate_is_not_counted_and_a_failed_one_is(shared, tmp_path, monkeypatch):
    evaluate = TableProblem.evaluate
    seen = []

    def trouble(self, candidates, folder, seed):
        seen.append(None)
        if len(seen) == 2:
            raise KeyboardInterrupt
        if len(seen) == 4:
            yield Trial(dict(candidates[0]), None, failure="diverged")
            return
        yield from evaluate(self, candidates, folder, seed)

    monkeypatch.setattr(TableProblem, "evaluate", trouble)
    with pytest.raises(KeyboardInterrupt):
        optuna_engine.work(shared, tmp_path, 0)
    optuna_engine.work(shared, tmp_path, 0)
    found = states(shared)
    again = ["PRUNED"]  # the sampler's seed is that of the first process, and so is its candidate
    assert found == ["COMPLETE", "PRUNED", *again, "COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert optuna_engine.counted(optuna_engine.open_study(shared, 0).get_trials()) == 5
    trials = optuna_engine.trials_of(optuna_engine.open_study(shared, 0))
    assert [trial.failure for trial in trials.values()] == [None, None, "diverged", None, None]


def test_where_nothing_is_allowed_a_worker_gives_up(shared, tmp_path, monkeypatch):
    monkeypatch.setattr(optuna_engine, "MOST_REJECTED", 4)
    optuna_engine.work(replace(shared, max_parameters=1), tmp_path, 0)
    assert states(shared) == ["PRUNED"] * 4


# Evolutions


SMALL = EvolutionConfig("digits", generations=3, population=8, parents=2)


@pytest.mark.parametrize("removed", [0, 1])
def test_generations_that_are_missing_are_found(tmp_path, removed):
    evolve(SMALL, tmp_path, quiet=True)
    lines = (tmp_path / "generations.jsonl").read_text().splitlines(keepends=True)
    del lines[removed]
    (tmp_path / "generations.jsonl").write_text("".join(lines))
    with pytest.raises(RunError, match=r"generations.jsonl: damaged \(generations are missing\)"):
        evolve(replace(SMALL, generations=5), tmp_path, quiet=True)


def test_half_a_generation_is_evolved_again_and_a_strange_line_is_named(tmp_path):
    whole = evolve(SMALL, tmp_path, quiet=True)
    file = tmp_path / "generations.jsonl"
    content = file.read_bytes()
    file.write_bytes(content[:-20])
    assert evolve(SMALL, tmp_path, quiet=True) == whole
    assert file.read_bytes() == content
    file.write_bytes(content + b'{"number": 3}\n')
    with pytest.raises(RunError, match=r"generations.jsonl, line 4: not a generation"):
        evolve(SMALL, tmp_path, quiet=True)


def test_fewer_generations_than_there_are_add_none(tmp_path):
    whole = evolve(SMALL, tmp_path, quiet=True)
    again = evolve(replace(SMALL, generations=1), tmp_path, quiet=True)
    assert again.generations == whole.generations
    assert again.elite.read_bytes() == whole.elite.read_bytes()
    assert [each.evaluations for each in again.generations] == [8, 16, 24]
    fitness = [each.elite_fitness for each in again.generations]
    assert all(each.best >= each.mean for each in again.generations)
    assert 0 <= again.accuracy <= 1
    assert len(fitness) == 3
