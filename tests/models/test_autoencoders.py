import pytest
import torch
from torch import nn

from smallfry.errors import UsageError
from smallfry.models.autoencoders import (
    CURVES_SIZES,
    FACES_SIZES,
    MNIST_SIZES,
    Autoencoder,
    DeepLinear,
    SmallConvNet,
)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_autoencoders_have_the_papers_numbers_of_parameters() -> None:
    assert count(Autoencoder(CURVES_SIZES)) == 842_340
    assert count(Autoencoder(MNIST_SIZES)) == 2_837_314
    layers = [m for m in Autoencoder(FACES_SIZES).modules() if isinstance(m, nn.Linear)]
    assert [m.in_features for m in layers] == [625, 2000, 1000, 500, 30, 500, 1000, 2000]


def test_decoder_mirrors_the_encoder_and_images_go_in_as_they_are() -> None:
    model = Autoencoder(CURVES_SIZES)
    images = torch.rand(3, 1, 28, 28)
    assert model.encode(images).shape == (3, 6)
    assert torch.equal(model(images), model(images.flatten(1)))
    assert model(images).shape == (3, 784)


def test_a_linear_code_takes_both_signs_and_a_rectified_one_does_not() -> None:
    torch.manual_seed(0)
    images = torch.rand(64, 784)
    assert Autoencoder(CURVES_SIZES).encode(images).min() < 0
    assert Autoencoder(CURVES_SIZES, code="activation").encode(images).min() == 0


def test_tanh_autoencoder_has_no_rectifier() -> None:
    model = Autoencoder((8, 4, 2), activation="tanh")
    assert not any(isinstance(m, nn.ReLU) for m in model.modules())
    assert sum(isinstance(m, nn.Tanh) for m in model.modules()) == 2


def test_equal_layers_start_with_different_weights() -> None:
    layers = [m for m in DeepLinear().modules() if isinstance(m, nn.Linear)]
    assert not torch.equal(layers[5].weight, layers[6].weight)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_deep_linear_network_is_64_layers_and_affine(batch_norm: bool) -> None:
    model = DeepLinear(batch_norm).double().eval()
    assert sum(isinstance(m, nn.Linear) for m in model) == 64
    assert any(isinstance(m, nn.BatchNorm1d) for m in model) == batch_norm
    x, y = torch.rand(2, 5, 784, dtype=torch.float64)
    middle = model((x + y) / 2)
    torch.testing.assert_close(middle, (model(x) + model(y)) / 2, rtol=1e-6, atol=1e-12)


def test_convnet_sees_the_places_of_the_specification() -> None:
    model, sizes = SmallConvNet(), []
    for m in model:
        if isinstance(m, nn.Conv2d):
            m.register_forward_hook(lambda *args: sizes.append(args[2].shape[1:]))
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert [tuple(s) for s in sizes] == [(32, 30, 30), (32, 8, 8), (64, 1, 1)]


@pytest.mark.parametrize(
    "wrong", [{"sizes": [5]}, {"sizes": [5, 0]}, {"activation": "gelu"}, {"code": "none"}]
)
def test_wrong_settings_are_named(wrong: dict) -> None:
    with pytest.raises(UsageError):
        Autoencoder(**({"sizes": [4, 2]} | wrong))
