"""Gradient descent on the network with local Fisher layers is natural gradient on the plain one."""

import copy

import pytest
import torch
from dense_fisher import observe
from torch import nn
from torch.nn import functional as F

from smallfry.curvature import Categorical, cover
from smallfry.curvature import kronecker as kr
from smallfry.curvature.fisher_layers import (
    FisherLayer,
    Metric,
    insert_fisher_layers,
    remove_fisher_layers,
)
from smallfry.errors import UsageError

D = torch.float64
EPSILON = 0.03


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular", groups=2), nn.Tanh(),
        nn.ConvTranspose2d(4, 2, 2, stride=2), nn.Tanh(),
        nn.Flatten(), nn.Linear(32, 5, bias=False), nn.Tanh(), nn.Linear(5, 3),
    ).double()  # fmt: skip


def batch(seed=0):
    random = torch.Generator().manual_seed(seed)
    images = torch.randn(8, 2, 2, 2, dtype=D, generator=random)
    return images, torch.randint(0, 3, (8,), generator=random)


def factors(model, images, sides):
    """Damped KFAC factors by layer, from the taps on a plain network."""
    coverage = cover(model)
    seen = observe(model, coverage, images, Categorical())
    found = {}
    for block in coverage.blocks:
        rows = seen.rows(block, D)
        a, g = kr.input_factor(rows).detach(), kr.output_factor(rows).detach()
        damped = [m + EPSILON * torch.eye(m.shape[1], dtype=D) for m in (a, g)]
        outputs = damped[1] if sides == "both" else None
        found[next(iter(block.layers))] = Metric(damped[0], outputs)
    return found


def natural_step(model, metrics, gradients, lr):
    with torch.no_grad():
        for block in cover(model).blocks:
            metric = metrics[next(iter(block.layers))]
            step = gradients[block.name] @ torch.linalg.inv(metric.inputs)
            if metric.outputs is not None:
                step = torch.linalg.inv(metric.outputs) @ step
            for name, part in block.from_matrix(step).items():
                block.parameters[name] -= lr * part


def gradients_of(model, images, labels):
    loss = F.cross_entropy(model(images), labels)
    named = dict(model.named_parameters())
    found = dict(zip(named, torch.autograd.grad(loss, named.values()), strict=True))
    return {b.name: b.to_matrix({n: found[n] for n in b.parameters}) for b in cover(model).blocks}


@pytest.mark.parametrize("sides", ["inputs", "both"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_gradient_descent_there_is_natural_gradient_here(sides, momentum):
    plain = network()
    rebuilt, lr = copy.deepcopy(plain), 0.05
    layers, buffers, moments = {}, {}, {}
    for number in range(6):
        images, labels = batch(number)
        if number % 2 == 0:  # the metric is refreshed every other step
            metrics = factors(plain, images, sides)
            if not layers:
                layers = insert_fisher_layers(rebuilt, metrics)
            else:
                for name, layer in layers.items():
                    before = rebuilt(images)
                    buffers[name] = layer.refresh(metrics[name])(buffers[name])
                    torch.testing.assert_close(rebuilt(images), before, rtol=0, atol=1e-12)
        for key, gradient in gradients_of(plain, images, labels).items():
            moments[key] = momentum * moments.get(key, 0) + gradient
        natural_step(plain, metrics, moments, lr)

        loss = F.cross_entropy(rebuilt(images), labels)
        matrices = [layer.matrix for layer in layers.values()]
        assert len(list(rebuilt.parameters())) == len(matrices)
        for (name, layer), gradient in zip(
            layers.items(), torch.autograd.grad(loss, matrices), strict=True
        ):
            buffers[name] = momentum * buffers.get(name, 0) + gradient
            with torch.no_grad():
                layer.matrix -= lr * buffers[name]
        torch.testing.assert_close(rebuilt(images), plain(images), rtol=0, atol=1e-10)
    remove_fisher_layers(rebuilt)
    for (name, mine), (other, theirs) in zip(
        rebuilt.named_parameters(), plain.named_parameters(), strict=True
    ):
        assert name == other
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


def test_inserting_and_removing_leave_the_function_and_the_kinds_of_layers():
    model = network()
    images, _ = batch()
    before, kinds = model(images), [type(m) for m in model]
    parameters = list(model.parameters())
    layers = insert_fisher_layers(model, factors(model, images, "both"))
    assert all(isinstance(layer, FisherLayer) for layer in layers.values())
    assert "metric of inputs and outputs" in str(model)
    torch.testing.assert_close(model(images), before, rtol=0, atol=1e-12)
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin(images), before, rtol=0, atol=1e-12)
    with torch.no_grad():
        next(iter(layers.values())).matrix.mul_(2)
    assert not torch.allclose(model(images), before)
    torch.testing.assert_close(twin(images), before, rtol=0, atol=1e-12)
    remove_fisher_layers(twin)
    assert [type(m) for m in twin] == kinds
    torch.testing.assert_close(twin(images), before, rtol=0, atol=1e-12)
    own = list(model.parameters())
    remove_fisher_layers(model)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert not any(p is q for p in own for q in parameters)


def test_a_layer_in_two_places_is_replaced_in_both():
    torch.manual_seed(0)
    layer = nn.Linear(3, 3).double()
    model = nn.Sequential(layer, nn.Tanh(), layer)
    x = torch.randn(4, 3, dtype=D)
    before = model(x)
    made = insert_fisher_layers(model, {"0": Metric(2 * torch.eye(4, dtype=D)[None])})
    assert model[0] is model[2] is made["0"]
    torch.testing.assert_close(model(x), before)
    remove_fisher_layers(model)
    assert model[0] is model[2] is layer


def test_what_can_not_have_a_fisher_layer_is_refused_in_words():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[3].weight = model[2].weight
    metric = Metric(torch.eye(3)[None])
    with pytest.raises(UsageError, match="'9' is not there"):
        insert_fisher_layers(model, {"9": metric})
    with pytest.raises(UsageError, match="'1' can't have"):
        insert_fisher_layers(model, {"1": metric})
    with pytest.raises(UsageError, match=r"several layers \(2, 3\)"):
        insert_fisher_layers(model, {"2": metric})
    model[0].bias.requires_grad_(False)
    with pytest.raises(UsageError, match="frozen"):
        insert_fisher_layers(model, {"0": metric})
    model[0].bias.requires_grad_(True)
    with pytest.raises(UsageError, match=r"expected \(1, 3, 3\)"):
        insert_fisher_layers(model, {"0": Metric(torch.eye(2)[None])})
    with pytest.raises(UsageError, match="model itself"):
        insert_fisher_layers(nn.Linear(2, 2), {"": metric})
    with pytest.raises(kr.NotFiniteError, match="damp"):
        insert_fisher_layers(model, {"0": Metric(torch.zeros(1, 3, 3))})
    assert not any(isinstance(m, FisherLayer) for m in model.modules())
