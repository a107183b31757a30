"""Folders of fits whose files were altered, exports that are made once, and the page of a fit."""

import json
from dataclasses import replace

import numpy as np
import pytest
from html_view import View

from smallfry.data import load_data
from smallfry.errors import RunError, Stopped
from smallfry.fitting import compressing
from smallfry.fitting import run as fit_module
from smallfry.fitting.compressing import Exports, Finalist, finalists
from smallfry.fitting.config import Budget, FitConfig
from smallfry.fitting.costs import Costs
from smallfry.fitting.page import write_page
from smallfry.fitting.plan import Plan, Planned
from smallfry.fitting.progress import FitProgress
from smallfry.fitting.run import fit
from smallfry.fitting.rungs import FitSpace, build_search
from smallfry.fitting.verify import Verified, verified
from smallfry.fitting.zoo import Entry, scaled
from smallfry.search import RUNG, Trial, evaluation
from smallfry.training.config import DataConfig

TINY = "loopnet_70k"
CONFIG = FitConfig(
    DataConfig("digits", limit=60), max_kb=20, minutes=1, threads=1, device="cpu", pretrained=()
)
SMALL, LARGE = f"{TINY}-0.25", f"{TINY}-0.35"


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", limit=60)


def plan_of(data, kb=(14.7, 12.0)):
    candidates = []
    for width, size in zip((0.35, 0.25), kb, strict=True):
        entry = Entry(TINY, TINY, width, "loopnet", scaled(TINY, width))
        costs = Costs(
            8000, 50_000, {"float32": 3 * size, "int8": size}, {"float32": 0.1, "int8": 0.2}
        )
        candidates.append(Planned(entry, costs, 1.0, "32-true"))
    return Plan(tuple(candidates), (2, 1), 6.0, 8.0, 1, data.fingerprint, {"vit": "too <slow>"})


def space_of(data, config=CONFIG, **more):
    return FitSpace(plan_of(data, **more), config, data, {}, lambda each: None)


def trial(name, rung, value=80.0, **more):
    figures = {"accuracy": value / 100, "loss": 0.5, "epochs": 2}
    return Trial(
        {"model": name, RUNG: rung}, value, 0, {"kb": 12.0, "ms": 0.2}, 1.0, figures | more
    )


# Altered trials


@pytest.fixture
def untrained(monkeypatch):
    """Any training is an error."""

    def train(*_):
        raise AssertionError("a training began")

    monkeypatch.setattr(evaluation, "train_run", train)


def stored(folder, data, trials, plan=None):
    folder.mkdir()
    fit_module.write_result(CONFIG, folder, None)
    (plan or plan_of(data)).write(folder / "plan.json")
    lines = [each if isinstance(each, str) else json.dumps(each.to_dict()) for each in trials]
    (folder / "trials.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


@pytest.mark.parametrize(
    ("trials", "message"),
    [
        ([trial("resnet20_he", 0)], "is none of this search"),
        ([trial(LARGE, 0), trial(SMALL, 0), trial("vit", 1)], "is none of this search"),
        ([trial(LARGE, 1)], "is none of this search"),
        ([trial(LARGE, 0), trial(LARGE, 0)], "is none of this search"),
        ([replace(trial(LARGE, 0), candidate={"model": LARGE})], "is none of this search"),
        ([replace(trial(LARGE, 0), candidate={RUNG: 0})], "is none of this search"),
        (
            [trial(LARGE, 0), replace(trial(SMALL, 0), measured={"loss": 0.1})],
            rf"the trial of {SMALL} lacks accuracy, epochs; remove its line",
        ),
        ([replace(trial(LARGE, 0), cost={})], "lacks kb, ms"),
        (["{"], "line 1: not a trial"),
        ([json.dumps(trial(LARGE, 0).to_dict() | {"value": "high"})], "line 1: not a trial"),
    ],
)
def test_altered_trials_are_named_before_anything_is_trained(
    trials, message, digits, tmp_path, untrained
):
    folder = stored(tmp_path / "fit", digits, trials)
    before = (folder / "trials.jsonl").read_text()
    with pytest.raises(RunError, match=rf"(?s)trial.*{message}|{message}"):
        fit(CONFIG, folder, quiet=True)
    assert (folder / "trials.jsonl").read_text() == before
    assert json.loads((folder / "fit.json").read_text())["result"] is None


def test_a_fit_whose_trials_are_all_there_trains_nothing_and_goes_on_with_exports(
    digits, tmp_path, untrained, monkeypatch
):
    known = [trial(LARGE, 0, 70.0), trial(SMALL, 0, 75.0), trial(SMALL, 1, 85.0)]
    folder, made = stored(tmp_path / "fit", digits, known), []

    def make(self, best, report):
        made.extend(best)
        return iter(())

    monkeypatch.setattr(Exports, "make", make)
    found = fit(CONFIG, folder, quiet=True)
    assert not found.met
    assert found.summary["lacks"] == "no candidate could be exported: none was trained"
    assert [(each.run, each.trial) for each in made] == [(SMALL, known[2]), (LARGE, known[0])]
    assert fit(CONFIG, folder, quiet=True) == found


def test_a_search_of_a_fit_asks_for_all_candidates_and_then_for_the_best(digits):
    search = build_search(space_of(digits))
    asked = search.ask(9)
    assert asked == [{"model": LARGE, RUNG: 0}, {"model": SMALL, RUNG: 0}]
    search.tell([trial(LARGE, 0, 70.0), trial(SMALL, 0, 75.0)])
    assert search.ask(9) == [{"model": SMALL, RUNG: 1}]


# Exports


@pytest.fixture
def exporting(monkeypatch):
    """Exports that only make a folder, of figures by name, and the names that were made."""
    figures, made = {}, []

    def export(trained, facts, places, data, target):
        for place in places.values():
            if isinstance(figures.get(place.name), Exception):
                raise figures[place.name]
            place.mkdir(parents=True)
            made.append(place.name)

    def measured(answering, data, budget):
        return {"kb": 15.0, "ms": 0.1, "accuracy": 0.8, "loss": 0.5} | figures.get(
            answering.name, {}
        )

    monkeypatch.setattr(compressing, "train_run", lambda config, reporter: made.append("train"))
    monkeypatch.setattr(compressing, "gather", lambda source, which: (source, {}, None))
    monkeypatch.setattr(compressing, "export_precisions", export)
    monkeypatch.setattr(compressing, "Runtime", lambda folder, threads: folder)
    monkeypatch.setattr(compressing, "measure", measured)
    return figures, made


def made_by(folder, space, names):
    best = [Finalist(n, space.plan.find(n), trial(n, 0)) for n in names]
    return [*Exports(folder, space).make(best, lambda name, epochs: None)]


def test_exports_are_made_once_and_again_where_their_folder_is_gone(digits, tmp_path, exporting):
    _, made = exporting
    space = space_of(digits)
    first = made_by(tmp_path, space, [SMALL, LARGE])
    assert [each.name for each in first] == [f"{SMALL}-int8", f"{LARGE}-int8"]
    assert made == [each.name for each in first]
    assert Exports(tmp_path, space).read() == first
    assert made_by(tmp_path, space, [SMALL, LARGE]) == first
    assert len(made) == 2
    (tmp_path / first[0].export).rmdir()
    assert made_by(tmp_path, space, [SMALL, LARGE]) == first
    assert made == [f"{SMALL}-int8", f"{LARGE}-int8", f"{SMALL}-int8"]


def test_an_export_that_fails_is_logged_and_not_tried_again(digits, tmp_path, exporting):
    figures, made = exporting
    figures[f"{SMALL}-int8"] = RuntimeError("no such operator\nin any version")
    space = space_of(digits)
    found = made_by(tmp_path, space, [SMALL, LARGE])
    assert [each.failure for each in found] == ["no such operator", None]
    assert (found[0].kb, found[0].accuracy, found[0].export) == (None,) * 3
    del figures[f"{SMALL}-int8"]
    assert made_by(tmp_path, space, [SMALL, LARGE]) == found
    assert made == [f"{LARGE}-int8"]


def test_a_pruned_export_beyond_the_budget_is_pruned_once_more(digits, tmp_path, exporting):
    figures, made = exporting
    space = space_of(digits, replace(CONFIG, max_kb=9.0))
    figures[f"{SMALL}-pruned-int8"] = {"kb": 10.0}
    names = [each.name for each in made_by(tmp_path, space, [SMALL])]
    assert names[0] == f"{SMALL}-pruned-int8"
    assert names[-1] == f"{SMALL}-pruned-int8-more"
    assert made.count("train") == len(names)
    figures[f"{LARGE}-pruned-int8"] = {"kb": 8.9}
    assert not any("more" in each.name for each in made_by(tmp_path, space, [LARGE]))


def test_a_signal_while_exporting_logs_nothing(digits, tmp_path, exporting):
    exporting[0][f"{SMALL}-int8"] = Stopped(15, "stopped")
    space = space_of(digits)
    with pytest.raises(Stopped):
        made_by(tmp_path, space, [SMALL])
    assert Exports(tmp_path, space).read() == []


WHOLE = Verified("a-int8", "a", "a", "int8", "int8", 10.0, 0.1, 0.9, 0.3, export="exports/a-int8")


@pytest.mark.parametrize(
    "change",
    [
        {"kb": None},
        {"accuracy": "0.9"},
        {"loss": None},
        {"ms": True},
        {"more": 1},
        {"accuracy": None, "loss": None},
    ],
)
def test_an_altered_export_is_named_by_its_line(change, digits, tmp_path):
    file, exports = tmp_path / "exports.jsonl", Exports(tmp_path, space_of(digits))
    whole = json.dumps(WHOLE.to_dict())
    file.write_text(whole + "\n")
    assert exports.read() == [WHOLE]
    file.write_text(f"{whole}\n{json.dumps(WHOLE.to_dict() | change)}\n")
    with pytest.raises(RunError, match=r"exports\.jsonl, line 2: not an export"):
        exports.read()
    none = dict.fromkeys(("kb", "ms", "accuracy", "loss"))
    failed = {**WHOLE.to_dict(), **none, "failure": "out of memory"}
    assert verified(failed).failure == "out of memory"


def test_finalists_are_the_best_of_the_last_rungs_whatever_failed_later(digits):
    space = space_of(digits, kb=(30.0, 12.0))  # the larger one does not fit
    trials = [trial(LARGE, 0, 90.0), trial(SMALL, 0, 60.0), trial(LARGE, 1, 95.0)]
    assert [each.run for each in finalists(trials, space)] == [LARGE, SMALL]
    trials[2] = Trial(trials[2].candidate, None, failure="stopped")
    assert [each.trial.value for each in finalists(trials, space)] == [90.0, 60.0]
    failed = [Trial(each.candidate, None, failure="no memory") for each in trials]
    assert finalists(failed, space) == []


# Page and progress


def test_the_page_has_all_that_was_tried_with_names_as_text(digits, tmp_path):
    space = space_of(digits)
    trials = [trial(LARGE, 0), Trial({"model": SMALL, RUNG: 0}, None, failure="<b>hot</b>")]
    trials.append(trial(LARGE, 1, 90.0))
    exports = [
        replace(WHOLE, name="best", kb=19.0, methods=[{"hesso": {"sparsity": 0.25}}]),
        replace(WHOLE, name="worse", accuracy=0.7, exit_threshold=0.5, exit_steps=2.25),
        replace(WHOLE, name="large", kb=25.0, accuracy=0.95),
        Verified("lost", "a", "a", "int8", "int8", failure="too <i>hot</i>"),
    ]
    summary = {
        "met": True,
        "lacks": None,
        "chosen": exports[0].to_dict() | {"export": "export"},
        "test": {"accuracy": 0.875, "loss": 0.4, "images": 8},
        "validation_images": 1234,
    }
    probabilities = np.full((len(digits.test), 10), 0.1, np.float32)
    page = write_page(tmp_path, space, trials, exports, summary, probabilities)
    html = page.read_text()
    text = " ".join(View(html).texts)
    assert "Of 3 exports, 2 are within 20 kB" in text
    assert "highest accuracy on 1,234 validation images: 90.00%" in text
    assert "Next is large with 95.00%, 25 kB, 0.1 ms" in text
    for words in ("failed: <b>hot</b>", "failed: too <i>hot</i>", "too <slow>", "87.50 %"):
        assert words in text
    assert "early exit, 2.25 steps" in text
    assert len(View(html).of("img")) == 2
    assert not View(html).of("i")
    assert (tmp_path / "confusion_matrix.csv").is_file()


def test_the_page_of_a_fit_without_exports_has_its_reason(digits, tmp_path):
    summary = {
        "met": False,
        "lacks": "no candidate could be exported: <none>",
        "chosen": None,
        "test": None,
        "validation_images": 10,
    }
    html = write_page(tmp_path, space_of(digits), [], [], summary, None).read_text()
    text = " ".join(View(html).texts)
    assert "No candidate could be exported." in text
    assert "exported: <none>" in text
    assert "smallfry predict" not in text
    assert len(View(html).of("img")) == 1
    nearest = replace(WHOLE, kb=30.0)
    summary |= {"chosen": nearest.to_dict(), "test": {"accuracy": 0.5, "loss": 1.0, "images": 8}}
    html = write_page(tmp_path, space_of(digits), [], [nearest], summary, None).read_text()
    text = " ".join(View(html).texts)
    assert "None of 1 exports is within 20 kB; this one exceeds it least" in text
    assert "by a factor of 1.50" in text
    assert "smallfry predict exports/a-int8 IMAGE…" in text
    (tmp_path / "pictures").rename(tmp_path / "old")
    (tmp_path / "pictures").write_text("no folder")
    with pytest.raises(RunError, match="the page could not be written"):
        write_page(tmp_path, space_of(digits), [], [nearest], summary, None)


def test_progress_counts_what_ended_and_names_the_best_so_far(capsys):
    with FitProgress(3, 60.0) as progress:
        progress.run("a", 4).epoch({"epoch": 2.0}, 4, 1.0)
        assert progress.now == "a, epoch 2/4"
        progress.end("a ended", "a", 70.0, 20.0, fresh=False)  # of an earlier process
        progress.end("b ended", "b", None, 20.0)
        progress.end("[c] ended", "c", 70.0, 10.0)
        progress.end("d ended", "d", 71.5, 10.0)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["2/3", "3/3", "4/3"]
    assert "b ended; best so far a 70.00 %" in lines[0]
    assert "[c] ended; best so far a 70.00 %" in lines[1]  # equals are no better
    assert "d ended; best so far d 71.50 %" in lines[2]
    assert progress.spent == 60.0
    with FitProgress(1, 1.0, quiet=True) as progress:
        progress.end("x", "x", 1.0)
        progress.say("y")
    assert capsys.readouterr().out == ""


def test_a_budget_of_time_alone_chooses_on_time(digits):
    config = replace(CONFIG, max_kb=None, max_ms=0.15)
    space = space_of(digits, config)
    assert space.planned({"model": SMALL}).fits(config.budget)  # in float32, as int8 is slower
    assert not space.planned({"model": SMALL}).fits(Budget(None, 0.05))
    runs = [each.run for each in finalists([trial(SMALL, 0), trial(LARGE, 0, 70.0)], space)]
    assert runs == [SMALL, LARGE]
