"""Generated samples are made once, in order, and made again where the kept ones can't be used."""

import numpy as np
import pytest
import torch

from smallfry.data.cache import cache_folder
from smallfry.data.made_once import made_once
from smallfry.errors import DataError


@pytest.fixture
def calls(tmp_path, monkeypatch):
    monkeypatch.setenv("SMALLFRY_CACHE", str(tmp_path / "cache"))
    return []


def maker(calls):
    def make(number):
        calls.append(number)
        pixels = np.full((2, 3, 4), number % 256, np.uint8)
        return pixels, np.array([number, 0.5], np.float32)

    return make


def test_samples_are_made_once_and_in_order(calls):
    first = made_once("numbers 1", 300, maker(calls))
    assert {*calls} == {*range(300)}
    assert first.images.shape == (300, 2, 3, 4)
    assert torch.equal(first.labels[:, 0], torch.arange(300.0))
    assert torch.equal(first.images[:, 0, 0, 0], (torch.arange(300) % 256).to(torch.uint8))
    calls.clear()
    again = made_once("numbers 1", 300, maker(calls))
    assert calls == []
    assert torch.equal(again.images, first.images)
    assert torch.equal(again.labels, first.labels)


def test_another_mark_or_count_is_another_set(calls):
    made_once("numbers 1", 4, maker(calls))
    calls.clear()
    made_once("numbers 2", 4, maker(calls))
    made_once("numbers 1", 5, maker(calls))
    assert {*calls} == {*range(5)}


def test_damaged_files_are_made_again(calls):
    wanted = made_once("numbers 1", 6, maker(calls)).images
    for content in (b"", b"nothing", b"\x93NUMPY\x01\x00"):
        calls.clear()
        for file in cache_folder().glob("*.npy"):
            file.write_bytes(content)
        assert torch.equal(made_once("numbers 1", 6, maker(calls)).images, wanted)
        assert calls


def test_changes_of_a_split_stay_in_memory(calls):
    made_once("numbers 1", 4, maker(calls)).labels.add_(1)
    assert made_once("numbers 1", 4, maker(calls)).labels[0, 0] == 0


def test_a_cache_that_cant_be_written_is_named(calls, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SMALLFRY_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="generated samples can't be kept there"):
        made_once("numbers 1", 4, maker(calls))
