"""The log of trials: what was appended is read, what a killed writer left is not."""

import errno
import json
import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smallfry.errors import RunError
from smallfry.studies.folder import TRIALS
from smallfry.studies.log import TrialLog, rounded


def trial(number, **measured):
    return {
        "phase": "tuned",
        "problem": "curves",
        "contestant": "kfac",
        "seed": number,
        "measured": {"points": [], **measured},
    }


def test_a_log_that_does_not_exist_is_empty(tmp_path):
    assert TrialLog(tmp_path).read() == []
    assert TrialLog(tmp_path / "nowhere").read() == []


def test_trials_are_read_in_the_order_of_their_ends(tmp_path):
    log = TrialLog(tmp_path)
    for number in (3, 1, 2):
        log.append(trial(number))
    assert [record["seed"] for record in log.read()] == [3, 1, 2]
    assert TrialLog(tmp_path).read() == log.read()
    assert (tmp_path / TRIALS).read_bytes().count(b"\n") == 3


def test_text_of_any_language_and_newlines_stay_in_one_line(tmp_path):
    log = TrialLog(tmp_path)
    log.append(trial(0, note="ein Zug\nfährt\r\n→ \u2028 もう"))
    assert log.read()[0]["measured"]["note"] == "ein Zug\nfährt\r\n→ \u2028 もう"
    assert (tmp_path / TRIALS).read_bytes().count(b"\n") == 1


@pytest.mark.parametrize("left", ["{", '{"phase": "tuned"', "}", "garbage", "é"])
def test_a_last_line_without_an_end_is_not_taken_and_is_replaced(tmp_path, left):
    log = TrialLog(tmp_path)
    log.append(trial(1))
    with open(log.file, "ab") as stream:
        stream.write(left.encode())
    assert [record["seed"] for record in log.read()] == [1]
    log.append(trial(2))
    assert [record["seed"] for record in log.read()] == [1, 2]
    assert left.encode() + b"\n" not in log.file.read_bytes().splitlines(keepends=True)


def test_a_file_of_one_line_without_an_end_is_begun_anew(tmp_path):
    log = TrialLog(tmp_path)
    log.file.write_text('{"phase": "tun')
    assert log.read() == []
    log.append(trial(5))
    assert [record["seed"] for record in log.read()] == [5]


def test_a_long_line_without_an_end_is_cut_off_whole(tmp_path):
    """Longer than the pieces in which the last line's end is looked for."""
    log = TrialLog(tmp_path)
    log.append(trial(1, note="a" * 100_000))
    with open(log.file, "ab") as stream:
        stream.write(b"b" * 200_000)
    log.append(trial(2))
    assert [record["seed"] for record in log.read()] == [1, 2]
    assert b"b" not in log.file.read_bytes().replace(b'"problem"', b"")


@pytest.mark.parametrize(
    "line",
    ["", "garbage", "[]", "3", "null", '{"phase": "tuned"}', '{"measured": {}, "problem": "x"}'],
)
def test_a_whole_line_that_is_no_trial_is_named(tmp_path, line):
    log = TrialLog(tmp_path)
    log.append(trial(1))
    with open(log.file, "a") as stream:
        stream.write(line + "\n")
    with pytest.raises(RunError, match=r"trials.jsonl, line 2: not a trial .*fix or remove"):
        log.read()


def test_a_full_disk_leaves_what_stood_there(tmp_path, monkeypatch):
    log = TrialLog(tmp_path)
    log.append(trial(1))
    before = log.file.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match=r"could not be written \(.*No space left"):
            log.append(trial(2))
    assert log.file.read_bytes() == before
    log.append(trial(3))
    assert [record["seed"] for record in log.read()] == [1, 3]


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(RunError, match="could not be written"):
        TrialLog(tmp_path / "nowhere").append(trial(1))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.123456789, 0.123457),
        (123456789.0, 123457000.0),
        (-1e-300, -1e-300),
        (math.nan, None),
        (math.inf, None),
        (-math.inf, None),
        (123456789, 123456789),
        (True, True),
        (None, None),
        ("0.123456789", "0.123456789"),
        ((1.23456789, [math.nan]), [1.23457, [None]]),
        ({"a": {"b": (1 / 3,)}}, {"a": {"b": [0.333333]}}),
    ],
)
def test_numbers_are_rounded_to_six_digits(value, expected):
    found = rounded(value)
    assert found == expected
    assert type(found) is type(expected)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_rounding_is_near_and_is_done_once(value):
    found = rounded(value)
    assert math.isclose(found, value, rel_tol=1e-5)
    assert rounded(found) == found


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    )
)
def test_what_is_rounded_can_be_written_as_strict_json(value):
    json.dumps(rounded(value), allow_nan=False)
