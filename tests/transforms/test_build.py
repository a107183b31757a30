"""Models built from a stranger's description: bounded, plain, and refused in one line."""

import math
import threading

import pytest
import timm
import torch
from torch import nn

from smallfry.errors import RunError
from smallfry.transforms import ModelSpec, build
from smallfry.transforms.build import not_finite

NAME, SMALL = "resnet10t", {"num_classes": 3, "stem_width": 8}


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return timm.create_model(NAME, **SMALL).state_dict()


def refusal(*arguments, **keywords):
    with pytest.raises(RunError) as error:
        build(*arguments, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_model_has_its_weights_and_is_in_evaluation_mode(weights):
    model = build(ModelSpec(NAME, SMALL), weights)
    assert not model.training
    found = model.state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())


def test_without_weights_it_has_those_of_its_initialisation():
    torch.manual_seed(1)
    first = build(ModelSpec(NAME, SMALL))
    torch.manual_seed(1)
    second = timm.create_model(NAME, **SMALL)
    assert torch.equal(first.fc.weight, second.fc.weight)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet10", "x: unknown architecture 'resnet10' .*; did you mean 'resnet10"),
        ("hf_hub:user/name", "x: unknown architecture 'hf_hub:user/name'"),
        ("", "x: unknown architecture ''"),
        ("../resnet10t", "x: unknown architecture"),
    ],
)
def test_only_registered_models_are_built(name, message):
    with pytest.raises(RunError, match=message):
        build(ModelSpec(name, {}), where="x")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e12, 2**40, [1, [2**40]]])
def test_numbers_beyond_all_models_are_refused(value):
    message = refusal(ModelSpec(NAME, {"options": {"deep": value}}))
    assert "is too large for an argument of a model" in message


def test_arguments_nested_too_deeply_are_refused():
    deep: list = []
    for _ in range(20):
        deep = [deep]
    assert refusal(ModelSpec(NAME, {"a": deep})) == (
        "model: the model's arguments are nested too deeply"
    )


def test_an_argument_that_the_model_does_not_have_is_named():
    message = refusal(ModelSpec(NAME, {"wings": 2}), where="runs/a")
    assert message.startswith("runs/a: the model can't be built from its description: ")
    assert "wings" in message


@pytest.mark.parametrize(
    "change",
    [
        lambda w: {k: v for k, v in w.items() if k != "fc.bias"},
        lambda w: w | {"more": torch.ones(1)},
        lambda w: w | {"fc.weight": torch.ones(4, 4)},
        lambda w: {},
    ],
    ids=["one missing", "one more", "another shape", "none"],
)
def test_weights_that_do_not_fit_are_refused(weights, change):
    message = refusal(ModelSpec(NAME, SMALL), change(dict(weights)), where="a")
    assert message.startswith("a: ")
    assert "don't fit its model" in message or "larger than its weights" in message


@pytest.mark.parametrize("name", ["fc.weight", "bn1.running_mean", "bn1.running_var"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_named(weights, name, value):
    name = next(key for key in weights if key.endswith(name))
    broken = {key: weight.clone() for key, weight in weights.items()}
    broken[name].view(-1)[0] = value
    assert refusal(ModelSpec(NAME, SMALL), broken, where="a") == (
        f"a: the weight '{name}' is not finite; use another checkpoint"
    )


def test_a_description_of_a_larger_model_than_its_weights_is_refused(weights):
    message = refusal(ModelSpec("vit_large_patch16_224", {}), weights)
    assert "it would be larger than its weights, which are" in message


def test_models_of_other_threads_are_not_bounded(weights, monkeypatch):
    """While a stranger's model is made, another thread may make a large one."""
    made = []

    def create(name, **arguments):
        thread = threading.Thread(target=lambda: made.append(nn.Linear(4000, 4000)))
        thread.start()
        thread.join()
        return created(name, **arguments)

    created = timm.create_model
    monkeypatch.setattr(timm, "create_model", create)
    build(ModelSpec(NAME, SMALL), weights)
    assert made[0].weight.numel() == 16_000_000


def test_a_failure_leaves_no_bound_behind(weights):
    refusal(ModelSpec("vit_large_patch16_224", {}), weights)
    assert nn.Linear(3000, 3000).weight.numel() == 9_000_000


def test_only_weights_and_running_statistics_have_to_be_finite():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.register_buffer("mask", torch.tensor(-math.inf))
    assert not_finite(model) is None
    model[1].running_var[0] = math.nan
    assert not_finite(model) == "1.running_var"
    model[0].bias.data[0] = math.inf
    assert not_finite(model) == "0.bias"
