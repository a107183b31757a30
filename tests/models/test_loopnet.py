"""LoopNet against the same network written with plain tensor operations."""

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry import cost
from smallfry.errors import UsageError
from smallfry.models import FromImages, LoopNet
from smallfry.models.loopnet import SMALLEST_VARIANCE

SIZES = {  # parameters, and most multiply-accumulates of a 32×32 image
    "loopnet_70k": (68_616, 12.5e6),
    "loopnet_300k": (286_648, 45e6),
    "loopnet_1m": (985_400, 100e6),
    "loopnet_2m": (1_972_792, 130e6),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_keep_within_their_names(name: str) -> None:
    parameters, most = SIZES[name]
    found = cost(timm.create_model(name, num_classes=10), torch.zeros(1, 3, 32, 32))
    assert found.parameters == parameters
    assert 0.5 * most < found.macs <= most


def small(**settings: object) -> LoopNet:
    torch.manual_seed(0)
    sizes = {"widths": (6, 10), "depths": (2, 1), "loops": (1, 3), "num_classes": 4}
    model = LoopNet(**(sizes | settings)).double()  # type: ignore[arg-type]
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


def by_hand(model: LoopNet, images: Tensor) -> Tensor:
    w = dict(model.state_dict())

    def norm(x: Tensor, name: str) -> Tensor:
        mean, variance, scale, shift = (
            w[f"{name}.{part}"][:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-5).sqrt() * scale + shift

    x = F.gelu(F.conv2d(images, w["stem.weight"], w["stem.bias"]))
    for s, stage in enumerate(model.stages):
        x = F.conv2d(x, w[f"stages.{s}.enter.0.weight"], padding=1)
        x = F.gelu(norm(F.max_pool2d(x, 2), f"stages.{s}.enter.2"))
        for i, layer in enumerate(stage.layers):
            for loop in range(len(layer.norms)):
                name = f"stages.{s}.layers.{i}"
                change = F.conv2d(x, w[f"{name}.conv.weight"], padding=1)
                change = F.gelu(norm(change, f"{name}.norms.{loop}"))
                x = x + change if layer.residual else change
    return x.flatten(2).max(2).values @ w["head.weight"].T * model.logit_scale


@pytest.mark.parametrize("residual", [False, True])
def test_model_is_what_its_description_says(residual: bool) -> None:
    model, images = small(residual=residual), torch.randn(3, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(model(images), by_hand(model, images), rtol=1e-10, atol=1e-10)


def test_loops_add_norms_and_no_other_weights() -> None:
    once, thrice = (LoopNet(widths=(8,), depths=(1,), loops=(n,)) for n in (1, 3))
    added = dict(thrice.named_parameters()).keys() - dict(once.named_parameters()).keys()
    assert added == {f"stages.0.layers.0.norms.{i}.{p}" for i in (1, 2) for p in ("weight", "bias")}


def test_whitened_patches_are_uncorrelated_and_of_equal_variance() -> None:
    torch.manual_seed(1)
    model = LoopNet().double()
    assert isinstance(model, FromImages)
    mixing = torch.randn(3, 3, dtype=torch.float64)
    noise = torch.randn(64, 3, 17, 17, dtype=torch.float64)
    images = torch.einsum("cd,ndhw->nchw", mixing, noise)
    images = images + images.roll(1, 3)  # neighbours are alike
    model.initialize(images)
    found = model.stem(images)
    half = found.shape[1] // 2
    torch.testing.assert_close(found[:, half:], -found[:, :half])  # each direction in both signs
    rows = found[:, :half].permute(0, 2, 3, 1).reshape(-1, half)
    patches = images.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12)
    variances = torch.linalg.eigvalsh(patches.T @ patches / len(patches))
    expected = variances / (variances + SMALLEST_VARIANCE)
    torch.testing.assert_close(rows.T @ rows / len(rows), expected.diag(), rtol=1e-8, atol=1e-10)


def test_grey_and_constant_images_give_finite_filters() -> None:
    model = LoopNet(in_chans=1)
    model.initialize(torch.ones(4, 1, 8, 8))
    assert model.stem.weight.isfinite().all()


def test_a_stem_that_is_not_whitened_is_trained_and_left_alone() -> None:
    model = LoopNet(whiten=False)
    before = model.stem.weight.clone()
    model.initialize(torch.randn(4, 3, 8, 8))
    assert model.stem.weight.requires_grad
    assert torch.equal(model.stem.weight, before)
    assert not LoopNet().stem.weight.requires_grad


def test_layers_without_residual_begin_as_the_identity() -> None:
    layer = LoopNet(widths=(8,), depths=(1,), loops=(1,)).stages[0].layers[0]
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(layer.conv(x), x)


def test_timms_contract() -> None:
    model = small()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    features = model.forward_features(images)
    assert features.shape[1] == model.num_features == model.head_hidden_size
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(model.get_classifier()(pooled) * model.logit_scale, model(images))
    model.reset_classifier(7)
    assert model(images).shape == (2, 7)
    model.reset_classifier(0)
    torch.testing.assert_close(model(images), pooled)
    maps = timm.create_model("loopnet_300k", features_only=True)(torch.randn(1, 3, 32, 32))
    assert [m.shape[1:] for m in maps] == [(48, 15, 15), (64, 7, 7), (64, 3, 3)]


def test_recomputed_stages_give_the_same_gradients() -> None:
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    found = []
    for recompute in (False, True):
        model = small().train()
        model.set_grad_checkpointing(recompute)
        model(images).square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depths": (1,)}, "a number for each stage, not 2, 1 and 2"),
        ({"loops": (0, 1)}, "loops are at least 1"),
        ({"widths": (), "depths": (), "loops": ()}, "a number for each stage"),
    ],
)
def test_impossible_sizes_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        small(**settings)
