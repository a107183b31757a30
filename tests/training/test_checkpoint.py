import errno
import json
import os
from contextlib import suppress

import pytest
import torch

from smallfry.errors import RunError
from smallfry.training import checkpoint as module
from smallfry.training.checkpoint import load_checkpoint, save_checkpoint

WEIGHTS = {"a": torch.arange(3.0), "b": torch.tensor(2)}


def save(folder, value=0.0, trainer=None):
    save_checkpoint(folder, {"value": value}, {**WEIGHTS, "a": WEIGHTS["a"] + value}, trainer)


def test_what_is_saved_is_loaded(tmp_path):
    save(tmp_path / "last", trainer={"step": 7, "state": {"x": torch.ones(2)}})
    manifest, weights, trainer = load_checkpoint(tmp_path / "last")
    assert manifest["value"] == 0.0
    assert torch.equal(weights["a"], WEIGHTS["a"])
    assert trainer["step"] == 7


def test_the_checkpoint_before_stays_beside_it(tmp_path):
    for value in (1.0, 2.0, 3.0):
        save(tmp_path / "last", value)
    assert load_checkpoint(tmp_path / "last").manifest["value"] == 3.0
    assert load_checkpoint(tmp_path / "last.previous").manifest["value"] == 2.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last", "last.previous"]


@pytest.mark.parametrize("fail_at", range(6))
def test_a_full_disk_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch, fail_at):
    save(tmp_path / "last", 1.0, trainer={"step": 1})
    calls = iter(range(100))

    def failing(real):
        def call(*arguments, **options):
            if next(calls) == fail_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments, **options)

        return call

    monkeypatch.setattr(module.os, "fsync", failing(os.fsync))
    monkeypatch.setattr(module, "_write", failing(module._write))
    with pytest.raises(RunError, match=r"could not be saved.*No space left.*untouched"):
        save(tmp_path / "last", 2.0, trainer={"step": 2})
    assert load_checkpoint(tmp_path / "last").manifest["value"] == 1.0
    assert not (tmp_path / "last.new").exists()


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
