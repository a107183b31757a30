"""Files of strangers: read if they are what they should be, refused at once if not."""

import json
import os

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from smallfry.errors import ExportError, SmallfryError
from smallfry.io.safe_yaml import load_yaml
from smallfry.io.terminal import printable
from smallfry_runtime import files
from smallfry_runtime.files import (
    has_valid_digest,
    parse_json,
    read_bytes,
    read_json,
    read_large,
    settled,
    with_digest,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
BOMB = "\n".join(
    ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
)


def test_a_file_is_read_whole(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert read_bytes(tmp_path / "file") == b"abc"


def test_a_pipe_a_folder_and_a_loop_of_links_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for name in ("pipe", "loop", "."):
        with pytest.raises(OSError, match=r"not a regular file|symbolic links"):
            read_bytes(tmp_path / name)
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_sparse_file_is_not_read(tmp_path):
    for size in (100 * 2**30, 2**36):
        (tmp_path / "sparse").touch()
        os.truncate(tmp_path / "sparse", size)
        with pytest.raises(OSError, match=r"longer than|neither safetensors nor a zip"):
            read_large(tmp_path / "sparse")


@given(st.dictionaries(st.text(), JSON))
@settings(max_examples=25)
def test_what_was_sealed_is_whole_after_a_way_through_json(content):
    written = json.loads(json.dumps(with_digest({**content, "format": 2})))
    assert has_valid_digest(written)
    assert not has_valid_digest({**written, "format": 3})


def test_a_seal_can_not_be_left_out():
    assert not has_valid_digest({"format": 2, "a": 1})
    assert has_valid_digest({"format": 1, "a": 1})  # which had none


def test_json_that_is_nested_too_deeply_is_told(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json(tmp_path / "deep.json")


@pytest.mark.parametrize("number", ["9" * 309, "-1" + "0" * 400, "1" + "0" * 5000])
def test_json_with_an_integer_that_no_float_holds_is_refused(number):
    assert parse_json(b'{"mean": [' + b"9" * 308 + b"]}") == {"mean": [int("9" * 308)]}
    with pytest.raises(ValueError, match=f"a number of {len(number):,} digits"):
        parse_json(f'{{"mean": [{number}]}}'.encode())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "more than 100,000 values"),
        ("a: &a [*a]", "stands for nothing yet"),
        ("[" * 1000, "levels deep"),
        ("x" * 2_000_000, "longer than"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a: {b: [{class_path: subprocess.Popen}]}", "names a class"),
        ("a: 2001-99-99T99:99:99Z\nb: " + "9" * 5000, "can't be read"),
        ("a: [-" + "9" * 400 + "]", "larger than any setting"),
        ("model:\n  x: 1\nepochs: 2\nmodel:\n  y: 2", "'model' stands twice, in lines 1 and 4"),
        ("a: [{b: 1, b: 2}]", "'b' stands twice, in lines 1 and 1"),
    ],
    ids=[
        "bomb",
        "recursion",
        "depth",
        "length",
        "tag",
        "class",
        "number",
        "large",
        "twice",
        "inside",
    ],
)
def test_yaml_that_is_no_configuration_is_refused(text, message):
    with pytest.raises(yaml.YAMLError, match=message):
        load_yaml(text)


def test_yaml_may_use_a_key_again_in_another_mapping():
    assert load_yaml("a: {b: 1}\nc: {b: 1}\n1: x\n'1': y") == {
        "a": {"b": 1},
        "c": {"b": 1},
        1: "x",
        "1": "y",
    }


def test_yaml_with_aliases_is_read():
    assert load_yaml("a: &a [1, 2.5]\nb: *a") == {"a": [1, 2.5], "b": [1, 2.5]}


def test_control_characters_are_spelled_out_and_letters_are_not():
    assert printable("a\x1b[31m\u202eb\nc é 漢") == "a\\x1b[31m\\u202eb\nc é 漢"
    assert printable("\ud800") == "\\ud800"


# Files that another process replaces


def test_what_is_replaced_while_it_is_read_is_read_again(tmp_path):
    file, reads = tmp_path / "manifest", []
    file.write_text("0")

    def read():
        reads.append(file.read_text())
        if len(reads) < 4:
            file.write_text(str(len(reads)))
            raise SmallfryError("damaged")
        return reads[-1]

    assert settled(read, file) == "3"
    assert reads == ["0", "1", "2", "3"]


def test_a_replacement_that_is_equal_is_one_too(tmp_path):
    file, reads = tmp_path / "manifest", []
    file.write_text("0")

    def read():
        reads.append(0)
        if len(reads) < 3:
            (tmp_path / "new").write_text("0")
            (tmp_path / "new").replace(file)
            raise SmallfryError("damaged")
        return len(reads)

    assert settled(read, file) == 3


def test_a_replacement_that_is_equal_in_all_that_can_be_copied_is_one_too(tmp_path):
    file, reads = tmp_path / "manifest", []
    file.write_text("0")
    before = file.stat()

    def read():
        reads.append(0)
        if len(reads) < 3:
            changed = file.stat().st_ctime_ns
            while file.stat().st_ctime_ns == changed:  # the clock of files ticks slowly
                file.write_text("0")  # its number is that of before, as a new file's may be
                os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
            raise SmallfryError("damaged")
        return len(reads)

    assert settled(read, file) == 3


def test_what_is_damaged_and_stays_is_told_at_once(tmp_path):
    file, reads = tmp_path / "manifest", []
    file.write_text("0")

    def read():
        reads.append(0)
        raise ExportError("damaged")

    with pytest.raises(ExportError, match=r"^damaged$"):
        settled(read, file)
    assert len(reads) == 1


def test_what_is_absent_is_looked_for_again_as_it_may_be_between_two_renames(tmp_path, monkeypatch):
    reads = []

    def read():
        reads.append(0)
        if len(reads) < 5:
            raise ExportError("there is none")
        return 1

    assert settled(read, tmp_path / "manifest") == 1
    monkeypatch.setattr(files, "ATTEMPTS", 3)
    reads.clear()
    with pytest.raises(ExportError, match=r"^there is none$"):
        settled(read, tmp_path / "manifest")


def test_what_is_replaced_again_and_again_is_an_error_of_its_own_kind(tmp_path):
    file, numbers = tmp_path / "manifest", iter(range(10**6))

    def read():
        file.write_text(str(next(numbers)))
        raise ExportError("damaged")

    with pytest.raises(ExportError, match="is replaced again and again while it is read"):
        settled(read, file)
