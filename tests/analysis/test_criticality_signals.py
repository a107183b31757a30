"""Signals by layer and step against direct gradients, their findings, and limits of depth."""

import math

import numpy as np
import pytest
import torch
from flat_subject import CLASSES, split_of, subject_of, trained_of
from torch import nn

from smallfry.analysis import criticality, limits
from smallfry.analysis.criticality import LayerSignal, StepSignal, layer_signals, step_signals
from smallfry.analysis.features import collect, spread
from smallfry.errors import UsageError
from smallfry.estimators.deep_kernel import DeepKernelClassifier
from smallfry.models import RecursionStep
from smallfry.models.critical import find_activation, find_critical
from smallfry.training.augment import Normalize
from smallfry.training.run import TrainedModel
from smallfry.transforms import ModelSpec, build


class Net(nn.Module):
    """Convolution, one linear layer called twice, another whose outputs are not used."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5)
        self.mix, self.unused, self.head = nn.Linear(5, 5), nn.Linear(5, 9), nn.Linear(5, 3)

    def forward(self, images):
        tokens = self.norm(self.conv(images)).flatten(2).transpose(1, 2)
        tokens = torch.relu_(self.mix(tokens))
        self.unused(tokens)
        return self.head(self.mix(tokens).mean(1))


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Net().double()
    net.norm.running_mean.normal_()
    return net


def test_signals_are_mean_squares_of_outputs_and_of_their_gradients(net):
    images = torch.randn(7, 2, 6, 6, dtype=torch.float64)
    found = layer_signals(net, images, seed=5)
    net.eval()
    conv = net.conv(images)
    tokens = net.norm(conv).flatten(2).transpose(1, 2)
    first = net.mix(tokens)
    second = net.mix(first.relu())
    logits = net.head(second.mean(1))
    draw = torch.Generator().manual_seed(5)
    cotangents = torch.randn(7, 3, generator=draw, dtype=torch.float64)
    outputs = {("conv", 0): conv, ("mix", 0): first, ("mix", 1): second, ("head", 0): logits}
    gradients = torch.autograd.grad(logits, list(outputs.values()), cotangents)
    expected = dict(zip(outputs, gradients, strict=True))
    assert [(e.layer, e.call, e.width) for e in found] == [
        *[("conv", 0, 5), ("mix", 0, 5), ("unused", 0, 9), ("mix", 1, 5), ("head", 0, 3)]
    ]
    for each in found:
        key = each.layer, each.call
        if key == ("unused", 0):
            assert each.gradient == 0
            continue
        kernel = float(outputs[key].detach().square().mean())
        assert each.kernel == pytest.approx(kernel, rel=1e-12)
        assert each.gradient == pytest.approx(float(expected[key].square().mean()), rel=1e-12)


@pytest.mark.parametrize("convolution", [nn.Conv1d, nn.Conv3d])
def test_convolutions_of_sequences_and_volumes_have_signals(convolution):
    torch.manual_seed(0)
    dims = 1 if convolution is nn.Conv1d else 3
    model = nn.Sequential(convolution(2, 5, 2), nn.Tanh(), nn.Flatten(), nn.Linear(5 * 2**dims, 3))
    images = torch.randn(4, 2, *[3] * dims)
    first, last = layer_signals(model, images)
    assert [first[:3], last[:3]] == [("0", 0, 5), ("3", 0, 3)]
    assert first.kernel == pytest.approx(float(model[0](images).double().square().mean()))


def test_gradients_of_a_model_of_tokens_need_none_of_its_inputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    tokens = torch.randint(9, (2, 6))
    first, last = layer_signals(model, tokens, seed=5)
    hidden = model[1](model[0](tokens))
    logits = model[3](hidden.tanh())
    draw = torch.Generator().manual_seed(5)
    cotangents = torch.randn(2, 6, 3, generator=draw, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(logits, hidden, cotangents)
    assert first.gradient == pytest.approx(float(gradient.square().mean()), rel=1e-12)
    assert last.gradient == pytest.approx(float(cotangents.square().mean()), rel=1e-12)


@pytest.mark.parametrize("is_frozen", [True, False])
def test_measuring_leaves_images_and_model_as_they_were(net, is_frozen):
    net.train().requires_grad_(not is_frozen)
    net.norm.eval()
    images = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    before = images.clone()
    first = layer_signals(net, images)
    assert not images.requires_grad
    assert images.grad is None
    assert torch.equal(images, before)
    assert net.mix.training
    assert not net.norm.training
    assert all(each.grad is None for each in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())
    assert layer_signals(net, images) == first
    assert first[0].gradient > 0


def test_a_failing_pass_leaves_no_hooks(net):
    with pytest.raises(RuntimeError):
        layer_signals(net, torch.zeros(1, 3, 6, 6, dtype=torch.float64))
    assert not any(module._forward_hooks for module in net.modules())
    assert net.training


# Steps


class Steady:
    """State of two tensors: one stands still, the other grows by the same or by turns."""

    recursion_steps = 2

    def __init__(self, changes):
        self.changes = torch.tensor(changes).double()

    def initial_state(self, batch_size):
        return (torch.full((1, 2), 3.0).double(), torch.zeros(1, 2).double())

    def recurse(self, inputs, steps=None):
        still, state = self.initial_state(len(inputs))
        found = []
        for t in range(steps):
            state = state + self.changes[t % len(self.changes)]
            logits = torch.zeros(len(inputs), 3)
            logits[: t + 1, 1] = 1.0
            found.append(RecursionStep((still, state.expand(len(inputs), 2)), logits, None))
        return found


def test_a_state_that_grows_by_the_same_change_has_cosines_of_one():
    found = step_signals(Steady([[3.0, 4.0]]), torch.zeros(5, 1), torch.ones(5).long(), 4)
    np.testing.assert_allclose(found.rms[0], [3.0] * 4)
    np.testing.assert_allclose(found.rms[1], np.arange(1, 5) * 12.5**0.5)
    np.testing.assert_allclose(found.correlation, np.ones((4, 4)))
    assert found.accuracy == pytest.approx([0.2, 0.4, 0.6, 0.8])


def test_changes_by_turns_are_opposite_perpendicular_or_absent():
    model = Steady([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0], [-5.0, 0.0]])
    found = step_signals(model, torch.zeros(2, 1), torch.zeros(2).long(), 4)
    expected = np.diag([1.0, 1.0, 0.0, 1.0])
    expected[0, 3] = expected[3, 0] = -1
    np.testing.assert_allclose(found.correlation, expected, atol=1e-15)
    assert found.accuracy == [0.5, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("power", "law"), [(1.0, "∝ t, as"), (0.5, "∝ √t, as"), (0.0, "it has settled")]
)
def test_the_growth_of_the_state_is_named(power, law):
    steps = np.arange(1, 9)
    correlation = np.full((8, 8), 0.25)
    np.fill_diagonal(correlation, 1)
    taken = StepSignal(
        np.stack([np.ones(8), 2.0 * steps**power]), correlation, [0.1, 0.2, 0.7, 0.7, *[0.4] * 4]
    )
    text = criticality._advice_on_steps(taken, 2)
    assert f"grows as t^{power:.2f} over the last steps" in text
    assert law in text
    assert "mean cosine of 0.25" in text
    assert "T = 2; of 8 steps the accuracy is best after 3 (70.00%), and 40.00% after" in text


def test_the_theory_of_a_tied_block_grows_with_the_steps():
    found = criticality._tied_theory(40)
    assert found[0] == 1
    assert np.diff(found).min() > 0
    growth = math.log(found[39] / found[19]) / math.log(2)
    assert 0.8 < growth < 1.1


def signal(kernel, gradient):
    return LayerSignal("l", 0, 8, kernel, gradient)


@pytest.mark.parametrize(
    ("signals", "forward", "back"),
    [
        ([signal(1.0, 8.0), signal(2.0, 4.0), signal(4.0, 2.0), signal(99.0, 99.0)], 2, 2),
        ([signal(9.0, 1.0), signal(3.0, 1.0), signal(1.0, 1.0), signal(0.0, 0.0)], 1 / 3, 1),
        ([signal(5.0, 5.0), signal(1.0, 1.0)], 1, 1),
        ([signal(5.0, 5.0)], 1, 1),
        ([signal(0.0, 0.0), signal(0.0, 0.0), signal(1.0, 1.0)], 1, 1),
    ],
)
def test_growth_a_call_is_a_geometric_mean_over_hidden_layers(signals, forward, back):
    expected = (
        f"a factor of {forward:.3g} a call, and that of gradients, going back, by {back:.3g};"
    )
    assert expected in criticality._growth(signals)


# Answers


def built(architecture, **arguments):
    """An untrained model of a spec, and its subject of images in the order of their classes."""
    arguments = {"num_classes": 4, "in_chans": 1, "img_size": 8, **arguments}
    spec = ModelSpec(architecture, arguments)
    torch.manual_seed(3)
    manifest = {"model": spec.to_dict()}
    return TrainedModel(build(spec), CLASSES, 8, 1, Normalize([0.5], [0.3]), manifest)


def ordered(images=200, side=8):
    draw = torch.Generator().manual_seed(2)
    pixels = torch.randint(256, (images, side**2), generator=draw, dtype=torch.uint8)
    return split_of(pixels, torch.arange(images) * 4 // images)


@pytest.mark.parametrize("activation", ["tanh", pytest.param("relu", marks=pytest.mark.slow)])
def test_the_answer_on_a_plain_network_has_its_signals_and_its_critical_point(activation):
    trained, split = built("plain_mlp", embed_dim=12, depth=5, act_layer=activation), ordered()
    state = torch.random.get_rng_state()
    answer = criticality.ask(subject_of(split, split, trained, seed=7))
    assert torch.equal(torch.random.get_rng_state(), state)
    numbers = answer.numbers
    inputs = trained.normalize(spread(split, criticality.IMAGES).images)
    expected = layer_signals(trained.model, inputs, 7)
    assert numbers["trained weights"] == [each._asdict() for each in expected]
    assert numbers["initial weights"] != numbers["trained weights"]
    assert "steps" not in numbers
    point = find_critical(activation)
    ratio = point.vertex * (4 / 12 + 1 / 4)
    assert numbers["depth_over_width"] == pytest.approx(ratio)
    text = " ".join(answer.findings)
    assert f"critical are C_W = {point.weight:.6g} and C_b = {point.bias:.6g}" in text
    assert f"ν Σ 1/width is {ratio:.3g}" in text
    assert criticality._growth(expected) in text
    assert [row[0] for row in answer.tables[0].rows] == [each.layer for each in expected]
    assert len(answer.pictures) == 2


def test_the_answer_on_a_recursive_model_is_over_images_of_all_classes():
    options = {"embed_dim": 16, "num_heads": 2, "mlp_hidden_dim": 16, "depth": 1}
    trained = built("vitrm_micro_patch4_8", recursion_steps=1, latent_steps=1, **options)
    split = ordered(1000)
    answer = criticality.ask(subject_of(split, split, trained))
    some = spread(split, criticality.IMAGES)
    assert torch.bincount(some.labels).tolist() == [32] * 4
    taken = answer.numbers["steps"]
    assert len(taken["accuracy"]) == 8  # four times two, the fewest
    with torch.no_grad():
        steps = trained.model.recurse(trained.normalize(some.images), 8)
    expected = [float((s.logits.argmax(1) == some.labels).double().mean()) for s in steps]
    assert taken["accuracy"] == pytest.approx(expected)
    assert np.array(taken["correlation"]).shape == (8, 8)
    assert len(answer.numbers["tied_theory"]) == 8
    assert "Trained with T = 1; of 8 steps the accuracy is best" in answer.findings[-1]


def test_a_model_without_one_activation_has_signals_and_no_point():
    trained = built("plain_mlp", embed_dim=6, depth=3)
    trained.model.more = nn.ReLU()
    split = ordered(20)
    answer = criticality.ask(subject_of(split, split, trained))
    assert "critical" not in answer.numbers
    assert any(line.startswith("No critical point is shown: ") for line in answer.findings)


# Limits

E2 = math.exp(-2)


@pytest.mark.parametrize(
    ("name", "at_zero", "slope_at_zero", "slope_at_one"),
    [
        ("relu", 1 / math.pi, 1 / 2, 1.0),
        ("erf", 0.0, 4 / (3 * math.pi) / (2 / math.pi * math.asin(2 / 3)), None),
        ("sin", 0.0, 2 * math.exp(-1) / (1 - E2), (1 + E2) / (1 - E2)),
    ],
)
def test_limits_have_the_moments_of_their_activation(name, at_zero, slope_at_zero, slope_at_one):
    found = limits.limit_of(find_activation(name))
    assert found.at_zero == pytest.approx(at_zero, abs=1e-9)
    assert found.slope_at_zero == pytest.approx(slope_at_zero, rel=1e-7)
    if slope_at_one is not None:
        assert found.slope_at_one == pytest.approx(slope_at_one, rel=1e-7)
    if found.kind == "singular kernel":
        exponent = -2 * math.log(found.slope_at_zero) / math.log(found.slope_at_one)
        assert limits._described(found) == f"a vote weighted by 1/r^{exponent:.3g}"
    else:
        assert limits._described(found) == "a majority vote"


def test_the_kernel_classifier_sees_images_of_all_classes(monkeypatch):
    monkeypatch.setattr(limits, "SAMPLES", 40)
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(160) * 4 // 160
    means = torch.tensor([[200, 0, 0, 0], [0, 200, 0, 0], [0, 0, 200, 0], [0, 0, 0, 200]])
    pixels = means[labels] + torch.randint(60, (160, 4), generator=draw)
    split = split_of(pixels.to(torch.uint8), labels)
    trained = trained_of(torch.eye(4).roll(1, 0))
    answer = limits.ask(subject_of(split, split, trained))
    some = spread(split, 40)
    found = collect(trained, some.images, some.labels)
    for name, scores in answer.numbers["kernel_accuracy"].items():
        for depth, score in zip(limits.DEPTHS, scores, strict=True):
            fitted = DeepKernelClassifier(activation=name, depth=depth)
            fitted.fit(found.features.numpy(), found.labels.numpy())
            assert score == fitted.score(found.features.numpy(), found.labels.numpy())
    assert max(answer.numbers["kernel_accuracy"]["relu"]) > 0.9
    assert answer.numbers["model_accuracy"] == found.accuracy == 0
    text = " ".join(answer.findings)
    assert "show no single kind of activation" in text
    assert "inputs, 40 training images" in text
    rows = {row[0]: row[1:] for row in answer.tables[0].rows}
    assert set(rows) == set(limits.SHOWN)
    assert rows["relu"][:2] == ["majority vote", pytest.approx(1 / math.pi, abs=1e-8)]


def test_the_models_own_activation_is_among_the_limits():
    split = ordered(24)
    answer = limits.ask(subject_of(split, split, built("plain_mlp", embed_dim=6, depth=3)))
    assert answer.numbers["limits"]["tanh"]["kind"] == "singular kernel"
    assert "tanh would become a vote weighted by 1/r^" in answer.findings[0]


def test_without_layers_there_is_no_answer(monkeypatch):
    trained = built("plain_mlp", embed_dim=6, depth=3)
    monkeypatch.setattr(criticality, "layer_signals", lambda *_: [])
    split = ordered(8)
    with pytest.raises(UsageError, match="no linear layer or convolution in floating point"):
        criticality.ask(subject_of(split, split, trained))
