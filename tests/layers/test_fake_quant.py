"""Layers with learned steps: gradients against the golden values, and natural gradient."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from smallfry.curvature.coverage import cover
from smallfry.layers.fake_quant import FakeQuantized, fake_quantized, learned_round
from smallfry.layers.quantizers import round_affine
from smallfry.optim import KFAC

GOLDEN = json.loads((Path(__file__).parents[1] / "compress" / "quantizers.json").read_text())
I = torch.arange(64, dtype=torch.float64)  # noqa: E741


def test_learned_steps_are_the_golden_ones():
    x = (0.37 * I + 0.11 * 4 + 0.2).sin() + 0.3 * (1.7 * I).cos()
    x[5] = 4.0
    wanted, cotangent = GOLDEN["lsq_int4"], (0.05 * I).cos()
    x.requires_grad_()
    step = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    rounded = learned_round(x, step, -8, 7, count=64)
    rounded.backward(cotangent)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(rounded.detach(), torch.tensor(wanted["output"]).double(), **close)
    inside = (x / 0.25 > -8) & (x / 0.25 < 7)
    assert torch.equal(x.grad, cotangent * inside)
    assert wanted["gradient_scale"] == pytest.approx((64 * 7) ** -0.5)
    assert float(step.grad) == pytest.approx(wanted["grad_step"], rel=1e-9)
    again = fake_quantized(first_dense(x), 4)
    assert float(again.weight_step) == pytest.approx(wanted["initial_step_2mean_abs"], rel=1e-9)


def first_dense(x):
    layer = nn.Linear(64, 1, bias=False).double()
    layer.weight.data = x.detach()[None]
    return layer


@pytest.mark.parametrize("zero", [0.0, 3.0, 15.0])
def test_the_gradient_of_the_step_is_that_of_the_three_ranges(zero):
    torch.manual_seed(0)
    x, step = torch.randn(50).double() * 3, torch.tensor(0.3).double().requires_grad_()
    low, high = -zero, 15.0 - zero
    learned_round(x, step, torch.tensor(low), torch.tensor(high), 50).sum().backward()
    v = x / 0.3
    by_range = torch.where(v <= low, low, torch.where(v >= high, high, v.round() - v))
    factor = (50 * max(high, 1)) ** -0.5
    assert float(step.grad) == pytest.approx(float(by_range.sum()) * factor)


@pytest.mark.parametrize(
    ("dense", "shape"),
    [
        (nn.Linear(7, 5), (4, 7)),
        (nn.Linear(7, 5, bias=False), (2, 3, 7)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9, 8)),
    ],
)
def test_a_layer_computes_with_rounded_weights_and_inputs(dense, shape):
    torch.manual_seed(0)
    layer, inputs = (
        fake_quantized(copy.deepcopy(dense), 3, input_bits=4, calls=2),
        torch.randn(shape),
    )
    layer.set_inputs(torch.tensor([0.4, 0.1]), torch.tensor([7.0, 3.0]))
    assert [*layer._parameters] == [*dense._parameters, "weight_log_step", "input_log_steps"]
    for step, zero in ((0.4, 7.0), (0.1, 3.0), (0.1, 3.0)):
        plain = copy.deepcopy(dense)
        plain.weight.data = layer.codes() * layer.weight_step.detach()
        rounded = round_affine(inputs, torch.tensor(step), torch.tensor(zero), 4)
        torch.testing.assert_close(layer(inputs), plain(rounded), rtol=1e-5, atol=1e-6)
    assert int(layer.codes().abs().max()) <= 4


def test_a_layer_of_zeros_can_learn():
    layer = nn.Linear(4, 2, bias=False)
    nn.init.zeros_(layer.weight)
    made = fake_quantized(layer, 4)
    made(torch.ones(1, 4)).sum().backward()
    assert bool((made.weight.grad == 1).all())


def test_other_layers_are_refused():
    with pytest.raises(ValueError, match=r"expected nn\.Linear or nn\.Conv2d, got Bilinear"):
        fake_quantized(nn.Bilinear(2, 2, 2), 4)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.again = nn.Conv2d(1, 4, 3), nn.Linear(4, 4)
        self.last = nn.Linear(4, 3)

    def forward(self, images):
        rows = self.first(images).amax((2, 3))
        for _ in range(2):
            rows = self.again(rows).relu()
        return self.last(rows)


def test_natural_gradient_covers_the_layers_with_the_curvature_of_rounded_inputs():
    torch.manual_seed(0)
    model, images = Twice(), torch.randn(16, 1, 5, 5)
    for name in ("first", "again", "last"):
        layer = fake_quantized(model.get_submodule(name), 4, input_bits=4, calls=1)
        layer.set_inputs(torch.tensor([0.25]), torch.tensor([8.0]))
        setattr(model, name, layer)
    coverage = cover(model)
    assert {layer for block in coverage.blocks for layer in block.layers} == {
        "first",
        "again",
        "last",
    }
    assert all(name.endswith("_step") or name.endswith("_steps") for name in coverage.uncovered)
    assert len(coverage.uncovered) == 6
    seen = []
    model.last.register_forward_hook(
        lambda module, arguments, _: seen.append(arguments[0].detach())
    )
    optimizer = KFAC(model.train(), lr=0.05, likelihood="categorical")
    losses = []
    labels = torch.arange(16) % 3
    for _ in range(8):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(isinstance(m, FakeQuantized) for m in (model.first, model.again, model.last))
    steps = float(model.last.input_steps.detach())
    last = seen[0] / 0.25
    torch.testing.assert_close(last, last.round())  # what hooks, and so taps, are given
    assert steps > 0
