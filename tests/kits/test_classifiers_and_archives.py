"""What all kits share: new classifiers in the type of a network, and arrays in broken archives."""

import io

import numpy as np
import pytest
import timm
import torch

from smallfry.data.made_once import made_once
from smallfry.errors import DataError
from smallfry.io.plugins import load_kit
from smallfry.kits.eeg import statistics
from smallfry.search.tables.table import load_table

MODELS = {
    "rgcn_tiny": "graphs",
    "gssnn_tiny": "symbolic",
    "mgno_tiny": "operators",
    "fno_tiny": "operators",
    "gl2_resnet_turns": "equivariant",
    "interpretable_cnn": "eeg",
    "unet_xs": "uav",
    "pilot_net": "uav",
    "crnn_vgg": "ocr",
    "crnn_dw_s": "ocr",
}


@pytest.mark.parametrize("name", MODELS)
def test_a_new_classifier_has_the_type_of_the_network(name):
    load_kit(MODELS[name])
    model = timm.create_model(name).double().eval()
    shape = model.pretrained_cfg["input_size"]
    given = torch.zeros(2, *shape, dtype=torch.float64)
    before = model(given)
    model.reset_classifier(before.shape[1] + 3 if before.ndim == 2 else 5)
    found = model(given)
    assert found.dtype == before.dtype == torch.float64
    assert found.numel() != before.numel()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def archive():
    stream = io.BytesIO()
    np.savez(stream, a=np.zeros(3), b=np.zeros(4))
    return stream.getvalue()


def plain(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


WRONG = {
    "empty": b"",
    "cut archive": archive()[:-9],
    "start of an archive": b"PK\x03\x04",
    "archive": archive(),
    "single number": plain(np.float64(3)),
    "text": b"no array",
}


@pytest.mark.parametrize("content", WRONG.values(), ids=WRONG)
def test_samples_that_were_damaged_are_made_again(content, tmp_path, monkeypatch):
    monkeypatch.setenv("SMALLFRY_CACHE", str(tmp_path))
    calls = []

    def make(number):
        calls.append(number)
        return np.full((1, 2, 2), number, np.uint8), np.array(number)

    wanted = made_once("a mark", 2, make)
    assert made_once("a mark", 2, make).labels.tolist() == [0, 1]
    first = len(calls)
    for file in tmp_path.rglob("*.npy"):
        file.unlink()
        file.write_bytes(content)
    again = made_once("a mark", 2, make)
    assert len(calls) > first
    assert torch.equal(again.images, wanted.images)


@pytest.mark.parametrize("content", WRONG.values(), ids=WRONG)
def test_tables_that_are_none_are_refused(content, tmp_path):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.npz is no table of a search space"):
        load_table("micro_n2n", tmp_path / "a.npz")


@pytest.mark.parametrize("content", WRONG.values(), ids=WRONG)
def test_windows_in_files_of_another_kind_are_refused(content, tmp_path):
    load_kit("eeg")
    (tmp_path / "a.npy").write_bytes(content)
    model = timm.create_model("interpretable_cnn")
    with pytest.raises(DataError, match=r"not a readable|several arrays|has the shape"):
        statistics._read(tmp_path / "a.npy", model)
