"""Ledgers that were cut, altered or mixed up: what is whole is taken, all else is named."""

import json
from types import SimpleNamespace

import pytest

from smallfry.errors import RunError, Stopped, UsageError
from smallfry.search import (
    RUNG,
    TPE,
    Choice,
    Evolution,
    Halving,
    Ledger,
    Listed,
    RandomSearch,
    Trial,
    evaluation,
    replay,
    run,
)
from smallfry.search.evaluation import train_candidate, value_of
from smallfry.search.halving import survivors
from smallfry.search.ledger import best
from smallfry.search.rounds import run_rounds
from smallfry.search.space import key_of
from smallfry.training.config import TrainConfig

CHOICES = (Choice("a", (1, 2, 3, 4)), Choice("b", ("x", "y")), Choice("c", low=0.0, high=1.0))


def judge(candidate):
    if candidate["a"] == 4:
        return Trial(candidate, None, failure="out of memory")
    return Trial(candidate, candidate["a"] + candidate["c"], 3, {"kb": 1.5}, 0.25, {"n": [1, 2]})


def new():
    return Halving(Evolution(CHOICES, 9, seed=1, population=4, tournament=2), keep=(4, 2, 1))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished search: its file's text and its trials."""
    ledger = Ledger(tmp_path_factory.mktemp("whole") / "ledger.jsonl")
    trials = run(new(), judge, ledger)
    return ledger.file.read_text(), trials


def ledger_of(folder, text):
    file = folder / "ledger.jsonl"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return Ledger(file)


# Cut off


def test_a_search_whose_ledger_was_cut_at_any_line_ends_as_the_whole_one(whole, tmp_path):
    text, trials = whole
    lines = text.splitlines(keepends=True)
    assert len(trials) == len(lines) == 9 + 4 + 2 + 1
    for count in range(len(lines) + 1):
        ledger = ledger_of(tmp_path, "".join(lines[:count]))
        asked = []

        def counting(candidate, asked=asked):
            asked.append(candidate)
            return judge(candidate)

        assert run(new(), counting, ledger) == trials
        assert len(asked) == len(lines) - count
        assert ledger.file.read_text() == text


@pytest.mark.parametrize("kept", [1, 20, -1])
def test_a_line_that_was_half_written_is_evaluated_again_and_replaced(whole, tmp_path, kept):
    text, trials = whole
    lines = text.splitlines(keepends=True)
    ledger = ledger_of(tmp_path, "".join(lines[:3]) + lines[3][:kept])
    assert ledger.read() == trials[:3]
    assert run(new(), judge, ledger) == trials
    assert ledger.file.read_text() == text


def test_a_ledger_written_on_another_system_is_read_alike(whole, tmp_path):
    text, trials = whole
    assert ledger_of(tmp_path, text.replace("\n", "\r\n")).read() == trials
    record = json.loads(text.splitlines()[0]) | {"failure": "line\u2028and\x85more"}
    raw = json.dumps(record, ensure_ascii=False) + "\n"
    (read,) = ledger_of(tmp_path, raw).read()
    assert read.failure == "line\u2028and\x85more"


# Altered


def changed(trial, **fields):
    return json.dumps(trial.to_dict() | fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"candidate": [1, 2]},
        {"candidate": None},
        {"value": "1.0"},
        {"value": True},
        {"value": float("nan")},
        {"value": float("inf")},
        {"value": [1.0]},
        {"cost": 3},
        {"cost": None},
        {"measured": ["accuracy"]},
        {"wall": 3},
    ],
)
def test_a_line_with_a_wrong_field_is_named_by_its_number(whole, tmp_path, fields):
    text, trials = whole
    first = text.splitlines(keepends=True)[0]
    ledger = ledger_of(tmp_path, first + changed(trials[1], **fields) + "\n" + first)
    with pytest.raises(RunError, match=r"ledger\.jsonl, line 2: not a trial .*remove the line"):
        ledger.read()


@pytest.mark.parametrize(
    "line", [b"\xff\xfe", b"{}", b"null", b"", b'{"candidate": {}}', b"[" * 100_000, b"\x00"]
)
def test_a_line_of_something_else_is_named_by_its_number(whole, tmp_path, line):
    first = whole[0].splitlines(keepends=True)[0].encode()
    with pytest.raises(RunError, match=r"ledger\.jsonl, line 2: not a trial"):
        ledger_of(tmp_path, first + line + b"\n" + first).read()


def test_a_ledger_that_is_a_folder_is_an_error_and_a_missing_one_is_empty(tmp_path):
    assert Ledger(tmp_path / "ledger.jsonl").read() == []
    with pytest.raises(RunError, match="could not be read"):
        Ledger(tmp_path).read()


def test_a_value_that_was_altered_to_another_number_changes_what_is_asked_for(whole, tmp_path):
    text, trials = whole
    lines = text.splitlines(keepends=True)[:9]
    lines[8] = changed(trials[8], value=100.0) + "\n"  # the last one of the first rung
    search = new()
    replay(search, ledger_of(tmp_path, "".join(lines)).read())
    (first,) = search.ask(1)
    assert key_of(first) == key_of(trials[8].candidate | {RUNG: 1})


@pytest.mark.parametrize("swap", [(0, 9), (3, 15)])
def test_a_trial_of_a_later_rung_before_its_time_is_none_of_the_search(whole, tmp_path, swap):
    lines = whole[0].splitlines(keepends=True)
    one, other = swap
    lines[one], lines[other] = lines[other], lines[one]
    with pytest.raises(RunError, match="is none of this search"):
        run(new(), judge, ledger_of(tmp_path, "".join(lines)))


@pytest.mark.parametrize("make", [lambda: RandomSearch(CHOICES, 5), new])
def test_a_trial_that_stands_twice_is_refused(make, tmp_path):
    (candidate,) = make().ask(1)
    trial = Trial(candidate, 1.0)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append(trial)
    ledger.append(trial)
    with pytest.raises(RunError, match="is none of this search"):
        run(make(), judge, ledger)


def test_a_trial_is_told_once_to_every_strategy():
    pytest.importorskip("optuna", reason="TPE needs the extra search")
    for search in (TPE(CHOICES, 4), RandomSearch(CHOICES, 4), Evolution(CHOICES, 4)):
        (candidate,) = search.ask(1)
        search.tell([Trial(candidate, 1.0)])
        with pytest.raises(UsageError, match="was not asked for"):
            search.tell([Trial(candidate, 2.0)])
        with pytest.raises(UsageError, match="was not asked for"):
            search.tell([Trial({"a": 9}, 2.0)])
        assert [t["value"] for t in search.state_dict()["told"]] == [1.0]


def test_a_value_that_is_no_number_is_a_failed_trial_now_and_after_a_resume(tmp_path):
    def diverging(candidate):
        return Trial(candidate, float("nan") if candidate["n"] == 1 else float(candidate["n"]))

    ledger = Ledger(tmp_path / "ledger.jsonl")

    def make():
        return Halving(Listed([{"n": n} for n in range(3)]), keep=(2, 1))

    trials = run(make(), diverging, ledger)
    assert [t.value for t in trials] == [0.0, None, 2.0, 2.0, 0.0, 2.0]
    assert run(make(), diverging, ledger) == trials == ledger.read()
    assert best(trials).candidate == {"n": 2, RUNG: 0}
    assert best([trials[1]]) is best([]) is None


# Halving against its definition


@pytest.mark.parametrize("keep", [(), (1,), (5, 3), (9, 9, 1), (2, 2, 2)])
def test_rungs_are_the_best_of_the_ones_before_in_the_order_of_the_trials(keep, tmp_path):
    listed = [{"n": n} for n in range(7)]

    def value(candidate):  # with ties, and one that always fails
        number, rung = candidate["n"], candidate[RUNG]
        return None if number == 5 else float((3 * number + rung) % 4)

    trials = run(
        Halving(Listed(listed), keep), lambda c: Trial(c, value(c)), Ledger(tmp_path / "l.jsonl")
    )
    expected, rung = [n["n"] for n in listed], 0
    for count in (None, *keep):
        if count is not None:
            scored = [(value({"n": n, RUNG: rung}), -place, n) for place, n in enumerate(expected)]
            scored = [each for each in scored if each[0] is not None]
            expected = [n for *_, n in sorted(scored, reverse=True)[:count]]
            rung += 1
        found = [t.candidate["n"] for t in trials if t.candidate[RUNG] == rung]
        assert found == expected
    assert len(survivors(trials, 0, 99)) == 6


def test_a_rung_is_the_same_however_many_are_asked_for_at_once(tmp_path):
    def evaluate(candidates):
        return [judge(each) for each in reversed(list(candidates))]

    found = {
        together: run_rounds(new(), evaluate, Ledger(tmp_path / f"{together}.jsonl"), together)
        for together in (1, 2)
    }
    for trials in found.values():
        rungs = [trial.candidate[RUNG] for trial in trials]
        assert rungs == sorted(rungs)
        assert [rungs.count(rung) for rung in range(4)] == [9, 4, 2, 1]


# Evaluation


def config(folder):
    return TrainConfig(run=folder / "run", epochs=3, seed=7)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_training_whose_loss_is_no_number_has_failed(monkeypatch, tmp_path, loss):
    scores = {"accuracy": 0.1, "loss": loss}
    checkpoint = SimpleNamespace(manifest={"training": {"scores": scores}})
    monkeypatch.setattr(evaluation, "train_run", lambda *_: None)
    monkeypatch.setattr(evaluation, "load_checkpoint", lambda _: checkpoint)
    trial = train_candidate({"n": 1}, config(tmp_path), {"kb": 1.0})
    assert (trial.value, trial.seed) == (None, 7)
    assert trial.failure == f"its validation loss is {loss}"
    scores["loss"] = 0.5
    trial = train_candidate({"n": 1}, config(tmp_path), {"kb": 1.0})
    assert trial == Trial(
        {"n": 1}, value_of(0.1, 0.5), 7, {"kb": 1.0},
        measured={"accuracy": 0.1, "loss": 0.5, "epochs": 3},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "MemoryError"),
        (UsageError("no such\nmodel"), "no such"),
        (RuntimeError("\n"), ""),
    ],
)
def test_a_training_that_fails_is_a_trial_with_the_first_line_of_its_reason(
    monkeypatch, tmp_path, error, reason
):
    def fail(*_):
        raise error

    monkeypatch.setattr(evaluation, "train_run", fail)
    trial = train_candidate({"n": 1}, config(tmp_path), {})
    assert (trial.value, trial.failure) == (None, reason)


def test_a_signal_is_no_failed_trial(monkeypatch, tmp_path):
    def stop(*_):
        raise Stopped(15, "stopped")

    monkeypatch.setattr(evaluation, "train_run", stop)
    with pytest.raises(Stopped):
        train_candidate({"n": 1}, config(tmp_path), {})
