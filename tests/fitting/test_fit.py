"""A whole fit, from images to an export: its files, its page, and its end at any moment."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from html_view import View

from smallfry.__main__ import main
from smallfry.errors import DataError, RunError, Stopped, UsageError
from smallfry.fitting import compressing
from smallfry.fitting import run as fit_module
from smallfry.fitting.config import FitConfig
from smallfry.fitting.costs import Costs
from smallfry.fitting.plan import Plan, Planned
from smallfry.fitting.planning import make_plan
from smallfry.fitting.run import fit, load_images
from smallfry.fitting.variants import INT8
from smallfry.fitting.zoo import Entry, scaled
from smallfry.search import evaluation
from smallfry.training.config import DataConfig
from smallfry_runtime.runtime import Runtime

DATA = DataConfig("digits", limit=200)
CONFIG = FitConfig(DATA, max_kb=20, minutes=1, threads=1, device="cpu")
ARGUMENTS = ["--data", "digits", "--data.limit", "200", "--max_kb", "20", "--minutes", "1"]
ARGUMENTS += ["--threads", "1", "--device", "cpu"]


def stored_plan(folder, config=CONFIG, epochs=(1, 2), tuning=0.0):
    """Begin a fit with a plan of two candidates, as measuring takes most of a small fit."""
    data = load_images(config)
    candidates = []
    for width, kb in ((0.35, 14.7), (0.25, 12.0)):
        entry = Entry("loopnet_70k", "loopnet_70k", width, "loopnet", scaled("loopnet_70k", width))
        costs = Costs(8000, 50_000, {"float32": 3 * kb, "int8": kb}, {"float32": 0.1, "int8": 0.1})
        candidates.append(Planned(entry, costs, 1.0, "32-true"))
    seconds = 2 * epochs[0] / (0.3 / 0.7)  # of two rungs, with shares 3/7 and 4/7
    plan = Plan(tuple(candidates), (2, 1), seconds, tuning, 1, data.fingerprint, {"vit": "slow"})
    folder.mkdir(parents=True, exist_ok=True)
    fit_module.write_result(config, folder, None)
    plan.write(folder / "plan.json")
    return folder


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A fit that the tests only read."""
    folder = stored_plan(tmp_path_factory.mktemp("fitted") / "fit")
    return fit(CONFIG, folder, quiet=True), folder


# Result


@pytest.mark.slow
def test_the_chosen_export_is_within_the_budget_and_answers_as_the_result_says(fitted):
    found, folder = fitted
    chosen, test = found.summary["chosen"], found.summary["test"]
    assert found.met
    assert found.summary["lacks"] is None
    runtime = Runtime(folder / "export", threads=1)
    assert runtime.file_bytes / 1000 == chosen["kb"] <= 20
    images = load_images(CONFIG).test
    answers = runtime.predict(images.images.numpy()).probabilities.argmax(axis=1)
    assert (answers == images.labels.numpy()).mean() == test["accuracy"]
    assert json.loads((folder / "fit.json").read_text())["result"] == found.summary


@pytest.mark.slow
def test_each_rung_goes_on_with_the_run_of_the_last(fitted):
    _, folder = fitted
    trials = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    assert [trial["candidate"]["rung"] for trial in trials] == [0, 0, 1]
    best = max(trials[:2], key=lambda trial: trial["value"])
    assert trials[2]["candidate"]["model"] == best["candidate"]["model"]
    assert trials[2]["measured"]["epochs"] > best["measured"]["epochs"]
    assert len(list((folder / "runs").iterdir())) == 2


@pytest.mark.slow
def test_the_page_has_the_choice_all_that_was_tried_and_how_to_run_it(fitted):
    found, folder = fitted
    html = found.page.read_text()
    view = View(html)
    text = " ".join(view.texts)
    chosen = found.summary["chosen"]
    assert chosen["name"] in text
    assert f"{100 * found.summary['test']['accuracy']:.2f} %" in text
    assert "smallfry predict export IMAGE" in text
    assert len(view.of("img")) == 2
    assert all(image["src"].startswith("data:image/png;base64,") for image in view.of("img"))
    assert "vit" in text  # what was left out
    for line in (folder / "exports.jsonl").read_text().splitlines():
        assert json.loads(line)["name"] in text
    assert "http" not in html.replace("http-equiv", "")


@pytest.mark.slow
def test_a_fit_that_has_ended_is_only_read_again(fitted, monkeypatch, capsys):
    found, folder = fitted
    monkeypatch.setattr(fit_module, "load_images", lambda _: pytest.fail("loaded again"))
    assert fit(CONFIG, folder) == (found.met, found.summary, found.page)
    assert main(["fit", *ARGUMENTS, "--to", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "page:" in out
    assert "smallfry predict" in out
    assert main(["fit", *ARGUMENTS, "--to", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["met"]


@pytest.mark.slow
def test_a_dry_run_prints_the_plan_and_trains_nothing(fitted, capsys, monkeypatch):
    _, folder = fitted
    monkeypatch.setattr(fit_module, "train_rung", lambda *_: pytest.fail("trained"))
    before = sorted(folder.rglob("*"))
    assert main(["fit", *ARGUMENTS, "--to", str(folder), "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "loopnet_70k-0.35" in out
    assert "2, then 1 of these candidates would be trained" in out
    assert main(["fit", *ARGUMENTS, "--to", str(folder), "--dry_run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"] == [2, 1]
    assert sorted(folder.rglob("*")) == before


# What is not met


def again(fitted, tmp_path, **changes):
    """Conclude the same trainings under other limits, in a copy of the folder."""
    config = replace(CONFIG, **changes)
    folder = tmp_path / "fit"
    shutil.copytree(fitted[1], folder)
    fit_module.write_result(config, folder, None)
    return fit(config, folder, quiet=True), folder


@pytest.mark.slow
def test_an_impossible_budget_keeps_the_nearest_and_says_what_would_have_to_give(
    fitted, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(compressing, "find_variants", lambda *_: [INT8])
    kb = fitted[0].summary["chosen"]["kb"]
    found, folder = again(fitted, tmp_path, max_kb=0.99 * kb - 3, max_ms=100.0)
    nearest = found.summary["chosen"]
    assert not found.met
    assert f"the nearest has {nearest['kb']:.4g} kB" in found.summary["lacks"]
    allowed = float(found.summary["lacks"].split("--max_kb ")[1])
    assert nearest["kb"] <= allowed < 1.01 * nearest["kb"]
    assert Runtime(folder / "nearest").file_bytes / 1000 == nearest["kb"]
    assert "Not met:" in found.page.read_text()
    arguments = ["--max_kb", str(0.99 * kb - 3), "--max_ms", "100"]
    assert main(["fit", *ARGUMENTS, *arguments, "--to", str(folder)]) == 1
    assert "not met: no export is within" in capsys.readouterr().out


@pytest.mark.slow
def test_an_accuracy_that_is_missed_is_not_met_but_the_export_is_there(fitted, tmp_path):
    found, folder = again(fitted, tmp_path, min_accuracy=100.0)
    assert not found.met
    assert "not 100 %: allow more --minutes than 1, or a larger budget" in found.summary["lacks"]
    assert (folder / "export" / "manifest.json").is_file()


@pytest.mark.slow
def test_a_failed_candidate_is_a_failed_trial_and_others_go_on(tmp_path, monkeypatch):
    folder, train = stored_plan(tmp_path / "fit"), evaluation.train

    def failing(config, reporter=None):
        if config.run.name == "loopnet_70k-0.35":
            raise RuntimeError("too hot\nto train")
        return train(config, reporter)

    monkeypatch.setattr(evaluation, "train", failing)
    monkeypatch.setattr(fit_module.Exports, "make", lambda *_: iter(()))
    found = fit(CONFIG, folder, quiet=True)
    trials = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    assert [trial["failure"] for trial in trials] == ["too hot", None, None]
    assert found.summary["lacks"].startswith("no candidate could be exported")
    assert "failed: too hot" in found.page.read_text()


# Wrong inputs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_kb": 21.0}, "holds a fit with max_kb 20, not 21"),
        ({"max_ms": 2.0}, "holds a fit with max_ms none, not 2"),
        ({"data": replace(DATA, limit=100)}, "holds a fit with data.limit 200, not 100"),
        ({"seed": 1}, "holds a fit with seed 0, not 1"),
    ],
)
def test_a_folder_of_a_fit_with_other_settings_is_refused(fitted, changes, message):
    with pytest.raises(UsageError, match=message):
        fit(replace(CONFIG, **changes), fitted[1])


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(RunError, match=r"not a fit folder, it holds letter.txt; use another --to"):
        fit(CONFIG, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("text", ["{", "[]", '{"settings": 3, "result": null}'])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, text):
    (tmp_path / "fit.json").write_text(text)
    with pytest.raises(RunError, match=r"fit.json: damaged"):
        fit(CONFIG, tmp_path)


def test_a_plan_of_other_data_is_refused(tmp_path):
    folder = stored_plan(tmp_path / "fit")
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps(plan | {"fingerprint": "another"}))
    with pytest.raises(DataError, match="began on other data"):
        fit(CONFIG, folder)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--data", "nowhere", "--max_kb", "20", "--to", "x"], 2, "nowhere"),
        (["--max_kb", "-3", "--to", "x"], 2, "max_kb must be more than 0"),
        (["--to", "x"], 2, "--max_kb, --max_ms or both"),
        (["--max_kb", "20"], 2, "--to DIR"),
        (["--max_kb", "20", "--target", "abacus", "--to", "x"], 2, "no device format 'abacus'"),
        (["--max_kb", "20", "--candidates", "[alexnet]", "--to", "x"], 2, "alexnet"),
        (["--max_kb", "20", "--search", "luck", "--to", "x"], 2, "search"),
    ],
)
def test_wrong_options_are_refused_in_one_line(
    arguments, code, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", *arguments]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_folder_without_images_is_refused(tmp_path, capsys):
    (tmp_path / "photos" / "cats").mkdir(parents=True)
    folder = tmp_path / "fit"
    data = str(tmp_path / "photos")
    assert main(["fit", "--data", data, "--max_kb", "20", "--to", str(folder)]) == 1
    assert "photos" in capsys.readouterr().err
    assert not folder.exists()


def test_too_few_minutes_for_an_epoch_are_refused(tmp_path, monkeypatch):
    def plan(*_):
        raise UsageError("0.001 minutes are too few for an epoch of any candidate")

    monkeypatch.setattr(fit_module, "make_plan", plan)
    with pytest.raises(UsageError, match="too few for an epoch"):
        fit(replace(CONFIG, minutes=0.001), tmp_path / "fit")


# Stopping


@pytest.mark.slow
def test_a_signal_ends_with_what_is_kept_and_the_same_call_goes_on(tmp_path, monkeypatch, fitted):
    folder, train = stored_plan(tmp_path / "fit"), evaluation.train

    def stopped(config, reporter=None):
        if config.run.name == "loopnet_70k-0.25":
            os.kill(os.getpid(), signal.SIGTERM)
        return train(config, reporter)

    monkeypatch.setattr(evaluation, "train", stopped)
    monkeypatch.setattr(fit_module.Exports, "make", lambda *_: iter(()))
    with pytest.raises(Stopped, match="the same command goes on"):
        fit(CONFIG, folder, quiet=True)
    monkeypatch.setattr(evaluation, "train", train)
    fit(CONFIG, folder, quiet=True)
    assert (folder / "trials.jsonl").read_text() == (fitted[1] / "trials.jsonl").read_text()


def decided(summary):
    """All of a result but the measured time."""
    chosen = {name: value for name, value in summary["chosen"].items() if name != "ms"}
    return {**summary, "chosen": chosen}


@pytest.mark.slow
def test_a_fit_that_is_killed_twice_makes_the_same_choice(fitted, tmp_path):
    whole, folder = fitted[1], stored_plan(tmp_path / "killed")
    command = [sys.executable, "-m", "smallfry", "fit", *ARGUMENTS, "--to", str(folder)]
    for begun in (folder / "runs" / "loopnet_70k-0.25" / "config.yaml", folder / "exports"):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not begun.exists() and process.poll() is None:
            time.sleep(0.02)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert json.loads((folder / "fit.json").read_text())["result"] is None
    assert decided(fit(CONFIG, folder, quiet=True).summary) == decided(fitted[0].summary)
    assert (folder / "trials.jsonl").read_text() == (whole / "trials.jsonl").read_text()


@pytest.mark.slow
def test_tpe_proposes_models_with_recipes_and_the_best_goes_on(tmp_path, monkeypatch):
    pytest.importorskip("optuna", reason="TPE needs the extra search")
    config = replace(CONFIG, search="tpe")
    folder = stored_plan(tmp_path / "fit", config)
    monkeypatch.setattr(fit_module.Exports, "make", lambda *_: iter(()))
    fit(config, folder, quiet=True)
    lines = (folder / "trials.jsonl").read_text().splitlines()
    trials = [json.loads(line) for line in lines]
    assert [trial["candidate"]["rung"] for trial in trials] == [0, 0, 1]
    for trial in trials:
        assert {*trial["candidate"]} == {"model", "lr", "augment", "rung"}
    best = max(trials[:2], key=lambda trial: trial["value"])["candidate"]
    assert trials[2]["candidate"] == {**best, "rung": 1}


@pytest.mark.slow
def test_a_plan_is_made_from_measured_costs_and_speeds(monkeypatch):
    monkeypatch.setattr("smallfry.fitting.planning.SPEED_SECONDS", 0.3)
    config = replace(CONFIG, minutes=0.5, candidates=("resnet8_mlperf_tiny",))
    lines = []
    plan = make_plan(config, load_images(config), lines.append)
    assert {each.entry.model for each in plan.candidates} == {"resnet8_mlperf_tiny"}
    assert all(each.epoch_seconds > 0 for each in plan.candidates)
    assert any(each.fits(config.budget) for each in plan.candidates)
    assert 15 <= plan.seconds + plan.tuning_seconds < 30
    assert any("measuring" in line for line in lines)
