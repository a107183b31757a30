"""Rectangular images in every architecture, or one message that names why not."""

import pytest
import timm
import torch

import smallfry  # noqa: F401  registers the models
from smallfry.data import load_data
from smallfry.errors import UsageError
from smallfry.training.config import ModelConfig
from smallfry.training.model_source import create_model

FIXED = (
    *("cct_2_3x2_32", "cvt_2_4_32", "vit_lite_2_4_32", "cct_7_3x1_32_sine"),
    *("dhvt_tiny_cifar_patch4", "gated_mlp", "vitrm_tiny_patch4_32", "vitrm_plus_tiny_32"),
)
CONVOLUTIONS = (
    *("loopnet_70k", "resnet8_mlperf_tiny", "resnet20_biper", "simplenet_cifar_310k"),
    "skipblocknet_m",
)


@pytest.mark.parametrize("name", FIXED + CONVOLUTIONS)
def test_rectangles_are_taken_upright_and_lying(name):
    config = timm.get_pretrained_cfg(name)
    depth = {"depth": 1} if name in FIXED and name != "gated_mlp" else {}
    channels = config.input_size[0]
    for size in ((16, 24), (24, 16)):
        given = {"img_size": size} if config.fixed_input_size else {}
        model = timm.create_model(name, in_chans=channels, num_classes=3, **given, **depth).eval()
        with torch.inference_mode():
            assert model(torch.rand(2, channels, *size)).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("trm_sudoku4_micro", [16, 24], "a TRM takes square grids"),
        ("dhvt_tiny_cifar_patch4", [18, 24], "DHVT takes images of multiples of 4 pixels"),
        ("vitrm_tiny_patch4_32", [16, 18], "patch_size 4 does not divide img_size 16×18"),
        ("paper_vit_base_patch4_32", [16, 18], "16×18"),
    ],
)
def test_sizes_that_a_model_does_not_take_are_one_message(name, size, message):
    data = load_data("digits", image_size=size, limit=20)
    with pytest.raises(UsageError, match=rf"(?s)can't be built for images of 1×.*{message}"):
        create_model(ModelConfig(name), data)
