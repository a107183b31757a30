"""Files of scenes, compression of them, and its files."""

import json
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy
import torch

from benchmarks.splats_numpy import render_file
from smallfry.errors import DataError, UsageError
from smallfry.kits.splats.__main__ import main
from smallfry.kits.splats.artifact import CompressedScene, load
from smallfry.kits.splats.cameras import psnr, ring
from smallfry.kits.splats.codec import NeuralSplats, compress, view_loss
from smallfry.kits.splats.field import SplatField, position_code, quantise
from smallfry.kits.splats.generate import generate
from smallfry.kits.splats.prepare import Grid, align_rotations, prepare
from smallfry.kits.splats.render import render
from smallfry.kits.splats.scene import RESTS, Scene, column_names, read_scene, write_scene

CAMERAS = ring(3, size=16, focal=16)
SMALL = NeuralSplats(clusters=2, width=8, iterations=20, finetune=2)


def random_scene(degree: int, count: int = 7) -> Scene:
    random = np.random.default_rng(degree)
    shapes = (count, 3), (count, 11 + RESTS[degree])
    return Scene(*(random.normal(size=each).astype(np.float32) for each in shapes))


@pytest.mark.parametrize("degree", range(4))
def test_a_scene_is_read_as_it_was_written(degree, tmp_path):
    scene = random_scene(degree)
    write_scene(scene, tmp_path / "a.ply")
    found = read_scene(tmp_path / "a.ply")
    assert np.array_equal(found.positions, scene.positions)
    assert np.array_equal(found.attributes, scene.attributes)
    write_scene(found, tmp_path / "b.ply")
    assert (tmp_path / "a.ply").read_bytes() == (tmp_path / "b.ply").read_bytes()
    body = (tmp_path / "a.ply").read_bytes().partition(b"end_header\n")[2]
    assert len(body) == 4 * 7 * (17 + RESTS[degree])


def test_columns_may_have_another_order_and_others_beside_them(tmp_path):
    scene = random_scene(1)
    names = [*column_names(1), "z", "y", "x", "label"]
    values = np.concatenate([scene.attributes, scene.positions[:, ::-1]], 1)
    form = np.dtype([(name, "<f4") for name in names[:-1]] + [("label", "u1")])
    rows = np.zeros(7, form)
    for name, column in zip(names, values.T, strict=False):
        rows[name] = column
    kinds = ["float"] * (len(names) - 1) + ["uchar"]
    head = "ply\nformat binary_little_endian 1.0\ncomment made\nelement vertex 7\n"
    head += "".join(f"property {k} {n}\n" for k, n in zip(kinds, names, strict=True))
    (tmp_path / "a.ply").write_bytes((head + "end_header\n").encode() + rows.tobytes())
    found = read_scene(tmp_path / "a.ply")
    assert np.array_equal(found.positions, scene.positions)
    assert np.array_equal(found.attributes, scene.attributes)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"vertex 7", b"vertex 8", "by its header"),
        (b"vertex 7", b"vertex 99999999999999999999", "no vertices"),
        (b"binary_little", b"binary_big_en", "its format is"),
        (b"ply\n", b"plx\n", "no header"),
        (b"property float opacity", b"property float opacitx", "no property 'opacity'"),
        (b"f_rest_8", b"f_rext_8", "8 values of harmonics"),
        (b"property float nx", b"property list uchar int nx", "unexpected in its header"),
    ],
)
def test_lying_headers_are_refused(old, new, words, tmp_path):
    write_scene(random_scene(1), tmp_path / "a.ply")
    content = (tmp_path / "a.ply").read_bytes()
    (tmp_path / "a.ply").write_bytes(content.replace(old, new, 1))
    with pytest.raises(DataError, match=words):
        read_scene(tmp_path / "a.ply")


def test_cut_and_infinite_files_are_refused(tmp_path):
    scene = random_scene(0)
    write_scene(scene, tmp_path / "a.ply")
    content = (tmp_path / "a.ply").read_bytes()
    (tmp_path / "cut.ply").write_bytes(content[:-1])
    with pytest.raises(DataError, match="by its header"):
        read_scene(tmp_path / "cut.ply")
    attributes = scene.attributes.copy()
    attributes[2, 3] = np.inf
    write_scene(Scene(scene.positions, attributes), tmp_path / "b.ply")
    with pytest.raises(DataError, match="not finite"):
        read_scene(tmp_path / "b.ply")
    with pytest.raises(DataError, match="expected a binary_little_endian PLY"):
        read_scene(tmp_path / "missing.ply")
    with pytest.raises(DataError, match="can't be written"):
        write_scene(scene, tmp_path / "none" / "a.ply")
    with pytest.raises(UsageError, match="a scene has positions"):
        Scene(np.zeros((3, 3)), np.zeros((3, 12)))


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_positions_are_rounded_within_their_bits_and_keep_their_order(bits):
    positions = np.random.default_rng(0).normal(3, 2, (500, 3)).astype(np.float32)
    grid = Grid.of(positions, bits)
    integers = grid.integers(positions)
    codes = grid.codes(integers)
    exact = (positions - np.array(grid.centre)) / np.array(grid.half_sides)
    most = 2.0**-12 if bits == 16 else 1.001 / (2**bits - 1)
    assert np.abs(codes - exact).max() <= most
    assert np.array_equal(grid.integers(grid.positions(codes).astype(np.float64)), integers) or (
        bits == 16
    )
    for axis in range(3):
        order = np.argsort(integers[:, axis], kind="stable")
        assert (np.diff(codes[order, axis]) >= 0).all()


def test_signs_of_rotations_agree_with_neighbours():
    angle = np.linspace(0, 1.5, 200)
    smooth = np.stack([np.cos(angle), np.sin(angle), 0 * angle, 0 * angle], 1)
    signs = np.random.default_rng(0).choice([-1, 1], (200, 1))
    places = np.stack([angle, 0 * angle, 0 * angle], 1)
    found = align_rotations(places, smooth * signs)
    assert np.abs(found - found[0, 0] * smooth).max() < 1e-12


def test_the_least_important_are_pruned():
    scene = generate("torus", 200)
    found = prepare(scene, CAMERAS, 0.25)
    assert found.kept.sum() == 150
    assert found.importance[~found.kept].max() <= found.importance[found.kept].min()
    with pytest.raises(UsageError, match="at least one Gaussian"):
        prepare(scene, [])
    with pytest.raises(UsageError, match="prune is 0"):
        prepare(scene, CAMERAS, 1.0)


def test_a_scene_that_is_a_networks_output_is_decoded_exactly():
    torch.manual_seed(0)
    field = SplatField(2, 8, 2, 3, 20)
    integers = np.random.default_rng(0).integers(0, 4096, (30, 3)).astype(np.uint16)
    grid = Grid((0.0, 1.0, 2.0), (1.0, 2.0, 3.0), 12)
    stored = CompressedScene.of(field, [10, 20], grid, integers, 8, {})
    net = stored.field()  # whose weights are those that a file can hold
    codes = torch.from_numpy(grid.codes(integers))
    with torch.no_grad():
        wanted = net.decode(codes, [10, 20]).numpy()
    again = CompressedScene.of(net, [10, 20], grid, integers, 8, {})
    assert np.abs(again.scene().attributes - wanted).max() < 2e-3  # scales are rounded once more
    assert np.abs(stored.scene().attributes - wanted).max() < 1e-6
    assert np.array_equal(stored.scene().positions, grid.positions(codes.numpy()))
    whole = CompressedScene.of(net, [10, 20], grid, integers, 16, {})
    assert np.abs(whole.scene().attributes - wanted).max() < 2e-3


def test_the_size_is_that_of_the_formula():
    settings = replace(SMALL, weight_bits=16, position_bits=16, iterations=1, finetune=0)
    found = compress(generate("torus", 200), CAMERAS, settings)
    plain = found.plain_bytes()
    header = 8 + int.from_bytes(plain[:8], "little")
    parameters = sum(p.numel() for p in found.field().parameters())
    assert len(found) == 120
    assert len(plain) - header == 6 * 120 + 2 * parameters + 2 * 2 * 2 * 56


@pytest.mark.parametrize("bits", [5, 8, 16])
def test_a_file_gives_the_scene_and_its_report_the_files_bytes(bits, tmp_path):
    scene = generate("hills", 150)
    found = compress(scene, CAMERAS, replace(SMALL, weight_bits=bits))
    size = found.save(tmp_path / "a.splats")
    read = load(tmp_path / "a.splats")
    assert np.array_equal(read.scene().attributes, found.scene().attributes)
    assert np.array_equal(read.scene().positions, found.scene().positions)
    report = read.report(scene, CAMERAS[:1])
    assert report.total == size == (tmp_path / "a.splats").stat().st_size
    assert sum(report.bytes.values()) == size
    assert report.original == read.report().original == 248 * 150
    write_scene(read.scene(), tmp_path / "a.ply")
    other = psnr(render_file(tmp_path / "a.ply", CAMERAS[0]), render(scene, CAMERAS[0]))
    assert report.decibels[0] == pytest.approx(other, abs=1e-2)


def test_compression_depends_on_its_seed_alone():
    scene = generate("torus", 120)
    one, two = (compress(scene, CAMERAS, SMALL).to_bytes() for _ in range(2))
    assert one == two
    assert one != compress(scene, CAMERAS, replace(SMALL, seed=1)).to_bytes()


@pytest.mark.slow
def test_importance_and_fine_tuning_make_pictures_better():
    scene, cameras, held = generate("torus", 600), ring(6, size=32, focal=32), ring(3, start=0.5)
    base = NeuralSplats(clusters=1, width=24, iterations=300, finetune=0, prune=0.2)
    ratios = []
    for form in ({"is_weighted": False}, {}, {"finetune": 60}):
        report = compress(scene, cameras, replace(base, **form)).report(scene, held)
        ratios.append(np.mean(report.decibels))
    assert ratios[2] > ratios[1] + 0.5


def test_the_fit_lowers_its_loss_and_reports_it():
    losses = {"fit": [], "finetune": []}
    settings = replace(SMALL, iterations=60, finetune=3)
    compress(generate("torus", 150), CAMERAS, settings, lambda k, i, loss: losses[k].append(loss))
    assert losses["fit"][-1] < 0.5 * losses["fit"][0]
    assert len(losses["finetune"]) == 3


def test_the_loss_of_equal_views_is_zero():
    image = torch.rand(16, 16, 3, generator=torch.Generator().manual_seed(0))
    assert view_loss(image, image).item() == pytest.approx(0, abs=1e-6)
    assert view_loss(image, 1 - image).item() > 0.3


def test_weights_are_rounded_within_half_a_step():
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    for bits in (4, 8):
        codes, scales = quantise(weight, bits)
        assert codes.abs().max() <= 2 ** (bits - 1) - 1
        assert ((codes * scales - weight).abs() <= 0.51 * scales + 1e-3 * weight.abs()).all()


def test_the_code_of_positions_is_the_papers():
    x = torch.tensor([[0.5, -0.25, 1.0]])
    found = position_code(x, 10)
    assert found.shape == (1, 63)
    assert found[0, 3:5].tolist() == pytest.approx([1, 0], abs=1e-6)
    field = SplatField(2, 16, 1, 5, 20)
    both = torch.tensor([[0.1, 0.2, 0.3], [0.9, 0.8, 0.7]])
    field.centres[1] = 1.0
    dense = field(both[:, :, None, None])
    assert torch.allclose(dense, field.decode(both, [1, 1]), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 2}, "format is 2"),
        ({"counts": [10**9]}, "out of range"),
        ({"counts": [1, 2]}, "tensors are not"),
        ({"sizes": [33, 10**7, 56]}, "its layers"),
        ({"weight_bits": 3}, "3 bits"),
        ({"grid": [[0, 0, 0], [1, 1, float("nan")], 12]}, "no box"),
        ({"columns": "56"}, "no number"),
    ],
)
def test_files_that_lie_are_refused(change, words, tmp_path):
    found = compress(generate("torus", 60), CAMERAS, replace(SMALL, iterations=1, finetune=0))
    header = {**found.header, **change}
    content = safetensors.numpy.save(dict(found.tensors), {"splats": json.dumps(header)})
    (tmp_path / "a.splats").write_bytes(content)
    with pytest.raises(DataError, match=words):
        load(tmp_path / "a.splats")


def test_damaged_files_are_refused(tmp_path):
    file = tmp_path / "a.splats"
    size = compress(generate("torus", 60), CAMERAS, SMALL).save(file)
    content = file.read_bytes()
    for wrong in (content[:-1], content[: size // 2] + b"\0" + content[size // 2 + 1 :], b"", b"x"):
        if wrong != content:
            file.write_bytes(wrong)
            with pytest.raises(DataError, match="no readable compressed scene"):
                load(file)
    with pytest.raises(DataError, match="no readable"):
        load(tmp_path / "missing")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"clusters": 0}, "clusters is 1"),
        ({"weight_bits": 9}, "weight_bits"),
        ({"frequencies": 17}, "frequencies"),
        ({"lr": 0.0}, "learning rates"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        NeuralSplats(**settings)
    assert NeuralSplats.paper().width == 128


def test_the_commands_compress_expand_and_report(tmp_path, capsys):
    names = [str(tmp_path / each) for each in ("a.ply", "a.splats", "b.ply")]
    write_scene(generate("torus", 100), names[0])
    options = ["--iterations", "5", "--finetune", "1", "--clusters", "1"]
    assert main(["compress", *names[:2], *options]) == 0
    assert main(["expand", *names[1:]]) == 0
    assert len(read_scene(names[2])) == 60
    assert main(["report", names[1], names[0]]) == 0
    assert capsys.readouterr().out.count(" dB") == 6
    assert main(["expand", names[0], names[2]]) == 1
    assert "no readable compressed scene" in capsys.readouterr().err
