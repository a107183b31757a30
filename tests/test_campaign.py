"""The short form of ``make campaign``: some of each part, and nothing may fail.

It runs in a process of its own, as processes that have threads can't be forked safely.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from campaign import fuzz_shards, trials
from campaign.__main__ import PARTS
from campaign.record import Record, tables, write_page
from campaign.running import campaign
from campaign.soak import Sample, as_markdown, judged
from campaign.trials import Part, Verdict, run_trials

ROOT = Path(__file__).parent.parent
COUNTS = {part.name: part.short for part in PARTS}


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """All parts, one after the other, in one process that has loaded PyTorch once."""
    folder = tmp_path_factory.mktemp("campaign")
    done = subprocess.run(
        [sys.executable, "-m", "campaign", "--short", "--folder", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    return done, folder / "short"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the campaign forks, and reads /proc")
@pytest.mark.parametrize("name", COUNTS)
def test_nothing_fails_in_a_short_campaign(name, short):
    done, folder = short
    assert (folder / f"{name}.json").exists(), done.stderr[-2000:]
    record = json.loads((folder / f"{name}.json").read_text())
    assert record["failures"] == [], done.stderr[-2000:]
    assert record["done"] == COUNTS[name]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the campaign forks, and reads /proc")
def test_a_short_campaign_in_which_nothing_fails_exits_with_0(short):
    done, _ = short
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_busy_or_a_stopped_machine_is_no_hanging_process(monkeypatch):
    now, delayed = [0.0], [5.0]
    monkeypatch.setattr(trials.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(trials, "_delayed", lambda process: delayed[0])
    waiting = trials.Waiting(1)
    for passed, without_cpu, expected in (
        (1, 0, 1),
        (1, 0.75, 1.25),
        (1, 1.5, 1.25),
        (99, 0, 3.25),
    ):
        now[0] += passed
        delayed[0] += without_cpu
        assert waiting.seconds() == expected


def part_of(trial, **bounds):
    return Part("test", "nothing", lambda folder: None, trial, 3, 3, **bounds)


def failures(part):
    return [verdict.failure for _, verdict in run_trials(part, None, range(3))]


@pytest.mark.skipif(sys.platform != "linux", reason="the campaign forks, and reads /proc")
def test_a_trial_that_dies_hangs_or_raises_is_a_failure_and_the_others_go_on():
    def trial(state, number):
        if number == 1:
            os.kill(os.getpid(), 9)
        return Verdict("a", "b")

    assert failures(part_of(trial)) == [None, "the process ended with -9", None]

    def hangs(state, number):
        while number == 1:
            pass
        return Verdict("a", "b")

    assert failures(part_of(hangs, seconds=0.5)) == [None, "hangs", None]

    def sleeps(state, number):
        time.sleep(1000 if number == 1 else 0)
        return Verdict("a", "b")

    assert failures(part_of(sleeps, seconds=0.5)) == [None, "hangs", None]
    raised = failures(part_of(lambda state, number: Verdict("a", str(1 / (number - 1)))))
    assert raised[0] is None
    assert "ZeroDivisionError" in raised[1]


@pytest.mark.skipif(sys.platform != "linux", reason="the campaign forks, and reads /proc")
def test_a_trial_that_fills_memory_or_leaves_files_open_is_a_failure():
    left = []

    def leaves(state, number):
        left.extend(open(os.devnull) for _ in range(9 * number))  # noqa: SIM115
        return Verdict("a", "b")

    assert failures(part_of(leaves)) == [None, "leaves files open", "leaves files open"]

    def fills(state, number):
        bytearray(number * 2**27)[:] = b"x" * (number * 2**27)
        return Verdict("a", "b")

    assert failures(part_of(fills, resident=2**26))[1].startswith("filled 0.")


def test_a_record_is_kept_and_written_into_the_page(tmp_path):
    record = Record()
    record.add(0, Verdict("kind", "told"))
    record.add(1, Verdict("kind", "told", "lost"))
    record.save(tmp_path / "x.json")
    again = Record.load(tmp_path / "x.json")
    assert (again.done, again.failed, again.counts) == (2, 1, record.counts)
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- figures -->\nof yesterday\n<!-- end of figures -->\nb\n")
    write_page(page, "figures", tables([part_of(None)], {"test": again}))
    assert "| test | 2 | 1 |" in page.read_text()
    assert "of yesterday" not in page.read_text()


def test_a_soak_is_a_table_that_says_what_was_not_flat(tmp_path):
    flat = judged([Sample(i, 600.0, 9) for i in range(20)])
    grown = judged([Sample(i, 600.0 + i, 9) for i in range(20)])
    none = judged([])
    measured = {"a": flat, "b": grown, "c": none}
    told = {"measured": {name: {"epochs": 1200, **found} for name, found in measured.items()}}
    rows = as_markdown(told).splitlines()[2:]
    assert rows[0] == "| a | 1,200 | 600 | +0.0 | 0.2 | 9 | yes |"
    assert rows[1].endswith("| **no** |")
    assert rows[2].endswith("| **too few samples** |")


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_a_footer_that_pyarrow_aborts_on_does_not_end_the_process(tmp_path):
    assert fuzz_shards.PART.trial(tmp_path, 2140).failure is None


@pytest.mark.skipif(sys.platform != "linux", reason="the campaign forks, and reads /proc")
def test_a_part_that_is_stopped_goes_on_where_it_was(tmp_path):
    tried = []
    part = part_of(lambda state, number: tried.append(number) or Verdict("a", "b"), alone=True)
    stopped = campaign(part, tmp_path, 3)
    next(stopped)
    stopped.close()
    assert Record.load(tmp_path / "test.json").done == 1
    assert [record.done for record in campaign(part, tmp_path, 3)][-1] == 3
    assert tried == [0, 1, 2]
    assert [record.done for record in campaign(part, tmp_path, 0)] == [3]


def test_a_part_is_run_by_one_process_at_a_time_and_others_beside_it(tmp_path):
    part = part_of(lambda state, number: Verdict("a", "b"), alone=True)
    begun = campaign(part, tmp_path, 3)
    next(begun)
    with pytest.raises(SystemExit, match="another process runs the part test"):
        list(campaign(part, tmp_path, 3))
    beside = list(campaign(part._replace(name="beside"), tmp_path, 3))
    assert beside[-1].done == 3
    begun.close()


def test_a_record_names_all_commits_that_it_was_made_with():
    record = Record()
    for commit in ("one", "one", "two", "one"):
        record.goes_on({"commit": commit, "device": "here"})
    assert record.evidence == {"commit": "one, two", "device": "here"}


def test_growth_after_the_warm_up_is_seen_and_growth_in_it_is_not():
    flat = [Sample(float(i), 100.0 + min(i, 20) * 5, 12) for i in range(100)]
    assert judged(flat)["flat"]
    assert not judged([s._replace(megabytes=100 + s.seconds) for s in flat])["flat"]
    assert not judged([s._replace(files=12 + int(s.seconds) // 10) for s in flat])["flat"]
