"""What is written is whole or not there, and nothing of others is touched, whenever it ends."""

import errno
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from dying import moments

from smallfry.io import replace as module
from smallfry.io.replace import recover, replacing, sweep, write_whole
from smallfry_runtime.stages import interrupted, obstacle

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="it forks")
NEIGHBOURS = ("x.old", "x.new", "x.tmp", "x.part", "x.previous", ".x", ".smallfry-mine", "readme")
NAMES = ("manifest.json", "b", "sub")


@pytest.fixture(params=["exchange", pytest.param("renames", marks=pytest.mark.slow)])
def way(request, monkeypatch):
    """With the system's exchange of names, and without."""
    if request.param == "renames":
        monkeypatch.setattr(module, "_renameat2", lambda: None)
    return request.param


def fill(folder, text):
    (folder / "sub").mkdir(parents=True)
    for name in ("manifest.json", "b", "sub/c"):
        (folder / name).write_text(text)


def content(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def whole(text):
    return dict.fromkeys(("manifest.json", "b", "sub/c"), text)


def with_neighbours(place):
    for name in NEIGHBOURS[:5]:
        fill(place / name, name)
    for name in NEIGHBOURS[5:]:
        (place / name).write_text(name)


def neighbours(place):
    return {name: value for name, value in content(place).items() if not name.startswith("x/")}


def replace(folder, text, **options):
    with replacing(folder, **options) as new:
        fill(new, text)


def begin(place, text=None):
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    with_neighbours(place)
    if text is not None:
        fill(place / "x", text)


# A folder


@pytest.mark.usefixtures("way")
def test_a_folder_is_made_and_replaced_and_its_neighbours_stay(tmp_path):
    with_neighbours(tmp_path)
    before = neighbours(tmp_path)
    for text in ("1", "2", "3"):
        replace(tmp_path / "x", text)
        assert content(tmp_path / "x") == whole(text)
        assert neighbours(tmp_path) == before
    assert {entry.name for entry in tmp_path.iterdir()} == {*NEIGHBOURS, "x"}


@pytest.mark.slow
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("old", [None, "old"])
def test_a_process_that_dies_at_any_change_leaves_the_old_or_the_new_and_no_rest(tmp_path, old):
    place = tmp_path / "place"
    found = set()
    for _ in moments(lambda: replace(place / "x", "new"), lambda: begin(place, old)):
        recover(place / "x")
        found.add(content(place / "x").get("b"))
        assert content(place / "x") in (whole("new"), {} if old is None else whole(old))
        assert {entry.name for entry in place.iterdir()} - {"x"} == {*NEIGHBOURS}
        assert not interrupted(place / "x")
        replace(place / "x", "next")  # whatever was left, the next one is alone in its folder
        assert content(place / "x") == whole("next")
    assert found == {old, "new"}


@pytest.mark.slow
def test_a_process_that_dies_never_leaves_no_folder_where_names_can_be_exchanged(tmp_path):
    if module._renameat2() is None:
        pytest.skip("of Linux")
    place = tmp_path / "place"
    for _ in moments(lambda: replace(place / "x", "new"), lambda: begin(place, "old")):
        assert content(place / "x") in (whole("new"), whole("old"))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["renames"], indirect=True)
def test_a_kill_between_two_renames_is_seen_and_undone(tmp_path, way):
    place = tmp_path / "place"
    seen = 0
    for _ in moments(lambda: replace(place / "x", "new"), lambda: begin(place, "old")):
        if not (place / "x").exists():
            assert interrupted(place / "x")
            seen += 1
            recover(place / "x")
            assert content(place / "x") == whole("old")
    assert seen


@pytest.mark.slow
@pytest.mark.usefixtures("way")
def test_the_folder_before_is_kept_and_one_of_both_is_whole_at_any_moment(tmp_path):
    place, last, previous = tmp_path / "place", tmp_path / "place" / "x", tmp_path / "place" / "y"

    def prepare():
        begin(place, "2")
        fill(previous, "1")

    seen = set()
    for _ in moments(lambda: replace(last, "3", previous=previous), prepare):
        one = last if last.exists() else previous
        assert content(one) in (whole("2"), whole("3"))
        seen.add((content(last).get("b"), content(previous).get("b")))
        replace(last, "4", previous=previous)
        assert content(last) == whole("4")
        assert {entry.name for entry in place.iterdir()} == {*NEIGHBOURS, "x", "y"}
    assert {("2", "1"), ("3", "2")} <= seen


@pytest.mark.usefixtures("way")
def test_what_fails_leaves_the_folder_as_it_was(tmp_path):
    fill(tmp_path / "x", "old")

    def work():
        with replacing(tmp_path / "x") as new:
            fill(new, "new")
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert content(tmp_path / "x") == whole("old")
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EXDEV, errno.EBUSY])
def test_a_rename_that_fails_leaves_the_old_folder_or_the_new(tmp_path, monkeypatch, number):
    monkeypatch.setattr(module, "_swap", lambda *_: False)
    real, change, failed = os.rename, 0, True
    while failed:
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        fill(tmp_path / "x", "old")
        left, failed = change, False

        def rename(*names, **options):
            nonlocal left, failed
            left -= 1
            if left == -1:
                failed = True
                raise OSError(number, os.strerror(number))
            return real(*names, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", rename)
            try:
                replace(tmp_path / "x", "new")
            except OSError:
                assert content(tmp_path / "x") in (whole("old"), whole("new"))
            else:
                assert content(tmp_path / "x") == whole("new")
        assert [entry.name for entry in tmp_path.iterdir()] == ["x"]
        change += 1
    assert change > 2


def test_what_came_into_the_place_meanwhile_is_not_replaced(tmp_path):
    def check():
        if obstacle(tmp_path / "x"):
            raise KeyError("something is there")

    with pytest.raises(KeyError, match="something is there"), replacing(tmp_path / "x", check):
        fill(tmp_path / "x", "of another process")
    assert content(tmp_path / "x") == whole("of another process")


def test_two_processes_write_to_one_place_and_neither_takes_the_others_files(tmp_path):
    errors = []

    def work(text):
        try:
            for _ in range(20):
                replace(tmp_path / "x", text)
                recover(tmp_path / "x")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(text,)) for text in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert content(tmp_path / "x") in [whole(text) for text in "abc"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_a_reader_sees_one_folder_or_the_other_while_it_is_replaced(tmp_path):
    if module._renameat2() is None:
        pytest.skip("of Linux")
    replace(tmp_path / "x", "0")
    stop = threading.Event()

    def write():
        number = 0
        while not stop.is_set():
            number += 1
            replace(tmp_path / "x", str(number))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = set()
        while len(seen) < 10:
            seen.add((tmp_path / "x" / "b").read_text())
    finally:
        stop.set()
        writer.join()


def test_a_link_is_followed_and_stays(tmp_path):
    fill(tmp_path / "there" / "x", "old")
    (tmp_path / "link").symlink_to("there/x")
    replace(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "there" / "x") == whole("new")


def test_a_name_as_long_as_a_name_may_be_and_one_that_is_no_text_have_room(tmp_path):
    for name in ("x" * 255, "é" * 127, os.fsdecode(b"\xff\xfe"), "-", "a b\n"):
        replace(tmp_path / name, "1")
        replace(tmp_path / name, "2")
        assert content(tmp_path / name) == whole("2")
        write_whole(tmp_path / name / ("é" * 127), b"3")


def test_permissions_are_those_of_the_folder_that_was_there(tmp_path):
    fill(tmp_path / "x", "old")
    (tmp_path / "x").chmod(0o711)
    replace(tmp_path / "x", "new")
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o711
    replace(tmp_path / "y", "new")
    assert (tmp_path / "y").stat().st_mode == tmp_path.joinpath("x", "sub").stat().st_mode


# A folder that can't be renamed


def test_the_current_folder_keeps_its_place_and_gets_the_new_entries(tmp_path, monkeypatch):
    fill(tmp_path / "x", "old")
    monkeypatch.chdir(tmp_path / "x")
    before = Path().stat().st_ino
    replace(Path(), "new")
    assert Path().stat().st_ino == before
    assert content(Path()) == whole("new")
    assert sorted(os.listdir(".")) == ["b", "manifest.json", "sub"]


@pytest.mark.slow
def test_a_process_that_dies_in_the_current_folder_leaves_the_old_or_the_new(tmp_path):
    place = tmp_path / "place"

    def act():
        os.chdir(place / "x")
        replace(Path(), "new")

    seen = set()
    for _ in moments(act, lambda: begin(place, "old")):
        seen.add(tuple(content(place / "x").values()))
        recover(place / "x")
        assert content(place / "x") in (whole("new"), whole("old"))
        assert sorted(os.listdir(place / "x")) == ["b", "manifest.json", "sub"]
        assert not interrupted(place / "x")
    assert len(seen) > 4  # among them such as had a part of either


@pytest.fixture
def volume(tmp_path):
    """A mounted folder."""
    folder = tmp_path / "volume"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_mounted_folder_keeps_its_place_and_what_a_new_disk_holds(volume):
    (volume / "lost+found").mkdir()
    assert obstacle(volume) is None
    for text in ("1", "2"):
        replace(volume, text)
        assert content(volume) == whole(text)
        assert sorted(os.listdir(volume)) == ["b", "lost+found", "manifest.json", "sub"]


def test_a_folder_of_the_same_disk_that_is_mounted_elsewhere_is_written_in_place(tmp_path, volume):
    fill(tmp_path / "x", "old")
    (tmp_path / "there").mkdir()
    subprocess.run(["mount", "--bind", str(tmp_path / "x"), str(tmp_path / "there")], check=True)
    try:
        replace(tmp_path / "there", "new")
        assert content(tmp_path / "x") == whole("new")
        assert sorted(os.listdir(tmp_path)) == ["there", "volume", "x"]
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "there")], check=True)


def test_a_full_disk_leaves_a_mounted_folder_as_it_was(volume):
    replace(volume, "old")
    with pytest.raises(OSError, match="No space left"), replacing(volume) as new:
        (new / "large").write_bytes(bytes(2**21))
    assert content(volume) == whole("old")
    assert sorted(os.listdir(volume)) == ["b", "manifest.json", "sub"]


def test_a_parent_that_may_not_be_written_is_not(tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    before = tmp_path.stat().st_mtime_ns
    replace(tmp_path / "x", "new")
    assert content(tmp_path / "x") == whole("new")
    assert tmp_path.stat().st_mtime_ns == before


def test_a_place_that_can_not_be_written_is_told_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError), replacing(tmp_path / "file" / "x"):
        raise AssertionError("it began")


# What stands in the way


def test_an_absent_and_an_empty_folder_are_free_and_others_by_their_kind(tmp_path):
    def is_ours(folder):
        return (folder / "mark").exists()

    def of(name):
        return obstacle(tmp_path / name, "thing", ("mark", "b"), is_ours)

    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("ours", "more", "theirs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "b").write_text("")
    for name in ("ours", "more"):
        (tmp_path / name / "mark").write_text("")
    (tmp_path / "more" / "notes.txt").write_text("of mine")
    assert of("absent") is of("empty") is of("ours") is None
    assert of("theirs") == "exists and is not a thing"
    assert of("theirs/b") == of("dangling") == "exists and is not a folder"
    assert of("more") == "holds notes.txt too, which is no part of such a thing and would be lost"
    assert obstacle(tmp_path / "ours") == "exists and is not an empty folder"


# A file


def test_a_file_is_whole_at_any_moment_and_its_neighbours_stay(tmp_path):
    place = tmp_path / "place"

    def prepare():
        begin(place)
        (place / "x").write_bytes(b"old")

    seen = set()
    for _ in moments(lambda: write_whole(place / "x", b"new"), prepare):
        seen.add((place / "x").read_bytes())
        left = {entry.name for entry in place.iterdir()} - {*NEIGHBOURS, "x"}
        assert all(name.startswith(".smallfry-x-") for name in left)
        (place / ".smallfry-mine").unlink()
        sweep(place)
        assert {entry.name for entry in place.iterdir()} == {*NEIGHBOURS, "x"} - {".smallfry-mine"}
    assert seen == {b"old", b"new"}


def test_a_file_that_can_not_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    write_whole(tmp_path / "x", b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "x", b"new")
    assert [(e.name, e.read_bytes()) for e in tmp_path.iterdir()] == [("x", b"old")]


# Onto the disk


@pytest.fixture
def synced(monkeypatch):
    """What was brought to the disk, and the renames between, in their order."""
    told, rename, exchange = [], os.replace, module._swap

    def note(descriptor):
        told.append(os.path.realpath(f"/proc/self/fd/{descriptor}"))

    def renamed(*names):
        told.append("rename")
        rename(*names)

    def swapped(*names):
        told.append("rename")
        return exchange(*names)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", renamed)
    monkeypatch.setattr(module, "_swap", swapped)
    return told


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="it reads /proc")
def test_files_are_on_the_disk_before_the_rename_and_the_folder_after_it(tmp_path, synced):
    write_whole(tmp_path / "x", b"new")
    part, rename, folder = synced
    assert Path(part).name.startswith(".smallfry-x-")
    assert (rename, folder) == ("rename", str(tmp_path))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="it reads /proc")
def test_a_folder_is_on_the_disk_before_the_exchange_and_its_parent_after_it(tmp_path, synced):
    fill(tmp_path / "x", "old")
    replace(tmp_path / "x", "new")
    at = synced.index("rename")
    names = {path.partition("/new")[2] for path in synced[:at]}
    assert names == {"", "/b", "/manifest.json", "/sub", "/sub/c"}
    assert synced[at + 1 :] == [str(tmp_path)]


def test_a_system_that_can_not_sync_a_folder_is_no_failure_and_a_bad_disk_is(tmp_path, monkeypatch):
    def fails(number):
        def call(descriptor):
            raise OSError(number, os.strerror(number))

        return call

    monkeypatch.setattr(os, "fsync", fails(errno.EINVAL))
    module.sync(tmp_path)
    monkeypatch.setattr(os, "fsync", fails(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        module.sync(tmp_path)


def test_a_file_takes_the_place_of_a_link_not_of_what_that_leads_to(tmp_path):
    victim, link = tmp_path / "victim", tmp_path / "link"
    victim.write_text("mine")
    link.symlink_to(victim)
    write_whole(link, b"new")
    assert victim.read_text() == "mine"
    assert (link.read_text(), link.is_symlink()) == ("new", False)


def test_sweeping_leaves_what_lives_and_what_can_be_put_back(tmp_path):
    with replacing(tmp_path / "export") as new:
        sweep(tmp_path)
        assert new.is_dir()
        (new / "file").write_text("whole")
    assert (tmp_path / "export" / "file").read_text() == "whole"
    killed = tmp_path / f"{module.MARK}export-0000"
    (killed / module.OLD).mkdir(parents=True)
    (tmp_path / f"{module.MARK}export-1111").mkdir()
    sweep(tmp_path)
    left = [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(module.MARK)]
    assert left == [killed.name]
