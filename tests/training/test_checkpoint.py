import errno
import hashlib
import json
import multiprocessing
import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from smallfry.errors import RunError
from smallfry.io import replace
from smallfry.training import checkpoint as module
from smallfry.training.checkpoint import WEIGHTS as FILE
from smallfry.training.checkpoint import load_checkpoint, save_checkpoint, weights_digest

WEIGHTS = {"a": torch.arange(3.0), "b": torch.tensor(2)}


def save(folder, value=0.0, trainer=None):
    save_checkpoint(folder, {"value": value}, {**WEIGHTS, "a": WEIGHTS["a"] + value}, trainer)


def test_what_is_saved_is_loaded(tmp_path):
    save(tmp_path / "last", trainer={"step": 7, "state": {"x": torch.ones(2)}})
    manifest, weights, trainer = load_checkpoint(tmp_path / "last")
    assert manifest["value"] == 0.0
    assert torch.equal(weights["a"], WEIGHTS["a"])
    assert trainer["step"] == 7


def test_the_digest_of_weights_is_that_of_their_file(tmp_path):
    weights = {"across": torch.arange(6.0).reshape(2, 3).T, "count": torch.tensor(2)}
    save_checkpoint(tmp_path / "last", {}, weights)
    content = (tmp_path / "last" / FILE).read_bytes()
    assert weights_digest(weights) == hashlib.sha256(content).hexdigest()
    assert load_checkpoint(tmp_path / "last").manifest["files"][FILE] == weights_digest(weights)


def test_the_checkpoint_before_stays_beside_it(tmp_path):
    for value in (1.0, 2.0, 3.0):
        save(tmp_path / "last", value)
    assert load_checkpoint(tmp_path / "last").manifest["value"] == 3.0
    assert load_checkpoint(tmp_path / "last.previous").manifest["value"] == 2.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last", "last.previous"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_full_disk_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(replace, "_renameat2", lambda: None)
    fails, failures = True, 0
    while fails:
        save(tmp_path / "last", 1.0, trainer={"step": 1})
        left, fails = failures, False

        def failing(real):
            def call(*arguments, **options):
                nonlocal left, fails
                left -= 1
                if left == -1:
                    fails = True
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return real(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for where, name in ((os, "fsync"), (os, "rename"), (Path, "write_bytes")):
                patch.setattr(where, name, failing(getattr(where, name)))
            said = ""
            try:
                save(tmp_path / "last", 2.0, trainer={"step": 2})
            except RunError as error:
                said = str(error)
        assert ("could not be saved" in said and "No space left" in said) == fails
        loaded = load_checkpoint(tmp_path / "last")
        assert loaded.manifest["value"] in ((1.0, 2.0) if fails else (2.0,))
        assert {entry.name for entry in tmp_path.iterdir()} <= {"last", "last.previous"}
        failures += 1
    assert failures > 8


def test_a_crash_between_the_two_renames_costs_nothing(tmp_path):
    save(tmp_path / "last", 1.0)
    (tmp_path / "last").rename(tmp_path / "last.previous")
    assert load_checkpoint(tmp_path / "last").manifest["value"] == 1.0
    save(tmp_path / "last", 2.0)
    assert load_checkpoint(tmp_path / "last").manifest["value"] == 2.0


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.pt"])
@pytest.mark.parametrize("place", [0, 9, -1])
def test_one_changed_byte_is_noticed_and_the_checkpoint_before_offered(tmp_path, name, place):
    for value in (1.0, 2.0):
        save(tmp_path / "last", value, trainer={"step": 1})
    file = tmp_path / "last" / name
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    with pytest.raises(RunError, match=rf"{name}: damaged.*the one before it is in last.previous"):
        load_checkpoint(tmp_path / "last")


def test_a_missing_file_and_a_missing_checkpoint_are_named(tmp_path):
    with pytest.raises(RunError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "last")
    save(tmp_path / "last")
    (tmp_path / "last" / "model.safetensors").unlink()
    with pytest.raises(RunError, match=r"model.safetensors: can't be read \(No such file"):
        load_checkpoint(tmp_path / "last")
    (tmp_path / "last" / "manifest.json").unlink()
    with pytest.raises(RunError, match=r"incomplete, manifest.json is missing"):
        load_checkpoint(tmp_path / "last")


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', "\x00"])
def test_a_damaged_manifest_is_named(tmp_path, content):
    save(tmp_path / "last")
    (tmp_path / "last" / "manifest.json").write_text(content)
    with pytest.raises(RunError, match=r"manifest.json: (damaged|not the manifest)"):
        load_checkpoint(tmp_path / "last")


def test_another_format_says_which_version_wrote_it(tmp_path):
    save(tmp_path / "last")
    file = tmp_path / "last" / "manifest.json"
    manifest = json.loads(file.read_text()) | {"format": 99, "smallfry": "7.0"}
    file.write_text(json.dumps(manifest))
    with pytest.raises(RunError, match=r"written by smallfry 7.0 in format 99"):
        load_checkpoint(tmp_path / "last")


def test_no_changed_byte_of_the_manifest_is_taken_for_another_value(tmp_path):
    for value in (1.0, 2.0):
        save(tmp_path / "last", value)
    file, whole = tmp_path / "last" / "manifest.json", load_checkpoint(tmp_path / "last").manifest
    content = file.read_bytes()
    for place in range(len(content)):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with suppress(ValueError):
            if json.loads(file.read_bytes()) == whole:  # a space outside of all values
                continue
        with pytest.raises(RunError, match=r"the one before it is in last\.previous"):
            load_checkpoint(tmp_path / "last")


def test_a_checkpoint_of_format_1_which_had_no_digest_is_read(tmp_path):
    save(tmp_path / "last")
    file = tmp_path / "last" / "manifest.json"
    manifest = json.loads(file.read_text()) | {"format": 1}
    del manifest["digest"]
    file.write_text(json.dumps(manifest))
    assert load_checkpoint(tmp_path / "last").manifest["format"] == 1


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors", "trainer.pt"])
def test_a_pipe_in_place_of_a_file_is_told_at_once(tmp_path, name):
    save(tmp_path / "last", trainer={"step": 1})
    (tmp_path / "last" / name).unlink()
    os.mkfifo(tmp_path / "last" / name)
    with pytest.raises(RunError, match=rf"{name}.*(not a regular file|Invalid argument)"):
        load_checkpoint(tmp_path / "last")


# Reading while it is written


def save_again_and_again(folder, stop):
    value = 1.0
    while not stop.is_set():
        save_checkpoint(folder, {"value": value}, {"a": torch.full((5000,), value)}, {"v": value})
        value += 1


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_checkpoint_is_read_while_another_process_saves_the_next_ones(
    tmp_path, monkeypatch, exchanges
):
    if not exchanges:
        monkeypatch.setattr(replace, "_renameat2", lambda: None)
    context = multiprocessing.get_context("fork")
    stop = context.Event()
    save(tmp_path / "last", 0.0, trainer={"v": 0.0})
    writer = context.Process(target=save_again_and_again, args=(tmp_path / "last", stop))
    writer.start()
    try:
        values = []
        while len(values) < 500 or len(set(values)) < 50:
            manifest, weights, trainer = load_checkpoint(tmp_path / "last")
            values.append(manifest["value"])
            assert trainer == {"v": manifest["value"]}
            if manifest["value"]:
                assert set(weights["a"].tolist()) == {manifest["value"]}
            assert writer.is_alive()
    finally:
        stop.set()
        writer.join()
    assert values == sorted(values)


def saved_while_it_is_read(monkeypatch, folder, before, times):
    """Save the next checkpoint as often when a file of that name is about to be opened."""
    real, left = module.open_regular, times

    def open_regular(file, most):
        nonlocal left
        if file.name == before and left:
            left -= 1
            save(folder, 10.0 + times - left, {"step": left})
        return real(file, most)

    monkeypatch.setattr(module, "open_regular", open_regular)


@pytest.mark.parametrize("before", ["manifest.json", "model.safetensors", "trainer.pt"])
@pytest.mark.parametrize("times", [1, 7])
def test_what_is_replaced_between_two_files_is_read_again(tmp_path, monkeypatch, before, times):
    save(tmp_path / "last", 1.0, {"step": 1})
    saved_while_it_is_read(monkeypatch, tmp_path / "last", before, times)
    manifest, weights, _ = load_checkpoint(tmp_path / "last")
    assert manifest["value"] > 1.0
    assert weights["a"][0] == manifest["value"]


def test_what_is_replaced_again_and_again_is_no_reason_to_delete_anything(tmp_path, monkeypatch):
    save(tmp_path / "last", 1.0, {"step": 1})
    saved_while_it_is_read(monkeypatch, tmp_path / "last", "model.safetensors", 10**9)
    with pytest.raises(RunError, match=r"last: is replaced again and again .* try later$"):
        load_checkpoint(tmp_path / "last")


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors", "trainer.pt"])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EMFILE, errno.ESTALE])
def test_what_can_not_be_read_now_is_not_called_damaged(tmp_path, monkeypatch, name, number):
    for value in (1.0, 2.0):
        save(tmp_path / "last", value, {"step": 1})
    real = module.open_regular

    def open_regular(file, most):
        if file.name == name:
            raise OSError(number, os.strerror(number), str(file))
        return real(file, most)

    monkeypatch.setattr(module, "open_regular", open_regular)
    with pytest.raises(RunError, match=rf"{name}: can't be read") as caught:
        load_checkpoint(tmp_path / "last")
    assert "last.previous" in str(caught.value)
    for word in ("damaged", "delete", "move"):
        assert word not in str(caught.value)


def test_a_checkpoint_of_a_newer_version_and_full_memory_are_no_damage(tmp_path, monkeypatch):
    for value in (1.0, 2.0):
        save(tmp_path / "last", value)

    def full(data):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(module.safetensors.torch, "load", full)
        with pytest.raises(RunError, match=r"can't be loaded \(MemoryError\)") as caught:
            load_checkpoint(tmp_path / "last")
    assert "move" not in str(caught.value)
    file = tmp_path / "last" / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
    with pytest.raises(RunError, match="in format 99") as caught:
        load_checkpoint(tmp_path / "last")
    assert "move" not in str(caught.value)


def test_a_damaged_checkpoint_can_be_moved_away_to_go_on_from_the_one_before(tmp_path):
    for value in (1.0, 2.0):
        save(tmp_path / "last", value)
    (tmp_path / "last" / "model.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match=rf"move {tmp_path / 'last'} away to go on from there"):
        load_checkpoint(tmp_path / "last")
    (tmp_path / "last").rename(tmp_path / "moved")
    assert load_checkpoint(tmp_path / "last").manifest["value"] == 1.0


def test_a_checkpoint_is_saved_into_no_run_that_was_removed(tmp_path):
    with pytest.raises(RunError, match="run: the folder was removed while the run was training"):
        save(tmp_path / "run" / "last")
    assert not (tmp_path / "run").exists()
