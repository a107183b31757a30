"""What goes wrong in a search: killed processes, signals, impossible spaces, foreign storages."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from smallfry.errors import UsageError
from smallfry.search import Choice, Ledger, Trial
from smallfry.search.settings_space import SettingsSpace
from smallfry.studies.search import optuna_engine, problem, session
from smallfry.studies.search.config import SearchConfig
from smallfry.studies.search.problem import TableProblem, TrainingProblem
from smallfry.studies.search.session import search
from smallfry.training.config import DataConfig

MODEL = {"name": "gated_mlp"}
TABLE = SearchConfig("micro_nars", strategy="random", budget=4)


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Pages have a picture and a provenance that take no time."""
    monkeypatch.setattr("smallfry.studies.search.page.provenance", lambda device: {})
    draw = "smallfry.studies.search.page.draw_search"
    monkeypatch.setattr(draw, lambda points, shares, file, *_: file.write_bytes(b"\x89PNG"))


def problem_of(choices, **settings):
    settings = {"epochs": 1, "threads": 1, "references": False, "model": MODEL, **settings}
    space = SettingsSpace(settings, [Choice(*each) for each in choices.items()])
    return TrainingProblem(space.with_data(DataConfig(limit=64)))


def searched(monkeypatch, tmp_path, choices, **settings):
    """Search a space of given choices by random draws."""
    monkeypatch.setattr(session, "find_problem", lambda config: problem_of(choices))
    config = SearchConfig("space.yaml", strategy="random", budget=4, data=DataConfig(limit=64))
    return search(replace(config, **settings), tmp_path / "search", quiet=True)


# Spaces


def test_a_choice_of_whole_models_is_an_architecture_with_its_own_costs():
    models = ({"name": "gated_mlp"}, {"name": "vitrm_micro_patch4_8"})
    found = problem_of({"model": models, "optimizer.lr": (0.1, 0.01)})
    assert [choice.name for choice in found.architecture] == ["model"]
    assert [choice.name for choice in found.recipe] == ["optimizer.lr"]
    small, large = (found.costs({"model": each})["parameters"] for each in models)
    assert small < 50_000 < large == 109_131


def test_the_images_are_no_choice():
    with pytest.raises(UsageError, match=r"data\.image_size can't be a choice.*same images"):
        problem_of({"data.image_size": (8, 16)})


def test_values_that_are_no_settings_are_failed_trials_and_the_others_go_on(monkeypatch, tmp_path):
    monkeypatch.setattr(problem, "_train", lambda each, config, cost: Trial(each, 50.0, cost=cost))
    found = searched(monkeypatch, tmp_path, {"optimizer.lr": (0.01, 0.003, -1.0)})
    trials = Ledger(tmp_path / "search/ledger.jsonl").read()
    failures = {each.candidate["optimizer.lr"]: each.failure for each in trials}
    assert failures.pop(-1.0).endswith("optimizer.lr must be positive, got -1.0)")
    assert failures == {0.01: None, 0.003: None}
    assert found.best.candidate["optimizer.lr"] > 0


@pytest.mark.parametrize(
    ("choices", "limit", "message"),
    [
        ({"model.options.widht": (16, 32)}, None, "no model of the space can be built: .*widht"),
        ({"optimizer.lr": (0.1, 0.01)}, 100, r"no candidate is within --max_parameters 100"),
    ],
)
def test_a_space_without_a_possible_candidate_is_refused_with_the_reason(
    choices, limit, message, monkeypatch, tmp_path
):
    with pytest.raises(UsageError, match=message):
        searched(monkeypatch, tmp_path, choices, max_parameters=limit)


def test_a_model_that_can_not_be_built_is_tried_once(monkeypatch):
    tried = []

    def failing(*arguments):
        tried.append(arguments)
        raise UsageError("no such option")

    monkeypatch.setattr("smallfry.search.settings_space.create_model", failing)
    found = problem_of({"model.options.depth": (1, 2), "optimizer.lr": (0.1, 0.01)})
    for rate in (0.1, 0.01):
        with pytest.raises(UsageError, match="no such option"):
            found.costs({"model.options.depth": 1, "optimizer.lr": rate})
    assert len(tried) == 1


# Seeds


@pytest.mark.parametrize("strategy", ["nars", "tpe"])
def test_seeds_may_be_of_64_bits(strategy, tmp_path):
    if strategy == "tpe":
        pytest.importorskip("optuna", reason="TPE needs the extra search")
    config = replace(TABLE, strategy=strategy, seed=5_000_000_000)
    assert search(config, tmp_path, quiet=True).best is not None


@pytest.mark.parametrize("budget", [1, 2])
def test_n2n_uses_a_budget_that_is_too_small_for_two_stages(budget, tmp_path):
    config = SearchConfig("micro_n2n", strategy="n2n", budget=budget)
    assert search(config, tmp_path, quiet=True).best is not None
    assert len(Ledger(tmp_path / "ledger.jsonl").read()) == budget


def test_further_seeds_that_fail_count_against_a_candidate(monkeypatch, tmp_path):
    evaluate, first = TableProblem.evaluate, []

    def unsteady(self, candidates, folder, seed):
        for trial in evaluate(self, candidates, folder, seed):
            first.append(trial.candidate)
            is_first = trial.candidate == first[0]
            failed = is_first and seed == TABLE.seed + 1
            yield replace(trial, value=None if failed else 95.0 if is_first else 90.0)

    monkeypatch.setattr(TableProblem, "evaluate", unsteady)
    found = search(replace(TABLE, budget=2, confirm=2), tmp_path, quiet=True)
    assert [len(each.values) for each in found.confirmed] == [2, 1]
    assert found.best.candidate != first[0]


# Processes


def workers_of(process):
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [
        int(each) for each in found if "spawn_main" in Path(f"/proc/{each}/cmdline").read_text()
    ]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize("fault", ["a signal to the search alone", "a killed worker"])
def test_trainings_of_a_search_that_ends_are_saved_at_once(fault, tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text(
        "settings: {model: {name: gated_mlp}, epochs: 100000, threads: 1, references: false}\n"
        "choices: {optimizer.lr: [0.01, 0.02]}\n"
    )
    command = [sys.executable, "-m", "smallfry.cli", "search", "--space", str(file)]
    command += ["--data.limit", "64", "--strategy", "random", "--budget", "2", "--workers", "2"]
    process = subprocess.Popen([*command, "--to", str(tmp_path / "search")], stderr=subprocess.PIPE)
    runs = tmp_path / "search" / "runs"
    while len(list(runs.glob("*/last"))) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    workers = workers_of(process)
    assert len(workers) == 2
    if fault == "a killed worker":
        os.kill(workers[0], signal.SIGKILL)
    else:
        process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()  # a hundred thousand epochs, unless they are stopped
    assert process.returncode == (1 if fault == "a killed worker" else 128 + signal.SIGTERM), errors
    assert b"the same command continues" in errors
    assert b"Traceback" not in errors
    assert len(list(runs.glob("*/last"))) == 2
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


# Optuna's storage


@pytest.fixture
def shared(tmp_path):
    pytest.importorskip("optuna", reason="the engine needs the extra search")
    return replace(TABLE, engine="optuna", storage=str(tmp_path / "study.log"))


def test_a_storage_of_another_space_is_refused(shared):
    shared = replace(shared, space="space.yaml")
    study = optuna_engine.open_study(shared, 0)
    optuna_engine.require_same(study, shared, "choices: {a: [1]}")
    optuna_engine.require_same(optuna_engine.open_study(shared, 1), shared, "choices: {a: [1]}")
    elsewhere = replace(shared, data=DataConfig("/photos", root="/data"))
    for config, space in ((shared, "choices: {a: [2]}"), (elsewhere, "choices: {a: [1]}")):
        with pytest.raises(UsageError, match=r"study\.log: has the trials of another space"):
            optuna_engine.require_same(study, config, space)


def test_no_candidate_of_a_small_space_is_trained_twice(shared, tmp_path, monkeypatch):
    small = TableProblem("micro_nars")
    names = [choice.name for choice in small.architecture]
    small.architecture = tuple(
        Choice(c.name, c.values[: 2 if c.name == names[0] else 1]) for c in small.architecture
    )
    small.recipe = tuple(Choice(c.name, c.values[:1], when=c.when) for c in small.recipe)
    monkeypatch.setattr(optuna_engine, "find_problem", lambda config: small)
    for worker in range(2):
        optuna_engine.work(replace(shared, budget=6), tmp_path, worker)
    trials = optuna_engine.trials_of(optuna_engine.open_study(shared, 0)).values()
    assert sorted(trial.candidate[names[0]] for trial in trials) == sorted(
        small.architecture[0].values
    )
