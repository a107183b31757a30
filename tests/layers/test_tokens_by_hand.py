"""Layers of tokens and gates, computed by plain loops in float64, and shapes that are unusual."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from smallfry.errors import UsageError
from smallfry.layers.daff import DAFF
from smallfry.layers.fake_quant import fake_quantized, learned_round
from smallfry.layers.head_interaction import HeadInteractionAttention
from smallfry.layers.hyper import Response
from smallfry.layers.prefix_cues import TEMPERATURE, PrefixCues
from smallfry.layers.quantized import QuantizedWeight, number_calls
from smallfry.layers.quantizers import (
    BITS,
    CANDIDATES,
    grouped,
    largest_code,
    least_error_scale,
    spread,
    symmetric_scale,
    usable,
)
from smallfry.layers.sope import SOPE
from smallfry.layers.ulsam import ULSAM, insert_ulsam, join_subspaces, replace_with_ulsam


def scattered(module: nn.Module) -> nn.Module:
    """The module in float64 and evaluation mode, with no parameter or statistic at its start."""
    generator = torch.Generator().manual_seed(0)
    module = module.double().eval()
    with torch.no_grad():
        for value in [*module.parameters(), *module.buffers()]:
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator) + 0.1)
    return module


@pytest.mark.parametrize("aspect", [(1, 1), (2, 3), (4, 6), (3, 1), (1, 5)])
@pytest.mark.parametrize("times", [1, 2])
def test_grids_of_daff_have_the_aspect_of_the_images(aspect, times):
    layer = scattered(DAFF(4, 6, aspect))
    common = np.gcd(*aspect)
    rows, columns = (times * side // common for side in aspect)
    tokens = torch.randn(2, 1 + rows * columns, 4, dtype=torch.float64)
    found = layer(tokens)
    grid = tokens[:, 1:].reshape(2, rows, columns, 4).permute(0, 3, 1, 2)
    hidden = F.gelu(layer.bn1(layer.conv1(grid)))
    mixed = torch.zeros_like(hidden)
    weight, bias = layer.conv2.weight[:, 0], layer.conv2.bias
    for i, j, y, x in product(range(rows), range(columns), range(3), range(3)):
        if 0 <= i + y - 1 < rows and 0 <= j + x - 1 < columns:
            mixed[:, :, i, j] += weight[:, y, x] * hidden[:, :, i + y - 1, j + x - 1]
    mixed = hidden + F.gelu(layer.bn2(mixed + bias[:, None, None]))
    patches = layer.bn3(layer.conv3(mixed)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found[:, 1:], patches)
    gate = layer.excitation(F.gelu(layer.compress(patches.mean(1))))
    torch.testing.assert_close(found[:, 0], tokens[:, 0] * gate)
    with pytest.raises(ValueError, match="expected a class token and a grid of patches"):
        layer(torch.zeros(2, 2 + rows * columns, 4).double())


@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 5])
def test_attention_with_head_tokens_is_that_of_loops(heads, count):
    layer = scattered(HeadInteractionAttention(6, heads))
    tokens = torch.randn(2, count, 6, dtype=torch.float64)
    found, width = layer(tokens), 6 // heads
    for image in range(2):
        mean = tokens[image].mean(0)
        extra = []
        for head in range(heads):
            pieces = layer.ht_proj(mean[head * width : (head + 1) * width]).view(heads, width)
            extra.append(F.gelu(layer.ht_norm(pieces)).flatten() + layer.pos_embed[0, head])
        rows = torch.cat([tokens[image], torch.stack(extra)])
        qkv = layer.qkv(rows)
        out = torch.zeros_like(rows)
        for head in range(heads):
            q, k, v = (qkv[:, 6 * part + head * width :][:, :width] for part in range(3))
            out[:, head * width : (head + 1) * width] = (q @ k.T / width**0.5).softmax(-1) @ v
        out = layer.proj(out)
        torch.testing.assert_close(found[image, 1:], out[1:count])
        torch.testing.assert_close(found[image, 0], out[0] + out[count:].mean(0))
    with pytest.raises(UsageError, match="4 heads don't divide 6 features"):
        HeadInteractionAttention(6, 4)


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (8, 3)])
@pytest.mark.parametrize("patch_size", [2, 4, 16])
def test_overlapping_patches_of_any_image_have_half_the_side_rounded_up_each_time(size, patch_size):
    layer = scattered(SOPE(3, 8, patch_size))
    rows, columns = (-(-side // patch_size) for side in size)
    assert layer(torch.randn(2, 3, *size, dtype=torch.float64)).shape == (2, 8, rows, columns)


def test_cues_are_made_of_the_guess_and_of_the_teachers_assignment_for_half_of_the_images():
    layer = scattered(PrefixCues(width=4, anchors=3, tokens=2))
    tokens = torch.randn(400, 5, 4, dtype=torch.float64)
    logits = layer.guess(tokens.mean(1)) / TEMPERATURE
    found = layer(tokens)
    assert torch.equal(found[:, :5], tokens)
    guessed = (logits.softmax(-1) @ layer.project.weight.T).view(-1, 2, 4)
    torch.testing.assert_close(found[:, 5:], guessed)
    teacher = torch.rand(400, 3).double().softmax(-1)
    with layer.given(teacher):
        with pytest.raises(RuntimeError, match="guess_loss comes after a call"):
            layer.guess_loss()
        cues = layer(tokens)[:, 5:]
        loss = layer.guess_loss()
    taught = (teacher @ layer.project.weight.T).view(-1, 2, 4)
    is_taught = (cues - taught).abs().amax((1, 2)) < 1e-12
    is_guessed = (cues - guessed).abs().amax((1, 2)) < 1e-12
    assert (is_taught ^ is_guessed).all()
    assert 140 < int(is_taught.sum()) < 260
    torch.testing.assert_close(loss, -(teacher * logits.log_softmax(-1)).sum(1).mean())
    torch.testing.assert_close(layer(tokens)[:, 5:], guessed)
    with pytest.raises(RuntimeError, match="guess_loss comes after a call"):
        layer.guess_loss()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "layer", [nn.Linear(4, 3), nn.Linear(4, 3, bias=False), nn.Conv2d(4, 3, 3, padding=1, stride=2)]
)
def test_responses_are_folded_weights_example_by_example(layer, rows):
    layer = layer.double()
    response = scattered(Response(layer, 2))
    hypers = torch.randn(5, 2, dtype=torch.float64)
    shape = (5 * rows, 4, 6, 5) if isinstance(layer, nn.Conv2d) else (5 * rows, 2, 4)
    inputs = torch.randn(shape, dtype=torch.float64)
    found = response(layer, inputs, layer(inputs), hypers)
    norms = response.squares(layer, hypers)
    for example in range(5):
        weight, bias = response.dense(layer, hypers[example])
        part = slice(example * rows, (example + 1) * rows)
        if isinstance(layer, nn.Conv2d):
            wanted = F.conv2d(inputs[part], weight, bias, 2, 1)
        else:
            wanted = F.linear(inputs[part], weight, bias)
        torch.testing.assert_close(found[part], wanted)
        torch.testing.assert_close(norms[example], weight.square().sum())


@pytest.mark.parametrize("group", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_scales_of_groups_belong_to_consecutive_inputs(group, bits):
    weight = torch.randn(4, 7, 1, 1, dtype=torch.float64)
    rows = grouped(weight.flatten(1), group)
    scales = symmetric_scale(rows, bits).squeeze(-1)
    wide = spread(scales, weight.shape, group)
    for o, i in product(range(4), range(7)):
        size = 7 if group is None else group
        start = i // size * size
        top = float(weight[o, start : start + size].abs().max()) / largest_code(bits)
        assert float(wide.expand_as(weight)[o, i]) == pytest.approx(top)


@pytest.mark.parametrize("bits", BITS)
def test_the_scale_of_least_error_is_the_best_of_all_candidates(bits):
    values = torch.randn(3, 40, generator=torch.Generator().manual_seed(bits))
    values[1] = 0
    found = least_error_scale(values, bits)
    top = largest_code(bits)
    for row, scale in zip(values.double(), found, strict=True):
        full = float(row.abs().max()) / top or 1.0
        errors = []
        for k in range(1, CANDIDATES + 1):
            step = full * k / CANDIDATES
            codes = (row / step).round().clamp(-top, top)
            errors.append(float((codes * step - row).square().sum()))
        best = errors.index(min(errors)) + 1
        assert float(scale) == pytest.approx(full * best / CANDIDATES)
    assert usable(torch.tensor([0.0, 1e-45, 2.0])).tolist() == [1.0, 1.0, 2.0]
    assert usable(torch.tensor([float("nan")])).tolist() == [1.0]


@pytest.mark.parametrize("module", [nn.Linear(3, 4), nn.Conv2d(3, 4, 1)])
@pytest.mark.parametrize("batch", [0, 1, 4])
def test_learned_steps_take_batches_of_any_size(module, batch):
    layer = fake_quantized(module, bits=4, input_bits=8)
    layer.set_inputs(torch.tensor([0.05]), torch.tensor([100.0]))
    shape = (batch, 3) if isinstance(module, nn.Linear) else (batch, 3, 2, 2)
    inputs = torch.randn(shape)
    found = layer(inputs)
    rounded = ((inputs / 0.05).round().clamp(-100, 155) * 0.05).detach()
    weight = layer.codes() * layer.weight_step
    wanted = F.linear(rounded, weight, module.bias) if rounded.ndim == 2 else F.conv2d(
        rounded, weight, module.bias
    )  # fmt: skip
    torch.testing.assert_close(found, wanted)
    found.sum().backward()
    assert torch.isfinite(layer.input_log_steps.grad).all()


def test_gradients_of_learned_steps_are_those_of_the_three_ranges_at_the_ends():
    values = torch.tensor([-9.0, -2.0, -1.9, 0.0, 0.2, 0.96, 1.0, 9.0], requires_grad=True)
    step = torch.tensor(1.0, requires_grad=True)
    learned_round(values, step, -2, 1, count=4).sum().backward()
    assert values.grad.tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    parts = [-2, -2, -2 + 1.9, 0, -0.2, 1 - 0.96, 1, 1]
    assert float(step.grad) == pytest.approx(sum(parts) / 2, abs=1e-6)


def test_calls_beyond_those_of_a_pass_begin_anew_with_the_next_pass():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = QuantizedWeight.from_dense(nn.Linear(2, 2), bits=8, input_bits=8, calls=2)

        def forward(self, x, times=2):
            for _ in range(times):
                x = self.fc(x)
            return x

    model = Twice()
    with torch.no_grad():
        model.fc.input_scales.copy_(torch.tensor([0.5, 0.01]))
    first = model(torch.full((1, 2), 0.77))
    assert not torch.equal(model(torch.full((1, 2), 0.77)), first)  # the count went on
    assert len(number_calls(model)) == 1
    assert torch.equal(model(torch.full((1, 2), 0.77)), first)
    assert torch.equal(model(torch.full((1, 2), 0.77), times=5)[:, :0], first[:, :0])
    assert torch.equal(model(torch.full((1, 2), 0.77)), first)
    assert number_calls(nn.Linear(2, 2)) == []
    with pytest.raises(ValueError, match="the model has no layer 'stem'"):
        number_calls(model, "stem")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "needs bits from 2 to 8"),
        ({"bits": 4.0}, "needs bits from 2 to 8"),
        ({"bits": True}, "needs bits from 2 to 8"),
        ({"bits": 9}, "needs bits from 2 to 8"),
        ({"bits": 4, "colour": 1}, "needs bits from 2 to 8"),
        ({"bits": 4, "group": 0}, "group is 1 to"),
        ({"bits": 4, "group": 2.0}, "group is 1 to"),
        ({"bits": 4, "input_bits": 1}, "input_bits is 2 to 8"),
        ({"bits": 4, "calls": 10_001}, "calls is 1 to 10000"),
        ({"bits": 4, "bias": 1}, "bias is true or false"),
    ],
)
def test_settings_of_quantized_weights_are_whole_numbers_in_range(settings, message):
    with pytest.raises(ValueError, match=message):
        QuantizedWeight.from_dense(nn.Linear(2, 2), **settings)


def test_attention_of_positions_is_that_of_loops_group_by_group():
    layer = scattered(ULSAM(6, groups=3))
    x = torch.randn(2, 6, 4, 3, dtype=torch.float64)
    found = layer(x)
    for image, group in product(range(2), range(3)):
        two = slice(2 * group, 2 * group + 2)
        scale = layer.bn_dws.weight / (layer.bn_dws.running_var + layer.bn_dws.eps).sqrt()
        seen = x[image] * layer.conv_dws.weight.flatten()[:, None, None]
        seen = seen + layer.conv_dws.bias[:, None, None] - layer.bn_dws.running_mean[:, None, None]
        seen = F.relu(seen * scale[:, None, None] + layer.bn_dws.bias[:, None, None])[two]
        padded = F.pad(seen, (1, 1, 1, 1), value=-torch.inf)
        pooled = torch.stack([padded[:, i : i + 4, j : j + 3] for i in range(3) for j in range(3)])
        score = (pooled.amax(0) * layer.conv_point.weight[group]).sum(0)
        score = score + layer.conv_point.bias[group] - layer.bn_point.running_mean[group]
        root = (layer.bn_point.running_var[group] + layer.bn_point.eps).sqrt()
        score = F.relu(score / root * layer.bn_point.weight[group] + layer.bn_point.bias[group])
        weights = score.flatten().softmax(0).view(4, 3)
        torch.testing.assert_close(found[image, two], x[image, two] * (1 + weights))


def test_subspaces_of_other_files_are_joined_in_the_order_of_their_numbers():
    state = {f"a.subspaces.{n}.bn.weight": torch.tensor([float(n)]) for n in (10, 2, 0)}
    state |= {"a.subspaces.0.bn.count": torch.tensor(7), "b.weight": torch.ones(2)}
    found = join_subspaces(state)
    assert {*found} == {"a.bn.weight", "a.bn.count", "b.weight"}
    assert found["a.bn.weight"].tolist() == [0, 2, 10]
    assert int(found["a.bn.count"]) == 7


def test_attention_of_positions_goes_only_where_there_are_maps_of_its_shape():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 2))
    example = torch.zeros(1, 3, 7, 7)
    for names, message in (
        (["9"], "no module '9' in the network"),
        ([""], "no module '' in the network"),
        (["3"], "3 gives no map"),
    ):
        with pytest.raises(UsageError, match=message):
            insert_ulsam(model, names, example=example)
    with pytest.raises(UsageError, match=r"0 maps .* ULSAM replaces modules that keep the shape"):
        replace_with_ulsam(model, ["1", "0"], example=example)
    assert isinstance(model[1], nn.ReLU)  # all or nothing
    with pytest.raises(UsageError, match="the network has no default_cfg"):
        insert_ulsam(model, ["0"])
    with pytest.raises(UsageError, match="3 groups don't divide 8 channels"):
        insert_ulsam(model, ["0"], groups=3, example=example)
    replace_with_ulsam(model.eval(), ["1"], example=example)
    assert isinstance(model[1], ULSAM)
    assert not model[1].training
    assert model(example).shape == (1, 2)
