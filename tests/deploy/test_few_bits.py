"""Quantised models on ONNX Runtime, in integers, and as torchao's tensors."""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnxruntime import InferenceSession
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from torch import nn

from smallfry import compress
from smallfry.cli import main
from smallfry.compress.quantize.integer import (
    linear,
    multiplier,
    patches,
    rescale,
)
from smallfry.deploy.export import export, trace
from smallfry.deploy.few_bits import few_bits_graph, pack_four_bits
from smallfry.deploy.graphs import exported_program, to_onnx, whole_graph
from smallfry.deploy.quantize import compact
from smallfry.deploy.torchao_tensors import to_torchao
from smallfry.errors import UsageError
from smallfry.layers.quantized import QuantizedWeight
from smallfry.layers.quantizers import affine, encode
from smallfry.training.evaluation import forward
from smallfry.training.evaluation_data import load_like
from smallfry.training.run import load_run
from smallfry_runtime import Runtime

RUN = Path(__file__).parents[1] / "fixtures" / "format_2" / "run"


class Looped(nn.Module):
    """A linear layer that is called several times, behind a convolution."""

    def __init__(self, times=3):
        super().__init__()
        self.conv, self.block, self.head = nn.Conv2d(1, 32, 3), nn.Linear(32, 32), nn.Linear(32, 4)
        self.times = times

    def forward(self, images):
        rows = self.conv(images).relu().mean((2, 3))
        for _ in range(self.times):
            rows = rows + self.block(rows).relu()
        return self.head(rows)


def quantized(model, images, **settings):
    given = {"example": images[:2], "batches": [images]}
    return compress.apply_to_model(model.eval(), [compress.Quantize(**settings)], **given)[0]


def run(content, images):
    return InferenceSession(content).run(None, {"images": images.numpy()})[0]


def graph_of(model, images):
    return whole_graph(model, torch.zeros(2, *images.shape[1:]))


def last_scale(model, images):
    """One step of the last product: what a code more or less of its inputs can change."""
    with torch.no_grad():
        return float((model.head.weight.abs() * model.head.input_scales[-1]).sum(1).max())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the model puts all")
@pytest.mark.parametrize(
    "settings",
    [
        {"weights": 8}, {"weights": 4, "group": 32}, {"weights": 3, "group": 5},
        {"weights": 8, "activations": 8}, {"weights": 4, "group": 32, "activations": 8},
        {"weights": 4, "activations": 5},
    ],
    ids=str,
)  # fmt: skip
def test_onnx_runtime_computes_what_the_simulation_does(settings):
    torch.manual_seed(0)
    images = torch.randn(40, 1, 6, 6)
    small = quantized(Looped(), images, **settings)
    content = few_bits_graph(graph_of(small, images))
    with torch.no_grad():
        wanted = small(images).numpy()
    tolerance = last_scale(small, images) if "activations" in settings else 1e-5
    found = run(content, images)
    assert np.abs(found - wanted).max() <= tolerance
    assert np.abs(found - wanted).mean() <= 0.05 * np.abs(wanted).mean()
    model = onnx.load_from_string(content)
    kinds = {t.data_type for t in model.graph.initializer if len(t.dims) > 1}
    narrow = TensorProto.INT4 if settings["weights"] <= 4 else TensorProto.INT8
    assert kinds - {TensorProto.FLOAT} == {narrow}
    asked = sum(node.op_type == "QuantizeLinear" for node in model.graph.node)
    assert asked == (5 if "activations" in settings else 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the model puts all")
@pytest.mark.parametrize("settings", [{"weights": 4, "group": 32}, {"activations": 8}], ids=str)
def test_bytes_of_weights_do_not_depend_on_the_number_of_calls(settings):
    images, sizes = torch.randn(40, 1, 6, 6), []
    for times in (1, 4):
        torch.manual_seed(0)
        small = quantized(Looped(times), images, **settings)
        model = onnx.load_from_string(few_bits_graph(graph_of(small, images)))
        sizes.append(sum(len(t.raw_data) for t in model.graph.initializer if len(t.dims) > 1))
    assert sizes[0] == sizes[1]


@pytest.mark.slow
def test_onnx_runtimes_blocks_are_stored_once_after_the_deduplication():
    images, sizes = torch.randn(2, 1, 6, 6), []
    for times in (1, 4):
        torch.manual_seed(0)
        model = Looped(times).eval()
        graph = graph_of(model, images)
        float32 = to_onnx(graph, exported_program(graph))
        quantizer = MatMulNBitsQuantizer(float32, bits=4, block_size=32, is_symmetric=True)
        quantizer.process()
        before = quantizer.model.model
        after = compact(onnx.ModelProto.FromString(before.SerializeToString()))
        nodes = [n for n in after.graph.node if n.op_type == "MatMulNBits"]
        both = (before, after)
        if nodes:
            assert len({n.input[1] for n in nodes}) == len({n.input[1] for n in nodes[-2:]})
        sizes.append(
            [sum(len(t.raw_data) for t in m.graph.initializer if len(t.dims) > 1) for m in both]
        )  # fmt: skip
    assert sizes[0][1] == sizes[1][1]


def test_nibbles_are_packed_two_a_byte():
    codes = np.array([[-8, 7, 1], [0, -1, 3], [5, -3, 2]], np.int8)
    tensors = [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(codes * 9, "wide"),
               numpy_helper.from_array(np.ones(3, np.float32), "scale")]  # fmt: skip
    nodes = [onnx.helper.make_node("DequantizeLinear", [n, "scale"], [f"{n}_y"], axis=0)
             for n in ("codes", "wide")]  # fmt: skip
    outputs = [onnx.helper.make_tensor_value_info(f"{n}_y", 1, [3, 3]) for n in ("codes", "wide")]
    graph = onnx.helper.make_graph(nodes, "g", [], outputs, tensors)
    opset = [onnx.helper.make_opsetid("", 23)]
    model = pack_four_bits(onnx.helper.make_model(graph, opset_imports=opset, ir_version=11))
    narrow, wide, _ = model.graph.initializer
    assert (narrow.data_type, wide.data_type) == (TensorProto.INT4, TensorProto.INT8)
    assert len(narrow.raw_data) == 5
    found, other = InferenceSession(model.SerializeToString()).run(None, {})
    assert np.array_equal(found, codes)
    assert np.array_equal(other, codes * np.int8(9))


# Integers


def test_factors_are_integers_within_half_a_unit():
    rng = np.random.default_rng(0)
    factors = np.concatenate([np.exp(rng.normal(0, 6, 500)), [1.0, 0.5, 1 - 2**-40]])
    found = multiplier(factors)
    assert found.mantissa.min() >= 2**30
    assert found.mantissa.max() < 2**31
    np.testing.assert_allclose(found.mantissa * 2.0 ** (-found.shift - 31), factors, rtol=2**-30)


def test_rescaled_sums_are_the_rounded_products():
    rng = np.random.default_rng(0)
    sums = rng.integers(-(2**28), 2**28, 2000)
    factors = np.exp(rng.uniform(-18, -6, 2000))
    found, exact = rescale(sums, multiplier(factors)), sums * factors
    assert np.abs(found - exact).max() <= 0.5 + 2**-9  # rounded twice
    assert rescale(np.array([3, -3, 5]), multiplier(np.array(0.5))).tolist() == [2, -1, 3]
    assert rescale(np.array([3, -3]), multiplier(np.array(4.0))).tolist() == [12, -12]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "dense", [nn.Linear(20, 7), nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False)], ids=str
)
def test_the_simulation_is_within_one_code_of_integers(dense, bits):
    torch.manual_seed(0)
    shape = (50, 20) if isinstance(dense, nn.Linear) else (4, 3, 9, 9)
    x = torch.randn(shape).relu() - 0.3
    layer = QuantizedWeight.from_dense(dense, bits=bits, input_bits=8)
    scale, zero = affine(x.min(), x.max(), 8)
    layer.input_scales.fill_(scale)
    layer.input_zeros.fill_(zero)
    with torch.no_grad():
        y = layer(x)
    out_scale, out_zero = affine(y.min(), y.max(), 8)
    simulated = encode(y, out_scale.float(), out_zero, 0, 255).numpy()
    codes = encode(x, scale.float(), zero, 0, 255).long().numpy()
    weight = layer.codes.flatten(1).long().numpy()
    scales = layer.scales.flatten().double().numpy() * float(layer.input_scales[0])
    bias = None
    if layer.bias is not None:
        bias = np.round(layer.bias.detach().double().numpy() / scales).astype(np.int64)
    if isinstance(dense, nn.Conv2d):
        codes = patches(codes, (3, 3), 2, 1, fill=int(zero))
        simulated = simulated.transpose(0, 2, 3, 1).reshape(len(codes), -1)
    found = linear(codes, int(zero), weight, bias, scales / float(out_scale), int(out_zero))
    assert np.abs(found - simulated).max() <= 1
    assert (found == simulated).mean() > 0.9


def test_a_sum_that_does_not_fit_is_refused():
    ones, most = np.ones(1), (2**31 - 1) // (255 * 127)
    fits = np.full((1, most), 255), 0, np.full((1, most), 127)
    assert linear(*fits, None, 1e-9 * ones, 0).tolist() == [[2]]
    wide = np.full((1, most + 1), 255), 0, np.full((1, most + 1), 127)
    with pytest.raises(OverflowError, match="does not fit 32 bits"):
        linear(*wide, None, ones, 0)


# A whole export


@pytest.fixture
def small_run(tmp_path):
    folder = shutil.copytree(RUN, tmp_path / "run")
    trained = load_run(folder)
    data, *_ = load_like(trained, folder)
    method = compress.Quantize(weights=4, activations=8, group=16)
    compress.apply(trained, [method], data).save(tmp_path / "small")
    return tmp_path / "small"


@pytest.mark.slow
def test_a_quantised_run_is_exported_with_its_own_bits(small_run, tmp_path, capsys):
    words = ["export", str(small_run), "--precision", "own_bits", "--to", str(tmp_path / "export")]
    assert main([*words, "--form", "whole"]) == 0
    small = load_run(small_run)
    pixels = load_like(small, small_run)[1].images
    with torch.no_grad():
        wanted = forward(small.model, small.normalize(pixels))[0].softmax(1).numpy()
    given = Runtime(tmp_path / "export").predict(pixels.numpy()).probabilities
    assert (given.argmax(1) == wanted.argmax(1)).mean() > 0.98
    assert np.abs(given - wanted).mean() < 0.01
    assert Runtime(tmp_path / "export").manifest.precision == "own_bits"
    weights = onnx.load(tmp_path / "export" / "model.onnx").graph.initializer
    assert {t.data_type for t in weights if len(t.dims) > 2 or "codes" in t.name} <= {
        TensorProto.INT4, TensorProto.FLOAT, TensorProto.INT64
    }  # fmt: skip
    assert sum(t.data_type == TensorProto.INT4 for t in weights) >= 6


def recurring(tmp_path, per_call):
    """A quantised run of three recursion steps."""
    folder = shutil.copytree(RUN, tmp_path / "run")
    trained = load_run(folder)
    data, *_ = load_like(trained, folder)
    method = compress.Quantize(weights=8, activations=8, per_call=per_call)
    small = compress.apply(trained, [method], data)
    small.model.recursion_steps = 3
    return small


@pytest.mark.parametrize("precision", ["float32", "int8", "own_bits"])
def test_ranges_of_each_call_refuse_a_graph_of_one_step_in_any_precision(precision, tmp_path):
    small = recurring(tmp_path, per_call=True)
    with pytest.raises(UsageError, match="a graph for each step can't have a range for each call"):
        export(small, tmp_path / "export", "anytime", precision)
    assert not (tmp_path / "export").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("per_call", "form"), [(True, "whole"), (False, "anytime")])
def test_the_form_follows_from_the_ranges(per_call, form, tmp_path):
    assert trace(recurring(tmp_path, per_call)).form == form


def test_a_call_of_a_quantised_model_is_the_last_step_of_its_recursion(tmp_path):
    folder = shutil.copytree(RUN, tmp_path / "run")
    trained = load_run(folder)
    trained.model.recursion_steps = 3
    pixels = trained.normalize(load_like(trained, folder)[0].train.images[:64])
    small = quantized(trained.model, pixels, weights=8, activations=8)
    assert (small.recursion_steps, small.get_classifier().calls) == (3, 1)
    with torch.inference_mode():
        last = small.recurse(pixels)[-1].logits
        torch.testing.assert_close(small(pixels), last, atol=1e-5, rtol=1e-5)


def test_own_bits_need_a_quantised_model(tmp_path):
    with pytest.raises(UsageError, match="own_bits is for quantised models: compress this one"):
        export(RUN, tmp_path / "export", precision="own_bits")
    assert not (tmp_path / "export").exists()


# torchao


@pytest.mark.filterwarnings("ignore:.*KernelPreference")
def test_torchaos_tensors_compute_the_same_and_stay_shared():
    pytest.importorskip("torchao", reason="torchao is not installed")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    model.append(nn.Linear(3, 64)).append(model[0])
    rows = torch.randn(5, 64)
    for settings in ({"weights": 8}, {"weights": 4, "group": 32}):
        small, _ = compress.apply_to_model(model, [compress.Quantize(**settings)])
        other = to_torchao(small)
        assert other[4] is other[0]
        with torch.no_grad():
            torch.testing.assert_close(other(rows), small(rows), rtol=1e-5, atol=1e-5)
        assert type(other[0].weight).__name__ == "IntxUnpackedToInt8Tensor"
        assert isinstance(small[0], QuantizedWeight)  # left as it was


def test_without_torchao_or_layers_for_it_the_reason_is_named(monkeypatch):
    small = nn.Sequential(nn.ReLU())
    if importlib.util.find_spec("torchao") is None:
        with pytest.raises(UsageError, match=r"pip install 'smallfry\[torchao\]'"):
            to_torchao(small)
    else:
        with pytest.raises(UsageError, match="no layer can have torchao's tensors"):
            to_torchao(small)
