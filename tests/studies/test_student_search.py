"""Searches for students of a teacher, in a folder and from the command."""

import json

import pytest

from smallfry.__main__ import main
from smallfry.errors import UsageError
from smallfry.search import Ledger
from smallfry.search.n2n import reward
from smallfry.studies.search.config import SearchConfig
from smallfry.studies.search.problem import StudentTable, TableProblem
from smallfry.studies.search.session import search
from smallfry.studies.search.strategies import build_strategy
from smallfry.training.config import DataConfig, TrainConfig, read_config
from smallfry.training.run import load_run
from smallfry.training.train import train


def test_the_table_of_students_is_searched_by_reward(tmp_path, capsys):
    arguments = ["search", "--space", "micro_n2n", "--strategy", "n2n", "--budget", "25"]
    assert main([*arguments, "--to", str(tmp_path), "--json"]) == 0
    best = json.loads(capsys.readouterr().out)["best"]
    assert main([*arguments, "--to", str(tmp_path)]) == 0
    assert f"best: reward {best['value']:.2f} %" in capsys.readouterr().out
    trials = Ledger(tmp_path / "ledger.jsonl").read()
    assert len(trials) == 25
    assert max(trial.value for trial in trials) == best["value"]
    teacher = StudentTable().table.record["teacher"]
    for trial in trials:
        compression = 1 - trial.cost["parameters"] / teacher["parameters"]
        ratio = trial.measured["accuracy"] * 600 / teacher["correct"]
        assert trial.value == pytest.approx(100 * reward(compression, ratio))
    assert "reward" in (tmp_path / "index.html").read_text()


def test_policies_of_a_search_begin_another(tmp_path):
    config = SearchConfig("micro_n2n", strategy="n2n", budget=12)
    search(config, tmp_path / "a", quiet=True)
    policies = tmp_path / "a" / "policies.safetensors"
    again = SearchConfig("micro_n2n", strategy="n2n", budget=12, policies=policies)
    search(again, tmp_path / "b", quiet=True)
    ledgers = [(tmp_path / name / "ledger.jsonl").read_text() for name in "ab"]
    assert ledgers[0] != ledgers[1]
    search(again, tmp_path / "b", quiet=True)  # resumes
    assert (tmp_path / "b" / "ledger.jsonl").read_text() == ledgers[1]


def test_the_best_student_is_within_the_limits(tmp_path):
    config = SearchConfig("micro_n2n", strategy="n2n", budget=30, max_parameters=900)
    found = search(config, tmp_path, quiet=True)
    trials = Ledger(tmp_path / "ledger.jsonl").read()
    assert found.best.cost["parameters"] <= 900
    assert max(trial.cost["parameters"] for trial in trials) > 900  # at first


def test_n2n_needs_a_teacher_and_policies_need_n2n(tmp_path):
    config = SearchConfig("micro_nars", strategy="n2n")
    with pytest.raises(UsageError, match="strategy n2n compresses a teacher"):
        build_strategy("n2n", TableProblem("micro_nars"), config)
    with pytest.raises(UsageError, match="policies are of the strategy n2n, not random"):
        SearchConfig("micro_n2n", strategy="random", policies=tmp_path)
    with pytest.raises(UsageError, match="leave out data"):
        search(SearchConfig(str(tmp_path), DataConfig("mnist"), "n2n"), tmp_path / "a")


@pytest.mark.slow
def test_students_of_a_run_are_distilled_and_the_best_can_be_trained(tmp_path, capsys):
    options = {"widths": [8, 12], "depths": [1, 1]}
    model = {"name": "loopnet_70k", "options": options}
    shared = {"references": False, "progress": "quiet", "threads": 1}
    train(TrainConfig(model=model, epochs=6, run=tmp_path / "teacher", **shared))
    arguments = ["search", "--space", str(tmp_path / "teacher"), "--strategy", "n2n"]
    arguments += ["--budget", "3", "--student_epochs", "1", "--to", str(tmp_path / "found")]
    assert main(arguments) == 0
    trials = Ledger(tmp_path / "found" / "ledger.jsonl").read()
    assert len(trials) == 3
    ledger = (tmp_path / "found" / "ledger.jsonl").read_text()
    assert main(arguments) == 0  # resumes, and finds all trials
    assert (tmp_path / "found" / "ledger.jsonl").read_text() == ledger
    best = max(trials, key=lambda trial: trial.value)
    config = read_config(tmp_path / "found" / "best.yaml")
    assert config.distillation.teacher == str(tmp_path / "teacher")
    assert config.epochs == 6
    start = load_run(config.model.start)
    parameters = sum(each.numel() for each in start.model.parameters())
    assert parameters == best.cost["parameters"]
    capsys.readouterr()
    done = ["train", "--config", str(tmp_path / "found" / "best.yaml"), "--epochs", "1"]
    assert main([*done, "--run", str(tmp_path / "small"), "--progress", "quiet"]) == 0
    small = load_run(tmp_path / "small")
    assert small.spec == start.spec
