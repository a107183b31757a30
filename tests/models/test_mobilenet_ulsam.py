"""MobileNets with ULSAM against the authors' layer in timm's network, and the table of costs."""

import pytest
import timm
import torch
from zoo_golden import GOLDEN, MODELS, assert_summary, images, load, measured, tensors

from smallfry import cost
from smallfry.errors import UsageError
from smallfry.layers.ulsam import ULSAM, join_subspaces, replace_with_ulsam
from smallfry.models.mobilenet_ulsam import block_name

NAME = "mobilenetv2_ulsam"
COSTS = [  # replaced, followed, parameters, million multiply-accumulates
    ("mobilenetv1_ulsam", (), (11,), 4_234_548, 568.9),
    ("mobilenetv1_ulsam", (), (13,), 4_237_108, 568.8),
    ("mobilenetv1_ulsam", (11,), (), 3_965_748, 516.7),
    (NAME, (), (16,), 3_505_684, 300.8),
    (NAME, (13,), (), 3_387_092, 278.1),
    (NAME, (16,), (), 3_185_684, 285.3),
    (NAME, (10, 13), (), 3_333_152, 267.8),
    (NAME, (15, 16), (), 2_866_496, 269.9),
    (NAME, (13, 16), (), 3_067_904, 262.7),
    (NAME, (12, 13, 15, 16), (), 2_630_936, 224.5),
]


def test_output() -> None:
    entry = MODELS["mobilenetv2_ulsam_13_16_g4"]
    model = timm.create_model(NAME)
    load(model, tensors(entry), lambda state, _: join_subspaces(state))
    with torch.no_grad():
        assert_summary(model(images(entry["input_shape"])), entry["output"])
    found = measured(NAME, entry["input_shape"][1:])
    assert (found.parameters, found.macs) == (entry["n_params"], entry["macs_one_image"])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "blocks", "after", "parameters", "macs"), COSTS)
def test_costs(name: str, blocks: tuple, after: tuple, parameters: int, macs: float) -> None:
    found = measured(name, (3, 224, 224), blocks=blocks, after=after)
    assert found.parameters == parameters
    assert found.macs / 1e6 == pytest.approx(macs, abs=0.06)


@pytest.mark.parametrize(
    ("width", "plain", "parameters", "macs"),
    [(0.75, 2_585_560, 2_435_044, 296.0), (0.5, 1_331_592, 1_264_020, 136.3)],
)
def test_narrower_networks(width: float, plain: int, parameters: int, macs: float) -> None:
    from timm.models.efficientnet import _gen_mobilenet_v1

    with torch.device("meta"):
        model = _gen_mobilenet_v1("mobilenetv1_100", width)
        assert sum(p.numel() for p in model.parameters()) == plain
        replace_with_ulsam(model, [block_name(model, 11)])
        found = cost(model, torch.zeros(1, 3, 224, 224))
    assert found.parameters == parameters
    assert found.macs / 1e6 == pytest.approx(macs, abs=0.06)


@pytest.mark.parametrize("name", [n for n in GOLDEN["timm"] if n.startswith("mobilenet")])
def test_timms_networks_are_those_of_the_table(name: str) -> None:
    entry = GOLDEN["timm"][name]
    found = measured(name, entry["input"])
    assert (found.parameters, found.macs) == (entry["n_params"], entry["macs"])


def test_blocks_are_counted_from_one() -> None:
    model = timm.create_model(NAME, groups=8, num_classes=3)
    assert [block_name(model, n) for n in (1, 2, 13, 16, 17)] == [
        "blocks.0.0", "blocks.1.0", "blocks.4.2", "blocks.5.2", "blocks.6.0"
    ]  # fmt: skip
    assert [n for n, m in model.named_modules() if isinstance(m, ULSAM)] == [
        "blocks.4.2", "blocks.5.2"
    ]  # fmt: skip
    assert model.blocks[4][2].groups == 8
    assert model.default_cfg["architecture"] == NAME
    with pytest.raises(UsageError, match="blocks are 1 to 17, not 18"):
        timm.create_model(NAME, blocks=(18,))
    with pytest.raises(UsageError, match=r"blocks\.4\.0 maps"):
        timm.create_model(NAME, blocks=(11,))
    with pytest.raises(UsageError, match="no pretrained weights"):
        timm.create_model(NAME, pretrained=True)


def test_timms_contract() -> None:
    model = timm.create_model("mobilenetv1_ulsam", in_chans=1, num_classes=5).eval()
    some = torch.rand(1, 1, 64, 64)
    assert model.forward_features(some).shape == (1, 1024, 2, 2)
    assert model(some).shape == (1, 5)
    model.reset_classifier(3)
    assert model(some).shape == (1, 3)
    maps = timm.create_model(NAME, features_only=True)(torch.rand(1, 3, 64, 64))
    assert [m.shape[2] for m in maps] == [32, 16, 8, 4, 2]
