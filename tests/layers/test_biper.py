"""BiPer: golden values of the authors' layer, packed weights, and the method in training."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from smallfry import compress, cost
from smallfry.compress.quantize.binarize import BINARY
from smallfry.errors import UsageError
from smallfry.kernels.xnor import (
    binary_conv2d,
    pack_signs,
)
from smallfry.layers.biper import (
    BinaryConv2d,
    BinaryLinear,
    BinaryWeight,
    binary_layer,
    pack_bits,
    signs,
    unpack_bits,
)
from smallfry.transforms import ModelSpec, build

GOLDEN = json.loads((Path(__file__).parent / "biper_conv.json").read_text())
SPEC = ModelSpec("resnet20_biper", {"widths": [8, 16], "depth": 1, "in_chans": 1})


def sines(shape, k):
    i = torch.arange(int(np.prod(shape)), dtype=torch.float64)
    return (0.37 * i + 0.11 * k + 0.2).sin().view(shape)


@pytest.mark.parametrize("case", GOLDEN)
def test_outputs_and_gradients_are_the_golden_ones(case):
    layer = BinaryConv2d(3, 4, 3, padding=1, frequency=20.0).double()
    with torch.no_grad():
        layer.weight.copy_(0.3 * sines((4, 3, 3, 3), 1))
        layer.alpha.copy_(1 + 0.5 * sines((4,), 2))
    layer.stage = int(case[5])
    layer.train(case.endswith("train"))
    inputs = (1.5 * sines((2, 3, 5, 5), 3)).requires_grad_()
    outputs = layer(inputs)
    cotangent = (0.05 * torch.arange(outputs.numel(), dtype=torch.float64)).cos()
    outputs.backward(cotangent.view_as(outputs))
    wanted = GOLDEN[case]
    assert outputs.sum().item() == pytest.approx(wanted["output_sum"], rel=1e-9)
    found = (layer.weight.grad, layer.alpha.grad, inputs.grad)
    for name, gradient in zip(("grad_weight", "grad_alpha", "grad_input"), found, strict=True):
        expected = torch.tensor(wanted[name], dtype=torch.float64)
        scale = float(expected.abs().max())
        torch.testing.assert_close(gradient.flatten(), expected, atol=1e-9 * scale, rtol=0)
    head = torch.tensor(wanted["output_head"], dtype=torch.float64)
    torch.testing.assert_close(outputs.flatten()[: len(head)].detach(), head, atol=1e-8, rtol=0)


@pytest.mark.parametrize("stage", [1, 2])
def test_training_and_evaluation_have_the_same_outputs(stage):
    layer, inputs = BinaryConv2d(3, 4, 3), torch.randn(2, 3, 6, 6)
    layer.stage = stage
    assert torch.equal(layer(inputs), layer.eval()(inputs))


@pytest.mark.parametrize("count", [1, 8, 37, 64])
def test_bits_come_back_and_zero_is_positive(count):
    weight = torch.randn(count, 3)
    weight[0, 0] = 0.0
    packed = pack_bits(weight)
    assert packed.numel() == -(-3 * count // 8)
    assert torch.equal(unpack_bits(packed, (count, 3)), signs(weight))
    assert unpack_bits(packed, (count, 3))[0, 0] == 1


@pytest.mark.parametrize(
    "layer",
    [
        BinaryConv2d(5, 6, 3, stride=2, padding=1),
        BinaryConv2d(4, 6, 1, groups=2),
        BinaryLinear(9, 4),
    ],
)
def test_the_packed_layer_is_the_second_stage(layer):
    layer.stage = 2
    inputs = (
        torch.randn(2, 9)
        if isinstance(layer, nn.Linear)
        else torch.randn(2, layer.in_channels, 7, 7)
    )
    inputs.view(-1)[::5] = 0.0
    small = BinaryWeight.from_dense(layer)
    assert torch.equal(small(inputs), layer.eval()(inputs))
    torch.testing.assert_close(small(inputs), small.dense()(signs(inputs)))
    empty = BinaryWeight.like(nn.Conv2d(5, 6, 3, stride=2, padding=1, bias=False))
    if layer.weight.shape == (6, 5, 3, 3):
        empty.load_state_dict(small.state_dict())
        assert torch.equal(empty(inputs), small(inputs))


@pytest.mark.parametrize("channels", [1, 37, 64, 100])
@pytest.mark.parametrize(
    ("stride", "padding", "kernel"), [(1, 1, 3), (2, 1, 3), (2, 0, 1), (1, 2, 3)]
)
def test_population_counts_are_the_products_of_signs(channels, stride, padding, kernel):
    random = np.random.default_rng(0)
    inputs = random.integers(-2, 3, (2, channels, 7, 6)).astype(np.float32)  # with exact zeros
    weight = random.normal(size=(5, channels, kernel, kernel)).astype(np.float32)
    wanted = F.conv2d(
        *(signs(torch.from_numpy(each)) for each in (inputs, weight)), None, stride, padding
    )
    found = binary_conv2d(
        pack_signs(inputs.transpose(0, 2, 3, 1)),
        pack_signs(weight.transpose(0, 2, 3, 1)),
        *(channels, stride, padding),
    )
    assert np.array_equal(found.transpose(0, 3, 1, 2), wanted.numpy().astype(int))


def test_layers_that_can_not_be_binary_are_refused():
    for layer in (nn.Linear(3, 3), nn.Conv2d(3, 3, 3)):
        with pytest.raises(ValueError, match="bias"):
            binary_layer(layer)
        with pytest.raises(ValueError, match="bias"):
            BinaryWeight.from_dense(layer)
    for make in (binary_layer, BinaryWeight.from_dense):
        with pytest.raises(ValueError, match="expected"):
            make(nn.ReLU())
    with pytest.raises(ValueError, match="positive"):
        BinaryLinear(2, 2, frequency=0.0)
    with pytest.raises(ValueError, match="modes"):
        BinaryWeight.from_dense(nn.Conv2d(2, 2, 3, padding_mode="circular", bias=False))
    for wrong in ({"frequency": -1.0}, {"second_stage": 1.5}):
        with pytest.raises(UsageError, match="must be"):
            compress.BiPer(**wrong)
    with pytest.raises(UsageError, match="no layer to make binary"):
        compress.Session(nn.Sequential(nn.Linear(3, 3)), [compress.BiPer()], torch.zeros(1, 3), 1)


def test_the_resnet_has_the_papers_blocks():
    model = timm.create_model("resnet20_biper")
    found = cost(model, torch.zeros(1, 3, 32, 32))
    assert found.parameters == 269_850
    block = model.blocks[3].eval()  # 16 to 32 channels at half the resolution
    features = torch.randn(1, 16, 8, 8)
    shortcut = F.pad(F.avg_pool2d(features, 2), (0, 0, 0, 0, 8, 8))
    middle = F.hardtanh(block.bn1(block.conv1(features)) + shortcut)
    wanted = F.hardtanh(block.bn2(block.conv2(middle)) + middle)
    torch.testing.assert_close(block(features), wanted)
    with pytest.raises(UsageError, match="smaller"):
        timm.create_model("resnet20_biper", widths=(16, 8))


def trained(methods, steps, stop=None, state=None, seed=0):
    """Train a small network; returns the session, the model and the optimizer's state."""
    torch.manual_seed(seed)
    model = build(SPEC).train()
    session = compress.Session(model, methods, torch.zeros(1, 1, 8, 8), steps, spec=SPEC)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    first = 0
    if state is not None:
        session.load_state_dict(state[0])
        model.load_state_dict(state[1])
        optimizer.load_state_dict(state[2])
        first = state[3]
    session.attach(optimizer)
    for step in range(first, stop or steps):
        images = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), torch.arange(16) % 10) + session.penalty()
        loss.backward()
        optimizer.step()
    return session, model, (session.state_dict(), model.state_dict(), optimizer.state_dict(), stop)


@pytest.mark.parametrize("stop", [2, 5])
def test_stages_follow_the_steps_and_resume_to_the_bit(stop):
    methods = [compress.BiPer(second_stage=0.5, regulariser=0.01)]
    session, model, _ = trained(methods, 8)
    _, half, state = trained(methods, 8, stop)
    stages = {module.stage for module in half.modules() if isinstance(module, BINARY)}
    assert stages == {1 if stop < 4 else 2}
    again, resumed, _ = trained(methods, 8, state=state, seed=1)
    assert all(
        torch.equal(one, other)
        for one, other in zip(
            model.state_dict().values(), resumed.state_dict().values(), strict=True
        )
    )
    images = torch.randn(3, 1, 8, 8)
    before = model.eval()(images)
    spec = session.finish()
    assert torch.equal(model(images), before)
    assert torch.equal(build(spec, model.state_dict())(images), before)
    assert again.finish().to_dict() == spec.to_dict()
    assert isinstance(model.conv1, nn.Conv2d)  # the first and the last stay in floating point
    assert isinstance(model.head, nn.Linear)
    assert isinstance(model.blocks[0].conv1, BinaryWeight)
    weights = sum(model.blocks[i].conv1.weight.numel() for i in (0, 1))
    assert sum(model.blocks[i].conv1.bits.numel() for i in (0, 1)) == weights // 8


@pytest.mark.parametrize("tau", [-0.5, 0.0, 0.5])
def test_the_regulariser_is_signed(tau):
    model = build(SPEC)
    method = compress.BiPer(regulariser=tau)
    session = compress.Session(model, [method], torch.zeros(1, 1, 8, 8), 4)
    layers = [module for module in model.modules() if isinstance(module, BINARY)]
    wanted = tau * sum((20 * layer.weight).sin().square().mean() for layer in layers)
    assert float(session.penalty()) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.slow
def test_binary_digits_reach_93_percent():
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    inputs = torch.tensor((images[order] - 4.9) / 6).float().view(-1, 1, 8, 8)
    targets = torch.tensor(labels[order])
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32),
        nn.Conv2d(32, 64, 3, 2, padding=1, bias=False), nn.BatchNorm2d(64),
        nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64),
        nn.Conv2d(64, 64, 3, 2, padding=1, bias=False), nn.BatchNorm2d(64),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    epochs, batch = 28, 64
    steps = epochs * (1438 // batch)
    session = compress.Session(model, [compress.BiPer()], inputs[:2], steps)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    session.attach(optimizer)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for rows in torch.randperm(1438)[: 1438 // batch * batch].split(batch):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[rows]), targets[rows]).backward()
            optimizer.step()
            schedule.step()
    session.finish()
    assert sum(isinstance(module, BinaryWeight) for module in model) == 3
    correct = model.eval()(inputs[1438:]).argmax(1) == targets[1438:]
    print(f"binary digits: {correct.float().mean():.2%}")
    assert correct.float().mean() >= 0.93
