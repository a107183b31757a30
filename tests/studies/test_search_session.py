"""A search in its folder: ledger, page, best configuration, and its end at any moment."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from smallfry.__main__ import main
from smallfry.errors import RunError, UsageError
from smallfry.report.search import Point, pareto
from smallfry.search import Choice, Ledger, Trial, replay
from smallfry.search.settings_space import SettingsSpace, read_settings_space
from smallfry.search.space import key_of
from smallfry.studies.search import session
from smallfry.studies.search.config import SearchConfig
from smallfry.studies.search.importance import importances, variance_share
from smallfry.studies.search.problem import TableProblem, TrainingProblem, find_problem
from smallfry.studies.search.session import search
from smallfry.studies.search.strategies import STRATEGIES, limits
from smallfry.training.config import DataConfig, read_config

ROOT = Path(__file__).parents[2]
SPACE = """
settings:
  model:
    name: vitrm_micro_patch4_8
    options: {num_heads: 2, mlp_hidden_dim: 16, depth: 1, latent_steps: 1}
  epochs: 1
  threads: 1
  references: false
choices:
  model.options.embed_dim: [16, 32]
  optimizer.name: [adamw, sgd]
  optimizer.lr: {low: 0.001, high: 0.1, log: true}
  optimizer.options.momentum: {values: [0.8, 0.9], when: {optimizer.name: [sgd]}}
"""
TABLE = SearchConfig("micro_nars", strategy="evolution", budget=12)


@pytest.fixture
def space(tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text(SPACE)
    return file


def stopping_after(monkeypatch, count):
    """Interrupt a search in a table after so many evaluations."""
    evaluate, left = TableProblem.evaluate, [count]

    def interrupted(self, *arguments):
        for trial in evaluate(self, *arguments):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            yield trial

    monkeypatch.setattr(TableProblem, "evaluate", interrupted)


# The folder


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "nars"])
def test_a_stopped_search_ends_as_an_undisturbed_one(strategy, tmp_path, monkeypatch):
    if strategy == "tpe":
        pytest.importorskip("optuna", reason="TPE needs the extra search")
    config = SearchConfig("micro_nars", strategy=strategy, budget=12, workers=3, baseline=True)
    whole = search(config, tmp_path / "whole", quiet=True)
    with monkeypatch.context() as patched:
        stopping_after(patched, 7)
        with pytest.raises(KeyboardInterrupt):
            search(config, tmp_path / "stopped", quiet=True)
    before = (tmp_path / "stopped" / "ledger.jsonl").read_text()
    again = search(config, tmp_path / "stopped", quiet=True)
    assert again.best == whole.best
    for name in ("ledger.jsonl", "space.yaml", "search.json"):
        content = (tmp_path / "stopped" / name).read_text()
        assert content == (tmp_path / "whole" / name).read_text()
    assert (tmp_path / "stopped" / "ledger.jsonl").read_text().startswith(before)
    assert len(before.splitlines()) == 7


def test_other_settings_and_a_folder_of_something_else_are_refused(tmp_path):
    search(TABLE, tmp_path / "a", quiet=True)
    with pytest.raises(UsageError, match="a search with budget 12, not 13"):
        search(SearchConfig("micro_nars", strategy="evolution", budget=13), tmp_path / "a", True)
    (tmp_path / "a" / "space.yaml").write_text("table: another\n")
    with pytest.raises(UsageError, match="another space"):
        search(TABLE, tmp_path / "a", quiet=True)
    (tmp_path / "a" / "search.json").write_text("{")
    with pytest.raises(RunError, match="damaged"):
        search(TABLE, tmp_path / "a", quiet=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "letter.txt").touch()
    with pytest.raises(RunError, match=r"not a search folder, it holds letter\.txt"):
        search(TABLE, tmp_path / "b", quiet=True)


def test_a_trial_without_its_costs_is_damage(tmp_path):
    config = SearchConfig("micro_nars", strategy="random", budget=2)
    search(config, tmp_path, quiet=True)
    ledger = tmp_path / "ledger.jsonl"
    first, second = map(json.loads, ledger.read_text().splitlines())
    ledger.write_text(json.dumps(first) + "\n" + json.dumps({**second, "cost": {}}) + "\n")
    with pytest.raises(RunError, match=r"ledger.jsonl: damaged, the trial of .* lacks its macs"):
        search(config, tmp_path, quiet=True)


def test_further_seeds_decide_among_the_best_and_are_added_to_an_ended_search(tmp_path):
    first = search(TABLE, tmp_path, quiet=True)
    config = SearchConfig("micro_nars", strategy="evolution", budget=12, confirm=4)
    found = search(config, tmp_path, quiet=True)
    assert len(found.confirmed) == 3
    assert [len(each.values) for each in found.confirmed] == [4, 4, 4]
    assert [e.mean for e in found.confirmed] == sorted(e.mean for e in found.confirmed)[::-1]
    assert found.best.candidate == found.confirmed[0].candidate
    assert first.best.candidate in [each.candidate for each in found.confirmed]
    assert sorted(file.name for file in tmp_path.glob("confirm*")) == [
        f"confirm_{number}.jsonl" for number in (1, 2, 3, 4)
    ]


def test_the_page_is_self_contained_and_shows_the_best_and_the_baseline(tmp_path):
    config = SearchConfig("micro_nars", strategy="evolution", budget=12, baseline=True, confirm=1)
    found = search(config, tmp_path, quiet=True)
    text = found.page.read_text()
    assert f"{found.best.value:.2f} %" in text
    assert text.count("data:image/png;base64,") == 1
    assert 'src="http' not in text
    assert "Further seeds" in text
    assert len(Ledger(tmp_path / "random.jsonl").read()) == 12


def test_if_every_training_fails_there_is_a_page_and_no_best(tmp_path, monkeypatch, capsys):
    def failing(self, candidates, folder, seed):
        return (Trial(each, None, failure="diverged") for each in candidates)

    monkeypatch.setattr(TableProblem, "evaluate", failing)
    arguments = ["search", "--space", "micro_nars", "--strategy", "random", "--budget", "3"]
    assert main([*arguments, "--to", str(tmp_path)]) == 1
    assert "all trainings failed" in capsys.readouterr().out
    assert "failed: diverged" in (tmp_path / "index.html").read_text()


# The command


def test_the_command_prints_progress_the_best_and_json(tmp_path, capsys):
    arguments = ["search", "--space", "micro_nars", "--strategy", "evolution", "--budget", "6"]
    assert main([*arguments, "--to", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "6/6, best so far" in out
    assert "best: " in out
    assert main([*arguments, "--to", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["best"]["cost"]["macs"] > 0
    assert main(arguments) == 2
    assert "a search needs a folder: --to DIR" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0}, "budget must be at least 1"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"max_mmac": -1.0}, "max_mmac must be more than 0"),
        ({"seed": -1}, "seed is 0"),
        ({"data": DataConfig(validation=0.0)}, "data.validation must be above 0"),
        ({"engine": "optuna", "strategy": "tpe"}, "go together"),
        ({"storage": "a.log"}, "go together"),
        ({"engine": "optuna", "storage": "a.log"}, "not nars"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        SearchConfig(**settings)


def test_unknown_spaces_and_data_of_a_table_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no such file; a space is a YAML file, the"):
        find_problem(SearchConfig(str(tmp_path / "none.yaml")))
    with pytest.raises(UsageError, match="has its own data"):
        SearchConfig("micro_nars", DataConfig("mnist"))


def test_data_that_is_not_there_is_refused_before_anything_is_written(space, tmp_path):
    with pytest.raises(UsageError, match="'nowhere' is neither a folder nor"):
        search(SearchConfig(str(space), DataConfig("nowhere")), tmp_path / "search", quiet=True)
    assert not (tmp_path / "search").exists()


# Spaces of settings


def test_a_candidate_is_a_complete_configuration_with_its_costs(space):
    found = read_settings_space(space)
    candidate = {
        "model.options.embed_dim": 32,
        "optimizer.name": "sgd",
        "optimizer.lr": 0.02,
        "optimizer.options.momentum": 0.9,
    }
    config = found.train(candidate)
    assert config.model.options == {
        **{"num_heads": 2, "mlp_hidden_dim": 16, "depth": 1, "latent_steps": 1},
        "embed_dim": 32,
    }
    assert (config.optimizer.name, config.optimizer.lr) == ("sgd", 0.02)
    assert config.optimizer.options == {"momentum": 0.9}
    assert config.epochs == 1
    assert found.base.optimizer.name == "adamw"
    assert [choice.name for choice in found.architecture] == ["model.options.embed_dim"]
    assert found.spec(candidate).arguments["embed_dim"] == 32
    costs = [found.costs({"model.options.embed_dim": width}) for width in (16, 32)]
    assert costs[0]["macs"] < costs[1]["macs"]
    assert costs[1] is found.costs(candidate)
    assert found.encode(candidate).shape == (2 + 2 + 1 + 2,)


def test_a_model_is_built_once_for_each_architecture(space, monkeypatch):
    found, read = read_settings_space(space), []
    monkeypatch.setattr(found, "train", lambda each: read.append(each) or found.base)
    for lr in (0.1, 0.01, 0.001):
        found.costs({"model.options.embed_dim": 32, "optimizer.lr": lr})
    assert read == [{"model.options.embed_dim": 32}]


def test_limits_are_kept_and_models_that_cannot_be_built_are_left_out(space):
    problem = TrainingProblem(read_settings_space(space))
    wide = {"model.options.embed_dim": 32}
    macs = problem.costs(wide)["macs"]
    assert limits(problem, SearchConfig())(wide)
    assert not limits(problem, SearchConfig(max_mmac=macs / 1e6 - 1e-6))(wide)
    assert not limits(problem, SearchConfig(max_parameters=10))(wide)
    assert not limits(problem, SearchConfig())({"model.options.embed_dim": 31})
    students = TableProblem("micro_n2n")
    assert not limits(students, SearchConfig())({f"layer{n}": 0.0 for n in range(1, 6)})


def test_the_data_of_a_search_is_that_of_all_candidates(space):
    problem = find_problem(SearchConfig(str(space), DataConfig("digits", limit=50)))
    assert problem.space.base.data.limit == 50
    assert problem.config({"optimizer.lr": 0.01}).data.limit == 50
    again = space.with_name("again.yaml")
    again.write_text(problem.text)
    assert find_problem(SearchConfig(str(again))).text == problem.text
    space.write_text(SPACE.replace("  epochs: 1", "  data: {name: mnist}"))
    with pytest.raises(UsageError, match="give it by --data"):
        find_problem(SearchConfig(str(space)))


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("choices: {epochs: [1, 2]}\nbudget: 3", UsageError, "the entries settings and choices"),
        ("settings: {epochs: 3}", UsageError, "choices are values or ranges"),
        ("choices: {}", UsageError, "a space needs choices"),
        (
            "choices: {epochs: {values: [1], when: {seed: [1]}}, seed: [1, 2]}",
            UsageError,
            "epochs depends on seed, which is no choice before it",
        ),
        ("choices: {epochs: 3}", UsageError, "choice epochs needs a list of values"),
        ("choices: {epochs: {low: 3, hi: 4}}", UsageError, "choice epochs has no 'hi'"),
        ("choices: {epochs: {low: 4, high: 3}}", UsageError, "low 4 is not below 3"),
        ("choices: {epochs: {low: a, high: 3}}", UsageError, "choice epochs"),
        ("choices: [", UsageError, "can't be read as YAML"),
        ("settings: {epoch: 3}\nchoices: {seed: [1]}", RunError, "not a configuration"),
        ("settings: {select_on: test}\nchoices: {seed: [1]}", UsageError, "select_on validation"),
        (
            "choices: {epochs: [1, 2], model.drop_rate: {values: [0.1], when: {epochs: [1]}}}",
            UsageError,
            "model.drop_rate depends on epochs",
        ),
    ],
)
def test_what_is_no_space_is_refused(text, error, message, tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text(text)
    with pytest.raises(error, match=message):
        read_settings_space(file)


def test_values_that_are_no_settings_are_refused_for_their_candidate():
    space = SettingsSpace({}, [Choice("optimizer.lr", (0.1, -1.0))])
    with pytest.raises(RunError, match=r"'optimizer\.lr': -1\.0.*must be positive"):
        space.train({"optimizer.lr": -1.0})


# Importance


def test_importance_is_the_share_of_variance_between_values():
    generator = np.random.default_rng(0)
    choices = [Choice("a", (0, 1, 2)), Choice("b", (0, 1)), Choice("lr", low=0.1, high=10)]
    trials = []
    for _ in range(400):
        a, b, rate = generator.integers(3), generator.integers(2), generator.uniform(0.1, 10)
        candidate = {"a": int(a), "b": int(b), "lr": float(rate)}
        trials.append(Trial(candidate, float(10 * a + (rate > 5))))
    trials.append(Trial({"a": 1, "b": 0, "lr": 1.0}, None))
    found = importances(choices, trials)
    assert found["a"] > 0.97
    assert found["b"] < 0.02
    assert found["lr"] < 0.05
    assert importances(choices, trials[-1:]) == {"a": 0.0, "b": 0.0, "lr": 0.0}
    assert variance_share("aab", np.ones(3)) == 0


# Trainings


@pytest.mark.slow
def test_trainings_in_two_processes_give_a_configuration_that_trains(space, tmp_path, capsys):
    arguments = ["search", "--space", str(space), "--strategy", "random", "--budget", "2"]
    arguments += ["--workers", "2", "--data", "digits", "--data.limit", "100"]
    arguments += ["--to", str(tmp_path / "found")]
    assert main(arguments) == 0
    assert "train it: smallfry train --config" in capsys.readouterr().out
    trials = Ledger(tmp_path / "found" / "ledger.jsonl").read()
    assert len({trial.seed for trial in trials}) == 2
    assert all(0 <= trial.measured["accuracy"] <= 1 for trial in trials)
    config = read_config(tmp_path / "found" / "best.yaml")
    best = max(trials, key=lambda trial: trial.value)
    assert config.model.options["embed_dim"] == best.candidate["model.options.embed_dim"]
    assert config.epochs == 1


@pytest.mark.slow
def test_two_workers_share_a_study_on_optunas_storage(tmp_path):
    pytest.importorskip("optuna", reason="the engine needs the extra search")
    settings = {"strategy": "tpe", "engine": "optuna", "max_parameters": 2000.0}
    storage = str(tmp_path / "study.log")
    config = SearchConfig("micro_nars", budget=10, workers=2, storage=storage, **settings)
    found = search(config, tmp_path / "a", quiet=True)
    trials = Ledger(tmp_path / "a" / "ledger.jsonl").read()
    assert len(trials) == 10
    assert found.best.value == max(trial.value for trial in trials)
    assert all(trial.cost["parameters"] <= 2000 for trial in trials)
    other = SearchConfig("micro_nars", budget=14, storage=storage, **settings)
    search(other, tmp_path / "b", quiet=True)
    more = Ledger(tmp_path / "b" / "ledger.jsonl").read()
    assert len(more) == 14
    assert more[:10] == trials


def test_a_storage_that_cannot_be_used_is_named(tmp_path):
    pytest.importorskip("optuna", reason="the engine needs the extra search")
    storage = f"sqlite:///{tmp_path}/none/study.db"
    config = SearchConfig("micro_nars", strategy="tpe", engine="optuna", storage=storage)
    with pytest.raises(UsageError, match=r"storage sqlite.*can't be used"):
        search(config, tmp_path / "a", quiet=True)


def test_the_settings_that_may_change_are_not_compared():
    assert {*SearchConfig.__dataclass_fields__} > session.UNCOMPARED


def test_the_front_has_the_points_that_no_cheaper_one_equals():
    points = [
        Point(90, 5.0),
        Point(80, 1.0),
        Point(85, 3.0),
        Point(80, 2.0),
        Point(70, 0.5),
        Point(60, 0.7),
    ]
    assert [(p.accuracy, p.macs) for p in pareto(points[::-1])] == [
        *((70, 0.5), (80, 1.0)),
        *((85, 3.0), (90, 5.0)),
    ]


@pytest.mark.slow
def test_the_page_of_nars_shows_predictions_beside_measurements(tmp_path):
    config = SearchConfig("micro_nars", strategy="nars", budget=24)
    search(config, tmp_path, quiet=True)
    problem, log = TableProblem("micro_nars"), Ledger(tmp_path / "ledger.jsonl")
    strategy = STRATEGIES["nars"](problem, 24, 0, limits(problem, config))
    replay(strategy, log.read())
    later = [trial for trial in log.read() if key_of(trial.candidate) in strategy.predicted]
    assert 10 < len(later) < 24  # all but those of the first round
    errors = [abs(strategy.predicted[key_of(t.candidate)] - t.value) for t in later]
    assert np.median(errors) < 10  # percent
    with Image.open(tmp_path / "pictures" / "search.png") as picture:
        four = picture.width
    search(SearchConfig("micro_nars", strategy="random", budget=4), tmp_path / "b", quiet=True)
    with Image.open(tmp_path / "b" / "pictures" / "search.png") as picture:
        assert four > 1.2 * picture.width


@pytest.mark.slow
def test_the_space_of_the_loopnet_family_can_be_searched():
    space = read_settings_space(ROOT / "recipes" / "search" / "loopnet_cifar10.yaml")
    assert space.base.model.name == "loopnet_300k"
    names = {choice.name for choice in space.architecture}
    assert {"model.options.widths", "model.options.depths"} <= names
    stages = {len(v) for c in space.architecture[:2] for v in c.values}
    assert stages == {3}
    for choice in space.choices:
        for value in choice.values or (choice.low, choice.high):
            assert space.train({choice.name: value}).epochs == 2
