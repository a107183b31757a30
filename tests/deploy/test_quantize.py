import warnings

import numpy as np
import onnx
import pytest
import torch
from graph_ranges import call_ranges
from onnxruntime import InferenceSession
from PIL import Image

from smallfry.cli import main
from smallfry.deploy import Runtime
from smallfry.deploy.export import export
from smallfry.deploy.graphs import exported_program, to_onnx, whole_graph
from smallfry.deploy.quantize import quantize
from smallfry.errors import ExportError, SmallfryWarning
from smallfry.models import ViTRM
from smallfry.training.config import DataConfig, ModelConfig, ObjectiveConfig, TrainConfig
from smallfry.training.evaluation_data import load_like
from smallfry.training.run import load_run
from smallfry.training.train import train


def test_int8_says_what_float32_says(run, whole, int8):
    images = load_like(load_run(run), run)[1].images.numpy()
    wanted, given = (Runtime(folder).predict(images).probabilities for folder in (whole, int8))
    assert (wanted.argmax(1) == given.argmax(1)).mean() > 0.95
    assert np.abs(wanted - given).mean() < 0.01


def test_every_product_of_a_shared_weight_has_a_range_of_its_own(whole, int8):
    ranges = call_ranges((int8 / "model.onnx").read_bytes())
    graph = onnx.load(whole / "model.onnx").graph
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm", "Conv")]
    assert len(ranges) == len(products)
    shared = [r for r in ranges if r.weight == "model.blocks.0.mlp.fc2.weight.transposed"]
    assert [r.call for r in shared] == list(range(6))  # 3 × (a latent step and an answer)
    assert len({(r.low, r.high) for r in shared}) == 6
    assert all(r.low <= 0 <= r.high for r in shared)


def test_a_quantized_weight_is_stored_once_in_eight_bits(int8, whole):
    graph = onnx.load(int8 / "model.onnx").graph
    matrices = [tensor for tensor in graph.initializer if len(tensor.dims) == 2]
    assert {tensor.data_type for tensor in matrices} == {onnx.TensorProto.INT8}
    originals = [t for t in onnx.load(whole / "model.onnx").graph.initializer if len(t.dims) == 2]
    assert len(matrices) == len(originals)


def test_weights_have_a_scale_for_each_output_channel(int8):
    graph = onnx.load(int8 / "model.onnx").graph
    sizes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    weights = [
        node
        for node in graph.node
        if node.op_type == "DequantizeLinear" and len(sizes.get(node.input[0], [])) == 2
    ]
    assert weights
    for node in weights:
        assert sizes[node.input[1]] in ([sizes[node.input[0]][0]], [sizes[node.input[0]][1]])


@pytest.mark.slow
@pytest.mark.parametrize("recursion_steps", [1, 2])
def test_dynamic_heads_are_right_however_often_they_are_applied(recursion_steps):
    sizes = {"embed_dim": 16, "num_heads": 2, "depth": 1, "latent_steps": 1, "mlp_hidden_dim": 16}
    model = ViTRM(8, 4, 1, 5, recursion_steps=recursion_steps, **sizes).eval()
    graph = whole_graph(model, torch.zeros(2, 1, 8, 8))
    content = to_onnx(graph, exported_program(graph)).SerializeToString()
    quantized = quantize({"model": content}, "int8_dynamic", np.empty(0, np.float32))["model"]
    images = np.random.default_rng(0).standard_normal((8, 1, 8, 8), np.float32)
    wanted, given = (
        InferenceSession(one).run(["logits"], {"images": images})[0] for one in (content, quantized)
    )
    assert given.shape == (8, recursion_steps, 5)
    assert np.abs(wanted - given).max() < 0.1 * np.abs(wanted).max()


def test_static_ranges_need_images(whole):
    graphs = {"model": (whole / "model.onnx").read_bytes()}
    with pytest.raises(ExportError, match="needs images"):
        quantize(graphs, "int8", np.empty((0, 1, 8, 8), np.float32))


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A run on 8 training and 4 validation images, in folders."""
    folder = tmp_path_factory.mktemp("few")
    random = np.random.default_rng(0)
    for split, count in {"train": 4, "validation": 2, "test": 2}.items():
        for label, top in {"dark": 100, "light": 255}.items():
            (folder / "x" / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(top // 2, top, (8, 8), np.uint8)
                Image.fromarray(pixels).save(folder / "x" / split / label / f"{i}.png")
    tiny = {"embed_dim": 16, "num_heads": 2, "mlp_hidden_dim": 16, "depth": 1, "latent_steps": 1}
    train(
        TrainConfig(
            data=DataConfig(str(folder / "x")),
            model=ModelConfig(options=tiny, recursion_steps=2),
            objective=ObjectiveConfig(supervision_steps=2),
            epochs=1,
            references=False,
            run=folder / "run",
            progress="quiet",
        )
    )
    return folder / "run"


@pytest.mark.slow
def test_ranges_and_thresholds_of_few_images_are_told(few, tmp_path, capsys):
    with pytest.warns(SmallfryWarning) as caught:
        export(few, tmp_path / "a", "anytime", "int8")
    told = " ".join(str(warning.message) for warning in caught)
    assert "int8 ranges were measured on only 8 images" in told
    assert "early-exit thresholds were measured on only 4 validation images" in told
    with pytest.warns(SmallfryWarning) as caught:
        export(few, tmp_path / "b", "whole", "int8")
    assert "early exit" not in " ".join(str(warning.message) for warning in caught)
    export(few, tmp_path / "c", "whole", "int8_dynamic")  # a warning is a failure
    export(few, tmp_path / "d", "whole")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["evaluate", str(few), "--exit_drop", "0.1"]) == 0
    assert "measured on only 4 validation images" in capsys.readouterr().err
