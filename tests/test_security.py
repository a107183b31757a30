"""What SECURITY.md promises, with files that would break it."""

import json
import os
import pickle
import shutil
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
import yaml
from PIL import Image

from smallfry.cli import main
from smallfry.data import load_data
from smallfry.deploy import Runtime
from smallfry.deploy.export import export
from smallfry.deploy.pretrained import from_pretrained, save_pretrained
from smallfry.errors import DataError, ExportError, RunError, UsageError
from smallfry.report.page import image
from smallfry.report.runs import Outcome
from smallfry.report.runs_page import Section, write_page
from smallfry.report.table import table
from smallfry.training.checkpoint import load_checkpoint
from smallfry.training.config import read_config
from smallfry.training.run import load_run
from smallfry.training.train import resume
from smallfry_runtime.files import with_digest
from smallfry_runtime.images import READ, decode
from smallfry_runtime.inputs import list_folder

FAST = [
    "--model.options={embed_dim: 16, num_heads: 2, mlp_hidden_dim: 16, depth: 1, latent_steps: 1}",
    *("--epochs=1", "--data.limit=100", "--progress=quiet", "--references=false"),
]
HOSTILE = '<script>alert("1")</script>'


class Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, proof):
        self.proof = str(proof)

    def __reduce__(self):
        return os.mkdir, (self.proof,)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that the tests only read."""
    folder = tmp_path_factory.mktemp("security") / "run"
    assert main(["train", *FAST, "--run", str(folder)]) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """The run, to be changed by a stranger."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(scope="module")
def graph(trained, tmp_path_factory):
    """An export of the run that the tests copy."""
    return export(trained, tmp_path_factory.mktemp("security") / "export", form="whole")


@pytest.fixture
def exported(graph, tmp_path):
    """The export, to be changed by a stranger."""
    return Path(shutil.copytree(graph, tmp_path / "export"))


def reseal(folder, change=lambda manifest: None):
    """Make the hashes of a checkpoint fit what is there now."""
    import hashlib

    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    for name in manifest["files"]:
        manifest["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    file.write_text(json.dumps(with_digest(manifest)))


# Nothing that is loaded runs code


@pytest.mark.parametrize("name", ["trainer.pt", "model.safetensors"])
def test_a_pickle_in_a_checkpoint_is_not_run(run, tmp_path, name):
    proof = tmp_path / "proof"
    (run / "last" / name).write_bytes(pickle.dumps({"weights": Runs(proof)}))
    reseal(run / "last")
    with pytest.raises(RunError, match=rf"{name}: can't be loaded"):
        load_checkpoint(run / "last")
    assert not proof.exists()


def test_a_pickle_inside_of_pytorchs_own_format_is_not_run(run, tmp_path):
    proof, file, buffer = tmp_path / "proof", run / "last" / "trainer.pt", BytesIO()
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            bad = pickle.dumps({"weights": Runs(proof)}, protocol=2)
            new.writestr(name, bad if name.endswith("data.pkl") else old.read(name))
    file.write_bytes(buffer.getvalue())
    reseal(run / "last")
    with pytest.raises(RunError, match=r"trainer\.pt: can't be loaded"):
        load_checkpoint(run / "last")
    assert not proof.exists()


@pytest.mark.parametrize(
    "text",
    [
        "model: !!python/object/apply:os.mkdir [proof]",
        "model: {options: {x: !!python/object/apply:os.mkdir [proof]}}",
        "model: {options: {x: {class_path: os.mkdir, init_args: {path: proof}}}}",
        "model: {options: {x: {class_path: antigravity.Any}}}",
    ],
)
def test_a_configuration_runs_and_imports_nothing(run, monkeypatch, tmp_path, text, capsys):
    import sys

    monkeypatch.chdir(tmp_path)
    (run / "config.yaml").write_text(text)
    with pytest.raises(RunError, match=r"config\.yaml: not a configuration"):
        read_config(run / "config.yaml")
    assert main(["train", "--config", str(run / "config.yaml")]) == 2
    assert "an error inside" not in capsys.readouterr().err
    assert not (tmp_path / "proof").exists()
    assert "antigravity" not in sys.modules


def test_a_configuration_of_a_run_reads_no_other_file(run, tmp_path):
    (tmp_path / "other.yaml").write_text("name: resnet10t")
    (run / "config.yaml").write_text(f"model: {tmp_path / 'other.yaml'}")
    with pytest.raises(RunError, match="model: expected settings by their names"):
        read_config(run / "config.yaml")


@pytest.mark.parametrize(
    "options",
    [
        {"checkpoint_path": "evil.pth"},
        {"pretrained": True, "pretrained_cfg_overlay": {"file": "evil.pth"}},
        {"pretrained": True, "pretrained_cfg_overlay": {"url": "http://there/evil.pth"}},
        {"pretrained_cfg": "evil"},
    ],
)
def test_weights_to_start_from_are_no_pickles(run, options):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["options"] |= options
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for name in ("last", "best"):
        shutil.rmtree(run / name)
    (run / "summary.json").unlink()
    with pytest.raises(UsageError, match=r"model\.options: \w+ can't be"):
        resume(run)


def test_an_operator_of_somebodys_own_is_refused(exported):
    file = exported / "model.onnx"
    graph = onnx.load(file)
    graph.graph.node[0].domain = "evil.ops"
    graph.opset_import.append(onnx.helper.make_opsetid("evil.ops", 1))
    file.write_bytes(graph.SerializeToString())
    reseal(exported)
    with pytest.raises(ExportError, match="can't run it"):
        Runtime(exported)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["/etc/passwd", "../../../../etc/passwd", "secret"])
def test_a_graph_has_no_weights_in_files_outside_of_it(exported, tmp_path, monkeypatch, place):
    (tmp_path / "secret").write_bytes(bytes(10**6))
    monkeypatch.chdir(tmp_path)
    file = exported / "model.onnx"
    graph = onnx.load(file)
    tensor = max(graph.graph.initializer, key=lambda t: len(t.raw_data))
    size = len(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": place, "offset": "0", "length": str(size)}.items():
        tensor.external_data.add(key=key, value=value)
    file.write_bytes(graph.SerializeToString())
    reseal(exported)
    with pytest.raises(ExportError):
        Runtime(exported)


# A stranger's model is one of the registry, and nothing else


@pytest.mark.parametrize("name", ["hf_hub:a/b", "hf-hub:a/b", "local-dir:/tmp", "os.system", 3])
def test_a_manifest_names_a_model_of_the_registry(run, name, monkeypatch):
    monkeypatch.setattr(timm, "create_model", None)  # nothing gets there
    reseal(run / "best", lambda manifest: manifest["model"].update(name=name))
    with pytest.raises(RunError, match="unknown architecture"):
        load_run(run)


def test_a_manifest_can_not_make_timm_read_other_files(run, tmp_path):
    proof, wanted = tmp_path / "proof", load_run(run).model.state_dict()
    evil = tmp_path / "evil.pth"
    evil.write_bytes(pickle.dumps(Runs(proof)))
    more = {"checkpoint_path": str(evil), "pretrained": True, "pretrained_cfg": {"file": str(evil)}}
    reseal(run / "best", lambda manifest: manifest["model"]["arguments"].update(more))
    found = load_run(run).model.state_dict()
    assert all(torch.equal(weight, found[name]) for name, weight in wanted.items())
    assert not proof.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embed_dim": 10**9}, "too large for an argument"),
        ({"mlp_hidden_dim": 900_000, "depth": 5_000}, "larger than its weights"),
        ({"latent_steps": 1_000_000}, "are too many"),
        ({"latents": float("nan")}, "too large for an argument"),
    ],
)
def test_a_description_of_more_than_the_weights_is_not_followed(run, arguments, message):
    reseal(run / "best", lambda manifest: manifest["model"]["arguments"].update(arguments))
    with pytest.raises(RunError, match=message):
        load_run(run)


@pytest.mark.parametrize(
    "change",
    [
        {"size": 10**9},
        {"size": "8"},
        {"channels": 2},
        {"mean": []},
        {"std": [0.0]},
        {"mean": [float("nan")]},
    ],
)
def test_what_a_manifest_says_of_images_is_judged(run, change):
    reseal(run / "best", lambda manifest: manifest["input"].update(change))
    with pytest.raises(RunError, match="manifest is damaged"):
        load_run(run)


@pytest.mark.parametrize("name", ["../last/model.safetensors", "/etc/passwd", "x"])
def test_a_manifest_lists_no_other_files(run, name):
    file = run / "best" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["files"][name] = "0" * 64
    file.write_text(json.dumps(with_digest(manifest)))
    with pytest.raises(RunError, match="lists other files"):
        load_run(run)


def test_weights_that_are_not_finite_are_refused(run):
    import safetensors.torch

    file = run / "best" / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    name = next(name for name, weight in weights.items() if weight.is_floating_point())
    weights[name].view(-1)[0] = float("nan")
    file.write_bytes(safetensors.torch.save(weights))
    reseal(run / "best")
    with pytest.raises(RunError, match="is not finite"):
        load_run(run)


# Images and tables


def test_no_format_that_starts_a_program_is_read():
    picture = BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "EPS")
    assert "EPS" not in READ
    with pytest.raises(DataError, match="not an image, or in an unsupported format"):
        decode(picture.getvalue(), "x", 8, 3)


def test_a_file_is_bounded_in_bytes_and_must_be_a_file(tmp_path):
    with open(tmp_path / "large.png", "wb") as stream:
        stream.truncate(300 * 2**20)
    with pytest.raises(DataError, match="longer than"):
        decode(tmp_path / "large.png", "x", 8, 3)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match="not a regular file"):
        decode(tmp_path / "pipe.png", "x", 8, 3)


def test_a_picture_with_damaged_exif_data_is_read():
    picture = BytesIO()
    Image.new("L", (8, 8), 7).save(picture, "JPEG", exif=b"Exif\0\0 nonsense")
    assert decode(picture.getvalue(), "x", 8, 1).mean() == pytest.approx(7, abs=1)


def test_links_that_lead_back_have_an_end(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / name / "x.png")
        for i in range(3):
            (tmp_path / name / f"back{i}").symlink_to(tmp_path)
    assert len(list_folder(tmp_path).images) == 2


@pytest.mark.parametrize("place", ["/etc/hostname", "../outside.png", "link.png"])
def test_a_table_names_no_files_outside_of_its_folder(tmp_path, place):
    Image.new("L", (8, 8)).save(tmp_path / "outside.png")
    folder = tmp_path / "table"
    folder.mkdir()
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    cells = pa.array([{"bytes": None, "path": place}] * 20, kind)
    pq.write_table(pa.table({"image": cells, "label": [0, 1] * 10}), folder / "train.parquet")
    with pytest.raises(DataError, match="outside the table's folder"):
        load_data(str(folder))


# Names are shown, not run


def test_reports_escape_every_name():
    outcome = Outcome(HOSTILE, {"seed": 1}, None, [], HOSTILE)
    section = Section(HOSTILE, [table([HOSTILE], [[HOSTILE]])], None)
    page, _ = write_page(HOSTILE, "about", [section], [outcome], 1)
    assert "<script" not in page
    assert "default-src 'none'" in page


def test_pictures_in_reports_escape_what_they_say(tmp_path):
    Image.new("L", (2, 2)).save(tmp_path / "x.png")
    picture = image(tmp_path / "x.png", HOSTILE + '" onload="alert(1)')
    section = Section(HOSTILE, [picture, HOSTILE], None)
    text, _ = write_page(HOSTILE, HOSTILE, [section], [], 1)
    assert "<script" not in text
    assert '" onload' not in text


def test_a_class_name_does_not_command_the_terminal(run, tmp_path, capsys):
    def rename(manifest):
        manifest["classes"] = [f"\x1b[2J{i}\u202e" for i in range(10)]

    reseal(run / "best", rename)
    pixels = np.zeros((8, 8), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    (tmp_path / "\x1b]0;x\x07.png").write_bytes(b"no image")
    assert main(["predict", str(run), str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "\\x1b[2J" in said.out
    assert "\\x1b]0;x" in said.err
    assert "\x1b" not in said.out + said.err


def test_a_shared_model_with_hostile_names_is_shared_and_read(run, tmp_path):
    def rename(manifest):
        manifest["classes"] = [f"{HOSTILE}|\n{i}" for i in range(10)]

    reseal(run / "best", rename)
    folder = save_pretrained(run, tmp_path / "out")
    assert from_pretrained(folder).classes[0].startswith(HOSTILE)
    assert HOSTILE not in (folder / "README.md").read_text().split("---", 2)[2]
