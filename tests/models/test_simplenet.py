"""SimpleNet against the authors' implementation."""

import pytest
import timm
import torch
from zoo_golden import (
    MODELS,
    Named,
    assert_gradients,
    assert_summary,
    images,
    load,
    loss_gradients,
    measured,
    own_tensors,
    tensors,
)

from smallfry.errors import UsageError
from smallfry.models.simplenet import SimpleNet, checkpoint_filter_fn

NAMES = [name for name in MODELS if name.startswith("simplenet")]


def ours(name: str) -> str:
    return name.replace("460k", "390k")


def theirs(name: str, model: SimpleNet) -> list[Named]:
    """The authors' names: these networks count some pools as two modules."""
    pools = [i for i, m in enumerate(model.features) if isinstance(m, torch.nn.Sequential)]
    twice = pools if "v1" in name else pools[3:4] if name.endswith("extra_pool") else []
    named = []
    for key, shape in own_tensors(model):
        part, number, *rest = key.split(".")
        if part == "features":
            number = str(int(number) + sum(pool < int(number) for pool in twice))
        named.append((".".join((part, number, *rest)), shape))
    return named


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_multiply_accumulates_are_exact(name: str) -> None:
    entry, side = MODELS[name], 32 if "cifar" in name else 224
    found = measured(ours(name), (3, side, side))
    assert found.parameters == entry["n_params"]
    assert found.macs == entry["macs_one_image"]
    if "n_params_100_classes" in entry:
        hundred = measured(ours(name), (3, side, side), num_classes=100)
        assert hundred.parameters == entry["n_params_100_classes"]


@pytest.mark.parametrize("name", [n for n in NAMES if "tensors" in MODELS[n]])
def test_tensors_are_the_authors(name: str) -> None:
    assert sorted(own_tensors(timm.create_model(ours(name)))) == sorted(tensors(MODELS[name]))


@pytest.mark.parametrize("name", [n for n in NAMES if "output" in MODELS[n]])
def test_outputs(name: str) -> None:
    entry = MODELS[name]
    model = timm.create_model(ours(name))
    load(model, theirs(name, model), checkpoint_filter_fn)
    with torch.no_grad():
        assert_summary(model(images(entry["input_shape"])), entry["output"])


def test_gradients_and_running_statistics() -> None:
    entry = MODELS["simplenet_cifar_310k"]
    model = load(timm.create_model("simplenet_cifar_310k"), tensors(entry), checkpoint_filter_fn)
    inputs = images(entry["input_shape"])
    loss = loss_gradients(model, inputs, entry)
    assert loss == pytest.approx(entry["loss"]["cross_entropy"], rel=1e-9)
    assert_gradients(model, entry["loss"]["grad_l2"])
    trained = entry["train_mode"]
    assert_summary(model.train()(inputs), trained["output"])
    for name, wanted in trained["running_mean_after"].items():
        assert_summary(model.get_buffer(name), wanted)


@pytest.mark.parametrize("side", [16, 19, 33])
def test_any_image_of_at_least_16_pixels_will_do(side: int) -> None:
    model = timm.create_model("simplenet_cifar_310k").eval()
    assert model(torch.rand(1, 3, side, side + 1)).shape == (1, 10)


def rates(model: SimpleNet) -> list[float]:
    found = [m.p for m in model.features.modules() if isinstance(m, torch.nn.Dropout2d)]
    return [*found, model.head_drop.p]


def test_dropout_rates() -> None:
    assert rates(SimpleNet("4 p 4", drop_rate=0.1)) == [0, 0.1, 0, 0.1]
    by_place = {"0": 0.2, "2": 0.3, "head": 0.4}
    assert rates(SimpleNet("4 p 4", drop_rates=by_place)) == [0.2, 0, 0.3, 0.4]
    assert rates(SimpleNet("4 p 4", drop_rates={1: 0.2})) == [0, 0.2, 0, 0]
    with pytest.raises(UsageError, match="0 to 2 and head, not '3'"):
        SimpleNet("4 p 4", drop_rates={"3": 0.1})


@pytest.mark.parametrize("layers", ["4 q", "4x3", "x1", "-4"])
def test_unknown_layers_are_named(layers: str) -> None:
    with pytest.raises(UsageError, match="'p', '64' or '64x1'"):
        SimpleNet(layers)


def test_unknown_stride_modes_are_named() -> None:
    with pytest.raises(UsageError, match="0 to 4, not 5"):
        SimpleNet("4", stride_mode=5)


def test_timms_contract() -> None:
    model = SimpleNet(["6", "8x1", "p", "10"], num_classes=4).eval()
    some = torch.rand(2, 3, 8, 8)
    features = model.forward_features(some)
    assert features.shape == (2, 10, 4, 4)
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.amax((2, 3)))
    torch.testing.assert_close(model.get_classifier()(pooled), model(some))
    model.double().reset_classifier(7)
    assert model(some.double()).shape == (2, 7)
    model.reset_classifier(0)
    assert model(some.double()).shape == (2, 10)
    maps = timm.create_model("simplenet_cifar_310k", features_only=True)(torch.rand(1, 3, 32, 32))
    assert [m.shape[1:] for m in maps] == [
        (32, 32, 32), (64, 16, 16), (64, 8, 8), (64, 4, 4), (64, 2, 2)
    ]  # fmt: skip
    small = timm.create_model("simplenetv1_small_m2_05", features_only=True)
    assert small.feature_info.reduction() == [8, 16, 32]
    groups = timm.optim.param_groups_layer_decay(SimpleNet("4 p 4"), layer_decay=0.5)
    assert len({group["lr_scale"] for group in groups}) > 2


def test_recomputed_layers_give_the_same_gradients() -> None:
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = SimpleNet("6 p 8 8x1").double()
        model.set_grad_checkpointing(recompute)
        model(torch.ones(2, 3, 8, 8, dtype=torch.float64) / 3).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*found)
