"""A race on a small problem, whole and interrupted."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from smallfry.errors import RunError, UsageError
from smallfry.studies import progress
from smallfry.studies.config import RaceConfig
from smallfry.studies.contestants import CONTESTANTS, propose
from smallfry.studies.folder import locked
from smallfry.studies.log import TrialLog
from smallfry.studies.problems import PROBLEMS, Examples
from smallfry.studies.progress import RaceProgress
from smallfry.studies.race import best_trial, run_race
from smallfry.studies.trial import Job, Resources, fisher_errors, run_trial

TINY = RaceConfig(
    contestants=("adamw", "kfac"),
    seconds=0.3,
    seeds=2,
    tuning_trials=2,
    tuning_seconds=0.2,
    fisher_seconds=0.2,
    processes=1,
)

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def few_evaluated() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("smallfry.studies.trial.EVALUATED", 64)
        yield


@pytest.fixture(scope="module")
def examples() -> tuple[Examples, Examples]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for count in (600, 300):
        side = torch.arange(28)
        centre = torch.randint(4, 24, (count, 2, 1), generator=generator)
        row, column = ((side - centre[:, i]).abs() < 4 for i in (0, 1))
        pixels = (row[:, :, None] & column[:, None, :]).to(torch.uint8)[:, None] * 255
        made.append(Examples(pixels, torch.zeros(count, dtype=torch.int64), 0.0, 1.0))
    return made[0], made[1]


@pytest.mark.parametrize("name", sorted(set(CONTESTANTS) - {"soap"}))
def test_everyone_can_race(name: str, examples: tuple[Examples, Examples]) -> None:
    job = Job("defaults", "curves", name, dict(CONTESTANTS[name].defaults), 0, 0, 0.2)
    measured = run_trial(job, Resources(), *examples)
    first, last = measured["points"][0], measured["points"][-1]
    assert not measured["diverged"]
    assert first["step"] == 0
    assert last["step"] == measured["steps"] > 0
    assert measured["state_over_weights"] > 0
    assert (measured["refresh_ms"] is None) == (CONTESTANTS[name].family == "peer")


@pytest.mark.parametrize("name", ["adamw", "kfac"])
def test_training_lowers_both_losses(
    name: str, examples: tuple[Examples, Examples], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count()  # of 40 steps, however long they take
    monkeypatch.setattr(Resources, "now", lambda self: next(clock) / 80)
    job = Job("defaults", "curves", name, dict(CONTESTANTS[name].defaults), 0, 0, 1.0)
    points = run_trial(job, Resources(), *examples)["points"]
    for split in ("train", "validation"):
        assert points[-1][split] < 0.8 * points[0][split]


def test_a_trial_is_a_function_of_its_seed(examples: tuple[Examples, Examples]) -> None:
    def losses(seed: int) -> list[float]:
        job = Job("defaults", "curves", "kfac", {"lr": 0.1}, seed, 0, 0.01)
        points = run_trial(job, Resources(), *examples)["points"]
        return [points[0]["train"]]

    assert losses(3) == losses(3)
    assert losses(3) != losses(4)


def test_a_run_that_blows_up_is_told_and_not_recorded_as_numbers(
    examples: tuple[Examples, Examples],
) -> None:
    job = Job("tuning", "curves", "sgd", {"lr": 1e30}, 0, 0, 5.0)
    measured = run_trial(job, Resources(), *examples)
    assert measured["diverged"]
    assert all(math.isfinite(point["train"]) for point in measured["points"])
    assert measured["points"][-1]["seconds"] < 5.0


def test_fisher_errors_are_in_the_order_of_the_theory_and_move_nothing(
    examples: tuple[Examples, Examples],
) -> None:
    job = Job("fisher", "curves", "adamw", {"lr": 1e-3}, 0, 0, 1e-9)
    names = ["kfac", "ekfac", "kpsvd", "deflation", "kfac_corrected"]
    found = fisher_errors(job, Resources(), examples[0], names)
    assert all([point["step"] for point in points] == [0] for points in found.values())
    errors = {name: points[0]["layers"] for name, points in found.items()}
    assert len(errors["kpsvd"]) == 12
    for layer in errors["kpsvd"]:
        kfac, ekfac, kpsvd, deflation, corrected = (errors[name][layer] for name in names)
        assert deflation <= kpsvd + 1e-4
        assert kpsvd <= kfac + 1e-4
        assert deflation <= corrected + 1e-4
        assert corrected <= kfac + 1e-4
        assert ekfac <= kfac + 1e-4


def test_everyone_gets_as_many_settings_beginning_with_the_defaults() -> None:
    for contestant in CONTESTANTS.values():
        tried = propose(contestant, 6)
        assert len(tried) == 6
        assert tried[0] == contestant.defaults
        assert propose(contestant, 3) == tried[:3]
        for settings in tried:
            for name, (low, high) in contestant.ranges.items():
                assert low <= settings[name] <= high


def test_the_winner_is_the_one_that_validates_best_and_did_not_diverge() -> None:
    def record(trial: int, loss: float, diverged: bool = False) -> dict:
        measured = {"points": [{"validation": loss}], "diverged": diverged}
        keys = {"phase": "tuning", "problem": "curves", "contestant": "kfac"}
        return keys | {"trial": trial, "settings": {"lr": trial}, "measured": measured}

    records = [record(0, 0.3), record(1, 0.1, diverged=True), record(2, 0.2), record(3, 0.15)]
    best = best_trial(records, "curves", "kfac", trials=3)
    assert best is not None
    assert best["trial"] == 2
    assert best_trial(records, "mnist", "kfac", trials=3) is None


@pytest.fixture(scope="module")
def raced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("race")
    run_race("autoencoder", TINY, folder)
    return folder


def test_a_race_has_every_phase_seed_and_trial_and_a_report(raced: Path) -> None:
    records = TrialLog(raced).read()
    counted: dict = {}
    for r in records:
        key = r["phase"], r["contestant"]
        counted[key] = counted.get(key, 0) + 1
    wanted = {"tuning": 2, "defaults": 2, "tuned": 2}
    assert counted == {(p, c): n for p, n in wanted.items() for c in ("adamw", "kfac")} | {
        ("fisher", "kfac"): 1
    }
    assert (raced / "report.html").exists()
    assert records[0]["clock"] == "cpu"
    assert records[0]["provenance"]["versions"]["torch"] == torch.__version__.split("+")[0]


def test_tuned_runs_have_the_settings_of_the_best_trial(raced: Path) -> None:
    records = TrialLog(raced).read()
    for name in ("adamw", "kfac"):
        best = best_trial(records, "curves", name, 2)
        assert best is not None
        tuned = [r for r in records if r["phase"] == "tuned" and r["contestant"] == name]
        assert [r["settings"] for r in tuned] == [best["settings"]] * 2


def test_a_race_goes_on_where_it_stopped_with_more_seeds_if_wanted(
    raced: Path, tmp_path: Path
) -> None:
    lines = (raced / "trials.jsonl").read_text().splitlines(keepends=True)
    kept = lines[:-2]
    (tmp_path / "trials.jsonl").write_text("".join(kept) + lines[-1][:40])
    run_race("autoencoder", replace(TINY, seeds=3), tmp_path)
    after = (tmp_path / "trials.jsonl").read_text().splitlines(keepends=True)
    assert after[: len(kept)] == kept
    assert len(after) == len(lines) + 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"problem": "curve"}, "did you mean 'curves'"),
        ({"contestants": ("adam",)}, "did you mean 'adamw'"),
        ({"seconds": 0.0}, "seconds must be a number above 0"),
        ({"seconds": float("inf")}, "seconds must be a number above 0"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"tuning_trials": -1}, "tuning_trials must be at least 0"),
        ({"processes": 0}, "processes must be at least 1"),
        ({"processes": 10**400}, "processes must be at most 1024"),
        ({"threads": 2**31}, "threads must be at most 1024"),
        ({"fisher_seconds": float("nan")}, "fisher_seconds must be at least 0"),
        ({"seconds": 0.4}, "ran for 0.3 s"),
        ({"device": "cuda:99"}, "cuda:99"),
    ],
)
def test_a_race_that_can_not_be_meant_is_refused(raced: Path, change: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        run_race("autoencoder", replace(TINY, **change), raced)


def test_a_line_that_is_no_trial_is_named(tmp_path: Path) -> None:
    (tmp_path / "trials.jsonl").write_text('{"phase": 1}\n')
    with pytest.raises(RunError, match="line 1: not a trial"):
        TrialLog(tmp_path).read()


def test_log_drops_half_a_line_and_keeps_no_infinity(tmp_path: Path) -> None:
    log = TrialLog(tmp_path)
    record = {"phase": "tuning", "problem": "p", "contestant": "c", "measured": {"x": math.nan}}
    log.append(record)
    with open(log.file, "a") as stream:
        stream.write('{"phase": "tu')
    log.append(record | {"seed": 0.123456789})
    assert [r["measured"]["x"] for r in log.read()] == [None, None]
    assert log.read()[1]["seed"] == 0.123457


@pytest.mark.slow
def test_trials_run_in_processes_of_their_own(tmp_path: Path) -> None:
    alone = replace(TINY, fisher_seconds=0, tuning_trials=0, seeds=1)
    run_race("autoencoder", replace(alone, processes=2), tmp_path)
    records = TrialLog(tmp_path).read()
    assert {(r["phase"], r["contestant"]) for r in records} == {
        ("defaults", "adamw"),
        ("defaults", "kfac"),
    }
    assert all(r["measured"]["steps"] > 0 for r in records)


def test_a_log_shows_a_race_at_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS_A_LINE", 0.01)
    said = ""
    with RaceProgress(3, 30.0, 1) as shown:
        while "0/3 trials; 0:39 left\n" not in said:
            said += capsys.readouterr().out
    assert not shown.heart._thread.is_alive()
    assert said.startswith("3 trials, 1 at a time: about 0:39\n")


def test_two_processes_can_not_write_one_study(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(RunError, match="another process"):
        run_race("autoencoder", TINY, tmp_path)


@pytest.mark.slow
def test_a_signal_stops_a_race_soon_and_what_ended_stays(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "smallfry.cli", "study", "autoencoder"]
    command += ["--contestants", "[adamw]", "--seconds", "10000", "--seeds", "1"]
    command += ["--tuning_trials", "2", "--tuning_seconds", "0.1", "--fisher_seconds", "0"]
    command += ["--processes", "2", "--folder", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    file = tmp_path / "trials.jsonl"
    while process.poll() is None and not (file.exists() and file.stat().st_size):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert "the same command goes on" in errors
    assert len(file.read_text().splitlines()) >= 1
    assert json.loads(file.read_text().splitlines()[0])["phase"] == "tuning"
    assert not _alive(process.pid)


def _alive(parent: int) -> list[str]:
    """Processes whose parent was that one, where the system tells."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status") if os.path.isdir("/proc") else ():
        try:
            found += [str(status)] if f"\nPPid:\t{parent}\n" in status.read_text() else []
        except OSError:
            continue
    return found


def test_reported_figures_are_of_contestants_that_race() -> None:
    from smallfry.studies.reported import REPORTED

    assert set(REPORTED) <= set(PROBLEMS)
    assert all(set(figures) <= set(CONTESTANTS) for figures in REPORTED.values())
