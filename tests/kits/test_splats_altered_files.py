"""Files of splats that were cut or altered, settings at their ends, and the commands."""

import json

import numpy as np
import pytest
import safetensors.numpy
import torch

from smallfry.compress.coding.packing import pack
from smallfry.data import load_data
from smallfry.errors import DataError, UsageError
from smallfry.io.plugins import load_kit
from smallfry.kits.splats.__main__ import main
from smallfry.kits.splats.artifact import CompressedScene, load
from smallfry.kits.splats.cameras import around, ring
from smallfry.kits.splats.codec import NeuralSplats
from smallfry.kits.splats.field import SplatField, quantise
from smallfry.kits.splats.generate import generate
from smallfry.kits.splats.prepare import Grid
from smallfry.kits.splats.scene import Scene, column_names, read_scene, write_scene

load_kit("splats")
CAMERAS = ring(2, size=16, focal=16)


def stored(bits=8, position_bits=12, layers=3, counts=(4, 0, 7)):
    """Store networks that were not fitted, with a cluster of none."""
    torch.manual_seed(bits)
    field = SplatField(len(counts), 6, 2, layers, 20)
    field.output_mean.normal_()
    grid = Grid((0.0, 1.0, 2.0), (1.0, 2.0, 3.0), position_bits)
    places = np.random.default_rng(0).uniform(-3, 5, (sum(counts), 3))
    integers = grid.integers(places)
    return field, CompressedScene.of(field, counts, grid, integers, bits, {"a": 1})


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize(("bits", "position_bits"), [(4, 8), (8, 15), (16, 16)])
def test_files_give_back_their_numbers(bits, position_bits, layers, tmp_path):
    field, made = stored(bits, position_bits, layers)
    assert len(made) == 11
    size = made.save(tmp_path / "a.splats")
    read = load(str(tmp_path / "a.splats"))
    assert size == (tmp_path / "a.splats").stat().st_size
    assert read.header == made.header
    assert {*read.tensors} == {*made.tensors}
    for name, array in made.tensors.items():
        assert np.array_equal(read.tensors[name], array)
    assert read.to_bytes() == made.to_bytes()
    again = read.field()
    for one, other in zip(field.networks, again.networks, strict=True):
        for layer, its in zip(one, other, strict=True):
            wanted = layer.weight.half().float()
            if bits < 16:
                codes, scales = quantise(layer.weight, bits)
                wanted = codes * scales
            torch.testing.assert_close(its.weight, wanted, rtol=0, atol=0)
            assert torch.equal(its.bias, layer.bias.half().float())
    assert torch.equal(again.output_mean, field.output_mean.half().float())


def test_uncoded_files_are_read_too(tmp_path):
    made = stored()[1]
    (tmp_path / "a.safetensors").write_bytes(made.plain_bytes())
    read = load(tmp_path / "a.safetensors")
    assert np.array_equal(read.scene().attributes, made.scene().attributes)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_files_cut_anywhere_are_refused(share, tmp_path):
    made = stored()[1]
    for content in (made.to_bytes(), made.plain_bytes()):
        (tmp_path / "a").write_bytes(content[: int(share * len(content))])
        with pytest.raises(DataError, match=r"a: no readable compressed scene"):
            load(tmp_path / "a")
        (tmp_path / "a").write_bytes(content + b"\0")
        with pytest.raises(DataError, match=r"a: no readable compressed scene"):
            load(tmp_path / "a")


def test_a_flipped_bit_of_a_coded_file_is_seen(tmp_path):
    content = bytearray(stored()[1].to_bytes())
    for place in range(0, len(content), max(1, len(content) // 40)):
        altered = content.copy()
        altered[place] ^= 4
        (tmp_path / "a").write_bytes(altered)
        with pytest.raises(DataError, match="no readable compressed scene"):
            load(tmp_path / "a")


def write_altered(file, change, header=None, packed=False):
    """Write a scene's file with other tensors or another header."""
    made = stored(16, 16)[1]
    tensors = {name: each.copy() for name, each in made.tensors.items()}
    change(tensors)
    told = {**made.header, **(header or {})}
    content = safetensors.numpy.save(tensors, {"splats": json.dumps(told)})
    file.write_bytes(pack(content).data if packed else content)


def set_to(name, value, at=0):
    def change(tensors):
        tensors[name].flat[at] = value

    return change


def infinite(tensors):
    tensors["weights.1.low"].flat[5], tensors["weights.1.high"].flat[5] = 0, 0x7C


def outside(tensors):  # 2.0 in half precision, whose order is that of unsigned numbers
    tensors["positions.y.low"].flat[2], tensors["positions.y.high"].flat[2] = 0, 0xC0 - 256


def no_number(tensors):
    tensors["positions.z.low"].flat[2], tensors["positions.z.high"].flat[2] = -1, -1


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_to("mean", np.nan), "not finite"),
        (set_to("deviation", -np.inf, 7), "not finite"),
        (set_to("biases.0", np.inf), "not finite"),
        (infinite, "not finite"),
        (outside, "outside of its box"),
        (no_number, "outside of its box"),
        (lambda t: t.pop("mean"), "tensors are not those"),
        (lambda t: t.update(more=np.zeros(1, np.int8)), "tensors are not those"),
        (lambda t: t.update(mean=t["mean"].astype(np.float32)), "tensors are not those"),
        (lambda t: t.update(mean=t["mean"].T.copy()), "tensors are not those"),
    ],
)
def test_altered_tensors_are_refused(change, words, packed, tmp_path):
    write_altered(tmp_path / "a", change, packed=packed)
    with pytest.raises(DataError, match=words):
        load(tmp_path / "a")


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"counts": [11]}, "tensors are not those"),
        ({"counts": [4, -1, 8]}, "out of range"),
        ({"counts": [4, True, 6]}, "no number"),
        ({"counts": []}, "no clusters"),
        ({"counts": 11}, "no readable"),
        ({"columns": 21}, "no clusters, layers or columns"),
        ({"frequencies": 3}, "its layers are"),
        ({"sizes": [15, 6, 7, 20]}, "its layers are"),
        ({"sizes": [20]}, "no clusters, layers"),
        ({"sizes": []}, "no clusters, layers"),
        ({"weight_bits": 8}, "tensors are not those"),
        ({"weight_bits": "16"}, "'16' bits"),
        ({"grid": [[0, 0], [1, 1, 1], 16]}, "no box"),
        ({"grid": [[0, 0, 0], [1, 1, 1e31], 16]}, "no box"),
        ({"grid": [[0, 0, 0], [1, 1, 1], 17]}, "no box"),
        ({"grid": [[0, 0, 0], [1, 1, 1], 16.0]}, "no box"),
        ({"grid": None}, "no readable"),
        ({"format": None}, "its format is None"),
    ],
)
def test_altered_headers_are_refused(header, words, tmp_path):
    write_altered(tmp_path / "a", lambda tensors: None, header)
    with pytest.raises(DataError, match=words):
        load(tmp_path / "a")
    write_altered(tmp_path / "a", lambda tensors: None)
    assert len(load(tmp_path / "a")) == 11


def test_headers_of_other_files_are_refused(tmp_path):
    tensors = {"a": np.zeros(3, np.float32)}
    for metadata in (None, {"other": "{}"}, {"splats": "[1]"}, {"splats": "{"}):
        (tmp_path / "a").write_bytes(safetensors.numpy.save(tensors, metadata))
        with pytest.raises(DataError, match="no readable compressed scene"):
            load(tmp_path / "a")


# PLY files


def ply(lines, body=b"", tail="end_header\n"):
    return ("\n".join(["ply", *lines]) + "\n" + tail).encode() + body


FORMAT = "format binary_little_endian 1.0"


def test_columns_of_all_types_are_read(tmp_path):
    kinds = {"x": "double", "y": "short", "z": "uchar", "opacity": "int", "scale_0": "ushort"}
    names = [*"xyz", *column_names(0)]
    types = {"double": "<f8", "short": "<i2", "uchar": "u1", "int": "<i4", "ushort": "<u2"}
    form = np.dtype([(name, types.get(kinds.get(name), "<f4")) for name in names])
    rows = np.zeros(2, form)
    for place, name in enumerate(names):
        rows[name] = place + 1, place + 101
    lines = [FORMAT, "obj_info x", "", "element vertex 2"]
    lines += [f"property {kinds.get(name, 'float32')} {name}" for name in names]
    (tmp_path / "a.ply").write_bytes(ply(lines, rows.tobytes()))
    found = read_scene(tmp_path / "a.ply")
    assert found.positions.tolist() == [[1, 2, 3], [101, 102, 103]]
    assert found.attributes.tolist() == [[*range(4, 15)], [*range(104, 115)]]
    assert found.attributes.dtype == np.float32


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["format ascii 1.0", "element vertex 0", "property float x"], "its format is 'ascii'"),
        ([FORMAT, "property float x", "element vertex 1"], "unexpected .*property float x"),
        ([FORMAT, "element vertex 1", "element face 2"], "unexpected .*element face 2"),
        ([FORMAT, "element vertex -1", "property float x"], "unexpected .*vertex -1"),
        ([FORMAT, "element vertex 1"], "no vertices"),
        ([FORMAT], "no vertices"),
        (["element vertex 0", "property float x"], "its format is ''"),
        ([FORMAT, "element vertex 0", "property half x"], "unexpected .*half x"),
        ([FORMAT, "element vertex 0", "property float x", "property int x"], "more than once"),
        ([FORMAT, "element vertex 0", "property float é"], "can't decode|ascii"),
        ([FORMAT, "comment " + "x" * 70_000, "element vertex 0"], "no header of a PLY"),
    ],
)
def test_headers_of_other_forms_are_refused(lines, words, tmp_path):
    (tmp_path / "a.ply").write_bytes(ply(lines))
    with pytest.raises(DataError, match=words):
        read_scene(tmp_path / "a.ply")


def test_files_without_gaussians_are_scenes_that_nothing_can_be_made_of(tmp_path, capsys):
    none = Scene(np.zeros((0, 3), np.float32), np.zeros((0, 20), np.float32))
    write_scene(none, tmp_path / "a.ply")
    found = read_scene(tmp_path / "a.ply")
    assert (len(found), found.degree) == (0, 1)
    with pytest.raises(DataError, match="has no Gaussians"):
        load_data("splats-scene", root=tmp_path / "a.ply")
    with pytest.raises(UsageError, match="without Gaussians has no place for cameras"):
        around(found.positions, 3)
    assert main(["compress", str(tmp_path / "a.ply"), str(tmp_path / "b")]) == 1
    assert "smallfry: a scene without Gaussians" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
    stored()[1].save(tmp_path / "c")
    assert main(["report", str(tmp_path / "c"), str(tmp_path / "a.ply")]) == 1
    assert main(["report", str(tmp_path / "c")]) == 0
    told = capsys.readouterr().out
    sizes = [int(line.split()[1].replace(",", "")) for line in told.splitlines()]
    assert sum(sizes[:-1]) == sizes[-1] == (tmp_path / "c").stat().st_size
    assert main(["expand", str(tmp_path / "c"), str(tmp_path / "no" / "d.ply")]) == 1


def test_settings_of_the_command_are_those_of_the_class(tmp_path, capsys):
    write_scene(generate("hills", 40), tmp_path / "a.ply")
    small = ["--clusters", "2", "--width", "4", "--iterations", "2", "--finetune", "0"]
    names = [str(tmp_path / each) for each in ("a.ply", "b")]
    assert main(["compress", *names, *small, "--prune", "0.5", "--lr", "0.02"]) == 0
    kept = load(tmp_path / "b").header["settings"]
    wanted = NeuralSplats(clusters=2, width=4, iterations=2, finetune=0, prune=0.5, lr=0.02)
    assert NeuralSplats(**kept) == wanted
    assert "× smaller" in capsys.readouterr().out
    assert main(["compress", *names, "--weight_bits", "3"]) == 1
    assert "weight_bits is one of (4, 5, 6, 7, 8, 16), got 3" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["compress", *names, "--is_weighted", "false"])
