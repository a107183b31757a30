"""Post-training quantisation: calls, rounding, rescaling, and the method as a whole."""

import copy
import json

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from smallfry import compress
from smallfry.compress.quantize import ptq
from smallfry.compress.quantize.calls import count_calls, histograms, visit
from smallfry.compress.quantize.equalize import equalize, pairs, smooth
from smallfry.compress.quantize.moments import Moments, input_means, moments
from smallfry.compress.quantize.rounding import adaptive_rounding
from smallfry.curvature.layers import canonical_inputs
from smallfry.errors import SmallfryWarning, UsageError
from smallfry.layers.quantized import CallReset, QuantizedWeight
from smallfry.layers.quantizers import round_affine, symmetric_scale
from smallfry.models import LoopNet
from smallfry.transforms import ModelSpec, build
from smallfry.transforms.bits import Bits

SPEC = ModelSpec(
    "vitrm_micro_patch4_8",
    {"num_classes": 10, "embed_dim": 32, "num_heads": 2, "recursion_steps": 2},
)
QKV = "blocks.0.attn.qkv"
ONE_CLASS = pytest.mark.filterwarnings("ignore:the model puts all")


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.rand(40, 1, 8, 8)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build(SPEC)


def apply(model, images, spec=SPEC, reports=None, **settings):
    given = {"example": images[:2], "batches": [images[:20], images[20:]], "reports": reports}
    return compress.apply_to_model(model, [compress.Quantize(**settings)], spec=spec, **given)


# Calls


def test_calls_are_numbered_within_a_pass_and_the_first_layer_begins_it(model, images):
    seen = []
    visit(model, [QKV], [images[:3], images[3:5]], lambda *each: seen.append(each[:2]))
    assert seen == [(QKV, call) for _ in range(2) for call in range(11)]
    passes = count_calls(model, [QKV, "head"], images[:2])
    assert passes.calls == {QKV: 11, "head": 2}
    assert passes.first == "patch_embed"
    assert not model.get_submodule(QKV)._forward_hooks


def test_a_histogram_for_each_call_adds_up_to_that_of_the_layer(model, images):
    batches = [images[:20], images[20:]]
    by_call = histograms(model, [QKV], batches)[QKV]
    (whole,) = histograms(model, [QKV], batches, per_call=False)[QKV]
    assert len(by_call) == 11
    assert float(whole.counts.sum()) == sum(float(each.counts.sum()) for each in by_call)
    assert whole.low == min(each.low for each in by_call)
    assert whole.high == max(each.high for each in by_call)


def test_inputs_that_are_not_finite_are_named(model, images):
    with pytest.raises(UsageError, match="'patch_embed' is not finite"):
        histograms(model, ["patch_embed"], [images / 0])


def test_moments_are_means_over_rows_of_all_calls(model, images):
    other = copy.deepcopy(model)
    other.patch_embed.weight.data.mul_(1.5)
    rows = {0: [], 1: []}
    for which, each in enumerate((model, other)):
        visit(
            each, [QKV], [images], lambda *c, w=which: rows[w].append(c[2].flatten(0, 1).double())
        )
    # the state of a recursion begins the same for all images, and is there once
    assert {len(part) % 40 for part in rows[0]} >= {0}
    x, y = (torch.cat(rows[which]) for which in (0, 1))
    found = moments(model, other, [QKV], [images[:24], images[24:]])
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(input_means(model, [QKV], [images])[QKV][0], x.mean(0), **close)
    torch.testing.assert_close(found.square[0], x.T @ x / len(x), **close)
    torch.testing.assert_close(found.cross[0], x.T @ y / len(x), **close)
    torch.testing.assert_close(found.rounded_square[0], y.T @ y / len(x), **close)


# Rounding


def correlated(rows, inputs):
    torch.manual_seed(0)
    x = (torch.randn(rows, inputs) @ torch.randn(inputs, inputs) / inputs**0.5).relu().double()
    return x, x + 0.05 * torch.randn(rows, inputs)


@pytest.mark.parametrize("bits", [2, 4])
def test_adaptive_rounding_lowers_the_error_of_the_calibration_rows(bits):
    x, y = correlated(400, 24)
    weight = torch.randn(1, 10, 24).double()
    seen = Moments(*((a.T @ b / len(x))[None] for a, b in ((x, x), (x, y), (y, y))))
    scale = symmetric_scale(weight, bits)
    found = adaptive_rounding(weight, scale, bits, seen, iterations=400)
    most = 2 ** (bits - 1) - 1
    assert torch.equal(found.codes, found.codes.round())
    assert float(found.codes.abs().max()) <= most
    assert bool(((found.codes - weight / scale).abs() < 1 + 1e-9).all())  # up or down

    def error(codes):
        return (x @ weight[0].T - y @ (codes * scale)[0].T).square().mean(0)

    nearest = (weight / scale).round().clamp(-most, most)
    torch.testing.assert_close(found.error[0], error(found.codes), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.nearest[0], error(nearest), rtol=1e-6, atol=1e-9)
    assert bool((found.error <= found.nearest).all())
    assert float(found.error.mean()) < 0.75 * float(found.nearest.mean())


def test_outputs_keep_nearest_rounding_where_it_is_better():
    weight = torch.full((1, 2, 3), 0.4).double()
    same = torch.eye(3).double()[None]  # independent inputs: nearest is the best there is
    seen = Moments(same, same, same)
    found = adaptive_rounding(weight, torch.ones(1, 2, 1), 4, seen, iterations=3, rate=100.0)
    assert torch.equal(found.codes, torch.zeros_like(weight))
    assert torch.equal(found.error, found.nearest)


# Rescaling


def homogeneous():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 5, 1, bias=False)),
        *(nn.PReLU(5), nn.Conv2d(5, 4, 3), nn.GELU(), nn.Conv2d(4, 2, 1)),
    )
    for number, layer in enumerate((model[0], model[3], model[5])):
        factors = torch.logspace(-1, 1, len(layer.weight)).roll(number)
        layer.weight.data.mul_(factors.view(-1, 1, 1, 1))
    return model.double()


def test_equalisation_is_exact_and_makes_both_maxima_equal():
    model, inputs = homogeneous(), torch.randn(2, 3, 12, 12).double()
    expected = model(inputs)
    found = equalize(model, sweeps=60)
    assert [each[:2] for each in found] == [("0", "3"), ("3", "5")]  # not through the GELU
    torch.testing.assert_close(model(inputs), expected, rtol=1e-10, atol=1e-10)
    for first, second, _ in found:
        rows = model.get_submodule(first).weight.flatten(1).abs().amax(1)
        columns = model.get_submodule(second).weight.transpose(0, 1).flatten(1).abs().amax(1)
        torch.testing.assert_close(rows, columns, rtol=0.05, atol=0)


class Listed(nn.Module):
    """Layers in an nn.Sequential, called as a whole or one by one."""

    def __init__(self, whole):
        super().__init__()
        self.layers, self.whole = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)), whole

    def forward(self, x):
        if self.whole:
            return self.layers(x)
        first = self.layers[0](x)
        return self.layers[2](self.layers[1](first)) + first


def test_layers_that_are_called_one_by_one_are_no_pair():
    x = torch.randn(4, 3).double()
    for whole in (True, False):
        torch.manual_seed(0)
        model = Listed(whole).double().eval()
        expected = model(x)
        assert pairs(model) == []  # no example to see it by
        found = equalize(model, example=x)
        assert [each[:2] for each in found] == [("layers.0", "layers.2")] * whole
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def test_channels_of_zeros_stay_as_they_are():
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2)).double()
    model[0].weight.data[0] = 0
    equalize(model)
    assert bool(model[2].weight.isfinite().all())
    assert float(model[0].weight[0].abs().max()) == 0


@pytest.mark.parametrize(
    ("name", "shape", "count"),
    [
        ("vitrm_micro_patch4_8", (2, 1, 8, 8), 6),
        ("vit_tiny_patch16_224", (1, 3, 224, 224), 12),
        ("loopnet_70k", (2, 3, 32, 32), 0),
    ],
)
def test_pairs_and_norms_of_known_blocks_are_rescaled_exactly(name, shape, count):
    torch.manual_seed(0)
    model = timm.create_model(name).eval().double()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    inputs = torch.randn(*shape).double()
    first = {n: w.clone() for n, w in model.state_dict().items()}
    with torch.no_grad():
        expected = model(inputs)
        assert len(pairs(model)) == count
        equalize(model)
        smoothed = smooth(model, [inputs])
        torch.testing.assert_close(model(inputs), expected, rtol=1e-9, atol=1e-10)
    assert bool(smoothed) == ("vit" in name)
    changed = [n for n, w in model.state_dict().items() if not torch.equal(w, first[n])]
    assert bool(changed) == ("vit" in name)


def test_smoothing_evens_out_inputs_and_weights(model, images):
    model.blocks[0].norm1.weight.data[3] = 20.0
    smooth(model, [images], alpha=0.5)
    seen = []
    visit(model, [QKV], [images], lambda *each: seen.append(each[2].abs().flatten(0, 1).amax(0)))
    largest = torch.stack(seen).amax(0)
    columns = model.get_submodule(QKV).weight.abs().amax(0)
    torch.testing.assert_close(largest, columns, rtol=1e-3, atol=1e-4)  # for alpha = 1/2


def test_a_weight_with_another_use_is_not_rescaled():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[4].weight = model[0].weight
    assert pairs(model) == []


# The method


def test_codes_and_ranges_are_what_the_model_computes_with(model, images):
    small, spec = apply(model, images, weights=5, activations=6, weight_range="minmax")
    layer, reference = small.get_submodule(QKV), copy.deepcopy(model)
    seen = histograms(model, [QKV], [images])[QKV]
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            quantized = small.get_submodule(name)
            reference.get_submodule(name).weight.data.copy_(quantized.weight)
            assert quantized.codes.abs().max() == 15
    for call, each in enumerate(seen):
        assert float(layer.input_scales[call]) * 63 == pytest.approx(each.high - each.low, rel=1e-5)
    calls = dict.fromkeys(dict(model.named_modules()), 0)

    def rounded(name):
        def hook(_, arguments):
            layer = small.get_submodule(name)
            call = min(calls[name], layer.calls - 1)
            calls[name] += 1
            scale, zero = layer.input_scales[call], layer.input_zeros[call].float()
            return (round_affine(arguments[0], scale, zero, 6),)

        return hook

    for name, part in reference.named_modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            part.register_forward_pre_hook(rounded(name))
    with torch.no_grad():
        for run in (lambda m: m(images), lambda m: m.recurse(images)[-1].logits):
            calls |= dict.fromkeys(calls, 0)
            wanted = run(reference)
            for _ in range(2):  # a second pass begins with the first call again
                assert torch.allclose(run(small), wanted, atol=1e-5)
        assert torch.allclose(small(images), small.recurse(images)[-1].logits, atol=1e-5)
        assert torch.equal(copy.deepcopy(small)(images), small(images))
        assert torch.equal(build(spec, small.state_dict())(images), small(images))
    plain = json.loads(json.dumps(spec.to_dict()))
    assert ModelSpec.from_dict(plain) == ModelSpec.from_dict(spec.to_dict())
    assert spec.transforms[0].first == "patch_embed"


def test_ranges_by_call_beat_one_range_per_layer(model, images):
    def error(**settings):
        small, _ = apply(model, images, weights=8, activations=4, **settings)
        with torch.no_grad():
            return float((small(images) - model(images)).norm())

    assert error() < error(per_call=False)
    one, _ = apply(model, images, activations=4, per_call=False)
    assert len(one.get_submodule(QKV).input_scales) == 1


class Looped(nn.Module):
    """A block that is registered once and called three times, and two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.block = nn.Linear(6, 6)
        self.again = self.block
        self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.other.weight = self.one.weight

    def forward(self, rows):
        for part in (self.block, self.block, self.again, self.one, self.other):
            rows = part(rows).tanh()
        return rows


@ONE_CLASS
def test_shared_layers_and_weights_are_quantised_once():
    torch.manual_seed(0)
    model, rows = Looped(), torch.randn(40, 6)
    settings = compress.Quantize(weights=4, activations=8, rounding="adaround", iterations=20)
    small, spec = compress.apply_to_model(model, [settings], example=rows[:2], batches=[rows])
    assert small.again is small.block
    assert small.block.calls == 3
    assert small.other.codes is small.one.codes
    assert small.other.input_scales is not small.one.input_scales
    assert sum(c.numel() for n, c in small.named_parameters() if n.endswith("codes")) == 72
    again = Looped()
    spec.transforms[0].apply(again)
    again.load_state_dict(small.state_dict())
    assert spec.transforms[0].first is None  # the call of the model begins a pass
    for _ in range(2):
        assert torch.equal(again(rows), small(rows))
    assert float((small(rows) - model(rows)).norm() / model(rows).norm()) < 0.1


@ONE_CLASS
def test_a_corrected_bias_leaves_no_mean_error(images):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=2), nn.Flatten(),
        nn.Linear(96, 5),
    )  # fmt: skip
    spec = ModelSpec("unknown")
    small, spec = apply(model, images, spec, weights=2, bias_correction=True)
    x = images
    for number in (0, 2, 4):
        difference = small[number](x) - model[number](x)
        dims = (0, 2, 3) if difference.ndim == 4 else (0,)
        torch.testing.assert_close(
            difference.mean(dims), torch.zeros(difference.shape[1]), atol=1e-6, rtol=0
        )
        x = model[number + 1](model[number](x)) if number < 4 else x
    assert small[0].bias is not None
    assert spec.transforms[0].layers["0"]["bias"] is True


@pytest.mark.slow
@pytest.mark.parametrize("activations", [None, 8])
def test_adaptive_rounding_of_a_model_lowers_the_error_of_its_outputs(model, images, activations):
    def error(**settings):
        small, _ = apply(model, images, weights=3, group=16, activations=activations, **settings)
        with torch.no_grad():
            return float((small(images) - model(images)).norm())

    assert error(rounding="adaround", iterations=150) < 0.8 * error()


@ONE_CLASS
def test_adaptive_rounding_sees_the_inputs_that_earlier_layers_round(model, images, monkeypatch):
    seen = []

    def observed(reference, rounded, layers, batches):
        batches = list(batches)
        found = moments(reference, rounded, layers, batches)
        once, again, exact = (net(batches[0]) for net in (rounded, rounded, reference))
        assert torch.equal(once, again)  # so calls are numbered anew
        seen.append(float((once - exact).norm() / exact.norm()))
        return found

    monkeypatch.setattr(ptq, "moments", observed)
    apply(model, images, activations=8, rounding="adaround", iterations=1)
    assert len(seen) > 4
    assert max(seen) < 0.05
    assert seen[-1] > 1e-4


@ONE_CLASS
def test_a_weight_of_several_layers_is_rounded_for_the_inputs_of_all():
    torch.manual_seed(0)
    rows = torch.randn(256, 12) @ torch.randn(12, 12)  # correlated, so that rounding matters
    net = nn.Sequential(
        nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 5)
    )
    net[2].weight = net[0].weight

    def error(**settings):
        small, _ = apply(net, rows, ModelSpec("unknown"), weights=3, **settings)
        assert torch.equal(small[0].weight, small[2].weight)
        with torch.no_grad():
            return float((small(rows) - net(rows)).norm())

    found = moments(net, net, ["0", "2"], [rows])
    hidden = net[1](net[0](rows)).detach().double()
    both = torch.cat([rows.double(), hidden])
    torch.testing.assert_close(found.square[0], both.T @ both / 512, rtol=1e-4, atol=1e-4)
    assert error(rounding="adaround", iterations=200) < 0.9 * error()


def test_rows_of_groups_match_the_order_of_convolution_weights():
    layer = nn.Conv2d(4, 6, 3, groups=2)
    small = QuantizedWeight.from_dense(layer, bits=4, group=5)
    assert small.scales.shape == (6, 4)
    steps = small.scales.repeat_interleave(5, 1)[:, :18].view_as(layer.weight)
    assert bool(((small.weight - layer.weight).abs() <= 0.5001 * steps).all())
    inputs = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(small(inputs), small.dense()(inputs))
    assert canonical_inputs(layer, inputs, layer(inputs), 1).shape == (2, 1, 9, 18)


def test_the_report_has_a_line_for_each_layer(model, images):
    reports = []
    apply(model, images, reports=reports, weights=4, activations=8, exclude=("head",))
    (report,) = reports
    lines = {each["name"]: each for each in report["layers"]}
    dense = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert lines.keys() == dense - {"head"}
    assert (lines[QKV]["bits"], lines[QKV]["calls"]) == (4, 11)
    assert 0.01 < lines[QKV]["weight_error"] < 0.2
    with torch.no_grad():
        classes = len(model(images).argmax(1).unique())
    assert report["calibration"] == {"images": 40, "predicted_classes": classes}
    json.dumps(report)


def test_without_images_only_weights_can_be_rounded(model):
    for settings in (
        {"activations": 8}, {"rounding": "adaround"}, {"budget": 4.0}, {"bias_correction": True},
        {"smooth": 0.5},
    ):  # fmt: skip
        with pytest.raises(UsageError, match="give data"):
            compress.apply_to_model(model, [compress.Quantize(**settings)])
    small, _ = compress.apply_to_model(model, [compress.Quantize(weights=3, equalize=True)])
    assert small.head.bits == 3


def test_few_images_and_those_of_one_class_are_warned_of(model, images):
    given = {"spec": SPEC, "example": images[:2]}
    with pytest.warns(SmallfryWarning, match="only 5 images"):
        compress.apply_to_model(
            model, [compress.Quantize(activations=8)], batches=[images[:5]], **given
        )
    model.head.bias.data[3] = 1e3
    with pytest.warns(SmallfryWarning, match="all 40 calibration images in one class"):
        compress.apply_to_model(
            model, [compress.Quantize(activations=8)], batches=[images], **given
        )


def test_layers_that_can_not_be_quantised_are_named_and_counted():
    model = nn.Sequential(
        nn.Embedding(5, 4), nn.MultiheadAttention(4, 2), nn.Conv1d(2, 2, 1), nn.Linear(4, 4),
        nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"), nn.LayerNorm(4),
    )  # fmt: skip
    reports = []
    with pytest.warns(SmallfryWarning, match=r"5 layers with 97 weights stay .*0 \(Embedding\)"):
        _, spec = compress.apply_to_model(
            model, [compress.Quantize()], reports=reports
        )  # fmt: skip
    left = reports[0]["lists"]["layers left in floating point"]
    assert left == [each["name"] for each in reports[0]["left_in_float"]]
    assert left == [
        "0",
        "1",
        "1.out_proj",
        "2",
        "4",
    ]
    assert list(spec.transforms[0].layers) == ["3"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": 1}, "weights must be 2 to 8"),
        ({"weights": 4.0}, "weights must be a whole number"),
        ({"activations": 16}, "activations must be 2 to 8"),
        ({"group": 0}, "group must be at least 1"),
        ({"weight_range": "kl"}, "weight_range is one of minmax, mse"),
        ({"activation_range": "max"}, "activation_range must be one of"),
        ({"rounding": "up"}, "rounding is one of nearest, adaround"),
        ({"sensitivity": "hesian"}, "sensitivity must be one of"),
        ({"percentile": 50.0}, "above 50"),
        ({"smooth": 1.0}, "between 0 and 1"),
        ({"budget": 0}, "budget must be positive"),
        ({"choices": ()}, "choices is empty"),
        ({"choices": (2, 9)}, "choices must be 2 to 8"),
        ({"iterations": 0}, "iterations must be at least 1"),
    ],
)
def test_settings_that_can_not_be_meant_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        compress.Quantize(**settings)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"bits": 4, "group": 0}, "group is 1 to"),
        ({"bits": 4, "input_bits": 9}, "input_bits is 2 to 8"),
        ({"bits": 4, "calls": 10**9}, "calls is 1 to"),
        ({"bits": 4, "bias": 1}, "bias is true or false"),
        ({"bits": True}, "needs bits from 2 to 8"),
        ({"bits": 4, "scale": 1}, "needs bits from 2 to 8"),
    ],
)
def test_what_a_file_says_of_bits_is_judged(layer, message):
    with pytest.raises(ValueError, match=message):
        Bits({"0": layer}).apply(nn.Sequential(nn.Linear(2, 2)))


def test_a_transform_of_bits_names_layers():
    for fields in (
        {"layers": {}},
        {"layers": {"0": 4}},
        {"layers": {"0": {"bits": 4}}, "first": 3},
    ):
        with pytest.raises(ValueError, match=r"layer"):
            Bits(**fields)
    looped = Looped()
    ranges = {"bits": 4, "input_bits": 8, "calls": 3}
    with pytest.raises(ValueError, match="no layer 'stem'"):
        Bits({"block": ranges}, first="stem").apply(looped)
    kept = Bits({"block": {"bits": 4}, "one": {"bits": 4}}).without_classifier("one", 3)
    assert list(kept.layers) == ["block"]
    assert kept.without_classifier("block", 3) is None


def test_calls_beyond_the_known_ones_use_the_last_range():
    layer = QuantizedWeight.from_dense(nn.Linear(2, 2), bits=8, input_bits=8, calls=2)
    layer.input_scales.copy_(torch.tensor([1.0, 0.5]))
    given = torch.tensor([[0.6, 0.2]])
    found = [layer.round_inputs(given).tolist() for _ in range(3)]
    assert found == [[[1.0, 0.0]], [[0.5, 0.0]], [[0.5, 0.0]]]
    CallReset([layer])(layer, ())
    assert layer.round_inputs(given).tolist() == [[1.0, 0.0]]


def test_a_convolutional_network_is_quantised_as_it_is_trained():
    torch.manual_seed(0)
    model = LoopNet(widths=(8, 16), depths=(1, 1), loops=(2, 2), residual=True).eval()
    images = torch.randn(40, 3, 32, 32)
    given = {"example": images[:2], "batches": [images]}
    small, _ = compress.apply_to_model(model, [compress.Quantize(activations=8)], **given)
    assert small.stages[0].layers[0].conv.calls == 2
    with torch.no_grad():
        assert F.cosine_similarity(small(images), model(images)).min() > 0.99


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ([nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Linear(8, 4)], (2, 3, 8, 8)),
        ([nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Linear(6, 4)], (2, 3, 8, 6)),
        ([nn.Linear(6, 8), nn.ReLU(), nn.MaxPool2d(2), nn.Linear(4, 5)], (2, 4, 6, 6)),
        ([nn.Linear(6, 3), nn.ReLU(), nn.Conv2d(3, 8, 3)], (2, 3, 8, 6)),
    ],
)
def test_layers_of_other_channels_are_no_pairs(layers, shape):
    torch.manual_seed(0)
    model, images = nn.Sequential(*layers).double().eval(), torch.randn(shape).double()
    before = model(images)
    assert equalize(model, example=images) == []
    assert torch.equal(model(images), before)
