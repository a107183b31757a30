"""Lines and remaining times of races and studies, under a clock of the test."""

import io

import pytest

from smallfry.io.console import CleanConsole
from smallfry.report.runs import Outcome
from smallfry.studies import grid_progress, progress
from smallfry.studies.contestants import CONTESTANTS
from smallfry.studies.grid_progress import GridProgress
from smallfry.studies.progress import OVERHEAD, Heartbeat, RaceProgress
from smallfry.studies.recipes import Planned
from smallfry.studies.trial import Job
from smallfry.training.config import TrainConfig


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only where the test says so."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    monkeypatch.setattr(grid_progress, "time", found)
    return found


@pytest.fixture
def printed(monkeypatch):
    """The lines printed outside of a terminal."""
    stream = io.StringIO()

    def console(**settings):
        return CleanConsole(file=stream, force_terminal=False, width=400, **settings)

    monkeypatch.setattr(progress, "CleanConsole", console)
    monkeypatch.setattr(grid_progress, "CleanConsole", console)
    return lambda: stream.getvalue().splitlines()


def job(seed=0, seconds=10.0, phase="tuned"):
    return Job(phase, "curves", "adamw", {"lr": 0.001}, seed, 0, seconds)


def measured(diverged=False):
    return {"diverged": diverged, "points": [{"train": 0.5, "validation": 0.25}]}


def test_before_the_first_ends_the_plan_is_what_is_left(clock, printed):
    race = RaceProgress(total=4, seconds=100.0, processes=2)
    assert race._left() == pytest.approx(100 * OVERHEAD / 2)
    with race:
        race.done(job(seconds=20), measured())
        assert race._left() == pytest.approx(80 * OVERHEAD / 2)  # one of two: no pace yet
    assert printed()[0] == "4 trials, 2 at a time: about 1:05"


def test_afterwards_the_rest_takes_as_long_as_what_is_done(clock, printed):
    with RaceProgress(total=3, seconds=60.0, processes=1) as race:
        clock.now += 50.0  # for 20 seconds of training
        race.done(job(seconds=20.0), measured())
        assert race._left() == pytest.approx(50 / 20 * 40)
        clock.now += 30.0
        race.done(job(1, seconds=40.0), measured())
        assert race._left() == 0.0
        assert race._standing() == "2/3 trials; 0:00 left"


def test_a_race_without_trials_writes_its_report(clock, printed):
    with RaceProgress(0, 0.0, 1):
        pass
    assert printed() == ["all trials are done; writing the report"]


def test_a_line_names_the_trial_and_its_losses(clock, printed):
    label = CONTESTANTS["adamw"].label
    with RaceProgress(12, 100.0, 12) as race:
        race.done(job(7), measured())
        race.done(job(8, phase="tuning"), measured(diverged=True))
        race.done(job(phase="fisher"), {"layers": {}})
    first, second, third = printed()[1:]
    assert first.startswith(
        f" 1/12  tuned     {label} (lr 0.001), seed 7: train 0.5000, validation 0.2500; "
    )
    assert second.startswith(f" 2/12  tuning    {label} (lr 0.001), seed 8: diverged; ")
    assert third.startswith(" 3/12  errors of the Fisher approximations; ")
    assert all(line.endswith(" left") for line in (first, second, third))


def planned(name, epochs=10, **facts):
    return Planned(name, facts, TrainConfig(epochs=epochs))


def ended(plan, minutes=1.0, epochs=None, failure=None):
    if failure is not None:
        return Outcome(plan.name, plan.facts, None, [], failure)
    summary = {
        "measured": {
            "training_seconds": 60 * minutes,
            "epochs": epochs or plan.config.epochs,
            "test": {"accuracy": 0.875},
        }
    }
    return Outcome(plan.name, plan.facts, summary, [])


def test_each_run_takes_as_long_as_the_one_most_like_it(clock, printed):
    small = [planned(f"small-{seed}", model="small", seed=seed) for seed in range(2)]
    large = [planned(f"large-{seed}", model="large", seed=seed) for seed in range(2)]
    known = {
        "small-0": ended(small[0], minutes=1.0),  # 6 seconds an epoch
        "large-0": ended(large[0], minutes=5.0),  # 30
    }
    shown = GridProgress([*small, *large], known)
    assert shown._left(shown.pace) == pytest.approx(10 * 6 + 10 * 30)
    shown.waiting = [small[1]]
    assert shown._left(shown.pace) == pytest.approx(60)
    assert shown._left([]) == 0.0


def test_epochs_of_interrupted_runs_are_not_to_come(clock, printed):
    plans = [planned("a", 10), planned("b", 20)]
    with GridProgress(plans, {}, {"b": 15.0}):
        pass
    assert printed() == ["2 runs, 0 have ended; 15 epochs to go"]
    with GridProgress(plans, {"a": ended(plans[0]), "b": ended(plans[1])}):
        pass
    assert printed()[1:] == ["all 2 runs have ended"]


def test_a_failed_run_has_no_pace(clock, printed):
    plan = planned("a")
    assert GridProgress([plan], {"a": ended(plan, failure="out of memory: 3 GB")}).pace == []


def test_time_beside_training_is_counted_for_every_run(clock, printed):
    plans = [planned("a"), planned("b"), planned("c")]
    with GridProgress(plans, {}) as shown:
        shown.begin(plans[0])
        clock.now += 90.0
        shown.end(ended(plans[0], minutes=1.0))
        assert shown.beside == [pytest.approx(30.0)]
        assert shown._left(shown.pace) == pytest.approx(2 * 30 + 2 * 60)
        shown.begin(plans[1])
        clock.now += 10.0  # the clock went wrong: never less than nothing
        shown.end(ended(plans[1], minutes=1.0))
        assert shown.beside[1] == 0.0
    lines = printed()
    assert lines[1] == "a, epoch 0/10"
    assert lines[2] == "1/3  a: test accuracy 87.50 %; 3:00 left"


def test_a_failure_is_a_line_and_leaves_the_time_unknown(clock, printed):
    plans = [planned("a"), planned("b")]
    with GridProgress(plans, {}) as shown:
        shown.begin(plans[0])
        shown.end(ended(plans[0], failure="the loss is not a number"))
    expected = "1/2  a: failed: the loss is not a number; an unknown time left"
    assert printed()[-1] == expected


def test_the_standing_names_run_epoch_and_step(clock, printed):
    plan = planned("a", 4)
    with GridProgress([plan], {}, {"a": 1.0}) as shown:
        assert shown._standing() == "loading"
        reporter = shown.begin(plan)
        assert shown._standing() == "a, epoch 1/4; loading"
        reporter.start(1200, 300)
        reporter.step(0.5, 100.0)
        assert reporter.steps == "step 301 of 1,200"
        reporter.epoch({"epoch": 2.0, "seconds": 30.0}, 4, 45.0)
        assert shown._standing() == "a, epoch 2/4; 0:45 left; step 301 of 1,200"


class FakeEvent:
    """Event whose waits the test counts; the n-th one ends the heart."""

    def __init__(self, heart, beats):
        self.heart, self.beats, self.waited = heart, beats, []

    def clear(self):
        pass

    def set(self):
        pass

    def wait(self, seconds):
        self.waited.append(seconds)
        if len(self.waited) > self.beats:
            self.heart._over.set()
        return False


def test_a_log_has_a_line_every_half_minute():
    stream = io.StringIO()
    heart = Heartbeat(CleanConsole(file=stream, force_terminal=False), lambda: "still [here]")
    heart._spoken = FakeEvent(heart, beats=3)
    heart._beat()
    assert stream.getvalue().splitlines() == ["still [here]"] * 3
    assert heart._spoken.waited == [progress.SECONDS_A_LINE] * 4


def test_a_reader_that_has_gone_does_not_end_the_study():
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    heart = Heartbeat(CleanConsole(file=Gone(), force_terminal=False), lambda: "still here")
    heart._spoken = FakeEvent(heart, beats=2)
    heart._beat()
    assert len(heart._spoken.waited) == 3
