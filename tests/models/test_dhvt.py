"""DHVT against the authors' implementation."""

import pytest
import timm
import torch
from zoo_golden import (
    MODELS,
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
from smallfry.models.dhvt import DHVT

NAMES = [name for name in MODELS if name.startswith("dhvt")]
SMALLEST = "dhvt_tiny_cifar_patch4"


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if "cifar" in n else pytest.mark.slow) for n in NAMES]
)
def test_parameters_and_multiply_accumulates_are_exact(name: str) -> None:
    entry, side = MODELS[name], 32 if "cifar" in name else 224
    found = measured(name, (3, side, side))
    assert found.parameters == entry["n_params"]
    assert found.macs == entry["macs_one_image"]


def test_tensors_are_the_authors() -> None:
    found = own_tensors(timm.create_model(SMALLEST))
    assert sorted(found) == sorted(tensors(MODELS[SMALLEST]))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n == SMALLEST else [pytest.mark.slow])
        for n in NAMES
        if "output" in MODELS[n]
    ],
)
def test_outputs(name: str) -> None:
    model = timm.create_model(name)
    load(model, own_tensors(model))
    with torch.no_grad():
        found = model(images(MODELS[name]["input_shape"]))
    assert_summary(found, MODELS[name]["output"])


def test_gradients_and_running_statistics() -> None:
    entry = MODELS[SMALLEST]
    model = load(timm.create_model(SMALLEST, drop_path_rate=0.0), tensors(entry))
    inputs = images(entry["input_shape"])
    loss = loss_gradients(model, inputs, entry)
    assert loss == pytest.approx(entry["loss"]["cross_entropy"], rel=1e-9)
    assert_gradients(model, entry["loss"]["grad_l2"])
    trained = entry["train_mode"]
    with torch.no_grad():
        assert_summary(model.train()(inputs), trained["output"])
    for name, wanted in trained["running_mean_after"].items():
        assert_summary(model.get_buffer(name), wanted)


def small(**settings: object) -> DHVT:
    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5, "img_size": 16}
    return DHVT(**(sizes | settings)).eval()  # type: ignore[arg-type]


def test_timms_contract() -> None:
    model, some = small(), torch.rand(2, 3, 16, 16)
    tokens = model.forward_features(some)
    assert tokens.shape == (2, 17, 16)
    pooled = model.forward_head(tokens, pre_logits=True)
    torch.testing.assert_close(model.get_classifier()(pooled), model(some))
    model.double().reset_classifier(7)
    assert model(some.double()).shape == (2, 7)
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}
    groups = timm.optim.param_groups_layer_decay(model, layer_decay=0.5)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    assert {round(g["lr_scale"], 3) for g in groups} == {1, 0.5, 0.25, 0.125}


def test_images_may_have_any_size_of_one_aspect() -> None:
    assert small()(torch.rand(1, 3, 24, 24)).shape == (1, 5)
    assert timm.create_model(SMALLEST, img_size=64, depth=1)(torch.rand(2, 3, 64, 64)).shape
    wide = small(img_size=(8, 12))
    assert wide.forward_features(torch.rand(1, 3, 16, 24)).shape[1] == 1 + 4 * 6
    with pytest.raises(UsageError, match="images of multiples of 4 pixels, not 18×18"):
        small(img_size=18)
    with pytest.raises(ValueError, match="expected images of the aspect 1:1, got 16×20"):
        small()(torch.rand(1, 3, 16, 20))
    with pytest.raises(ValueError, match="expected images of the aspect 2:3, got 12×8"):
        wide(torch.rand(1, 3, 12, 8))


def test_a_layer_of_rectangles_does_not_turn_them() -> None:
    """A transposed image has transposed tokens where kernels are symmetric; others differ."""
    torch.manual_seed(0)
    wide = small(img_size=(8, 16)).eval()
    torch.manual_seed(0)
    high = small(img_size=(16, 8)).eval()
    for model in (wide, high):
        for convolution in (m for m in model.modules() if isinstance(m, torch.nn.Conv2d)):
            with torch.no_grad():
                kernel = convolution.weight
                kernel.copy_((kernel + kernel.transpose(2, 3)) / 2)
    images = torch.rand(2, 3, 8, 16)
    torch.testing.assert_close(high(images.transpose(2, 3)), wide(images))
    assert not torch.allclose(high(images.reshape(2, 3, 16, 8)), wide(images))


def test_gradient_checkpointing_changes_no_gradient() -> None:
    found = []
    for enable in (False, True):
        model = small(drop_path_rate=0.0).double().train()
        model.set_grad_checkpointing(enable)
        images_ = torch.linspace(0, 1, 2 * 3 * 256, dtype=torch.float64).view(2, 3, 16, 16)
        model(images_).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*found)
