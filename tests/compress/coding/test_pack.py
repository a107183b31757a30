"""The method ``pack``: a run folder with a packed file, used as any other."""

import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from smallfry import compress
from smallfry.cli import main
from smallfry.compress.report import compare
from smallfry.deploy.export import export
from smallfry.errors import RunError, UsageError
from smallfry.training.checkpoint import PACKED, WEIGHTS, load_checkpoint
from smallfry.training.method import Running, Setting
from smallfry.training.run import load_run
from smallfry.transforms import ModelSpec
from smallfry_runtime import Runtime
from smallfry_runtime.packed import unpack_file

RUN = Path(__file__).parents[2] / "fixtures" / "format_2" / "run"


@pytest.fixture(scope="module")
def packed_run(tmp_path_factory):
    place = tmp_path_factory.mktemp("pack")
    shutil.copytree(RUN, place / "run")
    methods = [compress.RoundWeights(bits=5), compress.Pack(entropies=("static", "laplace"))]
    small = compress.apply(load_run(place / "run"), methods)
    return small.save(place / "packed")


def test_a_packed_run_has_the_weights_to_the_bit(packed_run):
    assert not (packed_run / "best" / WEIGHTS).exists()
    trained = load_run(packed_run)
    rounded = compress.apply(load_run(packed_run.parent / "run"), [compress.RoundWeights(bits=5)])
    wanted, found = rounded.model.state_dict(), trained.model.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    plain = rounded.save(packed_run.parent / "plain") / "best" / WEIGHTS
    assert unpack_file(packed_run / "best" / PACKED) == plain.read_bytes()
    assert (packed_run / "best" / PACKED).stat().st_size < 0.85 * plain.stat().st_size


def test_the_report_has_the_bytes_of_each_tensor_in_the_packed_file(packed_run):
    reports = []
    methods = [compress.RoundWeights(bits=5), compress.Pack(entropies=("static", "laplace"))]
    small = compress.apply(load_run(packed_run.parent / "run"), methods, reports=reports)
    report = reports[-1]
    codes = {n: p for n, p in small.model.named_parameters() if p.dtype == torch.int8}
    assert report["method"] == "pack"
    assert report["bytes"].keys() == codes.keys()
    assert report["bytes"] == {each["name"]: each["bytes"] for each in report["tensors"]}
    assert sum(report["bytes"].values()) < 0.9 * sum(p.numel() for p in codes.values())
    coded = [each["bytes"] for each in report["tensors"] if each["coder"] != "zlib"]
    assert sum(coded) < (packed_run / "best" / PACKED).stat().st_size


def test_a_rehearsal_packs_nothing():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    setting = Setting(ModelSpec("a"), torch.zeros(1, 8), rehearsal=True)
    running = Running([compress.RoundWeights(), compress.Pack()], model, setting)
    running.finish()
    assert [each["method"] for each in running.reports] == ["quantize"]


def test_the_comparison_has_the_bytes_of_the_packed_file(packed_run):
    parent = load_run(packed_run.parent / "run")
    methods = [compress.RoundWeights(bits=5), compress.Pack(entropies=("static", "laplace"))]
    small = compress.apply(parent, methods)
    size = (packed_run / "best" / PACKED).stat().st_size
    assert compare(parent, small, None).file_bytes[1] == size


@pytest.mark.slow
def test_a_packed_run_is_exported_and_compressed_further(packed_run, tmp_path):
    folder = export(packed_run, tmp_path / "export")
    assert Runtime(folder).manifest.classes == load_run(packed_run).classes
    trained = load_run(packed_run)
    assert trained.packing is None
    again = compress.apply(trained, [compress.Pack(entropies=("static",))])
    names = [next(iter(each)) for each in again.manifest["methods"]]
    assert names == ["round_weights", "pack", "pack"]


def test_a_damaged_packed_run_is_refused(packed_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(packed_run, run)
    file = run / "best" / PACKED
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(RunError, match=r"model.packed: damaged"):
        load_run(run)
    file.unlink()
    with pytest.raises(RunError, match=r"model\.packed"):
        load_checkpoint(run / "best")


def test_the_command_packs(packed_run, tmp_path, capsys):
    methods = "[{round_weights: {bits: 4}}, {pack: {entropies: [laplace]}}]"
    run = str(packed_run.parent / "run")
    assert main(["compress", run, "--methods", methods, "--to", str(tmp_path / "small")]) == 0
    assert (tmp_path / "small" / "best" / PACKED).is_file()
    assert main(["evaluate", str(tmp_path / "small")]) == 0


def test_floating_point_weights_have_nothing_to_pack():
    with pytest.raises(UsageError, match="put round_weights before it"):
        compress.apply_to_model(torch.nn.Linear(3, 3), [compress.Pack()])


def test_unknown_coders_are_refused():
    for wrong in (("zip",), ()):
        with pytest.raises(UsageError, match="static, laplace, circuit"):
            compress.Pack(entropies=wrong)


@pytest.mark.slow
def test_a_training_run_ends_packed(tmp_path):
    methods = "[{round_weights: {bits: 8}}, {pack: {entropies: [static]}}]"
    options = ["--epochs", "1", "--data.limit", "64", "--progress", "quiet"]
    options += ["--references", "false", "--model.options", "{depth: 1, latent_steps: 1}"]
    assert main(["train", "--run", str(tmp_path / "run"), *options, "--methods", methods]) == 0
    best = tmp_path / "run" / "best"
    assert (best / PACKED).is_file()
    weights = safetensors.torch.load(unpack_file(best / PACKED))
    found = load_run(tmp_path / "run").model.state_dict()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
