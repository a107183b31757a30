"""SkipblockNet: inverted residuals with early features carried to late stages (arXiv 2107.11170).

    b ← base(stem(image))
    x ← group 1 (group 0 (b) + skip 1 (b));   x ← group 3 (group 2 (x + skip 2 (b)))
    logits ← linear(dropout(hswish(linear(mean over positions hswish(bn(conv1×1 (x)))))))

A skip block pools to the size of the map that it is added to. Abrahamyan et al., ICCV 2021; it
comes with the bias loss, ``objective.name: bias``.
"""

from collections.abc import Callable
from math import sqrt
from typing import Any, NamedTuple, cast

import torch
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.errors import UsageError
from smallfry.layers.classifier import linear_classifier
from smallfry.models.sources import Source, register_sizes

SOURCE = Source("Abrahamyan et al. 2021, arXiv 2107.11170")


class _Row(NamedTuple):
    """Inverted residual."""

    hidden: int
    out: int
    kernel: int
    stride: int
    squeeze: bool
    act: type[nn.Module]


RELU, HSWISH = nn.ReLU, nn.Hardswish
GROUPS = (
    (
        _Row(64, 24, 3, 2, False, RELU),
        _Row(72, 24, 3, 1, False, RELU),
        _Row(72, 40, 5, 2, True, RELU),
        _Row(120, 40, 5, 1, True, RELU),
        _Row(240, 40, 5, 1, True, HSWISH),
    ),
    (
        _Row(240, 80, 3, 2, False, HSWISH),
        _Row(200, 80, 3, 1, False, HSWISH),
        _Row(184, 80, 3, 1, False, HSWISH),
        _Row(184, 80, 3, 1, False, HSWISH),
    ),
    (_Row(480, 112, 3, 1, True, HSWISH), _Row(672, 112, 3, 1, True, HSWISH)),
    (
        _Row(672, 160, 5, 2, True, HSWISH),
        _Row(960, 160, 5, 1, True, HSWISH),
        _Row(960, 160, 5, 1, True, HSWISH),
    ),
)
STEM, FEATURES, HIDDEN = 16, 960, 1280
REDUCTIONS = (4, 8, 8, 16)  # of the groups, after the stem


class SkipblockNet(nn.Module):
    """Convolutional network with two skip blocks.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes; 0 leaves the classifier out.
        width: Factor of all channels but the classifier's hidden ones.
        stem_stride: Stride of the first convolution; 1 for images of 32 pixels.
        drop_rate: Dropout before the classifier.

    Raises:
        UsageError: A width that is not positive, or another stride than 1 and 2.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        width: float = 1.0,
        stem_stride: int = 2,
        drop_rate: float = 0.2,
    ) -> None:
        super().__init__()
        if width <= 0 or stem_stride not in (1, 2):
            raise UsageError(
                f"width is positive and stem_stride 1 or 2, not {width:g} and {stem_stride}"
            )
        stem = _divisible(STEM * width)
        self.num_classes, self.num_features = num_classes, _divisible(FEATURES * width)
        self.head_hidden_size, self.drop_rate = HIDDEN, drop_rate
        self.grad_checkpointing = False
        self.first_layer = _normed(in_chans, stem, 3, stem_stride, act=HSWISH)
        base = _Row(stem, stem, 3, 1, False, HSWISH)
        self.base_block = InvertedResidual(stem, base)
        self.blocks, channels = nn.ModuleList(), stem
        self.feature_info = []
        for number, (rows, reduction) in enumerate(zip(GROUPS, REDUCTIONS, strict=True)):
            group = []
            for row in rows:
                row = row._replace(hidden=_scaled(row.hidden, width), out=_scaled(row.out, width))
                group.append(InvertedResidual(channels, row))
                channels = row.out
            self.blocks.append(nn.Sequential(*group))
            info = {"num_chs": channels, "reduction": reduction * stem_stride}
            self.feature_info.append(info | {"module": f"blocks.{number}"})
        first, second = (self.feature_info[i]["num_chs"] for i in (0, 1))
        self.skip1 = SkipBlock(stem, _divisible(stem * 6), cast(int, first), 5)
        self.skip2 = SkipBlock(stem, _divisible(stem * 2.3), cast(int, second), 3)
        self.conv = _normed(channels, self.num_features, 1, act=HSWISH)
        hidden = nn.Linear(self.num_features, HIDDEN)
        self.classifier = nn.Sequential(
            hidden, nn.Hardswish(), nn.Dropout(drop_rate), linear_classifier(HIDDEN, num_classes)
        )
        self.apply(_initialize)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns of the parameters of each layer, for layer-wise learning rates."""
        blocks = r"^blocks\.(\d+)" if coarse else r"^blocks\.(\d+)\.(\d+)"
        stem = r"^first_layer|^base_block|^skip"
        return {"stem": stem, "blocks": [(blocks, None), (r"^conv\.", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations inside groups in the backward pass."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.classifier[-1]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last linear layer; pooling stays the mean."""
        self.num_classes = num_classes
        self.classifier[-1] = linear_classifier(HIDDEN, num_classes).to(
            next(self.first_layer.parameters())
        )
        self.classifier[-1].apply(_initialize)

    def forward_features(self, images: Tensor) -> Tensor:
        """Map images (batch, channels, side, side) to (batch, num_features, height, width)."""
        base = self.base_block(self.first_layer(images))
        x = base
        for group, skip in zip(self.blocks, (self.skip1, self.skip2, None, None), strict=True):
            if self.grad_checkpointing and self.training:
                x = checkpoint_seq(cast(nn.Sequential, group), x)
            else:
                x = group(x)
            if skip is not None:
                x = x + skip(base, x.shape[2:])
        return cast(Tensor, self.conv(x))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute logits (batch, classes), or the classifier's hidden features (batch, 1280)."""
        hidden = self.classifier[:-1](features.mean(dim=(2, 3)))
        return cast(Tensor, hidden if pre_logits else self.classifier[-1](hidden))

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits (batch, classes) of images (batch, channels, side, side)."""
        return self.forward_head(self.forward_features(images))


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, squeeze-and-excitation and projection."""

    def __init__(self, before: int, row: _Row) -> None:
        super().__init__()
        self.residual = row.stride == 1 and before == row.out
        hidden = row.hidden
        self.conv = nn.Sequential(
            *_normed(before, hidden, 1, act=row.act),
            *_normed(hidden, hidden, row.kernel, row.stride, groups=hidden, act=row.act),
            SqueezeExcitation(hidden) if row.squeeze else nn.Identity(),
            *_normed(hidden, row.out, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Transform (batch, before, height, width)."""
        change = self.conv(x)
        return cast(Tensor, x + change if self.residual else change)


class SqueezeExcitation(nn.Module):
    """Gate of each channel from the means of all."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = _divisible(channels // 4)
        self.fc = nn.Sequential(
            nn.Linear(channels, squeezed), nn.ReLU(), nn.Linear(squeezed, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Scale (batch, channels, height, width)."""
        gates = F.hardsigmoid(self.fc(x.mean(dim=(2, 3))))
        return x * gates[:, :, None, None]


class SkipBlock(nn.Module):
    """Path from early features to the size of a late map."""

    def __init__(self, before: int, hidden: int, out: int, kernel: int) -> None:
        super().__init__()
        self.core_block = nn.Sequential(
            *_normed(before, hidden, 1, act=RELU),
            *_normed(hidden, hidden, kernel, groups=hidden, act=RELU),
            *_normed(hidden, out, 1),
        )

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        """Transform (batch, before, ...) to (batch, out, *size)."""
        return cast(Tensor, self.core_block(F.adaptive_avg_pool2d(x, (size[0], size[1]))))


def _normed(
    before: int,
    out: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    act: type[nn.Module] | None = None,
) -> nn.Sequential:
    convolution = nn.Conv2d(before, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out), *([] if act is None else [act()]))


def _divisible(channels: float) -> int:
    """Round to a multiple of 8, at least 8 and never down by more than a tenth."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def _scaled(channels: int, width: float) -> int:
    return channels if width == 1 else _divisible(channels * width)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        fan = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
        nn.init.normal_(module.weight, std=sqrt(2 / fan))
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)


SIZES: dict[str, dict[str, Any]] = {"skipblocknet_m": {}}
default_cfgs = generate_default_cfgs(
    {
        name: {
            "input_size": (3, 224, 224),
            "num_classes": 1000,
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "crop_pct": 0.875,
            "first_conv": "first_layer.0",
            "classifier": "classifier.3",
        }
        for name in SIZES
    }
)


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    build = cast(Callable[..., nn.Module], build_model_with_cfg)
    features = {"out_indices": tuple(range(len(GROUPS))), "feature_cls": "hook"}
    return build(SkipblockNet, name, pretrained, feature_cfg=features, **(SIZES[name] | kwargs))


register_sizes(__name__, SIZES, _create)
