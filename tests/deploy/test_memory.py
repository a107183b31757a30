import json
import os

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from smallfry.deploy import memory
from smallfry.deploy.memory import CLEAR, measure_memory
from smallfry_runtime.arrays import random_inputs

needs_linux = pytest.mark.skipif(not os.access(CLEAR, os.W_OK), reason="/proc is Linux's")
MIB = 2**20


@pytest.mark.slow
@needs_linux
def test_the_peak_of_an_export_is_its_own_and_not_its_parents(int8):
    ballast = np.ones(800 * MIB, np.uint8)  # ru_maxrss of the child would begin with this
    found = measure_memory("export", int8, [1024, 1], threads=1)
    assert ballast[-1] == 1
    assert list(found.peaks) == [1, 1024]
    assert found.libraries < found.peaks[1] < found.peaks[1024] < 800 * MIB


@needs_linux
def test_what_can_not_be_loaded_has_no_memory(tmp_path):
    assert measure_memory("export", tmp_path, [1], threads=1) is None


def test_where_the_system_does_not_tell_there_is_none(int8, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "nothing")
    monkeypatch.setattr(memory.subprocess, "run", pytest.fail)
    assert measure_memory("export", int8, [1], threads=1) is None


def test_pytorch_answers_with_the_weights_of_the_folder(tmp_path):
    arguments = {"embed_dim": 16, "num_heads": 2, "depth": 1, "num_classes": 3}
    model = timm.create_model("vitrm_micro_patch4_8", **arguments).eval()
    save_file(model.state_dict(), tmp_path / memory.WEIGHTS)
    frame = [8, 8, "crop", "uint8"]
    spec = {"name": "vitrm_micro_patch4_8", "arguments": arguments, "frame": frame}
    spec["channels"] = 1
    (tmp_path / memory.MODEL).write_text(json.dumps(spec))
    load, (frame, channels) = memory._with_pytorch(tmp_path, threads=1)
    pixels = random_inputs(2, frame, channels)
    with torch.inference_mode():
        wanted = model(torch.from_numpy(pixels).float() / 255)
    torch.testing.assert_close(load()(pixels), wanted)
