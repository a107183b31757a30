"""What a race runs, in which order, with which settings, and after an interruption anywhere."""

import json
from dataclasses import replace

import pytest

from smallfry.errors import UsageError
from smallfry.studies import race
from smallfry.studies.config import RaceConfig
from smallfry.studies.contestants import CONTESTANTS, propose
from smallfry.studies.log import TrialLog
from smallfry.studies.race import APPROXIMATING, AUTOENCODER, TWO_LEVEL, best_trial, run_race

CONFIG = RaceConfig(
    contestants=("adamw", "sgd", "kfac"),
    seconds=4.0,
    seeds=2,
    tuning_trials=3,
    tuning_seconds=1.5,
    fisher_seconds=5.0,
    processes=1,
)


def loss_of(job):
    """A loss that is least at the second proposal, but for SGD, which has a tie."""
    if job.contestant == "sgd":
        return 0.25
    return abs(job.trial - 1) + 0.1


class Machine:
    """Stand-in for the training of trials, which can be stopped and where some diverge."""

    def __init__(self):
        self.jobs, self.stop_at, self.diverging = [], None, ()

    def work(self, job, resources, watching):
        if self.stop_at == len(self.jobs):
            raise KeyboardInterrupt
        self.jobs.append(job)
        if job.phase == "fisher":
            points = {"points": [{"step": 0, "layers": {"0": 0.5}}]}
            return [(name, dict(CONTESTANTS[name].defaults), points) for name in watching]
        diverged = job.contestant in self.diverging and job.trial > 0
        points = [] if diverged else [{"train": 1.0, "validation": loss_of(job)}]
        return [(job.contestant, job.settings, {"points": points, "diverged": diverged})]


@pytest.fixture
def machine(monkeypatch):
    found = Machine()
    monkeypatch.setattr(race, "_work", found.work)
    monkeypatch.setattr(race, "load_examples", lambda *_: None)
    monkeypatch.setattr(race, "provenance", lambda device: {"device": str(device)})
    monkeypatch.setattr(race, "write_report", lambda records, folder, *_: folder / "report.html")
    return found


def told(folder):
    """Records without what differs from machine to machine."""
    records = TrialLog(folder).read()
    return [{k: v for k, v in each.items() if k != "provenance"} for each in records]


def keys(records):
    return [(r["phase"], r["contestant"], r["seed"], r["trial"]) for r in records]


def test_a_race_measures_tunes_and_then_runs_defaults_and_the_tuned(machine, tmp_path):
    run_race("autoencoder", CONFIG, tmp_path)
    records = told(tmp_path)
    names = CONFIG.contestants
    assert keys(records) == [
        ("fisher", "kfac", 0, 0),
        *(("tuning", name, 0, n) for name in names for n in range(3)),
        *(("defaults", name, seed, 0) for seed in range(2) for name in names),
        *(("tuned", name, seed, 0 if name == "sgd" else 1) for seed in range(2) for name in names),
    ]
    seconds = {"fisher": 5.0, "tuning": 1.5, "defaults": 4.0, "tuned": 4.0}
    for record in records:
        contestant = CONTESTANTS[record["contestant"]]
        assert record["seconds"] == seconds[record["phase"]]
        assert (record["label"], record["family"]) == (contestant.label, contestant.family)
        assert (record["problem"], record["clock"], record["study"]) == (
            *("curves", "cpu", "autoencoder"),
        )
        if record["phase"] in ("tuning", "tuned"):
            proposed = propose(contestant, 3)[record["trial"]]
            assert record["settings"] == pytest.approx(proposed, rel=1e-5)
        if record["phase"] == "defaults":
            assert record["settings"] == dict(contestant.defaults)


@pytest.mark.parametrize("stop_at", [0, 1, 5, 10, 15, 21])
def test_a_race_that_is_interrupted_anywhere_ends_as_an_undisturbed_one(machine, tmp_path, stop_at):
    run_race("autoencoder", CONFIG, tmp_path / "whole")
    whole, machine.jobs = len(machine.jobs), []
    machine.stop_at = stop_at
    with pytest.raises(KeyboardInterrupt):
        run_race("autoencoder", CONFIG, tmp_path / "stopped")
    assert len(told(tmp_path / "stopped")) == stop_at
    machine.stop_at = None
    run_race("autoencoder", CONFIG, tmp_path / "stopped")
    assert told(tmp_path / "stopped") == told(tmp_path / "whole")
    assert len(machine.jobs) == whole == 22
    before = (tmp_path / "stopped" / "trials.jsonl").read_bytes()
    run_race("autoencoder", CONFIG, tmp_path / "stopped")
    assert (tmp_path / "stopped" / "trials.jsonl").read_bytes() == before


def announced(capsys):
    first = capsys.readouterr().out.splitlines()[0]
    return 0 if first.startswith("all trials are done") else int(first.split()[0])


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({}, 0),
        ({"seeds": 3}, 6),
        ({"contestants": ("muon",)}, 7),
        ({"contestants": ("muon", "adamw")}, 7),
        ({"contestants": ("adamw",), "seeds": 1}, 0),
        ({"contestants": ("ekfac",), "seeds": 1}, 6),
    ],
)
def test_as_many_trials_are_announced_as_are_run(machine, tmp_path, capsys, changes, missing):
    run_race("autoencoder", CONFIG, tmp_path)
    assert announced(capsys) == len(machine.jobs) == 22
    machine.jobs = []
    run_race("autoencoder", replace(CONFIG, **changes), tmp_path)
    assert announced(capsys) == len(machine.jobs) == missing


def test_more_of_anything_runs_only_what_is_missing(machine, tmp_path):
    run_race("autoencoder", CONFIG, tmp_path)
    before, machine.jobs = keys(told(tmp_path)), []
    run_race(
        "autoencoder", replace(CONFIG, seeds=3, contestants=("sgd", "kfac", "ekfac")), tmp_path
    )
    after = keys(told(tmp_path))
    assert after[: len(before)] == before
    added = after[len(before) :]
    assert ("fisher", "ekfac", 0, 0) in added
    assert ("fisher", "kfac", 0, 0) not in added
    assert len(added) == len(set(added)) == len(set(after)) - len(before)
    assert {key for key in added if key[1] == "sgd"} == {
        *[("defaults", "sgd", 2, 0), ("tuned", "sgd", 2, 0)]
    }
    assert sum(key[1] == "ekfac" for key in added) == 1 + 3 + 3 + 3


def test_a_better_setting_of_a_longer_search_is_run_anew(machine, tmp_path):
    run_race("autoencoder", replace(CONFIG, tuning_trials=1, contestants=("adamw",)), tmp_path)
    assert ("tuned", "adamw", 0, 0) in keys(told(tmp_path))
    run_race("autoencoder", replace(CONFIG, contestants=("adamw",)), tmp_path)
    found = keys(told(tmp_path))
    assert {key for key in found if key[0] == "tuned"} == {
        ("tuned", "adamw", seed, trial) for seed in (0, 1) for trial in (0, 1)
    }


def test_who_always_diverges_has_no_tuned_run(machine, tmp_path):
    machine.diverging = ("adamw",)
    run_race("autoencoder", replace(CONFIG, fisher_seconds=0), tmp_path)
    tuned = [key for key in keys(told(tmp_path)) if key[0] == "tuned"]
    # of AdamW only the first setting, the defaults, is left
    assert {(name, trial) for _, name, _, trial in tuned} == {
        *[("adamw", 0), ("sgd", 0), ("kfac", 1)]
    }
    none = [{**each, "measured": {"points": [], "diverged": True}} for each in told(tmp_path)]
    assert best_trial(none, "curves", "adamw", 3) is None


def test_without_tuning_or_fisher_errors_only_the_defaults_run(machine, tmp_path):
    config = replace(CONFIG, tuning_trials=0, fisher_seconds=0)
    run_race("autoencoder", config, tmp_path)
    assert {key[0] for key in keys(told(tmp_path))} == {"defaults"}
    assert len(machine.jobs) == 6


def test_who_approximates_nothing_has_no_fisher_error(machine, tmp_path):
    run_race("autoencoder", replace(CONFIG, contestants=("adamw", "sgd")), tmp_path)
    assert "fisher" not in {key[0] for key in keys(told(tmp_path))}


def test_problems_share_a_folder_and_keep_to_themselves(machine, tmp_path):
    config = replace(CONFIG, contestants=("adamw",), fisher_seconds=0)
    run_race("autoencoder", config, tmp_path)
    count = len(machine.jobs)
    other = replace(config, problem="convnet", seconds=9.0, tuning_seconds=2.0)
    run_race("two-level", other, tmp_path)
    assert len(machine.jobs) == 2 * count
    assert {(r["problem"], r["study"]) for r in told(tmp_path)} == {
        *[("curves", "autoencoder"), ("convnet", "two-level")]
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seconds": 5.0}, r"ran for 4 s \(defaults, cpu time\), not 5 s \(cpu time\)"),
        ({"tuning_seconds": 1.0}, r"ran for 1.5 s \(tuning, cpu time\), not 1 s"),
        ({"fisher_seconds": 1.0}, r"ran for 5 s \(fisher, cpu time\), not 1 s"),
        ({"threads": 2}, r"cpu time\), not .* \(wall time\): use the same times"),
        ({"fisher_seconds": float("inf")}, "fisher_seconds must be at least 0 and finite, got inf"),
        ({"tuning_seconds": float("nan")}, "tuning_seconds must be a number above 0, got nan"),
        ({"seconds": -1.0}, "seconds must be a number above 0"),
        ({"threads": 0}, "threads must be at least 1"),
    ],
)
def test_other_times_and_impossible_ones_are_refused(machine, tmp_path, changes, message):
    run_race("autoencoder", CONFIG, tmp_path)
    before = (tmp_path / "trials.jsonl").read_bytes()
    with pytest.raises(UsageError, match=message):
        run_race("autoencoder", replace(CONFIG, **changes), tmp_path)
    assert (tmp_path / "trials.jsonl").read_bytes() == before


def test_half_a_last_line_is_run_again(machine, tmp_path):
    run_race("autoencoder", CONFIG, tmp_path)
    file, whole = tmp_path / "trials.jsonl", told(tmp_path)
    content = file.read_bytes()
    file.write_bytes(content[:-7])
    machine.jobs = []
    run_race("autoencoder", CONFIG, tmp_path)
    assert len(machine.jobs) == 1
    assert told(tmp_path) == whole
    for line in file.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_contestants_by_default_exist_and_those_that_approximate_are_ours():
    for names in (AUTOENCODER, TWO_LEVEL, APPROXIMATING):
        assert set(names) <= set(CONTESTANTS)
        assert len(set(names)) == len(names)
    assert {CONTESTANTS[name].family for name in APPROXIMATING} == {"ours"}
