"""Critical points solve their equations, and wide random networks follow the recursions."""

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

from smallfry.errors import UsageError
from smallfry.models.critical import (
    ACTIVATIONS,
    Activation,
    aspect_ratio,
    correlated_mean,
    find_activation,
    find_critical,
    kernels,
    moments,
    residual_kernels,
    vertices,
)
from smallfry.models.critical_init import activation_of, init_critical_
from smallfry.models.plain_mlp import PlainMLP
from smallfry.training.config import ModelConfig

KINDS = {"scale_invariant": "scale-invariant", "K0": "K* = 0", "half_stable": "half-stable"}
GOLDEN = json.loads((Path(__file__).parent / "golden" / "criticality.json").read_text())


@pytest.mark.parametrize("name", GOLDEN["criticality"])
def test_constants_are_those_of_an_independent_computation(name):
    known, found = GOLDEN["criticality"][name], find_critical(name)
    assert found.kind == KINDS[known["cls"]]
    assert found.weight == pytest.approx(known["C_W"], abs=1e-10)
    assert found.bias == pytest.approx(known["C_b"], abs=1e-10)
    assert found.vertex == pytest.approx(known.get("nu", known.get("vertex_slope")), abs=1e-9)
    if "K" in known:
        assert found.kernel == pytest.approx(known["K"], abs=1e-8)
        assert found.perpendicular_slope == pytest.approx(2 * known["h"], abs=1e-10)
        first = known["first_layer_C_W_unit_input"]
        assert found.first_weight(1.0) == pytest.approx(first, abs=1e-8)


@pytest.mark.parametrize("name", ["gelu", "silu", "mish", "hardswish"])
def test_half_stable_points_are_fixed_with_susceptibilities_of_one(name):
    point, act = find_critical(name), find_activation(name)
    means = moments(act, point.kernel)
    assert point.bias + point.weight * means.square == pytest.approx(point.kernel, abs=1e-12)
    assert point.weight * means.slope_square == pytest.approx(1, abs=1e-12)
    assert point.weight * means.product / point.kernel == pytest.approx(1, abs=1e-11)
    step = 1e-4 * point.kernel
    near = [point.weight * moments(act, point.kernel + d).slope_square for d in (-step, step)]
    numeric = (near[1] - near[0]) / (2 * step)
    assert point.perpendicular_slope == pytest.approx(numeric, rel=1e-4)
    ends = [(k, moments(act, k)) for k in (point.kernel - step, point.kernel + step)]
    parallel = [point.weight * means.product / kernel for kernel, means in ends]
    assert point.parallel_slope == pytest.approx((parallel[1] - parallel[0]) / (2 * step), rel=2e-2)


@pytest.mark.parametrize("name", GOLDEN["criticality_none"])
def test_activations_without_a_critical_point_are_refused(name):
    with pytest.raises(UsageError, match=f"{name} has no critical initialisation: normalise"):
        find_critical(name)


def test_selu_preserves_norms_but_not_gradients():
    means, known = moments(find_activation("selu"), 1.0), GOLDEN["selu_at_K1_CW1"]
    assert means.square == pytest.approx(1, abs=1e-9)
    assert means.slope_square == pytest.approx(known["chi_perp"], abs=1e-9)
    assert means.product == pytest.approx(known["chi_par"], abs=1e-9)
    assert math.isnan(find_critical("selu").vertex)


def test_an_activation_of_ones_own_works_and_an_unknown_name_is_named():
    steep = Activation("steep", lambda z: torch.tanh(3 * z), ())
    assert find_critical(steep).weight == pytest.approx(1 / 9, rel=1e-9)
    with pytest.raises(UsageError, match="unknown activation 'gelo'"):
        find_critical("gelo")


def test_tanh_decays_as_one_over_twice_the_layer():
    found = kernels(find_activation("tanh"), 1.0, 0.0, 1.0, 300)
    assert found[-1] * 2 * 300 == pytest.approx(1, rel=0.02)


def samples(act, point, start, layers, width, networks, seed=0):
    """Draw preactivations of random networks at one input, (layers, networks, width)."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(networks, width, generator=generator) * math.sqrt(start)
    found = [z]
    for _ in range(layers - 1):
        scale = (point.weight * act.function(z).square().mean(1) + point.bias).sqrt()
        # given the layer before, preactivations are independent with this variance
        z = torch.randn(networks, width, generator=generator) * scale[:, None]
        found.append(z)
    return torch.stack(found)


@pytest.mark.parametrize("name", ["tanh", "relu", "gelu", "silu"])
def test_kernels_of_random_networks_follow_the_recursion_within_two_percent(name):
    act, point = find_activation(name), find_critical(name)
    start = point.kernel or 1.0
    measured = samples(act, point, start, 6, 256, 1500).square().mean((1, 2))
    theory = kernels(act, point.weight, point.bias, start, 6)
    np.testing.assert_allclose(measured, theory, rtol=0.02)


@pytest.mark.parametrize(("name", "slope"), [("linear", 2), ("relu", 5)])
def test_vertices_of_random_networks_grow_by_their_slope(name, slope):
    act, point = find_activation(name), find_critical(name)
    theory = vertices(act, point, 1.0, 5)
    assert np.diff(theory) == pytest.approx([slope] * 4)
    squares = samples(act, point, 1.0, 5, 128, 20_000)[-1].double().square()
    total = squares.sum(1)
    pairs = (total.square() - squares.square().sum(1)) / (128 * 127)
    assert 128 * (float(pairs.mean()) - 1) == pytest.approx(theory[-1], rel=0.15)
    assert aspect_ratio(point, 10) == pytest.approx(4 / 50 / slope)


def test_tied_residual_kernels_are_those_known():
    known = GOLDEN["residual_prenorm_relu_C2_2"]
    tied = residual_kernels(find_activation("relu"), 2.0, 12, tied=True)
    np.testing.assert_allclose(tied.diagonal(), known["tied_K"], rtol=1e-12)
    np.testing.assert_array_equal(tied, tied.T)
    untied = residual_kernels(find_activation("relu"), 2.0, 12, tied=False)
    np.testing.assert_allclose(untied.diagonal(), known["untied_K"], rtol=1e-12)
    shrunk = residual_kernels(find_activation("relu"), 2.0, 12, tied=True, branch=1 / 12)
    assert 1 < shrunk[-1, -1] < 2.1  # divided by T, any T leaves about twice the start


def test_a_tied_residual_block_of_finite_width_grows_as_the_theory():
    width, steps = 512, 6
    theory = residual_kernels(find_activation("relu"), 2.0, steps, tied=True).diagonal()
    found = torch.zeros(steps + 1)
    for seed in range(6):
        draw = torch.Generator().manual_seed(seed)
        one, two = (torch.randn(width, width, generator=draw) / width**0.5 for _ in range(2))
        z = torch.randn(width, generator=draw)
        for t in range(steps + 1):
            found[t] += z.square().mean() / 6
            z = z + 2**0.5 * two @ torch.relu(one @ (z / z.square().mean().sqrt()))
    np.testing.assert_allclose(found, theory, rtol=0.08)


def test_correlated_means_agree_with_closed_forms_and_ends():
    relu, tanh, erf = (find_activation(name) for name in ("relu", "tanh", "erf"))
    grid = Activation("other relu", torch.relu)
    for rho in (-0.6, 0.0, 0.4, 0.9):
        assert correlated_mean(grid, rho) == pytest.approx(correlated_mean(relu, rho), abs=2e-4)
        # Williams 1996: of erf(z) at unit variances
        exact = 2 / math.pi * math.asin(2 * rho / 3)
        assert correlated_mean(erf, rho) == pytest.approx(exact, abs=1e-10)
    assert correlated_mean(tanh, 1.0) == pytest.approx(moments(tanh, 1.0).square)
    assert correlated_mean(tanh, 0.0) == pytest.approx(0, abs=1e-12)


# In place


def rms(model, images):
    found = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(
                lambda _, __, z: found.append(float(z.detach().square().mean()))
            )
    model(images)
    return found


@pytest.mark.parametrize("name", ["tanh", "relu", "gelu", "silu"])
def test_signals_of_a_deep_plain_network_keep_the_theorys_size(name):
    act = {"tanh": "tanh", "relu": "relu", "gelu": "gelu", "silu": "silu"}[name]
    model = PlainMLP(8, 1, embed_dim=256, depth=20, act_layer=act)
    images = 3 * torch.randn(64, 1, 8, 8)
    point = init_critical_(model, images).point
    assert point.activation == activation_of(model) == name
    start = point.kernel if name in ("gelu", "silu") else point.weight * 9.0
    theory = kernels(find_activation(name), point.weight, point.bias, start, 19)
    measured = rms(model, images)[:-1]
    assert np.abs(np.log(np.array(measured) / theory)).max() < 0.8
    assert float(model.head.bias.detach().abs().max()) == 0


def test_default_weights_lose_the_signal_that_critical_ones_keep():
    images = torch.randn(16, 1, 8, 8)
    torch.manual_seed(0)
    model = PlainMLP(8, 1, embed_dim=128, depth=50, act_layer="relu")
    spread = model(images).std(0).mean()
    assert spread < 1e-3
    init_critical_(model, images)
    assert model(images).std(0).mean() > 20 * spread


def test_a_convolutional_network_is_initialised_by_its_fan_in():
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 400, 3, groups=4), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(400, 10)),
    )
    init_critical_(model, torch.randn(2, 3, 9, 9))
    assert float(model[2].weight.var()) == pytest.approx(2 / (2 * 9), rel=0.1)
    assert float(model[6].weight.var()) == pytest.approx(1 / 400, rel=0.1)


def test_branches_of_a_recursive_model_are_divided_by_their_uses():
    torch.manual_seed(0)
    model = timm.create_model("vitrm_micro_patch4_8", recursion_steps=4).eval()
    images = torch.randn(4, 1, 8, 8)
    done = init_critical_(model, images)
    assert done.point is None
    assert set(done.uses.values()) == {16}  # 4 steps of 3 thoughts and an answer
    weight = model.get_submodule("blocks.1.mlp.fc2").weight
    divisor = 16 * len(done.uses) ** 0.5
    assert float(weight.std()) * weight.shape[1] ** 0.5 == pytest.approx(1 / divisor, rel=0.05)
    sizes = [float(step.state.z.square().mean()) for step in model.recurse(images)]
    growth = [b - a for a, b in pairwise(math.sqrt(s) for s in sizes)]
    assert max(growth) < 0.2  # of a state of about 0.1 to 1


def test_layers_of_sequences_are_initialised_by_whatever_keyword_they_are_called():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv1d(8, 64, 3), nn.Conv1d(64, 256, 3)
            self.act, self.head = nn.Tanh(), nn.Linear(256, 4)

        def forward(self, x):
            x = self.act(self.second(input=self.act(self.first(input=x))))
            return self.head(input=x.mean(2))

    torch.manual_seed(0)
    model = Net()
    done = init_critical_(model, torch.randn(3, 8, 9))
    assert done.layers == ("first", "second", "head")
    for layer in (model.first, model.second, model.head):  # tanh: variances of 1 over the fan-in
        fan_in = layer.weight[0].numel()
        assert float(layer.weight.var()) * fan_in == pytest.approx(1, rel=0.2)
    assert float(model.second.weight.var()) * 192 == pytest.approx(1, rel=0.03)


def test_a_weight_that_is_computed_is_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    nn.utils.parametrizations.weight_norm(model[2])
    before = model[0].weight.detach().clone()
    with pytest.raises(UsageError, match="weight of '2' is computed from other parameters"):
        init_critical_(model, torch.randn(3, 4))
    assert torch.equal(model[0].weight, before)


def test_what_cannot_be_initialised_is_refused():
    images = torch.randn(2, 4)
    mixed = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh())
    with pytest.raises(UsageError, match=r"one kind of activation.*relu, tanh"):
        init_critical_(mixed, images)
    init_critical_(mixed, images, "tanh")
    with pytest.raises(UsageError, match="found none"):
        init_critical_(nn.Linear(4, 4), images)
    with pytest.raises(UsageError, match="no trainable"):
        init_critical_(nn.Sequential(nn.ReLU()), images)
    with pytest.raises(UsageError, match="sigmoid has no critical"):
        init_critical_(nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 2)), images)
    with pytest.raises(UsageError, match="depth is at least 2"):
        PlainMLP(depth=1)
    with pytest.raises(UsageError, match="both give initial weights"):
        ModelConfig(start="run", init="critical")


def test_every_named_activation_has_its_own_name():
    assert all(name == act.name for name, act in ACTIVATIONS.items())


def test_the_classifier_of_a_plain_network_can_be_replaced():
    model = timm.create_model("plain_mlp_100", num_classes=3, img_size=(4, 6), embed_dim=8)
    assert len(model.layers) == 99
    assert model(torch.zeros(2, 1, 4, 6)).shape == (2, 3)
    model.reset_classifier(5)
    assert model.get_classifier().out_features == 5
    assert model.forward_head(model.forward_features(torch.zeros(2, 1, 4, 6)), True).shape == (2, 8)
    model.reset_classifier(0)
    assert model(torch.zeros(2, 1, 4, 6)).shape == (2, 8)
