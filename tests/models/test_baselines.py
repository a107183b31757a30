import pytest
import timm
import torch
from torch import nn

import smallfry  # noqa: F401  # registers the models
from smallfry.errors import UsageError

PAPERS = {
    "paper_vit_small_patch4_32": 16_876_138,
    "paper_vit_base_patch4_32": 85_125_994,
    "paper_vit_large_patch4_32": 302_367_850,
    "paper_resnet18_32": 11_181_642,
    "paper_resnet34_32": 21_289_802,
    "paper_resnet50_32": 23_528_522,
}


@pytest.mark.parametrize(("name", "parameters"), PAPERS.items())
def test_baselines_have_the_papers_numbers_of_parameters(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_vit_has_no_bias_in_qkv_and_heads_of_64() -> None:
    with torch.device("meta"):
        model = timm.create_model("paper_vit_small_patch4_32", num_classes=10)
    assert model.blocks[0].attn.qkv.bias is None
    assert model.blocks[0].attn.head_dim == 64
    assert model.pos_embed.shape == (1, 65, 512)


def test_vit_sees_a_patch_in_one_token_only() -> None:
    model = timm.create_model("paper_vit_small_patch4_32", depth=1, num_classes=10).eval()
    images = torch.rand(1, 3, 32, 32)
    changed = images.clone()
    changed[0, :, 4:8, 8:12] += 0.5  # the second row's third patch
    differs = (model.patch_embed(images) != model.patch_embed(changed)).any(2)[0]
    assert differs.nonzero().flatten().tolist() == [8 + 2]


def test_vit_refuses_images_that_its_patches_do_not_cover() -> None:
    model = timm.create_model("paper_vit_small_patch4_32", depth=1).eval()
    with pytest.raises(ValueError, match="expected images of 32×32, got 35×35"):
        model(torch.rand(1, 3, 35, 35))  # its last rows would be dropped
    with pytest.raises(UsageError, match="patches of 4×4 don't divide images of 34×32"):
        timm.create_model("paper_vit_small_patch4_32", img_size=(34, 32))


def test_vit_takes_images_by_height_and_width_and_gives_features() -> None:
    settings = {"depth": 3, "img_size": (32, 16)}
    model = timm.create_model("paper_vit_small_patch4_32", features_only=True, **settings)
    assert [f.shape for f in model(torch.rand(1, 3, 32, 16))] == [(1, 512, 8, 4)] * 3


def test_stem_for_small_images_keeps_the_map_that_the_imagenet_stem_loses() -> None:
    images = torch.rand(2, 3, 32, 32)
    small = timm.create_model("resnet18_cifar", num_classes=10).eval()
    assert small.forward_features(images).shape == (2, 512, 4, 4)
    assert timm.create_model("paper_resnet18_32").eval().forward_features(images).shape[2:] == (
        1,
        1,
    )
    assert small(images).shape == (2, 10)
    small.reset_classifier(7)
    assert small(images).shape == (2, 7)


def test_features_of_the_small_stem_say_their_true_strides() -> None:
    model = timm.create_model("resnet18_cifar", features_only=True)
    images = torch.rand(1, 3, 32, 32)
    for features, stride in zip(model(images), model.feature_info.reduction(), strict=True):
        assert features.shape[2] == 32 // stride


def test_small_stem_takes_grey_images() -> None:
    model = timm.create_model("resnet18_cifar", in_chans=1, num_classes=3)
    assert isinstance(model.conv1, nn.Conv2d)
    assert model(torch.rand(2, 1, 16, 16)).shape == (2, 3)
