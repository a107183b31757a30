"""Names of files: the same text on every system, and a path that comes back."""

import os
import unicodedata
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from smallfry_runtime.names import URI, path_of, storable, text_of

SOME_BYTES = st.binary(min_size=1, max_size=12).filter(lambda b: not {0, ord("/")} & {*b})


def test_accents_are_composed():
    assert text_of("Z\u0075\u0308rich") == "Z\u00fcrich"
    assert text_of("Zürich") == "Zürich"
    assert text_of("e\u0301") == "é"
    assert text_of("plain") == "plain"


def test_names_of_older_systems_are_read_as_latin_1():
    assert text_of(os.fsdecode(b"Z\xfcrich")) == "Zürich"
    assert text_of(os.fsdecode(b"\xe9t\xe9")) == "été"


@given(SOME_BYTES)
def test_any_name_becomes_text_that_json_can_hold(name):
    text = text_of(os.fsdecode(name))
    assert text.encode().decode() == text
    assert unicodedata.is_normalized("NFC", text)
    assert text_of(text) == text


@given(st.text())
def test_the_text_of_a_text_is_its_normal_form(text):
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    assert text_of(text) == unicodedata.normalize("NFC", text)


def test_a_home_folder_is_resolved(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert path_of("~/photos") == Path("/home/somebody/photos")
    assert path_of("photos/~") == Path("photos/~")
    assert path_of("/photos") == Path("/photos")


def test_an_address_of_a_file_is_decoded():
    assert path_of("file:///a%20b/c%23d") == Path("/a b/c#d")
    assert os.fsencode(path_of("file:///Z%FCrich")) == b"/Z\xfcrich"
    assert path_of("file:///~") == Path("/~")


@pytest.mark.parametrize("path", ["photos", "/a/b", "~/x", "Zürich", "", "e\u0301"])
def test_a_path_of_text_is_stored_as_it_is(path):
    assert storable(path) == path


@given(st.lists(SOME_BYTES.filter(lambda b: b not in (b".", b"..")), min_size=1, max_size=3))
def test_any_absolute_path_comes_back_from_yaml(parts):
    path = os.fsdecode(b"/" + b"/".join(parts))
    stored = yaml.safe_load(yaml.safe_dump({"root": storable(path)}))["root"]
    if stored.startswith(URI) or not path.startswith("~"):
        assert os.fsencode(path_of(stored)) == os.fsencode(path)


def test_a_relative_path_that_is_no_utf_8_is_stored_absolutely(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"Z\xfcrich")
    stored = storable(name)
    assert stored.startswith(URI)
    assert stored.endswith("Z%FCrich")
    assert path_of(stored) == tmp_path / name
