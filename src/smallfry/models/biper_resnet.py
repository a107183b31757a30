"""ResNet-20 with a shortcut around every convolution, for binary weights and activations.

    h ← hardtanh(norm(conv3×3(image)))
    h ← hardtanh(norm(conv3×3(h)) + shortcut(h));  h ← hardtanh(norm(conv3×3(h)) + h)    each block
    logits = linear(norm(mean(h)))

Where the width changes, the shortcut is a mean over 2×2 pixels with zeros in the new channels. The
convolutions of the blocks are those that ``smallfry.compress.BiPer`` makes binary. Source: Vargas
et al., BiPer, CVPR 2024.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

from timm.models import build_model_with_cfg, generate_default_cfgs
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.errors import UsageError
from smallfry.layers.classifier import linear_classifier
from smallfry.models.sources import Source, register_sizes

__all__ = ["DoubleResidualNet"]

SOURCE = {"resnet20_biper": Source("Vargas et al., BiPer, CVPR 2024", "edmav4/BiPer", "MIT")}


class DoubleResidualNet(nn.Module):
    """ResNet with a shortcut around every convolution.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes; 0 leaves the classifier out.
        widths: Channels of the stages, none smaller than the one before.
        depth: Blocks of each stage.

    Raises:
        UsageError: No stage or no block, or widths that get smaller.

    Example:
        >>> import torch
        >>> from smallfry.models.biper_resnet import DoubleResidualNet
        >>> DoubleResidualNet(widths=(8, 16), depth=1)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 10,
        widths: Sequence[int] = (16, 32, 64),
        depth: int = 3,
    ) -> None:
        super().__init__()
        if not widths or depth < 1 or list(widths) != sorted(widths) or widths[0] < 1:
            raise UsageError(f"widths {tuple(widths)} must not get smaller, and depth be positive")
        self.num_classes, self.num_features = num_classes, widths[-1]
        self.head_hidden_size = widths[-1]
        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        blocks, before = [], widths[0]
        for stage, width in enumerate(widths):
            for number in range(depth):
                blocks.append(DoubleResidual(before, width, 2 if stage and not number else 1))
                before = width
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm1d(widths[-1])
        self.head = linear_classifier(widths[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; pooling stays the mean."""
        self.num_classes = num_classes
        self.head = linear_classifier(self.num_features, num_classes).to(self.conv1.weight)

    def forward_features(self, images: Tensor) -> Tensor:
        """Map images (batch, channels, side, side) to (batch, widths[-1], height, width)."""
        return cast(Tensor, self.blocks(F.hardtanh(self.bn1(self.conv1(images)))))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute logits (batch, classes), or pooled features (batch, widths[-1])."""
        pooled: Tensor = self.norm(features.mean(dim=(2, 3)))
        return pooled if pre_logits else cast(Tensor, self.head(pooled))

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits (batch, classes) of images (batch, channels, side, side)."""
        return self.forward_head(self.forward_features(images))


class DoubleResidual(nn.Module):
    """Two 3×3 convolutions with norms, and a shortcut around each."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.new = stride, width - before

    def forward(self, features: Tensor) -> Tensor:
        """Compute features (batch, width, height / stride, width / stride)."""
        shortcut = F.avg_pool2d(features, 2, ceil_mode=True) if self.stride == 2 else features
        first = self.new // 2
        shortcut = F.pad(shortcut, (0, 0, 0, 0, first, self.new - first))
        middle = F.hardtanh(self.bn1(self.conv1(features)) + shortcut)
        return F.hardtanh(self.bn2(self.conv2(middle)) + middle)


default_cfgs = generate_default_cfgs(
    {  # 269,850 parameters and 40.6 MMAC for 10 classes
        "resnet20_biper": {
            "input_size": (3, 32, 32),
            "num_classes": 10,
            "mean": (0.4914, 0.4822, 0.4465),  # CIFAR-10's
            "std": (0.2470, 0.2435, 0.2616),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "first_conv": "conv1",
            "classifier": "head",
        }
    }
)


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    build = cast(Callable[..., nn.Module], build_model_with_cfg)
    return build(DoubleResidualNet, name, pretrained, **kwargs)


register_sizes(__name__, default_cfgs, _create)
