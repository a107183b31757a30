"""JSON lines: records are read whole, and what is none is named by its line."""

import pytest

from smallfry.errors import RunError
from smallfry.io.json_lines import JsonLines


def test_records_are_read_in_their_order_and_a_half_written_one_is_replaced(tmp_path):
    lines = JsonLines(tmp_path / "records.jsonl")
    assert lines.read() == []
    lines.append({"a": 1})
    with open(lines.file, "a") as stream:
        stream.write('{"a": 2')
    assert lines.read() == [{"a": 1}]
    lines.append({"a": 3})
    assert lines.read() == [{"a": 1}, {"a": 3}]


@pytest.mark.parametrize("line", ["garbage", "7", '{"b": 1}'])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    lines = JsonLines(tmp_path / "records.jsonl", lambda record: record["a"], "a point")
    lines.append({"a": 1})
    with open(lines.file, "a") as stream:
        stream.write(f"{line}\n")
    with pytest.raises(RunError, match="line 2: not a point"):
        lines.read()


def test_a_folder_that_is_not_there_is_an_error_in_one_line(tmp_path):
    with pytest.raises(RunError, match="could not be written"):
        JsonLines(tmp_path / "nowhere" / "records.jsonl").append({})
