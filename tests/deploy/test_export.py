import json
import shutil
import warnings

import numpy as np
import onnx
import pytest
import timm
import torch

from smallfry.cli import main
from smallfry.deploy import Manifest, Runtime
from smallfry.deploy.export import export
from smallfry.deploy.graphs import anytime_graphs, exported_program, to_onnx, whole_graph
from smallfry.errors import ExportError, SmallfryWarning, UsageError
from smallfry.training.evaluation_data import load_like
from smallfry.training.run import load_run


def pytorch_says(run, images):
    trained = load_run(run)
    batch = trained.normalize(images)
    with torch.inference_mode():
        steps = trained.model.recurse(batch)
    return (
        torch.stack([step.logits for step in steps], 1).softmax(-1).numpy(),
        torch.stack([step.halt_logits for step in steps], 1).sigmoid().numpy(),
    )


@pytest.fixture(scope="module")
def images(run):
    return load_like(load_run(run), run, split="train")[1].images[:1000]


@pytest.mark.slow
def test_every_form_equals_pytorch(run, anytime, whole, images):
    wanted, halting = pytorch_says(run, images)
    for folder in (anytime, whole):
        for batch_size in (1, 7, 64):
            few = images[: 10 * batch_size].numpy()
            said = Runtime(folder).predict(few, batch_size=batch_size)
            np.testing.assert_allclose(said.probabilities, wanted[: len(few), -1], atol=1e-4)
            np.testing.assert_allclose(said.halting, halting[: len(few), -1], atol=1e-4)


def test_the_whole_graph_gives_every_step(run, whole, images):
    wanted, halting = pytorch_says(run, images[:5])
    runtime = Runtime(whole)
    logits, probability = runtime._graphs.call("model", [runtime.preprocess(images[:5].numpy())])
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(shares, wanted, atol=1e-4)
    np.testing.assert_allclose(probability, halting, atol=1e-4)


def test_a_weight_is_stored_once_however_often_it_is_applied(whole):
    graph = onnx.load(whole / "model.onnx").graph
    weights = [tensor.name for tensor in graph.initializer if len(tensor.dims) == 2]
    uses = {name: sum(name in node.input for node in graph.node) for name in weights}
    qkv = uses["model.blocks.0.attn.qkv.weight.transposed"]
    assert qkv >= 3 * 2  # three recursion steps of two latent steps and an answer
    contents = [tensor.raw_data for tensor in graph.initializer if len(tensor.raw_data) > 256]
    assert len(contents) == len(set(contents))
    model = timm.create_model(
        "vitrm_micro_patch4_8", depth=1, embed_dim=16, num_heads=2, mlp_hidden_dim=16
    )
    parameters = sum(weight.numel() for weight in model.parameters())
    assert sum(len(tensor.raw_data) for tensor in graph.initializer) < 4 * parameters + 2000


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["vitrm_plus_micro_8", "cct_2_3x2_32", "resnet10t", "paper_resnet18_32"]
)
def test_any_model_can_be_exported(name):
    arguments = {"num_classes": 4} | ({"depth": 1} if name.startswith("vitrm") else {})
    model = timm.create_model(name, **arguments).eval()
    size = 8 if name.endswith("_8") else 32
    images = torch.rand(2, 1 if size == 8 else 3, size, size)
    graph = whole_graph(model, images)
    content = to_onnx(graph, exported_program(graph)).SerializeToString()
    import onnxruntime

    session = onnxruntime.InferenceSession(content)
    for count in (1, 3):
        batch = torch.rand(count, *images.shape[1:])
        with torch.inference_mode():
            wanted = model(batch).numpy()
        given = session.run(["logits"], {"images": batch.numpy()})[0].reshape(wanted.shape)
        np.testing.assert_allclose(given, wanted, atol=1e-4)


def test_a_model_that_depends_on_the_batch_size_is_refused():
    class Odd(torch.nn.Module):
        def forward(self, images):
            return images.flatten(1)[:, :3] * (1 if len(images) == 2 else 2)

    with pytest.raises(ExportError, match="batches of any size"):
        exported_program(whole_graph(Odd(), torch.rand(2, 1, 4, 4)))


@pytest.mark.slow
def test_the_torch_program_gives_the_same(run, tmp_path, images):
    folder = export(run, tmp_path / "export", form="whole", torch_program=True)
    program = torch.export.load(folder / "model.pt2").module()
    trained = load_run(run)
    with torch.inference_mode():
        logits, _ = program(images=trained.normalize(images[:3]))
    wanted, _ = pytorch_says(run, images[:3])
    np.testing.assert_allclose(logits.softmax(-1).numpy(), wanted, atol=1e-5)


def test_the_manifest_tells_what_a_user_needs(run, anytime):
    manifest = Manifest.read(anytime)
    trained = load_run(run)
    assert manifest.classes == trained.classes
    assert manifest.recursion_steps == 3
    assert manifest.calibrated_on == "143 validation images of digits"
    assert [point.steps for point in manifest.exits] == sorted(p.steps for p in manifest.exits)
    assert manifest.model["parameters"] > 0
    assert manifest.license is None
    checkpoint = json.loads((run / "best" / "manifest.json").read_text())
    assert manifest.source["weights"] == checkpoint["files"]["model.safetensors"]
    summary = json.loads((run / "summary.json").read_text())
    assert manifest.training["measured"]["test"] == summary["measured"]["test"]
    assert str(run.parent) not in (anytime / "manifest.json").read_text()


@pytest.mark.slow
def test_an_export_replaces_an_export_and_nothing_else(run, whole, tmp_path):
    copy = tmp_path / "export"
    shutil.copytree(whole, copy)
    (copy / "model.onnx").write_bytes(b"old")
    export(run, copy, form="whole")
    Runtime(copy)
    assert not list(tmp_path.glob("export.*"))
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").write_bytes(b"meow")
    with pytest.raises(ExportError, match="exists and is not an export; use another folder"):
        export(run, other)
    assert (other / "cat.jpg").read_bytes() == b"meow"


@pytest.mark.slow
def test_without_the_images_of_the_run_there_is_an_export_without_exits(run, tmp_path):
    with pytest.warns(SmallfryWarning, match="early exit is not calibrated"):
        folder = export(run / "best", tmp_path / "export")
    assert Manifest.read(folder).exits == ()
    with pytest.raises(UsageError, match="not calibrated"):
        Runtime(folder).exit_threshold(budget=1.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SmallfryWarning)  # one graph has no exits to calibrate
        export(run / "best", tmp_path / "whole", form="whole")


def test_wrong_wishes_are_told(run, tmp_path):
    with pytest.raises(UsageError, match="precision must be one of"):
        export(run, tmp_path / "export", precision="int4")
    with pytest.raises(UsageError, match="whole or anytime"):
        export(run, tmp_path / "export", form="half")
    assert not (tmp_path / "export").exists()


@pytest.mark.slow
def test_the_command_exports_and_predicts(run, tmp_path, capsys):
    target = tmp_path / "export"
    arguments = ["export", str(run), "--to", str(target), "--precision", "int8_dynamic"]
    assert main([*arguments, "--license", "MIT"]) == 0
    assert f"smallfry predict {target}" in capsys.readouterr().out
    assert Manifest.read(target).license == "MIT"
    picture = str(run / "pictures" / "confusion_matrix.png")
    assert main(["predict", str(target), picture, "--exit_drop", "0.01", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["steps"] in (1, 2, 3)
    assert main(["predict", str(run), picture, "--exit_drop", "0.01"]) == 2
    assert "need an export's calibrated thresholds" in capsys.readouterr().err


@pytest.mark.slow
def test_parts_have_the_batch_as_their_only_free_axis():
    model = timm.create_model("vitrm_micro_patch4_8", embed_dim=16, num_heads=2, depth=1).eval()
    for graph in anytime_graphs(model, torch.zeros(2, 1, 8, 8)):
        proto = to_onnx(graph, exported_program(graph))
        for entry in (*proto.graph.input, *proto.graph.output):
            first, *rest = entry.type.tensor_type.shape.dim
            assert first.dim_param
            assert all(axis.dim_value > 0 for axis in rest)


@pytest.mark.parametrize("verb", [["evaluate"], ["export"], ["share", "--to", "x"]])
def test_verbs_that_need_the_run_say_so_of_an_export(whole, capsys, verb):
    assert main([verb[0], str(whole), *verb[1:]]) == 1
    assert "pass its run instead" in capsys.readouterr().err
