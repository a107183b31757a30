"""The folders of export, share and benchmark: theirs alone, whole or absent, wherever they are.

What is written is stood in for, so that a process can end at every moment of writing it.
"""

import json
import os
import subprocess
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from dying import moments

from smallfry.cli import benchmark
from smallfry.deploy import benchmark_page, pretrained
from smallfry.deploy import export as exports
from smallfry.errors import ExportError, SmallfryError
from smallfry.io import replace
from smallfry.io.replace import recover, replacing
from smallfry_runtime.engines import graph_files
from smallfry_runtime.manifest import FILES, Manifest, read_export
from smallfry_runtime.stages import interrupted, prefix_of

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="it forks")
SUFFIXES = (".old", ".new", ".tmp", ".part", ".previous", "~")


class Verb(NamedTuple):
    """What writes a folder."""

    write: Callable[[Path], object]
    names: set[str]
    replaces: bool = True


def pretend(new, names, content):
    for name in names:
        (new / name).write_text(content.get(name, "2"))


@pytest.fixture(params=["export", "share", "benchmark"])
def verb(request, monkeypatch):
    if request.param == "export":
        monkeypatch.setattr(exports, "trace", lambda *_, **__: None)
        monkeypatch.setattr(exports, "calibrate", lambda *_: None)
        names, manifest = {"manifest.json", "model.onnx"}, json.dumps({"form": "whole"})
        content = {"manifest.json": manifest}
        write = lambda traced, new, *_: pretend(new, names, content)  # noqa: E731
        monkeypatch.setattr(exports, "assemble", write)
        return Verb(lambda folder: exports.export("run", folder), names)
    if request.param == "share":
        names = {"config.json", "README.md", "model.safetensors"}
        made = SimpleNamespace(manifest={}, is_classifier=True)
        monkeypatch.setattr(pretrained, "gather", lambda *_: (made, {}, None))
        write = lambda new, *_: pretend(new, names - {"README.md"}, {})  # noqa: E731
        monkeypatch.setattr(pretrained, "_write_model", write)
        monkeypatch.setattr(pretrained, "_card", lambda *_: "2")
        return Verb(lambda folder: pretrained.save_pretrained("run", folder), names, False)
    names = {benchmark_page.PAGE, benchmark_page.SUMMARY, benchmark_page.PICTURE}
    content = {benchmark_page.SUMMARY: json.dumps({"kind": benchmark_page.KIND})}
    monkeypatch.setattr("smallfry.deploy.benchmark.measure", lambda *_: None)
    monkeypatch.setattr(benchmark_page, "write_report", lambda _, new: pretend(new, names, content))
    monkeypatch.setattr(benchmark_page, "print_tables", lambda *_: None)
    return Verb(
        lambda folder: benchmark.run(benchmark.Options(models=("run",), folder=folder)), names
    )


def neighbours(place):
    """Folders of the user's around the place, each with a file."""
    place.parent.mkdir(parents=True, exist_ok=True)
    for suffix in SUFFIXES:
        folder = place.with_name(f"{place.name}{suffix}")
        folder.mkdir()
        (folder / "model.onnx").write_text("of mine")
    (place.parent / "notes.txt").write_text("of mine")
    return snapshot(place)


def snapshot(place):
    own = (place.name,)
    return {
        str(file.relative_to(place.parent)): file.read_text()
        for file in place.parent.rglob("*")
        if file.is_file() and file.relative_to(place.parent).parts[:1] != own
    }


def names(folder):
    return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()


def test_neighbours_stay_and_nothing_of_them_is_taken_in(verb, tmp_path):
    place = tmp_path / "a" / "x"
    before = neighbours(place)
    for _ in range(3 if verb.replaces else 1):
        verb.write(place)
        assert names(place) == verb.names
        assert snapshot(place) == before


@pytest.mark.slow
def test_a_killed_one_leaves_nothing_that_the_next_takes_in(verb, tmp_path):
    place = tmp_path / "a" / "x"
    before = neighbours(place)

    def prepare():
        for file in place.iterdir() if place.is_dir() else ():
            file.unlink()
        if place.is_dir():
            place.rmdir()

    for _ in moments(lambda: verb.write(place), prepare):
        recover(place)
        assert names(place) in (set(), verb.names)
        if verb.replaces or not names(place):
            verb.write(place)
        assert names(place) == verb.names
        assert snapshot(place) == before


@pytest.mark.slow
def test_a_killed_replacement_leaves_the_old_one_or_the_new(verb, tmp_path):
    if not verb.replaces:
        pytest.skip("it replaces nothing")
    place = tmp_path / "a" / "x"

    def prepare():
        verb.write(place)
        for file in place.iterdir():
            if file.suffix != ".json":
                file.write_text("1")

    seen = set()
    for _ in moments(lambda: verb.write(place), prepare):
        recover(place)
        assert names(place) == verb.names
        texts = {file.read_text() for file in place.iterdir() if file.suffix != ".json"}
        seen |= texts
        assert len(texts) == 1
        assert os.listdir(place.parent) == ["x"]
    assert seen == {"1", "2"}


def test_files_of_others_in_the_folder_are_not_replaced(verb, tmp_path):
    place = tmp_path / "x"
    verb.write(place)
    (place / "notes.txt").write_text("of mine")
    with pytest.raises(SmallfryError, match=r"notes\.txt|not empty"):
        verb.write(place)
    assert names(place) == verb.names | {"notes.txt"}


def test_files_that_come_while_the_work_is_done_are_not_replaced(verb, tmp_path, monkeypatch):
    place = tmp_path / "x"
    module = pretrained if verb.names >= {"config.json"} else benchmark_page
    name = "_write_model" if module is pretrained else "write_report"
    if "model.onnx" in verb.names:
        module, name = exports, "assemble"
    real = getattr(module, name)

    def write(*arguments):
        place.mkdir()
        (place / "notes.txt").write_text("of mine")
        return real(*arguments)

    monkeypatch.setattr(module, name, write)
    with pytest.raises(SmallfryError, match=r"exists and is not|not empty"):
        verb.write(place)
    assert names(place) == {"notes.txt"}
    assert names(tmp_path) == {"x"}


def test_a_link_and_the_current_folder_are_written_to(verb, tmp_path, monkeypatch):
    (tmp_path / "disk" / "x").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk/x")
    verb.write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "disk" / "x") == verb.names
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    verb.write(Path())
    assert names(Path()) == verb.names == {*os.listdir(tmp_path / "here")}


def test_a_mounted_volume_is_written_to(verb, tmp_path):
    volume = tmp_path / "models"
    volume.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(volume)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting is not allowed here")
    try:
        for _ in range(2 if verb.replaces else 1):
            verb.write(volume)
            assert names(volume) == verb.names
    finally:
        subprocess.run(["umount", "-l", str(volume)], check=True)


def test_what_can_not_be_written_is_told_before_the_work(verb, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("of mine")
    (tmp_path / "loop").symlink_to("loop")
    for place in (tmp_path / "file", tmp_path / "file" / "x", tmp_path / "loop"):
        for module, name in ((exports, "trace"), (pretrained, "gather")):
            monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("it began"))
        monkeypatch.setattr("smallfry.deploy.benchmark.measure", lambda *_: pytest.fail("began"))
        with pytest.raises(SmallfryError):
            verb.write(place)
    assert (tmp_path / "file").read_text() == "of mine"


@pytest.mark.slow
def test_all_files_of_an_export_are_known(run, tmp_path):
    exports.export(run, tmp_path / "x", "anytime", "int8", torch_program=True)
    exports.export(run, tmp_path / "x", "whole", "int8")  # which replaces it
    assert names(tmp_path / "x") <= FILES


def test_a_reader_hears_of_a_replacement_that_was_killed(tmp_path):
    stage = tmp_path / f"{prefix_of(tmp_path / 'x')}1"
    (stage / "old").mkdir(parents=True)
    assert interrupted(tmp_path / "x")
    with pytest.raises(ExportError, match="no such export folder; a process that replaced it was"):
        Manifest.read(tmp_path / "x")


def made(folder, form, text):
    """An export of graphs that say which one it is."""
    contents = {name: f"{text} {name}".encode() for name in graph_files(form)}
    manifest = Manifest(
        form=form,
        precision="float32",
        model={"name": text},
        classes=("a", "b"),
        image_size=8,
        channels=1,
        mean=(0.5,),
        std=(0.5,),
        recursion_steps=2,
        files={name: sha256(content).hexdigest() for name, content in contents.items()},
    )
    with replacing(folder) as new:
        for name, content in {**contents, "manifest.json": manifest.to_json().encode()}.items():
            (new / name).write_bytes(content)


@pytest.mark.parametrize("exchanges", [True, False])
def test_an_export_is_read_whole_while_others_take_its_place(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(replace, "_renameat2", lambda: None)
    stop, forms = Event(), ("whole", "anytime")
    made(tmp_path / "x", "whole", "0")

    def write():
        number = 0
        while not stop.is_set():
            number += 1
            made(tmp_path / "x", forms[number % 2], str(number))

    writer = Thread(target=write)
    writer.start()
    try:
        seen = set()
        while len(seen) < 30:
            manifest, contents = read_export(tmp_path / "x")
            name = manifest.model["name"]
            assert contents == {n: f"{name} {n}".encode() for n in graph_files(manifest.form)}
            seen.add(name)
    finally:
        stop.set()
        writer.join()


def test_a_damaged_export_is_told_as_before(tmp_path):
    made(tmp_path / "x", "anytime", "0")
    (tmp_path / "x" / "step.onnx").write_bytes(b"")
    with pytest.raises(ExportError, match=r"step\.onnx: truncated or damaged"):
        read_export(tmp_path / "x")
    (tmp_path / "x" / "step.onnx").unlink()
    with pytest.raises(ExportError, match=r"step\.onnx: can't be read \(No such file"):
        read_export(tmp_path / "x")
